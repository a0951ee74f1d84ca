"""Registered operators that select: `compact`, masks and lists, `top_k` and `statistical_top_k`.

A list is (index, count), both int32 on the device: index[:count] are the chosen channels in ascending order, the rest
of index is unspecified, and the host does not wait for either. Thresholds are constants of a step: they may be read
before the kernel just before has finished, so that kernel must not write them.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.launch import (
    MAX_BATCH,
    MAX_CHANNELS,
    require,
    require_input,
    require_threshold,
    use_triton,
)
from sparse_kernels.selection import naive


def implementation(x: Tensor, kernels: str = "kernel") -> ModuleType:
    """The module that computes on x's device: that of the Triton kernels or the definitions."""
    return import_module(f"sparse_kernels.selection.{kernels}") if use_triton(x) else naive


def require_scores(name: str, score: Tensor) -> None:
    """Check that score is [B, K], 1 <= B <= 64, K <= 65536, with contiguous rows of floats."""
    require_input(score)
    channels = score.shape[1]
    require(channels <= MAX_CHANNELS, "{} must have at most {} channels, got {}.", name, MAX_CHANNELS, channels)


def require_mask(mask: Tensor, dims: tuple[int, ...]) -> None:
    """Check that mask is a contiguous bool or int8 [K] or [B, K], 1 <= B <= 64, K <= 65536."""
    known = mask.dtype in (torch.bool, torch.int8)
    require(known and mask.is_contiguous(), "mask must be a contiguous bool or int8 tensor, got {}.", mask.dtype)
    fits = (
        mask.dim() in dims and 1 <= mask.shape[-1] <= MAX_CHANNELS and 1 <= mask.numel() // mask.shape[-1] <= MAX_BATCH
    )
    require(fits, "mask must have 1 to {} rows of 1 to {} channels, got {}.", MAX_BATCH, MAX_CHANNELS, mask.shape)


def require_lists(index: Tensor, count: Tensor, size: int, dims: tuple[int, ...]) -> None:
    """Check that index, count are contiguous int32 lists, [L] and [1] or [B, L] and [B], of channels below size."""
    require(1 <= size <= MAX_CHANNELS, "size must be 1 to {}, got {}.", MAX_CHANNELS, size)
    for name, tensor in (("index", index), ("count", count)):
        fits = tensor.dtype == torch.int32 and tensor.is_contiguous()
        require(fits, "{} must be a contiguous int32 tensor, got {}.", name, tensor.dtype)
    require(index.device == count.device, "count must be on {}, got {}.", index.device, count.device)
    rows = index.shape[0] if index.dim() == 2 else 1
    fits = index.dim() in dims and index.shape[-1] >= 1 and count.shape == (rows,) and 1 <= rows <= MAX_BATCH
    require(fits, "index and count must be 1 to {} lists, got {} and {}.", MAX_BATCH, index.shape, count.shape)


def fake_list(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The fake of one list on x's device."""
    return x.new_empty(slots, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


def compact(x: Tensor, threshold: Tensor, magnitude: bool = True) -> tuple[Tensor, Tensor]:
    """List the channels in which any row of x is above its threshold.

    x: [B, K], 1 <= B <= 64, K <= 65536, contiguous rows. threshold: float32 [1] or [K], a constant.
    magnitude: compare |x| (True) or x (False). The comparison is strict and in float32, so NaN is never active.
    Returns a list (index int32 [K], count int32 [1]). Raises ValueError outside this domain.
    """
    require_scores("x", x)
    require_threshold(threshold, x, x.shape[1])
    return torch.ops.sparse_kernels.compact(x, threshold, magnitude)


def to_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the entries of each row of a mask that are not zero.

    mask: bool or int8 [K] or [B, K], contiguous, 1 <= B <= 64, K <= 65536.
    Returns (index int32 of mask's shape, count int32 [1] or [B]). Raises ValueError outside this domain.
    """
    require_mask(mask, (1, 2))
    return torch.ops.sparse_kernels.to_index(mask)


def to_mask(index: Tensor, count: Tensor, size: int) -> Tensor:
    """The masks of lists: True at the channels listed.

    index: int32 [L] or [B, L] and count: int32 [1] or [B], contiguous, in any order, each channel below `size`.
    Returns bool [size] or [B, size]. Raises ValueError outside this domain.
    """
    require_lists(index, count, size, (1, 2))
    return torch.ops.sparse_kernels.to_mask(index, count, size)


def union(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the channels that are not zero in any row of a mask: bool or int8 [B, K], as in `to_index`.

    Returns a list (index int32 [K], count int32 [1]). Raises ValueError outside this domain.
    """
    require_mask(mask, (2,))
    return torch.ops.sparse_kernels.union(mask)


def union_lists(index: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Join a list per row, index int32 [B, L] and count int32 [B] as in `to_mask`, into one.

    Returns a list (index int32 [size], count int32 [1]). Raises ValueError outside this domain.
    """
    require_lists(index, count, size, (2,))
    return torch.ops.sparse_kernels.union_lists(index, count, size)


def top_k(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """List the k largest scores of each row: exactly k, of equal scores those at lower positions.

    score: [B, K], 1 <= B <= 64, K <= 65536, contiguous rows of float32, float16 or bfloat16; NaN counts as -inf.
    k: 0 to K. Returns a list per row (index int32 [B, k], count int32 [B]). Raises ValueError outside this domain.
    """
    require_scores("score", score)
    require(0 <= k <= score.shape[1], "k must be 0 to {}, got {}.", score.shape[1], k)
    return torch.ops.sparse_kernels.top_k(score, k)


def top_mask(score: Tensor, k: int) -> Tensor:
    """Mark the k largest scores of each row, as `top_k` chooses them: bool [B, K].

    score, k: as in `top_k`. Raises ValueError outside this domain.
    """
    require_scores("score", score)
    require(0 <= k <= score.shape[1], "k must be 0 to {}, got {}.", score.shape[1], k)
    return torch.ops.sparse_kernels.top_mask(score, k)


def gaussian_multiplier(fraction: float) -> float:
    """How many standard deviations above the mean the largest `fraction` of normally distributed scores begins.

    fraction: 0 to 1; 1 gives -inf, which selects everything, and 0 inf, which selects nothing. Raises ValueError
    outside. Source: Spark Transformer (arXiv 2506.06644), Q(1 - k/d).
    """
    require(0 <= fraction <= 1, "fraction must be between 0 and 1, got {}.", fraction)
    return float(torch.special.ndtri(torch.tensor(1 - fraction, dtype=torch.float64, device="cpu")))


def statistical_top_k(
    score: Tensor, multiplier: float, soft: bool = True, activation: str = "identity", magnitude: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select what is above a row's mean + multiplier * standard deviation, about the k largest without sorting.

    score: [B, K], 1 <= B <= 64, K <= 65536, contiguous rows. multiplier: `gaussian_multiplier(k / K)`, or calibrated
    where scores are not normally distributed; -inf selects everything and subtracts nothing, inf selects nothing.
    The deviation divides by K; both statistics are float32. activation: act, "identity" or one of ACTIVATIONS. soft:
    value = act(score - threshold) where score > threshold, else value = act(score) where score >= threshold; 0
    elsewhere. magnitude (not soft): what is compared, and whose statistics count, is |act(score)| instead of score,
    and what it leaves at zero is not selected, however low the threshold: it adds nothing.
    The largest score of a row limits a finite threshold that is not soft, so that the largest is always selected, and
    all of equal scores are; soft leaves 0 of those, up to rounding.
    Returns (value [B, K] in score's dtype, threshold float32 [B], index int32 [K], count int32 [1]): the list is of
    the channels that any row selects. Raises ValueError outside this domain.

    Source: Spark Transformer (arXiv 2506.06644), statistical top-k; the hard form is that of its attention.
    """
    require_scores("score", score)
    require(multiplier == multiplier, "multiplier must be a number, got {}.", multiplier)
    known = ("identity", *ACTIVATIONS)
    require(activation in known, "activation must be one of {}, got {}.", known, activation)
    require(not (soft and magnitude), "The soft form is not one of magnitudes: pass soft=False.")
    return torch.ops.sparse_kernels.statistical_top_k(score, float(multiplier), soft, activation, magnitude)


def operator(name: str):
    """Register the function under sparse_kernels:: with its schema from its type hints."""
    return torch.library.custom_op(f"sparse_kernels::{name}", mutates_args=())


@operator("compact")
def _compact(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    return implementation(x).compact(x, threshold, magnitude)


@_compact.register_fake
def _(x, threshold, magnitude):
    return fake_list(x, x.shape[1])


@operator("to_index")
def _to_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    return implementation(mask).to_index(mask)


@_to_index.register_fake
def _(mask):
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask[..., 0].numel(), dtype=torch.int32)


@operator("to_mask")
def _to_mask(index: Tensor, count: Tensor, size: int) -> Tensor:
    return implementation(index).to_mask(index, count, size)


@_to_mask.register_fake
def _(index, count, size):
    return index.new_empty(*index.shape[:-1], size, dtype=torch.bool)


@operator("union")
def _union(mask: Tensor) -> tuple[Tensor, Tensor]:
    return implementation(mask).union(mask)


@_union.register_fake
def _(mask):
    return fake_list(mask, mask.shape[1])


@operator("union_lists")
def _union_lists(index: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return implementation(index).union_lists(index, count, size)


@_union_lists.register_fake
def _(index, count, size):
    return fake_list(index, size)


@operator("top_k")
def _top_k(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return implementation(score, "top").top_k(score, k)


@_top_k.register_fake
def _(score, k):
    batch = score.shape[0]
    return score.new_empty(batch, k, dtype=torch.int32), score.new_empty(batch, dtype=torch.int32)


@operator("top_mask")
def _top_mask(score: Tensor, k: int) -> Tensor:
    return implementation(score, "top").top_mask(score, k)


@_top_mask.register_fake
def _(score, k):
    return score.new_empty(score.shape, dtype=torch.bool)


@operator("statistical_top_k")
def _statistical_top_k(
    score: Tensor, multiplier: float, soft: bool, activation: str, magnitude: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation(score).statistical_top_k(score, multiplier, soft, activation, magnitude)


@_statistical_top_k.register_fake
def _(score, multiplier, soft, activation, magnitude):
    threshold = score.new_empty(score.shape[0], dtype=torch.float32)
    return score.new_empty(score.shape), threshold, *fake_list(score, score.shape[1])


@register_flop_formula(
    [
        torch.ops.sparse_kernels.compact,
        torch.ops.sparse_kernels.to_index,
        torch.ops.sparse_kernels.to_mask,
        torch.ops.sparse_kernels.union,
        torch.ops.sparse_kernels.union_lists,
        torch.ops.sparse_kernels.top_k,
        torch.ops.sparse_kernels.top_mask,
        torch.ops.sparse_kernels.statistical_top_k,
    ]
)
def _none(*args, **kwargs) -> int:
    """Comparisons are not counted."""
    return 0
