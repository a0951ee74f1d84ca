"""The training loop every trained method uses: same optimiser, same schedules, resumable.

It runs on accelerate: under `accelerate launch`, which decides on processes, precision and FSDP, every step's windows
are divided among the processes. Without, there is one process, and nothing of it is felt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base import Progress, silent
from ..errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    divide: bool = False,
    validate: Callable[[], float] | None = None,
    held_out: Tensor | None = None,
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
    windows: [n, ...], of any dtype; batch: windows per step, processed in `accumulate` parts; divide: among the
    processes, where there are several, instead of all of them in each, and in the precision that accelerate's
    configuration asks for, if there is one. Returns the loss of every step. `validate` (lower is better; by default the
    loss of the windows `held_out`, a multiple of the batch, as it is at the end of training) is asked every `every`
    steps; the best parameters it saw are those at the end, and training stops after `patience` answers that were no
    better (0: never), or at one below `goal`. With `checkpoint`, the state is
    saved every minute and at the end, and a later call with the same arguments goes on from there, to the same result.
    Raises UsageError when the loss is no longer finite.
    """
    device = next(model.parameters()).device
    team = _Team(divide)
    step_loss: nn.Module = _StepLoss(model, loss, mixed, team.precision)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    step_loss, optimiser = team.prepare(step_loss, optimiser)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # FSDP has put shards in their place
    rising = max(1, round(warmup * steps))
    best = _Best(trained, patience, goal)
    # Neither the processes nor their parts of a batch are in it: training may go on with others.
    identity = [steps, batch, learning_rate, seed, schedule, patience, goal, weight_decay]
    state = _State(checkpoint, json.dumps(identity), team.is_main, team.scaler)
    losses = state.load(trained, optimiser, best)
    saved, finished = perf_counter(), bool(losses) and (len(losses) == steps or best.given_up)
    history = [torch.tensor(value) for value in losses]
    if validate is None and held_out is not None:
        validate = partial(_validation, step_loss, held_out.to(device), batch, accumulate, team)
    for step in range(len(losses), steps):
        if best.given_up:
            break
        # Drawn from (seed, step) alone, so that a resumed run sees the same batches, on any number of processes.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(windows), (batch,), generator=generator)
        value = torch.zeros((), device=device)
        parts = team.share(rows, accumulate)
        for number, part in enumerate(parts):
            with nullcontext() if number + 1 == len(parts) else team.no_sync(step_loss):
                weighted = step_loss(windows[part].to(device), step / steps) * (len(part) / batch)
                team.backward(weighted)
            value += weighted.detach()
        team.clip(trained.values(), 1.0)
        left = SCHEDULES[schedule](min(1.0, (steps - step) / max(1, steps - rising)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((step + 1) / rising, left)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        history.append(team.total(value))
        if step % 10 == 9 or step + 1 == steps:
            if not math.isfinite(latest := float(history[-1])):
                raise UsageError(f"{label} diverged, its loss is {latest} after {step + 1} steps: try a smaller lr.")
            progress(f"{label}, loss {latest:.3f}", step + 1, steps)
        if validate is not None and ((step + 1) % every == 0 or step + 1 == steps):
            best.see(validate())
        if checkpoint is not None and team.agree(perf_counter() - saved > CHECKPOINT_SECONDS):
            state.save(trained, optimiser, best, history)
            saved = perf_counter()
    if not finished:
        state.save(trained, optimiser, best, history)
    best.restore()
    team.leave()
    return [float(value) for value in history]


@cache
def accelerator() -> Accelerator:
    """The process's one, as `accelerate launch` or its environment has configured it."""
    from accelerate import Accelerator

    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if not parts.isdecimal() or int(parts) < 1:
        raise UsageError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={parts} is not a number of parts: try 4.")
    found = Accelerator()
    if plugin := _fsdp(found):
        if plugin.fsdp_version != 2:
            raise UsageError("training is sharded by FSDP 2: set fsdp_version: 2 in accelerate's configuration.")
        plugin.cpu_ram_efficient_loading = False  # every process has read the weights
    return found


def sharded() -> bool:
    """Whether FSDP holds the parameters of a model in training."""
    return _fsdp(accelerator()) is not None


def _fsdp(hub: Accelerator) -> Any:
    return getattr(hub.state, "fsdp_plugin", None)


@cache
def _fresh(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """The state of accelerate's one gradient scaler as it was before the first training."""
    return scaler.state_dict()


def _precision(hub: Accelerator) -> torch.dtype:
    """As accelerate is configured, which reports "no" also where nobody has configured it: then bfloat16."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "no":
        return torch.float32
    return torch.float16 if hub.mixed_precision == "fp16" else torch.bfloat16


def whole(value: Tensor) -> Tensor:
    """A tensor of which FSDP may have left a shard here, complete; every process has to ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def agreed(value: float) -> float:
    """The first process's value, on all of them: what decides how training goes on."""
    return _Team(divide=True).agree(value)


@torch.no_grad()
def _validation(step_loss: nn.Module, windows: Tensor, batch: int, parts: int, team: _Team) -> float:
    total = torch.zeros((), device=windows.device)
    for rows in torch.arange(len(windows)).split(batch):
        for part in team.share(rows, parts):
            total += step_loss(windows[part], 1.0) * len(part)
    return float(team.total(total)) / len(windows)


class _StepLoss(nn.Module):
    """The loss of a batch as a module's forward: DDP and FSDP have to see it begin and end."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, float], Tensor], mixed: bool, precision: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.loss, self.mixed, self.precision = model, loss, mixed, precision
        self.blocks = list(getattr(model, "_no_split_modules", None) or ())  # what FSDP shards by

    def forward(self, windows: Tensor, done: float) -> Tensor:
        device = windows.device.type
        mixed = self.mixed and self.precision != torch.float32
        mixed = mixed and (device == "cuda" or torch.cpu._is_avx512_bf16_supported())
        with torch.autocast(device, self.precision, enabled=mixed):
            return self.loss(windows, done)


class _Team:
    """What the processes do together; alone, or where training is not divided, the plain thing."""

    def __init__(self, divide: bool) -> None:
        self.hub = accelerator()
        self.size = self.hub.num_processes if divide else 1
        self.divide = divide
        self.is_main = self.hub.is_main_process
        self.precision = _precision(self.hub) if divide else torch.bfloat16
        self.scaler: torch.amp.GradScaler | None = self.hub.scaler if divide else None

    def prepare(self, step_loss: nn.Module, optimiser: Any) -> tuple[nn.Module, Any]:
        if not self.divide:
            return step_loss, optimiser
        self.hub.free_memory()  # which an interrupted training may still hold
        if self.scaler is not None:  # each training begins alike, whatever came before it in this process
            self.scaler.load_state_dict(_fresh(self.scaler))
        if plugin := _fsdp(self.hub):
            plugin.transformer_cls_names_to_wrap = step_loss.blocks  # of this model, not of an earlier one
        prepared: tuple[nn.Module, Any] = self.hub.prepare(step_loss, optimiser, device_placement=[False, False])
        return prepared

    def share(self, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """This process's of a step's rows, in parts."""
        if len(rows) < self.size * parts:
            raise UsageError(
                f"{len(rows)} windows a step are too few for {self.size} processes with {parts} parts each: "
                "give a larger batch or fewer gradient accumulation steps."
            )
        return rows.tensor_split(self.size)[self.hub.process_index if self.size > 1 else 0].tensor_split(parts)

    def no_sync(self, step_loss: nn.Module) -> AbstractContextManager[Any]:
        return self.hub.no_sync(step_loss) if self.divide else nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self.divide:
            # Gradients are averaged over processes and divided by accelerate's number of parts; wanted is their sum.
            self.hub.backward(loss * self.size * self.hub.gradient_accumulation_steps)
        else:
            loss.backward()

    def clip(self, parameters: Any, norm: float) -> None:
        (self.hub if self.divide else nn.utils).clip_grad_norm_(list(parameters), norm)

    def total(self, value: Tensor) -> Tensor:
        return self.hub.reduce(value, "sum") if self.size > 1 else value

    def agree(self, value: Any) -> Any:
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def leave(self) -> None:
        if self.divide:
            self.hub.free_memory()
            self.hub.wait_for_everyone()


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
    """One safetensors file, replaced atomically: parameters, the best ones, AdamW's moments, the losses so far.

    Complete tensors, whatever is sharded, so that training goes on with any number of processes. With a scaler of
    float16 gradients, its state too, and how many of the steps it let AdamW take (none yet: there are no moments).
    """

    def __init__(
        self, path: Path | None, identity: str, writes: bool = True, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.path, self.identity, self.writes, self.scaler = path, identity, writes, scaler

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
            taken, scale = json.loads(header["taken"]), json.loads(header["scaler"])
            if self.scaler is not None and scale is not None:
                self.scaler.load_state_dict(scale)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(_like(parameter, file.get_tensor(name)))
                    if taken:
                        optimiser.state[parameter] = {
                            "step": torch.tensor(taken, device=parameter.device),
                            "exp_avg": _like(parameter, file.get_tensor(f"{name}.m")),
                            "exp_avg_sq": _like(parameter, file.get_tensor(f"{name}.v")),
                        }
                    if best.value < math.inf:
                        best.tensors[name] = _like(parameter, file.get_tensor(f"{name}.best"))
        return losses

    def save(
        self, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, best: _Best, history: list[Tensor]
    ) -> None:
        if self.path is None:
            return
        from safetensors.torch import save_file

        tensors = {f"{name}.best": tensor for name, tensor in best.tensors.items()}
        taken = 0.0
        for name, parameter in trained.items():
            tensors[name] = parameter.detach()
            if moments := optimiser.state.get(parameter):
                tensors[f"{name}.m"], tensors[f"{name}.v"] = moments["exp_avg"], moments["exp_avg_sq"]
                taken = float(moments["step"])
        complete = {name: whole(tensor).cpu().contiguous() for name, tensor in tensors.items()}
        if not self.writes:
            return
        header = {
            "identity": self.identity,
            "losses": json.dumps([float(v) for v in history]),
            "best": json.dumps([best.value, best.waited]),
            "taken": json.dumps(taken),
            "scaler": json.dumps(None if self.scaler is None else self.scaler.state_dict()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        save_file(complete, scratch, metadata=header)
        os.replace(scratch, self.path)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A complete value where and how its parameter is: moved, and sharded if that is."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
