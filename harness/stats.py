"""Comparisons of two measurements on the same items or in the same run, with their uncertainty.

Everything is deterministic by seed. A difference is always `candidate - baseline`; a speed-up is always
`baseline time / candidate time`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, inf

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
PRACTICAL = 0.03
BLOCK = 1 << 19  # numbers in memory at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap percentile interval; without limits where the data tell nothing of its spread."""

    estimate: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(factor * self.estimate, factor * self.low, factor * self.high)


Part = tuple[Sequence[float], Sequence[float], "Sequence[float] | None"]  # candidate, baseline, weights
Blocks = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Paired:
    """`candidate - baseline` over the same n items; p is McNemar's, where every score is 0 or 1."""

    n: int
    difference: Interval
    p: float | None


def compare(
    candidate: Sequence[float],
    baseline: Sequence[float],
    weights: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """Everything a table prints about two lists of scores on the same items, in the same order."""
    binary = set(candidate) | set(baseline) <= {0, 1}
    return Paired(
        len(candidate),
        difference(candidate, baseline, weights, resamples, seed),
        mcnemar(candidate, baseline) if binary else None,
    )


def mcnemar(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """Exact two-sided p-value of McNemar's test (1947) on 0/1 scores of the same items.

    Under the hypothesis of no difference, the items that exactly one of the two gets right are fair coin tosses;
    p is twice the smaller binomial tail, at most 1. Raises ValueError on lists of different length.
    """
    wins = sum(a > b for a, b in zip(candidate, baseline, strict=True))
    losses = sum(a < b for a, b in zip(candidate, baseline, strict=True))
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)  # Python integers: exact for any n


def difference(
    candidate: Sequence[float],
    baseline: Sequence[float],
    weights: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `candidate - baseline`, with the paired bootstrap interval (Efron and Tibshirani 1993, ch. 13).

    The items are resampled with replacement, both scores of an item together. `weights`: an item's share in the mean
    (for windows of unequal length, their scored tokens). One item has a spread that nobody knows: its interval has no
    limits. Raises ValueError on empty or unequal lists.
    """
    delta, weight = _delta(candidate, baseline, weights)
    if len(delta) < 2:
        return Interval(float(delta[0]), -inf, inf)
    draws = _resampled(delta, weight, resamples, np.random.default_rng(seed))
    return _percentiles(float(np.average(delta, weights=weight)), draws)


def repeated_difference(seeds: Sequence[Sequence[Part]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """A difference measured with several seeds: the mean over seeds, and within a seed over its parts (tasks).

    Hierarchical bootstrap: seeds are drawn with replacement, then the items of every part of each drawn seed, so the
    interval includes what a seed changes (training, items). With n seeds it is narrow by about sqrt((n - 1) / n).
    Raises ValueError on empty or unequal lists.
    """
    deltas = [[_delta(*part) for part in parts] for parts in seeds]
    if not deltas or not all(deltas):
        raise ValueError("a repeated difference needs at least one seed with one part.")
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(deltas), size=(resamples, len(deltas)))
    values = np.empty(chosen.shape)
    for number, parts in enumerate(deltas):
        here = chosen == number
        values[here] = np.mean([_resampled(*part, int(here.sum()), rng) for part in parts], axis=0)
    estimate = np.mean([np.mean([np.average(delta, weights=weight) for delta, weight in parts]) for parts in deltas])
    return _percentiles(float(estimate), values.mean(axis=1))


def repeated_speedup(runs: Sequence[tuple[Blocks, Blocks]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Geometric mean of the speed-ups of several seeds, each (baseline, candidate) in interleaved blocks.

    Seeds are drawn with replacement, then blocks and samples of each as in `speedup`. Raises ValueError like it.
    """
    rng = np.random.default_rng(seed)
    ratios = [_ratio(slow, fast, rng, paired=True) for slow, fast in runs]

    def draw() -> float:
        return float(np.exp(np.mean([np.log(ratios[i][1]()) for i in rng.integers(len(ratios), size=len(ratios))])))

    estimate = float(np.exp(np.mean([np.log(estimate) for estimate, _ in ratios])))
    return _percentiles(estimate, [draw() for _ in range(resamples)])


def speedup(
    baseline: Blocks,
    candidate: Blocks,
    resamples: int = RESAMPLES,
    seed: int = 0,
    paired: bool = True,
) -> Interval:
    """Ratio of medians, `median(baseline) / median(candidate)`, of times measured in interleaved blocks.

    `baseline[i]` and `candidate[i]` are the samples of block i, which ran next to each other. The interval is a
    hierarchical bootstrap: blocks are drawn with replacement, the same for both sides, then samples within each
    drawn block; so a drift from block to block widens it. With paired=False the sides are two runs, with any number of
    blocks each, drawn apart. Raises ValueError when a block is empty or has no partner.
    """
    estimate, draw = _ratio(baseline, candidate, np.random.default_rng(seed), paired)
    return _percentiles(estimate, [draw() for _ in range(resamples)])


def _ratio(
    baseline: Blocks, candidate: Blocks, rng: np.random.Generator, paired: bool
) -> tuple[float, Callable[[], float]]:
    """The ratio of medians, and a function that draws it again from resampled blocks."""
    partners = bool(baseline and candidate) and (not paired or len(baseline) == len(candidate))
    if not partners or not all(map(len, [*baseline, *candidate])):
        raise ValueError("a speed-up needs the same number of non-empty blocks on both sides.")
    slow, fast = (
        np.concatenate([np.asarray(block, dtype=np.float64) for block in side]) for side in (baseline, candidate)
    )
    slow_sizes, fast_sizes = (np.array([len(block) for block in side]) for side in (baseline, candidate))

    def median(samples: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> float:
        size = sizes[chosen].repeat(sizes[chosen])  # of the block that a sample is drawn from
        first = (sizes.cumsum() - sizes)[chosen].repeat(sizes[chosen])
        drawn = np.sort(samples[first + rng.integers(size)])
        return float(drawn[(len(drawn) - 1) // 2] + drawn[len(drawn) // 2]) / 2

    def draw() -> float:
        chosen = rng.integers(len(baseline), size=len(baseline))
        other = chosen if paired else rng.integers(len(candidate), size=len(candidate))
        return median(slow, slow_sizes, chosen) / median(fast, fast_sizes, other)

    return float(np.median(slow) / np.median(fast)), draw


def verdict(ratio: tuple[float, float], practical: float = PRACTICAL) -> str:
    """faster, slower, same or ambiguous, from the interval (low, high) of a speed-up.

    A ratio between 1 / (1 + practical) and 1 + practical makes no practical difference. faster: the whole interval is
    above that band; slower: the whole is below; same: the whole is inside. Every other interval is ambiguous.
    """
    low, high = ratio
    if low > 1 + practical:
        return "faster"
    if high < 1 / (1 + practical):
        return "slower"
    if 1 / (1 + practical) <= low and high <= 1 + practical:
        return "same"
    return "ambiguous"


def _delta(
    candidate: Sequence[float], baseline: Sequence[float], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of paired scores, float64 [items], and their weights."""
    delta = np.array([a - b for a, b in zip(candidate, baseline, strict=True)], dtype=np.float64)
    weight = np.ones_like(delta) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(delta) or len(weight) != len(delta):
        raise ValueError("a comparison needs at least one item and one weight per item.")
    return delta, weight


def _resampled(delta: np.ndarray, weight: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Weighted means of items drawn with replacement, float64 [resamples]; in blocks that stay small."""
    rows, even = max(1, BLOCK // len(delta)), bool((weight == 1).all())
    found = []
    for start in range(0, resamples, rows):
        index = rng.integers(len(delta), size=(min(rows, resamples - start), len(delta)), dtype=np.uint32)
        shares = len(delta) if even else weight[index].sum(axis=1)
        found.append((delta[index] if even else delta[index] * weight[index]).sum(axis=1) / shares)
    return np.concatenate(found) if found else np.empty(0)


def _percentiles(estimate: float, draws: Sequence[float] | np.ndarray) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))
