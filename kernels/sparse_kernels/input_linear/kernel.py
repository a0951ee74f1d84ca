"""Triton kernels of `input_linear`.

The grid is fixed: tiles of output columns x splits of the list. Each program reads the list's length on the device and
takes an even share of it, so the work is balanced at any density. Partial sums are float32 and a second kernel adds
them in a fixed order: no atomics, and two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.launch import (
    INPUT_LINEAR,
    MAX_SPLITS,
    Launch,
    interpreting,
    multiprocessors,
    padded_batch,
    power_of_2,
    run,
)


@triton.jit
def gather_kernel(
    x, weight, index, count, threshold, bias, out, B, N, stride_x, stride_w,
    GROUP: tl.constexpr, THRESHOLD: tl.constexpr, CHANNELWISE: tl.constexpr, BIAS: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[split, b, n] = sum over this split's share of the list of s(x[b, k]) * weight[k, n]."""
    split = tl.program_id(1)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.arange(0, BATCH)
    total = tl.load(count) * GROUP
    first = (total.to(tl.int64) * split // tl.num_programs(1)).to(tl.int32)
    last = (total.to(tl.int64) * (split + 1) // tl.num_programs(1)).to(tl.int32)
    # One row keeps a sum per row of the tile until the end: adding across threads each step would stall the loads.
    acc = tl.zeros([ROWS if BATCH == 1 else BATCH, COLUMNS], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        p = start + tl.arange(0, ROWS)
        live = p < last
        k = tl.load(index + p // GROUP, mask=live, other=0).to(tl.int64) * GROUP + p % GROUP
        w = tl.load(
            weight + k[:, None] * stride_w + n[None, :],
            mask=live[:, None] & (n < N)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        v = tl.load(
            x + b.to(tl.int64)[:, None] * stride_x + k[None, :],
            mask=(b < B)[:, None] & live[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        if THRESHOLD:
            limit = tl.load(threshold + k, mask=live, other=0.0)[None, :] if CHANNELWISE else tl.load(threshold)
            v = tl.where(tl.abs(v.to(tl.float32)) > limit, v.to(tl.float32), 0.0).to(v.dtype)
        if BATCH == 1:
            acc += tl.trans(v).to(tl.float32) * w.to(tl.float32)
        elif UPCAST:
            acc = tl.dot(v.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(v, w, acc, input_precision="ieee")
    y = tl.sum(acc, 0)[None, :] if BATCH == 1 else acc
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    row = split.to(tl.int64) * B + b
    tl.store(out + row[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(b < B)[:, None] & (n < N)[None, :])


@triton.jit
def reduce_kernel(
    partial, bias, out, splits, B, N, BIAS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b, n] = sum over splits of partial[split, b, n] (+ bias[n])."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    row = split.to(tl.int64) * B + b
    part = tl.load(
        partial + row[:, None] * N + n[None, :], mask=(split < splits)[:, None] & (n < N)[None, :], other=0.0
    )
    y = tl.sum(part, 0)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + b * N + n, y.to(out.dtype.element_ty), mask=n < N)


def input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    group: int,
    config: Launch | None = None,
) -> Tensor:
    (batch, channels), width = x.shape, weight_t.shape[1]
    config = config or INPUT_LINEAR[padded_batch(batch)]
    columns = max(64, min(config.columns, power_of_2(width)))
    tiles = triton.cdiv(width, columns)
    splits = min(config.programs * multiprocessors(x.device) // tiles, MAX_SPLITS, triton.cdiv(channels, config.rows))
    splits = max(splits, 1)
    out = torch.empty(batch, width, dtype=x.dtype, device=x.device)
    partial = torch.empty(splits, batch, width, dtype=torch.float32, device=x.device) if splits > 1 else out
    run(
        gather_kernel, (tiles, splits),
        x, weight_t, index, count, threshold, bias, partial, batch, width, x.stride(0), weight_t.stride(0),
        GROUP=group, THRESHOLD=threshold is not None, CHANNELWISE=threshold is not None and threshold.numel() > 1,
        BIAS=bias is not None and splits == 1, BATCH=padded_batch(batch), ROWS=config.rows, COLUMNS=columns,
        STAGES=config.stages, UPCAST=interpreting(), num_warps=config.warps,
    )  # fmt: skip
    if splits > 1:
        run(
            reduce_kernel, (triton.cdiv(width, 64), batch), partial, bias, out, splits, batch, width,
            BIAS=bias is not None, SPLITS=power_of_2(splits), COLUMNS=64, num_warps=4,
        )  # fmt: skip
    return out
