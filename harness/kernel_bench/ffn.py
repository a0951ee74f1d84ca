"""Feed-forward networks that skip neurons, against two dense linears and the activation between them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import ACTIVATIONS, expert_ffn, gate_first_ffn, gated_ffn, linear_router, neuron_ffn
from sparse_kernels.neuron_ffn import cost

from .case import BATCHES, DENSITIES, EXPERT, Case, Copy, Draw, Shape, double, gap


def cases(shape: Shape) -> Iterator[Case]:
    for density in DENSITIES:
        yield Case("neuron_ffn", shape.name, 1, density, partial(_neuron_ffn, shape, density), "cuBLAS")
        if density == 0.5 and not shape.biased:
            partials = partial(_neuron_ffn, shape, density, partials=True)
            yield Case("neuron_ffn", f"{shape.name}, float32 partials", 1, density, partials, "cuBLAS")
        yield Case("gate_first_ffn", shape.name, 1, density, partial(_gate_first_ffn, shape, density), "cuBLAS")
        if not shape.biased:
            yield Case("gated_ffn", shape.name, 1, density, partial(_gated_ffn, shape, density), "cuBLAS")
    for batch, density in [(1, density) for density in DENSITIES] + [(batch, 0.5) for batch in BATCHES]:
        title = shape.name + (f", {density:g} per row" if batch > 1 else "")
        yield Case("expert_ffn", title, batch, density, partial(_expert_ffn, shape, batch, density), "cuBLAS")
    for density in DENSITIES:
        yield Case(
            "expert_ffn", f"{shape.name} with router", 1, density, partial(_routed_ffn, shape, density), "cuBLAS"
        )


class Weights:
    """One FFN stored twice: for the kernels a neuron's gate, up and down rows together; for cuBLAS as matrices."""

    def __init__(self, shape: Shape, draw: Draw) -> None:
        width, neurons, gated = shape.hidden, shape.neurons, not shape.biased
        self.act, self.gated, self.neurons = ACTIVATIONS[shape.activation], gated, neurons
        self.first, self.down = draw.weight((1 + gated) * neurons, width), draw.weight(width, neurons)
        self.up_bias, self.down_bias = (None if gated else draw.normal(n) for n in (neurons, width))
        rows = torch.stack([*self.first.split(neurons), self.down.t()], 1).unbind(1)
        self.gate, self.up, self.down_t = rows[0] if gated else None, rows[-2], rows[-1]

    def dense(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.first, self.up_bias)
        gate, up = hidden.split(self.neurons, 1) if self.gated else (hidden, None)
        return F.linear(self.act(gate) if up is None else self.act(gate) * up, self.down, self.down_bias)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """act(gate x) and up x, or act(up x) and None: float64 [B, F]."""
        parts = F.linear(x.double(), self.first.double(), double(self.up_bias)).split(self.neurons, 1)
        return self.act(parts[0]), parts[1] if self.gated else None

    def reference(self, x: Tensor, keep: Tensor) -> Tensor:
        """y [B, d] in float64, of the neurons that the mask [B, F] keeps."""
        value, up = self.activations(x)
        return F.linear((value if up is None else value * up) * keep, self.down.double(), double(self.down_bias))


def _sizes(shape: Shape, x: Tensor) -> tuple[int, int, int, int, bool]:
    return x.shape[0], shape.hidden, shape.hidden, shape.neurons, not shape.biased


def _neuron_ffn(shape: Shape, density: float, draw: Draw, partials: bool = False) -> Copy:
    weights, x = Weights(shape, draw), draw.normal(1, shape.hidden)
    mask = draw.mask(1, shape.neurons, density)
    kept = mask.double().mean().item()
    index, count = (None, None) if density == 1 else draw.union(mask)
    return Copy(
        run=lambda: neuron_ffn(
            x, weights.gate, weights.up, weights.down_t, index, count, shape.activation,
            up_bias=weights.up_bias, down_bias=weights.down_bias, partial=partials,
        ),
        result=lambda y: y.sum(0, keepdim=True) if partials else y,
        reference=lambda: weights.reference(x, mask),
        bytes=round(cost.ffn_bytes(*_sizes(shape, x), kept, x.element_size())),
        density=kept,
        baseline=lambda: weights.dense(x),
    )  # fmt: skip


def _gate_first_ffn(shape: Shape, density: float, draw: Draw) -> Copy:
    weights, x = Weights(shape, draw), draw.normal(1, shape.hidden)
    size = weights.activations(x)[0].abs()
    threshold = gap(size[0], density)
    keep = size > threshold
    kept = keep.double().mean().item()
    return Copy(
        run=lambda: gate_first_ffn(
            x, weights.gate, weights.up, weights.down_t, threshold, shape.activation,
            up_bias=weights.up_bias, down_bias=weights.down_bias,
        ),
        reference=lambda: weights.reference(x, keep),
        bytes=round(cost.gate_first_bytes(*_sizes(shape, x), kept, x.element_size())),
        density=kept,
        baseline=lambda: weights.dense(x),
    )  # fmt: skip


def _gated_ffn(shape: Shape, density: float, draw: Draw) -> Copy:
    """Up and down alone, of the neurons whose gate is not zero; cuBLAS multiplies all of both."""
    weights, x = Weights(shape, draw), draw.normal(1, shape.hidden)
    mask = draw.mask(1, shape.neurons, density)
    kept = mask.double().mean().item()
    value, (index, count) = draw.values(mask, torch.float32) * mask, draw.union(mask)

    def hidden(kind: torch.dtype) -> Tensor:
        return F.linear(x.to(kind), weights.up.to(kind)) * value.to(kind)

    return Copy(
        run=lambda: gated_ffn(x, value, weights.up, weights.down_t, index, count),
        reference=lambda: F.linear(hidden(torch.float64), weights.down.double()),
        bytes=round(cost.ffn_bytes(*_sizes(shape, x)[:4], False, kept, x.element_size())),
        density=kept,
        baseline=lambda: F.linear(hidden(x.dtype), weights.down),
    )


def _expert_ffn(shape: Shape, batch: int, density: float, draw: Draw) -> Copy:
    weights, x = Weights(shape, draw), draw.normal(batch, shape.hidden)
    mask = draw.mask(batch, shape.neurons // EXPERT, density)
    score, threshold = draw.values(mask, torch.float32).abs(), draw.one()
    union = mask.any(0).double().mean().item()
    return Copy(
        run=lambda: expert_ffn(
            x, weights.gate, weights.up, weights.down_t, None, weights.up_bias, weights.down_bias,
            score, threshold, shape.activation, density,
        ),
        reference=lambda: weights.reference(x, mask.repeat_interleave(EXPERT, 1)),
        bytes=round(cost.ffn_bytes(*_sizes(shape, x), union, x.element_size())),
        density=union,
        baseline=lambda: weights.dense(x),
    )  # fmt: skip


def _routed_ffn(shape: Shape, density: float, draw: Draw) -> Copy:
    """Two launches: the router makes the list that the FFN reads."""
    weights, x = Weights(shape, draw), draw.normal(1, shape.hidden)
    router = draw.weight(shape.neurons // EXPERT, shape.hidden)
    score = F.linear(x.double(), router.double())
    threshold = gap(score[0], density)
    mask = score > threshold
    kept = mask.double().mean().item()

    def run() -> Tensor:
        _, index, count = linear_router(x, router, None, threshold)
        return neuron_ffn(
            x, weights.gate, weights.up, weights.down_t, index, count, shape.activation,
            up_bias=weights.up_bias, down_bias=weights.down_bias, group=EXPERT,
        )  # fmt: skip

    return Copy(
        run=run,
        reference=lambda: weights.reference(x, mask.repeat_interleave(EXPERT, 1)),
        bytes=router.nbytes + round(cost.ffn_bytes(*_sizes(shape, x), kept, x.element_size())),
        density=kept,
        baseline=lambda: weights.dense(x),
    )
