"""What a run leaves for the next one: where it was stopped, what failed, what was measured already."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import accuracy, cli, machine, store, workers
from harness.cells import measure
from harness.plan import add_run_arguments, build_plan
from tests.harness.small_run import by_method, command

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_killed_run_loses_nothing_and_repeats_nothing(model: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "harness", *command(model, tmp_path, "--tasks", "none")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "records.jsonl").exists() or len(store.load(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key": "torn')  # what a kill in the middle of a write leaves
    before = [r["key"] for r in store.load(tmp_path)]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    keys = [r["key"] for r in store.load(tmp_path)]
    assert keys[: len(before)] == before and len(keys) == len(set(keys)) == 6
    again = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    assert "6 of 6 cells are done already" in again.stderr and [r["key"] for r in store.load(tmp_path)] == keys


def test_a_resumed_cell_equals_an_uninterrupted_one(model: str, tmp_path: Path) -> None:
    """KL and agreement need the dense model's outputs, which a resumed run has to make again."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    cells = build_plan(parser.parse_args(command(model, tmp_path, "--tasks", "none")[1:]))
    whole = {r["cell"]["method"]: r for r in measure(cells, "source", "here")}
    alone = next(iter(measure([c for c in cells if c.method == "teal"][-1:], "source", "here")))
    for block in ("fidelity", "cost", "density", "items"):
        assert alone[block] == whole["teal"][block]


def test_processes_share_the_cells_without_latency(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In other processes and another order, the same numbers."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = ["--no-latency", "--tasks", "none", "--seed", "0,1", "--density", "0.5"]
    for out, number in ((alone, "1"), (shared, "2")):
        arguments = command(model, out, *more, "--workers", number)
        arguments[4] = "teal:allocation=uniform"
        assert cli.main(arguments) == 0
    assert "[6/6]" in capsys.readouterr().err
    expected, found = ({r["key"]: r for r in store.load(out)} for out in (alone, shared))
    assert found.keys() == expected.keys() and len(found) == 6
    assert {r["cell"]["seed"] for r in found.values()} == {0, 1}
    for key, record in found.items():
        assert record["status"] == "ok" and not record["latency"]
        assert record["fidelity"] == pytest.approx(expected[key]["fidelity"], rel=1e-4, abs=1e-6)
    assert (shared / "LEADERBOARD.md").is_file()


def test_a_process_tells_which_cells_failed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIVATION_SPARSITY_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("where a folder should be: nothing can be prepared")
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    arguments = command(model, tmp_path / "out", "--no-latency", "--tasks", "none")
    arguments[4] = "teal:allocation=uniform"
    cells = build_plan(parser.parse_args(arguments[1:]))
    threads = torch.get_num_threads()
    lost = workers._work(cells, str(tmp_path / "out"), "source", "here", threads)
    assert [text.split(" on ")[0] for text in lost] == [f"teal:allocation=uniform {d}" for d in (0.7, 0.5)]
    assert all("set ACTIVATION_SPARSITY_CACHE to another folder" in text for text in lost)
    status = {name: record["status"] for name, record in by_method(tmp_path / "out").items()}
    assert status == {"dense None": "ok", "null None": "ok", "teal 0.7": "failed", "teal 0.5": "failed"}


@pytest.mark.parametrize("lost", [False, True])
def test_a_failing_method_leaves_the_others_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: bool
) -> None:
    """Also where CUDA then fails every call of the process: they are measured by the next run, which tries it last."""
    from methods.teal import Teal

    def broken(self: Teal, attachment: Any) -> None:
        raise RuntimeError("a kernel that does not compile")

    monkeypatch.setattr(Teal, "attach", broken)
    monkeypatch.setattr(machine, "answers", lambda device: not lost)
    arguments = command(model, tmp_path, "--tasks", "none", "--density", "0.5")
    assert cli.main(arguments) == 1
    assert ("the same command goes on" in capsys.readouterr().err) == lost
    assert ("lte 0.5" in by_method(tmp_path)) != lost
    assert not lost or (cli.main(arguments) == 1 and store.load(tmp_path)[-1]["cell"]["method"] == "teal")
    found = by_method(tmp_path)
    assert found["teal 0.5"]["status"] == "failed" and "does not compile" in found["teal 0.5"]["error"]
    assert all(f"in {place}" in found["teal 0.5"]["traceback"] for place in ("_measure_cell", "broken"))
    assert found["lte 0.5"]["status"] == "ok"
    assert "does not compile" in (tmp_path / "LEADERBOARD.md").read_text()
    monkeypatch.undo()
    assert cli.main(arguments) == 0  # only the failed cell is tried again
    assert [r["status"] for r in store.load(tmp_path)].count("ok") == 4


def test_scores_that_are_there_are_not_measured_again(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the quality, by processes that share a GPU, then the times, by one that has it for itself."""
    scored = []
    evaluate = accuracy.evaluate
    monkeypatch.setattr(accuracy, "evaluate", lambda *a: scored.append(a) or evaluate(*a))
    arguments = command(model, tmp_path, "--tasks", "stdlib_identifier", "--density", "0.5")
    assert cli.main([*arguments, "--no-latency"]) == 0 and len(scored) == 4
    assert cli.main(arguments) == 0 and len(scored) == 4
    first, then = (by_method(tmp_path, timed) for timed in (False, True))
    assert list(first) == list(then) and all(record["latency"] for record in then.values())
    for name, record in then.items():
        before = first[name]
        assert record["scored_in"] == before["key"] and before["scored_in"] is None
        assert all(record[part] == before[part] for part in ("accuracy", "items", "fidelity", "density"))
    assert cli.main([*arguments, "--context", "16"]) == 0 and len(scored) == 4
    assert cli.main([*arguments, "--limit", "7"]) == 0 and len(scored) == 8
    assert cli.main([*arguments, "--force"]) == 0 and len(scored) == 12
