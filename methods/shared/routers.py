"""Routers of frozen FFNs: their forms, what they should predict, and how much of it they catch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Router

from ..errors import UsageError
from .selection import quantile
from .splitting import CHUNK, keys

MINIMUM = 500  # tokens; the published routers learn from batches of 512


def centres(layer: ExpertFFN) -> Tensor:
    """float32 [experts, d]: the mean of an expert's normalised rows, itself not normalised."""
    return F.normalize(keys(layer), dim=1).unflatten(0, (layer.units, -1)).mean(1)


def tanh_router(a: Tensor, b: Tensor, k: int = 1) -> Router:
    """MoEfication's router, B tanh(A x / |x|); it starts with A the centres of the experts and B the identity."""
    return Router((a, b), "top-k", k=k, hidden="tanh", normalize=True)


def similarity(a: Tensor, k: int = 1) -> Router:
    """Ranks experts by -| x / |x| - centre |, a: the centres; its square is 2 a x / |x| - |a|^2 and a constant."""
    return Router((2 * a,), "top-k", k=k, bias=-a.square().sum(1), normalize=True)


def norm_router(a: Tensor, b: Tensor, rule: str = "relative", threshold: float | Tensor = 0.0, k: int = 1) -> Router:
    """D2DMoE's router, | B relu(A x) |: it predicts norms."""
    return Router((a, b), rule, threshold, k, hidden="relu", activation="abs")


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random weight [rows, columns], as torch draws those of a linear layer."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * columns**-0.5


def experts_for(density: float, units: int) -> int:
    """How many experts of `units` come nearest to a density; at least one."""
    return max(1, min(units, round(density * units)))


def off_target(density: float, units: int) -> list[str]:
    """A note where no whole number of experts is near enough to the density."""
    from .search import missed

    k = experts_for(density, units)
    return missed(density, k / units, f"{k} of {units} experts run, which allow steps of {1 / units:.3f}")


def activation_mass(hidden: Tensor) -> Tensor:
    """MoEfication's importance of an expert: the sum of |h| over its neurons; hidden: [..., experts, neurons].

    With ReLU that is the published sum of activations; |h| serves the others, whose values can be negative.
    """
    return hidden.float().abs().sum(-1)


def output_norms(layer: ExpertFFN) -> Callable[[Tensor], Tensor]:
    """D2DMoE's importance: the norm of what an expert adds to the output, | W_e h_e |.

    Exact without the outputs themselves: the square is h_e^T (W_e^T W_e) h_e.
    """
    down = layer.down.weight.detach().float().unflatten(1, (layer.units, -1))  # [d, experts, neurons]
    gram = torch.einsum("den,dem->enm", down, down)

    def importance(hidden: Tensor) -> Tensor:
        h = hidden.float()
        return (torch.einsum("...en,enm->...em", h, gram) * h).sum(-1).clamp(min=0).sqrt()

    return importance


@torch.no_grad()
def neuron_means(layer: ExpertFFN, x: Tensor) -> Tensor:
    """float32 [neurons]: the mean value of every neuron over x [tokens, d]."""
    total = torch.zeros(layer.up.out_features, device=x.device)
    for part in x.split(CHUNK):
        total += layer.hidden(part).flatten(-2).float().sum(0)
    return total / len(x)


@torch.no_grad()
def targets(layer: ExpertFFN, x: Tensor, importance: Callable[[Tensor], Tensor]) -> Tensor:
    """float32 [tokens, experts] from the true activations of x [tokens, d]."""
    return torch.cat([importance(layer.hidden(part)) for part in x.split(CHUNK)])


def enough(tokens: int, wanted: int) -> list[str]:
    """A note if there is less text than asked for. Raises UsageError if there is too little to learn from."""
    if tokens < MINIMUM:
        raise UsageError(
            f"routers need at least {MINIMUM} tokens of training text and found {tokens}: choose a larger --corpus."
        )
    short = tokens < 0.95 * wanted
    return [f"routers learned from {tokens} tokens, because the corpus has no more of {wanted}"] if short else []


def captured(score: Tensor, importance: Tensor, k: int) -> float:
    """The share of importance that the k best-scored experts hold; mean over tokens that have any.

    score, importance: [tokens, experts].
    """
    total = importance.sum(1)
    held = importance.gather(1, score.topk(k, dim=1).indices).sum(1)
    return float((held / total.clamp(min=1e-12))[total > 0].mean())


def labels(importance: Tensor) -> Tensor:
    """Importance [tokens, experts] as soft labels in [0, 1]: shares of its 99.9th percentile.

    The released code divides by a batch's largest value: labels then depend on the batch, and an outlier empties them.
    """
    return (importance / quantile(importance, 0.999).clamp(min=1e-12)).clamp(max=1)


def held_out(tokens: int) -> int:
    """The last tenth of the tokens judges a router and does not teach it."""
    return max(1, tokens // 10)


@torch.no_grad()
def quality(router: Router, x: Tensor, importance: Tensor) -> dict[str, float]:
    """On the held-out tokens: importance that the 20 % best-scored experts hold, and the share that is possible."""
    seen = held_out(len(x))
    score, true, k = router.score(x[-seen:].float()), importance[-seen:], max(1, importance.shape[1] // 5)
    return {"captured": captured(score, true, k), "possible": captured(true, true, k)}
