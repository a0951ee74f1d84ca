"""Selections: from a vector to the list of what is active in it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import (
    compact,
    gaussian_multiplier,
    linear_router,
    low_rank_predictor,
    statistical_top_k,
    top_k,
)
from sparse_kernels.selection import cost, naive

from .case import DENSITIES, EXPERT, TOLERANCE, Case, Copy, Draw, Shape, agreeing, gap, listed

RANK = 1024  # of the predictor: Deja Vu's, arXiv 2310.17157


def cases(shape: Shape) -> Iterator[Case]:
    values, experts = f"{shape.name} {shape.neurons} values", f"{shape.name} {shape.neurons // EXPERT} experts"
    for density in DENSITIES:
        yield Case("compact", values, 1, density, partial(_compact, shape.neurons, density))
    for density in DENSITIES[1:]:
        yield Case("top_k", values, 1, density, partial(_top_k, shape.neurons, density), "torch.topk")
        yield Case("statistical_top_k", values, 1, density, partial(_statistical_top_k, shape.neurons, density))
        yield Case("linear_router", experts, 1, density, partial(_router, shape, density), "cuBLAS scores")
        predictor = partial(_predictor, shape, density)
        yield Case("low_rank_predictor", f"{values}, rank {RANK}", 1, density, predictor, "cuBLAS scores")


def _compact(channels: int, density: float, draw: Draw) -> Copy:
    mask = draw.mask(1, channels, density)
    x, threshold = draw.values(mask), draw.one()

    def result(index: Tensor, count: Tensor) -> Tensor:
        return listed(index, count, channels)

    return Copy(
        run=lambda: compact(x, threshold),
        reference=lambda: mask[0].double(),
        bytes=cost.list_bytes(1, channels, x.element_size()),
        density=_share(mask),
        result=result,
    )


def _top_k(channels: int, density: float, draw: Draw) -> Copy:
    score, k = draw.normal(1, channels, dtype=torch.float32), round(density * channels)
    return Copy(
        run=lambda: top_k(score, k),
        result=lambda index, count: index[:, : int(count)],
        reference=lambda: naive.top_k(score.double(), k)[0],
        bytes=cost.list_bytes(1, channels, score.element_size()),
        density=k / channels,
        baseline=lambda: score.topk(k),
    )


def _statistical_top_k(channels: int, density: float, draw: Draw) -> Copy:
    score, multiplier = draw.normal(1, channels), gaussian_multiplier(density)
    value = naive.statistical_top_k(score.double(), multiplier, True)[0]

    def result(found: Tensor, _: Tensor, index: Tensor, count: Tensor) -> Tensor:
        return agreeing(found[0], found[0] > 0, index, count)

    return Copy(
        run=lambda: statistical_top_k(score, multiplier),
        reference=lambda: value[0],
        bytes=cost.list_bytes(1, channels, score.element_size()),
        density=_share(value > 0),
        result=result,
    )


def _router(shape: Shape, density: float, draw: Draw) -> Copy:
    x, weight = draw.normal(1, shape.hidden), draw.weight(shape.neurons // EXPERT, shape.hidden)
    score = F.linear(x.double(), weight.double())[0]
    threshold = gap(score, density)

    def result(found: Tensor, index: Tensor, count: Tensor) -> Tensor:
        return agreeing(found[0], found[0] > threshold, index, count)

    return Copy(
        run=lambda: linear_router(x, weight, None, threshold),
        reference=lambda: score,
        bytes=cost.score_bytes(1, shape.hidden, len(weight), x.element_size()),
        density=_share(score > threshold),
        baseline=lambda: F.linear(x, weight),
        result=result,
    )


def _predictor(shape: Shape, density: float, draw: Draw) -> Copy:
    x, a, b = draw.normal(1, shape.hidden), draw.weight(RANK, shape.hidden), draw.weight(shape.neurons, RANK)
    score = F.linear(F.linear(x.double(), a.double()), b.double())[0]
    threshold = gap(score, density)

    def result(found: Tensor, index: Tensor, count: Tensor) -> Tensor:
        return agreeing(found[0], found[0] > threshold, index, count)

    return Copy(
        run=lambda: low_rank_predictor(x, a, b, threshold),
        reference=lambda: score,
        bytes=cost.predictor_bytes(1, shape.hidden, RANK, shape.neurons, x.element_size()),
        density=_share(score > threshold),
        baseline=lambda: F.linear(F.linear(x, a), b),
        result=result,
        tolerance=TOLERANCE[draw.dtype],  # the hidden layer is in x's dtype, though the scores are float32
    )


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
