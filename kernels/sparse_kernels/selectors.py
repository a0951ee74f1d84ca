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

from . import batch_score, linear_router, low_rank_predictor, router_scores, statistical_top_k, top_k, top_mask, union
from .expert_ffn.launch import crossover
from .meter import Phase
from .selection import naive

RULES = ("threshold", "relative", "top-k", "statistical")
Selected = tuple[Tensor, Tensor, Tensor, Tensor]


class Tap:
    """The hidden state at one place of the model, [..., d], as the pass now running left it there."""

    value: Tensor | None = None


class Selector(nn.Module, ABC):
    """units: experts to choose from; threshold: float32 [1], of every rule but top-k, which has k.

    fast: whether `select` exists; shared: whether every row runs all that `select` lists, whatever its own scores;
    overhead: parameters that scoring reads; tap: where the hidden state that is scored comes from, None for the layer's
    own input. Raises ValueError for an unknown rule.
    """

    fast = True
    shared = False
    tap: Tap | None = None
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

    def match(self, weight: Tensor) -> None:
        """Goes to the device of a layer's weight; parameters take its dtype, thresholds stay float32."""
        self.to(weight.device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(weight.dtype)

    def heard(self, x: Tensor) -> Tensor:
        """What is scored in place of a layer's input x [..., d]: the tap's value for the same tokens."""
        if self.tap is None:
            return x
        assert self.tap.value is not None
        return self.tap.value.reshape(*x.shape[:-1], -1)

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
            return score >= naive.statistical_threshold(score, self.multiplier, soft=False)
        return score > self.threshold

    def select(self, rows: Tensor) -> Selected:
        """Fast path for rows [B, d]: (score float32 [B, units], threshold [1], index int32 [units], count int32 [1]).

        A row runs the experts with score > threshold; the list is the union over the rows. All of it stays on the
        device.
        """
        raise NotImplementedError

    def choices(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fast path for rows [B, d], without a list: (score [B, units], limit [1]) as `select` has them, or what every
        row runs as bool [B, units], and None."""
        return self.select(rows)[:2]

    def idle(self, rows: int) -> bool:
        """Whether a batch of this many rows runs all units, for which nothing needs to be scored."""
        return False

    def lists(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Fast path for rows [B, d] that select for themselves: (index int32 [B, S], count int32 [B])."""
        raise NotImplementedError


class Router(Selector):
    """Scores act(B hidden(A x)) of two linear layers, or act(A x + bias) of one.

    layers: (A [units, d],) or (A [rank, d], B [units, rank]); bias: [units] or None; hidden, activation: "identity",
    "relu", "tanh" or "abs"; normalize: divide x by its Euclidean norm first; pool: A has [units * pool, d], and a unit
    scores the best of its `pool` outputs (one layer, top-k).
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
        pool: int = 1,
    ) -> None:
        if len(layers) not in (1, 2) or ((bias is not None or pool > 1) and len(layers) == 2):
            raise ValueError("a router has one layer, which may have a bias and pool, or two without")
        if layers[-1].shape[0] % pool or (pool > 1 and rule != "top-k"):
            raise ValueError(f"a router pools by top-k and in equal groups, not {layers[-1].shape[0]} by {pool}")
        super().__init__(layers[-1].shape[0] // pool, rule, threshold, k)
        self.layers = nn.ParameterList([nn.Parameter(layer.detach(), requires_grad=False) for layer in layers])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.hidden, self.activation, self.normalize, self.pool = hidden, activation, normalize, pool

    def scores(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self._pooled(self.score(self.heard(x)))

    def score(self, x: Tensor) -> Tensor:
        """float32 [..., outputs], differentiable, before pooling; the operators' own definition."""
        rows, normalize = x.reshape(-1, x.shape[-1]), self.normalize
        if len(self.layers) == 2:
            rows = naive.scores(rows, self.layers[0], None, self.hidden, normalize, True)
            normalize = False
        found = naive.scores(rows, self.layers[-1], self.bias, self.activation, normalize, False)
        return found.view(*x.shape[:-1], -1)

    def _pooled(self, score: Tensor) -> Tensor:
        return score if self.pool == 1 else score.unflatten(-1, (-1, self.pool)).amax(-1)

    def lists(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.rule != "top-k":
            raise NotImplementedError("rows select for themselves by top-k only")
        return top_k(self._scores(self.heard(rows)), self.k)

    def choices(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.rule == "top-k":
            return top_mask(self._scores(self.heard(rows)), self.k), None
        return (self._scores(self.heard(rows)), self.threshold) if self.rule == "threshold" else super().choices(rows)

    def select(self, rows: Tensor) -> Selected:
        rows = self.heard(rows)
        if self.rule == "top-k":
            score = self._scores(rows)
            keep = top_mask(score, self.k)
            return torch.where(keep, score, -torch.inf), self.everything, *union(keep)
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
        """By the operators: float32 [B, units]."""
        normalize = self.normalize
        if len(self.layers) == 2:
            rows, normalize = router_scores(rows, self.layers[0], None, self.hidden, normalize, narrow=True), False
        return self._pooled(router_scores(rows, self.layers[-1], self.bias, self.activation, normalize))


class BatchRouter(Router):
    """Chooses for a whole batch: as many units as its size takes, by the sum of what is positive of its scores.

    ks: how many for batches of up to SIZES[i] rows, in that order; the last one holds for larger ones; all, where so
    many are asked for that a dense FFN is faster (published: more than 0.8 of them; here, what `crossover` measured).
    A single row runs its ks[0] best, and so does every token of a text, as in the published accuracies: the tap's
    value, [B, T, d], says whether this is a text, and `phase` whether rows of one token are texts of their own.
    Source: Polar Sparsity (arXiv 2505.14884), layer-wise dynamic top-k.
    """

    shared = True
    SIZES = (1, 2, 4, 8, 16, 32, 64)

    def __init__(self, layers: tuple[Tensor, ...], ks: list[int], phase: Phase | None = None) -> None:
        units = layers[-1].shape[0]
        ks = [units if k > crossover(size) * units else k for size, k in zip(self.SIZES, ks, strict=False)]
        super().__init__(layers, "top-k", k=ks[0])
        self.ks, self.phase = ks, phase or Phase()

    @property
    def fast(self) -> bool:  # type: ignore[override]
        """The kernels read one list for all rows."""
        return not self.phase.apart

    def k_for(self, rows: int) -> int:
        fits = [k for size, k in zip(self.SIZES, self.ks, strict=False) if rows <= size]
        return fits[0] if fits else self.ks[-1]

    def idle(self, rows: int) -> bool:
        return self.k_for(rows) == self.units

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        assert self.tap is not None and self.tap.value is not None
        if self.phase.apart or (self.tap.value.dim() == 3 and self.tap.value.shape[1] > 1):
            return super().forward(x, hidden)
        score = self.scores(x, hidden)
        rows = score.flatten(0, -2)
        best = naive.batch_score(rows).argsort(descending=True, stable=True)[: self.k_for(len(rows))]
        keep = torch.zeros(self.units, dtype=torch.bool, device=score.device).index_fill_(0, best, True)
        return keep.expand_as(score)

    def select(self, rows: Tensor) -> Selected:
        score = self._scores(self.heard(rows))
        index, count = top_k(batch_score(score)[None], self.k_for(len(rows)))
        return score, self.everything, index[0], count


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
