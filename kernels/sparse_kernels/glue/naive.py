"""Definitions of `residual_norm` and `glu`, rounding where transformers' modules round."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.selection.naive import wide


def norm(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """The norm of h [B, N]: "rms" (Llama), "gemma" (RMS with 1 + weight) or "layer"."""
    if kind == "layer":
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    v = wide(h)
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return weight * v.to(h.dtype) if kind == "rms" else (v * (1 + wide(weight))).to(h.dtype)


def residual_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """h = residual + x and y = norm(h), [B, N]."""
    h = (x.sum(0) if x.dim() == 3 else x).to(weight.dtype)
    h = h.clone() if residual is None else residual + h
    return h, norm(h, weight, bias, eps, kind)


def glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    score: Tensor | None = None,
    limit: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """act(gate) * up [B, F], or act(gate); `other`, or 0, in blocks of channels that a row did not choose."""
    h = ACTIVATIONS[activation](gate)
    h = h if up is None else h * up
    if score is None:
        return h
    keep = (score if limit is None else score > limit).repeat_interleave(h.shape[1] // score.shape[1], 1)
    return torch.where(keep, h, 0 if other is None else other)
