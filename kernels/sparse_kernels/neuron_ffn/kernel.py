"""Triton kernels of feed-forward networks that compute selected neurons only.

One row of x: a program takes whole rows of weights. It keeps x and its own sum over neurons in registers, so that a
neuron's three rows are read one after another and its value never leaves the program; the programs' sums are added by
a second kernel in a fixed order. More rows of x: `hidden_kernel` computes the hidden layer in tiles on the matrix
units. Grids are fixed; programs read the length of the list on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.blocks import activate, begin, load_rows
from sparse_kernels.launch import Launch, Rows, interpreting, multiprocessors, padded_batch, pick, power_of_2, run
from sparse_kernels.neuron_ffn.launch import LAUNCH, fused_launch, hidden_launch


@triton.jit
def load_neurons(
    gate, up, down, index, start, last, stride_gate, stride_up, stride_down,
    LISTED: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
):  # fmt: skip
    """The neurons at positions start... of the list [ROWS], and their rows of gate, up and down."""
    p = start + tl.arange(0, ROWS)
    live = p < last
    f = p.to(tl.int64)
    if LISTED:
        f = tl.load(index + p // GROUP, mask=live, other=0).to(tl.int64) * GROUP + p % GROUP
    w = load_rows(down, stride_down, f, live, OUT, OUT_WIDTH)
    u = load_rows(up, stride_up, f, live, D, WIDTH) if UP else w
    g = load_rows(gate, stride_gate, f, live, D, WIDTH) if GATED else u
    return f, g, u, w


@triton.jit
def fused_kernel(
    x, gate, up, down, gate_bias, up_bias, center, value, index, count, partial,
    F, stride_gate, stride_up, stride_down,
    LISTED: tl.constexpr, SURVIVORS: tl.constexpr, VALUES: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[program] = sum over this program's neurons of h * (row of down).

    A program takes an even share of all neurons or of the list (in 32-bit positions: neurons x programs is far below
    2^31, and 64-bit divisions would be felt). With SURVIVORS it takes what it listed itself in `first_kernel`, the
    values of their activations included: h is that value, times the product with up if UP. With VALUES the activations
    of all neurons are given [F].
    """
    AHEAD: tl.constexpr = STAGES == 1
    program = tl.program_id(0)
    if LISTED:
        begin(PDL)
    if SURVIVORS:
        first, last = 0, tl.load(count + program)
        index += program.to(tl.int64) * SLOTS
        value += program.to(tl.int64) * SLOTS
    else:
        total = tl.load(count) * GROUP if LISTED else F
        first = total * program // tl.num_programs(0)
        last = total * (program + 1) // tl.num_programs(0)
    if AHEAD:
        f, g, u, w = load_neurons(
            gate, up, down, index, first, last, stride_gate, stride_up, stride_down,
            LISTED, GROUP, GATED, UP, ROWS, D, WIDTH, OUT, OUT_WIDTH,
        )  # fmt: skip
    if not LISTED:  # with AHEAD, the first weights are on their way while the kernel that computes x still runs
        begin(PDL)
    d = tl.arange(0, WIDTH)
    v = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([OUT_WIDTH], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        now = load_neurons(
            gate, up, down, index, start + ROWS if AHEAD else start, last, stride_gate, stride_up, stride_down,
            LISTED, GROUP, GATED, UP, ROWS, D, WIDTH, OUT, OUT_WIDTH,
        )  # fmt: skip
        if not AHEAD:
            f, g, u, w = now
        p = start + tl.arange(0, ROWS)
        live = p < last
        if UP and GATED:  # joined, the two sums cost one exchange between warps
            sums = tl.sum(tl.join(g.to(tl.float32) * v, u.to(tl.float32) * v), 1)
            gate_sum, up_sum = tl.split(sums)
        elif UP:
            up_sum = tl.sum(u.to(tl.float32) * v, 1)
        if UP_BIAS:
            up_sum += tl.load(up_bias + f, mask=live, other=0.0).to(tl.float32)
        if GATE_BIAS:
            gate_sum += tl.load(gate_bias + f, mask=live, other=0.0).to(tl.float32)
        if SURVIVORS or VALUES:
            h = tl.load(value + (f if VALUES else p), mask=live, other=0.0)
            if UP:
                h *= up_sum
        elif GATED:
            h = activate(gate_sum, ACTIVATION) * up_sum
        else:
            h = activate(up_sum, ACTIVATION)
        if CENTER:
            h -= tl.load(center + f, mask=live, other=0.0).to(tl.float32)
        acc += tl.sum(h[:, None] * w.to(tl.float32), 0)
        if AHEAD:
            f, g, u, w = now
    n = tl.arange(0, OUT_WIDTH)
    tl.store(partial + program.to(tl.int64) * OUT + n, acc, mask=n < OUT)


@triton.jit
def reduce_kernel(
    partial, bias, y, N, PARTS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[n] = sum over parts of partial[part, n] (+ bias[n])."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    begin(PDL)
    for first in tl.static_range(0, PARTS, ROWS):
        row = (first + r).to(tl.int64)
        inside = (row < PARTS)[:, None] & (n < N)[None, :]
        acc += tl.load(partial + row[:, None] * N + n[None, :], mask=inside, other=0.0)
    total = tl.sum(acc, 0)
    if BIAS:
        total += shift
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def first_kernel(
    x, weight, bias, threshold, value, index, count, F, stride,
    SLOTS: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program lists its neurons with |act(weight x)| > threshold, and their activations, in its own SLOTS slots.

    Neurons are dealt to the programs one by one: their order then hardly matters to how evenly survivors are shared,
    and a program that got more reads on while others have finished.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    d = tl.arange(0, WIDTH)
    limit = tl.load(threshold)
    begin(PDL)
    v = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    slots = program.to(tl.int64) * SLOTS
    found = 0
    for start in tl.range(program, F, programs * ROWS, num_stages=STAGES):
        f = start + tl.arange(0, ROWS) * programs
        live = f < F
        total = tl.sum(load_rows(weight, stride, f.to(tl.int64), live, D, WIDTH).to(tl.float32) * v, 1)
        if BIAS:
            total += tl.load(bias + f, mask=live, other=0.0).to(tl.float32)
        total = activate(total, ACTIVATION)
        keep = (live & (tl.abs(total) > limit)).to(tl.int32)
        slot = slots + found + tl.cumsum(keep, 0) - keep
        tl.store(index + slot, f, mask=keep != 0)
        tl.store(value + slot, total, mask=keep != 0)
        found += tl.sum(keep, 0)
    tl.store(count + program, found)


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
    x, gate, up, gate_bias, up_bias, value, score, threshold, index, count, h,
    B, D, F, stride_x, stride_gate, stride_up, stride_score,
    LISTED: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr, SCORES: tl.constexpr, LIMIT: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[b, f] of all neurons or of the listed ones.

    SCORES: zero where the row's score of the neuron's group is at most the threshold. VALUES: the activations are
    given [B, F]; those at most the threshold in magnitude count as zero, if there is one (LIMIT).
    """
    b = tl.arange(0, BATCH)
    program = tl.program_id(0)
    if LIMIT:
        limit = tl.load(threshold)
    begin(PDL)
    total = tl.load(count) * GROUP if LISTED else F
    first = total * program // tl.num_programs(0)
    last = total * (program + 1) // tl.num_programs(0)
    for start in range(first, last, ROWS):
        p = start + tl.arange(0, ROWS)
        live = p < last
        block = p // GROUP
        if LISTED:
            block = tl.load(index + block, mask=live, other=0)
        f = block.to(tl.int64) * GROUP + p % GROUP
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
        if GATE_BIAS:
            gate_sum += tl.load(gate_bias + f, mask=live, other=0.0).to(tl.float32)[None, :]
        inside = (b < B)[:, None] & live[None, :]
        place = b.to(tl.int64)[:, None] * F + f[None, :]
        if VALUES:
            given = tl.load(value + place, mask=inside, other=0.0)
            hidden = given * up_sum
            if LIMIT:
                hidden = tl.where(tl.abs(given) > limit, hidden, 0.0)
        elif GATED:
            hidden = activate(gate_sum, ACTIVATION) * up_sum
        else:
            hidden = activate(up_sum, ACTIVATION)
        if SCORES:
            scores = tl.load(score + b.to(tl.int64)[:, None] * stride_score + block[None, :], mask=inside, other=0.0)
            hidden = tl.where(scores > limit, hidden, 0.0)
        tl.store(h + place, hidden.to(h.dtype.element_ty), mask=inside)


def neuron_hidden(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    group: int = 1,
    value: Tensor | None = None,
    score: Tensor | None = None,
    threshold: Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: Launch | None = None,
) -> Tensor:
    (batch, width), neurons = x.shape, up.shape[0]
    config = config or hidden_launch(padded_batch(batch), neurons, x.device)
    h = torch.empty(batch, neurons, dtype=dtype or x.dtype, device=x.device)
    programs = min(config.programs * multiprocessors(x.device), triton.cdiv(neurons, config.rows))
    run(
        hidden_kernel, (programs,),
        x, gate, up, gate_bias, up_bias, value, score, threshold, index, count, h,
        batch, width, neurons, x.stride(0), 0 if gate is None else gate.stride(0), up.stride(0),
        0 if score is None else score.stride(0),
        LISTED=index is not None, GROUP=group, VALUES=value is not None, SCORES=score is not None,
        LIMIT=threshold is not None, GATED=gate is not None, GATE_BIAS=gate_bias is not None,
        UP_BIAS=up_bias is not None, ACTIVATION=activation, BATCH=padded_batch(batch), ROWS=config.rows,
        COLUMNS=max(64, min(config.columns, power_of_2(width))), STAGES=config.stages, UPCAST=interpreting(),
        num_warps=config.warps,
    )  # fmt: skip
    return h


def fused(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    group: int,
    value: Tensor | None,
    programs: int,
    config: Rows,
    survivors: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """Launch `fused_kernel`: partial sums [programs, d_out]. survivors: value and list are `first_kernel`'s."""
    width, (neurons, out) = x.shape[1], down_t.shape
    rows, warps = config.fit(max(width, out), x.element_size())
    partial = torch.empty(programs, out, dtype=torch.float32, device=x.device)
    run(
        fused_kernel, (programs,),
        x, gate, up, down_t, gate_bias, up_bias, center, value, index, count, partial, neurons,
        0 if gate is None else gate.stride(0), 0 if up is None else up.stride(0), down_t.stride(0),
        LISTED=index is not None, SURVIVORS=survivors, VALUES=value is not None and not survivors,
        SLOTS=triton.cdiv(neurons, programs) if survivors else 0, GROUP=group,
        GATED=gate is not None, UP=up is not None, GATE_BIAS=gate_bias is not None, UP_BIAS=up_bias is not None,
        CENTER=center is not None, ACTIVATION=activation, D=width, WIDTH=power_of_2(width), OUT=out,
        OUT_WIDTH=power_of_2(out), ROWS=rows, STAGES=config.stages, num_warps=warps,
    )  # fmt: skip
    return partial


def reduce(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    parts, out = partial.shape
    y = torch.empty(1, out, dtype=dtype, device=partial.device)
    run(
        reduce_kernel, (triton.cdiv(out, 32),), partial, bias, y, out,
        PARTS=parts, BIAS=bias is not None, ROWS=64, COLUMNS=32, num_warps=8,
    )  # fmt: skip
    return y


def neuron_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    group: int,
    partial: bool,
    center: Tensor | None = None,
    config: Rows | None = None,
) -> Tensor:
    config = config or fused_launch(gate is not None, index is not None, x.device)
    programs = config.count(up.shape[0], x.device)
    parts = fused(
        x, gate, up, down_t, gate_bias, up_bias, index, count, activation, group, None, programs, config, center=center
    )  # fmt: skip
    return parts if partial else reduce(parts, down_bias, x.dtype)


def gate_first_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    configs: tuple[Rows, Rows] | None = None,
) -> Tensor:
    table = pick(LAUNCH, x.device)
    config, rest = configs or (table["first", 1], table["survivors", 1 + (gate is not None)])
    first, bias = (up, up_bias) if gate is None else (gate, gate_bias)
    width, neurons = x.shape[1], first.shape[0]
    programs = rest.count(neurons, x.device)
    slots = triton.cdiv(neurons, programs)
    value = torch.empty(programs * slots, dtype=torch.float32, device=x.device)
    index = torch.empty(programs * slots, dtype=torch.int32, device=x.device)
    count = torch.empty(programs, dtype=torch.int32, device=x.device)
    rows, warps = config.fit(width, x.element_size())
    run(
        first_kernel, (programs,), x, first, bias, threshold, value, index, count, neurons, first.stride(0),
        SLOTS=slots, BIAS=bias is not None, ACTIVATION=activation, D=width, WIDTH=power_of_2(width), ROWS=rows,
        STAGES=config.stages, num_warps=warps,
    )  # fmt: skip
    parts = fused(
        x, None, None if gate is None else up, down_t, None, None if gate is None else up_bias, index, count,
        activation, 1, value, programs, rest, survivors=True,
    )  # fmt: skip
    return reduce(parts, down_bias, x.dtype)


def gated_ffn(
    x: Tensor,
    value: Tensor,
    up: Tensor,
    down_t: Tensor,
    index: Tensor,
    count: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    config: Rows | None = None,
) -> Tensor:
    config = config or fused_launch(False, True, x.device)
    programs = config.count(up.shape[0], x.device)
    parts = fused(x, None, up, down_t, None, up_bias, index, count, "relu", 1, value, programs, config)
    return reduce(parts, down_bias, x.dtype)
