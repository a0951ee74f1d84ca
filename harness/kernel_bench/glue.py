"""What lies between the linears of a decode step, alone and with the list of what passes a threshold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import ACTIVATIONS, glu, residual_norm
from sparse_kernels.glue import cost, naive

from .case import Case, Copy, Draw, Shape, agreeing, double, gap

EPS = 1e-5


def cases(shape: Shape) -> Iterator[Case]:
    for density in (1.0, 0.5):
        title = shape.name + (" with list" if density < 1 else "")
        yield Case("residual_norm", title, 1, density, partial(_norm, shape, density), "torch")
        yield Case("glu", title, 1, density, partial(_glu, shape, density), "torch")


def _norm(shape: Shape, density: float, draw: Draw) -> Copy:
    x, residual = draw.normal(1, shape.hidden), draw.normal(1, shape.hidden)
    weight, bias = 1 + draw.normal(shape.hidden, std=0.1), draw.normal(shape.hidden) if shape.biased else None
    kind = "layer" if shape.biased else "rms"
    h, y = naive.residual_norm(x.double(), residual.double(), weight.double(), double(bias), EPS, kind)
    threshold = None if density == 1 else gap(y[0].abs(), density)

    def dense() -> Tensor:
        total = residual + x
        if shape.biased:
            return F.layer_norm(total, weight.shape, weight, bias, EPS)
        return F.rms_norm(total, weight.shape, weight, EPS)

    def result(h: Tensor, *normed: Tensor) -> Tensor:
        return torch.cat([h[0], _checked(threshold, *normed)])

    return Copy(
        run=lambda: residual_norm(x, residual, weight, bias, EPS, kind, threshold),
        reference=lambda: torch.cat([h[0], y[0]]),
        bytes=cost.norm_bytes(1, shape.hidden, x.element_size()),
        density=density,
        baseline=dense,
        result=result,
    )


def _glu(shape: Shape, density: float, draw: Draw) -> Copy:
    both = draw.normal(1, (1 if shape.biased else 2) * shape.neurons)
    gate, up = (both, None) if shape.biased else both.chunk(2, 1)
    act = ACTIVATIONS[shape.activation]
    h = naive.glu(gate.double(), double(up), shape.activation)
    threshold = None if density == 1 else gap(h[0].abs(), density)
    return Copy(
        run=lambda: glu(gate, up, shape.activation, threshold),
        reference=lambda: h[0],
        bytes=cost.glu_bytes(1, shape.neurons, not shape.biased, both.element_size()),
        density=density,
        baseline=lambda: act(gate) if up is None else act(gate) * up,
        result=partial(_checked, threshold),
    )


def _checked(threshold: Tensor | None, y: Tensor, *listed: Tensor) -> Tensor:
    """y [1, N] as a vector, NaN where the list (index, count) is not that of y's own values."""
    return y[0] if threshold is None else agreeing(y[0], y[0].float().abs() > threshold, *listed)
