"""Finds the strength of a penalty that gives a target density, one training per trial."""

from __future__ import annotations

import math
from collections.abc import Callable


def search(
    density: float, known: dict[float, float], trial: Callable[[float], None], tolerance: float, trials: int
) -> float:
    """A strength whose density is within `tolerance` of the target, or the nearest one after `trials` trials.

    `known` maps strengths to densities; `trial(strength)` measures one and adds it there, so that targets share what
    was tried. A larger strength gives a smaller density: brackets are cut in the logarithm of the strength, in
    proportion to the densities at their ends.
    """
    for _ in range(trials):
        if known:
            nearest = min(known, key=lambda s: abs(known[s] - density))
            if abs(known[nearest] - density) <= tolerance:
                return nearest
        above = [(s, d) for s, d in known.items() if d >= density]
        below = [(s, d) for s, d in known.items() if d < density]
        if above and below:
            (s0, d0), (s1, d1) = max(above), min(below)
            share = min(max((d0 - density) / max(d0 - d1, 1e-6), 0.1), 0.9)
            trial(math.exp(math.log(s0) + share * (math.log(s1) - math.log(s0))))
        elif above:
            trial(2.5 * max(above)[0])
        elif below:
            trial(0.4 * min(below)[0])
        else:
            trial(1.0)
    return min(known, key=lambda s: abs(known[s] - density))
