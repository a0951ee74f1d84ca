"""Experts as contiguous blocks of neurons, and fine-tuned weights stored as small differences to the dense ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Selector

from ..base import Attachment
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


def reordered(deltas: dict[str, Tensor], model: PreTrainedModel, permutations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differences and projections that were taken in their own order of neurons, in the order of `permutations`."""
    found = dict(deltas)
    for name, (permutation, axis) in neuron_order(model, permutations).items():
        if f"delta.{name}" in found:
            found[f"delta.{name}"] = permuted(found[f"delta.{name}"], (permutation, axis))
            if axis == 0 and found[f"delta.{name}"].dim() > 1:
                found[f"scale.{name}"] = permuted(found[f"scale.{name}"], (permutation, 0))
    for key, order in permutations.items():
        for part, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            name = f"projection.{key.removeprefix('permutation.')}.{part}"
            if name in found:
                found[name] = permuted(found[name], (order.long(), axis))
    return found


def attach_weights(attachment: Attachment) -> None:
    """Puts the artifact's fine-tuned weights in place, and neurons in the order of its permutations."""
    tensors = attachment.artifact.tensors
    order = neuron_order(attachment.model, tensors)
    for name, parameter in list(attachment.model.named_parameters(remove_duplicate=False)):
        if name in order or f"delta.{name}" in tensors:
            value = permuted(parameter.detach(), order.get(name))
            if f"delta.{name}" in tensors:
                value = value.float() + dequantise(tensors, name).to(value.device)
            attachment.set_parameter(name, value)


def attach_experts(
    attachment: Attachment, activation: str, size: int, selector: Callable[[int, ExpertFFN], Selector | None]
) -> None:
    """Weights as `attach_weights`, then every FFN as experts of `size` neurons.

    selector: called with the block's index and its layer; None leaves the layer dense. Tensors `mean.<block>`, where
    the artifact has them, stand in for what neurons outside the selection would have computed.
    """
    attach_weights(attachment)
    for block in blocks(attachment.model):
        gate, up, down = block.linears.get("gate"), block.linears["up"], block.linears["down"]
        mean = attachment.artifact.tensors.get(f"mean.{block.index}")
        shared = block.index, attachment.phase, attachment.meter
        layer = ExpertFFN(gate, up, down, activation, size, None, *shared, mean)
        layer.set_selector(selector(block.index, layer))
        place_ffn(block, layer, attachment.replace)
