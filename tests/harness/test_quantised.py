"""Weights in 8 bits come and go; torchao itself is optional, so most of this uses a stand-in."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from harness import latency, quantised
from methods import sparsify
from methods.registry import parse
from tests.harness.fabricated import record
from tests.harness.test_report import page
from tests.methods.models import llama, opt, windows


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchao that rounds weights to 8 bits, in place of the module's parameter as quantize_ puts them."""
    module: Any = ModuleType("torchao.quantization")

    def config(**options: bool) -> dict[str, bool]:
        return options

    def quantize_(model: torch.nn.Module, config: dict[str, bool], filter_fn: Any) -> None:
        assert config == {"set_inductor_config": False}  # else the other baselines would be compiled otherwise
        for name, child in model.named_modules():
            if filter_fn(child, name):
                scale = child.weight.abs().amax(1, keepdim=True) / 127
                child.weight = torch.nn.Parameter((child.weight / scale).round() * scale, requires_grad=False)

    module.Int8WeightOnlyConfig = module.Float8WeightOnlyConfig = config
    module.quantize_ = quantize_
    package: Any = ModuleType("torchao")
    package.quantization = module
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    monkeypatch.setattr(quantised, "version", lambda name: "0.0")


@pytest.mark.parametrize("kind", quantised.CONFIGS)
@pytest.mark.parametrize("make", [llama, opt])
def test_only_the_blocks_linears_change_and_the_model_comes_back(make: Any, kind: str, stand_in: None) -> None:
    model, tokens = make(), windows(1)
    own = dict(model.named_parameters())
    before = model(tokens).logits
    with quantised.in_8_bits(model, kind) as weights:
        changed = {name for name, p in model.named_parameters() if p is not own[name]}
        assert changed == {n for n in own if "layers" in n and n.endswith(("proj.weight", "fc1.weight", "fc2.weight"))}
        assert len(weights) == len(changed)
        error = (model(tokens).logits - before).norm() / before.norm()
    assert 1e-4 < error < 0.1 and torch.equal(model(tokens).logits, before)
    assert all(p is own[name] for name, p in model.named_parameters())


def test_real_torchao_keeps_eight_bits() -> None:
    pytest.importorskip("torchao")
    model, tokens = llama(), windows(1)
    before = model(tokens).logits
    for kind, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        with quantised.in_8_bits(model, kind) as weights:
            assert {weight.qdata.dtype for weight in weights} == {dtype}
            assert 1e-4 < (model(tokens).logits - before).norm() / before.norm() < 0.1
        assert torch.equal(model(tokens).logits, before)


def test_without_the_library_there_are_no_such_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quantised, "version", missing)
    assert quantised.library() is None
    bench = latency.Bench(llama(), windows(1, 8), None)
    assert bench._quantised() == [] and bench.notes == []


def test_they_take_part_in_every_round_but_not_in_the_speedup(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(latency.Bench, "_graph", lambda self, name, compiled, keep: self._eager(name))
    bench = latency.Bench(model, windows(1, 16), 1e7)
    bench.quantised = bench._quantised()
    step = {"density": 1.0, "bytes": 2000, "bytes_dense": 2000, "bytes_8bit": 1000}
    with sparsify(model, parse("null").artifact(model, None, {}, {})) as handle:
        found = bench.measure(handle, lambda: step, lambda text, steps, cache: 0.0, lambda a, b: None)
    assert list(found["quantised"]) == ["dense int8", "dense fp8"] and list(found["dense"]) == ["dense cpu"]
    assert found["baseline"] == "dense cpu"
    assert len(found["samples"]["dense int8"]) == len(found["samples"]["sparse cpu"])
    for beside in found["quantised"].values():
        assert beside["ci"][0] <= beside["speedup"] <= beside["ci"][1]
        assert beside["fraction_of_limit"] == pytest.approx(0.1 / beside["median"])


def test_a_kind_that_does_not_build_is_a_note(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.Bench, "_graph", lambda self, name, compiled, keep: 1 / 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bench = latency.Bench(llama(), windows(1, 8), None)
    assert bench._quantised() == [] and [note.split(":")[0] for note in bench.notes] == [
        "dense int8 unavailable", "dense fp8 unavailable",
    ]  # fmt: skip


def test_the_report_shows_them_beside_the_speedup() -> None:
    sparse = record("teal", 0.5)
    assert "int8" not in page([record(), sparse])
    sparse["latency"]["quantised"] = {"dense int8": {"median": 1.2, "speedup": 1.2, "ci": [1.1, 1.3]}}
    text = page([sparse])
    assert "beside it: over dense int8 [95 %]" in text and "1.200 [1.100, 1.300]" in text
    assert "dense int8 1.20 (weights in 8 bits, in no speed-up)" in text
