"""Triton kernels that turn scores into index lists.

Lists are ascending, so the place of an active channel is the number of active channels before it. Every program counts
those again instead of waiting for the programs before it: a few kilobytes in cache are quicker than a chain of
dependent latencies. Where counting again would read too much, for the union of several rows, a kernel before marks the
active channels in one byte each: launched programmatically, it costs less than one program that waits for all others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import activate, begin
from sparse_kernels.launch import pick, power_of_2, run
from sparse_kernels.selection.launch import LAUNCH, Scan

RECOUNT = 16384  # earlier channels that a program counts per step


@triton.jit
def limits(threshold, k, inside, COMPARE: tl.constexpr, CHANNELWISE: tl.constexpr):
    """The threshold of each channel of k, or the one of all channels."""
    if COMPARE == "nonzero":
        limit = 0.0
    elif CHANNELWISE:
        limit = tl.load(threshold + k, mask=inside, other=0.0)
    else:
        limit = tl.load(threshold)
    return limit


@triton.jit
def above(value, limit, inside, COMPARE: tl.constexpr):
    """1 where value is above its limit (or not zero), else 0."""
    if COMPARE == "nonzero":
        found = value != 0
    elif COMPARE == "magnitude":
        found = tl.abs(value.to(tl.float32)) > limit
    else:
        found = value.to(tl.float32) > limit
    return (found & inside).to(tl.int32)


@triton.jit
def list_active(index, k, here, before):
    """Put each channel of k that is active (`here` = 1) in its place behind the `before` active ones ahead of k."""
    place = before + tl.cumsum(here, 0) - here
    tl.store(index + place.to(tl.int64), k, mask=here != 0)


@triton.jit
def list_kernel(
    x, threshold, index, count, K, slots, stride,
    COMPARE: tl.constexpr, CHANNELWISE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """List the active channels of each row of x, at most `slots`; a row of programs for each."""
    start = tl.program_id(0) * BLOCK
    row = tl.program_id(1).to(tl.int64)
    x += row * stride
    k = start + tl.arange(0, BLOCK)
    limit = limits(threshold, k, k < K, COMPARE, CHANNELWISE)
    begin(PDL)
    value = tl.load(x + k, mask=k < K, other=0)  # needed last: it is on its way while earlier channels are counted
    earlier = tl.zeros([TILE], tl.int32)
    for first in range(0, start, TILE):
        j = first + tl.arange(0, TILE)
        below = limits(threshold, j, j < start, COMPARE, CHANNELWISE)
        earlier += above(tl.load(x + j, mask=j < start, other=0), below, j < start, COMPARE)
    before = tl.sum(earlier, 0)
    here = above(value, limit, k < K, COMPARE)
    list_active(index + row * slots, k, here, before)
    if start + BLOCK >= K:
        tl.store(count + row, before + tl.sum(here, 0))


@triton.jit
def mark_kernel(
    x, threshold, mark, B, K, stride,
    COMPARE: tl.constexpr, CHANNELWISE: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """mark[k] = 1 for each channel that is active in any row of x, else 0."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.arange(0, BATCH).to(tl.int64)[:, None]
    inside = (b < B) & (k < K)[None, :]
    limit = limits(threshold, k, k < K, COMPARE, CHANNELWISE)
    if CHANNELWISE:
        limit = limit[None, :]
    begin(PDL)
    value = tl.load(x + b * stride + k[None, :], mask=inside, other=0)
    tl.store(mark + k, tl.max(above(value, limit, inside, COMPARE), 0).to(tl.int8), mask=k < K)


@triton.jit
def mask_kernel(index, count, mask, K, stride, TILE: tl.constexpr, PDL: tl.constexpr):
    """mask[row, k] = 1 for each k in the list of the row, else 0; a program per row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, K, TILE):
        k = first + tl.arange(0, TILE)
        tl.store(mask + row * K + k, 0, mask=k < K)
    tl.debug_barrier()  # the ones below must come after the zeros
    length = tl.load(count + row)
    for first in range(0, length, TILE):
        p = first + tl.arange(0, TILE)
        k = tl.load(index + row * stride + p, mask=p < length, other=0)
        tl.store(mask + row * K + k.to(tl.int64), 1, mask=p < length)


@triton.jit
def respond(v, NAME: tl.constexpr):
    """The activation called NAME (see `RESPONSES`) of float32 values."""
    if NAME == "tanh":
        v = 2.0 * tl.sigmoid(2.0 * v) - 1.0
    elif NAME == "abs":
        v = tl.abs(v)
    elif NAME != "identity":
        v = activate(v, NAME)
    return v


@triton.jit
def statistical_kernel(
    x, value, threshold, mark, multiplier, K, stride,
    SOFT: tl.constexpr, ACTIVATION: tl.constexpr, MAGNITUDE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per row: mean and deviation tile by tile, joined so that no precision is lost, then the selection."""
    begin(PDL)
    b = tl.program_id(0).to(tl.int64)
    row = x + b * stride
    mean, squares, seen, best = 0.0, 0.0, 0.0, float("-inf")
    for first in range(0, K, TILE):
        k = first + tl.arange(0, TILE)
        score = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        if MAGNITUDE:
            score = tl.abs(respond(score, ACTIVATION))  # 0 beyond the row, as every activation is at 0
        n = tl.minimum(K - first, TILE).to(tl.float32)
        centre = tl.sum(score, 0) / n
        off = tl.where(k < K, score - centre, 0.0)
        step = centre - mean
        squares += tl.sum(off * off, 0) + step * step * (seen * n / (seen + n))
        seen += n
        mean += step * (n / seen)
        if not SOFT:
            best = tl.maximum(best, tl.max(tl.where(k < K, score, float("-inf")), 0))
    factor = tl.cast(multiplier, tl.float32)
    infinite = tl.abs(factor) == float("inf")
    limit = mean + tl.sqrt(squares / seen) * tl.where(infinite, 0.0, factor)
    if not SOFT:  # the mean of equal scores may be rounded to more than they are
        limit = tl.minimum(limit, best, propagate_nan=tl.PropagateNan.ALL)
    limit = tl.where(infinite, factor, limit)
    tl.store(threshold + b, limit)
    for first in range(0, K, TILE):
        k = first + tl.arange(0, TILE)
        v = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        if SOFT:
            keep = v > limit
            v = tl.where(limit == float("-inf"), v, v - limit)
        v = respond(v, ACTIVATION) if MAGNITUDE else v
        if not SOFT:
            keep = (tl.abs(v) if MAGNITUDE else v) >= limit
        if MAGNITUDE:
            keep &= v != 0
        v = v if MAGNITUDE else respond(v, ACTIVATION)
        tl.store(value + b * K + k, tl.where(keep, v, 0.0).to(value.dtype.element_ty), mask=k < K)
        tl.store(mark + b * K + k, keep.to(tl.int8), mask=k < K)


@triton.jit
def larger(a, b):
    """The larger of two values; NaN if one is, which `tl.max` drops."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def near_best_kernel(
    score, share, near, index, count, B, E, BATCH: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):
    """In one program: list the experts that reach share times the best score of any row.

    near: the scores, -inf where a row's score does not reach that.
    """
    b = tl.arange(0, BATCH)
    rows = b.to(tl.int64)[:, None] * E
    tau = tl.load(share)
    begin(PDL)
    best = tl.where(b < B, float("-inf"), 0.0)
    for first in range(0, E, TILE):
        e = first + tl.arange(0, TILE)
        inside = (b < B)[:, None] & (e < E)[None, :]
        v = tl.load(score + rows + e[None, :], mask=inside, other=float("-inf"))
        best = larger(best, tl.reduce(v, 1, larger))
    level = (tau * best)[:, None]
    before = 0
    for first in range(0, E, TILE):
        e = first + tl.arange(0, TILE)
        inside = (b < B)[:, None] & (e < E)[None, :]
        v = tl.load(score + rows + e[None, :], mask=inside, other=0.0)
        reached = inside & (v >= level)
        here = tl.max(reached.to(tl.int32), 0)
        list_active(index, e, here, before)
        before += tl.sum(here, 0)
        tl.store(near + rows + e[None, :], tl.where(reached, v, float("-inf")), mask=inside)
    tl.store(count, before)


def empty_list(slots: int, device: torch.device, lists: int | None = None) -> tuple[Tensor, Tensor]:
    """Room for one list (index [slots], count [1]), or for one per row (index [lists, slots], count [lists])."""
    shape = (slots,) if lists is None else (lists, slots)
    index = torch.empty(shape, dtype=torch.int32, device=device)
    return index, torch.empty(lists or 1, dtype=torch.int32, device=device)


def lists(
    x: Tensor, threshold: Tensor | None, compare: str, index: Tensor, count: Tensor, config: Scan | None = None
) -> tuple[Tensor, Tensor]:
    """List each row of x [B, K] in index, count."""
    batch, channels = x.shape
    config = config or pick(LAUNCH, x.device)["list"]
    block = max(32, min(config.block, power_of_2(channels)))
    tile = max(block, min(RECOUNT, power_of_2(channels)))
    run(
        list_kernel, (triton.cdiv(channels, block), batch), x, threshold, index, count, channels, index.shape[-1],
        x.stride(0), COMPARE=compare, CHANNELWISE=threshold is not None and threshold.numel() > 1, BLOCK=block,
        TILE=tile, num_warps=config.warps_for(tile),
    )  # fmt: skip
    return index, count


def list_any(
    x: Tensor, threshold: Tensor | None, compare: str, config: Scan | None = None, mark: Scan | None = None
) -> tuple[Tensor, Tensor]:
    """One list of what is active in any row of x [B, K]."""
    batch, channels = x.shape
    if batch > 1:
        mark = mark or pick(LAUNCH, x.device)["mark"]
        block = max(32, min(mark.block // power_of_2(batch), power_of_2(channels)))
        marks = torch.empty(1, channels, dtype=torch.int8, device=x.device)
        run(
            mark_kernel, (triton.cdiv(channels, block),), x, threshold, marks, batch, channels, x.stride(0),
            COMPARE=compare, CHANNELWISE=threshold is not None and threshold.numel() > 1, BATCH=power_of_2(batch),
            BLOCK=block, num_warps=mark.warps_for(block * power_of_2(batch)),
        )  # fmt: skip
        x, threshold, compare = marks, None, "nonzero"
    return lists(x, threshold, compare, *empty_list(channels, x.device), config)


def compact(x: Tensor, threshold: Tensor, magnitude: bool, *config: Scan) -> tuple[Tensor, Tensor]:
    return list_any(x, threshold, "magnitude" if magnitude else "value", *config)


def to_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = mask.view(-1, mask.shape[-1]).view(torch.int8)
    index, count = lists(rows, None, "nonzero", *empty_list(rows.shape[1], mask.device, rows.shape[0]))
    return index.view(mask.shape), count


def union(mask: Tensor) -> tuple[Tensor, Tensor]:
    return list_any(mask.view(torch.int8), None, "nonzero")


def to_mask(index: Tensor, count: Tensor, size: int, config: Scan | None = None) -> Tensor:
    config = config or pick(LAUNCH, index.device)["mask"]
    mask = torch.empty(*index.shape[:-1], size, dtype=torch.bool, device=index.device)
    tile = min(config.block, power_of_2(size))
    run(
        mask_kernel, (count.numel(),), index, count, mask.view(torch.int8), size, index.shape[-1],
        TILE=tile, num_warps=config.warps_for(tile),
    )  # fmt: skip
    return mask


def union_lists(index: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return union(to_mask(index, count, size))


def statistical_top_k(
    score: Tensor, multiplier: float, soft: bool, activation: str, magnitude: bool, config: Scan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, channels), device = score.shape, score.device
    config = config or pick(LAUNCH, device)["statistics"]
    tile = min(config.block, power_of_2(channels))
    value = torch.empty_like(score, memory_format=torch.contiguous_format)
    threshold = torch.empty(batch, dtype=torch.float32, device=device)
    marks = torch.empty(batch, channels, dtype=torch.int8, device=device)
    run(
        statistical_kernel, (batch,), score, value, threshold, marks, multiplier, channels, score.stride(0),
        SOFT=soft, ACTIVATION=activation, MAGNITUDE=magnitude, TILE=tile, num_warps=config.warps_for(tile),
    )  # fmt: skip
    return value, threshold, *union(marks)


def near_best(score: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, experts = score.shape
    config = pick(LAUNCH, score.device)["near best"]
    near = torch.empty_like(score)
    index, count = empty_list(experts, score.device)
    tile = max(16, min(config.block // power_of_2(batch), power_of_2(experts)))
    run(
        near_best_kernel, (1,), score, share, near, index, count, batch, experts,
        BATCH=power_of_2(batch), TILE=tile, num_warps=config.warps_for(tile * power_of_2(batch)),
    )  # fmt: skip
    return near, index, count
