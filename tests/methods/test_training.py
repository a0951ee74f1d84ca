"""The shared training loop and the dense baseline that it makes."""

from __future__ import annotations

import inspect
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
from methods.registry import info, parse
from methods.shared import learning, training
from methods.shared import student as student_module
from methods.shared.student import Student, Tuning, checkpoint_file, dense_ffn
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


def test_the_scaler_of_gradients_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 as on a GPU: gradients that overflow are skipped and lower the scale, a few good ones raise it again."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    hub = training.accelerator()
    monkeypatch.setattr(hub, "native_amp", True)
    monkeypatch.setattr(hub.state, "_mixed_precision", "fp16")

    def run(place: Path | None, die_at: int | None = None, new: bool = True) -> tuple[list[float], torch.Tensor, Any]:
        if new:  # as in a process of its own
            monkeypatch.setattr(hub, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2))
        model, rows = line()
        seen: list[torch.Tensor] = []

        def loss(batch: torch.Tensor, done: float) -> torch.Tensor:
            if len(seen) == die_at:
                raise KeyboardInterrupt
            seen.append(model.weight.detach().clone())
            return (model(batch).float() - batch.sum(1, keepdim=True)).square().mean()

        how: Any = {"steps": 30, "batch": 8, "learning_rate": 0.05, "mixed": False, "divide": True}
        losses = train(model, rows, loss, checkpoint=place, **how)
        skipped = sum(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
        assert place is not None or (4 < skipped < 20 and torch.equal(seen[0], seen[1]))
        return losses, model.weight.detach(), hub.scaler.state_dict()

    straight = run(None)
    again = run(None, new=False)
    assert again[0] == straight[0] and again[2] == straight[2]
    for die_at in (1, 15):  # nothing learned yet, and much
        place = tmp_path / f"{die_at}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            run(place, die_at)
        resumed = run(place)
        assert resumed[0] == straight[0] and torch.equal(resumed[1], straight[1]) and resumed[2] == straight[2]


def test_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, each with half of every batch in two parts; and one goes on where two were interrupted."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    folders = [tmp_path / "ddp", tmp_path / "fsdp"]
    for folder in folders:
        folder.mkdir()
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    paths["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "2"
    subprocess.run([sys.executable, team.__file__, str(tmp_path)], env={**os.environ, **paths}, check=True, timeout=300)
    student, losses = team.tuned(None)
    before = Student(llama(), student.tuning, None, dense_ffn("relu")).state()
    for folder in folders:
        resumed, all_losses = team.tuned(folder)
        assert all_losses == pytest.approx(losses, rel=1e-4)
        ranks = [load_file(folder / f"rank{rank}") for rank in range(2)]
        assert all(torch.equal(ranks[0][name], value) for name, value in ranks[1].items())
        assert ranks[0].pop("losses").tolist() == pytest.approx(losses, rel=1e-4)
        for name, value in student.state().items():
            for other in (ranks[0][name], resumed.state()[name]):  # AdamW divides by the root of tiny squares
                assert (other - value).norm() <= 0.01 * (value - before[name]).norm() + 1e-6, (folder.name, name)


@pytest.mark.parametrize("asked", ["0", "-1", "some"])
def test_accelerate_is_told_a_number_of_parts(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", asked)
    with pytest.raises(UsageError, match=f"STEPS={asked} is not a number of parts: try 4"):
        training.accelerator.__wrapped__()


def test_students_process_a_batch_in_the_parts_that_accelerate_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of the whole batch; a rate of AdamW would hide a factor, a gradient that is clipped not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    rows: list[int] = []
    norms: list[list[float]] = []
    clip = training._Team.clip

    def clipped(team: Any, parameters: Any, norm: float) -> None:
        norms[-1].append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))
        clip(team, parameters, norm)

    monkeypatch.setattr(training._Team, "clip", clipped)
    for parts in (1, 3):
        monkeypatch.setattr(training.accelerator(), "gradient_accumulation_steps", parts)
        norms.append([])
        student = Student(llama(), Tuning(windows(12), 4, 1e-3, 0, lambda *a: None))

        def loss(ids: torch.Tensor, done: float, student: Student = student) -> torch.Tensor:
            rows.append(len(ids))
            return student.task_loss(ids)

        student.train(loss, 2, "test")
    assert rows == [4, 4] + 2 * [2, 1, 1] and norms[1] == pytest.approx(norms[0], rel=1e-4)
    monkeypatch.setattr(training.accelerator(), "gradient_accumulation_steps", 5)
    with pytest.raises(UsageError, match="fewer gradient accumulation steps"):
        student.train(loss, 2, "test")


def test_students_are_trained_in_the_precision_that_accelerate_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where nobody asks for anything; what is no student's does not listen."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    found: list[torch.dtype | None] = []

    def run(divide: bool) -> None:
        model, rows = line()

        def loss(batch: torch.Tensor, done: float) -> torch.Tensor:
            found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return model(batch).float().square().mean()

        train(model, rows, loss, steps=1, batch=8, learning_rate=0.1, divide=divide)

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    run(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    run(True)
    run(False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr(training.accelerator().state, "_mixed_precision", "fp16")
    run(True)
    assert found == [torch.bfloat16, None, torch.bfloat16, torch.float16]


def test_the_loss_of_held_out_windows_stops_training() -> None:
    """They are asked for the loss as it is at the end, all of them and without gradients; the best weights are kept."""
    model, rows, held_out = nn.Linear(1, 1, bias=False), torch.zeros(8, 1), torch.arange(1.0, 7.0)[:, None]
    nn.init.zeros_(model.weight)
    asked: list[torch.Tensor] = []

    def loss(batch: torch.Tensor, done: float) -> torch.Tensor:
        if not batch.any():
            return -model.weight.sum()  # which rises by the rate in every step
        assert done == 1.0 and not torch.is_grad_enabled()
        asked.append(batch)
        return (model.weight.sum() - 0.32).square()

    how: Any = {"batch": 3, "learning_rate": 0.1, "schedule": "constant", "warmup": 0.0, "mixed": False}
    losses = train(model, rows, loss, steps=50, held_out=held_out, patience=2, **how)
    assert len(losses) == 5 and float(model.weight) == pytest.approx(0.3)  # 0.4 and 0.5 are no better
    assert len(asked) == 2 * 5 and torch.equal(torch.cat(asked[:2]), held_out)


STOPPED = {
    "dense-finetuned": "dense-finetuned:steps={}:batch=4:lr=0.03",
    "lte": "lte:eta=1:stage1_steps=2:stage2_steps={}:batch=4:lr=0.03",
    "d2dmoe": "d2dmoe:steps={}:weight=0:batch=4:lr=0.03:windows=16:epochs=1",
    "moefication": "moefication:variant=relufied:relu_steps={}:batch=4:lr=0.03:windows=16:epochs=1",
}


@pytest.mark.parametrize("name", STOPPED)
def test_methods_that_fine_tune_stop_early_if_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random text is learned by heart, and what was held out then tells."""
    found: dict[str, Any] = {}

    def spy(model: nn.Module, windows: torch.Tensor, *args: Any, **options: Any) -> list[float]:
        found.setdefault(options["label"], (windows, options["held_out"]))
        return train(model, windows, *args, **options)

    monkeypatch.setattr(student_module, "train", spy)
    scarce = Data(windows(4), lambda n: windows(min(n, 80), seed=2), {"name": "scarce", "hash": "0"})
    density = None if parse(name).densities == (None,) else 0.5
    spec = STOPPED[name].format(40)
    (artifact,) = parse(f"{spec}:patience=1").prepare(llama(), scarce, [density])
    early = [note for note in artifact.manifest["notes"] if "stopped early" in note]
    assert len(early) == 1 and "of 40 steps" in early[0]
    steps = int(early[0].split(" of ")[0].split()[-1])
    read = {"lte": 2 * 4 * 64, "d2dmoe": 16 * 64, "moefication": 16 * 64}.get(name, 0)
    assert artifact.manifest["tokens"] == read + steps * 4 * 64
    learned, held_out = list(found.values())[-1]
    assert torch.equal(torch.cat([learned, held_out]), scarce.train(80)) and len(held_out) == 8
    with pytest.raises(UsageError, match=f"{name} needs .*patience (of at least|from) 0"):
        parse(f"{name}:patience=-1")


def test_what_is_said_of_fine_tuning_is_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's settings and when routers stop, in the words of d2dmoe; moefication refers to them."""
    found: dict[str, dict[str, Any]] = {}

    def spy(*args: Any, **options: Any) -> list[float]:
        given = inspect.signature(train).bind(*args, **options)
        given.apply_defaults()
        found[given.arguments["label"]] = given.arguments
        return train(*args, **options)

    monkeypatch.setattr(student_module, "train", spy)
    monkeypatch.setattr(learning, "train", spy)
    for spec in ("d2dmoe:steps=2", "moefication:variant=relufied:relu_steps=2"):
        list(parse(f"{spec}:batch=2:expert_size=8:windows=16:epochs=1").prepare(llama(), data(), [0.5]))
    tuned = found["d2dmoe sparsity"]
    names = ("schedule", "warmup", "weight_decay", "learning_rate")
    assert [tuned[n] for n in names] == [found["moefication with ReLU"][n] for n in names]
    betas = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).defaults["betas"]
    optimiser = f"AdamW with betas {betas} and weight decay {tuned['weight_decay']:g}"
    schedule = f"{100 * tuned['warmup']:g} % warm-up, then {tuned['schedule']} to zero"
    assert f"settings of LTE ({optimiser}, {schedule}" in info("d2dmoe").fidelity
    assert "settings that d2dmoe states" in info("moefication").fidelity
    for name in ("d2dmoe", "moefication"):
        assert f"after {found[f'{name} router 0']['patience']} epochs without a better one" in info(name).fidelity


def test_early_stopping_needs_text_to_hold_out() -> None:
    short = Data(windows(4), lambda n: windows(min(n, 90), seed=2), {"name": "short", "hash": "0"})
    with pytest.raises(UsageError, match="64 windows of training text, of 90: .*patience=0"):
        next(iter(parse("dense-finetuned:batch=64:patience=1").prepare(llama(), short, [None])))


def test_a_checkpoint_is_of_one_patience(tmp_path: Path) -> None:
    given = Data(data().calibration, data().train, data().corpus, str(tmp_path))
    methods = [parse(f"dense-finetuned:patience={patience}") for patience in (0, 1, 2)]
    assert len({checkpoint_file(given, method, llama(), "dense") for method in methods}) == 3


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
