"""The gate itself, with invented times."""

import json
from pathlib import Path

import baselines
import pytest
from baselines import Baseline

from methods.errors import UsageError


def accepted(*times: float) -> Baseline:
    found, given = Baseline("Test GPU", accepting=True), iter(times)
    assert found.check("step", lambda: next(given)) is None
    return Baseline("Test GPU", found.cases)


@pytest.mark.parametrize(("times", "noise"), [((1.0, 1.0, 1.0), 0.03), ((1.0, 1.1, 1.0), 0.2)], ids=["quiet", "noisy"])
def test_noise_floor_is_what_repeats_differ_by_but_at_least_the_practical_band(
    times: tuple[float], noise: float
) -> None:
    assert accepted(*times).cases["step"] == {"ms": 1.0, "noise": pytest.approx(noise)}


@pytest.mark.parametrize(
    ("times", "fails"), [((1.02,), False), ((0.5,), False), ((1.05, 1.01), False), ((1.05, 1.06), True)]
)
def test_only_a_confirmed_regression_fails(times: tuple[float], fails: bool) -> None:
    given = iter(times)
    problem = accepted(1.0, 1.0, 1.0).check("step", lambda: next(given))
    assert (problem is not None) == fails and next(given, None) is None
    assert not fails or "step takes 1.06 ms" in str(problem)


def test_unknown_cases_and_gpus_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no baseline of 'other'"):
        accepted(1, 1, 1).check("other", lambda: 1.0)
    baselines.save(accepted(1, 1, 1), {}, tmp_path)
    with pytest.raises(UsageError, match="no baseline for Other GPU, only for Test GPU: accept"):
        baselines.load("Other GPU", tmp_path)
    baselines.place("Test GPU", tmp_path).rename(baselines.place("Other GPU", tmp_path))
    with pytest.raises(UsageError, match="measured on Test GPU, this is Other GPU"):
        baselines.load("Other GPU", tmp_path)


def test_a_run_is_held_to_its_own_gpu_or_fails(tmp_path: Path) -> None:
    assert baselines.expected("Test GPU", False, tmp_path) is None  # skipped: nobody accepted anything
    baselines.save(accepted(1.0, 1.1, 1.0), {"gpu": "unit"}, tmp_path)
    held = baselines.expected("Test GPU", False, tmp_path)
    assert held is not None and not held.accepting and held.cases["step"]["noise"] == pytest.approx(0.2)
    with pytest.raises(UsageError, match="no baseline for Other GPU"):  # an error of the fixture, so of every case
        baselines.expected("Other GPU", False, tmp_path)
    fresh = baselines.expected("Other GPU", True, tmp_path)
    assert fresh is not None and fresh.accepting and not fresh.cases
    stored = json.loads(baselines.place("Test GPU", tmp_path).read_text())
    assert stored["machine"] == {"gpu": "unit"} and set(stored["cases"]["step"]) == {"ms", "noise"}


def test_accepting_keeps_the_other_cases(tmp_path: Path) -> None:
    baselines.save(Baseline("Test GPU", {"old": {"ms": 2.0, "noise": 0.03}}), {}, tmp_path)
    path = baselines.save(accepted(1, 1, 1), {}, tmp_path)
    assert path.name == "test-gpu.json" and list(baselines.load("Test GPU", tmp_path).cases) == ["old", "step"]
