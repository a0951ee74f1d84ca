"""The whole way from the command line to a leaderboard, on a small local model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import cli, fidelity, latency, machine, store, workers
from harness.cells import measure
from harness.plan import add_run_arguments, build_plan
from methods import load_artifact

METHODS = "teal:allocation=uniform,lte:stage1_steps=2:stage2_steps=1:trials=1:batch=2"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of random weights with its own tokenizer, saved as transformers saves models."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(self):\n    return self\n"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(fast), max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.getbasetemp() / "artifact-cache"  # one for the module: artifacts are made once
    monkeypatch.setenv("ACTIVATION_SPARSITY_CACHE", str(base))


def command(model: str, out: Path, *more: str) -> list[str]:
    return ["run", "--model", model, "--methods", METHODS, "--limit", "8", "--out", str(out), *more]


def by_method(out: Path) -> dict[str, dict[str, Any]]:
    return {f"{r['cell']['method']} {r['cell']['density']}": r for r in store.load(out)}


def test_a_run_ends_in_a_leaderboard(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(model, tmp_path, "--tasks", "stdlib_identifier")) == 0
    found = by_method(tmp_path)
    assert list(found) == ["dense None", "null None", "teal 0.7", "teal 0.5", "lte 0.7", "lte 0.5"]
    assert {record["status"] for record in found.values()} == {"ok"}
    dense, null, teal = found["dense None"], found["null None"], found["teal 0.5"]
    assert null["cost"] == dense["cost"] and null["items"]["nll"] == dense["items"]["nll"]
    assert null["items"]["stdlib_identifier"] == dense["items"]["stdlib_identifier"]
    assert (
        abs(teal["density"]["model"] - 0.5) < 0.06
        and teal["cost"]["decode"]["bytes"] < dense["cost"]["decode"]["bytes"]
    )
    assert found["lte 0.5"]["cost"]["decode"]["flops_overhead"] > 0 and found["lte 0.5"]["prepare"]["tokens"] > 0
    for record in found.values():
        assert record["latency"]["path"] == "cpu-reference" and len(record["items"]["nll"]) == 8
        assert record["corpus"]["hash"] and record["machine"]["identity"] and record["source"]
    page = (tmp_path / "LEADERBOARD.md").read_text()
    assert "teal" in page and "not ranked" in page and (tmp_path / "pareto.png").stat().st_size > 1000
    assert "lte" in capsys.readouterr().out
    assert cli.main(["report", "--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "LEADERBOARD.md").write_text(page.replace("teal", "real"))
    assert cli.main(["report", "--check", "--out", str(tmp_path)]) == 1


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


def test_no_cell_is_measured_where_the_last_model_exceeds_the_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(f"{model},llama2-70b", tmp_path, "--weights", "synthetic", "--device", "cpu")
    arguments[4] = "teal:allocation=uniform"
    monkeypatch.setattr(os, "sysconf", lambda name: 2**15)
    assert cli.main(arguments) == 2 and not store.load(tmp_path)
    assert "error: llama2-70b needs 257.0 GiB in float32" in capsys.readouterr().err


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


def test_modes_batches_and_contexts_multiply_into_cells(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quality is measured once for all batches and contexts, dense runners are built once for all methods and modes."""
    evaluated, built = [], []
    fidelity_measure, bench = fidelity.measure, latency.Bench
    monkeypatch.setattr(fidelity, "measure", lambda *a: evaluated.append(a) or fidelity_measure(*a))
    monkeypatch.setattr(latency, "Bench", lambda *a: built.append(a) or bench(*a))
    arguments = command(
        model, tmp_path, "--tasks", "none", "--mode", "decode,all", "--batch", "1,2", "--context", "16,32"
    )
    arguments[4] = "teal:allocation=uniform"
    assert cli.main([*arguments, "--density", "0.5"]) == 0
    records = store.load(tmp_path)
    cells = {(r["cell"]["mode"], r["cell"]["batch"], r["cell"]["context"]) for r in records}
    assert len(evaluated) == 3 * 2 and len(built) == 4
    assert len(cells) == 8 and len(records) == 8 * 3
    teal = [r for r in records if r["cell"]["method"] == "teal"]
    for record in teal:
        density = record["density"]
        assert (density["union"] is not None) == (record["cell"]["batch"] == 2)
        if density["union"] is not None:
            assert density["union"] >= density["model"] - 0.1
    prefill = {r["cell"]["mode"]: r["cost"]["prefill"] for r in teal if r["cell"]["context"] == 32}
    assert prefill["decode"]["flops"] == prefill["decode"]["flops_dense"] > prefill["all"]["flops"]


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


def test_controls_have_no_latency_and_collapsed_routers_are_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = (
        "moefication:expert_size=8:windows=16:selector=oracle,"
        "moefication:expert_size=8:windows=16:epochs=1,dense-finetuned:steps=1:batch=2"
    )
    arguments = ["run", "--model", model, "--methods", methods, "--tasks", "none", "--limit", "8", "--batch", "2"]
    assert cli.main([*arguments, "--density", "0.125", "--out", str(tmp_path)]) == 0
    records = store.load(tmp_path)
    assert {r["status"] for r in records} == {"ok"} and len(records) == 5
    (oracle,) = [r for r in records if r["cell"]["options"].get("selector") == "oracle"]
    assert "median" not in oracle["latency"] and "speedup" not in oracle["latency"]
    assert oracle["density"]["union"] >= oracle["density"]["model"] and oracle["fidelity"]["perplexity"] > 1
    (tuned,) = [r for r in records if r["cell"]["method"] == "dense-finetuned"]
    assert tuned["density"] is None and tuned["cost"]["decode"]["flops"] == tuned["cost"]["decode"]["flops_dense"]
    warned = [text for r in records for text in r["artifact"]["manifest"].get("warnings") or ()]
    page, said = (tmp_path / "LEADERBOARD.md").read_text(), capsys.readouterr()
    assert all(text in page for text in warned) and (not warned or warned[0][:20] in said.err + said.out)


def test_a_width_that_experts_do_not_divide(tmp_path: Path, model: str) -> None:
    import shutil

    odd = tmp_path / "odd"
    shutil.copytree(model, odd)
    config = json.loads((odd / "config.json").read_text()) | {"intermediate_size": 44}
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})).save_pretrained(odd)
    out = tmp_path / "out"
    methods = "lte,teal,moefication,d2dmoe"
    arguments = ["run", "--model", str(odd), "--methods", methods, "--tasks", "none", "--limit", "8", "--out", str(out)]
    assert cli.main([*arguments, "--density", "0.5"]) == 0
    found = by_method(out)
    for name in ("lte", "moefication", "d2dmoe"):
        assert found[f"{name} 0.5"]["status"] == "not-applicable" and "44" in found[f"{name} 0.5"]["error"]
    assert found["teal 0.5"]["status"] == "ok"


def test_prepare_saves_an_artifact_that_others_load(model: str, tmp_path: Path) -> None:
    arguments = ["prepare", "--model", model, "--methods", "teal:allocation=uniform", "--density", "0.5"]
    assert cli.main([*arguments, "--save", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("*/teal-0.5")
    artifact = load_artifact(str(folder))
    assert artifact.method == "teal" and artifact.density == 0.5 and artifact.manifest["corpus"]["name"] == "stdlib"


def test_artifacts_are_saved_beside_each_other(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    two = "teal:allocation=uniform,teal:windows=8:allocation=uniform,null"
    arguments = ["prepare", "--model", model, "--methods", two, "--density", "0.5,0.6"]
    assert cli.main([*arguments, "--save", "~/kept"]) == 0
    found = {
        folder.name: load_artifact(f"~/kept/{Path(model).name}/{folder.name}") for folder in tmp_path.glob("kept/*/*")
    }
    expected = {
        f"teal-{options}-{d}" for options in ("allocation=uniform", "windows=8-allocation=uniform") for d in (0.5, 0.6)
    }
    assert set(found) == expected and len({artifact.hash for artifact in found.values()}) == 4
    capsys.readouterr()
    assert cli.main([*arguments[:-1], "0.5,0.50000001", "--save", str(tmp_path)]) == 2
    assert "2 artifacts would be saved as" in capsys.readouterr().err


@pytest.mark.parametrize("blocked", ["kept", "kept/model", "kept/model/teal-0.5"])
def test_folders_that_take_no_artifact_are_found_before_the_model_is_loaded(
    model: str, blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness import models

    file = tmp_path / blocked.replace("model", Path(model).name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    arguments = ["prepare", "--model", model, "--methods", "teal", "--density", "0.5", "--save", str(tmp_path / "kept")]
    assert cli.main(arguments) == 2
    assert "choose another --save" in capsys.readouterr().err


def test_quality_without_latency_is_a_cell_of_its_own(model: str, tmp_path: Path) -> None:
    asked = command(model, tmp_path, "--tasks", "none", "--density", "0.5")
    assert cli.main([*asked, "--no-latency"]) == 0
    untimed = store.load(tmp_path)
    assert all(r["latency"] == {} and r["cost"]["decode"] and r["cell"]["timed"] is False for r in untimed)
    assert cli.main(asked) == 0  # not done already
    timed = [r for r in store.load(tmp_path) if r["latency"]]
    assert len(timed) == len(untimed) and all("timed" not in r["cell"] for r in timed)
    assert [r["fidelity"] for r in timed] == [r["fidelity"] for r in untimed]


def test_synthetic_weights_never_have_an_accuracy(model: str, tmp_path: Path) -> None:
    arguments = ["run", "--model", model, "--methods", "teal,lte", "--weights", "synthetic", "--density", "0.5"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    for record in store.load(tmp_path):
        assert record["fidelity"] is None and record["accuracy"] == {} and record["items"] == {}
        assert record["cell"]["weights"] == "synthetic" and record["latency"]["median"] > 0
    page = (tmp_path / "LEADERBOARD.md").read_text()
    assert "erplexity" not in page.split("## How to read this")[1].split("## ", 1)[1]
    found = by_method(tmp_path)
    assert found["lte 0.5"]["density"]["sites"]["ffn"]["mean"] == pytest.approx(0.5, abs=0.1)
    timed = found["teal 0.5"]["latency"]["step"]["density"]
    assert (found["teal 0.5"]["density"]["model"], timed) == pytest.approx((0.5, 0.5), abs=0.03)


def test_an_unwritable_folder_is_found_before_any_work(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    assert cli.main(command(model, place / "out")) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_decode_step_that_computes_something_else_has_no_numbers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stale or wrong results of the timed path must not reach the table."""
    from sparse_kernels.layers import SparseLinear

    honest = SparseLinear.forward

    def stale(self: SparseLinear, x: Any) -> Any:
        y = honest(self, x)
        if self.phase.active is not True:
            return y
        if getattr(self, "cached", y).shape != y.shape:
            del self.cached
        self.cached = getattr(self, "cached", y)  # a cache that outlives its step
        return self.cached

    monkeypatch.setattr(SparseLinear, "forward", stale)
    assert cli.main(command(model, tmp_path, "--tasks", "none", "--density", "0.5")) == 1
    found = by_method(tmp_path)
    assert found["null None"]["status"] == "failed" and "nats per token" in found["null None"]["error"]
    assert "latency" not in found["null None"] and found["lte 0.5"]["status"] == "ok"


def test_a_wrong_or_damaged_artifact_ends_the_run_before_it_measures(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACTIVATION_SPARSITY_CACHE", str(tmp_path / "cache"))
    arguments = command(model, tmp_path / "out", "--tasks", "none", "--density", "0.5")
    arguments[4] = "teal:allocation=uniform"
    assert cli.main(arguments) == 0
    (file,) = (tmp_path / "cache" / "artifacts").glob("teal-*/sparsity.safetensors")
    whole = load_artifact(str(file.parent))
    dataclasses.replace(whole, model="0" * 16).save_pretrained(file.parent)  # as of another revision of the model
    before = store.load(tmp_path / "out")
    capsys.readouterr()
    assert cli.main([*arguments, "--force"]) == 2
    assert f"belongs to weights {'0' * 16}, this model has {whole.model}: run" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-4])
    assert cli.main([*arguments, "--force"]) == 2
    assert "harness prepare --force" in capsys.readouterr().err
    assert store.load(tmp_path / "out") == before


def test_tasks_without_their_data_end_the_run_before_it_measures(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "lost.yaml"
    task.write_text(
        f"task: lost\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/lost.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{a}}'\ndoc_to_target: '{{b}}'\n"
    )
    assert cli.main(command(model, tmp_path / "out", "--tasks", str(task))) == 2
    assert "cannot load the data of task" in capsys.readouterr().err
    assert store.load(tmp_path / "out") == []


def test_measuring_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", "--methods", "teal"]) == 2
