"""Registered operators `expert_hidden` and `expert_ffn_prefill`; `expert_ffn` is composed of registered operators."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.expert_ffn import naive
from sparse_kernels.expert_ffn.launch import crossover
from sparse_kernels.glue.op import glu
from sparse_kernels.input_linear.op import input_linear
from sparse_kernels.launch import (
    DTYPES,
    crowded,
    require,
    require_input,
    require_list,
    require_rows,
    require_threshold,
    use_triton,
)
from sparse_kernels.neuron_ffn.cost import ffn_flops
from sparse_kernels.neuron_ffn.op import neuron_ffn, require_down, require_hidden
from sparse_kernels.selection.op import compact


def require_score(score: Tensor, threshold: Tensor, x: Tensor, neurons: int) -> None:
    """Check float32 scores [rows of x, blocks] whose blocks divide the neurons, and their threshold [1]."""
    require(score.dim() == 2, "score must have shape [rows, blocks], got {}.", score.shape)
    blocks = score.shape[1]
    divides = blocks >= 1 and neurons % blocks == 0
    require(divides, "The {} blocks of score must divide the {} neurons evenly.", blocks, neurons)
    require_threshold(threshold, x, 1)
    require_rows("score", score, threshold, (x.shape[0], blocks))


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
    require_hidden(x, gate, up, gate_bias, up_bias, activation)
    require_score(score, threshold, x, up.shape[0])
    require_list(index, count, x, score.shape[1])
    return torch.ops.sparse_kernels.expert_hidden(
        x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation
    )


def chosen_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    score: Tensor,
    limit: Tensor | None,
    activation: str,
    other: Tensor | None = None,
) -> Tensor:
    """What `expert_hidden` returns, by dense products of all blocks; score, limit, other: as in `glu`."""
    first, second = F.linear(x, up, up_bias), None
    if gate is not None:
        first, second = F.linear(x, gate, gate_bias), first
    h = glu(first, second, activation, score=score, limit=limit, other=other)
    assert isinstance(h, Tensor)  # no list was asked for
    return h


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
    density: float | None = None,
) -> Tensor:
    """Run an FFN on the blocks of neurons whose score is above the threshold.

    down_t: [F, d_out], the down projection transposed, contiguous rows; down_bias: [d_out] or None; the rest as in
    `expert_hidden`. Rows of a batch share one list, the union of theirs; each row still skips its own blocks. One row
    is a `neuron_ffn` on groups of neurons. density: the share of the blocks that a row is expected to keep, if known:
    where rows are expected to need most of them between them, dense products of all blocks take the place of the list.
    Returns y [B, d_out] in x's dtype. Raises ValueError outside the domain of `expert_hidden` and `input_linear`.

    Blocks of 32 neurons with a router follow LTE (Zheng et al., 2024, arXiv:2402.06126).
    """
    require_score(score, threshold, x, up.shape[0])
    require_input(x)
    if crowded(density, x.shape[0], crossover(x.shape[0])):
        require_hidden(x, gate, up, gate_bias, up_bias, activation)
        require_down(x, up.shape[0], down_t, down_bias)
        h = chosen_hidden(x, gate, up, gate_bias, up_bias, score.contiguous(), threshold, activation)
        return F.linear(h, down_t.t(), down_bias)
    index, count = compact(score, threshold, magnitude=False)
    block = up.shape[0] // score.shape[1]
    if x.shape[0] == 1:
        return neuron_ffn(x, gate, up, down_t, index, count, activation, gate_bias, up_bias, down_bias, block)
    h = expert_hidden(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    return input_linear(h, down_t, index, count, None, down_bias, block)


def expert_ffn_prefill(
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
    """`expert_ffn` for many tokens: x [T, d], score [T, N], any T >= 1. Returns y [T, d_out].

    The hidden layer multiplies a block's weights with only the tokens that need it. The down projection skips the
    blocks that none of some 128 neighbouring tokens needs, so it saves what neighbours have in common. The hidden layer
    [T, F] is stored. Raises ValueError outside the domain of `expert_ffn`, of which only the number of rows differs.
    """
    require(x.dim() == 2 and min(x.shape) >= 1, "x must have shape [tokens, channels], got {}.", x.shape)
    known = x.dtype in DTYPES or (x.dtype == torch.float64 and not x.is_cuda)
    require(known, "x must be float32, float16 or bfloat16, got {}.", x.dtype)
    require_rows("x", x, x, tuple(x.shape))
    require_hidden(x, gate, up, gate_bias, up_bias, activation)
    require_down(x, up.shape[0], down_t, down_bias)
    require_score(score, threshold, x, up.shape[0])
    return torch.ops.sparse_kernels.expert_ffn_prefill(
        x, gate, up, down_t, gate_bias, up_bias, down_bias, score, threshold, activation
    )


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
    if not use_triton(x):
        return naive.expert_hidden(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    from sparse_kernels.neuron_ffn import kernel

    block = up.shape[0] // score.shape[1]
    return kernel.neuron_hidden(
        x, gate, up, gate_bias, up_bias, index, count, activation, block, score=score, threshold=threshold
    )


@_expert_hidden.register_fake
def _(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation):
    return x.new_empty(x.shape[0], up.shape[0])


@register_flop_formula(torch.ops.sparse_kernels.expert_hidden)
def _hidden_flops(x_shape, gate_shape, up_shape, *args, **kwargs) -> int:
    """Those of the dense projections: what is skipped is not known from shapes."""
    return int(ffn_flops(x_shape[0], x_shape[1], 0, up_shape[0], gate_shape is not None))


@torch.library.custom_op(
    "sparse_kernels::expert_ffn_prefill",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias,"
    " Tensor score, Tensor threshold, str activation) -> Tensor",
)
def _expert_ffn_prefill(
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
    arguments = (x, gate, up, down_t, gate_bias, up_bias, down_bias, score, threshold, activation)
    if not use_triton(x):
        return naive.expert_ffn(*arguments)
    from sparse_kernels.expert_ffn import kernel

    return kernel.expert_ffn_prefill(*arguments)


@_expert_ffn_prefill.register_fake
def _(x, gate, up, down_t, gate_bias, up_bias, down_bias, score, threshold, activation):
    return x.new_empty(x.shape[0], down_t.shape[1])


@register_flop_formula(torch.ops.sparse_kernels.expert_ffn_prefill)
def _prefill_flops(x_shape, gate_shape, up_shape, down_shape, *args, **kwargs) -> int:
    """Those of the dense FFN: what is skipped is not known from shapes."""
    return int(ffn_flops(x_shape[0], x_shape[1], down_shape[1], up_shape[0], gate_shape is not None))
