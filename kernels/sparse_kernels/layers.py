"""Modules that skip work: a linear layer that reads only the input channels it needs, and an FFN that reads only
the experts it needs.

Each has two paths with the same meaning. The *reference path* masks and then multiplies densely: any batch, any
length, differentiable, and it can treat some positions as dense and others as sparse. The *fast path* runs the
shared kernels and reads only what is active; it serves decode steps (few rows, every one of them sparse) on a GPU, and
of an FFN's experts also prompts that are sparse at every position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from . import ACTIVATIONS, expert_ffn_prefill, expert_hidden, input_linear, neuron_ffn, threshold_linear
from .expert_ffn.launch import crossover
from .expert_ffn.op import chosen_hidden
from .launch import crowded
from .meter import Meter, Phase
from .neuron_ffn.launch import takes_rows
from .selectors import Selector

FAST_ROWS = 64  # what the kernels of a decode step take; more tokens are a prompt
ROUTED = 16  # neurons of an expert from which on grouping a prompt's tokens by expert fills matrix units


class SparseLayer(nn.Module, ABC):
    """What the harness needs to know of any layer that skips work.

    site: the name under which density is reported; units: how many units a selection chooses from;
    linears: the matrices whose cost is proportional to density; overhead: parameters always read (a router);
    attends: whether a token's attention, and what it reads of the cache, is proportional to its density too.
    shared: whether all rows of a step run what any of them is given.
    count: int32 on the device, whose sum tells `read` what the last fast pass read; None if that was everything.
    density: the share of its units that a token is expected to keep, if known; a batch that needs most of them between
    its rows is better multiplied densely.
    """

    density: float | None = None

    def __init__(self, site: str, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__()
        self.site, self.layer, self.phase, self.meter = site, layer, phase, meter
        self.count: Tensor | None = None

    @property
    def name(self) -> str:
        """Under which artifacts hold its tensors: its block, and its site where that is not the FFN."""
        return str(self.layer) if self.site == "ffn" else f"{self.layer}.{self.site}"

    @property
    @abstractmethod
    def units(self) -> int: ...

    @abstractmethod
    def linears(self) -> dict[str, nn.Linear]: ...

    @abstractmethod
    def materialize(self) -> None:
        """Builds what the fast path reads (transposed weights); called once, before any capture."""

    @property
    def attends(self) -> bool:
        return False

    def attended(self, density: float, seen: range) -> float:
        """Where it attends, the share of attention and of the cache that tokens use which see so many positions."""
        return density

    @property
    def overhead(self) -> int:
        return 0

    def share(self, density: float) -> float:
        """What it uses at this density, over the weights of the model's own that it stands for."""
        return density

    @property
    def read(self) -> Tensor | None:
        """How many units the last fast pass read for all its rows together, on the device."""
        return None if self.count is None else self.count.sum()

    def fast(self, x: Tensor) -> bool:
        """True where the kernels serve this call: a decode step on a GPU, all of it sparse, nobody counting."""
        rows = x.numel() // x.shape[-1]
        return x.is_cuda and self.phase.active is True and rows <= FAST_ROWS and not self.meter.enabled

    @property
    def shared(self) -> bool:
        return False

    def idle(self, rows: int) -> bool:
        """Whether so many rows run everything, without a selection and its overhead."""
        return False

    def crowded(self, rows: int) -> bool:
        """Whether so many rows are expected to need so many units between them that dense products are faster."""
        return crowded(self.density, rows, crossover(rows))

    def dense(self, x: Tensor) -> None:
        """Reports to the meter that x [..., d] is computed with all units."""
        self.count = None
        if self.meter.enabled:
            self.mask(x.new_ones(*x.shape[:-1], self.units, dtype=torch.bool))

    def mask(self, keep: Tensor) -> Tensor:
        """keep [..., units] with every dense position switched fully on; also reports it to the meter."""
        active = self.phase.active
        if not isinstance(active, Tensor):
            self.meter.add((self.site, self.layer), keep, active)
            return keep
        # OPT flattens [B, T, d] to [B*T, d] before its FFN, so the mask is brought to the shape of the input.
        positions = active.reshape(keep.shape[:-1])
        self.meter.add((self.site, self.layer), keep, positions)
        if self.meter.enabled:
            shared = active.expand(positions.numel() // active.shape[-1], -1)
            self.meter.together[self.site, self.layer].add(keep.reshape(*shared.shape, -1)[:, shared.all(0)])
        return keep | ~positions.unsqueeze(-1)


class TransposedLinear(SparseLayer):
    """A linear layer whose fast path reads it transposed, from a copy of its own unless somebody else holds one."""

    weight_t: Tensor

    def __init__(self, linear: nn.Linear, site: str, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__(site, layer, phase, meter)
        self.linear = linear
        self.weight_t = torch.empty(0)

    def materialize(self) -> None:
        if not self.weight_t.numel():
            self.weight_t = self.linear.weight.detach().t().contiguous()

    def release(self) -> None:
        """Forgets the transposed weights, until they are needed again."""
        self.weight_t = self.weight_t.new_empty(0)


class SparseLinear(TransposedLinear):
    """y = W s(x) + b with s(x) = x where |x| > threshold, else 0; columns of W at zeroed channels are not read.

    Source: TEAL (arXiv 2408.14690), section 4. x: [..., K]; threshold: float32 [1]; returns [..., N].
    """

    threshold: Tensor

    def __init__(self, linear: nn.Linear, threshold: Tensor, site: str, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__(linear, site, layer, phase, meter)
        own = threshold.detach().to(linear.weight.device, torch.float32, copy=True)  # layers are given the same tensor
        self.register_buffer("threshold", own.reshape(1))

    @property
    def units(self) -> int:
        return self.linear.in_features

    def linears(self) -> dict[str, nn.Linear]:
        return {self.site: self.linear}

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.active is False:
            return self.linear(x)
        if self.fast(x):
            self.materialize()
            rows = x.reshape(-1, x.shape[-1])
            options: Any = dict(bias=self.linear.bias, density=self.density)
            y, counts, _ = threshold_linear(rows, self.weight_t, self.threshold, **options)
            self.count = counts if counts.numel() else None
            return y.view(*x.shape[:-1], -1)
        keep = self.mask(x.abs().float() > self.threshold)
        return self.linear(x * keep)


class ExpertFFN(SparseLayer):
    """FFN over experts of `size` contiguous neurons, each computed where the selector says so, with no scaling.

    Source: LTE (arXiv 2402.06126), eq. 2: FFN(x) = sum over the selected i of E_i(x); with size 1 the selector chooses
    single neurons, as in Deja Vu (arXiv 2310.17157). x: [..., d]; gate is None for an
    ungated FFN; `down.bias` is added once, whatever is active. selector: None for a dense FFN. mean: [neurons], the
    value of a neuron that is not computed, instead of 0 (G-MoEfication). Raises ValueError where sizes do not fit.
    """

    mean: Tensor | None
    shift: Tensor | None
    down_t: Tensor

    def __init__(
        self,
        gate: nn.Linear | None,
        up: nn.Linear,
        down: nn.Linear,
        activation: str,
        size: int,
        selector: Selector | None,
        layer: int,
        phase: Phase,
        meter: Meter,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__("ffn", layer, phase, meter)
        if up.out_features % size or (selector is not None and selector.units * size != up.out_features):
            raise ValueError(f"experts of {size} do not divide {up.out_features} neurons as the selector has it")
        self.gate, self.up, self.down, self.activation, self.size = gate, up, down, activation, size
        self.register_buffer("mean", None if mean is None else mean.to(up.weight))
        # W (h - mean) over the selected neurons + W mean: the second term is constant.
        shift = None if mean is None else (down.weight.detach().float() @ mean.to(down.weight).float()).to(down.weight)
        self.register_buffer("shift", shift)
        self.down_t = torch.empty(0)
        self.cut, self.mean_output = torch.empty(0), torch.empty(0)  # between not chosen and chosen; W mean, by expert
        self.constant: Tensor | None = None
        self.set_selector(selector)

    def set_selector(self, selector: Selector | None) -> None:
        self.selector = selector
        if selector is not None:
            selector.match(self.up.weight)

    @property
    def units(self) -> int:
        return self.up.out_features // self.size

    def linears(self) -> dict[str, nn.Linear]:
        if self.selector is not None and not self.selector.fast:
            return {"down": self.down}  # an oracle computes the whole hidden layer first
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: linear for name, linear in found.items() if linear is not None}

    @property
    def overhead(self) -> int:
        extra = 0 if self.mean is None else self.mean.numel()
        return extra + (0 if self.selector is None else self.selector.overhead)

    def materialize(self) -> None:
        if not self.down_t.numel():
            self.down_t = self.down.weight.detach().t().contiguous()
            given = [term for term in (self.shift, self.down.bias) if term is not None]
            self.constant = sum(given[1:], given[0]) if given else None
            self.cut = torch.full((1,), 0.5, device=self.down_t.device)
            if self.mean is not None:
                weighted = self.down_t.float() * self.mean.float()[:, None]
                self.mean_output = weighted.unflatten(0, (self.units, -1)).sum(1).to(self.down_t)

    @property
    def shared(self) -> bool:
        return self.selector is not None and self.selector.shared

    def idle(self, rows: int) -> bool:
        return self.selector is not None and self.selector.idle(rows)

    def fast(self, x: Tensor) -> bool:
        return self.selector is not None and self.selector.fast and super().fast(x)

    def routed(self, x: Tensor) -> bool:
        """True where the kernels serve a prompt: all of it sparse, nobody counting or about to ask for gradients."""
        whole = x.is_cuda and self.phase.active is True and not self.meter.enabled and not torch.is_grad_enabled()
        return whole and self.selector is not None and self.selector.fast and self.size >= ROUTED

    def hidden(self, x: Tensor) -> Tensor:
        """All neurons, grouped by expert: [..., experts, neurons per expert]."""
        act = ACTIVATIONS[self.activation]
        h = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return h.unflatten(-1, (self.units, -1))

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.active is False:  # nothing is counted, nor what a sparse pass counted forgotten
            return self.down(self.hidden(x).flatten(-2))
        fast = self.fast(x)
        if self.selector is None or (fast and self.idle(x.numel() // x.shape[-1])):
            self.dense(x)
            return self.down(self.hidden(x).flatten(-2))
        if fast:
            return self._skip(x.reshape(-1, x.shape[-1]), self.selector).view(*x.shape[:-1], -1)
        if self.routed(x):
            return self._prefill(x, self.selector)
        h = self.hidden(x)
        keep = self.mask(self.selector(x, h)).unsqueeze(-1)
        if self.mean is None:
            return self.down((h * keep).flatten(-2))
        y = self.down(((h - self.mean.view(self.units, -1)) * keep).flatten(-2))
        return y if self.shift is None else y + self.shift

    def _skip(self, rows: Tensor, selector: Selector) -> Tensor:
        """rows [B, d]; reads the experts that any of them needs."""
        self.materialize()
        if len(rows) == 1:
            return self._listed(rows, *self._own(rows, selector))
        if selector.shared:
            _, _, index, self.count = selector.select(rows)
            return self._listed(rows, index, self.count)
        gate, gate_bias = (None, None) if self.gate is None else (self.gate.weight, self.gate.bias)
        weights = rows, gate, self.up.weight, gate_bias, self.up.bias
        if self.crowded(len(rows)):
            self.count = None  # every row as it chose, of a product that reads everything
            score, limit = selector.choices(rows)
            return self.down(chosen_hidden(*weights, score, limit, self.activation, self.mean))
        score, threshold, index, self.count = selector.select(rows)
        h = expert_hidden(*weights, score, threshold, index, self.count, self.activation)
        if self.mean is not None:
            h = torch.where((score > threshold).repeat_interleave(self.size, 1), h - self.mean, 0)
        return input_linear(h, self.down_t, index, self.count, None, self.constant, self.size)

    def _prefill(self, x: Tensor, selector: Selector) -> Tensor:
        """x [..., d]; multiplies the weights of an expert with the tokens that chose it."""
        self.materialize()
        rows = x.reshape(-1, x.shape[-1])
        keep = selector(x, x).reshape(len(rows), -1)  # selectors with a fast path score x alone
        gate, gate_bias = (None, None) if self.gate is None else (self.gate.weight, self.gate.bias)
        weights = gate, self.up.weight, self.down_t, gate_bias, self.up.bias, self.constant
        y = expert_ffn_prefill(rows, *weights, keep.float(), self.cut, self.activation)
        if self.mean is not None:
            y = y - keep.to(y) @ self.mean_output
        return y.view(*x.shape[:-1], -1)

    def parts(self, rows: Tensor) -> Tensor | None:
        """float32 [P, 1, d], whose sum and `constant` are what forward gives; None where no fast path leaves parts.

        rows: [B, d].
        """
        if not self.fast(rows) or not takes_rows(rows, self.down_t):
            return None
        assert self.selector is not None
        if self.idle(len(rows)):
            return None
        return self._listed(rows, *self._own(rows, self.selector), partial=True)[:, None]

    def _own(self, row: Tensor, selector: Selector) -> tuple[Tensor, Tensor]:
        """The list of row [1, d] and its length: all that there is to know where nobody shares it."""
        if selector.rule == "top-k":
            (index,), self.count = selector.lists(row)
        else:
            _, _, index, self.count = selector.select(row)
        return index, self.count

    def _listed(self, rows: Tensor, index: Tensor, count: Tensor, partial: bool = False) -> Tensor:
        """rows [B, d], all of them through the listed experts; partial: in parts, without `constant`."""
        gate, gate_bias = (None, None) if self.gate is None else (self.gate.weight, self.gate.bias)
        biases = gate_bias, self.up.bias, None if partial else self.constant
        options: Any = dict(group=self.size, partial=partial, center=self.mean)
        return neuron_ffn(rows, gate, self.up.weight, self.down_t, index, count, self.activation, *biases, **options)
