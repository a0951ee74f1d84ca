"""Triton kernels of `rotary_table` and `rope_cache_write`: the new token's heads are rotated and go to the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.attention.launch import ROPE_HEADS, ROPE_PARTS
from sparse_kernels.blocks import begin
from sparse_kernels.launch import power_of_2, run


@triton.jit
def rotary_kernel(
    position, frequencies, cos, sin, scale, stride_position, HALF: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    """Cosine and sine of one position's angles, twice beside each other."""
    b, d = tl.program_id(0), tl.arange(0, WIDTH)
    half = d < HALF
    scale = tl.cast(scale, tl.float32)
    frequency = tl.load(frequencies + d, mask=half, other=0.0)
    begin(PDL)
    angle = tl.load(position + b * stride_position).to(tl.float32) * frequency
    c, s = (tl.cos(angle) * scale).to(cos.dtype.element_ty), (tl.sin(angle) * scale).to(sin.dtype.element_ty)
    at = b * 2 * HALF + d
    tl.store(cos + at, c, mask=half)
    tl.store(cos + at + HALF, c, mask=half)
    tl.store(sin + at, s, mask=half)
    tl.store(sin + at + HALF, s, mask=half)


@triton.jit
def asked(x, inside, first, parts, stride_part, PARTS: tl.constexpr):
    """PARTS of the parts at x [H, D], from the first on: float32 [PARTS, H, D]."""
    s = first + tl.arange(0, PARTS)[:, None, None]
    return tl.load(x[None, :, :] + s * stride_part, mask=(s < parts) & inside[None, :, :], other=0.0).to(tl.float32)


@triton.jit
def added(x, found, inside, parts, stride_part, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """Sum of the parts at x, of which the first were `found` [PARTS, H, D], rounded as the layer rounds its output."""
    v = tl.sum(found, 0)
    for first in tl.range(PARTS, parts, PARTS):
        v += tl.sum(asked(x, inside, first, parts, stride_part, PARTS), 0)
    return v.to(DTYPE).to(tl.float32)


@triton.jit
def whole(x, inside, parts, stride_part, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """Sum of the parts at x [H, D] in float32, rounded as the layer rounds its output."""
    return added(x, asked(x, inside, 0, parts, stride_part, PARTS), inside, parts, stride_part, PARTS, DTYPE)


@triton.jit
def normed(v, rate, norm, d, inside, DTYPE: tl.constexpr):
    """v times rate and the norm's weights at d, rounded wherever torch rounds."""
    v = v * rate
    if norm.dtype.element_ty == DTYPE:
        v = v.to(DTYPE).to(tl.float32)
    return (v * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]).to(DTYPE).to(tl.float32)


@triton.jit
def rotated(v, other, sign, cos, sin, d, inside, DTYPE: tl.constexpr):
    """v cos + sign * other sin at d, each product and the sum rounded."""
    v = v * tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    other = other * tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    return v.to(DTYPE).to(tl.float32) + sign * other.to(DTYPE).to(tl.float32)


@triton.jit
def move(
    x, to, inside, norm, cos, sin, d, eps, parts, stride_part,
    HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store heads [H, 2 * HALF] at `to`, normalised and rotated on the way, rounded to DTYPE wherever torch rounds."""
    low = whole(x, inside, parts, stride_part, PARTS, DTYPE)
    high = whole(x + HALF, inside, parts, stride_part, PARTS, DTYPE)
    half = d < HALF
    if NORM:
        rate = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low, high = normed(low, rate, norm, d, half, DTYPE), normed(high, rate, norm, HALF + d, half, DTYPE)
    if ROPE:
        turned = rotated(low, high, -1.0, cos, sin, d, half, DTYPE)
        high = rotated(high, low, 1.0, cos, sin, HALF + d, half, DTYPE)
        low = turned
    tl.store(to, low.to(DTYPE), mask=inside)
    tl.store(to + HALF, high.to(DTYPE), mask=inside)


@triton.jit
def turned(
    x, found, inside, norm, cos, sin, d, eps, parts, stride_part,
    DIM: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Heads at x [H, WIDTH], of whose parts the first were `found`, as `move` stores them, in DTYPE."""
    v = added(x, found, inside, parts, stride_part, PARTS, DTYPE)
    within, half = d < DIM, DIM // 2
    if NORM:
        rate = tl.rsqrt(tl.sum(v * v, 1) / DIM + eps)[:, None]
        v = normed(v, rate, norm, d, within, DTYPE)
    if ROPE:
        across = tl.where(d < half, d + half, d - half)
        if PARTS == 1:  # to ask again for what a channel is rotated with is faster than to pass it between threads
            other = whole(x + (across - d)[None, :], inside, parts, stride_part, PARTS, DTYPE)
            if NORM:
                other = normed(other, rate, norm, across, within, DTYPE)
        else:
            other = tl.gather(v, tl.broadcast_to(across[None, :], v.shape), 1)
        v = rotated(v, other, tl.where(d < half, -1.0, 1.0)[None, :], cos, sin, d, within, DTYPE)
    return v.to(DTYPE)


@triton.jit
def rope_kernel(
    query, key, value, cos, sin, position, query_norm, key_norm, key_cache, value_cache, out,
    heads, groups, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_cos, stride_position,
    stride_key_b, stride_key_h, stride_key_n, stride_value_b, stride_value_h, stride_value_n, eps, parts, stride_part,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
    ROPE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one sequence: of its query, else of its key, else of its value."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    DTYPE: tl.constexpr = out.dtype.element_ty
    eps = tl.cast(eps, tl.float32)
    queries, keys = tl.cdiv(heads, HEADS), tl.cdiv(groups, HEADS)
    half = (d < HALF)[None, :]
    begin(PDL)
    place = tl.load(position + b * stride_position).to(tl.int64)
    if ROPE:
        cos += b * stride_cos
        sin += b * stride_cos
    if tile < queries:
        row = (tile * HEADS + h).to(tl.int64)[:, None]
        x = query + b * stride_qb + row * stride_qh + d[None, :]
        to = out + (b * heads + row) * (2 * HALF) + d[None, :]
        inside = (row < heads) & half
        move(x, to, inside, query_norm, cos, sin, d, eps, parts, stride_part, HALF, QUERY_NORM, ROPE, PARTS, DTYPE)
    elif tile < queries + keys:
        row = ((tile - queries) * HEADS + h).to(tl.int64)[:, None]
        x = key + b * stride_kb + row * stride_kh + d[None, :]
        to = key_cache + b * stride_key_b + row * stride_key_h + place * stride_key_n + d[None, :]
        inside = (row < groups) & half
        move(x, to, inside, key_norm, cos, sin, d, eps, parts, stride_part, HALF, KEY_NORM, ROPE, PARTS, DTYPE)
    else:
        row = ((tile - queries - keys) * HEADS + h).to(tl.int64)[:, None]
        x = value + b * stride_vb + row * stride_vh + d[None, :]
        to = value_cache + b * stride_value_b + row * stride_value_h + place * stride_value_n + d[None, :]
        inside = (row < groups) & half
        move(x, to, inside, None, cos, sin, d, eps, parts, stride_part, HALF, False, False, PARTS, DTYPE)


def rotary_table(position: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = len(frequencies)
    cos, sin = (torch.empty(len(position), 2 * half, dtype=dtype, device=position.device) for _ in range(2))
    run(
        rotary_kernel, (len(position),), position, frequencies, cos, sin, scale, position.stride(0),
        HALF=half, WIDTH=power_of_2(half), num_warps=1,
    )  # fmt: skip
    return cos, sin


def rope_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    (batch, heads, dim), groups = query.shape[-3:], key.shape[-2]
    finished = query.dim() == 3
    parts = 1 if finished else query.shape[0]
    together = ROPE_HEADS if finished else 1  # of parts a program reads many values of a head
    out = torch.empty(batch, heads, dim, dtype=key_cache.dtype, device=query.device)
    tiles = triton.cdiv(heads, together) + 2 * triton.cdiv(groups, together)
    run(
        rope_kernel, (tiles, batch),
        query, key, value, cos, sin, position, query_norm, key_norm, key_cache, value_cache, out, heads, groups,
        *query.stride()[-3:-1], *key.stride()[-3:-1], *value.stride()[-3:-1],
        0 if cos is None or len(cos) == 1 else dim, 0 if position.numel() == 1 else 1,
        *key_cache.stride()[:3], *value_cache.stride()[:3], eps, parts, 0 if finished else query.stride(0),
        HALF=dim // 2, WIDTH=power_of_2(dim // 2), HEADS=together, QUERY_NORM=query_norm is not None,
        KEY_NORM=key_norm is not None, ROPE=cos is not None, PARTS=min(ROPE_PARTS, power_of_2(parts)),
        num_warps=4,
        enable_fp_fusion=False,  # else a product and the sum it goes into become one operation, rounded once
    )  # fmt: skip
    return out
