"""Groups FFN neurons into experts of equal size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT_LIMIT = 2048  # above this many neurons the cubic exact assignment gives way to a stable matching


def balanced_kmeans(features: Tensor, size: int, seed: int = 0, iterations: int = 20) -> Tensor:
    """K-means whose clusters all have exactly `size` members; labels int64 [n] in [0, n / size).

    features: [n, d], n divisible by size (ValueError otherwise). Rows are normalised, so that similarity is direction.
    Source: Malinen and Fränti, "Balanced K-Means for Clustering" (2014): the assignment step is a linear assignment
    problem with `size` slots per cluster.
    """
    n = features.shape[0]
    if n % size:
        raise ValueError(f"{n} neurons cannot be split into groups of {size}")
    rows = F.normalize(features.detach().float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(n, generator=generator)[: n // size].to(rows.device)]
    labels = torch.full((n,), -1, device=rows.device)
    for _ in range(iterations):
        previous, labels = labels, assign(torch.cdist(rows, centres) ** 2, size)
        if torch.equal(previous, labels):
            break
        centres = torch.zeros_like(centres).index_add_(0, labels, rows) / size
    return labels


def random_split(n: int, size: int, seed: int = 0) -> Tensor:
    """Labels int64 [n] of groups of `size`, drawn at random."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) // size


def assign(cost: Tensor, size: int) -> Tensor:
    """A column for every row, `size` rows per column, at little total cost; cost: [n, n / size]."""
    return _exact(cost, size) if cost.shape[0] <= EXACT_LIMIT else _stable(cost, size)


def _exact(cost: Tensor, size: int) -> Tensor:
    """The assignment of least total cost with `size` members per column; cost: [n, n / size]."""
    from scipy.optimize import linear_sum_assignment

    _, slots = linear_sum_assignment(cost.cpu().double().numpy().repeat(size, axis=1))
    return torch.from_numpy(slots // size).to(cost.device)


def _stable(cost: Tensor, size: int) -> Tensor:
    """Deferred acceptance: rows propose to their nearest column, a full column keeps its `size` nearest rows."""
    n, k = cost.shape
    cost = cost.clone()
    labels = torch.full((n,), -1, device=cost.device)
    rows = torch.arange(n, device=cost.device)
    while (labels < 0).any():
        labels = torch.where(labels < 0, cost.argmin(1), labels)
        own = cost[rows, labels]
        order = torch.argsort(own, stable=True)
        order = order[torch.argsort(labels[order], stable=True)]  # by column, nearest first
        start = torch.searchsorted(labels[order].contiguous(), torch.arange(k, device=cost.device))
        rank = rows - start[labels[order]]
        rejected = order[rank >= size]
        cost[rejected, labels[rejected]] = torch.inf  # a refused row never asks the same column again
        labels[rejected] = -1
    return labels


def expert_permutation(labels: Tensor) -> Tensor:
    """int64 [n]: the order of neurons in which every cluster is one contiguous block, in the order of its label."""
    return torch.argsort(labels, stable=True)
