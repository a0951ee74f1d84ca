"""Triton kernels of `attention_decode`.

A program takes one sequence, one kept KV group and one split of its valid positions, so that the
cache is read once for all query heads of the group. Splits are merged in a fixed order: two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.attention.launch import (
    FUSED_SPLITS,
    LAUNCH,
    MAX_SPLITS,
    Decode,
    regime,
)
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
def rows_of(cache, start, last, n, d, stride, DIM: tl.constexpr):
    """Positions start + n of a cache [KEYS, WIDTH], zero from `last` on."""
    return tl.load(
        cache + tl.cast(start, tl.int64) * stride + (n[:, None] * stride + d[None, :]),
        mask=(start + n < last)[:, None] & (d < DIM)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def attend(q, k, v, live, top, total, acc, scale, softcap, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """A step of the online softmax over the `live` ones of some positions: maximum, total and weighted sum."""
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    score = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    weight, fade, top, total = soften(tl.where(live[None, :], score, -float("inf")), top, total, 1)
    return top, total, tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")


@triton.jit
def deliver(
    acc, top, total, split, arrivals, r, d, to, partial, lse, semaphore,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    FUSED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Store a split's part of a group's output, or all of it where the other splits are empty; the last one merges."""
    inside = (r < GROUP)[:, None] & (d < DIM)[None, :]
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    if not SPLIT:
        tl.store(to + r[:, None] * DIM + d[None, :], y.to(to.dtype.element_ty), mask=inside)
    elif arrivals == 1:
        tl.store(to + r[:, None] * DIM + d[None, :], y.to(to.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + (split * GROUP + r)[:, None] * DIM + d[None, :], y, mask=inside)
        tl.store(lse + split * GROUP + r, top + tl.log2(total), mask=r < GROUP)
        if FUSED:
            if last_to_arrive(semaphore, arrivals):
                merge(partial, lse, to, arrivals, GROUP, GROUP, DIM, WIDTH, HEADS, MERGED)


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
        k = rows_of(key, start, last, n, d, stride_kn, DIM)
        v = rows_of(value, start, last, n, d, stride_vn, DIM)
        top, total, acc = attend(q, k, v, start + n < last, top, total, acc, scale, softcap, SOFTCAP, UPCAST)
    own = (b * slots + slot) * splits * GROUP
    deliver(
        acc, top, total, split, arrivals, r, d, out + (b * groups + group) * GROUP * DIM, partial + own * DIM,
        lse + own, semaphore + b * slots + slot, GROUP, HEADS, DIM, WIDTH, SPLIT, FUSED, MERGED,
    )  # fmt: skip


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


def split_for(pairs: int, cache: Tensor, window: int, most: int, config: Decode) -> tuple[int, int]:
    """(positions a program takes per step, splits of the positions) for a cache [B, groups, N, D]."""
    (positions, dim), device = cache.shape[2:], cache.device
    keys = config.keys * 128 // max(16, power_of_2(dim)) // (4 if cache.dtype == torch.float32 else 1)
    keys = max(16, min(keys, 128))
    blocks = triton.cdiv(min(positions, window or positions), keys)
    return keys, max(1, min(config.programs * multiprocessors(device) // pairs, blocks, most))


def scratch(batch: int, slots: int, splits: int, group: int, out: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Partial outputs, their log-sum-exps and semaphores of the programs of every slot; `out` where there are none."""
    if splits == 1:
        return out, out, out
    partial = torch.empty(batch, slots, splits, group, out.shape[-1], dtype=torch.float32, device=out.device)
    return partial, partial.new_empty(partial.shape[:-1]), semaphores(out.device) if fused else out


def merged_at_once(splits: int, values: int, config: Decode) -> int:
    """Splits of so many values that a program merges at once: 64 floats a thread."""
    return max(1, min(power_of_2(splits), 2048 * config.warps // values))


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
    (batch, heads, dim), groups = query.shape, key.shape[1]
    group, slots, device = heads // groups, groups if index is None else index.shape[1], query.device
    pairs = batch * slots
    config = config or pick(LAUNCH, device)[regime(pairs, group, index is not None, multiprocessors(device))]
    keys, splits = split_for(pairs, key, window, MAX_SPLITS, config)
    width, padded = max(16, power_of_2(dim)), power_of_2(group)
    fused = splits <= FUSED_SPLITS
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=device)
    partial, lse, semaphore = scratch(batch, slots, splits, group, out, fused)
    shape = dict(GROUP=group, DIM=dim, WIDTH=width, KEYS=keys, LISTED=index is not None, WINDOW=window > 0)
    stride_length = 0 if lengths.numel() == 1 else 1
    run(
        attention_kernel, (splits, slots + (index is not None), batch),
        query, key, value, lengths, index, count, semaphore, partial, lse, out, groups, slots, stride_length,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], scale, window, softcap,
        **shape, HEADS=padded, LIST=power_of_2(slots), SOFTCAP=softcap > 0, SPLIT=splits > 1, FUSED=fused,
        MERGED=merged_at_once(splits, padded * width, config), ROWS=max(16, padded),
        STAGES=config.stages, UPCAST=interpreting(), num_warps=config.warps,
    )  # fmt: skip
    if not fused:
        run(
            merge_kernel, (group, slots, batch),
            partial, lse, lengths, index, count, out, groups, splits, stride_length, window,
            **shape, MERGED=min(power_of_2(splits), 8192 // width), num_warps=4,
        )  # fmt: skip
    return out
