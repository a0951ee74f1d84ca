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
from sparse_kernels.attention import kernel as attention
from sparse_kernels.attention import rope as attention_rope
from sparse_kernels.attention import row as attention_row
from sparse_kernels.expert_ffn import kernel as expert_ffn
from sparse_kernels.glue import kernel as glue
from sparse_kernels.input_linear import kernel as linear
from sparse_kernels.input_linear import launch as linear_launch
from sparse_kernels.input_linear import row as linear_row
from sparse_kernels.neuron_ffn import kernel as neuron_ffn
from sparse_kernels.selection import kernel as selection
from sparse_kernels.selection import score as router
from sparse_kernels.selection import top
from sparse_kernels.spark_attention import kernel as spark

MODULES = (
    attention,
    attention_rope,
    attention_row,
    selection,
    router,
    top,
    glue,
    linear,
    linear_row,
    expert_ffn,
    neuron_ffn,
    spark,
    bandwidth,
)


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
    early = options.pop("pdl", True)
    if "PDL" in kernel.arg_names:
        options |= dict(PDL=True, launch_pdl=early)
    compiled = kernel.warmup(*args, grid=grid, **options)
    ptx = compiled.asm["ptx"]
    record = {
        "kernel": kernel.fn.__name__,
        "dtypes": sorted({str(a.dtype) for a in args if isinstance(a, torch.Tensor)}),
        "batch": options.get("BATCH"),
        "target": re.search(r"\.target (\w+)", ptx).group(1),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
        + len(re.findall(r"cp\.async\.\S+ \[.*?\], \[.*?\], 0x10", ptx)),
        "half_fma": bool(re.search(r"fma\.rn\.b?f16", ptx)),
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
            selection.compact(x, one, True)
            blocks = selection.compact(score, one, False)
            neuron_ffn.neuron_hidden(
                x, up, up, None, None, *blocks, "silu", 32, score=score, threshold=one
            )  # fmt: skip
    bias = torch.empty(11008, dtype=up.dtype)
    for activation in ACTIVATIONS:
        neuron_ffn.neuron_hidden(x[:1], None, up, None, bias, *blocks, activation, 32)
    compile_linear()
    compile_selection(one)
    compile_glue()
    compile_ffn(one)
    compile_attention()


def compile_linear() -> None:
    """As `input_linear` and `threshold_linear` call the kernels, on the grids of a GPU."""
    linear_launch.interpreting, linear_launch.multiprocessors = (lambda: True), (lambda device: 132)
    limits = torch.empty(3)
    for dtype in (torch.bfloat16, torch.float16):
        qkv, gate_up, down = (torch.empty(*s, dtype=dtype) for s in ((4096, 12288), (4096, 22016), (11008, 4096)))
        index, norm = torch.empty(344, dtype=torch.int32), torch.empty(4096, dtype=dtype)
        for batch in (1, 4, 64):
            h, wide = torch.empty(batch, 4096, dtype=dtype), torch.empty(batch, 22016, dtype=dtype)
            normed = dict(norm="rms", norm_weight=norm, eps=1e-5, stats=linear.row_stats(h))
            through = linear_row.listed if batch == 1 else linear.linear
            through(h, qkv, "threshold", [4096] * 3, threshold=limits, **normed)
            if batch == 1:  # more rows with all channels are dense
                through(h, gate_up, "all", [22016], **normed)
                linear_row.rows(h, qkv.view(12288, 4096).t(), dtype, **normed)
                linear_row.rows(wide, down.view(4096, 11008).t(), torch.float32, activation="silu", gated=True)
                linear_row.rows(h[None].float(), qkv[:, :4096].reshape(4096, 4096).t(), dtype)
                linear_row.masked(h, qkv, [4096] * 3, threshold=limits, **normed)
                for threshold in (None, limits[:1]):
                    linear_row.masked(h, qkv[:, :4096], [4096], threshold=threshold)
                linear_row.masked(torch.empty(8, 1, 22016), down, [4096], threshold=limits[:1], activation="silu",
                                  gated=True)  # fmt: skip
            gated = dict(threshold=limits[:1], activation="silu", gated=True, center=down[:, 0].contiguous())
            for x in (wide, torch.empty(2, batch, 22016)):
                through(x, down, "threshold", [4096], side=h, side_up=qkv[:, :4096], **gated)
            parts, _ = through(wide[:, :11008], down, "list", [4096], index, index[:1], 32, threshold=limits[:1])
            linear.combine(parts, norm, h, True, dtype)
            linear.dense(wide, down[:, :16], [16], None, **gated)
    h = torch.empty(1, 4096)
    layer = dict(norm="layer", eps=1e-5, norm_weight=h[0], norm_bias=h[0], center=h[0], stats=linear.row_stats(h))
    linear_row.listed(h, torch.empty(4096, 12288), "threshold", [12288], threshold=limits[:1], **layer)
    linear_row.rows(h, torch.empty(12288, 4096).t(), torch.float32, **layer)


def compile_selection(one: torch.Tensor) -> None:
    mask = torch.empty(4, 11008, dtype=torch.bool)
    index, count = selection.to_index(mask)
    selection.to_mask(index, count, 11008)
    selection.union(mask)
    selection.union_lists(index, count, 11008)
    for dtype in (torch.bfloat16, torch.float16):
        for channels in (32, 344, 11008, 65536):
            score = torch.empty(1, channels, dtype=dtype)
            for values in (score, score.float()):
                top.top_k(values, channels // 4)
                top.top_mask(values, channels // 4)
        for batch in (1, 4, 64):
            x, weight = torch.empty(batch, 4096, dtype=dtype), torch.empty(11008, 4096, dtype=dtype)
            selection.statistical_top_k(torch.empty(batch, 11008, dtype=dtype), 1.0, True, "identity", False)
            selection.statistical_top_k(torch.empty(batch, 14336), 1.0, False, "silu", True)
            score = router.scores(x, weight[:344], weight[:344, 0].contiguous(), "abs", False, False)
            selection.compact(score, one, False)
            selection.near_best(score, one)
            router.batch_score(score)
            router.scores(x, weight[:1024], None, "tanh", True, True)
            router.scores(x[:, :1024], weight[:, :1024], None, "identity", False, False)
    router.scores(x.float(), weight[:344].float(), None, "identity", False, False)


def compile_glue() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for batch in (1, 4, 64):
            x, weight = torch.empty(batch, 16384, dtype=dtype), torch.empty(16384, dtype=dtype)
            for width in (4096, 16384):
                row = x[:, :width]
                glue.residual_norm(row, row, weight[:width], None, 1e-5, "rms")
            parts = torch.empty(8, batch, 4096)
            glue.residual_norm(parts, row[:, :4096], weight[:4096], weight[:4096], 1e-5, "layer")
            glue.glu(x[:, :11008], x[:, :11008], "silu")
            glue.glu(x[:, :11008], None, "relu")
            score = torch.empty(batch, 344)
            glue.glu(x[:, :11008], x[:, :11008], "silu", score, score[0, :1], x[0])
            glue.glu(x[:, :11008], None, "relu", score > 0)


def compile_ffn(one: torch.Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, gate, up, down_t = torch.empty(256, 4096, dtype=dtype), *torch.empty(11008, 3, 4096, dtype=dtype).unbind(1)
        index, bias = torch.empty(11008, dtype=torch.int32), torch.empty(11008, dtype=dtype)
        for listed in ((index, index[:1]), (None, None)):
            neuron_ffn.neuron_ffn(x[:1], gate, up, down_t, *listed, "silu", None, None, None, 1, False)
            neuron_ffn.neuron_ffn(x[:1], None, up, down_t, *listed, "relu", None, bias, x[0], 1, False)
            neuron_ffn.neuron_ffn(x[:1], gate, up, down_t, *listed, "silu", None, None, x[0], 32, False, bias)
        neuron_ffn.gate_first_ffn(x[:1], gate, up, down_t, one, "silu", None, None, None)
        neuron_ffn.gate_first_ffn(x[:1], None, up, down_t, one, "relu", None, bias, x[0])
        value = torch.empty(4, 11008)
        neuron_ffn.gated_ffn(x[:1], value[:1], up, down_t, index, index[:1], None, None)
        neuron_ffn.neuron_hidden(x[:4], None, up, None, None, index, index[:1], "relu", value=value)
        neuron_ffn.neuron_hidden(
            x[:4], None, up, None, None, index, index[:1], "relu", value=value, threshold=one
        )  # fmt: skip
        expert_ffn.expert_ffn_prefill(x, gate, up, down_t, None, None, None, torch.empty(256, 344), one, "silu")
    for kind in (dtype, torch.float32):  # large experts fill shared memory sooner, wide types too
        x, gate, down_t = torch.empty(256, 512, dtype=kind), *torch.empty(2, 512, 512, dtype=kind)
        for scores in (torch.empty(256, 16), torch.empty(256, 4)):
            expert_ffn.expert_ffn_prefill(x, gate, gate, down_t, None, None, None, scores, one, "silu")


def compile_attention() -> None:
    """Caches of real sizes on the device that needs no memory."""

    def decode(batch, heads, groups, positions, dim, dtype, kept=None, window=0, softcap=0.0):
        query = torch.empty(batch, heads, dim, dtype=dtype)
        cache = torch.empty(batch, groups, positions, dim, dtype=dtype, device="meta")
        length = torch.empty(batch, dtype=torch.int32)
        listed = (None, None) if kept is None else (torch.empty(batch, kept, dtype=torch.int32), length)
        attention.attention_decode(query, cache, cache, length, *listed, dim**-0.5, window, softcap)

    for dtype in (torch.bfloat16, torch.float16):
        decode(1, 32, 32, 4096, 128, dtype, 16)
        decode(64, 32, 32, 3968, 128, dtype)
        decode(16, 32, 8, 2048, 128, dtype, 4)
        decode(64, 32, 8, 8192, 128, dtype)
    decode(1, 8, 4, 4096, 256, torch.bfloat16, window=1024, softcap=50.0)
    decode(1, 32, 32, 4096, 80, torch.bfloat16)
    decode(1, 32, 32, 4096, 128, torch.float32)
    decode(1, 32, 8, 4096, 128, torch.float32)
    decode(1, 32, 8, 32768, 128, torch.bfloat16, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for batch, heads, groups, dim in ((1, 8, 4, 256), (1, 32, 32, 128), (1, 32, 8, 128), (64, 32, 8, 128)):
            query, visible = torch.empty(batch, heads, dim, dtype=dtype), torch.empty(1, 8192, dtype=torch.bool)
            cache = torch.empty(batch, groups, 8192, dim, dtype=dtype, device="meta")
            spark.spark_attention_decode(query, cache, cache, visible, torch.empty(8193))
    qkv, cache = torch.empty(1, 48, 128, dtype=torch.bfloat16), torch.empty(1, 8, 4096, 128, dtype=torch.bfloat16)
    table, place = torch.empty(1, 128, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int64)
    attention_rope.rotary_table(place, torch.empty(64), 1.0, torch.bfloat16)
    for tables, norm in (((table, table), table[0]), ((None, None), None)):
        attention_rope.rope_cache_write(*qkv.split([32, 8, 8], 1), *tables, place, cache, cache, norm, norm, 1e-6)
    for parts in (22, 66):
        split = torch.empty(parts, 1, 48, 128).split([32, 8, 8], 2)
        attention_rope.rope_cache_write(*split, table, table, place, cache, cache, norm, norm, 1e-6)
        attention_row.token_attention(*split, table, table, place, cache, cache, norm, norm, 1e-6, 0.1, True, 5.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for groups, dim in ((32, 128), (8, 128), (32, 80), (4, 256)):
            table, cache = torch.empty(1, dim, dtype=dtype), torch.empty(1, groups, 576, dim, dtype=dtype)
            heads = torch.empty(1, 32 + 2 * groups, dim, dtype=dtype).split([32, groups, groups], 1)
            attention_row.token_attention(*heads, table, table, place, cache, cache, None, None, 1e-6, 0.1, False, 0.0)


if __name__ == "__main__":
    main()
