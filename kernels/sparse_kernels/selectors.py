"""Selectors: modules that say, from a token's hidden state, which experts (or single neurons) of an FFN run for it.

A selector is a score for every expert and a rule on the scores:

- "threshold": score > threshold (LTE, arXiv 2402.06126, eq. 2);
- "relative": score >= threshold * the token's best score (D2DMoE, arXiv 2310.04361, dynamic k);
- "top-k": the k best, of equal ones the first (MoEfication, arXiv 2110.01786);
- "statistical": score >= mean + threshold * standard deviation of the token's scores, with `gaussian_multiplier(k /
  units)` as threshold about the k best (Spark Transformer, arXiv 2506.06644).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import linear_router, low_rank_predictor, router_scores, statistical_top_k, to_mask, top_k, union_lists
from .selection import naive

RULES = ("threshold", "relative", "top-k", "statistical")
Selected = tuple[Tensor, Tensor, Tensor, Tensor]


class Selector(nn.Module, ABC):
    """units: experts to choose from; threshold: float32 [1], of every rule but top-k, which has k.

    fast: whether `select` exists; overhead: parameters that scoring reads. Raises ValueError for an unknown rule.
    """

    fast = True
    threshold: Tensor
    everything: Tensor

    def __init__(self, units: int, rule: str = "threshold", threshold: float | Tensor = 0.0, k: int = 0) -> None:
        super().__init__()
        if rule not in RULES or (rule == "top-k" and not 1 <= k <= units):
            raise ValueError(f"rule must be one of {RULES} and k 1 to {units}, got {rule!r} and {k}")
        self.units, self.rule, self.k = units, rule, k
        value = torch.as_tensor(threshold, dtype=torch.float32).detach().reshape(1)
        self.multiplier = float(value) if rule == "statistical" else 0.0  # read once: later the host must not wait
        self.register_buffer("threshold", value.clone())
        self.register_buffer("everything", torch.full((1,), -torch.inf))

    @property
    def overhead(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def scores(self, x: Tensor, hidden: Tensor) -> Tensor:
        """float32 [..., units] of x [..., d], whose neurons' values are hidden [..., units, neurons per expert]."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """bool [..., units]: the experts that run. Reference path, any shape."""
        # In float32 whatever autocast does: bfloat16 scores would often equal the threshold exactly.
        with torch.autocast(x.device.type, enabled=False):
            score = self.scores(x, hidden)
        if self.rule == "top-k":
            best = score.argsort(dim=-1, descending=True, stable=True)[..., : self.k]
            return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        if self.rule == "relative":
            return score >= self.threshold * score.amax(-1, keepdim=True)
        if self.rule == "statistical":
            return score >= naive.statistical_threshold(score, self.multiplier)
        return score > self.threshold

    def select(self, rows: Tensor) -> Selected:
        """Fast path for rows [B, d]: (score float32 [B, units], threshold [1], index int32 [units], count int32 [1]).

        A row runs the experts with score > threshold; the list is the union over the rows. All of it stays on the
        device.
        """
        raise NotImplementedError


class Router(Selector):
    """Scores act(B hidden(A x)) of two linear layers, or act(A x + bias) of one.

    layers: (A [units, d],) or (A [rank, d], B [units, rank]); bias: [units] or None; hidden, activation: "identity",
    "relu", "tanh" or "abs"; normalize: divide x by its Euclidean norm first.
    """

    def __init__(
        self,
        layers: tuple[Tensor, ...],
        rule: str = "threshold",
        threshold: float | Tensor = 0.0,
        k: int = 0,
        bias: Tensor | None = None,
        hidden: str = "identity",
        activation: str = "identity",
        normalize: bool = False,
    ) -> None:
        if len(layers) not in (1, 2) or (bias is not None and len(layers) == 2):
            raise ValueError("a router has one layer, which may have a bias, or two without")
        super().__init__(layers[-1].shape[0], rule, threshold, k)
        self.layers = nn.ParameterList([nn.Parameter(layer.detach(), requires_grad=False) for layer in layers])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.hidden, self.activation, self.normalize = hidden, activation, normalize

    def scores(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.score(x)

    def score(self, x: Tensor) -> Tensor:
        """float32 [..., units], differentiable; the operators' own definition."""
        rows, normalize = x.reshape(-1, x.shape[-1]), self.normalize
        if len(self.layers) == 2:
            rows = naive.scores(rows, self.layers[0], None, self.hidden, normalize, True)
            normalize = False
        found = naive.scores(rows, self.layers[-1], self.bias, self.activation, normalize, False)
        return found.view(*x.shape[:-1], -1)

    def select(self, rows: Tensor) -> Selected:
        if self.rule == "top-k":
            score = self._scores(rows)
            index, count = top_k(score, self.k)
            score = score.masked_fill(~to_mask(index, count, self.units), -torch.inf)
            return score, self.everything, *union_lists(index, count, self.units)
        if self.rule == "statistical":
            score = self._scores(rows)
            _, limit, index, count = statistical_top_k(score, self.multiplier, soft=False)
            return score.masked_fill(score < limit[:, None], -torch.inf), self.everything, index, count
        relative = self.rule == "relative"
        limit = self.everything if relative else self.threshold  # `relative` comes back with -inf where not selected
        if len(self.layers) == 2:
            a, b = self.layers
            how = self.hidden, self.activation, self.normalize, relative
            score, index, count = low_rank_predictor(rows, a, b, self.threshold, None, *how)
        elif self.normalize:
            raise NotImplementedError("one layer on normalised input selects by top-k only")
        else:
            (a,) = self.layers
            score, index, count = linear_router(rows, a, self.bias, self.threshold, self.activation, relative)
        return score, limit, index, count

    def _scores(self, rows: Tensor) -> Tensor:
        """`score` by the operators: float32 [B, units]."""
        normalize = self.normalize
        if len(self.layers) == 2:
            rows, normalize = router_scores(rows, self.layers[0], None, self.hidden, normalize, narrow=True), False
        return router_scores(rows, self.layers[-1], self.bias, self.activation, normalize)


class Oracle(Selector):
    """Scores from the true activations: `importance` maps hidden [..., units, neurons] to float32 [..., units].

    A control, not a method: it reads the whole hidden layer to decide what of it to skip.
    """

    fast = False

    def __init__(
        self, units: int, importance: Callable[[Tensor], Tensor], rule: str, threshold: float | Tensor = 0.0, k: int = 0
    ) -> None:
        super().__init__(units, rule, threshold, k)
        self.importance = importance

    def scores(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.importance(hidden)
