"""Triton kernel of `token_attention`: what `rope.py` and `kernel.py` do for one row, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.attention.kernel import (
    LOWEST,
    attend,
    deliver,
    merged_at_once,
    rows_of,
    scaled,
    scratch,
    share,
    soften,
    split_for,
)
from sparse_kernels.attention.launch import FUSED_SPLITS, LAUNCH, Decode
from sparse_kernels.attention.rope import added, asked, turned
from sparse_kernels.blocks import begin
from sparse_kernels.launch import interpreting, pick, power_of_2, run


@triton.jit
def token_kernel(
    query, key, value, cos, sin, position, query_norm, key_norm, key_cache, value_cache, semaphore, partial, lse, out,
    stride_qh, stride_kh, stride_vh, stride_key_h, stride_key_n, stride_value_h, stride_value_n, eps, parts,
    stride_part, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, ROPE: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of a group, rotation and cache write included: as `rope_kernel` and `attention_kernel` of one row.

    Cached positions do not depend on the projections, so that the first of them are read before those are there. The
    last split has the new position: it writes it to the cache and attends to it as it is.
    """
    split, group = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = out.dtype.element_ty
    scale, softcap, eps = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32), tl.cast(eps, tl.float32)
    r, n, d, h = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH), tl.arange(0, HEADS)
    place = tl.load(position).to(tl.int32)
    _, chunk, arrivals = share(place + 1, 0, tl.num_programs(0), KEYS, False)
    if split >= arrivals:
        return
    first = split * chunk
    last = tl.minimum(first + chunk, place)
    key_cache += group.to(tl.int64) * stride_key_h
    value_cache += group.to(tl.int64) * stride_value_h
    k = rows_of(key_cache, first, last, n, d, stride_key_n, DIM)
    v = rows_of(value_cache, first, last, n, d, stride_value_n, DIM)
    one = tl.arange(0, 1)[:, None]
    query += (group * GROUP + h)[:, None] * stride_qh + d[None, :]
    key += group * stride_kh + one + d[None, :]
    value += group * stride_vh + one + d[None, :]
    some, inside = (h < GROUP)[:, None] & (d < DIM)[None, :], (one == 0) & (d < DIM)[None, :]
    mine = inside & (split == arrivals - 1)
    begin(PDL)
    queries = asked(query, some, 0, parts, stride_part, PARTS)
    if PARTS > 1:  # asked for before any is added: one way to memory instead of three
        keys = asked(key, mine, 0, parts, stride_part, PARTS)
        values = asked(value, mine, 0, parts, stride_part, PARTS)
    q = turned(
        query, queries, some, query_norm, cos, sin, d, eps, parts, stride_part, DIM, QUERY_NORM, ROPE, PARTS, DTYPE
    )
    if SCALED:
        q = (q.to(tl.float32) * scale).to(DTYPE)
        scale = 1.0
    # The idle rows of a tile of the matrix units repeat the heads.
    q = tl.reshape(tl.broadcast_to(q[None, :, :], (ROWS // HEADS, HEADS, WIDTH)), (ROWS, WIDTH))
    if UPCAST:
        q = q.to(tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top, total, acc = attend(q, k, v, first + n < last, top, total, acc, scale, softcap, SOFTCAP, UPCAST)
    for start in tl.range(first + KEYS, last, KEYS, num_stages=STAGES):
        k = rows_of(key_cache, start, last, n, d, stride_key_n, DIM)
        v = rows_of(value_cache, start, last, n, d, stride_value_n, DIM)
        top, total, acc = attend(q, k, v, start + n < last, top, total, acc, scale, softcap, SOFTCAP, UPCAST)
    if split == arrivals - 1:
        if PARTS == 1:
            keys = asked(key, inside, 0, parts, stride_part, PARTS)
            values = asked(value, inside, 0, parts, stride_part, PARTS)
        newest = turned(
            key, keys, inside, key_norm, cos, sin, d, eps, parts, stride_part, DIM, KEY_NORM, ROPE, PARTS, DTYPE
        )
        content = added(value, values, inside, parts, stride_part, PARTS, DTYPE)
        at = tl.cast(place, tl.int64)
        tl.store(key_cache + at * stride_key_n + one + d[None, :], newest, mask=inside)
        tl.store(value_cache + at * stride_value_n + one + d[None, :], content.to(DTYPE), mask=inside)
        score = scaled(tl.sum(q.to(tl.float32) * newest.to(tl.float32), 1), scale, softcap, SOFTCAP)
        weight, fade, top, total = soften(score[:, None], top, total, 1)
        acc = acc * fade[:, None] + weight * content
    own = group * tl.num_programs(0) * GROUP
    deliver(
        acc, top, total, split, arrivals, r, d, out + group * GROUP * DIM, partial + own * DIM, lse + own,
        semaphore + group, GROUP, HEADS, DIM, WIDTH, SPLIT, True, MERGED,
    )  # fmt: skip


def token_attention(
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
    scale: float,
    scaled_query: bool,
    softcap: float,
    config: Decode | None = None,
) -> Tensor:
    (heads, dim), groups = query.shape[-2:], key.shape[-2]
    finished, group = query.dim() == 3, heads // groups
    parts = 1 if finished else query.shape[0]
    wide = dim > 128  # what is read ahead would not fit in registers
    config = config or pick(LAUNCH, query.device)["all" if wide else "token" if parts == 1 else "token, parts"]
    keys, splits = split_for(groups, key_cache, 0, FUSED_SPLITS, config)
    width, padded = max(16, power_of_2(dim)), power_of_2(group)
    out = torch.empty(1, heads, dim, dtype=key_cache.dtype, device=query.device)
    partial, lse, semaphore = scratch(1, groups, splits, group, out, True)
    run(
        token_kernel, (splits, groups),
        query, key, value, cos, sin, position, query_norm, key_norm, key_cache, value_cache, semaphore, partial, lse,
        out, query.stride(-2), key.stride(-2), value.stride(-2), *key_cache.stride()[1:3], *value_cache.stride()[1:3],
        eps, parts, 0 if finished else query.stride(0), scale, softcap,
        GROUP=group, HEADS=padded, DIM=dim, WIDTH=width, KEYS=keys, QUERY_NORM=query_norm is not None,
        KEY_NORM=key_norm is not None, ROPE=cos is not None, SCALED=scaled_query,
        PARTS=max(1, min(power_of_2(parts), 4096 // (padded * width))), SOFTCAP=softcap > 0,
        SPLIT=splits > 1, MERGED=merged_at_once(splits, padded * width, config), ROWS=max(16, padded),
        STAGES=config.stages, UPCAST=interpreting(), num_warps=config.warps,
        enable_fp_fusion=False,  # else a product and the sum it goes into become one operation, rounded once
    )  # fmt: skip
    return out
