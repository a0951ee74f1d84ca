"""Which positions of a pass are sparse, and how many units the tokens there use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Phase:
    """Which positions of the forward pass now running are sparse; one object is shared by all layers of a model.

    `active` is False (dense), True (every position sparse) or a bool mask [B, T], True where a position is sparse.
    `apart`: the rows are texts of their own, not a batch for which anything is chosen together.
    """

    def __init__(self) -> None:
        self.active: bool | Tensor = False
        self.apart = False


class Union:
    """How many units sequences use together at a position: by their number, a power of two up to LARGEST, the means."""

    LARGEST = 32

    def __init__(self) -> None:
        self.means: dict[int, list[Tensor]] = defaultdict(list)
        self._seen, self._rows = torch.empty(0), 0

    def add(self, keep: Tensor) -> None:
        """keep: bool [B, T, units], further sequences at T positions; another T begins anew."""
        for row in keep:
            if self._rows in (0, self.LARGEST) or row.shape != self._seen.shape:
                self._seen, self._rows = torch.zeros_like(row), 0
            self._seen, self._rows = self._seen | row, self._rows + 1
            if self._rows & (self._rows - 1) == 0:
                self.means[self._rows].append(self._seen.sum(-1).double().mean())


class Meter:
    """Counts active units per token, site and layer, at the positions that went through the sparse path.

    It only listens inside `with meter.on():`, so that timed steps carry no counting. unions: of one-position passes,
    over their batch; together: over any number of sequences, where it is known which positions are sparse. steps:
    whether the pass that runs has one position per sequence, which a layer cannot know whose input has lost its shape.
    """

    def __init__(self) -> None:
        self.enabled = self.steps = False
        self.counts: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.unions: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.together: dict[tuple[str, int], Union] = defaultdict(Union)

    @contextmanager
    def on(self) -> Iterator[Meter]:
        self.enabled = True
        try:
            yield self
        finally:
            self.enabled = False

    @contextmanager
    def apart(self) -> Iterator[Meter]:
        """Within: what is counted stays apart from what was counted before, and is forgotten afterwards."""
        kept = self.counts, self.unions, self.together
        self.counts, self.unions, self.together = defaultdict(list), defaultdict(list), defaultdict(Union)
        try:
            yield self
        finally:
            self.counts, self.unions, self.together = kept

    def reset(self) -> None:
        self.counts.clear()
        self.unions.clear()
        self.together.clear()

    def add(self, key: tuple[str, int], keep: Tensor, active: bool | Tensor) -> None:
        """keep: bool [B, T, units]; counts the positions where `active`. One-position passes also give the union."""
        if not self.enabled:
            return
        counts = keep.sum(-1)
        if isinstance(active, Tensor):
            counts = counts[active.expand(counts.shape)]
        self.counts[key].append(counts.flatten().to("cpu", torch.int32))
        if self.steps or (keep.dim() == 3 and keep.shape[1] == 1):
            self.unions[key].append(keep.flatten(0, -2).any(0).sum().cpu())
