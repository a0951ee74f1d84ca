"""Registered operators `residual_norm` and `glu`."""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.glue import naive
from sparse_kernels.launch import require, require_input, require_rows, require_threshold, use_triton
from sparse_kernels.selection.op import compact, require_scores

KINDS = ("rms", "gemma", "layer")
MAX_WIDTH = 16384
MAX_PARTS = 64


def implementation(x: Tensor) -> ModuleType:
    """The module that computes on x's device: the Triton kernels or the definitions."""
    if not use_triton(x):
        return naive
    from sparse_kernels.glue import kernel

    return kernel


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    threshold: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Add to the residual stream, normalise it, and list the channels of the result that are above a threshold.

    x: [B, N] in weight's dtype, or float32 [S, B, N], S <= 64 parts to be added up first and rounded to that dtype;
    1 <= B <= 64, N <= 16384, contiguous rows. residual: [B, N] or None. weight: [N]; bias: [N] or None (kind "layer").
    kind: "rms" (Llama), "gemma" (RMS with 1 + weight) or "layer". Statistics are float32, and every step rounds where
    transformers' modules round. threshold: float32 [1] or [N], a constant, or None.
    Returns (h, y) with h = residual + x and y = norm(h), both [B, N] in weight's dtype; with a threshold also
    (index int32 [N], count int32 [1]), the list of the channels in which |y| of any row is above it, as `compact`
    makes it. Raises ValueError outside this domain.
    """
    require(kind in KINDS, "kind must be one of {}, got {}.", KINDS, kind)
    require(bias is None or kind == "layer", 'Only kind "layer" takes a bias.')
    require(weight.dim() == 1, "weight must have shape [channels], got {}.", weight.shape)
    width = weight.shape[0]
    require(1 <= width <= MAX_WIDTH, "weight must have 1 to {} channels, got {}.", MAX_WIDTH, width)
    fits = x.dim() in (2, 3) and x.shape[-1] == width and (x.dim() == 2 or 1 <= x.shape[0] <= MAX_PARTS)
    require(fits, "x must be [batch, {}] or 1 to {} parts of that, got shape {}.", width, MAX_PARTS, x.shape)
    require_input(x if x.dim() == 2 else x.select(0, 0))
    dtype = weight.dtype if x.dim() == 2 or weight.dtype == torch.float64 else torch.float32
    require(x.dtype == dtype, "x must be {}, got {}.", dtype, x.dtype)
    require(x.device == weight.device, "x must be on {}, got {}.", weight.device, x.device)
    shapes = {"weight": (weight, (width,)), "bias": (bias, (width,)), "residual": (residual, (x.shape[-2], width))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            require_rows(name, tensor, weight, shape)
    h, y = torch.ops.sparse_kernels.residual_norm(x, residual, weight, bias, eps, kind)
    return (h, y) if threshold is None else (h, y, *compact(y, threshold))


def glu(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    threshold: Tensor | None = None,
    score: Tensor | None = None,
    limit: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Multiply the activated gate by up, and list the channels of the product that are above a threshold.

    gate: [B, F], 1 <= B <= 64, contiguous rows at any distance (so the halves of one [B, 2F] will do), float32,
    float16 or bfloat16. up: the same, or None for an ungated network. activation: one of ACTIVATIONS.
    threshold: float32 [1] or [F], a constant, or None.
    score: float32 [B, N], or [1, N] for all rows, N dividing F: a row keeps the blocks of F // N channels whose score
    is above limit, float32 [1]; or bool, without a limit, the blocks it keeps; or None. other: [F] in gate's dtype,
    what stands in the rest; None for 0. limit and other are constants.
    Returns h [B, F] in gate's dtype, rounded after the activation and after the product as transformers' modules do;
    with a threshold (h, index int32 [F], count int32 [1]), the list of the channels in which |h| of any row is above
    it, as `compact` makes it. Raises ValueError outside this domain.
    """
    require_scores("gate", gate)
    require(activation in ACTIVATIONS, "activation must be one of {}, got {}.", tuple(ACTIVATIONS), activation)
    if up is not None:
        require_rows("up", up, gate, gate.shape)
    require(score is not None or (limit is None and other is None), "limit and other need a score.")
    if score is not None:
        _require_choice(gate, score, limit, other)
    h = torch.ops.sparse_kernels.glu(gate, up, activation, score, limit, other)
    return h if threshold is None else (h, *compact(h, threshold))


def _require_choice(gate: Tensor, score: Tensor, limit: Tensor | None, other: Tensor | None) -> None:
    batch, width = gate.shape
    kind = torch.bool if limit is None else torch.float32
    fits = score.dim() == 2 and score.shape[0] in (1, batch) and score.shape[1] >= 1 and width % score.shape[1] == 0
    require(fits, "score must be [1 or {}, a divisor of {}], got {}.", batch, width, score.shape)
    good = score.dtype == kind and score.is_contiguous() and score.device == gate.device
    require(good, "score must be contiguous {} on {}, got {}.", kind, gate.device, score.dtype)
    if limit is not None:
        require_threshold(limit, gate, 1)
    if other is not None:
        require_rows("other", other, gate, (width,))


@torch.library.custom_op("sparse_kernels::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    return implementation(x).residual_norm(x, residual, weight, bias, eps, kind)


@_residual_norm.register_fake
def _(x, residual, weight, bias, eps, kind):
    h, y = (weight.new_empty(x.shape[-2:]) for _ in range(2))
    return h, y


@torch.library.custom_op("sparse_kernels::glu", mutates_args=())
def _glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    score: Tensor | None = None,
    limit: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    return implementation(gate).glu(gate, up, activation, score, limit, other)


@_glu.register_fake
def _(gate, up, activation, score=None, limit=None, other=None):
    return gate.new_empty(gate.shape)


@register_flop_formula([torch.ops.sparse_kernels.residual_norm, torch.ops.sparse_kernels.glu])
def _none(*args, **kwargs) -> int:
    """Only matrices are counted."""
    return 0
