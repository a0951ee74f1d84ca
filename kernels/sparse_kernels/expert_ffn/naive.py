"""Definitions of `expert_hidden` and of `expert_ffn`, which is also that of `expert_ffn_prefill`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.neuron_ffn.naive import neuron_hidden, neurons
from sparse_kernels.selection.naive import compact


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
    h = neuron_hidden(x, gate, up, gate_bias, up_bias, index, count, activation, block)
    return torch.where((score > threshold).repeat_interleave(block, 1), h, 0)


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
    """An FFN over x [T, d] in which a row's blocks of neurons with score <= threshold are zero: y [T, d_out]."""
    index, count = compact(score, threshold, magnitude=False)
    h = expert_hidden(x, gate, up, gate_bias, up_bias, score, threshold, index, count, activation)
    rows = neurons(index, count, up.shape[0], up.shape[0] // score.shape[1], x.device)
    return F.linear(h[:, rows], down_t[rows].t(), down_bias)
