from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from methods import UsageError, sparsify
from methods.lte import LteOptions, _Student
from methods.registry import parse
from methods.shared.lora import SCALE, adapt
from methods.shared.student import Student, Tuning
from tests.methods.models import MODELS, data, llama, windows

RANK = 3
TUNING = Tuning(windows(16), batch=8, lr=0.01, seed=0, progress=lambda *a: None, lora_rank=RANK)


def test_an_update_starts_at_nothing_and_merges() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 7), torch.randn(5, 12)
    before, plain = linear.weight.detach().clone(), linear(x)
    adapt([linear], RANK, seed=0)
    assert torch.equal(linear(x), plain)
    update = linear.parametrizations["weight"][0]
    with torch.no_grad():
        update.b.normal_()
    merged = before + SCALE * update.b @ update.a
    assert torch.allclose(linear(x), x @ merged.t() + linear.bias) and torch.allclose(linear.weight, merged)
    with pytest.raises(ValueError, match="rank 8"):
        adapt([nn.Linear(12, 7)], 8, seed=0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_only_updates_and_routers_are_trained(make: Any) -> None:
    """By a change of exactly the rank in every linear layer of the blocks, and none in norms, biases, embeddings."""
    model = make()
    permutations = {f"permutation.{i}": torch.randperm(128).int() for i in range(2)}
    student = _Student(LteOptions(lora_rank=RANK), model, TUNING, permutations, None)
    started = {name: p.detach().clone() for name, p in student.student.parameters.items()}
    trained = {n.rpartition(".")[2] for n, p in student.student.model.named_parameters() if p.requires_grad}
    routers = [layer.selector.layers[0].detach().clone() for layer in student.layers]
    student.train_soft(1.0, 5, "stage 1", None)
    assert trained == {"a", "b", "0"}  # of updates, and the routers'
    for layer, before in zip(student.layers, routers, strict=True):
        assert not torch.equal(layer.selector.layers[0], before)
    for name, now in student.student.parameters.items():
        change, block = (now - started[name]).detach(), ".layers." in name and started[name].dim() == 2
        assert (torch.linalg.matrix_rank(change, atol=1e-5) == RANK) if block else not change.any(), name
    restored = _Student(LteOptions(lora_rank=RANK), model, TUNING, permutations, student.state())
    for name, now in restored.student.parameters.items():
        assert torch.equal(now, student.student.parameters[name])


def test_the_artifact_holds_the_merged_weights() -> None:
    model, ids = llama(), windows(2)
    method = parse(f"dense-finetuned:steps=20:batch=4:lr=0.01:lora_rank={RANK}")
    (artifact,) = method.prepare(model, data(), [None])
    student = Student(model, Tuning(data().train(80), 4, 0.01, 0, lambda *a: None, lora_rank=RANK))
    student.train(lambda windows, done: student.task_loss(windows), 20, "again")
    assert len([name for name in artifact.tensors if name.startswith("delta.")]) == 2 * 7
    with torch.no_grad(), sparsify(model, artifact):
        found = model(input_ids=ids).logits
    expected, base = student.model(input_ids=ids).logits, model(input_ids=ids).logits
    assert (found - expected).norm() < 0.02 * (expected - base).norm()


def test_lte_learns_its_density_with_updates_alone() -> None:
    model = llama()
    spec = f"lte:expert_size=8:stage1_steps=4:stage2_steps=2:batch=4:eta=1:lora_rank={RANK}"
    (artifact,) = parse(spec).prepare(model, data(), [0.5])
    assert artifact.options["lora_rank"] == RANK
    full = next(iter(parse(spec.replace(f":lora_rank={RANK}", "")).prepare(model, data(), [0.5])))
    assert artifact.manifest["lr"] == pytest.approx(10 * full.manifest["lr"])
    with pytest.raises(UsageError, match="lora_rank"):
        parse("lte:lora_rank=-1")
