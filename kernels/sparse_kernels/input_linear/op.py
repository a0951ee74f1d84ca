"""Registered operator `input_linear`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.input_linear import naive
from sparse_kernels.launch import (
    require,
    require_input,
    require_list,
    require_rows,
    require_threshold,
    use_triton,
)


def input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """Multiply x by the weights of the listed input channels only.

    x: [B, K], 1 <= B <= 64, contiguous rows, float32, float16 or bfloat16. weight_t: [K, N], the weight of a linear
    layer transposed; each row contiguous, any distance between rows. index: int32 [K // group] and count: int32 [1]:
    the groups of `group` consecutive channels to read, as `compact` lists them. threshold: float32 [1] or [K]; a row's
    values with |x| <= threshold count as zero (needed where the list is a union over rows). bias: [N].
    Returns y [B, N] in x's dtype, y_b = sum over listed k of s(x_bk) * weight_t[k] (+ bias), accumulated in float32 in
    a fixed order. Weights of other channels are never read and the host does not wait for the list.
    Raises ValueError outside this domain.

    The index list follows TEAL (Liu et al., 2024, arXiv:2408.14690), which masks the same loads instead.
    """
    require_input(x)
    require(weight_t.dim() == 2, "weight_t must have shape [channels, outputs], got {}.", weight_t.shape)
    channels, width = x.shape[1], weight_t.shape[1]
    require(group >= 1 and channels % group == 0, "group must divide the {} channels, got {}.", channels, group)
    require_rows("weight_t", weight_t, x, (channels, width))
    require_list(index, count, x, channels // group)
    if threshold is not None:
        require_threshold(threshold, x, channels)
    if bias is not None:
        require_rows("bias", bias, x, (width,))
    return torch.ops.sparse_kernels.input_linear(x, weight_t, index, count, threshold, bias, group)


@torch.library.custom_op(
    "sparse_kernels::input_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight_t, Tensor index, Tensor count, Tensor? threshold, Tensor? bias, int group)"
    " -> Tensor",
)
def _input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    if not use_triton(x):
        return naive.input_linear(x, weight_t, index, count, threshold, bias, group)
    from sparse_kernels.input_linear import kernel

    return kernel.input_linear(x, weight_t, index, count, threshold, bias, group)


@_input_linear.register_fake
def _(x, weight_t, index, count, threshold, bias, group):
    return x.new_empty(x.shape[0], weight_t.shape[1])


@register_flop_formula(torch.ops.sparse_kernels.input_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Those of the dense linear: what is skipped is not known from shapes."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
