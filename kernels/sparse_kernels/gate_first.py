"""An FFN whose first matrix says which neurons go on, by the statistics of a token's own scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import ACTIVATIONS, gated_ffn, input_linear, router_scores, statistical_top_k
from .layers import SparseLayer
from .meter import Meter, Phase
from .selection.naive import statistical_threshold

SCORES = ("value", "magnitude", "output")


class GateFirstFFN(SparseLayer):
    """FFN in which a neuron goes on where its score is at least mean + multiplier * deviation of the token's scores.

    With u = first(x), first being gate, or up if ungated, scores are "value": u, "magnitude": |act(u)|, or "output":
    |h|, h being the whole hidden layer; of these two a zero never goes on. soft (with "value"): what goes on is
    act(u - limit) instead of act(u). split: 0, or r if gate reads x[..., :r] and up x[..., r:]. multiplier: None for a
    dense FFN, -inf for everything. native: the model was trained with this selection, so that dense positions have it
    too. x: [..., d]. The first matrix is read whole; skipped are the rows of up (except with "output") and of down.

    Sources: Spark Transformer (arXiv 2506.06644), statistical top-k and Spark FFN (soft, split); Gemma 3n (soft);
    CATS (arXiv 2404.08763) for magnitudes. Raises ValueError for an unknown score or what does not go with it.
    """

    down_t: Tensor

    def __init__(
        self,
        gate: nn.Linear | None,
        up: nn.Linear,
        down: nn.Linear,
        activation: str,
        multiplier: float | None,
        layer: int,
        phase: Phase,
        meter: Meter,
        score: str = "value",
        soft: bool = False,
        split: int = 0,
        native: bool = False,
    ) -> None:
        super().__init__("ffn", layer, phase, meter)
        if score not in SCORES or (soft and score != "value"):
            raise ValueError(f"score must be one of {SCORES}, and value if soft, got {score!r}")
        if gate is None and split:
            raise ValueError("an ungated FFN has no second input to split off")
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self.multiplier, self.score, self.soft, self.split, self.native = multiplier, score, soft, split, native
        self.down_t = torch.empty(0)

    @property
    def units(self) -> int:
        return self.up.out_features

    def linears(self) -> dict[str, nn.Linear]:
        if self.gate is None or self.score == "output":
            return {"down": self.down}
        return {"up": self.up, "down": self.down}

    def materialize(self) -> None:
        if not self.down_t.numel():
            self.down_t = self.down.weight.detach().t().contiguous()

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first matrix and the second read of x [..., d]."""
        return (x[..., : self.split], x[..., self.split :]) if self.split else (x, x)

    def first(self, x: Tensor) -> Tensor:
        """u [..., neurons]."""
        return (self.up if self.gate is None else self.gate)(self.inputs(x)[0])

    def scores(self, x: Tensor, u: Tensor) -> Tensor:
        """float32 [..., neurons] of x [..., d] and u = first(x)."""
        if self.score == "value":
            return u.float()
        return (self._hidden(x, u) if self.score == "output" else ACTIVATIONS[self.activation](u)).float().abs()

    def _hidden(self, x: Tensor, u: Tensor) -> Tensor:
        value = ACTIVATIONS[self.activation](u)
        return value if self.gate is None else value * self.up(self.inputs(x)[1])

    def forward(self, x: Tensor) -> Tensor:
        active = self.phase.active
        if self.multiplier is None or (active is False and not self.native):
            return self.down(self._hidden(x, self.first(x)))
        if self.fast(x):
            return self._skip(x.reshape(-1, x.shape[-1]), self.multiplier).view(*x.shape[:-1], -1)
        u = self.first(x)
        score = self.scores(x, u)
        limit = statistical_threshold(score, self.multiplier, self.soft)
        keep = score > limit if self.soft and math.isfinite(self.multiplier) else score >= limit
        if self.score != "value":
            keep &= score > 0
        shown = keep if active is False else self.mask(keep)
        if self.native:
            shown = keep
        if self.soft and math.isfinite(self.multiplier):
            shift = limit
            if isinstance(active, Tensor) and not self.native:
                shift = limit * active.reshape(*u.shape[:-1], 1)
            u = (u.float() - shift).to(u.dtype)
        return self.down(self._hidden(x, u) * shown)

    def _skip(self, rows: Tensor, multiplier: float) -> Tensor:
        """rows [B, d]; reads the first matrix and what any row needs of the others."""
        self.materialize()
        left, right = self.inputs(rows)
        crowded = self.crowded(len(rows))
        if crowded and self.score != "output":
            u, activation = self.first(rows), self.activation
        elif self.score == "output":
            u, activation = self._hidden(rows, self.first(rows)), "identity"
        else:
            matrix = self.up if self.gate is None else self.gate
            u, activation = router_scores(left, matrix.weight, matrix.bias), self.activation
        magnitude = self.score != "value"
        value, _, index, self.count = statistical_top_k(u, multiplier, self.soft, activation, magnitude)
        if crowded:
            self.count = None  # every row as it chose, of products that read everything
            single = self.gate is None or self.score == "output"
            return self.down(value if single else value * self.up(right))
        if self.gate is None or self.score == "output":
            return input_linear(value.to(rows.dtype), self.down_t, index, self.count, None, self.down.bias)
        return gated_ffn(right, value, self.up.weight, self.down_t, index, self.count, self.up.bias, self.down.bias)
