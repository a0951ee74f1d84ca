"""Triton kernels of the input-sparse linear layers for several rows: `fill` lists channels, `linear` streams their
weights, `combine` adds (for one row too, whose other kernels are in `row.py`).

The grid of `linear` is fixed: tiles of output columns x splits of the channels. Channels are dealt to the splits in
blocks of 8, so that those which are active together do not land in one split, and `fill` lists for every split which
are active and with what values, once for all tiles. A split's sums are float32 partials, added in a fixed order by
`combine` or by the next layer's kernel: no atomics on values, and two runs agree to the bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin
from sparse_kernels.input_linear.launch import STATS_TILE, grid_for, share
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
from sparse_kernels.launch import Launch, interpreting, padded_batch, power_of_2, run

DENSE_SLICE, DENSE_ROWS = 128, 8  # channels and rows that a program prepares for a dense product
LISTED_ROWS = 4  # rows whose values at given channels a program of `fill` collects: nothing of them is decided together
MAX_CHUNK = 128  # splits whose partials `combine` reads at once
FILLED = 8192  # values that `fill` holds at once for several rows


@triton.jit
def fill_kernel(
    x, index, total, threshold, norm_weight, norm_bias, stats, center, list_index, list_value, list_count, like,
    B, K, stride_x, parts, stride_part,
    SELECT: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, CHANNELWISE: tl.constexpr, INVERT: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr, PARTS: tl.constexpr,
    BATCH: tl.constexpr, HELD: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one split's channels [SLOTS], values [BATCH, SLOTS] and their number, for one segment of the output.

    It takes CHUNK channels of the slice at a time, and all rows, BATCH of them, where they select together; else BATCH
    of the HELD rows. For a dense product it only prepares the values.
    """
    split = tl.program_id(0)
    segment = tl.program_id(1)
    splits = tl.num_programs(0)
    DTYPE: tl.constexpr = like.dtype.element_ty
    row = tl.program_id(2) * BATCH + tl.arange(0, BATCH)[:, None]
    inside_row = row < B
    lists = segment * splits + split
    values = list_value + lists.to(tl.int64) * (HELD * SLOTS) + row * SLOTS
    begin(PDL)
    if SELECT == "list":
        start, count = share_of_list(total, split, splits, GROUP)
    else:
        count = 0
    for first in range(0, SLICE, CHUNK):
        j = first + tl.arange(0, CHUNK)
        if SELECT == "list":
            inside_k = j < count
            k = listed_at(index, start + j, inside_k, GROUP)
        else:
            k = dealt(j, split, splits)
            inside_k = k < K
        if LIMIT:
            limit = limit_of(threshold, segment, k, inside_k, K, CHANNELWISE)
        weight, shift, middle = constants(k, inside_k, norm_weight, norm_bias, center, NORM, NORM_BIAS, CENTER)
        inside = inside_row & inside_k[None, :]
        v = layer_input(
            x, row * stride_x + k[None, :], inside, row, inside_row, stats, weight, shift, middle, K, parts,
            stride_part, NORM, NORM_BIAS, EPS, TILES, PADDED, TILE, ACTIVATION, GATED, CENTER, PARTS, DTYPE, 1,
        )  # fmt: skip
        if LIMIT:
            keep = selected(v, limit, inside, INVERT)
            v = tl.where(keep, v, 0.0)
        if SELECT == "dense":  # values in the order of the channels, for a dense product
            tl.store(list_value + (segment * B + row).to(tl.int64) * K + k[None, :], v.to(DTYPE), mask=inside)
        else:
            slot = j
            written = inside_k
            if SELECT == "threshold":
                found = tl.max(keep.to(tl.int32), 0)
                slot = count + tl.cumsum(found, 0) - found
                written = found != 0
                count += tl.sum(found, 0)
            if tl.program_id(2) == 0:
                tl.store(list_index + lists.to(tl.int64) * SLOTS + slot, k, mask=written)
            tl.store(values + slot[None, :], v.to(DTYPE), mask=written[None, :] & inside_row)
    if SELECT != "dense":
        if tl.program_id(2) == 0:
            tl.store(list_count + lists, count)
        # The loop reads values in whole steps, unmasked so that the loads are wide: what follows the last one is zero.
        rest = tl.arange(0, ROWS) + count
        tl.store(values + rest[None, :], tl.zeros([BATCH, ROWS], DTYPE), mask=(rest < SLOTS)[None, :] & inside_row)


@triton.jit
def accumulate(acc, v, w, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """acc [BATCH, COLUMNS] + v [BATCH, ROWS] times w [ROWS, COLUMNS]."""
    if UPCAST:
        acc = tl.dot(v.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(v.to(DTYPE), w, acc, input_precision="ieee")
    return acc


@triton.jit
def linear_kernel(
    list_value, list_index, list_count, weight, side, side_up, partial,
    B, N, R, width0, width1, splits, stride_w, stride_side,
    SEGMENTS: tl.constexpr, SIDE: tl.constexpr, ALIGNED: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[split, b, n] = sum over the split's list of value[b, k] * weight[k, n] (+ its share of side side_up)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = weight.dtype.element_ty
    segment, _, start_n, end_n = columns_of(tile, width0, width1, N, SEGMENTS, ALIGNED, COLUMNS)
    n = start_n + tl.arange(0, COLUMNS)
    inside_n = n < end_n
    b = tl.arange(0, BATCH)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([BATCH, COLUMNS], tl.float32)
    lists = segment * splits + split
    values = list_value + lists.to(tl.int64) * (BATCH * SLOTS)
    channels = list_index + lists.to(tl.int64) * SLOTS

    begin(PDL)
    last = tl.load(list_count + lists)
    for start in tl.range(0, last, ROWS, num_stages=STAGES):
        p = tl.multiple_of(start, ROWS) + row
        live = p < last
        v = tl.load(values + (b * SLOTS)[:, None] + p[None, :], mask=(b < B)[:, None], other=0.0)
        k = tl.load(channels + p, mask=live, other=0)
        w = tl.load(
            weight + k.to(tl.int64)[:, None] * stride_w + n[None, :],
            mask=live[:, None] & inside_n[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc = accumulate(acc, v, w, DTYPE, UPCAST)
    if SIDE:
        for start in tl.range(0, tl.cdiv(R - split, splits), ROWS):
            r = (start + row) * splits + split
            up = tl.load(
                side_up + r.to(tl.int64)[:, None] * stride_side + n[None, :],
                mask=(r < R)[:, None] & inside_n[None, :],
                other=0.0,
            )
            z = tl.load(side + (b * R)[:, None] + r[None, :], mask=(b < B)[:, None] & (r < R)[None, :], other=0.0)
            acc = accumulate(acc, z, up, DTYPE, UPCAST)
    place = partial + split.to(tl.int64) * B * N
    tl.store(place + b[:, None] * N + n[None, :], acc, mask=(b < B)[:, None] & inside_n[None, :])


@triton.jit
def combine_kernel(
    partial, bias, residual, out, stats, parts, B, N, stride_r,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[b, n] = sum of partial[:, b, n] (+ bias) (+ residual); stats: the tile's sum and squared deviations of it."""
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < N
    DTYPE: tl.constexpr = out.dtype.element_ty
    if BIAS:
        constant = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    if RESIDUAL:
        rest = tl.load(residual + b * stride_r + n, mask=inside, other=0.0).to(tl.float32)
    lanes = tl.zeros([CHUNK, COLUMNS], tl.float32)
    for start in tl.range(0, parts, CHUNK):
        s = start + tl.arange(0, CHUNK)
        place = partial + (s.to(tl.int64)[:, None] * B + b) * N + n[None, :]
        lanes += tl.load(place, mask=(s < parts)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    y = tl.sum(lanes, 0)
    if BIAS:
        y += constant
    if RESIDUAL:  # a linear layer rounds its output before the residual is added
        y = y.to(DTYPE).to(tl.float32) + rest
    y = y.to(DTYPE)
    tl.store(out + b * N + n, y, mask=inside)
    if STATS:
        h = tl.where(inside, y.to(tl.float32), 0.0)
        total = tl.sum(h, 0)
        away = tl.where(inside, h - total / tl.minimum(N - tile * COLUMNS, COLUMNS), 0.0)
        place = stats + (b * tl.num_programs(0) + tile) * 2
        tl.store(place, total)
        tl.store(place + 1, tl.sum(away * away, 0))


def row_stats(x: Tensor) -> Tensor:
    return combine(x[None].contiguous(), None, None, True, x.dtype)[1]


def combine(
    partial: Tensor, bias: Tensor | None, residual: Tensor | None, with_stats: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y [B, N], stats [B, tiles, 2] or [B, 0, 2]) of partial [parts, B, N]."""
    parts, batch, width = partial.shape
    tiles = triton.cdiv(width, STATS_TILE)
    out = torch.empty(batch, width, dtype=dtype, device=partial.device)
    stats = torch.empty(batch, tiles if with_stats else 0, 2, dtype=torch.float32, device=partial.device)
    run(
        combine_kernel, (tiles, batch),
        partial, bias, residual, out, stats, parts, batch, width, 0 if residual is None else residual.stride(0),
        BIAS=bias is not None, RESIDUAL=residual is not None, STATS=with_stats,
        CHUNK=min(MAX_CHUNK, power_of_2(parts)), COLUMNS=STATS_TILE, num_warps=4,
    )  # fmt: skip
    return out, stats


def run_fill(
    x: Tensor, weight_t: Tensor, grid: tuple[int, ...], slice_: int, list_index: Tensor, list_value: Tensor,
    list_count: Tensor, common: dict[str, Any], index: Tensor | None = None, count: Tensor | None = None,
    group: int = 1, threshold: Tensor | None = None, invert: bool = False, **vector: Any,
) -> None:  # fmt: skip
    batch, padded = x.shape[-2], common["BATCH"]
    run(
        fill_kernel, grid, x,
        index=index, total=count, list_index=list_index, list_value=list_value, list_count=list_count, like=weight_t,
        B=batch, K=weight_t.shape[0], stride_x=x.stride(-2), GROUP=group, SLICE=slice_,
        CHUNK=min(slice_, FILLED // padded), num_warps=8,
        LIMIT=threshold is not None, **selecting(threshold, invert), **prepared(x, padded, **vector), **common,
    )  # fmt: skip


def dense(x: Tensor, weight_t: Tensor, widths: list[int], bias: Tensor | None, **prepare: Any) -> Tensor:
    """y [B, N] by cuBLAS, of the same values: where the rows of a batch need nearly all channels between them."""
    batch, device, (channels, width) = x.shape[-2], x.device, weight_t.shape
    changed = prepare.get("norm") or prepare.get("activation")
    if x.dim() == 2 and not changed and prepare.get("threshold") is None and prepare.get("center") is None:
        return x @ weight_t if bias is None else torch.addmm(bias, x, weight_t)
    value = torch.empty(len(widths), batch, channels, dtype=weight_t.dtype, device=device)
    common = dict(SELECT="dense", BATCH=DENSE_ROWS, HELD=DENSE_ROWS, SLOTS=1, ROWS=1)
    grid = (triton.cdiv(channels, DENSE_SLICE), len(widths), triton.cdiv(batch, DENSE_ROWS))
    run_fill(x, weight_t, grid, DENSE_SLICE, value, value, value, common, **prepare)
    if len(widths) == 1:
        return value[0] @ weight_t if bias is None else torch.addmm(bias, value[0], weight_t)
    out = torch.empty(batch, width, dtype=weight_t.dtype, device=device)
    if len(set(widths)) == 1:  # one product of a batch of matrices, which fills the GPU better than one after another
        weights, results = (t.unflatten(1, (len(widths), -1)).transpose(0, 1) for t in (weight_t, out))
        torch.bmm(value, weights, out=results)
    else:
        for v, w, y in zip(value, weight_t.split(widths, 1), out.split(widths, 1), strict=True):
            torch.mm(v, w, out=y)
    return out if bias is None else out.add_(bias)


def linear(
    x: Tensor,
    weight_t: Tensor,
    select: str,
    widths: list[int],
    index: Tensor | None = None,
    count: Tensor | None = None,
    group: int = 1,
    side: Tensor | None = None,
    side_up: Tensor | None = None,
    config: Launch | None = None,
    **prepare: Any,
) -> tuple[Tensor, Tensor]:
    """(partial float32 [splits, B, N], counts int32 [segments, splits], empty unless select is "threshold"), B >= 2.

    x: [B, K or 2 K] of the weight's dtype, or float32 partials of it [parts, B, K or 2 K]; prepare: what `run_fill`
    takes to make the layer's input of it. select: "list" (index, count: of groups of channels) or "threshold".
    """
    batch, device, (channels, width) = x.shape[-2], x.device, weight_t.shape
    padded, segments = padded_batch(batch), len(widths)
    config, columns, tiles, splits = grid_for(batch, channels, widths, device, config)
    rows = max(16, config.rows)  # of a tile of the matrix units
    slice_ = share(channels, splits)
    slots = slice_ + rows
    list_index = torch.empty(segments * splits, slots, dtype=torch.int32, device=device)
    list_value = torch.empty(segments * splits, padded, slots, dtype=weight_t.dtype, device=device)
    list_count = torch.empty(segments, splits, dtype=torch.int32, device=device)
    partial = torch.empty(splits, batch, width, dtype=torch.float32, device=device)
    common = dict(SLOTS=slots, ROWS=rows)
    together = padded if select == "threshold" else min(LISTED_ROWS, padded)
    run_fill(
        x, weight_t, (splits, segments, triton.cdiv(batch, together)), slice_, list_index, list_value, list_count,
        common | dict(SELECT=select, BATCH=together, HELD=padded), index=index, count=count, group=group, **prepare,
    )  # fmt: skip
    run(
        linear_kernel, (tiles, splits),
        list_value, list_index, list_count, weight_t, side, side_up, partial,
        batch, width, 0 if side is None else side.shape[1], widths[0], widths[1] if segments > 1 else 0,
        splits, weight_t.stride(0), 0 if side_up is None else side_up.stride(0),
        SEGMENTS=segments, SIDE=side is not None, ALIGNED=all(w % 16 == 0 for w in widths), COLUMNS=columns,
        BATCH=padded, STAGES=config.stages, UPCAST=interpreting(), num_warps=config.warps,
        pdl=False,  # early programs would crowd on the multiprocessors that free up first
        **common,
    )  # fmt: skip
    return partial, list_count[: segments if select == "threshold" else 0]
