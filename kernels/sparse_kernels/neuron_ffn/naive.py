"""Definitions of `neuron_hidden`, `neuron_ffn`, `gate_first_ffn` and `gated_ffn`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.activations import ACTIVATIONS


def neurons(index: Tensor | None, count: Tensor | None, total: int, group: int, device: torch.device) -> Tensor:
    """The neurons of the listed groups, in the order of the list; all of them without a list."""
    if index is None or count is None:
        return torch.arange(total, device=device)
    groups = index[: int(count)].long()
    return (groups[:, None] * group + torch.arange(group, device=device)).flatten()


def hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    rows: Tensor,
    center: Tensor | None = None,
) -> Tensor:
    """What the neurons `rows` make of x [B, d], less their center [F]: [B, len(rows)]."""
    value = F.linear(x, up[rows], None if up_bias is None else up_bias[rows])
    if gate is None:
        value = ACTIVATIONS[activation](value)
    else:
        value = ACTIVATIONS[activation](F.linear(x, gate[rows], None if gate_bias is None else gate_bias[rows])) * value
    return value if center is None else value - center[rows]


def neuron_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    group: int = 1,
) -> Tensor:
    """The hidden layer of an FFN over x [B, d]: h [B, F], computed for the listed neurons, zero elsewhere."""
    rows = neurons(index, count, up.shape[0], group, x.device)
    value = hidden(x, gate, up, gate_bias, up_bias, activation, rows)
    return x.new_zeros(x.shape[0], up.shape[0]).index_copy(1, rows, value)


def neuron_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    group: int = 1,
    center: Tensor | None = None,
) -> Tensor:
    """An FFN over x [B, d] in which the neurons outside the list are zero: y [B, d_out]."""
    rows = neurons(index, count, up.shape[0], group, x.device)
    return F.linear(hidden(x, gate, up, gate_bias, up_bias, activation, rows, center), down_t[rows].t(), down_bias)


def neuron_ffn_partials(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    group: int,
    parts: int,
    center: Tensor | None = None,
) -> Tensor:
    """`neuron_ffn` over x [1, d] without its last sum: [parts, d_out], of an even share of the list each."""
    rows = neurons(index, count, up.shape[0], group, x.device)
    shares = [rows[len(rows) * p // parts : len(rows) * (p + 1) // parts] for p in range(parts)]
    return torch.cat([hidden(x, gate, up, gate_bias, up_bias, activation, r, center) @ down_t[r] for r in shares])


def gate_first_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """An FFN over x [B, d] without the neurons whose activation is at most threshold [1] in magnitude: y [B, d_out]."""
    first, first_bias = (up, up_bias) if gate is None else (gate, gate_bias)
    value = ACTIVATIONS[activation](F.linear(x, first, first_bias))
    value = torch.where(value.abs() > threshold, value, 0)
    rows = value.any(0).nonzero().flatten()
    value = value[:, rows]
    if gate is not None:
        value = value * F.linear(x, up[rows], None if up_bias is None else up_bias[rows])
    return F.linear(value, down_t[rows].t(), down_bias)


def gated_ffn(
    x: Tensor,
    value: Tensor,
    up: Tensor,
    down_t: Tensor,
    index: Tensor,
    count: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """A gated FFN over x [B, d] whose gate's activations are value [B, F], zero outside the list: y [B, d_out]."""
    rows = neurons(index, count, up.shape[0], 1, x.device)
    h = value[:, rows] * F.linear(x, up[rows], None if up_bias is None else up_bias[rows])
    return F.linear(h.to(x.dtype), down_t[rows].t(), down_bias)
