"""Definitions of the selections: from scores and thresholds to masks and index lists."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.activations import ACTIVATIONS

RESPONSES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "tanh": torch.tanh,
    "abs": torch.abs,
}


def wide(x: Tensor) -> Tensor:
    """x in the precision of accumulation: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def to_index(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The active entries of mask [..., K], ascending: (index int32 [..., K], count int32 [rows])."""
    rows = mask.reshape(-1, mask.shape[-1]) != 0
    first = rows.int().argsort(dim=1, descending=True, stable=True)  # active entries first, in their order
    return first.int().reshape(mask.shape), rows.sum(1, dtype=torch.int32)


def to_mask(index: Tensor, count: Tensor, size: int) -> Tensor:
    """The mask [..., size] of the lists index [..., L], count [rows]."""
    lists = index.reshape(count.numel(), -1).long()
    listed = torch.arange(lists.shape[1], device=index.device) < count[:, None]
    mask = torch.zeros(count.numel(), size + 1, dtype=torch.bool, device=index.device)
    mask.scatter_(1, torch.where(listed, lists, size), True)  # unused slots go to a column of their own
    return mask[:, :size].reshape(*index.shape[:-1], size).contiguous()


def compact(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    """The channels in which any row of x [B, K] is above its threshold: (index int32 [K], count int32 [1])."""
    value = x.float().abs() if magnitude else x.float()
    return union(value > threshold)


def union(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The channels that are active in any row of mask [B, K]: (index int32 [K], count int32 [1])."""
    return to_index((mask != 0).any(0))


def union_lists(index: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The channels in any of the lists index [B, L], count [B]: (index int32 [size], count int32 [1])."""
    return union(to_mask(index, count, size))


def top_k(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of score [B, K], ascending by position: (index int32 [B, k], count int32 [B])."""
    value = torch.where(score.isnan(), float("-inf"), score)
    best = value.argsort(dim=1, descending=True, stable=True)[:, :k]
    count = torch.full((score.shape[0],), k, dtype=torch.int32, device=score.device)
    return best.sort(1).values.int(), count


def top_mask(score: Tensor, k: int) -> Tensor:
    """Which of each row of score [B, K] are its k largest: bool [B, K]."""
    return to_mask(*top_k(score, k), score.shape[1])


def statistical_threshold(score: Tensor, multiplier: float, soft: bool) -> Tensor:
    """mean + multiplier * std over the last dimension of score [..., K]: float32 [..., 1].

    Unless soft, at most the largest score: what reaches the threshold is then selected, all of equal scores too, which
    their mean may be rounded above.
    """
    score = wide(score)
    std, mean = torch.std_mean(score, -1, correction=0, keepdim=True)
    if not math.isfinite(multiplier):
        return torch.full_like(mean, multiplier)
    limit = mean + std * multiplier
    return limit if soft else torch.minimum(limit, score.amax(-1, keepdim=True))


def statistical_top_k(
    score: Tensor, multiplier: float, soft: bool, activation: str = "identity", magnitude: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What of score [B, K] is above mean + multiplier * std of its row: (act(value), threshold [B], index, count).

    soft: value less the threshold, else what reaches it, always the largest; magnitude: the scores are |act(score)|
    instead of score, and zeros are not selected.
    """
    v, act = wide(score), ACTIVATIONS.get(activation, RESPONSES["identity"])
    ranked = act(v).abs() if magnitude else v
    limit = statistical_threshold(ranked, multiplier, soft)
    keep = ranked > limit if soft else ranked >= limit
    if magnitude:
        keep &= ranked > 0
    kept = torch.where(limit == -float("inf"), v, v - limit) if soft else v
    return torch.where(keep, act(kept), 0).to(score.dtype), limit[:, 0].float(), *union(keep)


def scores(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, normalize: bool, narrow: bool) -> Tensor:
    """Scores act(weight x / |x| + bias) [B, E] of x [B, d], in x's dtype if narrow."""
    v = F.normalize(wide(x)) if normalize else wide(x)
    score = RESPONSES[activation](F.linear(v, wide(weight), None if bias is None else wide(bias)))
    return score.to(x.dtype) if narrow else score


def near_best(score: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """score [B, E], -inf where it is less than share times its row's best, and the list of what any row keeps."""
    keep = score >= share * score.amax(1, keepdim=True)
    return score.masked_fill(~keep, -float("inf")), *union(keep)


def batch_score(score: Tensor) -> Tensor:
    """What is positive of score [..., B, K], summed over B; the best of B where nothing is: [..., K]."""
    total = score.relu().sum(-2)
    return torch.where(total > 0, total, score.amax(-2))
