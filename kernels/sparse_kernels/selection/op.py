"""Registered operator `compact`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.launch import require, require_input, require_threshold, use_triton
from sparse_kernels.selection import naive

MAX_CHANNELS = 65536


def compact(x: Tensor, threshold: Tensor, magnitude: bool = True) -> tuple[Tensor, Tensor]:
    """List the channels in which any row of x is above its threshold.

    x: [B, K], 1 <= B <= 64, K <= 65536, contiguous rows. threshold: float32 [1] or [K].
    magnitude: compare |x| (True) or x (False). The comparison is strict and in float32, so NaN is never active.
    Returns (index int32 [K], count int32 [1]): index[:count] are the channels in ascending order, the rest of index is
    unspecified. Both stay on the device; the host does not wait. Raises ValueError outside this domain.
    """
    require_input(x)
    require(x.shape[1] <= MAX_CHANNELS, "x must have at most {} channels, got {}.", MAX_CHANNELS, x.shape[1])
    require_threshold(threshold, x, x.shape[1])
    return torch.ops.sparse_kernels.compact(x, threshold, magnitude)


@torch.library.custom_op(
    "sparse_kernels::compact",
    mutates_args=(),
    schema="(Tensor x, Tensor threshold, bool magnitude) -> (Tensor, Tensor)",
)
def _compact(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    if not use_triton(x):
        return naive.compact(x, threshold, magnitude)
    from sparse_kernels.selection import kernel

    return kernel.compact(x, threshold, magnitude)


@_compact.register_fake
def _(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


@register_flop_formula(torch.ops.sparse_kernels.compact)
def _flops(*args, **kwargs) -> int:
    return 0
