"""Triton kernels of linear layers for one row: each makes its input itself, so that a layer is one launch.

`listed` streams the weights of the channels that its programs list for themselves. `masked` serves layers of so few
weights that latency decides: every program asks for all its weights at once, and those of small channels are masked.
`rows` serves layers that read everything, of weights as transformers stores them: every program multiplies whole rows
of them with the vector, which it keeps in registers.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin, load_rows
from sparse_kernels.input_linear.launch import ROWS, Masked, beside, grid_for, masked_grid, share
from sparse_kernels.input_linear.vector import (
    columns_of,
    constants,
    dealt,
    layer_input,
    limit_of,
    listed_at,
    prepared,
    selected,
    selecting,
    share_of_list,
)
from sparse_kernels.launch import Launch, Rows, pick, power_of_2, run


@triton.jit
def listed_weights(weight, word, live, n, inside_n, stride_w, NEAR: tl.constexpr, FULL: tl.constexpr):
    """The rows of listed channels at columns n, zero where not live: [rows, columns]."""
    k = word >> 32
    if NEAR:  # no offset of the matrix needs 64 bits
        k = k.to(tl.int32)
    place = weight + (k * stride_w)[:, None] + n[None, :]
    mask = live[:, None] if FULL else live[:, None] & inside_n[None, :]
    return tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_listed(acc, word, w):
    """acc + listed channels' values times their rows w, rounded once."""
    value = word.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.fma(tl.broadcast_to(value[:, None], acc.shape), w.to(tl.float32), acc)


@triton.jit
def listed_kernel(
    x, index, total, threshold, norm_weight, norm_bias, stats, center, weight, side, side_up, lists, counts, partial,
    K, N, R, width0, width1, splits, parts, stride_part, stride_w, stride_side,
    SELECT: tl.constexpr, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, LIMIT: tl.constexpr, CHANNELWISE: tl.constexpr,
    INVERT: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr,
    PARTS: tl.constexpr, ALIGNED: tl.constexpr, NEAR: tl.constexpr, FULL: tl.constexpr, SIDE: tl.constexpr,
    SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[split, n] = sum over the split's listed k of value[k] * weight[k, n] (+ its share of side side_up).

    A program lists its split's channels and their values in memory of its own [SLICE], each in one 64-bit word, since
    the streaming loop then knows rows several steps ahead. Every tile of columns lists them again: that costs less than
    a launch that does it once.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = weight.dtype.element_ty
    segment, begin_n, start_n, end_n = columns_of(tile, width0, width1, N, SEGMENTS, ALIGNED, COLUMNS)
    n = start_n + tl.arange(0, COLUMNS)
    inside_n = n < end_n
    j = tl.arange(0, SLICE)
    if SELECT == "list":
        begin(PDL)
        start, count = share_of_list(total, split, splits, GROUP)
        keep = j < count
        k = listed_at(index, start + j, keep, GROUP)
    else:
        k = dealt(j, split, splits)
        keep = k < K
    if LIMIT:
        limit = limit_of(threshold, segment, k, keep, K, CHANNELWISE)
    scale, shift, middle = constants(k, keep, norm_weight, norm_bias, center, NORM, NORM_BIAS, CENTER)
    if SELECT != "list":
        begin(PDL)
    v = layer_input(
        x, k, keep, 0, K > 0, stats, scale, shift, middle, K, parts, stride_part,
        NORM, NORM_BIAS, EPS, TILES, PADDED, TILE, ACTIVATION, GATED, CENTER, PARTS, DTYPE, 0,
    )  # fmt: skip
    slot = j
    if LIMIT:
        large = selected(v, limit, keep, INVERT)
        if SELECT == "threshold":
            keep = large
            slot = tl.cumsum(keep.to(tl.int32), 0) - keep.to(tl.int32)
        else:  # stays listed, as a zero
            v = tl.where(large, v, 0.0)
    if SELECT != "list":
        count = tl.sum(keep.to(tl.int32), 0)
    lists += (tile * splits + split).to(tl.int64) * SLICE
    word = (k.to(tl.int64) << 32) | (v.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.store(lists + slot, word, mask=keep)
    tl.debug_barrier()  # the loop reads what other threads of the program have written
    if SELECT == "threshold":
        if start_n == begin_n:
            tl.store(counts + segment * splits + split, count)
    row = tl.arange(0, ROWS)
    # The rows that fill no step are asked for first and added last: the steps then need no mask.
    steps = count - count % ROWS
    rest = tl.load(lists + steps + row, mask=steps + row < count, other=0)
    last = listed_weights(weight, rest, steps + row < count, n, inside_n, stride_w, NEAR, FULL)
    every = tl.full([ROWS], 1, tl.int1)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)  # adding across threads at every step would stall the loads
    for first in tl.range(0, steps, ROWS, num_stages=STAGES):
        entry = tl.load(lists + first + row)
        acc = add_listed(acc, entry, listed_weights(weight, entry, every, n, inside_n, stride_w, NEAR, FULL))
    acc = add_listed(acc, rest, last)
    if SIDE:
        for first in tl.range(0, tl.cdiv(R - split, splits), ROWS):
            r = (first + row) * splits + split
            z = tl.load(side + r, mask=r < R, other=0.0).to(tl.float32)
            up = tl.load(
                side_up + r.to(tl.int64)[:, None] * stride_side + n[None, :],
                mask=(r < R)[:, None] & inside_n[None, :],
                other=0.0,
            )
            acc += z[:, None] * up.to(tl.float32)
    tl.store(partial + split.to(tl.int64) * N + n, tl.sum(acc, 0), mask=inside_n)


@triton.jit
def masked_kernel(
    x, threshold, norm_weight, norm_bias, stats, center, weight, partial, counts,
    K, N, width0, width1, splits, parts, stride_part, stride_w,
    SEGMENTS: tl.constexpr, CHANNELWISE: tl.constexpr, INVERT: tl.constexpr, NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[split, n] = sum over the split's CHANNELS of value[k] * weight[k, n], from the vector itself; one row.

    The steps are unrolled and have no pipeline: all loads of a step are in flight at once.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = weight.dtype.element_ty
    segment, begin_n, start_n, end_n = columns_of(tile, width0, width1, N, SEGMENTS, ALIGNED, COLUMNS)
    n = start_n + tl.arange(0, COLUMNS)
    inside_n = n < end_n
    acc = tl.zeros([COLUMNS], tl.float32)
    count = 0
    for step in tl.static_range(CHANNELS // ROWS):
        k = dealt(step * ROWS + tl.arange(0, ROWS), split, splits)
        inside = k < K
        limit = limit_of(threshold, segment, k, inside, K, CHANNELWISE)
        scale, shift, middle = constants(k, inside, norm_weight, norm_bias, center, NORM, NORM_BIAS, CENTER)
        if step == 0:
            begin(PDL)
        v = layer_input(
            x, k, inside, 0, K > 0, stats, scale, shift, middle, K, parts, stride_part,
            NORM, NORM_BIAS, EPS, TILES, PADDED, TILE, ACTIVATION, GATED, CENTER, PARTS, DTYPE, 0,
        )  # fmt: skip
        keep = selected(v, limit, inside, INVERT)
        v = tl.where(keep, v, 0.0)
        count += tl.sum(keep.to(tl.int32), 0)
        w = tl.load(
            weight + k.to(tl.int64)[:, None] * stride_w + n[None, :],
            mask=keep[:, None] & inside_n[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += tl.sum(v[:, None] * w.to(tl.float32), 0)
    tl.store(partial + split.to(tl.int64) * N + n, acc, mask=inside_n)
    if start_n == begin_n:
        tl.store(counts + segment * splits + split, count)


@triton.jit
def rows_kernel(
    x, norm_weight, norm_bias, stats, center, weight, out, N, parts, stride_part, stride_w,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr, PARTS: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over k of value[k] * weight[n, k], of one row of x and a matrix [N, K] that is read whole.

    A program takes an even share of the rows of the matrix, ROWS at a time.
    """
    program = tl.program_id(0)
    first = N * program // tl.num_programs(0)
    last = N * (program + 1) // tl.num_programs(0)
    k = tl.arange(0, WIDTH)
    inside = k < K
    scale, shift, middle = constants(k, inside, norm_weight, norm_bias, center, NORM, NORM_BIAS, CENTER)
    begin(PDL)
    v = layer_input(
        x, k, inside, 0, N > 0, stats, scale, shift, middle, K, parts, stride_part,
        NORM, NORM_BIAS, EPS, TILES, PADDED, TILE, ACTIVATION, GATED, CENTER, PARTS, weight.dtype.element_ty, 0,
    )[None, :]  # fmt: skip
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        n = start + tl.arange(0, ROWS)
        w = load_rows(weight, stride_w, n.to(tl.int64), n < last, K, WIDTH)
        tl.store(out + n, tl.sum(w.to(tl.float32) * v, 1).to(out.dtype.element_ty), mask=n < last)


@cache
def infinity(device: torch.device) -> Tensor:
    """A threshold that nothing exceeds, NaN neither: inverted, it keeps every value."""
    return torch.full((1,), torch.inf, device=device)


def listed(
    x: Tensor,
    weight_t: Tensor,
    select: str,
    widths: list[int],
    index: Tensor | None = None,
    count: Tensor | None = None,
    group: int = 1,
    side: Tensor | None = None,
    side_up: Tensor | None = None,
    threshold: Tensor | None = None,
    invert: bool = False,
    config: Launch | None = None,
    **vector: Any,
) -> tuple[Tensor, Tensor]:
    """What `kernel.linear` returns, of one row."""
    device, (channels, width), segments = x.device, weight_t.shape, len(widths)
    config, columns, tiles, splits = grid_for(1, channels, widths, device, config)
    slice_ = share(channels, splits)
    # All start early but the layer that takes what attention leaves: its programs would come in the way of attention's.
    early = bool(vector.get("norm") or vector.get("activation"))
    lists = torch.empty(tiles * splits, slice_, dtype=torch.int64, device=device)
    partial = torch.empty(splits, 1, width, dtype=torch.float32, device=device)
    counts = torch.empty(segments if select == "threshold" else 0, splits, dtype=torch.int32, device=device)
    run(
        listed_kernel, (tiles, splits), x,
        index=index, total=count, weight=weight_t, side=side, side_up=side_up, lists=lists, counts=counts,
        partial=partial, K=channels, N=width, R=0 if side is None else side.shape[1], width0=widths[0],
        width1=widths[1] if segments > 1 else 0, splits=splits, stride_w=weight_t.stride(0),
        stride_side=0 if side_up is None else side_up.stride(0), SELECT=select, GROUP=group, SEGMENTS=segments,
        LIMIT=threshold is not None, ALIGNED=all(w % 16 == 0 for w in widths),
        NEAR=weight_t.stride(0) * channels < 2**31, FULL=all(w % columns == 0 for w in widths),
        SIDE=side is not None, SLICE=slice_,
        ROWS=config.rows, COLUMNS=columns, STAGES=config.stages, num_warps=config.warps,
        **(dict(maxnreg=beside(config)) if early else dict(pdl=False)),
        **prepared(x, 1, **vector), **selecting(threshold, invert),
    )  # fmt: skip
    return partial, counts


def masked(
    x: Tensor,
    weight_t: Tensor,
    widths: list[int],
    config: Masked | None = None,
    threshold: Tensor | None = None,
    invert: bool = False,
    **vector: Any,
) -> tuple[Tensor, Tensor]:
    """What `linear` returns, of one row."""
    device, (channels, width), segments = x.device, weight_t.shape, len(widths)
    config, columns, tiles, splits = masked_grid(channels, widths, device, config)
    partial = torch.empty(splits, 1, width, dtype=torch.float32, device=device)
    counts = torch.empty(segments, splits, dtype=torch.int32, device=device)
    limited = threshold is not None
    # One kernel for both: a mask that needs the values keeps the compiler from asking for all at once.
    limit = selecting(threshold, invert) if limited else selecting(infinity(device), True)
    run(
        masked_kernel, (tiles, splits), x,
        weight=weight_t, partial=partial, counts=counts, K=channels, N=width, width0=widths[0],
        width1=widths[1] if segments > 1 else 0, splits=splits, stride_w=weight_t.stride(0),
        SEGMENTS=segments, ALIGNED=all(w % 16 == 0 for w in widths), CHANNELS=config.channels, ROWS=config.rows,
        COLUMNS=columns, num_warps=config.warps, **prepared(x, 1, **vector), **limit,
    )  # fmt: skip
    return partial, counts if limited else counts[:0]


def rows(x: Tensor, weight_t: Tensor, dtype: torch.dtype, config: Rows | None = None, **vector: Any) -> Tensor:
    """y [1, N] in dtype, of one row of x and the transposed view weight_t of a matrix that is stored by output."""
    channels, width = weight_t.shape
    config = config or pick(ROWS, x.device)
    step, warps = config.fit(channels, weight_t.element_size())
    y = torch.empty(1, width, dtype=dtype, device=x.device)
    run(
        rows_kernel, (config.count(width, x.device),), x,
        weight=weight_t, out=y, N=width, stride_w=weight_t.stride(1), K=channels, WIDTH=power_of_2(channels),
        ROWS=step, STAGES=config.stages, num_warps=warps, **prepared(x, 1, **vector),
    )  # fmt: skip
    return y
