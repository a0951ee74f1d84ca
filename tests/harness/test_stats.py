"""The statistics of the tables, against known values and against their own definitions."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import stats

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def test_mcnemar_known_values() -> None:
    def p(wins: int, losses: int, ties: int = 5) -> float:
        return stats.mcnemar([1] * wins + [0] * losses + [1] * ties, [0] * wins + [1] * losses + [1] * ties)

    assert p(0, 0) == 1.0  # the others are scipy.stats.binomtest(min(wins, losses), wins + losses).pvalue
    assert p(5, 0) == pytest.approx(2 / 2**5)
    assert p(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert p(3, 9) == pytest.approx(0.14599609375)
    assert p(59, 6) == pytest.approx(4.96465e-12, rel=1e-5)
    assert 0 < p(900, 1100) < 1e-4


@given(BITS)
def test_mcnemar_is_symmetric_and_a_probability(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    p = stats.mcnemar(a, b)
    assert p == stats.mcnemar(b, a)
    assert 0 < p <= 1
    n, k = sum(x != y for x, y in pairs), sum(x > y for x, y in pairs)
    exact = sum(comb(n, i) for i in range(n + 1) if comb(n, i) <= comb(n, k)) / 2**n
    assert p == pytest.approx(exact)


def test_mcnemar_needs_the_same_items() -> None:
    with pytest.raises(ValueError):
        stats.mcnemar([1, 0], [1])


def test_difference_matches_the_normal_interval() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=400)
    delta = rng.normal(0.3, 1.0, size=400)
    found = stats.difference(base + delta, base)
    half = 1.96 * delta.std() / 20
    assert found.estimate == pytest.approx(delta.mean())
    assert found.low == pytest.approx(delta.mean() - half, abs=0.02)
    assert found.high == pytest.approx(delta.mean() + half, abs=0.02)


def test_difference_is_paired_deterministic_and_weighted() -> None:
    base = list(np.random.default_rng(2).normal(size=50) * 100)
    shifted = [x + 1 for x in base]
    found = stats.difference(shifted, base)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))  # unpaired, it would be tens wide
    assert stats.difference([1, 0, 1], [0, 0, 1], seed=3) == stats.difference([1, 0, 1], [0, 0, 1], seed=3)
    assert stats.difference([1, 0], [0, 0], weights=[3, 1]).estimate == pytest.approx(0.75)
    for bad in (([], [], None), ([1], [1, 2], None), ([1, 2], [1, 2], [1])):
        with pytest.raises(ValueError):
            stats.difference(*bad)


def test_compare_tests_only_binary_scores() -> None:
    assert stats.compare([1, 0, 1.0], [0, 0, 1]).p == 1.0
    assert stats.compare([0.5, 0], [0, 0]).p is None
    assert stats.compare([0.5, 0], [0, 0]).n == 2


def test_speedup_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(40):
        drift = rng.normal(1, 0.02, size=(5, 1))  # the same for both sides of a block
        slow = 2.0 * drift * rng.lognormal(0, 0.05, size=(5, 20))
        fast = 1.0 * drift * rng.lognormal(0, 0.05, size=(5, 20))
        found = stats.speedup(slow.tolist(), fast.tolist(), resamples=200, seed=trial)
        assert found.low <= found.estimate <= found.high
        hits += found.low <= 2.0 <= found.high
    assert hits >= 34


def test_speedup_of_itself_and_inverse() -> None:
    block = [[1.0, 1.1, 0.9], [1.0, 1.2, 1.1], [0.8, 1.0, 1.0]]
    assert stats.speedup(block, block).estimate == 1.0
    double = [[2 * t for t in b] for b in block]
    assert stats.speedup(double, block).estimate == pytest.approx(2.0)
    for bad in ([], [[1.0], []], [[1.0]]):
        with pytest.raises(ValueError):
            stats.speedup(bad, block)


def test_speedup_widens_with_drift_between_blocks() -> None:
    even = [[1.0] * 5] * 4
    drifting = [[1.0] * 5, [1.0] * 5, [1.5] * 5, [1.5] * 5]
    steady = stats.speedup(even, even)
    moved = stats.speedup(drifting, even)
    assert steady.high - steady.low == 0
    assert moved.high - moved.low >= 0.5


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.031, 1.2), "faster"),
        ((1.03, 1.2), "ambiguous"),
        ((1.001, 1.02), "same"),
        ((0.98, 1.02), "same"),
        ((0.98, 1.04), "ambiguous"),
        ((0.5, 2.0), "ambiguous"),
        ((0.90, 0.96), "slower"),
        ((0.90, 0.98), "ambiguous"),
    ],
)
def test_verdict(interval: tuple[float, float], expected: str) -> None:
    assert stats.verdict(interval) == expected


@given(st.floats(0.1, 10), st.floats(1, 3))
def test_verdict_does_not_depend_on_the_direction(low: float, width: float) -> None:
    opposite = {"faster": "slower", "slower": "faster", "same": "same", "ambiguous": "ambiguous"}
    high = low * width
    if min(abs(x - y) for x in (low, high) for y in (1.03, 1 / 1.03)) > 1e-9:
        assert stats.verdict((1 / high, 1 / low)) == opposite[stats.verdict((low, high))]
