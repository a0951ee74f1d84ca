"""Which neurons make an expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_kernels.layers import ExpertFFN

from ..base import Method, Progress, silent, sparsify
from .calibration import ffn_inputs
from .clustering import balanced_kmeans, expert_permutation, random_split
from .coactivation import coactivation, graph, partition
from .experts import reordered

if TYPE_CHECKING:
    from ..base import SparseModel

SPLITS = ("kmeans", "coactivation", "random")
CHUNK = 8192  # tokens whose hidden layers are in memory at once


def keys(layer: ExpertFFN) -> Tensor:
    """The rows that neurons are grouped by, float32 [neurons, d]: the gate's, because it decides what is active."""
    return (layer.up if layer.gate is None else layer.gate).weight.detach().float()


def split(
    method: Method,
    model: PreTrainedModel,
    deltas: dict[str, Tensor],
    kind: str,
    size: int,
    windows: Tensor,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """`permutation.<block>` int32 [neurons], in which experts of `size` are contiguous, and `deltas` in that order.

    deltas: weight differences in the model's own order of neurons, and projections in theirs, or nothing; kind: one of
    SPLITS; windows: text, for co-activation alone.
    """
    with sparsify(model, method.artifact(model, None, deltas, {})) as handle:
        order = {}
        for layer, labels in _labels(handle, kind, size, windows, seed, method.name, progress):
            order[f"permutation.{layer.name}"] = expert_permutation(labels).int().cpu()
            progress(f"{method.name} grouping neurons", len(order), len(handle.layers()))
    found = reordered(deltas, model, order)
    ours = {name: permutation for name, permutation in order.items() if f"projection{name[11:]}.up.weight" not in found}
    return ours | found


def _labels(
    handle: SparseModel, kind: str, size: int, windows: Tensor, seed: int, label: str, progress: Progress
) -> Iterator[tuple[ExpertFFN, Tensor]]:
    if kind == "coactivation":
        for layer, x in ffn_inputs(handle, windows, label, progress):
            yield layer, partition(graph(_coactivation(layer, x)), size, seed)
    else:
        for layer in handle.layers():
            neurons, kmeans = layer.up.out_features, kind == "kmeans"
            drawn = seed * 1009 + layer.layer
            yield layer, balanced_kmeans(keys(layer), size, seed) if kmeans else random_split(neurons, size, drawn)


@torch.no_grad()
def _coactivation(layer: ExpertFFN, x: Tensor) -> Tensor:
    # |h| is h for a plain ReLU FFN, and for others says as well how much a neuron does.
    total = torch.zeros(layer.up.out_features, layer.up.out_features, device=x.device)
    for part in x.split(CHUNK):
        total += coactivation(layer.hidden(part).flatten(-2).abs())
    return total
