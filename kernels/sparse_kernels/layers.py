"""Modules that skip work: a linear layer that reads only the input channels it needs, and an FFN that reads only
the experts it needs.

Each has two paths with the same meaning. The *reference path* masks and then multiplies densely: any batch, any
length, differentiable, and it can treat some positions as dense and others as sparse. The *fast path* runs the
shared kernels and reads only what is active; it serves decode steps (few rows, every one of them sparse) on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import compact, expert_hidden, input_linear

FAST_ROWS = 64  # what the kernels take; a decode step of this many sequences is theirs, a prompt is not

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Phase:
    """Which positions of the forward pass now running are sparse; one object is shared by all layers of a model.

    `active` is False (dense), True (every position sparse) or a bool mask [B, T], True where a position is sparse.
    """

    def __init__(self) -> None:
        self.active: bool | Tensor = False


class Meter:
    """Counts active units per token, site and layer, at the positions that went through the sparse path.

    It only listens inside `with meter.on():`, so that timed steps carry no counting.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.counts: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.unions: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    @contextmanager
    def on(self) -> Iterator[Meter]:
        self.enabled = True
        try:
            yield self
        finally:
            self.enabled = False

    def reset(self) -> None:
        self.counts.clear()
        self.unions.clear()

    def add(self, key: tuple[str, int], keep: Tensor, active: bool | Tensor) -> None:
        """keep: bool [B, T, units]; counts the positions where `active`. One-position passes also give the union."""
        if not self.enabled:
            return
        counts = keep.sum(-1)
        if isinstance(active, Tensor):
            counts = counts[active.expand(counts.shape)]
        self.counts[key].append(counts.flatten().to("cpu", torch.int32))
        if keep.dim() == 3 and keep.shape[1] == 1:
            self.unions[key].append(keep.flatten(0, 1).any(0).sum().cpu())


class SparseLayer(nn.Module, ABC):
    """What the harness needs to know of any layer that skips work.

    site: the name under which density is reported; units: how many units a selection chooses from;
    linears: the matrices whose cost is proportional to density; overhead: parameters always read (a router).
    count: int32 [1] on the device, the units read by the last fast pass.
    """

    def __init__(self, site: str, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__()
        self.site, self.layer, self.phase, self.meter = site, layer, phase, meter
        self.count: Tensor | None = None

    @property
    @abstractmethod
    def units(self) -> int: ...

    @abstractmethod
    def linears(self) -> dict[str, nn.Linear]: ...

    @abstractmethod
    def materialize(self) -> None:
        """Builds what the fast path reads (transposed weights); called once, before any capture."""

    @property
    def overhead(self) -> int:
        return 0

    def fast(self, x: Tensor) -> bool:
        """True where the kernels serve this call: a decode step on a GPU, all of it sparse, nobody counting."""
        rows = x.numel() // x.shape[-1]
        return x.is_cuda and self.phase.active is True and rows <= FAST_ROWS and not self.meter.enabled

    def mask(self, keep: Tensor) -> Tensor:
        """keep [..., units] with every dense position switched fully on; also reports it to the meter."""
        active = self.phase.active
        if not isinstance(active, Tensor):
            self.meter.add((self.site, self.layer), keep, active)
            return keep
        # OPT flattens [B, T, d] to [B*T, d] before its FFN, so the mask is brought to the shape of the input.
        positions = active.reshape(keep.shape[:-1])
        self.meter.add((self.site, self.layer), keep, positions)
        return keep | ~positions.unsqueeze(-1)


class SparseLinear(SparseLayer):
    """y = W s(x) + b with s(x) = x where |x| > threshold, else 0; columns of W at zeroed channels are not read.

    Source: TEAL (arXiv 2408.14690), section 4. x: [..., K]; threshold: float32 [1]; returns [..., N].
    """

    threshold: Tensor
    weight_t: Tensor

    def __init__(self, linear: nn.Linear, threshold: Tensor, site: str, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__(site, layer, phase, meter)
        self.linear = linear
        self.register_buffer("threshold", threshold.detach().float().reshape(1).to(linear.weight.device))
        self.weight_t = torch.empty(0)

    @property
    def units(self) -> int:
        return self.linear.in_features

    def linears(self) -> dict[str, nn.Linear]:
        return {self.site: self.linear}

    def materialize(self) -> None:
        if not self.weight_t.numel():
            self.weight_t = self.linear.weight.detach().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.active is False:
            return self.linear(x)
        if self.fast(x):
            self.materialize()
            rows = x.reshape(-1, x.shape[-1])
            index, self.count = compact(rows, self.threshold, True)
            y = input_linear(rows, self.weight_t, index, self.count, self.threshold, self.linear.bias)
            return y.view(*x.shape[:-1], -1)
        keep = self.mask(x.abs().float() > self.threshold)
        return self.linear(x * keep)


class ExpertFFN(SparseLayer):
    """FFN over blocks of contiguous neurons (experts), each computed where its router score exceeds a threshold.

    Source: LTE (arXiv 2402.06126), eq. 2: FFN(x) = sum over i of 1[score_i > threshold] E_i(x), no scaling by the
    score. router: [experts, d]; scores are its logits, so the paper's sigmoid(z) > 0.5 is z > 0.
    x: [..., d]; gate is None for an ungated FFN; `down.bias` is added once, whatever is active.
    """

    threshold: Tensor
    down_t: Tensor

    def __init__(
        self,
        gate: nn.Linear | None,
        up: nn.Linear,
        down: nn.Linear,
        activation: str,
        router: Tensor,
        threshold: Tensor,
        layer: int,
        phase: Phase,
        meter: Meter,
    ) -> None:
        super().__init__("ffn", layer, phase, meter)
        if up.out_features % router.shape[0]:
            raise ValueError(f"{router.shape[0]} experts do not divide {up.out_features} neurons")
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self.router = nn.Parameter(router.to(up.weight), requires_grad=False)
        self.register_buffer("threshold", threshold.detach().float().reshape(1).to(up.weight.device))
        self.down_t = torch.empty(0)

    @property
    def units(self) -> int:
        return self.router.shape[0]

    def linears(self) -> dict[str, nn.Linear]:
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: linear for name, linear in found.items() if linear is not None}

    @property
    def overhead(self) -> int:
        return self.router.numel()

    def materialize(self) -> None:
        if not self.down_t.numel():
            self.down_t = self.down.weight.detach().t().contiguous()

    def hidden(self, x: Tensor) -> Tensor:
        """All neurons, grouped by expert: [..., experts, neurons per expert]."""
        act = ACTIVATIONS[self.activation]
        h = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return h.unflatten(-1, (self.units, -1))

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.active is False:
            return self.down(self.hidden(x).flatten(-2))
        score = F.linear(x, self.router).float()
        if self.fast(x):
            self.materialize()
            rows = x.reshape(-1, x.shape[-1])
            gate, gate_bias = (None, None) if self.gate is None else (self.gate.weight, self.gate.bias)
            score = score.reshape(rows.shape[0], -1)
            index, self.count = compact(score, self.threshold, False)
            h = expert_hidden(
                rows,
                gate,
                self.up.weight,
                gate_bias,
                self.up.bias,
                score,
                self.threshold,
                index,
                self.count,
                self.activation,
            )
            group = self.up.out_features // self.units
            y = input_linear(h, self.down_t, index, self.count, None, self.down.bias, group)
            return y.view(*x.shape[:-1], -1)
        keep = self.mask(score > self.threshold)
        return self.down((self.hidden(x) * keep.unsqueeze(-1)).flatten(-2))
