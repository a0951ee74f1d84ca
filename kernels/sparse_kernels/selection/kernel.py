"""Triton kernel of `compact`.

Programs take BLOCK channels each. Instead of waiting for one another, every program counts the active channels before
its own block again: those are a few kilobytes in cache, and one launch of independent programs is quicker than a
second launch or a chain of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.launch import power_of_2, run

BLOCK = 1024
MAX_TILE = 16384


@triton.jit
def active(x, threshold, k, inside, B, stride, MAGNITUDE: tl.constexpr, CHANNELWISE: tl.constexpr):
    """1 for each channel of k in which any row is above its threshold, else 0."""
    if CHANNELWISE:
        limit = tl.load(threshold + k, mask=inside, other=0.0)
    else:
        limit = tl.load(threshold)
    found = k < 0
    row = x
    for _ in range(B):
        value = tl.load(row + k, mask=inside, other=0.0).to(tl.float32)
        if MAGNITUDE:
            value = tl.abs(value)
        found = found | (value > limit)
        row += stride
    return (found & inside).to(tl.int32)


@triton.jit
def compact_kernel(
    x, threshold, index, count, B, K, stride,
    MAGNITUDE: tl.constexpr, CHANNELWISE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    k = start + tl.arange(0, BLOCK)
    here = active(x, threshold, k, k < K, B, stride, MAGNITUDE, CHANNELWISE)
    earlier = tl.zeros([TILE], tl.int32)
    for first in range(0, start, TILE):
        j = first + tl.arange(0, TILE)
        earlier += active(x, threshold, j, j < start, B, stride, MAGNITUDE, CHANNELWISE)
    before = tl.sum(earlier, 0)
    tl.store(index + before + tl.cumsum(here, 0) - here, k, mask=here != 0)
    if start + BLOCK >= K:
        tl.store(count, before + tl.sum(here, 0))


def compact(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape
    index = torch.empty(channels, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    tile = max(BLOCK, min(MAX_TILE, power_of_2(channels)))
    run(
        compact_kernel, (triton.cdiv(channels, BLOCK),),
        x, threshold, index, count, batch, channels, x.stride(0),
        MAGNITUDE=magnitude, CHANNELWISE=threshold.numel() > 1, BLOCK=BLOCK, TILE=tile,
        num_warps=min(16, max(4, tile // 512)),
    )  # fmt: skip
    return index, count
