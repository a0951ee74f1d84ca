"""Registered operator `expert_hidden`, and `expert_ffn` composed of the registered operators."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.expert_ffn import naive
from sparse_kernels.input_linear.op import input_linear
from sparse_kernels.launch import (
    require,
    require_input,
    require_list,
    require_rows,
    require_threshold,
    use_triton,
)
from sparse_kernels.selection.op import compact

ACTIVATIONS = tuple(naive.ACTIVATIONS)


def expert_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    score: Tensor,
    threshold: Tensor,
    index: Tensor,
    count: Tensor,
    activation: str,
) -> Tensor:
    """Compute the listed blocks of an FFN's hidden layer.

    x: [B, d], 1 <= B <= 64, contiguous rows, float32, float16 or bfloat16. gate, up: [F, d], contiguous rows, one row
    per neuron (gate None for an ungated FFN). gate_bias, up_bias: [F] or None. score: float32 [B, N]; block i is the
    F // N consecutive neurons from i * (F // N). threshold: float32 [1]. index: int32 [N] and count: int32 [1]: the
    blocks to compute, usually compact(score, threshold, magnitude=False). activation: one of ACTIVATIONS.
    Returns h [B, F] in x's dtype: act(gate x) * (up x), or act(up x) if ungated, where the row's score is above the
    threshold, zero in a listed block where it is not; blocks outside the list are not written (unspecified).
    Weights of other blocks are never read. Raises ValueError outside this domain.
    """
    require_input(x)
    require(activation in ACTIVATIONS, "activation must be one of {}, got {}.", ACTIVATIONS, activation)
    require(up.dim() == 2 and score.dim() == 2, "up must have shape [neurons, channels] and score [batch, blocks].")
    neurons, blocks = up.shape[0], score.shape[1]
    require(
        blocks >= 1 and neurons % blocks == 0,
        "The {} blocks of score must divide the {} neurons evenly.",
        blocks,
        neurons,
    )
    require_rows("up", up, x, (neurons, x.shape[1]))
    if gate is not None:
        require_rows("gate", gate, x, (neurons, x.shape[1]))
    require(gate is not None or gate_bias is None, "gate_bias needs a gate.")
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            require_rows(name, bias, x, (neurons,))
    require_threshold(threshold, x, 1)
    require_rows("score", score, threshold, (x.shape[0], blocks))
    require_list(index, count, x, blocks)
    return torch.ops.sparse_kernels.expert_hidden(
        x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation
    )


def expert_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    score: Tensor,
    threshold: Tensor,
    activation: str,
) -> Tensor:
    """Run an FFN on the blocks of neurons whose score is above the threshold.

    down_t: [F, d_out], the down projection transposed, contiguous rows; down_bias: [d_out] or None; the rest as in
    `expert_hidden`. Rows of a batch share one list, the union of theirs; each row still skips its own blocks.
    Returns y [B, d_out] in x's dtype. Raises ValueError outside the domain of `expert_hidden` and `input_linear`.

    Blocks of 32 neurons with a router follow LTE (Zheng et al., 2024, arXiv:2402.06126).
    """
    index, count = compact(score, threshold, magnitude=False)
    h = expert_hidden(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    return input_linear(h, down_t, index, count, None, down_bias, up.shape[0] // score.shape[1])


@torch.library.custom_op(
    "sparse_kernels::expert_hidden",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, Tensor score, Tensor threshold,"
    " Tensor index, Tensor count, str activation) -> Tensor",
)
def _expert_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    score: Tensor,
    threshold: Tensor,
    index: Tensor,
    count: Tensor,
    activation: str,
) -> Tensor:
    arguments = (x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    if not use_triton(x):
        return naive.expert_hidden(*arguments)
    from sparse_kernels.expert_ffn import kernel

    return kernel.expert_hidden(*arguments)


@_expert_hidden.register_fake
def _(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation):
    return x.new_empty(x.shape[0], up.shape[0])


@register_flop_formula(torch.ops.sparse_kernels.expert_hidden)
def _flops(x_shape, gate_shape, up_shape, *args, **kwargs) -> int:
    """Those of the dense projections: what is skipped is not known from shapes."""
    return 2 * x_shape[0] * up_shape[0] * up_shape[1] * (1 if gate_shape is None else 2)
