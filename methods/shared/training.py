"""The training loop every trained method uses: same optimiser, same schedule, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from ..base import Progress, silent

CHECKPOINT_SECONDS = 60.0


def train(
    model: nn.Module,
    windows: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    warmup: float = 0.06,
    seed: int = 0,
    label: str = "training",
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[float]:
    """Minimises `loss(windows of one batch)` over the parameters of `model` that require gradients.

    AdamW (0.9, 0.999), no weight decay, gradient clipping at 1.0, linear warm-up then linear decay to zero: the
    defaults of the transformers Trainer, which the LTE paper builds on. Mixed bfloat16 where the hardware has it, else
    float32.
    windows: int64 [n, window]; batch: windows per step. Returns the loss of every step. With `checkpoint`, the state
    is saved every minute and at the end, and a later call with the same arguments goes on from there.
    """
    device = next(model.parameters()).device
    mixed = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda")
    rising = max(1, round(warmup * steps))
    state = _State(checkpoint, {"steps": steps, "batch": batch, "lr": learning_rate, "seed": seed})
    losses = state.load(trained, optimiser)
    saved = perf_counter()
    history = [torch.tensor(value) for value in losses]
    for step in range(len(losses), steps):
        # Drawn from (seed, step) alone, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(windows), (batch,), generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            value = loss(windows[rows].to(device))
        value.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((step + 1) / rising, (steps - step) / max(1, steps - rising))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        history.append(value.detach())
        if step % 10 == 9 or step + 1 == steps:
            progress(f"{label}, loss {float(history[-1]):.3f}", step + 1, steps)
        if perf_counter() - saved > CHECKPOINT_SECONDS:
            state.save(trained, optimiser, history)
            saved = perf_counter()
    if len(losses) < steps:
        state.save(trained, optimiser, history)
    return [float(value) for value in history]


class _State:
    """One safetensors file: parameters, both moments of AdamW, and the losses so far; replaced atomically."""

    def __init__(self, path: Path | None, identity: dict[str, float]) -> None:
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)

    def load(self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> list[float]:
        if self.path is None or not self.path.exists():
            return []
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            header = file.metadata()
            if header["identity"] != self.identity:
                return []
            losses: list[float] = json.loads(header["losses"])
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(file.get_tensor(name))
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(len(losses)), device=parameter.device),
                        "exp_avg": file.get_tensor(f"{name}.m").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"{name}.v").to(parameter.device),
                    }
        return losses

    def save(self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, history: list[Tensor]) -> None:
        if self.path is None:
            return
        from safetensors.torch import save_file

        tensors = {}
        for name, parameter in trained.items():
            moments = optimiser.state[parameter]
            tensors[name] = parameter.detach()
            tensors[f"{name}.m"], tensors[f"{name}.v"] = moments["exp_avg"], moments["exp_avg_sq"]
        header = {"identity": self.identity, "losses": json.dumps([float(v) for v in history])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, scratch, metadata=header)
        os.replace(scratch, self.path)
