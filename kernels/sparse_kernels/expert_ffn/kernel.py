"""Triton kernel of `expert_hidden`.

The grid is fixed; each program takes an even share of the neurons in the listed blocks, a few rows at a time, and
streams their gate and up weights together so that the product needs no second pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.launch import (
    EXPERT_HIDDEN,
    Launch,
    interpreting,
    multiprocessors,
    padded_batch,
    power_of_2,
    run,
)


@triton.jit
def activate(v, NAME: tl.constexpr):
    if NAME == "silu":
        v = v * tl.sigmoid(v)
    elif NAME == "gelu":
        v = 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if NAME == "relu2":
            v = v * v
    return v


@triton.jit
def multiply(acc, x, w, BATCH: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x [BATCH, columns] times w [rows, columns]; for one row of x the sum over columns is left to the end."""
    if BATCH == 1:
        acc += x.to(tl.float32) * w.to(tl.float32)
    elif UPCAST:
        acc = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def hidden_kernel(
    x, gate, up, gate_bias, up_bias, score, threshold, index, count, h,
    B, D, F, stride_x, stride_gate, stride_up, stride_score,
    BLOCK: tl.constexpr, GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BATCH)
    total = tl.load(count) * BLOCK
    program = tl.program_id(0).to(tl.int64)
    first = (total * program // tl.num_programs(0)).to(tl.int32)
    last = (total * (program + 1) // tl.num_programs(0)).to(tl.int32)
    for start in range(first, last, ROWS):
        p = start + tl.arange(0, ROWS)
        live = p < last
        block = tl.load(index + p // BLOCK, mask=live, other=0)
        f = block.to(tl.int64) * BLOCK + p % BLOCK
        up_sum = tl.zeros([ROWS, COLUMNS] if BATCH == 1 else [BATCH, ROWS], tl.float32)
        gate_sum = up_sum
        for column in tl.range(0, D, COLUMNS, num_stages=STAGES):
            d = column + tl.arange(0, COLUMNS)
            inside = live[:, None] & (d < D)[None, :]
            v = tl.load(
                x + b.to(tl.int64)[:, None] * stride_x + d[None, :],
                mask=(b < B)[:, None] & (d < D)[None, :],
                other=0.0,
                eviction_policy="evict_last",
            )
            w = tl.load(up + f[:, None] * stride_up + d[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            if GATED:
                g = tl.load(
                    gate + f[:, None] * stride_gate + d[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
                )
                gate_sum = multiply(gate_sum, v, g, BATCH, UPCAST)
            up_sum = multiply(up_sum, v, w, BATCH, UPCAST)
        if BATCH == 1:
            up_sum = tl.sum(up_sum, 1)[None, :]
            gate_sum = tl.sum(gate_sum, 1)[None, :]
        if UP_BIAS:
            up_sum += tl.load(up_bias + f, mask=live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if GATE_BIAS:
                gate_sum += tl.load(gate_bias + f, mask=live, other=0.0).to(tl.float32)[None, :]
            value = activate(gate_sum, ACTIVATION) * up_sum
        else:
            value = activate(up_sum, ACTIVATION)
        inside = (b < B)[:, None] & live[None, :]
        scores = tl.load(score + b.to(tl.int64)[:, None] * stride_score + block[None, :], mask=inside, other=0.0)
        value = tl.where(scores > tl.load(threshold), value, 0.0)
        tl.store(h + b.to(tl.int64)[:, None] * F + f[None, :], value.to(h.dtype.element_ty), mask=inside)


def expert_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    score: Tensor,
    threshold: Tensor,
    index: Tensor,
    count: Tensor,
    activation: str,
    config: Launch | None = None,
) -> Tensor:
    (batch, width), neurons = x.shape, up.shape[0]
    config = config or EXPERT_HIDDEN[padded_batch(batch)]
    h = torch.empty(batch, neurons, dtype=x.dtype, device=x.device)
    programs = min(config.programs * multiprocessors(x.device), triton.cdiv(neurons, config.rows))
    run(
        hidden_kernel, (programs,),
        x, gate, up, gate_bias, up_bias, score, threshold, index, count, h,
        batch, width, neurons, x.stride(0), 0 if gate is None else gate.stride(0), up.stride(0), score.stride(0),
        BLOCK=neurons // score.shape[1], GATED=gate is not None, GATE_BIAS=gate_bias is not None,
        UP_BIAS=up_bias is not None, ACTIVATION=activation, BATCH=padded_batch(batch), ROWS=config.rows,
        COLUMNS=max(64, min(config.columns, power_of_2(width))), STAGES=config.stages, UPCAST=interpreting(),
        num_warps=config.warps,
    )  # fmt: skip
    return h
