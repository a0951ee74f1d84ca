"""Compile every kernel for Hopper (sm_90a) as its wrapper launches it, without a GPU; one JSON line per launch.

Run as a program without TRITON_INTERPRET: python hopper.py
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from sparse_kernels import ACTIVATIONS, bandwidth
from sparse_kernels.expert_ffn import kernel as expert_ffn
from sparse_kernels.input_linear import kernel as input_linear
from sparse_kernels.selection import kernel as selection

MODULES = (selection, input_linear, expert_ffn, bandwidth)


class Driver:
    """Stands for a Hopper GPU: enough of Triton's driver to compile, not to launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda


def stack_bytes(cubin: bytes) -> int:
    """Bytes of stack and local memory per thread: what did not fit in registers."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def compile_only(kernel, grid, *args, **options):
    compiled = kernel.warmup(*args, grid=grid, **options)
    ptx = compiled.asm["ptx"]
    record = {
        "kernel": kernel.fn.__name__,
        "dtype": str(args[0].dtype),
        "batch": options.get("BATCH"),
        "target": re.search(r"\.target (\w+)", ptx).group(1),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
        + len(re.findall(r"cp\.async\.\S+ \[.*?\], \[.*?\], 0x10", ptx)),
        "matrix": bool(re.search(r"mma\.sync|wgmma\.mma_async", ptx)),
        "stack": stack_bytes(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
    }
    print(json.dumps(record), flush=True)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    for module in MODULES:
        module.run = compile_only
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: 132
    bandwidth.stream_read(torch.empty(2**16), torch.empty(1))
    one = torch.empty(1)
    for dtype in (torch.bfloat16, torch.float16):
        for batch in (1, 4, 64):
            x, score = torch.empty(batch, 4096, dtype=dtype), torch.empty(batch, 344)
            up = torch.empty(11008, 4096, dtype=dtype)
            index, count = selection.compact(x, one, True)
            input_linear.input_linear(x, up.view(4096, 11008), index, count, one, None, 1)
            blocks = selection.compact(score, one, False)
            h = expert_ffn.expert_hidden(x, up, up, None, None, score, one, *blocks, "silu")
            input_linear.input_linear(h, up, *blocks, None, torch.empty(4096, dtype=dtype), 32)
    bias = torch.empty(11008, dtype=up.dtype)
    for activation in ACTIVATIONS:
        expert_ffn.expert_hidden(x[:1], None, up, None, bias, score[:1], one, *blocks, activation)
    input_linear.input_linear(x[:1].float(), up.view(4096, 11008).float(), index, count, torch.empty(4096), None, 1)


if __name__ == "__main__":
    main()
