"""Groups neurons that are active together (MoEfication, arXiv 2110.01786): the co-activation graph, cut into parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .clustering import assign, balanced_kmeans


def coactivation(hidden: Tensor) -> Tensor:
    """The sum over tokens of h_n h_m where both are positive: float32 [neurons, neurons]; hidden: [tokens, neurons]."""
    positive = hidden.float().clamp(min=0)
    return positive.t() @ positive


def graph(weights: Tensor) -> Tensor:
    """Edge weights, whole numbers in float32, symmetric, zero on the diagonal; weights: [n, n], not negative.

    The unit is just under the smallest of the 10th, 20th, ... 100th percentiles that is not zero; weights below it are
    no edges. The released code writes this graph for METIS.
    """
    flat = weights.flatten().sort().values
    percentiles = flat[[round(q / 10 * (len(flat) - 1)) for q in range(1, 11)]]
    unit = percentiles[percentiles > 0]
    if not len(unit):
        return torch.zeros_like(weights)
    edges = (weights / (0.99 * unit[0])).floor()
    return edges.fill_diagonal_(0)


def partition(edges: Tensor, size: int, seed: int = 0, rounds: int = 10) -> Tensor:
    """Labels int64 [n] of parts with exactly `size` members that cut little weight.

    Spectral: balanced k-means on the leading eigenvectors of the normalised graph; then every neuron is assigned anew
    to the parts it is best connected with, as long as less weight is cut.
    """
    n = edges.shape[0]
    if n % size:
        raise ValueError(f"{n} neurons cannot be split into groups of {size}")
    scale = edges.sum(1).clamp(min=1e-12).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * edges * scale)
    labels = balanced_kmeans(vectors[:, -(n // size) :], size, seed)
    inside = kept(edges, labels)
    for _ in range(rounds):
        parts = torch.nn.functional.one_hot(labels, n // size).to(edges)
        moved = assign(-(edges @ parts) * scale[:, None].square(), size)
        weight = kept(edges, moved)
        if weight <= inside:
            break
        labels, inside = moved, weight
    return labels


def kept(edges: Tensor, labels: Tensor) -> float:
    """The weight of the edges inside parts; the rest is cut."""
    return float(edges[labels[:, None] == labels].double().sum()) / 2
