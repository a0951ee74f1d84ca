"""Triton kernels of Spark attention for one new token per sequence.

Four launches: scores of all visible tokens from half of their keys; the statistics of each head's scores; the tokens
above the limit, whose other half and value are read by masked loads, so that no list is needed; the sum of the splits.
Scores are compared with their own maximum, known before, so partial sums only add up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin
from sparse_kernels.launch import multiprocessors, pick, power_of_2, run
from sparse_kernels.spark_attention.launch import LAUNCH, Attend, splits


@triton.jit
def spark_score_kernel(
    query, key, visible, score, scale, N, stride_qb, stride_qh, stride_kb, stride_kg, stride_kn, stride_visible,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """score[b, h, n] = q1 k1 * scale for the query heads of one KV group and KEYS visible positions; others unset."""
    begin(PDL)
    n = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    pair = tl.program_id(1).to(tl.int64)
    b, group = pair // GROUPS, pair % GROUPS
    shown = (n < N) & (tl.load(visible + b * stride_visible + n, mask=n < N, other=0) != 0)
    d = tl.arange(0, WIDTH)
    place = key + b * stride_kb + group * stride_kg + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
    k = tl.load(place, mask=shown[:, None] & (d < HALF)[None, :], other=0.0).to(tl.float32)
    factor = tl.cast(scale, tl.float32)
    for h in tl.static_range(HEADS):
        head = group * HEADS + h
        q = tl.load(query + b * stride_qb + head * stride_qh + d, mask=d < HALF, other=0.0).to(tl.float32)
        a = tl.sum(k * q[None, :], 1) * factor
        tl.store(score + (b * GROUPS * HEADS + head) * N + n, a, mask=shown)


@triton.jit
def spark_limit_kernel(
    score, visible, multiplier, limit, best, N, stride_visible, QUERIES: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What a head's visible scores must reach, and the largest of them; a program per sequence and head."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    shown = visible + row // QUERIES * stride_visible
    mean, squares, seen, top = 0.0, 0.0, 0.0, float("-inf")
    for first in range(0, N, TILE):
        n = first + tl.arange(0, TILE)
        here = (n < N) & (tl.load(shown + n, mask=n < N, other=0) != 0)
        a = tl.load(score + row * N + n, mask=here, other=0.0)
        count = tl.sum(here.to(tl.float32), 0)
        centre = tl.sum(a, 0) / tl.maximum(count, 1.0)
        off = tl.where(here, a - centre, 0.0)
        step, total = centre - mean, tl.maximum(seen + count, 1.0)
        squares += tl.sum(off * off, 0) + step * step * (seen * count / total)
        mean += step * (count / total)
        seen += count
        top = tl.maximum(top, tl.max(tl.where(here, a, float("-inf")), 0))
    factor = tl.load(multiplier + tl.cast(seen, tl.int32))
    everything = factor == float("-inf")
    least = mean + tl.sqrt(squares / tl.maximum(seen, 1.0)) * tl.where(everything, 0.0, factor)
    tl.store(limit + row, tl.where(everything, float("-inf"), tl.minimum(least, top)))
    tl.store(best + row, top)


@triton.jit
def spark_attend_kernel(
    query, key, value, visible, score, limit, best, partial, weight, scale, N,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, stride_visible,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head's share of the positions: partial[row, split] = sum of p softplus(q2 k2) v, weight[row, split] = of p."""
    begin(PDL)
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = row // (GROUPS * HEADS), row % (GROUPS * HEADS)
    key += b * stride_kb + head // HEADS * stride_kg + HALF
    value += b * stride_vb + head // HEADS * stride_vg
    d = tl.arange(0, WIDTH)
    rest = d < DIM - HALF
    q = tl.load(query + b * stride_qb + head * stride_qh + HALF + d, mask=rest, other=0.0).to(tl.float32)
    least, top, factor = tl.load(limit + row), tl.load(best + row), tl.cast(scale, tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    last = N * (split + 1) // tl.num_programs(0)
    for start in range(N * split // tl.num_programs(0), last, KEYS):
        n = start + tl.arange(0, KEYS)
        shown = (n < last) & (tl.load(visible + b * stride_visible + n, mask=n < last, other=0) != 0)
        a = tl.load(score + row * N + n, mask=shown, other=float("-inf"))
        keep = shown & (a >= least)
        place = n.to(tl.int64)[:, None]
        k = tl.load(key + place * stride_kn + d[None, :], mask=keep[:, None] & rest[None, :], other=0.0)
        v = tl.load(value + place * stride_vn + d[None, :], mask=keep[:, None] & (d < DIM)[None, :], other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1) * factor
        gate = tl.maximum(s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
        p = tl.where(keep, tl.exp(a - top), 0.0)
        total += p
        acc += tl.sum((p * gate)[:, None] * v.to(tl.float32), 0)
    part = row * tl.num_programs(0) + split
    tl.store(partial + part * DIM + d, acc, mask=d < DIM)
    tl.store(weight + part, tl.sum(total, 0))


@triton.jit
def spark_merge_kernel(
    partial, weight, y, SPLITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[row] = sum of partial[row] / sum of weight[row]; zero where nothing is visible."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (s < SPLITS)[:, None] & (d < DIM)[None, :]
    acc = tl.sum(tl.load(partial + (row * SPLITS + s)[:, None] * DIM + d[None, :], mask=inside, other=0.0), 0)
    total = tl.sum(tl.load(weight + row * SPLITS + s, mask=s < SPLITS, other=0.0), 0)
    tl.store(y + row * DIM + d, (acc / tl.where(total > 0, total, 1.0)).to(y.dtype.element_ty), mask=d < DIM)


def spark_attention_decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, multiplier: Tensor, config: Attend | None = None
) -> Tensor:
    (batch, heads, dim), (_, groups, positions, _), device = query.shape, key.shape, query.device
    config, half, rows = config or pick(LAUNCH, device), dim // 2, batch * heads
    parts = splits(rows, positions, config.keys, config.programs * multiprocessors(device))
    score = torch.empty(rows, positions, dtype=torch.float32, device=device)
    limit, best = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    partial = torch.empty(rows, parts, dim, dtype=torch.float32, device=device)
    weight = torch.empty(rows, parts, dtype=torch.float32, device=device)
    y = torch.empty(batch, heads, dim, dtype=query.dtype, device=device)
    shown = 0 if visible.shape[0] == 1 else visible.stride(0)
    sizes = dict(GROUPS=groups, HEADS=heads // groups, HALF=half)
    queries, keys, warps = query.stride()[:2], key.stride()[:3], dict(num_warps=config.warps)
    run(
        spark_score_kernel, (triton.cdiv(positions, config.keys), batch * groups),
        query, key, visible, score, half**-0.5, positions, *queries, *keys, shown,
        **sizes, WIDTH=power_of_2(half), KEYS=config.keys, **warps,
    )  # fmt: skip
    run(
        spark_limit_kernel, (rows,), score, visible, multiplier, limit, best, positions, shown,
        QUERIES=heads, TILE=min(config.tile, power_of_2(positions)), **warps,
    )  # fmt: skip
    run(
        spark_attend_kernel, (parts, rows),
        query, key, value, visible, score, limit, best, partial, weight, (dim - half) ** -0.5, positions,
        *queries, *keys, *value.stride()[:3], shown,
        **sizes, DIM=dim, WIDTH=power_of_2(dim), KEYS=config.keys, **warps,
    )  # fmt: skip
    run(
        spark_merge_kernel, (rows,), partial, weight, y,
        SPLITS=parts, ROWS=power_of_2(parts), DIM=dim, WIDTH=power_of_2(dim), **warps,
    )  # fmt: skip
    return y
