"""Triton kernels of routers and predictors: what a layer's experts score, and what a batch scores them together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import begin
from sparse_kernels.launch import depth, interpreting, padded_batch, pick, power_of_2, run
from sparse_kernels.selection.kernel import respond
from sparse_kernels.selection.launch import BATCH_BLOCK, FEW, MANY, SCORE, Score


@triton.jit
def score_kernel(
    x, weight, bias, score, B, D, E, stride_x, stride_w,
    BIAS: tl.constexpr, NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """score[b, e] = act(x[b] . weight[e] + bias[e]) for ROWS experts a program.

    A few rows are multiplied without matrix units, whose tiles would be taken one after another: a program needs many.
    """
    UNITS: tl.constexpr = BATCH >= 16
    b = tl.arange(0, BATCH)
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rows = weight + e.to(tl.int64)[:, None] * stride_w
    if WHOLE:  # all weights of the program are on their way before the kernel that writes x has finished
        w = tl.load(
            rows + column[None, :], mask=(e < E)[:, None] & (column < D)[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
    begin(PDL)
    if WHOLE:
        v = tl.load(x + column[None, :], mask=(column < D)[None, :], other=0.0).to(tl.float32)
        logit = tl.sum(w.to(tl.float32) * v, 1)[None, :]
        squares = tl.sum(v * v)
    else:
        logit = tl.zeros([BATCH, ROWS], tl.float32)
        if not UNITS:
            parts = tl.zeros([BATCH, ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([BATCH, 1], tl.float32)
        for first in tl.range(0, D, COLUMNS, num_stages=STAGES):
            d = first + column
            w = tl.load(
                rows + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0, eviction_policy="evict_first"
            )
            v = tl.load(
                x + b.to(tl.int64)[:, None] * stride_x + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :],
                other=0.0, eviction_policy="evict_last",
            )  # fmt: skip
            if not UNITS:
                parts += w.to(tl.float32)[None, :, :] * v.to(tl.float32)[:, None, :]
            elif UPCAST:
                logit = tl.dot(v.to(tl.float32), tl.trans(w.to(tl.float32)), logit, input_precision="ieee")
            else:
                logit = tl.dot(v, tl.trans(w), logit, input_precision="ieee")
            if NORMALIZE:
                squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)[:, None]
        if not UNITS:
            logit = tl.sum(parts, 2)
    if NORMALIZE:
        logit /= tl.maximum(tl.sqrt(squares), 1e-12)
    if BIAS:
        logit += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    logit = respond(logit, ACTIVATION)
    inside = (b < B)[:, None] & (e < E)[None, :]
    place = score + b.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(place, logit.to(score.dtype.element_ty), mask=inside)


@triton.jit
def batch_kernel(score, out, B, K, stride, BATCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[k] = sum over rows of the positive score[b, k], or the best of them where that is zero."""
    b = tl.arange(0, BATCH)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    place = score + b.to(tl.int64)[:, None] * stride + k[None, :]
    v = tl.load(place, mask=(b < B)[:, None] & (k < K)[None, :], other=-float("inf"))
    total = tl.sum(tl.maximum(v.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL), 0)
    best = tl.max(v.to(tl.float32), 0)  # drops NaN, which the total keeps
    tl.store(out + k, tl.where(total == 0, best, total), mask=k < K)


def batch_score(score: Tensor) -> Tensor:
    """The scores [K] of a batch."""
    batch, units = score.shape
    block = power_of_2(min(units, BATCH_BLOCK))
    out = torch.empty(units, dtype=score.dtype, device=score.device)
    run(
        batch_kernel, (triton.cdiv(units, block),),
        score, out, batch, units, score.stride(0), BATCH=power_of_2(batch), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    normalize: bool,
    narrow: bool,
    config: Score | None = None,
) -> Tensor:
    (batch, width), experts = x.shape, weight.shape[0]
    many = experts > MANY
    few = batch <= FEW and (batch == 1 or not many)
    padded = power_of_2(batch) if few else padded_batch(batch)
    config = config or pick(SCORE, x.device)[min(batch, 2) if few else padded, many]
    columns = min(config.columns, max(16, power_of_2(width)))
    rows = max(1 if few else 16, min(config.elements // columns, power_of_2(experts)))
    held = x.element_size() * columns * (padded + rows)
    score = torch.empty(batch, experts, dtype=x.dtype if narrow else torch.float32, device=x.device)
    run(
        score_kernel, (triton.cdiv(experts, rows),),
        x, weight, bias, score, batch, width, experts, x.stride(0), weight.stride(0),
        BIAS=bias is not None, NORMALIZE=normalize, ACTIVATION=activation, BATCH=padded, ROWS=rows,
        COLUMNS=columns, WHOLE=batch == 1 and columns >= width, STAGES=depth(config.stages, held),
        UPCAST=interpreting(), num_warps=config.warps,
    )  # fmt: skip
    return score
