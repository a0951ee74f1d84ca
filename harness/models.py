"""Models by name: aliases of `models.toml`, local folders and Hugging Face ids; their weights real or random."""

from __future__ import annotations

import gc
import json
import os
import re
import struct
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.errors import UsageError, unknown
from methods.families import ACTIVATION_NAMES

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """What a name stands for. `source` is what transformers loads: a folder or a hub id.

    `kind` is the kind of its own weights: "real", or "reference" for the embedded models. `layout` is the transformers
    model type, `activation` that of the FFN, `parameters` the published count; all None until known.
    """

    name: str
    kind: str = "real"
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    gated: bool = False
    mirror: str | None = None
    layout: str | None = None
    activation: str | None = None
    parameters: int | None = None
    own_code: bool = False
    note: str = ""
    architecture: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def source(self) -> str:
        return str(self.path or self.hub_id)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients; `tokenizer` is None where random weights come without one."""

    model: Any
    tokenizer: Any
    spec: ModelSpec
    weights_kind: str
    config: Any


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((HERE / "models.toml").read_text(encoding="utf-8"))


def aliases() -> list[str]:
    """The names of `models.toml`, in its order."""
    return list(_table())


def _architecture(name: str) -> dict[str, Any] | None:
    entry = _table()[name]
    base = _architecture(entry["like"]) if "like" in entry else None
    own = entry.get("architecture")
    return {**(base or {}), **(own or {})} or None


def resolve(name: str) -> ModelSpec:
    """The model that `name` stands for: an alias, a folder, or a hub id `org/name` with an optional `@revision`.

    Raises UsageError, with the nearest aliases, for anything else.
    """
    if name in _table():
        entry = {k: v for k, v in _table()[name].items() if k not in ("hub", "like", "architecture", "path")}
        architecture = _architecture(name)
        if architecture:
            return ModelSpec(
                name, hub_id=_table()[name].get("hub"), architecture=architecture,
                **{"layout": architecture["model_type"], **entry},
            )  # fmt: skip
        return ModelSpec(name, kind="reference", path=HERE / _table()[name]["path"], **entry)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"'{name}' has no config.json: give a folder written by save_pretrained.")
        raw = _read_json(folder / "config.json")
        activation = str(raw.get("hidden_act") or raw.get("activation_function") or raw.get("hidden_activation"))
        return ModelSpec(
            name, path=folder, layout=raw.get("model_type"), activation=ACTIVATION_NAMES.get(activation, activation)
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"there is no model folder '{name}': check the path, or see `python -m harness ls models`.")
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name):
        return ModelSpec(name, hub_id=match[1], revision=match[2])
    raise unknown("model", name, aliases(), "A folder or a hub id like org/name works too.")


def resolve_device(name: str = "auto") -> str:
    """`auto`, `cpu`, `cuda` or `cuda:<n>` as torch names it; a launcher's processes get a GPU each.

    Raises UsageError for a device this machine lacks.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UsageError(f"unknown device '{name}': choose auto, cpu, cuda or cuda:<n>.")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA GPU here: use --device cpu, or install a torch with CUDA.")
    if match[1] and int(match[1]) >= torch.cuda.device_count():
        raise UsageError(f"there is no '{name}': this machine has {torch.cuda.device_count()} GPU(s).")
    return name


def resolve_dtype(name: str = "auto", device: str = "cpu") -> str:
    """torch's name of a dtype; `auto` is bfloat16 on a GPU and float32 on a CPU. Raises UsageError."""
    if name == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def config(spec: ModelSpec) -> Any:
    """The transformers config, without weights: from the alias table, the folder, or the hub. Raises UsageError."""
    from transformers import AutoConfig

    _register(spec)
    if spec.architecture:
        fields = dict(spec.architecture)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if spec.path:
        _require_config(spec)
    else:
        _check_hub(spec, ("config.json",))
    try:
        return AutoConfig.from_pretrained(spec.source, revision=spec.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(error, spec) from error


def check(spec: ModelSpec, weights: str = "real") -> None:
    """Raises UsageError, within a second or so, when the weights (or, if synthetic, the config) are out of reach."""
    if weights == "synthetic":
        if not spec.architecture and spec.path:
            _require_config(spec)
        elif not spec.architecture:
            _check_hub(spec, ("config.json",))
    elif spec.path:
        _require_config(spec)
        if problem := weights_problem(spec.path):
            raise UsageError(f"the weights in '{spec.path}' are unusable ({problem}): restore that file.")
    else:
        _check_hub(spec, ("config.json", "tokenizer_config.json"), weights=True)


def load(
    spec: ModelSpec, weights: str = "real", device: str = "auto", dtype: str = "auto", seed: int = 0
) -> LoadedModel:
    """Loads the weights, or with `weights="synthetic"` draws them by `seed`, straight onto the device in the dtype.

    Raises UsageError, before long work, when the weights are missing, gated, damaged or too large for the device.
    """
    import torch

    where = resolve_device(device)
    kind = getattr(torch, resolve_dtype(dtype, where))
    check(spec, weights)
    require_memory(spec, where, dtype)
    configuration = config(spec) if weights == "synthetic" or spec.own_code else None
    if weights == "synthetic":
        model, tokenizer = _draw(configuration, where, kind, seed), None
        if spec.path and (spec.path / "tokenizer_config.json").is_file():
            tokenizer = _tokenizer(spec)
    else:
        model, tokenizer = _read(spec, configuration, where, kind), _tokenizer(spec)
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, spec, "synthetic" if weights == "synthetic" else spec.kind, model.config)


def require_memory(spec: ModelSpec, device: str, dtype: str) -> None:
    """Raises UsageError where the bare weights, real or drawn, exceed the memory: a killed process explains nothing."""
    import torch

    name, configuration = resolve_dtype(dtype, device), config(spec)
    try:
        needed = count_parameters(configuration) * getattr(torch, name).itemsize
    except Exception as error:
        raise _explain(error, spec) from error
    if device == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    else:
        gc.collect()  # what the model before left is free memory again
        torch.cuda.empty_cache()
        memory = torch.cuda.mem_get_info(device)[0]
    if needed > memory:
        free, half = "" if device == "cpu" else " free", "--dtype bf16, " if name == "float32" else ""
        raise UsageError(
            f"{spec.name} needs {needed / 2**30:.1f} GiB in {name} and {device} has {memory / 2**30:.1f} GiB{free}: "
            f"choose {half}a smaller model or another device."
        )


def count_parameters(configuration: Any) -> int:
    """Parameters of the architecture, tied ones once; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    return sum(p.numel() for p in model.parameters())


def _draw(configuration: Any, device: str, dtype: torch.dtype, seed: int) -> Any:
    """Random weights by transformers' own rule: linears and embeddings normal with the config's std, norms neutral."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(configuration, dtype=dtype)


def _read(spec: ModelSpec, configuration: Any, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has its own
    _register(spec)
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    if configuration is not None:
        options["config"] = configuration
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.source, revision=spec.revision, dtype=dtype, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except Exception as error:
        raise _explain(error, spec) from error
    model, told = loaded
    _require_complete(spec, told)
    return model


def _require_complete(spec: ModelSpec, found: dict[str, Any]) -> None:
    """Raises UsageError for parameters that the checkpoint did not fill: transformers draws these at random."""
    for kind, words in (("missing", "lack"), ("mismatched", "have other shapes for")):
        names = sorted(key if isinstance(key, str) else key[0] for key in found[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"the weights of {spec.name} {words} {len(names)} of the parameters that its config.json describes "
                f"({names[0]}{more}): restore the files, or use --weights synthetic."
            )


def _register(spec: ModelSpec) -> None:
    """Tells transformers of an architecture of ours, where it is about to meet one."""
    if spec.layout == "spark_llama":
        from methods.shared.spark_llama import register

        register()


def _tokenizer(spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.source, revision=spec.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(error, spec) from error


def _require_config(spec: ModelSpec) -> None:
    assert spec.path
    if not (spec.path / "config.json").is_file():
        advice = "reinstall the package" if spec.kind == "reference" else "give a folder written by save_pretrained"
        raise UsageError(f"'{spec.path}' has no config.json: {advice}.")


def weights_problem(folder: Path) -> str | None:
    """What is wrong with the weight files of a folder, from names, sizes and headers alone; None if nothing."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            files = sorted(set(_read_json(folder / index).get("weight_map", {}).values()))
            break
    else:
        files = [n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()][:1]
    if not files:
        return "no model.safetensors"
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if name.endswith(".safetensors") and (problem := _safetensors_problem(folder / name)):
            return f"{name} {problem}"
    return None


def _safetensors_problem(path: Path) -> str | None:
    """The header says how long the file must be (https://github.com/huggingface/safetensors#format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return "is cut off or not safetensors"
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            return "has a damaged header"
    return None if size == 8 + length + end else f"has {size} bytes instead of {8 + length + end}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read as JSON ({error}): restore that file.") from None
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' is not a JSON object: restore that file.")
    return content


def _check_hub(spec: ModelSpec, files: tuple[str, ...], weights: bool = False) -> None:
    """Raises UsageError unless the files are in the local cache or the hub would hand them over."""
    from huggingface_hub import auth_check, constants, try_to_load_from_cache

    if spec.hub_id is None:
        raise UsageError(f"nobody has published weights of {spec.name}: {_advice(spec)}")
    cached = [try_to_load_from_cache(spec.hub_id, name, revision=spec.revision) for name in files]
    if all(isinstance(path, str) for path in cached):
        if not weights or weights_problem(Path(str(cached[0])).parent) is None:
            return
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{spec.hub_id} is not in the local cache and HF_HUB_OFFLINE is set: {_advice(spec)}")
    try:
        auth_check(spec.hub_id)
    except Exception as error:
        raise _explain(error, spec) from error


def _advice(spec: ModelSpec) -> str:
    mirror = f"--model {spec.mirror}, " if spec.mirror else ""
    synthetic = "--weights synthetic (FLOPs and latency only), " if spec.architecture else ""
    return f"use {mirror}{synthetic}a local folder, or --model reference."


def _explain(error: Exception, spec: ModelSpec) -> Exception:
    """What a failure of huggingface_hub, transformers or safetensors means to the user; an unknown one unchanged."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {t.__name__ for e in chain for t in type(e).__mro__}
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "NetworkError", "ConnectionError", "TimeoutException"}
    if "GatedRepoError" in names:
        return UsageError(
            f"{spec.hub_id} is gated: accept its licence at https://huggingface.co/{spec.hub_id} and run "
            f"`hf auth login`; or {_advice(spec)}"
        )
    if "RevisionNotFoundError" in names:
        return UsageError(f"{spec.hub_id} has no revision '{spec.revision}': leave it out or check its commits.")
    if "RepositoryNotFoundError" in names or "HFValidationError" in names:
        return UsageError(f"the hub has no public model '{spec.hub_id}': check the spelling, or run `hf auth login`.")
    if names & offline or "couldn't connect" in str(error):
        return UsageError(f"{spec.hub_id} is not in the local cache and the hub is out of reach: {_advice(spec)}")
    if "SafetensorError" in names:
        return UsageError(f"the weights of {spec.name} are damaged ({chain[0]}): download or copy them again.")
    if isinstance(error, (OSError, ValueError)):
        first = str(error).strip().split("\n")[0][:300].rstrip(". ")
        return UsageError(f"{spec.name} cannot be loaded ({first}): check the folder or id, or use --model reference.")
    return error
