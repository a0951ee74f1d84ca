"""Attention that computes the heads a selector chooses: the output projection knows which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import threshold_linear
from .input_linear.launch import CROSSOVER
from .launch import crowded
from .layers import TransposedLinear
from .meter import Meter, Phase
from .selectors import Selector


class SelectiveHeads(TransposedLinear):
    """An output projection that takes exact zeros from all heads but the chosen ones.

    A unit is a KV group with all its query heads, which without sharing is one head. K and V are computed and cached
    for every head, so that any of them can be chosen later. x: [..., query heads * head size]; groups: KV groups;
    selector: None keeps all heads. On the fast path the decode runtime attends with `lists`; what attention leaves out
    is zero, and the projection does not read the weights of channels that are zero in all rows.

    Sources: Deja Vu (arXiv 2310.17157), section 4.3; Polar Sparsity (arXiv 2505.14884), selective head and group
    attention. Raises ValueError where sizes do not fit.
    """

    threshold: Tensor | None

    def __init__(
        self, linear: nn.Linear, groups: int, selector: Selector | None, layer: int, phase: Phase, meter: Meter
    ) -> None:
        super().__init__(linear, "heads", layer, phase, meter)
        if linear.in_features % groups or (selector is not None and selector.units != groups):
            raise ValueError(f"{groups} groups do not divide {linear.in_features} channels as the selector has it")
        self.groups, self.selector = groups, selector
        # Channels of a head that is left out are exactly zero: nothing else is.
        self.register_buffer("threshold", None if selector is None else torch.zeros(1, device=linear.weight.device))
        if selector is not None:
            selector.match(linear.weight)
            self.density = selector.k / groups if selector.rule == "top-k" else None

    @property
    def units(self) -> int:
        return self.groups

    def linears(self) -> dict[str, nn.Linear]:
        return {"o": self.linear}

    @property
    def attends(self) -> bool:
        return self.selector is not None and self.selector.fast  # an oracle attends with all heads first

    @property
    def overhead(self) -> int:
        return 0 if self.selector is None else self.selector.overhead

    @property
    def read(self) -> Tensor | None:
        found = super().read  # channels
        return None if found is None else -(-found * self.groups // self.linear.in_features)

    def fast(self, x: Tensor) -> bool:
        return self.selector is not None and self.selector.fast and super().fast(x)

    def limit(self, rows: int) -> Tensor | None:
        """The threshold by which channels are skipped; None where so many rows take a dense product: of the same
        values, since what is left out is zero already."""
        return None if crowded(self.density, rows, CROSSOVER) else self.threshold

    def lists(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """The groups of every sequence, for `attention_decode`; None where all run, or an oracle must see all first."""
        if self.selector is None or not self.selector.fast:
            return None
        tap = self.selector.tap
        assert tap is not None and tap.value is not None
        return self.selector.lists(tap.value.reshape(batch, -1))

    def kept(self, x: Tensor) -> Tensor:
        """x with exact zeros for the heads that are not chosen; any shape, counted by the meter."""
        if self.selector is None:
            self.dense(x)
            return x
        heads = x.unflatten(-1, (self.groups, -1))
        keep = self.mask(self.selector(x, heads))
        return torch.where(keep.unsqueeze(-1), heads, 0).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.active is False:
            return self.linear(x)
        kept = self.kept(x)
        if not self.fast(x):
            return self.linear(kept)
        self.materialize()
        rows = kept.reshape(-1, x.shape[-1])
        options: Any = dict(bias=self.linear.bias, density=self.density)
        y, counts, _ = threshold_linear(rows, self.weight_t, self.limit(len(rows)), **options)
        self.count = counts if counts.numel() else None
        return y.view(*x.shape[:-1], -1)
