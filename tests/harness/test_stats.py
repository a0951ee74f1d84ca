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
    # An item without weight counts in no draw either; even weights are the same as none, to the bit.
    scores = np.random.default_rng(0).normal(size=40)
    some = stats.difference([*scores[:20], *[100.0] * 5], [0] * 25, weights=[1] * 20 + [1e-12] * 5)
    assert some.high < 1 and some.low < some.estimate < some.high
    assert stats.difference(scores, [0] * 40, weights=[1] * 40) == stats.difference(scores, [0] * 40)
    assert stats.difference(scores, [0] * 40, weights=[2] * 40) == stats.difference(scores, [0] * 40)
    for bad in (([], [], None), ([1], [1, 2], None), ([1, 2], [1, 2], [1])):
        with pytest.raises(ValueError):
            stats.difference(*bad)


def test_one_item_has_no_interval() -> None:
    found = stats.difference([1.5], [1.0], weights=[512])
    assert found == stats.Interval(0.5, -float("inf"), float("inf"))
    assert stats.compare([1.5], [1.0]).difference == found


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


def test_repeated_difference_has_the_spread_of_seeds_and_of_items() -> None:
    def seed(delta: float, noise: float, count: int = 200) -> list[stats.Part]:
        rng = np.random.default_rng(int(1000 * delta))
        return [((delta + noise * rng.standard_normal(count)).tolist(), [0.0] * count, None)]

    same = stats.repeated_difference([seed(1.0, 0.0), seed(1.0, 0.0)])
    assert (same.estimate, same.low, same.high) == (1.0, 1.0, 1.0)
    apart = stats.repeated_difference([seed(0.0, 0.0), seed(0.5, 0.0), seed(1.0, 0.0)])
    assert (apart.estimate, apart.low, apart.high) == pytest.approx((0.5, 0.0, 1.0))
    one = stats.repeated_difference([seed(1.0, 1.0)])
    plain = stats.difference(*seed(1.0, 1.0)[0])
    assert (one.estimate, one.low, one.high) == pytest.approx((plain.estimate, plain.low, plain.high), abs=0.02)


def test_repeated_difference_weighs_items_and_averages_parts() -> None:
    window: stats.Part = ([1.0, 4.0], [0.0, 0.0], [3, 1])
    assert stats.repeated_difference([[window]]).estimate == pytest.approx(1.75)
    task: stats.Part = ([0.25], [0.0], None)
    assert stats.repeated_difference([[window, task], [window, task]]).estimate == pytest.approx(1.0)
    for wrong in ([], [[]], [[([1.0], [], None)]]):
        with pytest.raises(ValueError):
            stats.repeated_difference(wrong)


def test_repeated_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        parts = [[((level + rng.standard_normal(20)).tolist(), [0.0] * 20, None)] for level in rng.standard_normal(12)]
        found = stats.repeated_difference(parts, resamples=150)
        hits += found.low <= 0 <= found.high
    assert 82 <= hits <= 99  # items alone would cover 40 or so


def test_repeated_speedup_is_the_geometric_mean_and_includes_the_seed() -> None:
    slow, fast = ([[2.0] * 8] * 3, [[1.0] * 8] * 3), ([[2.0] * 8] * 3, [[2.0] * 8] * 3)
    found = stats.repeated_speedup([slow, fast])
    assert (found.estimate, found.low, found.high) == pytest.approx((2**0.5, 1.0, 2.0))
    assert stats.repeated_speedup([slow, slow]).low == pytest.approx(2.0)
    with pytest.raises(ValueError):
        stats.repeated_speedup([slow, ([[1.0]], [])])
