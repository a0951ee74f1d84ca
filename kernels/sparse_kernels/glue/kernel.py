"""Triton kernels of `residual_norm` and `glu`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import activate, begin
from sparse_kernels.glue.launch import LAUNCH
from sparse_kernels.launch import pick, power_of_2, run
from sparse_kernels.selection.launch import Scan


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """Float32 values as they are after being stored as DTYPE."""
    return v.to(DTYPE).to(tl.float32)


@triton.jit
def norm_kernel(
    x, residual, weight, bias, h, y, N, stride_x, stride_part, stride_residual, eps,
    KIND: tl.constexpr, PARTS: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, WIDTH)
    inside = n < N
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    v = tl.load(x + row * stride_x + n, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        v += tl.load(x + part * stride_part + row * stride_x + n, mask=inside, other=0.0)
    v = rounded(v, DTYPE)
    if RESIDUAL:
        v = rounded(v + tl.load(residual + row * stride_residual + n, mask=inside, other=0.0).to(tl.float32), DTYPE)
    tl.store(h + row * N + n, v.to(DTYPE), mask=inside)
    if KIND == "layer":
        v = tl.where(inside, v - tl.sum(v, 0) / N, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / N + tl.cast(eps, tl.float32))
    if KIND == "rms":
        v = rounded(v, DTYPE)
    v *= 1.0 + w if KIND == "gemma" else w
    if BIAS:
        v += shift
    tl.store(y + row * N + n, v.to(DTYPE), mask=inside)


@triton.jit
def glu_kernel(
    gate, up, score, limit, other, h, B, F, stride_score, stride_gate, stride_up,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, CHOSEN: tl.constexpr, LIMIT: tl.constexpr, OTHER: tl.constexpr,
    GROUP: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(gate) * up, where CHOSEN in the blocks of GROUP channels that a row's score (or mask) selects."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    f = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    b = tl.arange(0, BATCH).to(tl.int64)[:, None]
    inside = (b < B) & (f < F)
    if LIMIT:
        least = tl.load(limit)
    if OTHER:
        rest = tl.load(other + f, mask=f < F, other=0.0)
    begin(PDL)
    if CHOSEN:
        chosen = tl.load(score + b * stride_score + f // GROUP, mask=inside, other=0)
    v = tl.load(gate + b * stride_gate + f, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(up + b * stride_up + f, mask=inside, other=0.0).to(tl.float32)
    v = activate(v, ACTIVATION)
    if GATED:
        v = rounded(v, DTYPE) * u
    v = v.to(DTYPE)
    if CHOSEN:
        v = tl.where(chosen > least if LIMIT else chosen != 0, v, rest if OTHER else tl.zeros_like(v))
    tl.store(h + b * F + f, v, mask=inside)


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    config: Scan | None = None,
) -> tuple[Tensor, Tensor]:
    (batch, width), device = x.shape[-2:], x.device
    config = config or pick(LAUNCH, device)["norm"]
    padded = power_of_2(width)
    h, y = (torch.empty(batch, width, dtype=weight.dtype, device=device) for _ in range(2))
    run(
        norm_kernel, (batch,), x, residual, weight, bias, h, y,
        width, x.stride(-2), x.stride(0), 0 if residual is None else residual.stride(0), eps,
        KIND=kind, PARTS=x.shape[0] if x.dim() == 3 else 1, RESIDUAL=residual is not None, BIAS=bias is not None,
        WIDTH=padded, num_warps=config.warps_for(padded),
    )  # fmt: skip
    return h, y


def glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    score: Tensor | None = None,
    limit: Tensor | None = None,
    other: Tensor | None = None,
    config: Scan | None = None,
) -> Tensor:
    (batch, width), device = gate.shape, gate.device
    config = config or pick(LAUNCH, device)["glu"]
    h = torch.empty(batch, width, dtype=gate.dtype, device=device)
    if score is not None and limit is None:
        score = score.view(torch.int8)
    rows, blocks = power_of_2(batch), 1 if score is None else score.shape[1]
    block = max(32, min(config.block // rows, power_of_2(width)))
    run(
        glu_kernel, (triton.cdiv(width, block),),
        gate, up, score, limit, other, h,
        batch, width, 0 if score is None or len(score) == 1 else blocks, gate.stride(0),
        0 if up is None else up.stride(0),
        GATED=up is not None, ACTIVATION=activation, CHOSEN=score is not None, LIMIT=limit is not None,
        OTHER=other is not None, GROUP=width // blocks, BATCH=rows, BLOCK=block,
        num_warps=config.warps_for(block * rows),
    )  # fmt: skip
    return h
