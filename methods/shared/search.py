"""Finds the strength of a penalty, or the threshold, that gives a target density."""

from __future__ import annotations

import math
from collections.abc import Callable


def missed(density: float, reached: float, why: str, tolerance: float = 0.01) -> list[str]:
    """A note where the density that was reached is not the one asked for."""
    return [] if abs(reached - density) <= tolerance else [f"density {reached:.3f} instead of {density:g}: {why}"]


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


def bisect(density: float, measure: Callable[[float], float], tolerance: float, trials: int) -> float:
    """A threshold in (0, 1) whose density is within `tolerance` of the target, or the nearest of `trials` tried.

    measure: the density of a threshold; a larger threshold gives a smaller density.
    """
    low, high, best, error = 0.0, 1.0, 1.0, math.inf
    for _ in range(trials):
        middle = (low + high) / 2
        found = measure(middle)
        if abs(found - density) < error:
            best, error = middle, abs(found - density)
        if error <= tolerance:
            break
        low, high = (middle, high) if found > density else (low, middle)
    return best
