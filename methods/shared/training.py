"""The training loop every trained method uses: same optimiser, same schedules, resumable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from ..base import Progress, silent
from ..errors import UsageError

CHECKPOINT_SECONDS = 60.0

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "constant": lambda left: 1.0,
}


def train(
    model: nn.Module,
    windows: Tensor,
    loss: Callable[[Tensor, float], Tensor],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    schedule: str = "linear",
    warmup: float = 0.06,
    accumulate: int = 1,
    mixed: bool = True,
    validate: Callable[[], float] | None = None,
    every: int = 1,
    patience: int = 0,
    goal: float = -math.inf,
    weight_decay: float = 0.0,
    seed: int = 0,
    label: str = "training",
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[float]:
    """Minimises `loss(windows of one batch, share of the steps done)` over the parameters that require gradients.

    AdamW (0.9, 0.999), gradient clipping at 1.0, by default no weight decay and linear warm-up, then linear decay to
    zero: the defaults of the transformers Trainer, which the LTE paper builds on. Mixed bfloat16 where the hardware has
    it, unless `mixed` is off.
    windows: [n, ...], of any dtype; batch: windows per step, processed in `accumulate` parts. Returns the loss of every
    step. `validate` (lower is better) is asked every `every` steps; the best parameters it saw are those at the end,
    and training stops after `patience` answers that were no better (0: never), or at one below `goal`. With
    `checkpoint`, the state is saved every minute and at the end, and a later call with the same arguments goes on from
    there, to the same result.
    """
    device = next(model.parameters()).device
    mixed = mixed and (device.type == "cuda" or torch.cpu._is_avx512_bf16_supported())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fused = device.type == "cuda"
    optimiser = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=weight_decay, fused=fused)
    rising = max(1, round(warmup * steps))
    best = _Best(trained, patience, goal)
    identity = [steps, batch, learning_rate, seed, schedule, accumulate, patience, goal, weight_decay]
    state = _State(checkpoint, json.dumps(identity))
    losses = state.load(trained, optimiser, best)
    saved, finished = perf_counter(), bool(losses) and (len(losses) == steps or best.given_up)
    history = [torch.tensor(value) for value in losses]
    for step in range(len(losses), steps):
        if best.given_up:
            break
        # Drawn from (seed, step) alone, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(windows), (batch,), generator=generator)
        value = torch.zeros((), device=device)
        for part in rows.chunk(accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                partial = loss(windows[part].to(device), step / steps) * (len(part) / batch)
            partial.backward()
            value += partial.detach()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        left = SCHEDULES[schedule](min(1.0, (steps - step) / max(1, steps - rising)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((step + 1) / rising, left)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        history.append(value)
        if step % 10 == 9 or step + 1 == steps:
            if not math.isfinite(latest := float(history[-1])):
                raise UsageError(f"{label} diverged, its loss is {latest} after {step + 1} steps: try a smaller lr.")
            progress(f"{label}, loss {latest:.3f}", step + 1, steps)
        if validate is not None and ((step + 1) % every == 0 or step + 1 == steps):
            best.see(validate())
        if perf_counter() - saved > CHECKPOINT_SECONDS:
            state.save(trained, optimiser, best, history)
            saved = perf_counter()
    if not finished:
        state.save(trained, optimiser, best, history)
    best.restore()
    return [float(value) for value in history]


class _Best:
    """The parameters with the lowest validation value so far, and how many later values were no lower."""

    def __init__(self, trained: dict[str, nn.Parameter], patience: int, goal: float) -> None:
        self.trained, self.patience, self.goal = trained, patience, goal
        self.value, self.waited = math.inf, 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def given_up(self) -> bool:
        return 0 < self.patience <= self.waited or self.value < self.goal

    def see(self, value: float) -> None:
        if value < self.value:
            self.value, self.waited = value, 0
            self.tensors = {name: p.detach().clone() for name, p in self.trained.items()}
        else:
            self.waited += 1

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self.tensors.items():
            self.trained[name].copy_(tensor)


class _State:
    """One safetensors file, replaced atomically: parameters, the best ones, AdamW's moments, the losses so far."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity

    def load(self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, best: _Best) -> list[float]:
        if self.path is None or not self.path.exists():
            return []
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            header = file.metadata()
            if header["identity"] != self.identity:
                return []
            losses: list[float] = json.loads(header["losses"])
            best.value, best.waited = json.loads(header["best"])
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(file.get_tensor(name))
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(len(losses)), device=parameter.device),
                        "exp_avg": file.get_tensor(f"{name}.m").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"{name}.v").to(parameter.device),
                    }
                    if best.value < math.inf:
                        best.tensors[name] = file.get_tensor(f"{name}.best").to(parameter.device)
        return losses

    def save(
        self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, best: _Best, history: list[Tensor]
    ) -> None:
        if self.path is None:
            return
        from safetensors.torch import save_file

        tensors = {f"{name}.best": tensor for name, tensor in best.tensors.items()}
        for name, parameter in trained.items():
            moments = optimiser.state[parameter]
            tensors[name] = parameter.detach()
            tensors[f"{name}.m"], tensors[f"{name}.v"] = moments["exp_avg"], moments["exp_avg_sq"]
        losses = json.dumps([float(v) for v in history])
        header = {"identity": self.identity, "losses": losses, "best": json.dumps([best.value, best.waited])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, scratch, metadata=header)
        os.replace(scratch, self.path)
