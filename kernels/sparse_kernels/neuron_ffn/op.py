"""Registered operators `neuron_ffn`, `gate_first_ffn` and `gated_ffn`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.input_linear.op import input_linear
from sparse_kernels.launch import require, require_input, require_list, require_rows, require_threshold, use_triton
from sparse_kernels.neuron_ffn import launch, naive
from sparse_kernels.neuron_ffn.cost import ffn_flops


def require_hidden(
    x: Tensor, gate: Tensor | None, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> None:
    """Check the matrices [F, d] and biases [F] of a hidden layer against x [B, d]."""
    require(activation in ACTIVATIONS, "activation must be one of {}, got {}.", tuple(ACTIVATIONS), activation)
    require(up.dim() == 2 and up.shape[0] >= 1, "up must have shape [neurons, channels], got {}.", up.shape)
    require_rows("up", up, x, (up.shape[0], x.shape[1]))
    if gate is not None:
        require_rows("gate", gate, x, (up.shape[0], x.shape[1]))
    require(gate is not None or gate_bias is None, "gate_bias needs a gate.")
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            require_rows(name, bias, x, (up.shape[0],))


def require_down(x: Tensor, neurons: int, down_t: Tensor, down_bias: Tensor | None) -> None:
    """Check the transposed down projection [F, d_out] and its bias [d_out] against x."""
    require(down_t.dim() == 2, "down_t must have shape [neurons, outputs], got {}.", down_t.shape)
    require_rows("down_t", down_t, x, (neurons, down_t.shape[1]))
    if down_bias is not None:
        require_rows("down_bias", down_bias, x, (down_t.shape[1],))


def neuron_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    group: int = 1,
    partial: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """Run an FFN on the listed neurons.

    x: [B, d], 1 <= B <= 64, contiguous rows, float32, float16 or bfloat16. gate, up: [F, d] and down_t: [F, d_out], the
    down projection transposed: a contiguous row per neuron, any distance between rows. gate is None if the FFN is
    ungated. gate_bias, up_bias: [F]; down_bias: [d_out]. index: int32, at most [F // group], and count: int32 [1]: the
    groups of `group` consecutive neurons to compute, as `compact` lists them; both None: every neuron. activation: one
    of ACTIVATIONS. center: [F], subtracted from what a neuron multiplies its row of down_t by (down_t^T center, which
    is constant, belongs into down_bias).
    Returns y [B, d_out] in x's dtype, the sum over listed neurons j of act(gate_j x) * (up_j x) * down_t[j], or of
    act(up_j x) * down_t[j] if ungated, accumulated in float32 in a fixed order. With `partial` (B = 1, no down_bias,
    rows of at most 16 KiB) returns float32 [P, d_out] instead, P fixed by the GPU, whose sum over P is y: the next
    kernel can add them as it reads. Weights of other neurons are never read and the host does not wait for the list.
    Raises ValueError outside this domain.

    Storage: one row of x reads a neuron's three rows together, so the best storage is one tensor w [F, 3, d] with
    gate, up, down_t = w.unbind(1). Prefill needs no second copy: cuBLAS takes such views as they are, a row stride of
    3 d being its leading dimension.

    Skipping whole neurons follows Deja Vu (Liu et al., 2023, arXiv:2310.17157), which runs the two halves apart.
    """
    require_input(x)
    require_hidden(x, gate, up, gate_bias, up_bias, activation)
    neurons = up.shape[0]
    require_down(x, neurons, down_t, down_bias)
    require(group >= 1 and neurons % group == 0, "group must divide the {} neurons, got {}.", neurons, group)
    require((index is None) == (count is None), "index and count go together.")
    if index is not None and count is not None:
        require_list(index, count, x, neurons // group)
    if center is not None:
        require_rows("center", center, x, (neurons,))
    if partial:
        require(down_bias is None, "Partial sums take no down_bias: add it to their sum.")
        require(launch.takes_rows(x, down_t), "Partial sums need one row of x and rows of at most 16 KiB.")
    return torch.ops.sparse_kernels.neuron_ffn(
        x, gate, up, down_t, index, count, activation, gate_bias, up_bias, down_bias, group, partial, center
    )


def parts(gate: Tensor | None, up: Tensor, index: Tensor | None) -> int:
    """How many partial sums one row of x gives."""
    return launch.fused_launch(gate is not None, index is not None, up.device).count(up.shape[0], up.device)


@torch.library.custom_op(
    "sparse_kernels::neuron_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? index, Tensor? count, str activation,"
    " Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, int group, bool partial,"
    " Tensor? center=None) -> Tensor",
)
def _neuron_ffn(
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
) -> Tensor:
    ffn = (x, gate, up, down_t, index, count, activation, gate_bias, up_bias)
    if not use_triton(x):
        if partial:
            return naive.neuron_ffn_partials(*ffn, group, parts(gate, up, index), center).float()
        return naive.neuron_ffn(*ffn, down_bias, group, center)
    from sparse_kernels.neuron_ffn import kernel

    if launch.takes_rows(x, down_t):
        return kernel.neuron_ffn(*ffn, down_bias, group, partial, center)
    h = kernel.neuron_hidden(x, gate, up, gate_bias, up_bias, index, count, activation, group)
    h = h if center is None else h - center  # also where nothing was computed, which is not read
    if index is None or count is None:
        return F.linear(h, down_t.t(), down_bias)
    return input_linear(h, down_t, index, count, None, down_bias, group)


@_neuron_ffn.register_fake
def _(x, gate, up, down_t, index, count, activation, gate_bias, up_bias, down_bias, group, partial, center=None):
    if partial:
        return x.new_empty(parts(gate, up, index), down_t.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape[0], down_t.shape[1])


def gate_first_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Run an FFN on the neurons whose activation is above the threshold in magnitude.

    threshold: float32 [1]; 0 skips the exact zeros of a ReLU. The rest as in `neuron_ffn`. The first matrix (gate, or
    up if gate is None) is read whole, the others only for neurons with |act(first_j x)| > threshold, compared in
    float32. More rows of x read the union of theirs, and each row still skips its own neurons.
    Returns y [B, d_out] in x's dtype. Raises ValueError outside this domain.

    Source: CATS (Lee et al., 2024, arXiv:2404.08763).
    """
    require_input(x)
    require_hidden(x, gate, up, gate_bias, up_bias, activation)
    require_down(x, up.shape[0], down_t, down_bias)
    require_threshold(threshold, x, 1)
    return torch.ops.sparse_kernels.gate_first_ffn(
        x, gate, up, down_t, threshold, activation, gate_bias, up_bias, down_bias
    )


@torch.library.custom_op(
    "sparse_kernels::gate_first_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor threshold, str activation, Tensor? gate_bias,"
    " Tensor? up_bias, Tensor? down_bias) -> Tensor",
)
def _gate_first_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    ffn = (x, gate, up, down_t, threshold, activation, gate_bias, up_bias, down_bias)
    if not use_triton(x):
        return naive.gate_first_ffn(*ffn)
    from sparse_kernels.neuron_ffn import kernel

    if launch.takes_rows(x, down_t):
        return kernel.gate_first_ffn(*ffn)
    first, first_bias = (up, up_bias) if gate is None else (gate, gate_bias)
    value = kernel.neuron_hidden(x, None, first, None, first_bias, None, None, activation, dtype=torch.float32)
    # Not the checked `compact`, which takes at most 65536 channels: an FFN may have more neurons.
    index, count = torch.ops.sparse_kernels.compact(value, threshold, True)
    if gate is None:
        h = torch.where(value.abs() > threshold, value, 0).to(x.dtype)
    else:
        h = kernel.neuron_hidden(x, None, up, None, up_bias, index, count, "relu", value=value, threshold=threshold)
    return input_linear(h, down_t, index, count, None, down_bias)


@_gate_first_ffn.register_fake
def _(x, gate, up, down_t, threshold, activation, gate_bias, up_bias, down_bias):
    return x.new_empty(x.shape[0], down_t.shape[1])


def gated_ffn(
    x: Tensor,
    value: Tensor,
    up: Tensor,
    down_t: Tensor,
    index: Tensor,
    count: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Run the rest of a gated FFN whose gate is known, on the listed neurons.

    value: float32 [B, F], contiguous, the activations of the gate, 0 for the neurons that a row skips. The rest as in
    `neuron_ffn`; index int32 [F] and count int32 [1] list the neurons that any row needs.
    Returns y [B, d_out] in x's dtype, the sum over listed neurons j of value_j * (up_j x) * down_t[j]. Weights of other
    neurons are never read. Raises ValueError outside this domain.

    Source: Spark Transformer (arXiv 2506.06644), whose gate reads other channels than up: x is then up's share.
    """
    require_input(x)
    require_hidden(x, None, up, None, up_bias, "relu")
    neurons = up.shape[0]
    require_down(x, neurons, down_t, down_bias)
    require_list(index, count, x, neurons)
    wide = value.dtype in (torch.float32, torch.float64) and value.is_contiguous() and value.device == x.device
    fits = value.shape == (x.shape[0], neurons)
    require(wide and fits, "value must be a contiguous float32 {} on {}.", (x.shape[0], neurons), x.device)
    return torch.ops.sparse_kernels.gated_ffn(x, value, up, down_t, index, count, up_bias, down_bias)


@torch.library.custom_op("sparse_kernels::gated_ffn", mutates_args=())
def _gated_ffn(
    x: Tensor,
    value: Tensor,
    up: Tensor,
    down_t: Tensor,
    index: Tensor,
    count: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    arguments = (x, value, up, down_t, index, count, up_bias, down_bias)
    if not use_triton(x):
        return naive.gated_ffn(*arguments)
    from sparse_kernels.neuron_ffn import kernel

    if launch.takes_rows(x, down_t):
        return kernel.gated_ffn(*arguments)
    h = kernel.neuron_hidden(x, None, up, None, up_bias, index, count, "relu", value=value)
    return input_linear(h, down_t, index, count, None, down_bias)


@_gated_ffn.register_fake
def _(x, value, up, down_t, index, count, up_bias, down_bias):
    return x.new_empty(x.shape[0], down_t.shape[1])


@register_flop_formula(torch.ops.sparse_kernels.gated_ffn)
def _gated_flops(x_shape, value_shape, up_shape, down_shape, *args, **kwargs) -> int:
    """Those of the dense up and down: what is skipped is not known from shapes."""
    return int(ffn_flops(x_shape[0], x_shape[1], down_shape[1], up_shape[0], False))


@register_flop_formula([torch.ops.sparse_kernels.neuron_ffn, torch.ops.sparse_kernels.gate_first_ffn])
def _flops(x_shape, gate_shape, up_shape, down_shape, *args, **kwargs) -> int:
    """Those of the dense FFN: what is skipped is not known from shapes."""
    return int(ffn_flops(x_shape[0], x_shape[1], down_shape[1], up_shape[0], gate_shape is not None))
