"""The whole way from the command line to a leaderboard, on a small local model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from harness import cli, fidelity, latency, store
from methods import load_artifact
from tests.harness.small_run import by_method, command

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_no_cell_is_measured_where_the_last_model_exceeds_the_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(f"{model},llama2-70b", tmp_path, "--weights", "synthetic", "--device", "cpu")
    arguments[4] = "teal:allocation=uniform"
    monkeypatch.setattr(os, "sysconf", lambda name: 2**15)
    assert cli.main(arguments) == 2 and not store.load(tmp_path)
    assert "error: llama2-70b needs 257.0 GiB in float32" in capsys.readouterr().err


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
