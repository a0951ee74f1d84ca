"""Registered operators `input_linear`, `threshold_linear` and `row_stats`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.input_linear import naive
from sparse_kernels.input_linear.launch import STATS_TILE, by_output, cdiv, grid_for, masked_grid, path_for
from sparse_kernels.launch import (
    require,
    require_input,
    require_list,
    require_rows,
    require_threshold,
    use_triton,
)

NORMS = ("", "rms", "layer", "gemma")
SELECTS = ("auto", "list", "mask")


def require_near(x: Tensor) -> None:
    """Check that the kernels reach all rows of x by 32-bit offsets."""
    far = (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    require(far < 2**31, "x must have rows within 2^31 values, got strides {}: call contiguous() first.", x.stride())


def input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """Multiply x by the weights of the listed input channels only.

    x: [B, K], 1 <= B <= 64, contiguous rows, float32, float16 or bfloat16. weight_t: [K, N], the weight of a linear
    layer transposed; each row contiguous, any distance between rows. index: int32 [K // group] and count: int32 [1]:
    the groups of `group` consecutive channels to read, as `compact` lists them. threshold: float32 [1] or [K]; a row's
    values with |x| <= threshold count as zero (needed where the list is a union over rows). bias: [N].
    Returns y [B, N] in x's dtype, y_b = sum over listed k of s(x_bk) * weight_t[k] (+ bias), accumulated in float32 in
    a fixed order. Weights of other channels are never read and the host does not wait for the list.
    Raises ValueError outside this domain.

    The index list follows TEAL (Liu et al., 2024, arXiv:2408.14690), which masks the same loads instead.
    """
    require_input(x)
    require_near(x)
    require(weight_t.dim() == 2, "weight_t must have shape [channels, outputs], got {}.", weight_t.shape)
    channels, width = x.shape[1], weight_t.shape[1]
    require(group >= 1 and channels % group == 0, "group must divide the {} channels, got {}.", channels, group)
    require_rows("weight_t", weight_t, x, (channels, width))
    require_list(index, count, x, channels // group)
    if threshold is not None:
        require_threshold(threshold, x, channels)
    if bias is not None:
        require_rows("bias", bias, x, (width,))
    return torch.ops.sparse_kernels.input_linear(x, weight_t, index, count, threshold, bias, group)


def threshold_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor | None,
    widths: list[int] | None = None,
    *,
    select: str = "auto",
    invert: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    stats: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
    center: Tensor | None = None,
    side: Tensor | None = None,
    side_up: Tensor | None = None,
    with_stats: bool = False,
    partial: bool = False,
    density: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From a decode step's vectors to a linear layer's output, reading the weights of large channels only.

    x: [B, K], or [B, 2 K] if `gated`; 1 <= B <= 64, contiguous rows; or what `partial` left of it, float32
    [parts, B, K or 2 K], whose sum it then is. weight_t: [K, N], the transposed weights of one or more layers side by
    side, `widths` outputs each (at most 3; default [N]). threshold: float32 [len(widths)] or [len(widths), K]: a layer
    reads channel k where any row has |v_k| above it, and counts smaller values as zero; None reads everything, and then
    weight_t may also be the transposed view of weights as transformers stores them.
    select: "list" streams a list of the channels, "mask" masks the loads of all (one row without a low-rank path, else
    it is "list"), "auto" takes the faster one. invert: keep the values that are not above the threshold instead.

    v is made from x: activation: one of ACTIVATIONS, act(x), or act(x[:, :K]) * x[:, K:] if gated; norm: "rms",
    "gemma" (RMS norm times 1 + weight) or "layer", with norm_weight [K], norm_bias [K] or None, eps, and stats float32
    [B, tiles, 2] as `row_stats` or a previous call makes them; center: [K], subtracted (its constant W center belongs
    into the bias). The result takes side [B, R] @ side_up [R, N] (a low-rank path), bias [N] and residual [B, N].
    density: the share of channels a row is expected to keep; where the rows of a batch would then need most channels
    between them, the product is dense (cuBLAS), of the same values.

    Returns (y [B, N] in the weight's dtype, counts int32 [len(widths), splits], whose sum over splits is the number of
    channels kept, stats of y with `with_stats`). With `partial`, y is [splits, B, N], to be summed by the next call,
    which saves a launch: float32, or of a dense product one part in the weight's dtype. counts and stats are empty
    where they were not computed. float32 sums in a fixed order.
    Thresholds, norm weights and center are constants of a step: they must not be written by the kernel before.
    Raises ValueError outside this domain.

    Thresholds on magnitudes follow TEAL (arXiv:2408.14690), the low-rank path R-Sparse (arXiv:2504.19449).
    """
    require(x.dim() in (2, 3), "x must have shape [batch, channels] or [parts, batch, channels], got {}.", x.shape)
    rows = x if x.dim() == 2 else x[0]
    require_input(rows)
    require_near(rows)
    require(weight_t.dim() == 2, "weight_t must have shape [channels, outputs], got {}.", weight_t.shape)
    channels, width = weight_t.shape
    widths = [width] if widths is None else list(widths)
    fits = 1 <= len(widths) <= 3 and sum(widths) == width and min(widths) >= 1
    require(fits, "widths must be 1 to 3 of at least 1 that sum to {}, got {}.", width, widths)
    require(activation in ("", *ACTIVATIONS), "activation must be one of {}, got {}.", tuple(ACTIVATIONS), activation)
    require(norm in NORMS, "norm must be one of {}, got {}.", NORMS[1:], norm)
    require(not (activation and norm), "A layer's input is activated or normed, not both.")
    require(bool(activation) or not gated, "gated needs an activation.")
    require(select in SELECTS, "select must be one of {}, got {}.", SELECTS, select)
    expected = 2 * channels if gated else channels
    require(x.shape[-1] == expected, "x must have {} columns for {}, got {}.", expected, weight_t.shape, x.shape)
    if x.dim() == 3:
        fits = x.dtype in (torch.float32, weight_t.dtype) and x.is_contiguous()
        require(fits, "Parts of x must be contiguous float32, got {}.", x.dtype)
        x = x[0] if x.shape[0] == 1 and x.dtype == weight_t.dtype else x  # of a dense product: a result already
    dense = x.new_empty(0, dtype=x.dtype if x.dim() == 2 else weight_t.dtype)
    if threshold is None and by_output(weight_t):
        require_rows("weight_t's transpose", weight_t.t(), dense, (width, channels))
    else:
        require_rows("weight_t", weight_t, dense, (channels, width))
    if threshold is not None:
        shapes = ((len(widths),), (len(widths), channels))
        fits = threshold.shape in shapes and threshold.dtype == torch.float32 and threshold.is_contiguous()
        require(fits, "threshold must be a contiguous float32 {} or {}, got {}.", *shapes, threshold.shape)
        require(threshold.device == x.device, "threshold must be on {}, got {}.", x.device, threshold.device)
    require(threshold is not None or not invert, "invert needs a threshold.")
    require(bool(norm) == (norm_weight is not None), "norm and norm_weight need each other.")
    require(norm_bias is None or norm == "layer", 'Only norm "layer" takes a norm_bias.')
    for name, vector, size in (
        ("bias", bias, width),
        ("center", center, channels),
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
    ):
        if vector is not None:
            require_rows(name, vector, dense, (size,))
    if residual is not None:
        require_rows("residual", residual, dense, (rows.shape[0], width))
    require((side is None) == (side_up is None), "side and side_up need each other.")
    if side is not None and side_up is not None:
        require_rows("side_up", side_up, dense, (side.shape[1], width))
        require_rows("side", side, dense, (rows.shape[0], side_up.shape[0]))
        require(side.is_contiguous(), "side must be contiguous, got strides {}.", side.stride())
    alone = bias is None and residual is None and not with_stats
    require(alone or not partial, "A partial result takes no bias, residual or stats: they need the sum.")
    require(not (norm and x.dim() == 3), "A norm needs the sum of x's parts: do not ask for them.")
    if norm and stats is None:
        stats = row_stats(x)
    elif norm and stats is not None:
        shape = (rows.shape[0], cdiv(channels, STATS_TILE), 2)
        fits = stats.shape == shape and stats.dtype == torch.float32 and stats.is_contiguous()
        require(fits, "stats must be contiguous float32 {}, as row_stats makes them, got {}.", shape, stats.shape)
        require(stats.device == x.device, "stats must be on {}, got {}.", x.device, stats.device)
    return torch.ops.sparse_kernels.threshold_linear(
        x, weight_t, threshold, widths, select, invert, bias, residual, norm, norm_weight, norm_bias, eps, stats,
        activation, gated, center, side, side_up, with_stats, partial, density,
    )  # fmt: skip


def row_stats(x: Tensor) -> Tensor:
    """Sum and sum of squared deviations of every tile of x [B, K]: float32 [B, tiles, 2], for `threshold_linear`."""
    require_input(x)
    return torch.ops.sparse_kernels.row_stats(x)


def add_parts(parts: Tensor, residual: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of parts (+ bias), rounded, plus residual, and `row_stats` of that for the next norm, in one launch.

    parts: [P, B, N] in float32 or residual's dtype, contiguous, as `partial=True` leaves them; residual: [B, N],
    contiguous rows; bias: [N] in residual's dtype. Returns (y [B, N] in residual's dtype, stats
    float32 [B, tiles, 2]); the order of the sum is fixed. Raises ValueError outside this domain.
    """
    require_input(residual)
    fits = parts.dim() == 3 and parts.dtype in (torch.float32, residual.dtype) and parts.is_contiguous()
    require(fits, "parts must be contiguous float32 [parts, batch, columns], got {} {}.", parts.dtype, parts.shape)
    require(parts.shape[1:] == residual.shape, "parts must end in {}, got {}.", residual.shape, parts.shape)
    require(parts.device == residual.device, "parts must be on {}, got {}.", residual.device, parts.device)
    if bias is not None:
        require_rows("bias", bias, residual, (residual.shape[1],))
    return torch.ops.sparse_kernels.add_parts(parts, residual, bias)


@torch.library.custom_op(
    "sparse_kernels::add_parts",
    mutates_args=(),
    schema="(Tensor parts, Tensor residual, Tensor? bias) -> (Tensor, Tensor)",
)
def _add_parts(parts: Tensor, residual: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if not use_triton(parts):
        y = naive.add_parts(parts, residual, bias)
        return y, naive.row_stats(y, STATS_TILE)
    from sparse_kernels.input_linear import kernel

    return kernel.combine(parts, bias, residual, True, residual.dtype)


@_add_parts.register_fake
def _(parts, residual, bias):
    tiles = cdiv(residual.shape[1], STATS_TILE)
    return torch.empty_like(residual), residual.new_empty(len(residual), tiles, 2, dtype=torch.float32)


@register_flop_formula(torch.ops.sparse_kernels.add_parts)
def _parts_flops(*args, **kwargs) -> int:
    return 0


@torch.library.custom_op("sparse_kernels::row_stats", mutates_args=(), schema="(Tensor x) -> Tensor")
def _row_stats(x: Tensor) -> Tensor:
    if not use_triton(x):
        return naive.row_stats(x, STATS_TILE)
    from sparse_kernels.input_linear import kernel

    return kernel.row_stats(x)


@_row_stats.register_fake
def _(x):
    return x.new_empty(x.shape[0], cdiv(x.shape[1], STATS_TILE), 2, dtype=torch.float32)


@register_flop_formula(torch.ops.sparse_kernels.row_stats)
def _stats_flops(*args, **kwargs) -> int:
    return 0


@torch.library.custom_op(
    "sparse_kernels::input_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight_t, Tensor index, Tensor count, Tensor? threshold, Tensor? bias, int group)"
    " -> Tensor",
)
def _input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    if not use_triton(x):
        return naive.input_linear(x, weight_t, index, count, threshold, bias, group)
    from sparse_kernels.input_linear import kernel, row

    limit = None if threshold is None else (threshold if threshold.numel() == 1 else threshold[None])
    widths = [weight_t.shape[1]]
    linear = row.listed if len(x) == 1 else kernel.linear
    partial = linear(x, weight_t, "list", widths, index=index, count=count, group=group, threshold=limit)[0]
    return kernel.combine(partial, bias, None, False, x.dtype)[0]


@_input_linear.register_fake
def _(x, weight_t, index, count, threshold, bias, group):
    return x.new_empty(x.shape[0], weight_t.shape[1])


@register_flop_formula(torch.ops.sparse_kernels.input_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Those of the dense linear: what is skipped is not known from shapes."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@torch.library.custom_op(
    "sparse_kernels::threshold_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight_t, Tensor? threshold, int[] widths, str select, bool invert, Tensor? bias,"
    " Tensor? residual, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? stats, str activation,"
    " bool gated, Tensor? center, Tensor? side, Tensor? side_up, bool with_stats, bool partial,"
    " float? density)"
    " -> (Tensor, Tensor, Tensor)",
)
def _threshold_linear(
    x, weight_t, threshold, widths, select, invert, bias, residual, norm, norm_weight, norm_bias, eps, stats,
    activation, gated, center, side, side_up, with_stats, partial, density,
):  # fmt: skip
    prepare = dict(norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, activation=activation)
    prepare |= dict(gated=gated, center=center)
    path = dict(side=side, side_up=side_up)
    none = x.new_empty(x.shape[-2], 0, 2, dtype=torch.float32)
    if not use_triton(x):
        y, counts = naive.threshold_linear(
            x, weight_t, threshold, widths, invert=invert, bias=bias, residual=residual, **prepare, **path
        )
        counts = counts if threshold is not None else counts[:0]
        if partial:
            return y[None].float(), counts, none
        return y, counts, naive.row_stats(y, STATS_TILE) if with_stats else none
    from sparse_kernels.input_linear import kernel, row

    limited = threshold is not None
    how = path_for(select, x, weight_t, limited, density, side is not None)
    prepare |= dict(stats=stats)
    chosen = dict(threshold=threshold, invert=invert)
    widths = widths if limited else [weight_t.shape[1]]
    if how in ("dense", "rows"):
        if how == "rows":  # rounded once, with the bias
            y = row.rows(x, weight_t, weight_t.dtype if bias is None else torch.float32, **prepare)
        else:
            y, bias = kernel.dense(x, weight_t, widths, bias, **prepare, **chosen), None
        y = y if side is None else torch.addmm(y, side, side_up)
        parts, counts = y[None], x.new_empty(0, 1, dtype=torch.int32)
        if not partial and bias is None and residual is None and not with_stats:
            return y, counts, none
    elif how == "masked":
        parts, counts = row.masked(x, weight_t, widths, **prepare, **chosen)
    else:
        linear = row.listed if x.shape[-2] == 1 else kernel.linear
        parts, counts = linear(x, weight_t, how, widths, **prepare, **chosen, **path)
    if partial:
        return parts, counts, none
    y, y_stats = kernel.combine(parts, bias, residual, with_stats, weight_t.dtype)
    return y, counts, y_stats


@_threshold_linear.register_fake
def _(x, weight_t, threshold, widths, select, invert, bias, residual, norm, norm_weight, norm_bias, eps, stats,
      activation, gated, center, side, side_up, with_stats, partial, density):  # fmt: skip
    batch, (channels, width) = x.shape[-2], weight_t.shape
    limited = threshold is not None
    how = path_for(select, x, weight_t, limited, density, side is not None)
    whole = how in ("dense", "rows") and x.device.type != "cpu"  # where the definition counts, and sums in float32
    widths = list(widths) if limited else [width]
    splits = 1
    if how == "masked":
        splits = masked_grid(channels, widths, x.device).splits
    elif how not in ("dense", "rows"):
        splits = grid_for(batch, channels, widths, x.device).splits
    counts = x.new_empty(len(widths) if limited and not whole else 0, splits, dtype=torch.int32)
    y_stats = x.new_empty(batch, cdiv(width, STATS_TILE) if with_stats else 0, 2, dtype=torch.float32)
    if partial:
        dtype = weight_t.dtype if whole else torch.float32
        return x.new_empty(splits, batch, width, dtype=dtype), counts, y_stats
    return x.new_empty(batch, width, dtype=weight_t.dtype), counts, y_stats


@register_flop_formula(torch.ops.sparse_kernels.threshold_linear)
def _threshold_flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape[-2] * weight_shape[0] * weight_shape[1]
