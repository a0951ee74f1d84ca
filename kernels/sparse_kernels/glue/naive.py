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


def glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(gate) * up [B, F], or act(gate)."""
    h = ACTIVATIONS[activation](gate)
    return h if up is None else h * up
