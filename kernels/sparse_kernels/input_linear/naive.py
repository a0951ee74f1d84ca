"""Definitions of `input_linear`, `threshold_linear`, `add_parts` and `row_stats`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.activations import ACTIVATIONS


def input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """x [B, K] times the rows of weight_t [K, N] that belong to the listed groups of channels: y [B, N]."""
    groups = index[: int(count)].long()
    rows = (groups[:, None] * group + torch.arange(group, device=x.device)).flatten()
    value = x[:, rows]
    if threshold is not None:
        limit = threshold if threshold.numel() == 1 else threshold[rows]
        value = torch.where(value.float().abs() > limit, value, 0)
    return F.linear(value, weight_t[rows].t(), bias)


def prepared(
    x: Tensor,
    dtype: torch.dtype,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    gated: bool,
    center: Tensor | None,
) -> Tensor:
    """What the linear layer multiplies: x (or the sum of its parts), activated and gated, or normed; then centred."""
    x = x.sum(0).to(dtype) if x.dim() == 3 else x
    if activation:
        gate, up = x.chunk(2, dim=-1) if gated else (x, None)
        x = ACTIVATIONS[activation](gate) if up is None else ACTIVATIONS[activation](gate) * up
    if norm == "layer":
        assert norm_weight is not None
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    elif norm:
        assert norm_weight is not None
        wide = x.double() if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = norm_weight * wide.to(x.dtype) if norm == "rms" else (wide * (1 + norm_weight.to(wide))).to(x.dtype)
    return x if center is None else x - center


def threshold_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor | None,
    widths: list[int],
    *,
    invert: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "",
    gated: bool = False,
    center: Tensor | None = None,
    side: Tensor | None = None,
    side_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, N] = s(v) W (+ side U) (+ bias) (+ residual) of v = prepared(x), s by output segment; and the counts.

    s keeps the channels with |v| above the segment's threshold (`invert`: the others). counts: int32 [segments, 1],
    the channels that any row keeps, whose weights are read.
    """
    v = prepared(x, weight_t.dtype, norm, norm_weight, norm_bias, eps, activation, gated, center)
    outputs, counts = [], []
    for segment, weight in enumerate(weight_t.split(widths, dim=1)):
        keep = torch.ones_like(v, dtype=torch.bool) if threshold is None else v.float().abs() > threshold[segment]
        keep = keep ^ invert
        counts.append(keep.any(0).sum())
        read = torch.where(keep.any(0)[:, None], weight, 0)
        outputs.append(torch.where(keep, v, 0) @ read)
    y = torch.cat(outputs, 1)
    if side is not None and side_up is not None:
        y = y + side @ side_up
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = residual + y
    return y, torch.stack(counts).int()[:, None]


def add_parts(parts: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual [B, N] plus the rounded sum of parts [P, B, N] and bias [N]."""
    total = parts.sum(0) if bias is None else parts.sum(0) + bias.to(parts.dtype)
    return residual + total.to(residual.dtype)


def row_stats(x: Tensor, tile: int) -> Tensor:
    """Sum and sum of squared deviations of each tile of `tile` columns of x [B, K]: float32 [B, tiles, 2]."""
    tiles = x.float().split(tile, dim=1)
    sums = [t.sum(1) for t in tiles]
    spread = [(t - t.mean(1, keepdim=True)).square().sum(1) for t in tiles]
    return torch.stack([torch.stack(sums, 1), torch.stack(spread, 1)], 2)
