"""How the kernels of `expert_ffn_prefill` are launched, per GPU architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Routed:
    """How a product over routed tokens is launched.

    tokens: rows of x per program. neurons: of an expert per program (hidden) or step (down). columns: channels per
    step (hidden) or outputs per program (down). warps, stages: warps per program and depth of the software pipeline.
    """

    tokens: int
    neurons: int
    columns: int
    warps: int
    stages: int


LAUNCH = {
    90: {
        "hidden": Routed(tokens=128, neurons=64, columns=64, warps=8, stages=4),
        "down": Routed(tokens=128, neurons=64, columns=256, warps=8, stages=7),
    }
}

# Up to so many rows: above this share of the neurons a batch is served no faster than by dense matrices (measured for
# 11008 gated and 16384 ungated neurons of width 4096, docs/kernels.md).
CROSSOVER = {16: 0.8, 32: 0.5, 64: 0.45}


def crossover(rows: int) -> float:
    """The share of the neurons from which on up to 64 rows take dense products."""
    return next(share for most, share in CROSSOVER.items() if rows <= most)
