"""Plans: lists multiply, baselines come first, keys name what decides a result, mistakes are found before work."""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import cli, latency, plan, session, store, workers
from harness.plan import Cell
from methods import families
from methods.errors import UsageError
from tests.harness.fabricated import record

SYNTHETIC = ["--model", "opt-125m", "--weights", "synthetic", "--device", "cpu"]


def args(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_run_arguments(parser)
    return parser.parse_args([*SYNTHETIC, *arguments])


def cells(*arguments: str) -> list[Cell]:
    return plan.build_plan(args(*arguments))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=512)).save_pretrained(place)
    return str(place)


def test_defaults_make_a_default_run() -> None:
    parser = argparse.ArgumentParser()
    plan.add_run_arguments(parser)
    chosen = parser.parse_args([])
    assert (chosen.methods, chosen.model, chosen.mode, chosen.batch) == ("lte,teal", "reference", "decode", "1")
    assert (chosen.out, chosen.corpus, chosen.seed, chosen.limit) == ("results/local", "stdlib", "0", None)


def test_seeds_multiply_and_processes_share_what_is_not_timed() -> None:
    made = cells("--methods", "teal", "--density", "0.5", "--seed", "0,2", "--no-latency", "--workers", "3")
    assert [cell.seed for cell in made] == [0] * 3 + [2] * 3
    assert [len(share) for share in workers.shares(made)] == [2, 2, 1, 1]
    assert {cell.method for cell in workers.shares(made)[0]} == {"dense", "null"}
    with pytest.raises(UsageError, match="--no-latency"):
        cells("--workers", "2")
    with pytest.raises(UsageError, match="-1"):
        cells("--seed=-1")


def test_a_batch_is_not_charged_without_its_steps() -> None:
    with pytest.raises(UsageError, match="drop --no-latency or --batch"):
        cells("--methods", "teal", "--no-latency", "--batch", "1,8")
    assert {cell.batch for cell in cells("--methods", "teal", "--no-latency", "--batch", "1")} == {1}


def test_lists_multiply_and_baselines_come_first() -> None:
    made = cells("--methods", "teal", "--density", "0.3,0.5", "--batch", "1,8", "--mode", "decode,all")
    assert len(made) == 2 * 2 * (2 + 2)  # batches x modes x (dense, null, two densities)
    assert [(c.method, c.density) for c in made[:4]] == [("dense", None), ("null", None), ("teal", 0.3), ("teal", 0.5)]
    assert {(c.batch, c.mode) for c in made} == {(b, m) for b in (1, 8) for m in ("decode", "all")}
    assert len({c.cell_key("s", "m") for c in made}) == len(made)


def test_named_baselines_are_not_doubled() -> None:
    assert [c.method for c in cells("--methods", "null,dense")] == ["dense", "null"]


def test_all_methods() -> None:
    from methods import registry

    assert {c.method for c in cells("--methods", "all")} == set(registry.names())


def test_densities_default_to_the_methods_own() -> None:
    from methods import registry

    found = tuple(c.density for c in cells("--methods", "teal") if c.method == "teal")
    assert found == registry.info("teal").densities


def test_context_defaults_to_what_the_model_holds(tiny: str) -> None:
    local = ["--model", tiny, "--tasks", "none", "--methods", "dense"]
    assert {c.context for c in cells(*local)} == {384}
    assert {c.context for c in cells("--methods", "dense")} == {512}
    with pytest.raises(UsageError, match="512 positions"):
        cells(*local, "--context", "100,600")


def test_a_table_of_positions_leaves_room_for_the_steps(tiny: str) -> None:
    relu = ["--model", "reference-relu", "--weights", "real", "--methods", "dense", "--tasks", "none"]
    most = 512 - latency.ROOM
    for flags in ([], ["--no-latency", "--weights", "synthetic"]):
        assert {c.context for c in cells(*relu, *flags, "--context", str(most))} == {most}
        with pytest.raises(UsageError, match=f"give {most} or less"):
            cells(*relu, *flags, "--context", f"100,{most + 1}")
    assert {c.context for c in cells(*relu, "--no-latency", "--context", "512")} == {512}
    assert {c.context for c in cells("--model", tiny, "--methods", "dense", "--context", "512")} == {512}  # rotary


@pytest.mark.parametrize(("positions", "default"), [(1024, 512), (100, 100 - latency.ROOM), (latency.ROOM, None)])
def test_the_default_context_leaves_room_too(positions: int, default: int | None, tmp_path: Path) -> None:
    from transformers import OPTConfig

    OPTConfig(max_position_embeddings=positions).save_pretrained(tmp_path)
    small = ["--model", str(tmp_path), "--methods", "dense"]
    if default:
        assert {c.context for c in cells(*small)} == {default}
    else:
        with pytest.raises(UsageError, match="with --no-latency, or another model"):
            cells(*small)


def test_weights_kinds_and_tasks(tiny: str) -> None:
    (dense, *_) = cells("--model", tiny, "--weights", "real")
    assert dense.weights == "real" and dense.tasks == tuple(plan.OFFLINE_TASKS.split(","))
    synthetic = cells("--tasks", plan.OFFLINE_TASKS)
    assert all(c.weights == "synthetic" and c.tasks == () for c in synthetic)
    assert any("random weights" in note for note in plan.notes(synthetic))


def test_limits() -> None:
    assert [cells(*flags)[0].limit for flags in ([], ["--quick"], ["--quick", "--limit", "7"])] == [200, 40, 7]


def test_missing_weights_are_found_at_once(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    with pytest.raises(UsageError, match="no model.safetensors"):
        cells("--model", str(tmp_path), "--weights", "real")


def test_missing_corpus_is_found_at_once() -> None:
    with pytest.raises(UsageError, match="stdlib"):
        cells("--corpus", "sdtlib")


def test_not_applicable_cells_are_kept_unless_nothing_else_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from methods.teal import Teal

    monkeypatch.setattr(Teal, "modes", ("decode",))
    made = cells("--methods", "teal", "--mode", "decode,all", "--density", "0.5")
    reasons = {c.mode: c.not_applicable for c in made if c.method == "teal"}
    assert reasons["decode"] is None and "no mode 'all'" in str(reasons["all"])
    with pytest.raises(UsageError, match="teal cannot run here"):
        cells("--methods", "teal", "--mode", "all")
    assert any(c.not_applicable for c in cells("--methods", "teal,lte", "--mode", "all"))
    assert "not applicable because" in plan.describe(made)


def test_unknown_architecture_concerns_all_methods_but_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.LAYOUTS, "gemma3n_text")
    made = cells("--model", "gemma-3n-e2b", "--methods", "teal,lte")
    assert all((c.not_applicable is None) == (c.method == "dense") for c in made)


def test_cell_key_names_everything_that_decides_a_result() -> None:
    cell = cells("--methods", "teal", "--density", "0.5")[-1]
    key = cell.cell_key("source", "machine")
    other: dict[str, Any] = {
        "model": "x", "weights": "real", "method": "y", "options": {"a": 1}, "density": 0.4, "mode": "all", "batch": 2,
        "context": 9, "tasks": ("t",), "corpus": "c", "limit": 3, "seed": 5, "device": "cuda", "dtype": "float16",
        "timed": False, "files": "f",
    }  # fmt: skip
    assert set(other) == {f.name for f in dataclasses.fields(Cell)} - {"not_applicable"}
    keys = {dataclasses.replace(cell, **{name: value}).cell_key("source", "machine") for name, value in other.items()}
    keys |= {cell.cell_key("other", "machine"), cell.cell_key("source", "other")}
    assert len(keys) == len(other) + 2 and key not in keys
    assert dataclasses.replace(cell, not_applicable="why").cell_key("source", "machine") == key


def test_cell_key_does_not_depend_on_the_process() -> None:
    code = (
        "from harness.plan import Cell; options = {'b': 1, 'a': 'x'};"
        "cell = Cell('m', 'real', 'teal', options, 0.5, 'decode', 1, 512, ('t',), 'c', 9, 0, 'cpu', 'float32');"
        "print(cell.cell_key('s', 'm'))"
    )
    keys = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    same = Cell("m", "real", "teal", {"a": "x", "b": 1}, 0.5, "decode", 1, 512, ("t",), "c", 9, 0, "cpu", "float32")
    assert keys == {same.cell_key("s", "m") + "\n"}


def test_changed_local_files_have_other_keys(tiny: str, tmp_path: Path) -> None:
    """An hour later the same path may hold other weights, text or tasks."""
    folder, corpus, task = Path(shutil.copytree(tiny, tmp_path / "m")), tmp_path / "c.txt", tmp_path / "t.yaml"
    corpus.write_text("\n\n".join(f"paragraph {i}" for i in range(100)))
    task.write_text("task: t")

    def key() -> str:
        local = ["--model", str(folder), "--weights", "real", "--corpus", str(corpus), "--tasks", str(task)]
        return cells(*local, "--methods", "dense")[0].cell_key("s", "m")

    keys = [key(), key()]
    (folder / "README.md").write_text("describes it")
    keys.append(key())
    assert len(set(keys)) == 1
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    keys.append(key())
    corpus.write_text(corpus.read_text().replace("7", "8x"))
    keys.append(key())
    task.write_text("task: other")
    keys.append(key())
    assert len(set(keys)) == 4


@pytest.mark.parametrize("model", ["reference", "opt-125m"])
def test_named_models_corpora_and_tasks_have_no_files(model: str) -> None:
    weights = "real" if model == "reference" else "synthetic"
    cell = cells("--model", model, "--weights", weights, "--methods", "dense")[0]
    assert cell.files == "" and "files" not in cell.to_dict()
    content = json.dumps([cell.to_dict(), "s", "m"], sort_keys=True, separators=(",", ":"))
    assert cell.cell_key("s", "m") == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_cell_survives_json() -> None:
    cell = cells()[0]
    assert json.loads(json.dumps(cell.to_dict())) == cell.to_dict()
    assert hash(cell) == hash(dataclasses.replace(cell))


@pytest.mark.parametrize(
    "method, skipped",
    [
        ("lte", {"gate", "up", "down"}),
        ("polar", {"o"}),
        ("dejavu:parts=ffn", {"gate", "up", "down"}),
        ("dejavu:parts=heads", {"o"}),
        ("spark", {"up", "down"}),
        ("spark:variant=output", {"down"}),
        ("d2dmoe:projections=true", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("teal", {"q", "k", "v", "o", "gate", "up", "down"}),
    ],
)
def test_estimates_count_what_options_and_model_let_a_method_skip(method: str, skipped: set[str]) -> None:
    options = ["--weights", "synthetic", "--model", "llama2-7b", "--dtype", "bf16", "--context", "1"]
    parser = argparse.ArgumentParser()
    plan.add_run_arguments(parser)
    dense, _, cell = plan.build_plan(parser.parse_args(["--methods", method, "--density", "0.5", *options]))
    weights = {**dict.fromkeys("qkvo", 4096 * 4096), **dict.fromkeys(("gate", "up", "down"), 4096 * 11008)}
    whole, found = (float(session.estimate(c)["MB/token"]) for c in (dense, cell))
    saved = sum(weights[name] for name in skipped) * 32 * 2 * 0.5 / 1e6
    assert whole - found == pytest.approx(saved, abs=1)


def test_describe_shows_cells_and_estimates() -> None:
    made = cells("--methods", "teal:allocation=uniform", "--density", "0.5", "--batch", "1,8")
    text = plan.describe(made, [{"GFLOP/token": "1.23"}, *[None] * (len(made) - 1)])
    assert f"{len(made)} cells" in text and "1.23" in text and "allocation=uniform" in text and "GFLOP/token" in text
    assert "model opt-125m" in text and "batch" in text


def test_a_dry_run_tells_what_is_trained(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def training(out: Path, named: str, *more: str) -> list[list[str]]:
        """The training of each cell but dense and null."""
        arguments = ["run", "--dry-run", "--methods", "lte,teal", "--density", "0.5", "--device", "cpu"]
        assert cli.main([*arguments, "--model", named, "--out", str(out), *more]) == 0
        text = capsys.readouterr().out
        assert ("comes on top" in text) == ("training" in text.splitlines()[4])
        return [line.split()[6:] for line in text.splitlines() if line.startswith(("lte", "teal"))]

    assert training(tmp_path / "none", tiny) == [["6.14", "?"], ["-", "-"]]
    taken = record("lte", 0.6, model=tiny, dtype="float32", prepare={"seconds": 61.2, "tokens": 9, "device": "cpu"})
    for changes in ({}, {"prepare": {"seconds": 5.0, "tokens": 9, "device": "cuda"}}):
        store.append(tmp_path, taken | changes)
    store.append(tmp_path, record("lte", 0.5, model=tiny, options={"lr": 0.1}))
    assert training(tmp_path, tiny) == [["6.14", "61"], ["-", "-"]]
    assert training(tmp_path, "reference") == [[], []]  # its artifacts come with it
    assert training(tmp_path, "reference", "--seed", "1") == [["6.14", "?"], ["-", "-"]]
    assert training(tmp_path, tiny, "--weights", "synthetic") == [[], []]


def test_source_hash_sees_code_and_not_presentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("methods/a.py", "harness/plan.py", "harness/tables.py", "kernels/sparse_kernels/k.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    hashes = [plan.source_hash.__wrapped__()]
    for name in ("harness/tables.py", "methods/a.py", "harness/plan.py", "kernels/sparse_kernels/k.py"):
        (tmp_path / name).write_text("two")
        hashes.append(plan.source_hash.__wrapped__())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_git_state_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    assert plan.git_state() == {"commit": None, "dirty": None}


def test_machine_line_and_identity() -> None:
    from harness import machine

    described = machine.describe("cpu")
    assert described["gpu"] is None and described["identity"] == machine.identity("cpu")
    assert f"torch {described['torch']}" in machine.line(described, {"commit": "f" * 40, "dirty": True})
