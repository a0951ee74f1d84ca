"""The example of docs/adding-a-method.md, taken from the page and used as somebody else's package would be."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cost
from harness.ls import methods as listed
from methods import load_artifact, sparsify
from methods.registry import info, names, parse
from tests.methods.models import MODELS, data, llama, windows

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution `ffn-input 0.1` whose entry point is the example."""
    site = tmp_path / "ffn_input-0.1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: ffn-input\nVersion: 0.1\n")
    (site / "entry_points.txt").write_text("[activation_sparsity.methods]\nffn-input = ffn_input:FfnInput\n")
    (tmp_path / "ffn_input.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffn_input", raising=False)


def test_it_is_short_and_torch_waits() -> None:
    code = example()
    assert len(code.splitlines()) <= 60 and max(map(len, code.splitlines())) <= 120
    at_start = {n.module for n in ast.parse(code).body if isinstance(n, ast.ImportFrom)}
    assert not {m for m in at_start if m and m.startswith(("torch", "sparse_kernels", "methods.shared"))}


def test_it_is_listed_with_its_origin() -> None:
    assert "ffn-input" in names() and info("ffn-input").origin == "ffn-input 0.1"
    assert [row["origin"] for row in listed() if row["name"] == "ffn-input"] == ["ffn-input 0.1"]
    assert parse("ffn-input:windows=4").options.windows == 4


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_it_prepares_and_attaches(make: Any, tmp_path: Path) -> None:
    model, ids = make(), windows(4)
    before, shape = model(input_ids=ids).logits, cost.Shape.of(model)
    found = []
    for artifact in parse("ffn-input").prepare(model, data(), [0.7, 0.4]):
        loaded = load_artifact(str(artifact.save_pretrained(tmp_path / f"{artifact.density}")))
        assert loaded.manifest["tokens"] == data().calibration.numel() and loaded.manifest["corpus"]
        with sparsify(model, loaded, "all") as handle, handle.meter.on():
            assert not torch.equal(model(input_ids=ids).logits, before)
        costs, density = cost.record(handle, shape, 32, 1)
        assert density and set(density["sites"]) <= {"gate", "up", "down"}
        assert density["sites"]["up"]["mean"] == pytest.approx(artifact.density, abs=0.05)
        found.append(costs["decode"]["flops"] / costs["decode"]["flops_dense"])
    assert 1 > found[0] > found[1]
    assert torch.equal(model(input_ids=ids).logits, before)


def test_it_works_on_random_weights() -> None:
    model = llama()
    artifact = parse("ffn-input").synthesize(model, 0.5, windows(4))
    with sparsify(model, artifact, "all") as handle:
        model(input_ids=windows(1))
    assert len(handle.layers()) == 2 * 3
