"""The linears of one layer with what lies between them: residual, norm, threshold, gate; everything but attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import row_stats, threshold_linear
from sparse_kernels.input_linear import naive

from .case import DENSITIES, TOLERANCE, Case, Copy, Draw, Shape, gap

EPS = 1e-5

# (name, x, norm weight or None, whether x is gate and up, residual or None) -> y
Linear = Callable[[str, Tensor, Tensor | None, bool, Tensor | None], Tensor]


def cases(shape: Shape) -> Iterator[Case]:
    if not shape.biased:
        for density in DENSITIES:
            yield Case("chain", shape.name, 1, density, partial(_chain, shape, density), "cuBLAS")


def _chain(shape: Shape, density: float, draw: Draw) -> Copy:
    layer = Layer(shape, density, draw)
    return Copy(
        run=layer.sparse,
        reference=layer.reference,
        bytes=layer.kept,
        density=layer.kept / sum(weight.nbytes for weight in layer.weights.values()),
        baseline=lambda: layer.pass_through(layer.dense),
        result=lambda *outputs: torch.cat([_sum(y).flatten() for y in outputs]),
        tolerance=TOLERANCE[draw.dtype],
    )


class Layer:
    """Weights and an input, with thresholds that keep the asked-for share of each linear's input channels."""

    def __init__(self, shape: Shape, density: float, draw: Draw) -> None:
        self.query, self.density, self.x = shape.heads * shape.head_dim, density, draw.normal(1, shape.hidden)
        self.norms = [1 + draw.normal(shape.hidden, std=0.1) for _ in range(2)]
        self.widths = {name: widths for name, (_, widths) in shape.linears().items()}
        self.weights = {name: draw.weight(sum(n), k) for name, (k, n) in shape.linears().items()}
        self.weights_t = {name: weight.t().contiguous() for name, weight in self.weights.items()}
        self.stats = row_stats(self.x)  # in a model, made by the layer before
        self.thresholds: dict[str, Tensor] = {}
        self.made: tuple[Tensor, ...] = ()  # the outputs of the last sparse pass
        self.kept = 0  # bytes
        self.pass_through(self.calibrate)

    def pass_through(self, linear: Linear) -> tuple[Tensor, ...]:
        """What the layer's linears give, with the query in the place of what attention would make of it."""
        qkv = linear("qkv", self.x, self.norms[0], False, None)
        middle = linear("o", qkv[:, : self.query], None, False, self.x)
        both = linear("gate+up", middle, self.norms[1], False, None)
        return qkv, middle, both, linear("down", both, None, True, middle)

    def sparse(self) -> tuple[Tensor, ...]:
        """Each linear takes statistics for its norm, or the parts of its input's sums, from the one before."""
        stats = self.stats

        def linear(name: str, x: Tensor, norm: Tensor | None, gated: bool, residual: Tensor | None) -> Tensor:
            nonlocal stats
            y, _, made = threshold_linear(
                x, self.weights_t[name], None if self.density == 1 else self.thresholds[name], self.widths[name],
                norm="" if norm is None else "rms", norm_weight=norm, eps=EPS, stats=None if norm is None else stats,
                activation="silu" if gated else "", gated=gated, residual=residual, with_stats=residual is not None,
                partial=name == "gate+up",
            )  # fmt: skip
            stats = made
            return y

        self.made = self.pass_through(linear)
        return self.made

    def dense(self, name: str, x: Tensor, norm: Tensor | None, gated: bool, residual: Tensor | None) -> Tensor:
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, EPS)
        if gated:
            gate, up = x.chunk(2, 1)
            x = F.silu(gate) * up
        y = F.linear(x, self.weights[name])
        return y if residual is None else residual + y

    def calibrate(self, name: str, x: Tensor, norm: Tensor | None, gated: bool, residual: Tensor | None) -> Tensor:
        size = _prepared(x, self.x.dtype, norm, gated).abs()
        threshold = gap(size[0], self.density)
        self.thresholds[name] = threshold.repeat(len(self.widths[name]))
        self.kept += int((size.float() > threshold).sum()) * sum(self.widths[name]) * x.element_size()
        return self.exact(name, x, norm, gated, residual).to(x.dtype)

    def exact(self, name: str, x: Tensor, norm: Tensor | None, gated: bool, residual: Tensor | None) -> Tensor:
        """One linear in float64, of an input rounded where the operator rounds it before it compares."""
        v = _prepared(x, self.x.dtype, norm, gated)
        keep = v.float().abs() > self.thresholds[name][0]
        y = torch.where(keep, v, 0).double() @ self.weights_t[name].double()
        return y if residual is None else residual.double() + y

    def reference(self) -> Tensor:
        """Each linear of what the sparse pass gave it: a last bit would else decide at the next threshold."""
        made, expected = iter(self.made), []

        def linear(name: str, x: Tensor, norm: Tensor | None, gated: bool, residual: Tensor | None) -> Tensor:
            expected.append(self.exact(name, x, norm, gated, residual).flatten())
            return next(made)

        self.pass_through(linear)
        return torch.cat(expected)


def _prepared(x: Tensor, dtype: torch.dtype, norm: Tensor | None, gated: bool) -> Tensor:
    """What a linear compares with its threshold and multiplies, in the dtype of the weights."""
    act = "silu" if gated else ""
    return naive.prepared(x, dtype, "" if norm is None else "rms", norm, None, EPS, act, gated, None)


def _sum(y: Tensor) -> Tensor:
    """y [1, N], also of parts of it [parts, 1, N]."""
    return y.sum(0) if y.dim() == 3 else y
