"""Finds the strength of a penalty, or the thresholds, that give a target density."""

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


def bisect(
    density: float, measure: Callable[[list[float]], list[float]], count: int, tolerance: float, trials: int
) -> list[float]:
    """Thresholds in [0, 1], `count` at once, whose densities are all within `tolerance` of the target.

    measure: densities for thresholds; a larger threshold gives a smaller density, and the others' thresholds should
    matter little. Stops after `trials` measurements with those that were nearest.
    """
    low, high = [0.0] * count, [1.0] * count
    best, error = low, math.inf
    for _ in range(trials):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        found = measure(middle)
        worst = max(abs(d - density) for d in found)
        if worst < error:
            best, error = middle, worst
        if error <= tolerance:
            break
        low = [m if d > density else a for a, m, d in zip(low, middle, found, strict=True)]
        high = [b if d > density else m for b, m, d in zip(high, middle, found, strict=True)]
    return best
