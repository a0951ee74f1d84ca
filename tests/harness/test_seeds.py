"""A cell measured with several seeds is one row, whose intervals include the seed."""

from pathlib import Path
from typing import Any

import pytest

from harness import board, report, rows, store
from tests.harness.fabricated import record, write


def cell(method: str, density: float | None, seed: int, time: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A record with samples: `time` ms a step, where the dense model takes 2; each seed has its own items."""
    found = record(method, density, seed=seed, time=f"2026-01-0{seed + 1}T00:00:00+00:00", **changes)
    found["items"]["nll"] = [x + 0.1 * seed for x in found["items"]["nll"]][: 20 - seed]
    found["items"]["tokens"] = found["items"]["tokens"][: 20 - seed]
    if found["latency"]:
        found["latency"] |= {"runner": "sparse", "samples": {"graph": [[2.0] * 9] * 3, "sparse": [[time] * 9] * 3}}
    return found


def three(times: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[dict[str, Any]]:
    return [r for seed in range(3) for r in (cell("dense", None, seed), cell("teal", 0.9, seed, times[seed]))]


def test_three_seeds_are_one_row() -> None:
    (group,) = rows.group([*three(), cell("lte", 0.7, 0)])
    dense, lte, teal = group.rows
    assert [row.seeds for row in group.rows] == [[0, 1, 2], [0], [0, 1, 2]]
    assert "seeds 0, 1, 2" in group.details
    assert teal.speedup and (teal.speedup.estimate, teal.speedup.low) == pytest.approx((2.0, 2.0))
    assert lte.nll and lte.speedup and not lte.repeats and dense.nll is None
    text = report.page([group])
    assert "| seeds" in text and "Machine: Test GPU" in text


def test_a_seed_without_a_dense_cell_is_left_out() -> None:
    """It tells of no loss; were it averaged in, the row would have none either."""
    (group,) = rows.group(three()[:-2] + three()[-1:])
    assert group.rows[1].seeds == [0, 1] and group.rows[1].loss is not None
    (alone,) = rows.group([found for found in three() if found["cell"]["method"] == "teal"])
    assert alone.rows[0].seeds == [0, 1, 2] and alone.rows[0].loss is None


def test_the_interval_includes_the_seed() -> None:
    worse = three()
    for found, harm in zip(worse[1::2], (0.0, 0.05, 0.1), strict=True):
        found["items"]["nll"] = [x + harm for x in found["items"]["nll"]]
    (group,) = rows.group(worse)
    teal = group.rows[1]
    assert teal.nll and teal.loss
    assert teal.nll.estimate == pytest.approx(0.051, abs=1e-3) and teal.nll.high - teal.nll.low > 0.08
    single = [row.nll for row in teal.repeats]
    assert all(one and one.high - one.low < 0.01 for one in single)
    assert teal.loss[1] > teal.loss[0] + 1


def test_seeds_that_disagree_are_ambiguous() -> None:
    (group,) = rows.group(three((1.0, 2.0, 2.5)))
    teal = group.rows[1]
    assert teal.part("latency")["verdict"] == "ambiguous"
    assert teal.speedup and teal.speedup.estimate == pytest.approx((2 * 1 * 0.8) ** (1 / 3))
    assert teal.speedup.low == pytest.approx(0.8) and teal.speedup.high == pytest.approx(2.0)


def test_tasks_are_paired_within_each_seed() -> None:
    records = three()
    for found in records:
        seed = found["cell"]["seed"]
        scores = [float((i + seed) % 2) for i in range(50 + seed)]
        wrong = found["cell"]["method"] == "teal" and seed == 2
        found["items"]["stdlib_next_line"] = [0.0] * len(scores) if wrong else scores
    (group,) = rows.group(records)
    paired = group.rows[1].tasks["stdlib_next_line"]
    assert (paired.n, paired.p) == (153, None)
    assert paired.difference.estimate == pytest.approx(-0.5 / 3) and paired.difference.low <= -0.4
    average = group.rows[1].task_average_difference
    assert average and average.estimate == pytest.approx(paired.difference.estimate / 2)


def test_means_are_of_what_was_measured_and_nothing_else() -> None:
    records = three()
    records[1]["fidelity"], records[3]["fidelity"] = {"perplexity": 8.0}, {"perplexity": 9.0}
    records[5]["fidelity"] = {"perplexity": 13.0}
    records[5]["machine"] = {**records[5]["machine"], "os": "another"}
    (group,) = rows.group(records)
    found = group.rows[1].record
    assert found["fidelity"]["perplexity"] == 10 and found["machine"]["os"] == "another" and found["cell"]["seed"] == 2
    assert found["items"] == {} and "samples" not in found["latency"]


def test_quality_without_latency_joins_the_timed_row() -> None:
    quick = cell("teal", 0.9, 1, latency={})
    again = cell("teal", 0.9, 0, latency={}, fidelity={"perplexity": 99.0})
    for found in (quick, again):
        found["cell"] = {**found["cell"], "timed": False}
    (group,) = rows.group([cell("dense", None, 0), cell("dense", None, 1), cell("teal", 0.9, 0), quick, again])
    teal = group.rows[1]
    assert teal.seeds == [0, 1] and teal.speedup and teal.speedup.estimate == pytest.approx(2.0)
    assert teal.part("fidelity")["perplexity"] < 99  # of the same seed the timed record counts


def test_seeds_of_several_sets_meet_in_the_merged_page(tmp_path: Path) -> None:
    records = three()
    for number in range(3):
        write(tmp_path / f"run{number}", records[2 * number : 2 * number + 2])
    assert len(store.load(tmp_path / "run0")) == 2
    (section,) = board.sections(board.sets(tmp_path))
    assert [row.seeds for row in section.groups[0].rows] == [[0, 1, 2], [0, 1, 2]]
    text = board.page(board.sections(board.sets(tmp_path)))
    assert "seeds 0, 1, 2" in text


def test_rows_that_join_the_seeds_of_one_set_link_its_records(tmp_path: Path) -> None:
    write(tmp_path / "only", three())
    text = board.page(board.sections(board.sets(tmp_path)))
    assert "[only](only/records.jsonl)" in text and "[](" not in text


def test_a_shipped_artifact_stands_for_its_own_seed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from harness import artifacts, models
    from harness.corpus import load_corpus
    from methods.registry import create

    monkeypatch.setenv("ACTIVATION_SPARSITY_CACHE", str(tmp_path))
    loaded, teal = models.load(models.resolve("reference"), "real", "cpu", "float32"), create("teal", {})
    corpus = load_corpus("stdlib")
    assert artifacts.existing(loaded, teal, 0.5, corpus, 0) is not None
    assert artifacts.existing(loaded, teal, 0.5, corpus, 1) is None
