"""Input-sparse linears: those of a layer, and at batch 2 to 16 the union of what the rows select."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import input_linear, threshold_linear
from sparse_kernels.input_linear import naive
from sparse_kernels.input_linear.cost import linear_bytes

from .case import BATCHES, DENSITIES, Case, Copy, Draw, Shape, double

BATCHED = "llama2-7b"  # the shapes that are also timed in batches, and in both forms
STORED = "stored by output"  # weights that are read whole, as a dense model has them
PARTS = "float32 partials"  # left for the next kernel to add, as inside a step


def cases(shape: Shape) -> Iterator[Case]:
    batched = shape.name == BATCHED
    plain = [(1, density, "") for density in DENSITIES] + [(b, 0.5, ", 0.5 per row") for b in BATCHES if batched]
    forms = {form: [(1, density, f", {form}") for density in DENSITIES if batched] for form in ("list", "mask")}
    for op, select, settings in (
        ("input_linear", None, plain),
        ("threshold_linear", "auto", plain),
        *(("threshold_linear", form, settings) for form, settings in forms.items()),
        ("threshold_linear", STORED, [(1, 1.0, f", {STORED}")]),
        ("threshold_linear", PARTS, [] if shape.biased else [(1, density, f", {PARTS}") for density in DENSITIES]),
    ):
        for batch, density, note in settings:
            for name in shape.linears():
                build = partial(_build, select, shape, name, batch, density)
                yield Case(op, f"{shape.name} {name}{note}", batch, density, build, "cuBLAS")


def _build(select: str | None, shape: Shape, name: str, batch: int, density: float, draw: Draw) -> Copy:
    """With a list that is given (select None), one that the operator makes itself, or all of what is STORED."""
    channels, widths = shape.linears()[name]
    outputs = sum(widths)
    mask = draw.mask(batch, channels, density)
    x, threshold = draw.values(mask), draw.one()
    weight, bias = draw.weight(outputs, channels), draw.normal(outputs) if shape.biased else None
    weight_t = weight.t() if select == STORED else weight.t().contiguous()
    index, count = draw.union(mask)
    limits = None if density == 1 else threshold.repeat(len(widths))

    def run() -> Tensor:
        if select is None:
            return input_linear(x, weight_t, index, count, threshold if batch > 1 else None, bias)
        form = "auto" if select in (STORED, PARTS) else select
        parts = select == PARTS
        return threshold_linear(x, weight_t, limits, widths, select=form, bias=bias, density=density, partial=parts)[0]

    def reference() -> Tensor:
        return naive.input_linear(x.double(), weight_t.double(), index, count, threshold, double(bias))

    kept = int(count)
    return Copy(
        run=run,
        result=lambda y: y.sum(0) if select == PARTS else y,
        reference=reference,
        bytes=round(linear_bytes(kept, outputs, weight.element_size())),
        density=kept / channels,
        baseline=lambda: F.linear(x, weight, bias),
    )
