"""Pieces of the kernels of linear layers: the vector that a layer multiplies, made on the way from what the kernel
before left, which of it is selected, and how channels and columns are shared among programs. Imports triton.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import activate
from sparse_kernels.input_linear.launch import STATS_TILE
from sparse_kernels.launch import power_of_2

DEAL = tl.constexpr(8)  # channels dealt to a split at a time: one sector of float32 partials


@triton.jit
def dealt(j, split, splits):
    """The channel in slot j of a split."""
    return ((j // DEAL) * splits + split) * DEAL + j % DEAL


@triton.jit
def share_of_list(total, split, splits, GROUP: tl.constexpr):
    """The first slot of a split's even share of a list of groups of channels, and how many slots it has."""
    listed = tl.load(total).to(tl.int64) * GROUP
    start = (listed * split // splits).to(tl.int32)
    return start, (listed * (split + 1) // splits).to(tl.int32) - start


@triton.jit
def listed_at(index, slot, inside, GROUP: tl.constexpr):
    """The channels at slots of a list of groups."""
    return tl.load(index + slot // GROUP, mask=inside, other=0) * GROUP + slot % GROUP


@triton.jit
def limit_of(threshold, segment, k, inside, K, CHANNELWISE: tl.constexpr):
    """The threshold of a segment, or of every channel of it."""
    if CHANNELWISE:
        limit = tl.load(threshold + segment * K + k, mask=inside, other=0.0)
    else:
        limit = tl.load(threshold + segment)
    return limit


@triton.jit
def row_scale(
    stats, row, inside_row, K, TILES: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Mean (0 for RMS norms) and reciprocal deviation of every row, from its tiles' sums and squared deviations."""
    LANES: tl.constexpr = min(PADDED, 32)  # every warp then adds all by itself, and waits for no other
    mean, square = 0.0, 0.0
    if NORM == "layer":
        for first in tl.static_range(0, PADDED, LANES):
            t = first + tl.arange(0, LANES)
            mean += tl.load(stats + (row * TILES + t) * 2, mask=inside_row & (t < TILES), other=0.0)
        mean = tl.sum(mean, AXIS, keep_dims=AXIS == 1) / K
    for first in tl.static_range(0, PADDED, LANES):
        t = first + tl.arange(0, LANES)
        n = tl.minimum(K - t * TILE, TILE).to(tl.float32)
        inside = inside_row & (t < TILES)
        place = stats + (row * TILES + t) * 2
        away = tl.load(place, mask=inside, other=0.0) / n - mean
        spread = tl.load(place + 1, mask=inside, other=0.0)
        square += tl.where(inside, spread + n * away * away, 0.0)
    return mean, tl.rsqrt(tl.sum(square, AXIS, keep_dims=AXIS == 1) / K + EPS)


@triton.jit
def input_at(x, place, inside, parts, stride_part, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """float32 values of x at offsets `place`; from partials, their sum rounded as the layer that made them rounds."""
    if PARTS == 0:
        v = tl.load(x + place, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    elif PARTS == 1:  # several rows: one part after the other
        v = tl.zeros(place.shape, tl.float32)
        for s in tl.range(0, parts):
            v += tl.load(x + s * stride_part + place, mask=inside, other=0.0)
        v = v.to(DTYPE).to(tl.float32)
    else:  # one row: all parts at once
        s = tl.arange(0, PARTS)[:, None]
        loaded = tl.load(x + s * stride_part + place[None, :], mask=(s < parts) & inside[None, :], other=0.0)
        v = tl.sum(loaded, 0).to(DTYPE).to(tl.float32)
    return v


@triton.jit
def constants(
    k, inside, norm_weight, norm_bias, center, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, CENTER: tl.constexpr
):
    """float32 weight and bias of the norm and center of channels k, zero where there are none."""
    weight = tl.zeros(k.shape, tl.float32)
    shift = weight
    middle = weight
    if NORM != "":
        weight = tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
    if NORM_BIAS:
        shift = tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        middle = tl.load(center + k, mask=inside, other=0.0).to(tl.float32)
    return weight, shift, middle


@triton.jit
def layer_input(
    x, place, inside, row, inside_row, stats, weight, shift, middle, K, parts, stride_part,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CENTER: tl.constexpr, PARTS: tl.constexpr,
    DTYPE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """float32 values of what the layer multiplies, at offsets `place` of x; rounded wherever torch rounds."""
    v = input_at(x, place, inside, parts, stride_part, PARTS, DTYPE)
    if ACTIVATION != "":
        v = activate(v, ACTIVATION).to(DTYPE).to(tl.float32)
        if GATED:
            v = (v * input_at(x + K, place, inside, parts, stride_part, PARTS, DTYPE)).to(DTYPE).to(tl.float32)
    if NORM != "":
        mean, scale = row_scale(stats, row, inside_row, K, TILES, PADDED, TILE, NORM, EPS, AXIS)
        v = (v - mean) * scale
        if NORM == "rms":
            v = v.to(DTYPE).to(tl.float32)
        if NORM == "gemma":
            weight += 1.0
        v = v * weight
        if NORM_BIAS:
            v += shift
        v = v.to(DTYPE).to(tl.float32)
    if CENTER:
        v = (v - middle).to(DTYPE).to(tl.float32)
    return tl.where(inside, v, 0.0)


@triton.jit
def selected(v, limit, inside, INVERT: tl.constexpr):
    """Which values are above the limit in magnitude, or with INVERT are not."""
    keep = tl.abs(v) > limit
    if INVERT:
        keep = keep == 0
    return keep & inside


@triton.jit
def columns_of(tile, width0, width1, N, SEGMENTS: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """(segment of a tile, the segment's first column, the tile's first column, the segment's end)."""
    segment = 0
    begin_n = 0
    start_n = tile * COLUMNS
    end_n = N
    if SEGMENTS > 1:
        tiles0 = tl.cdiv(width0, COLUMNS)
        tiles1 = tiles0 + tl.cdiv(width1, COLUMNS)
        segment = (tile >= tiles0).to(tl.int32) + (tile >= tiles1).to(tl.int32)
        begin_n = tl.where(segment == 0, 0, tl.where(segment == 1, width0, width0 + width1))
        end_n = tl.where(segment == 0, width0, tl.where(segment == 1, width0 + width1, N))
        start_n = begin_n + (tile - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))) * COLUMNS
    if ALIGNED:
        start_n = tl.multiple_of(start_n, 16)
        end_n = tl.multiple_of(end_n, 16)
    return segment, begin_n, start_n, end_n


def prepared(
    x: Tensor,
    padded: int,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    stats: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
    center: Tensor | None = None,
) -> dict[str, Any]:
    """What a kernel is told to make a layer's input of x [B, K or 2 K], or of float32 parts of it."""
    parts = x.shape[0] if x.dim() == 3 else 0
    tiles = 1 if stats is None else stats.shape[1]
    return dict(
        norm_weight=norm_weight, norm_bias=norm_bias, stats=stats, center=center, parts=parts,
        stride_part=x.stride(0) if parts else 0, NORM=norm, NORM_BIAS=norm_bias is not None, EPS=eps, TILES=tiles,
        PADDED=power_of_2(tiles), TILE=STATS_TILE, ACTIVATION=activation, GATED=gated, CENTER=center is not None,
        PARTS=0 if parts == 0 else (max(2, power_of_2(parts)) if padded == 1 else 1),
    )  # fmt: skip


def selecting(threshold: Tensor | None, invert: bool) -> dict[str, Any]:
    """What a kernel is told to select, of values that are rounded wherever the definition rounds them."""
    return dict(
        threshold=threshold, CHANNELWISE=threshold is not None and threshold.dim() == 2, INVERT=invert,
        enable_fp_fusion=False,  # else a product and the sum it goes into become one operation, rounded once
    )  # fmt: skip
