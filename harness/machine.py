"""What a number was measured on: GPU, driver, clocks, CPU and library versions."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

UNAVAILABLE = "unavailable"
LIBRARIES = {"torch": "torch", "triton": "triton", "transformers": "transformers", "lm_eval": "lm-eval"}

# nvmlClocksEventReasons of nvml.h that slow a kernel down; idle and application-clock settings are not among them.
THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}

SMI_FIELDS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks_throttle_reasons.active,ecc.mode.current,power.limit"
)


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine line as data. `device` is cpu, cuda or cuda:<n>; `gpu` is None on a CPU run."""
    import torch

    machine: dict[str, Any] = {
        "gpu": None if device == "cpu" else gpu_state(device),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        **{key: _version(name) for key, name in LIBRARIES.items()},
    }
    machine["identity"] = _hash(machine)
    return machine


def rank() -> int:
    """Of this process among those that a launcher started; only 0 writes and speaks."""
    return int(os.environ.get("RANK", "0"))


def identity(device: str = "cpu") -> str:
    """A short hash of what decides a number: the GPU and its driver, or the CPU and its threads; the versions."""
    return describe(device)["identity"]


def kind(machine: dict[str, Any]) -> str:
    """What accuracy and cost may depend on: the model of GPU or CPU and the versions, not which one nor its threads."""
    processor = machine["gpu"]["name"] if machine.get("gpu") else (machine.get("cpu") or {}).get("model")
    return repr([processor, machine.get("python"), *(machine.get(name) for name in LIBRARIES)])


def gpu_state(device: str = "cuda") -> dict[str, Any]:
    """The GPU and its momentary clocks [MHz], throttle reasons and other processes; read it around a timed run too.

    What neither NVML nor nvidia-smi tells is "unavailable".
    """
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    state: dict[str, Any] = {
        "name": properties.name,
        "uuid_hash": hashlib.sha256(uuid.encode()).hexdigest()[:12] if uuid else UNAVAILABLE,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **dict.fromkeys(
            ("driver", "sm_clock", "memory_clock", "max_sm_clock", "throttle", "ecc", "power_limit_w", "processes"),
            UNAVAILABLE,
        ),
    }
    handle = _handle(device)
    state.update((_nvidia_smi(_uuid(properties)) or {}) if handle == UNAVAILABLE else _state(handle))
    return state


def line(machine: dict[str, Any], record: dict[str, Any] | None = None) -> str:
    """One line for above a table; with a record, also the code that measured it."""
    parts = []
    if gpu := machine.get("gpu"):
        clocks = f"{gpu['sm_clock']} of {gpu['max_sm_clock']} MHz" if gpu["sm_clock"] != UNAVAILABLE else UNAVAILABLE
        throttle = ", ".join(gpu["throttle"]) if isinstance(gpu["throttle"], list) else gpu["throttle"]
        parts += [
            f"{gpu['name']} ({gpu['uuid_hash']})",
            f"driver {gpu['driver']}",
            f"CUDA {gpu['cuda']}",
            f"SM clock {clocks}",
            f"throttling: {throttle or 'none'}",
            f"ECC {gpu['ecc']}",
            f"other processes: {gpu['processes']}",
        ]
    cpu = machine["cpu"]
    parts += [f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads", machine["os"]]
    parts += [f"{name} {machine[name]}" for name in ("python", *LIBRARIES) if machine.get(name)]
    if record:
        commit = (record.get("git") or {}).get("commit")
        if commit:
            parts.append(f"git {commit[:10]}{' (uncommitted changes)' if record['git'].get('dirty') else ''}")
        else:
            parts.append(f"source hash {record.get('source')}")
    return " · ".join(parts)


def _hash(machine: dict[str, Any]) -> str:
    gpu, cpu = machine["gpu"], machine["cpu"]
    processor = [gpu[key] for key in ("name", "uuid_hash", "driver", "cuda")] if gpu else [cpu["cores"], cpu["threads"]]
    stable = [*processor, cpu["model"], machine["python"], *(machine[key] for key in LIBRARIES)]
    return hashlib.sha256(repr(stable).encode()).hexdigest()[:12]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.lower().startswith("model name"):
                return entry.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _reasons(mask: int) -> list[str]:
    return [name for bit, name in THROTTLE_REASONS.items() if mask & bit]


@cache
def _library() -> Any | None:
    """NVML, initialised for the life of the process; None where it is not installed or has no driver behind it."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:
        return None
    return nvml


def _read(name: str, *arguments: Any) -> Any:
    try:
        value = getattr(_library(), name)(*arguments)
    except Exception:  # this GPU or driver does not tell
        return UNAVAILABLE
    return value.decode() if isinstance(value, bytes) else value


def _handle(device: str) -> Any:
    """NVML's handle of a device of torch's, or UNAVAILABLE."""
    import torch

    if _library() is None or not device.startswith("cuda"):
        return UNAVAILABLE
    return _read("nvmlDeviceGetHandleByUUID", _uuid(torch.cuda.get_device_properties(device)))


def _uuid(properties: Any) -> str:
    uuid = str(getattr(properties, "uuid", ""))
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


class DeviceLost(Exception):
    """The device fails every further call of this process: one sentence, and how the other cells are measured."""


def answers(device: str) -> bool:
    """Whether a device still serves this process: after a kernel read memory that is not its own, CUDA never does."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def watch(device: str) -> dict[str, Any] | None:
    """What may disturb a timed run, at this moment: `throttle` reasons, `processes` of others, `sm_clock` [MHz].

    None where NVML does not tell; starting nvidia-smi would itself take a second of the run.
    """
    handle = _handle(device)
    if handle == UNAVAILABLE:
        return None
    state = _state(handle)
    return {name: state[name] for name in ("throttle", "processes", "sm_clock")}


def energy_counter(device: str) -> Callable[[], int] | None:
    """Reads the energy that the GPU has used since its driver started [mJ]; None where it does not tell."""
    handle = _handle(device)
    if handle == UNAVAILABLE or not isinstance(_read("nvmlDeviceGetTotalEnergyConsumption", handle), int):
        return None
    return lambda: _read("nvmlDeviceGetTotalEnergyConsumption", handle)


def process_memory(device: str) -> int | None:
    """Bytes that this process holds on the GPU as its driver counts them; None where it does not, and on a CPU, where a
    process keeps what earlier cells took."""
    if not device.startswith("cuda"):
        return None
    processes = _read("nvmlDeviceGetComputeRunningProcesses", _handle(device))
    own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()] if isinstance(processes, list) else []
    return own[0] if own else None


def _state(handle: Any) -> dict[str, Any]:
    nvml: Any = _library()
    throttle = _read("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    ecc, limit = _read("nvmlDeviceGetEccMode", handle), _read("nvmlDeviceGetPowerManagementLimit", handle)
    processes = _read("nvmlDeviceGetComputeRunningProcesses", handle)
    return {
        "driver": _read("nvmlSystemGetDriverVersion"),
        "sm_clock": _read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        "memory_clock": _read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        "max_sm_clock": _read("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
        "throttle": _reasons(throttle) if isinstance(throttle, int) else UNAVAILABLE,
        "ecc": ("on" if ecc[0] else "off") if isinstance(ecc, (list, tuple)) else UNAVAILABLE,
        "power_limit_w": limit / 1000 if isinstance(limit, int) else UNAVAILABLE,
        "processes": sum(p.pid != os.getpid() for p in processes) if isinstance(processes, list) else UNAVAILABLE,
    }


def _nvidia_smi(uuid: str) -> dict[str, Any] | None:
    def query(what: str) -> list[str] | None:
        command = ["nvidia-smi", f"--id={uuid}", f"--query-{what}", "--format=csv,noheader,nounits"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return None

    def number(text: str, kind: type = int) -> Any:
        try:
            return kind(text)
        except ValueError:
            return UNAVAILABLE

    lines = query(f"gpu={SMI_FIELDS}")
    if not lines:
        return None
    driver, sm, memory, max_sm, throttle, ecc, limit = (part.strip() for part in lines[0].split(","))
    processes = query("compute-apps=pid")
    return {
        "driver": driver,
        "sm_clock": number(sm),
        "memory_clock": number(memory),
        "max_sm_clock": number(max_sm),
        "throttle": _reasons(int(throttle, 16)) if throttle.startswith("0x") else UNAVAILABLE,
        "ecc": {"Enabled": "on", "Disabled": "off"}.get(ecc, UNAVAILABLE),
        "power_limit_w": number(limit, float),
        "processes": UNAVAILABLE if processes is None else sum(p.strip() != str(os.getpid()) for p in processes),
    }
