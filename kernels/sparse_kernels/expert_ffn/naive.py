"""Definitions of `expert_hidden` and `expert_ffn`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.input_linear.naive import input_linear
from sparse_kernels.selection.naive import compact

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda v: F.relu(v).square(),
}


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
    """The hidden layer of an FFN over x [B, d]: h [B, F], computed in the listed blocks, zero in a row's others."""
    block = up.shape[0] // score.shape[1]
    blocks = index[: int(count)].long()
    rows = (blocks[:, None] * block + torch.arange(block, device=x.device)).flatten()
    value = F.linear(x, up[rows], None if up_bias is None else up_bias[rows])
    if gate is None:
        value = ACTIVATIONS[activation](value)
    else:
        gated = F.linear(x, gate[rows], None if gate_bias is None else gate_bias[rows])
        value = ACTIVATIONS[activation](gated) * value
    active = (score > threshold)[:, blocks].repeat_interleave(block, 1)
    return x.new_zeros(x.shape[0], up.shape[0]).index_copy(1, rows, torch.where(active, value, 0))


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
    """An FFN over x [B, d] in which a row's blocks of neurons with score <= threshold are zero: y [B, d_out]."""
    index, count = compact(score, threshold, magnitude=False)
    h = expert_hidden(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    return input_linear(h, down_t, index, count, None, down_bias, up.shape[0] // score.shape[1])
