"""Triton kernels of `expert_ffn_prefill`.

Hidden layer: tokens are grouped by expert, so that an expert's weights are multiplied only with the tokens that need
it. Down projection: a program owns a tile of the output and adds up the experts that any of its tokens needs; no two
programs add to the same place, so there are no atomics and two runs agree to the bit. Grids are those of the worst
case; programs without tokens return at once, and the host never learns how many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import activate, begin
from sparse_kernels.expert_ffn.launch import LAUNCH, Routed
from sparse_kernels.launch import depth, interpreting, pick, power_of_2, run


@triton.jit
def group_kernel(
    score, threshold, tokens, sizes, T, E, stride, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr
):
    """tokens[e, :sizes[e]] = the tokens whose score of expert e is above the threshold, in ascending order."""
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    limit = tl.load(threshold)
    begin(PDL)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, T, TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = (t < T)[:, None] & (e < E)[None, :]
        s = tl.load(score + t.to(tl.int64)[:, None] * stride + e[None, :], mask=inside, other=0.0)
        on = (inside & (s > limit)).to(tl.int32)
        place = e.to(tl.int64)[None, :] * T + found[None, :] + tl.cumsum(on, 0) - on
        tl.store(tokens + place, tl.broadcast_to(t[:, None], [TOKENS, EXPERTS]), mask=on != 0)
        found += tl.sum(on, 0)
    tl.store(sizes + e, found, mask=e < E)


@triton.jit
def union_kernel(
    score, threshold, experts, counts, T, E, stride, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr
):
    """experts[tile, :counts[tile]] = the experts whose score is above the threshold for any token of the tile."""
    tile = tl.program_id(0)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    limit = tl.load(threshold)
    begin(PDL)
    found = 0
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        inside = (t < T)[:, None] & (e < E)[None, :]
        s = tl.load(score + t.to(tl.int64)[:, None] * stride + e[None, :], mask=inside, other=0.0)
        on = tl.max((inside & (s > limit)).to(tl.int32), 0)
        tl.store(experts + tile.to(tl.int64) * E + found + tl.cumsum(on, 0) - on, e, mask=on != 0)
        found += tl.sum(on, 0)
    tl.store(counts + tile, found)


@triton.jit
def product(acc, a, b, UPCAST: tl.constexpr):
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def routed_hidden_kernel(
    x, gate, up, gate_bias, up_bias, tokens, sizes, h, T, D, F, stride_x, stride_gate, stride_up,
    BLOCK: tl.constexpr, GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h[t, f] of NEURONS of an expert's BLOCK neurons for TOKENS of its tokens."""
    CHUNKS: tl.constexpr = (BLOCK + NEURONS - 1) // NEURONS
    e = tl.program_id(1) // CHUNKS
    j = tl.program_id(1) % CHUNKS * NEURONS + tl.arange(0, NEURONS)
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    begin(PDL)
    size = tl.load(sizes + e)
    if tl.program_id(0) * TOKENS < size:
        t = tl.load(tokens + e.to(tl.int64) * T + i, mask=i < size, other=0).to(tl.int64)
        f = (e * BLOCK + j).to(tl.int64)
        up_sum = tl.zeros([TOKENS, NEURONS], tl.float32)
        gate_sum = up_sum
        for column in tl.range(0, D, COLUMNS, num_stages=STAGES):
            d = column + tl.arange(0, COLUMNS)
            v = tl.load(x + t[:, None] * stride_x + d[None, :], mask=(i < size)[:, None] & (d < D)[None, :], other=0.0)
            inside = (d < D)[:, None] & (j < BLOCK)[None, :]
            w = tl.load(up + f[None, :] * stride_up + d[:, None], mask=inside, other=0.0)
            up_sum = product(up_sum, v, w, UPCAST)
            if GATED:
                g = tl.load(gate + f[None, :] * stride_gate + d[:, None], mask=inside, other=0.0)
                gate_sum = product(gate_sum, v, g, UPCAST)
        if UP_BIAS:
            up_sum += tl.load(up_bias + f, mask=j < BLOCK, other=0.0).to(tl.float32)[None, :]
        if GATE_BIAS:
            gate_sum += tl.load(gate_bias + f, mask=j < BLOCK, other=0.0).to(tl.float32)[None, :]
        if GATED:
            hidden = activate(gate_sum, ACTIVATION) * up_sum
        else:
            hidden = activate(up_sum, ACTIVATION)
        inside = (i < size)[:, None] & (j < BLOCK)[None, :]
        tl.store(h + t[:, None] * F + f[None, :], hidden.to(h.dtype.element_ty), mask=inside)


@triton.jit
def routed_down_kernel(
    h, down, bias, experts, counts, y, T, E, F, N, stride,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[t, n] of a tile of tokens, over the tile's experts in ascending order."""
    CHUNKS: tl.constexpr = (BLOCK + NEURONS - 1) // NEURONS
    tile = tl.program_id(1)
    t = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin(PDL)
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for q in tl.range(0, tl.load(counts + tile) * CHUNKS, num_stages=STAGES):
        e = tl.load(experts + tile.to(tl.int64) * E + q // CHUNKS)
        j = q % CHUNKS * NEURONS + tl.arange(0, NEURONS)
        f = e * BLOCK + j
        v = tl.load(h + t[:, None] * F + f[None, :], mask=(t < T)[:, None] & (j < BLOCK)[None, :], other=0.0)
        w = tl.load(
            down + f.to(tl.int64)[:, None] * stride + n[None, :],
            mask=(j < BLOCK)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = product(acc, v, w, UPCAST)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


def expert_ffn_prefill(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    score: Tensor,
    threshold: Tensor,
    activation: str,
    configs: tuple[Routed, Routed] | None = None,
) -> Tensor:
    table = pick(LAUNCH, x.device)
    first, second = configs or (table["hidden"], table["down"])
    (total, width), (neurons, out), experts = x.shape, down_t.shape, score.shape[1]
    block = neurons // experts
    tokens = torch.empty(experts, total, dtype=torch.int32, device=x.device)
    sizes = torch.empty(experts, dtype=torch.int32, device=x.device)
    run(
        group_kernel, (triton.cdiv(experts, 8),), score, threshold, tokens, sizes, total, experts, score.stride(0),
        TOKENS=256, EXPERTS=8, num_warps=4,
    )  # fmt: skip
    tiles = triton.cdiv(total, second.tokens)
    listed = torch.empty(tiles, experts, dtype=torch.int32, device=x.device)
    counts = torch.empty(tiles, dtype=torch.int32, device=x.device)
    run(
        union_kernel, (tiles,), score, threshold, listed, counts, total, experts, score.stride(0),
        TOKENS=second.tokens, EXPERTS=64, num_warps=4,
    )  # fmt: skip
    # Zero where a token does not need an expert that others of its tile need.
    h = torch.empty(total, neurons, dtype=x.dtype, device=x.device).zero_()
    part = max(16, min(first.neurons, power_of_2(block)))
    held = x.element_size() * first.columns * (first.tokens + (1 if gate is None else 2) * part)
    run(
        routed_hidden_kernel, (triton.cdiv(total, first.tokens), experts * triton.cdiv(block, part)),
        x, gate, up, gate_bias, up_bias, tokens, sizes, h, total, width, neurons, x.stride(0),
        0 if gate is None else gate.stride(0), up.stride(0),
        BLOCK=block, GATED=gate is not None, GATE_BIAS=gate_bias is not None, UP_BIAS=up_bias is not None,
        ACTIVATION=activation, TOKENS=first.tokens, NEURONS=part, COLUMNS=first.columns,
        STAGES=depth(first.stages, held), UPCAST=interpreting(), num_warps=first.warps,
    )  # fmt: skip
    y = torch.empty(total, out, dtype=x.dtype, device=x.device)
    part = max(16, min(second.neurons, power_of_2(block)))
    held = x.element_size() * part * (second.tokens + second.columns)
    run(
        routed_down_kernel, (triton.cdiv(out, second.columns), tiles),
        h, down_t, down_bias, listed, counts, y, total, experts, neurons, out, down_t.stride(0),
        BLOCK=block, BIAS=down_bias is not None, TOKENS=second.tokens, NEURONS=part, COLUMNS=second.columns,
        STAGES=depth(second.stages, held), UPCAST=interpreting(), num_warps=second.warps,
    )  # fmt: skip
    return y
