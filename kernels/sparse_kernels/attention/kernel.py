"""Triton kernels of `attention_decode` and `rope_cache_write`.

A program of the attention takes one sequence, one kept KV group and one split of its valid positions, so that the
cache is read once for all query heads of the group. Splits are merged in a fixed order: two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.attention.launch import FUSED_SPLITS, LAUNCH, MAX_SPLITS, ROPE_HEADS, ROPE_PARTS, Decode, regime
from sparse_kernels.blocks import begin, last_to_arrive
from sparse_kernels.launch import interpreting, multiprocessors, pick, power_of_2, run, semaphores

LOWEST = tl.constexpr(-1.0e30)  # where a running maximum starts: finite, so that differences are never NaN
LOG2_E = tl.constexpr(1.4426950408889634)
ZEROED = tl.constexpr(16)  # query heads that are zeroed at once


@triton.jit
def share(length, window, splits, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The first valid position, the positions each split takes, and how many splits (at least one) have any."""
    low = tl.maximum(length - window, 0) if WINDOW else 0
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length - low, KEYS), splits), 1) * KEYS
    return low, chunk, tl.maximum(tl.cdiv(length - low, chunk), 1)


@triton.jit
def scaled(score, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled (and capped) scores in units of log 2, since their softmax takes exp2."""
    if SOFTCAP:  # tanh(z) = 2 sigmoid(2 z) - 1
        return (softcap * LOG2_E) * (2.0 * tl.sigmoid(score * (2.0 * scale / softcap)) - 1.0)
    else:
        return score * (scale * LOG2_E)


@triton.jit
def soften(score, top, total, AXIS: tl.constexpr):
    """A step of the online softmax along AXIS: weights, factor for what was summed before, new maximum and total."""
    higher = tl.maximum(top, tl.max(score, AXIS))
    weight = tl.exp2(score - tl.expand_dims(higher, AXIS))
    fade = tl.exp2(top - higher)
    return weight, fade, higher, total * fade + tl.sum(weight, AXIS)


@triton.jit
def merge(
    partial, lse, out, arrivals, heads, stride_split,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[h, :] = sum over splits of softmax(lse[:, h])[split] * partial[split, h, :], SPLITS at a time."""
    s, h, d = tl.arange(0, SPLITS), tl.arange(0, HEADS), tl.arange(0, WIDTH)
    row = tl.arange(0, SPLITS * HEADS)
    top = tl.full([HEADS], LOWEST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in range(0, arrivals, SPLITS):
        live = (start + s < arrivals)[:, None] & (h < heads)[None, :]
        score = tl.load(
            lse + (start + s)[:, None] * stride_split + h[None, :],
            mask=live,
            other=-float("inf"),
            cache_modifier=".cg",
        )
        split = start + row // HEADS
        live = (split < arrivals) & (row % HEADS < heads)
        part = tl.load(
            partial + (split * stride_split + row % HEADS)[:, None] * DIM + d[None, :],
            mask=live[:, None] & (d < DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        weight, fade, top, total = soften(score, top, total, 0)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * tl.reshape(part, [SPLITS, HEADS, WIDTH]), 0)
    y = acc / tl.where(h < heads, total, 1.0)[:, None]
    inside = (h < heads)[:, None] & (d < DIM)[None, :]
    tl.store(out + h[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def zero_others(
    out, index, kept, heads, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LIST: tl.constexpr
):
    """Zero the outputs of the groups of a sequence that its list leaves out, shared among the programs of a slot."""
    s, h, d = tl.arange(0, LIST), tl.arange(0, ZEROED), tl.arange(0, WIDTH)
    listed = tl.load(index + s, mask=s < kept, other=-1)
    zero = tl.zeros([ZEROED, WIDTH], out.dtype.element_ty)
    for first in range(tl.program_id(0) * ZEROED, heads, tl.num_programs(0) * ZEROED):
        head = first + h
        absent = tl.sum((listed[None, :] == (head // GROUP)[:, None]).to(tl.int32), 1) == 0
        inside = (absent & (head < heads))[:, None] & (d < DIM)[None, :]
        tl.store(out + head[:, None] * DIM + d[None, :], zero, mask=inside)


@triton.jit
def attention_kernel(
    query, key, value, lengths, index, count, semaphore, partial, lse, out,
    groups, slots, stride_length, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, scale, window, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    LISTED: tl.constexpr, LIST: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    FUSED: tl.constexpr, MERGED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of a group: its part of out and of the log-sum-exp, or all of out where the other splits are empty.

    With a list, the programs behind the last slot zero the groups that are not in it, so that no other waits for that.
    ROWS: the group's query heads padded to a tile of the matrix units, whose idle rows cost nothing beside the cache.
    """
    split, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    r, n, d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    begin(PDL)
    group, kept = slot, slots
    if LISTED:
        index += b * slots
        kept = tl.load(count + b)
        if slot == slots:
            zero_others(out + b * groups * GROUP * DIM, index, kept, groups * GROUP, GROUP, DIM, WIDTH, LIST)
            return
        group = tl.load(index + slot)
    length = tl.load(lengths + b * stride_length).to(tl.int32)
    low, chunk, arrivals = share(length, window, splits, KEYS, WINDOW)
    if (slot >= kept) | (split >= arrivals):
        return
    first = low + split * chunk
    last = tl.minimum(first + chunk, length)
    inside = (r < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + b * stride_qb + (group * GROUP + r)[:, None] * stride_qh + d[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    key += b * stride_kb + group.to(tl.int64) * stride_kh
    value += b * stride_vb + group.to(tl.int64) * stride_vh
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        live = start + n < last
        mask = live[:, None] & (d < DIM)[None, :]
        at = tl.cast(start, tl.int64)
        k = tl.load(
            key + at * stride_kn + (n[:, None] * stride_kn + d[None, :]),
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        v = tl.load(
            value + at * stride_vn + (n[:, None] * stride_vn + d[None, :]),
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        weight, fade, top, total = soften(tl.where(live[None, :], score, -float("inf")), top, total, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + (b * groups + group) * GROUP * DIM
    if not SPLIT:
        tl.store(to + r[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=inside)
    elif arrivals == 1:
        tl.store(to + r[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=inside)
    else:
        own = (b * slots + slot) * splits * GROUP
        partial += own * DIM
        lse += own
        tl.store(partial + (split * GROUP + r)[:, None] * DIM + d[None, :], y, mask=inside)
        tl.store(lse + split * GROUP + r, top + tl.log2(total), mask=r < GROUP)
        if FUSED:
            if last_to_arrive(semaphore + b * slots + slot, arrivals):
                merge(partial, lse, to, arrivals, GROUP, GROUP, DIM, WIDTH, HEADS, MERGED)


@triton.jit
def merge_kernel(
    partial, lse, lengths, index, count, out, groups, splits, stride_length, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    LISTED: tl.constexpr, WINDOW: tl.constexpr, MERGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head of a kept group."""
    head, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slots = tl.num_programs(1)
    begin(PDL)
    length = tl.load(lengths + b * stride_length).to(tl.int32)
    arrivals = share(length, window, splits, KEYS, WINDOW)[2]
    group, kept = slot, slots
    if LISTED:
        kept = tl.load(count + b)
        group = tl.load(index + b * slots + slot)
    if (slot < kept) & (arrivals > 1):
        row = (b * slots + slot) * splits * GROUP + head
        to = out + ((b * groups + group) * GROUP + head) * DIM
        merge(partial + row * DIM, lse + row, to, arrivals, 1, GROUP, DIM, WIDTH, 1, MERGED)


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    config: Decode | None = None,
) -> Tensor:
    (batch, heads, dim), groups, positions = query.shape, key.shape[1], key.shape[2]
    group, slots, device = heads // groups, groups if index is None else index.shape[1], query.device
    pairs = batch * slots
    config = config or pick(LAUNCH, device)[regime(pairs, group, multiprocessors(device))]
    width, padded = max(16, power_of_2(dim)), power_of_2(group)
    keys = config.keys * 128 // width // (4 if key.dtype == torch.float32 else 1)
    keys = max(16, min(keys, 128))
    blocks = triton.cdiv(min(positions, window or positions), keys)
    splits = max(1, min(config.programs * multiprocessors(device) // pairs, blocks, MAX_SPLITS))
    fused = splits <= FUSED_SPLITS
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=device)
    partial = lse = semaphore = out
    if splits > 1:
        partial = torch.empty(batch, slots, splits, group, dim, dtype=torch.float32, device=device)
        lse = torch.empty(batch, slots, splits, group, dtype=torch.float32, device=device)
        semaphore = semaphores(device) if fused else out
    shape = dict(GROUP=group, DIM=dim, WIDTH=width, KEYS=keys, LISTED=index is not None, WINDOW=window > 0)
    stride_length = 0 if lengths.numel() == 1 else 1
    tile = 2048 * config.warps  # floats merged at once, 64 a thread
    run(
        attention_kernel, (splits, slots + (index is not None), batch),
        query, key, value, lengths, index, count, semaphore, partial, lse, out, groups, slots, stride_length,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], scale, window, softcap,
        **shape, HEADS=padded, LIST=power_of_2(slots), SOFTCAP=softcap > 0, SPLIT=splits > 1, FUSED=fused,
        MERGED=max(1, min(power_of_2(splits), tile // (padded * width))), ROWS=max(16, padded),
        STAGES=config.stages, UPCAST=interpreting(), num_warps=config.warps,
    )  # fmt: skip
    if not fused:
        run(
            merge_kernel, (group, slots, batch),
            partial, lse, lengths, index, count, out, groups, splits, stride_length, window,
            **shape, MERGED=min(power_of_2(splits), 8192 // width), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def whole(x, inside, parts, stride_part, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """float32 values at x [H, D]; of parts their sum, all of PARTS at once, rounded as the layer rounds its output."""
    if PARTS == 0:
        v = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    else:
        v = tl.zeros(x.shape, tl.float32)
        for first in tl.range(0, parts, PARTS):
            s = first + tl.arange(0, PARTS)[:, None, None]
            found = tl.load(x[None, :, :] + s * stride_part, mask=(s < parts) & inside[None, :, :], other=0.0)
            v += tl.sum(found, 0)
        v = v.to(DTYPE).to(tl.float32)
    return v


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
        low, high = low * rate, high * rate
        if norm.dtype.element_ty == DTYPE:
            low, high = low.to(DTYPE).to(tl.float32), high.to(DTYPE).to(tl.float32)
        low *= tl.load(norm + d, mask=half, other=0.0).to(tl.float32)[None, :]
        high *= tl.load(norm + HALF + d, mask=half, other=0.0).to(tl.float32)[None, :]
        low, high = low.to(DTYPE).to(tl.float32), high.to(DTYPE).to(tl.float32)
    if ROPE:
        turned = high * tl.load(sin + d, mask=half, other=0.0).to(tl.float32)[None, :]
        twisted = low * tl.load(sin + HALF + d, mask=half, other=0.0).to(tl.float32)[None, :]
        low *= tl.load(cos + d, mask=half, other=0.0).to(tl.float32)[None, :]
        high *= tl.load(cos + HALF + d, mask=half, other=0.0).to(tl.float32)[None, :]
        low = low.to(DTYPE).to(tl.float32) - turned.to(DTYPE).to(tl.float32)
        high = high.to(DTYPE).to(tl.float32) + twisted.to(DTYPE).to(tl.float32)
    tl.store(to, low.to(DTYPE), mask=inside)
    tl.store(to + HALF, high.to(DTYPE), mask=inside)


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
    parts = query.shape[0] if query.dim() == 4 else 0
    together = 1 if parts else ROPE_HEADS  # of parts a program reads many values of a head
    out = torch.empty(batch, heads, dim, dtype=key_cache.dtype, device=query.device)
    tiles = triton.cdiv(heads, together) + 2 * triton.cdiv(groups, together)
    run(
        rope_kernel, (tiles, batch),
        query, key, value, cos, sin, position, query_norm, key_norm, key_cache, value_cache, out, heads, groups,
        *query.stride()[-3:-1], *key.stride()[-3:-1], *value.stride()[-3:-1],
        0 if cos is None or len(cos) == 1 else dim, 0 if position.numel() == 1 else 1,
        *key_cache.stride()[:3], *value_cache.stride()[:3], eps, parts, query.stride(0) if parts else 0,
        HALF=dim // 2, WIDTH=power_of_2(dim // 2), HEADS=together, QUERY_NORM=query_norm is not None,
        KEY_NORM=key_norm is not None, ROPE=cos is not None, PARTS=min(ROPE_PARTS, power_of_2(parts)) if parts else 0,
        num_warps=4,
        enable_fp_fusion=False,  # else a product and the sum it goes into become one operation, rounded once
    )  # fmt: skip
    return out
