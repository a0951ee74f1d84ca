"""Triton kernels of Spark attention for one new token per sequence.

Two passes, each with a program per sequence, KV group and split of the positions, so that the cache is read once for
all query heads of a group. The first writes the scores of half of the keys and the statistics of each split. In the
second every program puts the statistics together, lists its share's tokens that some head attends to, and reads the
rest of these only. Scores are compared with their own maximum, known before, so partial sums only add up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin, last_to_arrive
from sparse_kernels.launch import MAX_SEMAPHORES, interpreting, multiprocessors, pick, power_of_2, run, semaphores
from sparse_kernels.spark_attention.launch import FUSED_SPLITS, LAUNCH, LISTED, Attend


@triton.jit
def products(q, k, UPCAST: tl.constexpr):
    """q k of heads [ROWS, WIDTH] and positions [KEYS, WIDTH] in float32."""
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def spark_score_kernel(
    query, key, visible, score, stat, scale, N, chunk, stride_qb, stride_qh, stride_kb, stride_kg, stride_kn,
    stride_visible, stride_score, stride_stat,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """score[b, h, n] = q1 k1 * scale of a split, -inf where not visible; how many, mean, squares and largest of them.

    Flags of one byte are not fetched ahead, so a split that is all visible does not read them in its loop.
    """
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, n, d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    b, group = pair // GROUPS, pair % GROUPS
    visible += b * stride_visible
    key += b * stride_kb + group * stride_kg
    score += pair * HEADS * stride_score
    first = split * chunk
    begin(PDL)
    whole = False
    if STEPS:
        hidden = tl.zeros([KEYS], tl.int32)
        for start in range(first, first + chunk, KEYS):
            place = start + n
            hidden += (tl.load(visible + place, mask=place < N, other=0) == 0).to(tl.int32)
        whole = tl.sum(hidden, 0) == 0
    query += b * stride_qb + group * HEADS * stride_qh
    inside = (r < HEADS)[:, None] & (d < HALF)[None, :]
    q = tl.load(query + r[:, None] * stride_qh + d[None, :], mask=inside, other=0.0)
    factor = tl.cast(scale, tl.float32)
    seen = 0.0
    mean, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(first, first + chunk, KEYS, num_stages=STAGES):
        place = start + n
        shown = whole | (tl.load(visible + place, mask=(place < N) & (not whole), other=0) != 0)
        k = tl.load(
            key + tl.cast(start, tl.int64) * stride_kn + (n[:, None] * stride_kn + d[None, :]),
            mask=shown[:, None] & (d < HALF)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        a = products(q, k, UPCAST) * factor
        masked = tl.where(shown[None, :], a, float("-inf"))
        tl.store(score + r[:, None] * stride_score + place[None, :], masked, mask=(r < HEADS)[:, None])
        count = tl.sum(shown.to(tl.float32), 0)  # what is not shown has zeros as keys
        centre = tl.sum(a, 1) / tl.maximum(count, 1.0)
        off = tl.where(shown[None, :], a - centre[:, None], 0.0)
        step, part = centre - mean, count / tl.maximum(seen + count, 1.0)
        squares += tl.sum(off * off, 1) + step * step * (seen * part)
        mean += step * part
        seen += count
        top = tl.maximum(top, tl.max(masked, 1))
    stat += (pair * HEADS + r) * tl.num_programs(0) + split
    tl.store(stat, tl.zeros([ROWS], tl.float32) + seen, mask=r < HEADS)
    tl.store(stat + stride_stat, mean, mask=r < HEADS)
    tl.store(stat + 2 * stride_stat, squares, mask=r < HEADS)
    tl.store(stat + 3 * stride_stat, top, mask=r < HEADS)


@triton.jit
def limits(stat, multiplier, parts, stride_stat, h, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """What the scores of heads h must reach, and the largest of them, from the statistics of their parts."""
    s = tl.arange(0, PARTS)
    inside = (h < HEADS)[:, None] & (s < parts)[None, :]
    stat += h[:, None] * parts + s[None, :]
    count = tl.load(stat, mask=inside, other=0.0)
    means = tl.load(stat + stride_stat, mask=inside, other=0.0)
    squares = tl.load(stat + 2 * stride_stat, mask=inside, other=0.0)
    top = tl.max(tl.load(stat + 3 * stride_stat, mask=inside, other=float("-inf")), 1)
    seen = tl.sum(count, 1)
    factor = tl.load(multiplier + seen.to(tl.int32), mask=h < HEADS, other=0.0)
    mean = tl.sum(count * means, 1) / tl.maximum(seen, 1.0)
    off = means - mean[:, None]
    deviation = tl.sqrt(tl.sum(squares + count * off * off, 1) / tl.maximum(seen, 1.0))
    everything = tl.abs(factor) == float("inf")
    least = tl.minimum(mean + deviation * tl.where(everything, 0.0, factor), top)
    return tl.where(everything, float("-inf"), least), tl.where(h < HEADS, top, 0.0)


@triton.jit
def spread(values, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """values[r % HEADS] of ROWS rows."""
    return tl.reshape(tl.broadcast_to(values[None, :], [ROWS // HEADS, HEADS]), [ROWS])


@triton.jit
def listed(score, to, first, last, stride_score, least, h, HEADS: tl.constexpr, LISTED: tl.constexpr):
    """Write the positions in [first, last) that some head attends to, ascending; returns how many."""
    n = tl.arange(0, LISTED)
    count = 0
    for start in range(first, last, LISTED):
        inside = (h < HEADS)[:, None] & (start + n < last)[None, :]
        a = tl.load(score + h[:, None] * stride_score + (start + n)[None, :], mask=inside, other=float("-inf"))
        keep = tl.max(((a >= least[:, None]) & (a > float("-inf"))).to(tl.int32), 0)
        tl.store(to + count + tl.cumsum(keep, 0) - keep, start + n, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it
    return count


@triton.jit
def add_splits(
    partial, weight, out, splits, heads, stride_split,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[h] = sum of partial[:, h] / sum of weight[:, h], SPLITS at a time; zero where nothing is visible."""
    s, h, d = tl.arange(0, SPLITS), tl.arange(0, HEADS), tl.arange(0, WIDTH)
    row = tl.arange(0, SPLITS * HEADS)
    acc, total = tl.zeros([HEADS, WIDTH], tl.float32), tl.zeros([HEADS], tl.float32)
    for start in range(0, splits, SPLITS):
        live = (start + s < splits)[:, None] & (h < heads)[None, :]
        at = weight + (start + s)[:, None] * stride_split + h[None, :]
        total += tl.sum(tl.load(at, mask=live, other=0.0, cache_modifier=".cg"), 0)
        split = start + row // HEADS
        live = ((split < splits) & (row % HEADS < heads))[:, None] & (d < DIM)[None, :]
        place = partial + (split * stride_split + row % HEADS)[:, None] * DIM + d[None, :]
        part = tl.load(place, mask=live, other=0.0, cache_modifier=".cg")
        acc += tl.sum(tl.reshape(part, [SPLITS, HEADS, WIDTH]), 0)
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    inside = (h < heads)[:, None] & (d < DIM)[None, :]
    tl.store(out + h[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softplus(s):
    """log(1 + exp(s)), in whose sum a small exp(s) loses its digits: log(1 + e) is 2 artanh(e / (2 + e)), whose
    argument is at most 1 / 3, so that seven terms of its series are enough for float32."""
    e = tl.exp(-tl.abs(s))
    z = e / (2.0 + e)
    q = z * z
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(s, 0.0) + 2.0 * z * series


@triton.jit
def spark_attend_kernel(
    query, key, value, score, stat, multiplier, positions, semaphore, partial, weight, out, scale, N, chunk, parts,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, stride_score, stride_stat,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr, ADDED: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A split's sums of p softplus(q2 k2) v and of p for a group's heads; the last one adds them, or another kernel."""
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(0)
    b, group = pair // GROUPS, pair % GROUPS
    h, r, j = tl.arange(0, PADDED), tl.arange(0, ROWS), tl.arange(0, KEYS)
    d, e = tl.arange(0, WIDTH), tl.arange(0, WIDE)
    rest = d < DIM - HALF
    key += b * stride_kb + group * stride_kg + HALF
    value += b * stride_vb + group * stride_vg
    query += b * stride_qb + group * HEADS * stride_qh + HALF
    score += pair * HEADS * stride_score
    first = split * chunk
    positions += pair * stride_score + first
    begin(PDL)
    q = tl.load(query + r[:, None] * stride_qh + d[None, :], mask=(r < HEADS)[:, None] & rest[None, :], other=0.0)
    least, top = limits(stat + pair * HEADS * parts, multiplier, parts, stride_stat, h, HEADS, PARTS)
    count = listed(score, positions, first, tl.minimum(first + chunk, N), stride_score, least, h, HEADS, LISTED)
    least, top = spread(least, PADDED, ROWS), spread(top, PADDED, ROWS)
    factor = tl.cast(scale, tl.float32)
    acc, total = tl.zeros([ROWS, WIDE], tl.float32), tl.zeros([ROWS, KEYS], tl.float32)
    for start in tl.range(0, count, KEYS, num_stages=STAGES):
        live = start + j < count
        n = tl.load(positions + start + j, mask=live, other=0)
        place, inside = n.to(tl.int64)[:, None], (r < HEADS)[:, None] & live[None, :]
        k = tl.load(
            key + place * stride_kn + d[None, :],
            mask=live[:, None] & rest[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        v = tl.load(
            value + place * stride_vn + e[None, :],
            mask=live[:, None] & (e < DIM)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        a = tl.load(score + r[:, None] * stride_score + n[None, :], mask=inside, other=float("-inf"))
        gate = softplus(products(q, k, UPCAST) * factor)
        p = tl.where((a >= least[:, None]) & (a > float("-inf")), tl.exp(a - top[:, None]), 0.0)
        total += p
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot((p * gate).to(v.dtype), v, acc, input_precision="ieee")
    sums = tl.sum(total, 1)
    inside = (r < HEADS)[:, None] & (e < DIM)[None, :]
    out += pair * HEADS * DIM
    if SPLIT:
        partial += pair * splits * HEADS * DIM
        weight += pair * splits * HEADS
        row = split * HEADS + r
        tl.store(partial + row[:, None] * DIM + e[None, :], acc, mask=inside)
        tl.store(weight + row, sums, mask=r < HEADS)
        if FUSED:
            if last_to_arrive(semaphore + pair, splits):
                add_splits(partial, weight, out, splits, HEADS, HEADS, PADDED, DIM, WIDE, ADDED)
    else:
        y = acc / tl.where(sums > 0, sums, 1.0)[:, None]
        tl.store(out + r[:, None] * DIM + e[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def spark_merge_kernel(
    partial, weight, out, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, ADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the splits of one query head."""
    head, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin(PDL)
    row = pair * splits * HEADS + head
    out += (pair * HEADS + head) * DIM
    add_splits(partial + row * DIM, weight + row, out, splits, 1, HEADS, 1, DIM, WIDE, ADDED)


def spark_attention_decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, multiplier: Tensor, config: Attend | None = None
) -> Tensor:
    (batch, heads, dim), (_, groups, positions, _), device = query.shape, key.shape, query.device
    half, group, pairs = dim // 2, heads // groups, batch * groups
    config = config or pick(LAUNCH, device)
    score, rest, units = config.score, config.rest, multiprocessors(device)
    padded, width, wide = power_of_2(group), max(16, power_of_2(half)), max(16, power_of_2(dim))
    rows = max(16, padded)
    floats: dict[str, Any] = dict(dtype=torch.float32, device=device)

    keys = score.fit(dim, key.element_size())
    parts = score.splits(pairs, positions, keys, units)
    chunk = triton.cdiv(triton.cdiv(positions, parts), keys) * keys
    parts = triton.cdiv(positions, chunk)
    scores = torch.empty(batch * heads, parts * chunk, **floats)
    stat = torch.empty(4, batch * heads, parts, **floats)
    strides, queries, keyed = (scores.stride(0), stat.stride(0)), query.stride()[:2], key.stride()[:3]
    shape = dict(GROUPS=groups, HEADS=group, HALF=half, WIDTH=width, UPCAST=interpreting())
    run(
        spark_score_kernel, (parts, pairs),
        query, key, visible, scores, stat, half**-0.5, positions, chunk, *queries, *keyed,
        0 if visible.shape[0] == 1 else visible.stride(0), *strides,
        **shape, KEYS=keys, STEPS=chunk > keys, ROWS=rows, STAGES=score.stages, num_warps=score.warps,
    )  # fmt: skip

    keys = rest.fit(dim, key.element_size())
    splits = rest.splits(pairs, positions, 64, units)
    chunk = triton.cdiv(triton.cdiv(positions, splits), 64) * 64
    splits = triton.cdiv(positions, chunk)
    fused = splits <= FUSED_SPLITS and pairs <= MAX_SEMAPHORES
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=device)
    partial, weight = out, out
    if splits > 1:
        partial, weight = torch.empty(pairs, splits, group, dim, **floats), torch.empty(pairs, splits, group, **floats)
    listed = torch.empty(pairs, scores.shape[1], dtype=torch.int32, device=device)
    run(
        spark_attend_kernel, (splits, pairs),
        query, key, value, scores, stat, multiplier, listed, semaphores(device) if fused and splits > 1 else out,
        partial, weight, out, (dim - half) ** -0.5, positions, chunk, parts, *queries, *keyed, *value.stride()[:3],
        *strides,
        **shape, PADDED=padded, DIM=dim, WIDE=wide, KEYS=keys, PARTS=power_of_2(parts),
        LISTED=min(power_of_2(chunk), LISTED // padded), ROWS=rows, SPLIT=splits > 1, FUSED=fused,
        ADDED=max(1, min(power_of_2(splits), 2048 * rest.warps // (padded * wide))), STAGES=rest.stages,
        num_warps=rest.warps,
    )  # fmt: skip
    if splits > 1 and not fused:
        run(
            spark_merge_kernel, (group, pairs), partial, weight, out, splits,
            HEADS=group, DIM=dim, WIDE=wide, ADDED=min(power_of_2(splits), 8192 // wide), num_warps=4,
        )  # fmt: skip
    return out
