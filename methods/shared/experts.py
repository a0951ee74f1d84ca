"""Experts as contiguous blocks of neurons, and fine-tuned weights stored as small differences to the dense ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families import Block, blocks


def place_ffn(block: Block, layer: nn.Module, replace: Callable[[str, nn.Module], None]) -> None:
    """Puts one module where the block computes its FFN."""
    first, *rest = block.layout.ffn
    replace(f"{block.path}.{first}", layer)
    for name in rest:
        replace(f"{block.path}.{name}", nn.Identity())


def neuron_order(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """For every parameter that has a neuron axis: the permutation and that axis."""
    order: dict[str, tuple[Tensor, int]] = {}
    for block in blocks(model):
        if f"permutation.{block.index}" not in tensors:
            continue
        permutation = tensors[f"permutation.{block.index}"].long()
        for site in ("gate", "up", "down"):
            if site in block.linears:
                path = f"{block.path}.{block.layout.linears[site]}"
                order[f"{path}.weight"] = permutation, int(site == "down")
                if site != "down" and block.linears[site].bias is not None:
                    order[f"{path}.bias"] = permutation, 0
    return order


def permuted(value: Tensor, order: tuple[Tensor, int] | None) -> Tensor:
    return value if order is None else value.index_select(order[1], order[0].to(value.device))


def quantise(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A weight difference in 8 bits: int8 values and one float32 scale per row (per tensor for vectors)."""
    rows = delta.detach().float().reshape(delta.shape[0] if delta.dim() > 1 else 1, -1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round().to(torch.int8).reshape(delta.shape).cpu(), scale.flatten().cpu()


def dequantise(tensors: dict[str, Tensor], name: str) -> Tensor:
    delta, scale = tensors[f"delta.{name}"], tensors[f"scale.{name}"]
    return delta.float() * (scale.unsqueeze(1) if delta.dim() > 1 else scale)
