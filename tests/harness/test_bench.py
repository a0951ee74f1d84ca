"""The kernel benchmark with operators made for it: what is timed, what fails, what is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import bench, cli
from harness.kernel_bench import measure, results
from harness.kernel_bench.case import Case, Copy, Draw
from methods.errors import UsageError

Capture = pytest.CaptureFixture[str]
KEYS = [
    "op", "case", "batch", "density",
    "time_us", "limit_us", "fraction_of_limit", "baseline", "baseline_us", "rel_error",
]  # fmt: skip
CPU = measure.Setting(torch.device("cpu"), torch.bfloat16, bandwidth=1e10, copies=3, cold=0, rounds=2, replays=2)


def product(
    change: Callable[[Tensor], Tensor] = lambda y: y, op: str = "product", baseline: str | None = "torch"
) -> Case:
    """A case whose operator is y = W x, spoilt by `change`."""

    def build(draw: Draw) -> Copy:
        x, weight = draw.normal(1, 64), draw.weight(32, 64)

        def run() -> Tensor:
            return change(x @ weight.t())

        return Copy(run, lambda: x.double() @ weight.double().t(), weight.nbytes, 0.5, lambda: x @ weight.t())

    return Case(op, "tiny", 1, 0.5, build, baseline)


def wrong(y: Tensor) -> Tensor:
    return y * 1.01


def crash(y: Tensor) -> Tensor:
    raise RuntimeError("no such\nkernel")


def unsteady() -> Callable[[Tensor], Tensor]:
    """An operator off by one bit in every other run."""
    calls = itertools.count()

    def change(y: Tensor) -> Tensor:
        y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(9.0, dtype=y.dtype)) if next(calls) % 2 else y[0, 0]
        return y

    return change


def run(cases: list[Case], tmp_path: Path, name: str = "r.jsonl") -> tuple[int, list[dict[str, Any]]]:
    code = bench.run(cases, CPU, tmp_path / "out", tmp_path / name)
    lines = (tmp_path / name).read_text().splitlines()
    return code, [json.loads(line) for line in lines]


def test_a_record_has_exactly_its_keys_and_adds_up() -> None:
    record, problem = measure.measure(product(), CPU)
    assert problem is None and list(record) == list(measure.KEYS) == KEYS
    assert record["op"] == "product" and record["batch"] == 1 and record["density"] == 0.5
    assert record["limit_us"] == pytest.approx(1e6 * 64 * 32 * 2 / 1e10, rel=1e-3)
    assert record["fraction_of_limit"] == pytest.approx(record["limit_us"] / record["time_us"], rel=1e-2)
    assert record["baseline"] == "torch" and record["baseline_us"] > 0 and 0 < record["rel_error"] < 4e-3


def test_without_a_baseline() -> None:
    record, problem = measure.measure(product(baseline=None), CPU)
    assert problem is None and record["baseline"] is record["baseline_us"] is None and record["time_us"] > 0


@pytest.mark.parametrize(
    ("change", "expected", "error"),
    [
        (wrong, "relative error 0.0", 0.01),
        (unsteady(), "two runs on the same inputs differ", 0.002),
        (lambda y: y * float("nan"), "relative error nan", None),
        (lambda y: y[:, 1:], "the result has shape [1, 31]", None),
        (crash, "RuntimeError: no such", None),
    ],
)
def test_a_kernel_that_fails_has_no_time(change: Any, expected: str, error: float | None) -> None:
    record, problem = measure.measure(product(change), CPU)
    assert problem and expected in problem and "\n" not in problem
    assert list(record) == KEYS and record["time_us"] is record["fraction_of_limit"] is record["baseline_us"] is None
    assert record["rel_error"] == (None if error is None else pytest.approx(error, rel=0.5))


def test_float32_and_lists_are_held_to_tighter_tolerances() -> None:
    single = dataclasses.replace(CPU, dtype=torch.float32)
    assert measure.measure(product(), single)[1] is None
    assert "1e-05" in str(measure.measure(product(lambda y: y * (1 + 1e-4)), single)[1])
    listed = Case(
        "list", "tiny", 1, 0.5, lambda draw: Copy(lambda: torch.tensor([1, 2]), lambda: torch.tensor([1, 3]), 1, 1.0)
    )
    assert "at most 0 is allowed" in str(measure.measure(listed, CPU)[1])


def test_a_baseline_that_raises_leaves_the_kernel_its_time() -> None:
    def build(draw: Draw) -> Copy:
        return dataclasses.replace(product().build(draw), baseline=lambda: crash(torch.ones(1)))

    record, problem = measure.measure(dataclasses.replace(product(), build=build), CPU)
    assert "baseline: RuntimeError" in str(problem) and record["time_us"] > 0 and record["baseline_us"] is None


def test_every_copy_is_drawn_anew_and_reads_past_the_cache() -> None:
    copies = measure.build(product(), dataclasses.replace(CPU, copies=2, cold=64 * 32 * 2 * 9.5))
    outputs = torch.stack([copy.run() for copy in copies])  # type: ignore[arg-type]
    assert len(copies) == 10 and len(outputs.unique(dim=0)) == 10
    assert len(measure.build(product(), dataclasses.replace(CPU, cold=1e12))) == measure.MAX_COPIES


def test_kernel_and_baseline_take_turns() -> None:
    turns: list[str] = []
    replays: list[Any] = [measure.Replay([lambda name=name: turns.append(name)], CPU.device) for name in "AB"]
    turns.clear()
    samples = measure.interleave(replays, dataclasses.replace(CPU, rounds=3, replays=1))
    assert turns == list("AABB" * 3)  # a warm-up and a sample each
    assert [len(found) for found in samples] == [3, 3]


def test_a_failure_stops_no_other_case(tmp_path: Path, capsys: Capture) -> None:
    code, records = run([product(crash, "a"), product(wrong, "b"), product(op="c")], tmp_path)
    assert code == 1 and [r["op"] for r in records] == ["a", "b", "c"]
    assert [r["time_us"] is not None for r in records] == [False, False, True]
    streams = capsys.readouterr()
    crashed, missed = [line for line in streams.err.splitlines() if "failed:" in line]
    assert crashed == "  a tiny, batch 1, density 0.5 failed: RuntimeError: no such"
    b = r"  b tiny, batch 1, density 0\.5 failed: relative error 0\.01\d? to float64, at most 0\.004 is allowed\."
    assert re.fullmatch(b, missed)
    assert "[1/4] compiling 3 cases" in streams.err and "[4/4] c" in streams.err


def test_the_table_and_the_files(tmp_path: Path, capsys: Capture) -> None:
    code, records = run([product()], tmp_path)
    text = capsys.readouterr().out
    assert code == 0 and text.startswith("Machine: ") and "Read bandwidth at the start: 0.01 TB/s; bfloat16." in text
    assert all(word in text for title in results.COLUMNS for word in title.split("\n"))
    row = next(line for line in text.splitlines() if line.startswith("product"))
    for value in ("tiny", "0.5", "torch", results.number(records[0]["time_us"]), f"{records[0]['rel_error']:.1e}"):
        assert value in row
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".jsonl", ".json", ".md"}
    (run_facts,), saved = next(iter(results.load(tmp_path / "out").values()))
    assert saved == records and run_facts["ops"] == ["product"] and run_facts["read_bandwidth"] == 1e10
    bench.run([product()], CPU, None, tmp_path / "list.json")
    assert [list(record) for record in json.loads((tmp_path / "list.json").read_text())] == [KEYS]


def test_another_run_replaces_its_own_operators_only(tmp_path: Path) -> None:
    _, (a, b) = run([product(op="a"), product(op="b")], tmp_path)
    _, (new,) = run([product(op="a")], tmp_path)
    (((old_run, new_run), saved),) = results.load(tmp_path / "out").values()
    assert saved == [b, new] and old_run["ops"] == ["b"] and new_run["ops"] == ["a"]
    text = (tmp_path / "out" / results.PAGE).read_text()
    assert text.count("Machine: ") == 2 and text.count("| tiny") == 2
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 3 and len({line.count("|") for line in tables}) == 1


def test_damaged_files_are_told_before_the_run(tmp_path: Path) -> None:
    run([product()], tmp_path)
    next((tmp_path / "out").glob("*.machine.json")).write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        bench.run([product(crash)], CPU, tmp_path / "out", None)


def test_the_page_sums_the_linears_of_a_layer() -> None:
    def linear(name: str, time: float | None) -> dict[str, Any]:
        values = ["input_linear", f"m {name}", 1, 0.5, time, 4.0, None, "cuBLAS", 20.0, 1e-3]
        return dict(zip(KEYS, values, strict=True))

    text = "".join(results.sums([linear("qkv", 6.0), linear("down", 10.0)]))
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        "input_linear", "m", "0.5", "16.0", "8.00", "50 %", "40.0", "2.50",
    ]  # fmt: skip
    assert not results.sums([linear("qkv", 6.0), linear("down", None)])
    apart = results.sums([linear("qkv", 6.0), linear("qkv, list", 7.0), linear("down, list", 8.0)])[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in apart[2:]]
    assert [(c[0], c[3]) for c in cells] == [("input_linear", "6.00"), ("input_linear, list", "15.0")]


def test_a_speed_up_is_over_the_faster_of_two_dense_ways() -> None:
    def row(
        case: str, density: float, time: float | None, op: str = "threshold_linear", batch: int = 1
    ) -> dict[str, Any]:
        return dict(zip(KEYS, [op, case, batch, density, time, 4.0, None, "cuBLAS", 20.0, 1e-3], strict=True))

    def shown(*records: dict[str, Any]) -> list[str]:
        place = list(results.COLUMNS).index("speed-up over\nfaster dense")
        return [line[place] for line in results._body(records)]

    sparse = row("m qkv", 0.5, 8.0)
    assert shown(sparse, row("m qkv", 1.0, 16.0)) == ["2.00 (own, 16.0)", "1.00 (own, 16.0)"]
    assert shown(sparse, row("m qkv, stored by output", 1.0, 12.0), row("m qkv", 1.0, 16.0))[0] == "1.50 (own, 12.0)"
    others = row("m o", 1.0, 9.0), row("m qkv", 1.0, 9.0, batch=2), row("m qkv", 1.0, 9.0, op="input_linear")
    assert shown(sparse, row("m qkv", 1.0, 25.0), row("m qkv", 1.0, None), *others) == [
        "2.50", "0.80", "–", "2.22", "2.22", "2.22"
    ]  # fmt: skip
    assert shown(row("h, context 512", 1.0, 10.0), row("h, context 4096", 0.5, 10.0)) == ["2.00", "2.00"]
    assert results.sums([sparse, row("m qkv, stored by output", 1.0, 12.0)])[0].count("1.50 (own, 12.0)") == 1
    assert list(sparse) == KEYS


def test_check_sees_drift_and_rebuild_mends_it(tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["bench", "kernels", "--check", "--out", out]) == 2
    assert "has no kernel records" in capsys.readouterr().err
    run([product()], tmp_path)
    page = tmp_path / "out" / results.PAGE
    assert cli.main(["bench", "kernels", "--check", "--out", out]) == 0
    page.write_text(page.read_text().replace("tiny", "huge"))
    capsys.readouterr()
    assert cli.main(["bench", "kernels", "--check", "--out", out]) == 1
    assert f"--rebuild --out {out}`" in capsys.readouterr().out and "huge" in page.read_text()
    assert cli.main(["bench", "kernels", "--rebuild", "--out", out]) == 0
    assert cli.main(["bench", "kernels", "--check", "--out", out]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--op", "input_liner"], "did you mean input_linear"),
        (["--op", "compact,,nothing-like-it"], "choose from"),
        (["--op", ","], "--op is empty"),
        (["--model-shapes", "llama2-7"], "has no shapes"),
        (["--model-shapes", "reference"], "has no shapes"),
    ],
)
def test_wrong_usage(arguments: list[str], expected: str, capsys: Capture) -> None:
    assert cli.main(["bench", "kernels", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels", "--json", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torch finds none here: run this on a machine that has one" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_a_path_that_cannot_be_written(option: str, monkeypatch: Any, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "kernels", option, str(tmp_path / "file" / "x")]) == 2
    assert f"choose another {option}" in capsys.readouterr().err
