"""The Triton kernel of exact top-k: one program finds how large the k-th largest score of a row is."""

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin
from sparse_kernels.launch import pick, power_of_2, run
from sparse_kernels.selection.kernel import empty_list, lists
from sparse_kernels.selection.launch import LAUNCH, LISTED_AT_ONCE, Scan

PATIENCE = tl.constexpr(24)  # levels that a search tries by interpolation


@triton.jit
def key_of(value, SHIFT: tl.constexpr):
    """The key of a float32 value."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 value of a key."""
    bits = key << SHIFT
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(row, j, K, LOWEST: tl.constexpr, SHIFT: tl.constexpr):
    """Integers in the order of the float values at j: NaN counts as -inf, and whatever is beyond the row is lower.

    SHIFT drops low bits that the dtype never sets, so that its values take fewer steps to tell apart.
    """
    value = tl.load(row + j, mask=j < K, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    return tl.where(j < K, key_of(tl.where(value == 0.0, 0.0, value), SHIFT), LOWEST)


@triton.jit
def reaching(
    keys, level, row, K, TILE: tl.constexpr, WHOLE: tl.constexpr, LOWEST: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """How many keys of the row are at least `level`."""
    if WHOLE:
        found = (keys >= level).to(tl.int32)
    else:
        found = tl.zeros([TILE], tl.int32)
        for first in range(0, K, TILE):
            j = first + tl.arange(0, TILE)
            found += (load_keys(row, j, K, LOWEST, SHIFT) >= level).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def top_kernel(
    score, index, count, mask, K, k, stride, deviations,
    MASK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """List, or mark where MASK, the k largest scores of a row: a level that k of them reach is found between one that
    more reach and one that fewer reach, then everything from there up.

    The first level tried is where a normal distribution has it, `deviations` above the mean, the next ones where a line
    between both ends has it (false position). An end that stays twice pulls half as much, so that both come closer
    (Illinois), and what is not found after PATIENCE levels is halved.
    """
    begin(PDL)
    b = tl.program_id(0).to(tl.int64)
    row = score + b * stride
    keys = load_keys(row, tl.arange(0, TILE), K, LOWEST, SHIFT)
    floor, ceil, first_moment, second_moment = 0x7FFFFFFF, LOWEST, 0.0, 0.0
    for first in range(0, K, TILE):
        j = first + tl.arange(0, TILE)
        if not WHOLE:
            keys = load_keys(row, j, K, LOWEST, SHIFT)
        value = tl.where(j < K, value_of(keys, SHIFT), 0.0)
        floor = tl.minimum(floor, tl.min(tl.where(j < K, keys, 0x7FFFFFFF), 0))
        ceil = tl.maximum(ceil, tl.max(keys, 0))
        first_moment += tl.sum(value, 0) / K
        second_moment += tl.sum(value * value, 0) / K
    ceil += 1
    variance = tl.maximum(second_moment - first_moment * first_moment, 0.0)
    guess = first_moment + tl.cast(deviations, tl.float32) * tl.sqrt(variance)
    found, tried, side = tl.cast(K, tl.int32), 0, 0
    surplus, lack = tl.cast(K - k, tl.float32), tl.cast(k, tl.float32)  # how far both ends are from k
    while (found != k) & (ceil - 1 > floor):
        low, high = value_of(floor, SHIFT), value_of(ceil, SHIFT)
        guess = tl.where(tried > 0, low + (high - low) * (surplus / (surplus + lack)), guess)
        middle = (floor >> 1) + (ceil >> 1) + (floor & ceil & 1)
        level = tl.where(tried < PATIENCE, key_of(guess, SHIFT), middle)
        level = tl.maximum(tl.minimum(level, ceil - 1), floor + 1)
        higher = reaching(keys, level, row, K, TILE, WHOLE, LOWEST, SHIFT)
        if higher >= k:
            floor, found, surplus = level, higher, tl.cast(higher - k, tl.float32)
            lack = tl.where(side > 0, lack * 0.5, lack)
            side = 1
        else:
            ceil, lack = level, tl.cast(k - higher, tl.float32)
            surplus = tl.where(side < 0, surplus * 0.5, surplus)
            side = -1
        tried += 1
    if MASK:
        if found == k:  # nobody has to count who comes first among equals
            for first in range(0, K, TILE):
                j = first + tl.arange(0, TILE)
                if not WHOLE:
                    keys = load_keys(row, j, K, LOWEST, SHIFT)
                tl.store(mask + b * K + j, (keys >= floor).to(tl.int8), mask=j < K)
            return
    ties = k - reaching(keys, floor + 1, row, K, TILE, WHOLE, LOWEST, SHIFT)
    larger, equal = 0, 0
    for first in range(0, K, TILE):
        j = first + tl.arange(0, TILE)
        if not WHOLE:
            keys = load_keys(row, j, K, LOWEST, SHIFT)
        both = (keys > floor).to(tl.int32) + ((keys == floor).to(tl.int32) << 16)  # two counts in one scan
        ahead = tl.cumsum(both, 0) - both
        same = equal + (ahead >> 16)
        keep = (keys > floor) | ((keys == floor) & (same < ties))
        if MASK:
            tl.store(mask + b * K + j, keep.to(tl.int8), mask=j < K)
        else:
            place = larger + (ahead & 0xFFFF) + tl.minimum(same, ties)
            tl.store(index + b * k + place.to(tl.int64), j, mask=keep)
        if not WHOLE:
            total = tl.sum(both, 0)
            larger += total & 0xFFFF
            equal += total >> 16
    if not MASK:
        tl.store(count + b, k)


def top_k(score: Tensor, k: int, config: Scan | None = None) -> tuple[Tensor, Tensor]:
    index, count = empty_list(k, score.device, score.shape[0])
    if score.shape[1] > LISTED_AT_ONCE:
        return lists(top_mask(score, k, config).view(torch.int8), None, "nonzero", index, count)
    top(score, k, config, index=index, count=count)
    return index, count


def top_mask(score: Tensor, k: int, config: Scan | None = None) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    top(score, k, config, mask=mask.view(torch.int8))
    return mask


def top(score: Tensor, k: int, config: Scan | None, **out: Tensor) -> None:
    """Write the k largest scores of each row to `index` and `count`, or to `mask`."""
    batch, channels = score.shape
    config = config or pick(LAUNCH, score.device)["top"]
    whole = channels <= config.block
    tile = power_of_2(channels) if whole else config.block // 2
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(score.dtype, 0)
    run(
        top_kernel, (batch,), score, out.get("index"), out.get("count"), out.get("mask"), channels, k, score.stride(0),
        NormalDist().inv_cdf(1 - k / channels) if 0 < k < channels else 0.0,
        MASK="mask" in out, TILE=tile, WHOLE=whole, SHIFT=shift, LOWEST=-(1 << (31 - shift)),
        num_warps=config.warps_for(tile),
    )  # fmt: skip
