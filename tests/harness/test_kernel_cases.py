"""The cases of the kernel benchmark: their shapes, their inputs, and that each passes its own check."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.kernel_bench import OPERATORS, attention, case, input_linear, measure
from harness.kernel_bench.case import Draw
from sparse_kernels.input_linear.launch import by_output

CPU = torch.device("cpu")


def test_every_operator_has_cases_and_no_two_are_the_same_row() -> None:
    found = case.cases(OPERATORS, case.SHAPES)
    assert list(dict.fromkeys(c.op for c in found)) == list(OPERATORS)
    rows = [(c.op, c.case, c.batch, c.density) for c in found]
    assert len(set(rows)) == len(rows)


def test_shapes() -> None:
    llama = case.shape("llama3.1-8b")
    assert llama.linears() == {
        "qkv": (4096, [4096, 1024, 1024]),
        "o": (4096, [4096]),
        "gate+up": (4096, [14336, 14336]),
        "down": (14336, [4096]),
    }
    opt = case.shape("opt-6.7b")
    assert opt.biased and opt.linears()["fc1"] == (4096, [16384]) and opt.activation == "relu"


def test_drawn_values_pass_the_threshold_exactly_where_they_should() -> None:
    draw = Draw(CPU, torch.bfloat16, 1)
    mask = draw.mask(3, 1000, 0.2)
    values = draw.values(mask)
    assert mask.sum(1).tolist() == [200] * 3 and torch.equal(values.abs() > draw.one(), mask) and values.all()
    assert torch.equal(Draw(CPU, torch.bfloat16, 1).mask(3, 1000, 0.2), mask)
    assert not torch.equal(Draw(CPU, torch.bfloat16, 2).mask(3, 1000, 0.2), mask)


SMALL = [
    dataclasses.replace(case.shape(name), hidden=128, neurons=256, heads=4, kv_heads=kv, head_dim=32)
    for name, kv in (("llama2-7b", 4), ("llama3.1-8b", 2), ("opt-6.7b", 4))
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_passes_its_own_check_on_small_shapes(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the operators run their definitions, so this checks the cases: inputs, results and references."""
    shapes = {shape.name: shape for shape in SMALL}
    monkeypatch.setattr(case, "shape", shapes.get)
    monkeypatch.setattr(attention, "CONTEXTS", ((1, 40), (3, 20)))
    monkeypatch.setattr(attention, "GROUPED_CONTEXTS", ((3, 20),))
    single = measure.Setting(CPU, torch.float32, bandwidth=1e10, copies=2, cold=0, rounds=1, replays=1)
    for found in case.cases([operator], shapes):
        record, problem = measure.measure(found, single)
        assert problem is None, f"{found.label}: {problem}"
        assert record["limit_us"] > 0 and (record["baseline_us"] is None) == (found.baseline is None)


def test_whole_weights_are_timed_as_a_dense_model_stores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given, threshold_linear = [], input_linear.threshold_linear
    monkeypatch.setattr(
        input_linear, "threshold_linear", lambda *args, **kw: given.append(args[1]) or threshold_linear(*args, **kw)
    )
    found = [c for c in input_linear.cases(SMALL[0]) if c.op == "threshold_linear" and c.density == 1]
    for timed in found:
        timed.build(Draw(CPU, torch.float32, 1)).run()
    stored = [input_linear.STORED in timed.case for timed in found]
    assert any(stored) and [by_output(weight_t) for weight_t in given] == stored
