"""Registered operators of routers and predictors: `router_scores`, `linear_router`, `low_rank_predictor`, and
`batch_score`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.launch import MAX_CHANNELS, require, require_input, require_rows, require_threshold
from sparse_kernels.selection import naive
from sparse_kernels.selection.op import fake_list, implementation, operator, require_scores, top_k

RESPONSES = tuple(naive.RESPONSES)


def require_layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Check that x [B, d] and weight [E, d] (and bias [E]) make a layer of a router."""
    require_input(x)
    require(weight.dim() == 2, "weight must have shape [experts, channels], got {}.", weight.shape)
    experts = weight.shape[0]
    require(1 <= experts <= MAX_CHANNELS, "weight must have 1 to {} experts, got {}.", MAX_CHANNELS, experts)
    require_rows("weight", weight, x, (experts, x.shape[1]))
    if bias is not None:
        require_rows("bias", bias, x, (experts,))
    require(activation in RESPONSES, "activation must be one of {}, got {}.", RESPONSES, activation)


def router_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    normalize: bool = False,
    narrow: bool = False,
) -> Tensor:
    """Scores of experts, float32 [B, E], or in x's dtype if narrow: act(weight x + bias).

    x: [B, d], 1 <= B <= 64, contiguous rows, float32, float16 or bfloat16. weight: [E, d], E <= 65536, contiguous
    rows. bias: [E] or None. activation: one of RESPONSES. normalize: divide x by its Euclidean norm first.
    Raises ValueError outside this domain.
    """
    require_layer(x, weight, bias, activation)
    return torch.ops.sparse_kernels.router_scores(x, weight, bias, activation, normalize, narrow)


def linear_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    activation: str = "identity",
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score experts as `router_scores` does and list those that any row selects.

    threshold: float32 [1] or [E], a constant; a row selects the experts with score > threshold. relative: threshold
    is a share [1] of the row's best score; a row selects the experts with score >= threshold * best, and the scores
    that it does not select are -inf, so that score > -inf afterwards says what a row selects. Scores should then not
    be negative; a row with NaN among them has no best score and selects nothing.
    Returns (score float32 [B, E], index int32 [E], count int32 [1]). Raises ValueError outside this domain.

    Sources: LTE (arXiv 2402.06126) for thresholds; D2DMoE (arXiv 2310.04361), dynamic k, for relative ones.
    """
    require_layer(x, weight, bias, activation)
    require_threshold(threshold, x, 1 if relative else weight.shape[0])
    score = torch.ops.sparse_kernels.router_scores(x, weight, bias, activation, False, False)
    if relative:
        return torch.ops.sparse_kernels.near_best(score, threshold)
    return score, *torch.ops.sparse_kernels.compact(score, threshold, False)


def low_rank_predictor(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    threshold: Tensor | None = None,
    k: int | None = None,
    hidden: str = "identity",
    activation: str = "identity",
    normalize: bool = False,
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score neurons or experts with two layers, act(b hidden(a x)), and select by threshold or by number.

    x: [B, d] and normalize as in `router_scores`. a: [r, d], b: [K, r], contiguous rows (r a multiple of 16 is
    quickest). hidden, activation: one of RESPONSES; the hidden layer is rounded to x's dtype.
    Exactly one of threshold (with relative, as in `linear_router`: one list for the batch) and k (as in `top_k`: a
    list for each row) must be given. Returns (score float32 [B, K], index, count). Raises ValueError outside this
    domain.

    Sources: Deja Vu (arXiv 2310.17157) and Polar Sparsity (arXiv 2505.14884): both layers linear; MoEfication
    (arXiv 2110.01786): normalize, hidden="tanh"; D2DMoE (arXiv 2310.04361): hidden="relu", activation="abs", relative.
    """
    require((threshold is None) != (k is None), "Give either threshold or k.")
    rank = router_scores(x, a, None, hidden, normalize, narrow=True)
    if threshold is not None:
        return linear_router(rank, b, None, threshold, activation, relative)
    assert k is not None
    score = router_scores(rank, b, None, activation)
    return score, *top_k(score, k)


def batch_score(score: Tensor) -> Tensor:
    """What a batch scores units together: the sum of its rows' positive scores of a unit, else their best.

    score: float [B, K], 1 <= B <= 64, K <= 65536, contiguous rows. Returns [K] in its dtype: units that no row scores
    above zero, whose order the paper leaves open, follow all others; a unit that any row scores NaN is NaN. Raises
    ValueError outside this domain.

    Source: Polar Sparsity (arXiv 2505.14884), whose batch shares a selection.
    """
    require_scores("score", score)
    return torch.ops.sparse_kernels.batch_score(score)


@operator("router_scores")
def _router_scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, normalize: bool, narrow: bool
) -> Tensor:
    return implementation(x, "score").scores(x, weight, bias, activation, normalize, narrow)


@_router_scores.register_fake
def _(x, weight, bias, activation, normalize, narrow):
    dtype = x.dtype if narrow or x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@operator("near_best")
def _near_best(score: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(score).near_best(score, share)


@_near_best.register_fake
def _(score, share):
    return score.new_empty(score.shape), *fake_list(score, score.shape[1])


@operator("batch_score")
def _batch_score(score: Tensor) -> Tensor:
    return implementation(score, "score").batch_score(score)


@_batch_score.register_fake
def _(score):
    return score.new_empty(score.shape[1])


@register_flop_formula([torch.ops.sparse_kernels.near_best, torch.ops.sparse_kernels.batch_score])
def _none(*args, **kwargs) -> int:
    """Comparisons are not counted."""
    return 0


@register_flop_formula(torch.ops.sparse_kernels.router_scores)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
