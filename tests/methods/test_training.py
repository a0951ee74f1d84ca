"""The shared training loop and the dense baseline that it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from methods import UsageError, sparsify
from methods.base import Data
from methods.registry import parse
from methods.shared import training
from methods.shared.student import Student, dense_ffn
from methods.shared.training import SCHEDULES, train
from tests.methods import team
from tests.methods.models import data, llama, windows


def line(seed: int = 0) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(4, 1), torch.randn(64, 4)


def fit(model: nn.Linear, rows: torch.Tensor, **settings: Any) -> list[float]:
    def loss(batch: torch.Tensor, done: float) -> torch.Tensor:
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    return train(model, rows, loss, **{"steps": 20, "batch": 8, "learning_rate": 0.05, "mixed": False, **settings})


def test_accumulation_changes_memory_not_the_result() -> None:
    results = []
    for parts in (1, 4, 3):  # 3 does not divide 8
        model, rows = line()
        losses = fit(model, rows, accumulate=parts)
        results.append((losses, model.weight.detach()))
    for losses, weight in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4) and torch.allclose(weight, results[0][1], atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_and_the_loss_with_them(schedule: str) -> None:
    left = [SCHEDULES[schedule](s) for s in (1.0, 0.7, 0.3, 0.0)]
    assert left == sorted(left, reverse=True) and left[0] == 1.0 and left[-1] == (schedule == "constant")
    losses = fit(*line(), schedule=schedule, steps=60)
    assert losses[-1] < 0.3 * losses[0]


def test_the_best_parameters_are_kept_and_training_stops() -> None:
    model, rows = line()
    answers, seen = iter([3.0, 1.0, 2.0, 2.0, 2.0, 0.0]), []

    def validate() -> float:
        seen.append(model.weight.detach().clone())
        return next(answers)

    losses = fit(model, rows, validate=validate, every=2, patience=3)
    assert len(losses) == 10 and len(seen) == 5  # the sixth answer is never asked for
    assert torch.equal(model.weight, seen[1])


def test_early_stopping_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)

    def run(place: Path | None, die_at: int | None) -> tuple[list[float], torch.Tensor]:
        model, rows = line()
        asked = 0

        def validate() -> float:
            nonlocal asked
            asked += 1
            if asked == die_at:
                raise KeyboardInterrupt
            return float((model.weight - 0.3).square().sum())  # passed on the way to 1, and then left behind

        losses = fit(model, rows, validate=validate, patience=4, steps=200, schedule="constant", checkpoint=place)
        return losses, model.weight.detach()

    straight = run(None, None)
    assert 4 < len(straight[0]) < 200
    place = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(place, len(straight[0]) - 2)
    for resumed in (run(place, None), run(place, 1)):  # the second finds it finished, and asks nothing
        assert resumed[0] == pytest.approx(straight[0]) and torch.equal(resumed[1], straight[1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_train_what_one_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, each with half of every batch; and one goes on where two were interrupted."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", team.__file__, tmp_path, kind]
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], env={**os.environ, **paths}, check=True, timeout=300)
    student, losses = team.tuned(None)
    resumed, all_losses = team.tuned(tmp_path)
    assert all_losses == pytest.approx(losses, rel=1e-4)
    ranks = [load_file(tmp_path / f"rank{rank}") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], value) for name, value in ranks[1].items())
    assert ranks[0].pop("losses").tolist() == pytest.approx(losses, rel=1e-4)
    before = Student(llama(), student.tuning, None, dense_ffn("relu")).state()
    for name, value in student.state().items():
        for other in (ranks[0][name], resumed.state()[name]):  # AdamW divides by the root of tiny squares
            assert (other - value).norm() <= 0.01 * (value - before[name]).norm() + 1e-6, name


def test_more_processes_than_windows_are_refused() -> None:
    with pytest.raises(UsageError, match="larger batch"):
        fit(*line(), batch=2, accumulate=3)


def test_training_that_diverges_is_an_error() -> None:
    with pytest.raises(UsageError, match="smaller lr"):
        fit(*line(), learning_rate=1e30)


@pytest.mark.parametrize("spec", ["lte:eta=1:trials=1", "d2dmoe", "dense-finetuned", "moefication:variant=relufied"])
def test_too_little_text_is_said_before_anything_is_trained(spec: str) -> None:
    scarce = Data(windows(4), lambda n: windows(min(n, 20)), {"name": "scarce", "hash": "0"})
    method = parse(spec)
    density = None if method.densities == (None,) else 0.5
    with pytest.raises(UsageError, match="larger --corpus"):
        next(iter(method.prepare(llama(), scarce, [density])))


def test_text_that_repeats_is_told() -> None:
    short = Data(windows(4), lambda n: windows(min(n, 100)), {"name": "short", "hash": "0"})
    (artifact,) = parse("dense-finetuned:steps=30:batch=8").prepare(llama(), short, [None])
    assert artifact.manifest["notes"] == [
        "fine-tuned 2.4 times over 6400 tokens, because the corpus has no more of 15360"
    ]


def test_a_model_fine_tuned_dense_learns_and_costs_what_dense_does() -> None:
    model, ids = llama(), windows(4, seed=2)
    before = float(model(input_ids=ids, labels=ids).loss)
    (artifact,) = parse("dense-finetuned:steps=30:batch=4:lr=0.003").prepare(model, data(), [None])
    assert artifact.density is None and artifact.manifest["tokens"] == 30 * 4 * 64
    with sparsify(model, artifact) as handle:
        assert not handle.layers() and float(model(input_ids=ids, labels=ids).loss) < before - 0.2
    assert float(model(input_ids=ids, labels=ids).loss) == before
    assert parse("dense-finetuned").synthesize(model, None, ids).tensors == {}
