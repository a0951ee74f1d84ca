import pytest
import torch
import torch.nn.functional as F
from support import close, far

from sparse_kernels import add_parts, row_stats, threshold_linear
from sparse_kernels.input_linear import kernel, naive, row
from sparse_kernels.input_linear.launch import Masked, path_for
from sparse_kernels.launch import Launch, Rows

SEGMENTS = {"one": [200], "three": [100, 37, 63]}
CONFIG = Launch(rows=8, columns=64, warps=4, stages=3, programs=4)


def make(batch, channels, width, device, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(batch, channels, device=device).to(dtype), torch.randn(channels, width, device=device).to(dtype)


def limits(segments, device, each=None):
    base = torch.tensor([0.5, 0.9, 0.2][:segments], device=device)
    return base if each is None else (base[:, None] + torch.rand(segments, each, device=device)).contiguous()


def expected(x, weight_t, threshold, widths, **extras):
    """The definition in float64; the comparison with the threshold still sees float32 values."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extras.items()}
    return naive.threshold_linear(x.double(), weight_t.double(), threshold, widths, **wide)


def test_naive_is_a_masked_linear():
    x, weight_t = make(2, 12, 10, "cpu", torch.float64)
    kept = torch.where(x.abs() > 0.5, x, 0)
    bias, side, up = torch.randn(10).double(), torch.randn(2, 3).double(), torch.randn(3, 10).double()
    y, counts = naive.threshold_linear(x, weight_t, torch.tensor([0.5]), [10], bias=bias, side=side, side_up=up)
    assert torch.allclose(y, kept @ weight_t + bias + side @ up)
    assert counts.tolist() == [[int((x.abs() > 0.5).any(0).sum())]]


@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (2, "auto"), (7, "auto")])
@pytest.mark.parametrize("channels", [1, 63, 133])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("each", [False, True])
def test_threshold_linear_equals_naive(device, batch, select, channels, segments, each):
    widths = SEGMENTS[segments]
    x, weight_t = make(batch, channels, 200, device)
    threshold = limits(len(widths), device, channels if each else None)
    y, counts, _ = threshold_linear(x, weight_t, threshold, widths, select=select)
    wanted, active = expected(x, weight_t, threshold, widths)
    assert close(y, wanted) and torch.equal(counts.sum(1), active[:, 0])


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("select", ["list", "mask"])
@pytest.mark.parametrize("limit, name", [(-1.0, "all"), (1e9, "none"), (None, "dense")])
def test_threshold_linear_everything_and_nothing(device, batch, select, limit, name):
    x, weight_t = make(batch, 70, 90, device)
    if name == "none":
        weight_t.fill_(float("nan"))
    threshold = None if limit is None else torch.full((1,), limit, device=device)
    y = threshold_linear(x, weight_t, threshold, select=select)[0]
    wanted = (
        torch.zeros(batch, 90, dtype=torch.float64, device=device) if name == "none" else x.double() @ weight_t.double()
    )
    assert close(y, wanted)


@pytest.mark.parametrize("select", ["list", "mask"])
@pytest.mark.parametrize("batch", [1, 2])
def test_threshold_linear_reads_only_what_some_row_keeps(device, select, batch):
    x, weight_t = make(batch, 133, 90, device)
    x[:, 70:100] = 0.01
    x[0, 80] = 3.0
    weight_t[~(x.abs() > 0.5).any(0)] = float("nan")
    threshold = limits(1, device)
    assert close(threshold_linear(x, weight_t, threshold, select=select)[0], expected(x, weight_t, threshold, [90])[0])


@pytest.mark.parametrize("norm", ["rms", "gemma", "layer"])
@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (3, "auto")])
@pytest.mark.parametrize("limit", [0.5, None])
def test_threshold_linear_norms_its_input(device, norm, batch, select, limit):
    x, weight_t = make(batch, 133, 90, device)
    x = 3 * x + 1
    extras = dict(norm=norm, norm_weight=torch.rand(133, device=device) + 0.5, eps=1e-5)
    extras |= dict(norm_bias=torch.randn(133, device=device)) if norm == "layer" else {}
    threshold = None if limit is None else torch.full((1,), limit, device=device)
    y = threshold_linear(x, weight_t, threshold, select=select, **extras)[0]
    assert close(y, expected(x, weight_t, threshold, [90], **extras)[0])


@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (3, "auto")])
@pytest.mark.parametrize("glu", ["silu", "gelu", "relu2"])
def test_threshold_linear_gates_its_input(device, batch, select, glu):
    x, weight_t = make(batch, 266, 90, device)
    weight_t = weight_t[:133]
    threshold = torch.full((1,), 0.3, device=device)
    y = threshold_linear(x, weight_t, threshold, select=select, activation=glu, gated=True)[0]
    assert close(y, expected(x, weight_t, threshold, [90], activation=glu, gated=True)[0])


@pytest.mark.parametrize("widths", [*SEGMENTS.values(), [100, 100]])
@pytest.mark.parametrize("partial", [True, False])
def test_a_batch_that_needs_most_channels_is_multiplied_densely(device, widths, partial):
    x, weight_t = make(7, 133, 200, device)
    threshold = limits(len(widths), device)
    y, counts, _ = threshold_linear(x, weight_t, threshold, widths, density=0.5, partial=partial)
    y = y.sum(0) if partial else y
    wanted = expected(x, weight_t, threshold, widths)[0]
    assert (y - wanted).norm() < 1e-5 * wanted.norm() and counts.numel() == 0
    bias = torch.randn(200, device=device)
    for residual in (None, torch.randn(7, 200, device=device)):
        y = threshold_linear(x, weight_t, threshold, widths, density=0.5, bias=bias, residual=residual)[0]
        shifted = wanted + bias + (0 if residual is None else residual)
        assert (y - shifted).norm() < 1e-5 * shifted.norm()


@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (3, "auto")])
@pytest.mark.parametrize("gated", [True, False])
def test_parts_are_summed_by_the_next_layer(device, batch, select, gated):
    x, first = make(batch, 70, 266 if gated else 133, device)
    second, threshold = torch.randn(133, 90, device=device), torch.full((1,), 0.5, device=device)
    parts, _, _ = threshold_linear(x, first, None, partial=True)
    assert parts.dim() == 3 and parts.dtype == torch.float32
    extras = dict(activation="relu", gated=gated)
    y = threshold_linear(parts, second, threshold, select=select, **extras)[0]
    assert close(y, expected(parts.sum(0), second, threshold, [90], **extras)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch, parts", [(1, 1), (1, 130), (3, 7)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_parts_are_added_to_the_residual(device, dtype, batch, parts, biased, narrow):
    torch.manual_seed(0)
    given = torch.randn(parts, batch, 150, device=device).to(dtype if narrow else torch.float32)
    residual, bias = torch.randn(batch, 150, device=device).to(dtype), torch.randn(150, device=device).to(dtype)
    bias = bias if biased else None
    y, stats = add_parts(given, residual, bias)
    total = given.double().sum(0) + (0 if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    wanted = residual.double() + total.to(dtype).double()
    assert y.dtype == dtype and (y.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.allclose(stats, row_stats(y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (3, "auto")])
def test_threshold_linear_extras(device, batch, select):
    """Constant term, low-rank path, residual, and the part that a low-rank path is made from."""
    x, weight_t = make(batch, 133, 90, device)
    threshold, down = torch.full((1,), 0.7, device=device), torch.randn(133, 20, device=device)
    center = torch.randn(133, device=device)
    side = threshold_linear(x, down, threshold, select=select, invert=True, center=center)[0]
    assert close(side, expected(x, down, threshold, [20], invert=True, center=center)[0])
    extras = dict(center=center, side=side, side_up=torch.randn(20, 90, device=device))
    extras |= dict(bias=torch.randn(90, device=device), residual=torch.randn(batch, 90, device=device))
    y = threshold_linear(x, weight_t, threshold, select=select, **extras)[0]
    assert close(y, expected(x, weight_t, threshold, [90], **extras)[0])
    dense = threshold_linear(x - center, weight_t, None)[0]
    full = threshold_linear(x, weight_t, threshold, center=center, side=side * 0, side_up=extras["side_up"])[0]
    rest = threshold_linear(x, weight_t, threshold, center=center, invert=True)[0]
    assert torch.allclose(full + rest, dense, atol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("batch, select", [(1, "list"), (1, "mask"), (3, "auto")])
def test_statistics_travel_from_layer_to_layer(device, norm, batch, select):
    x, first = make(batch, 70, 133, device)
    second, weight = torch.randn(133, 90, device=device), torch.rand(133, device=device)
    h, _, stats = threshold_linear(x, first, None, residual=torch.randn(batch, 133, device=device), with_stats=True)
    assert torch.allclose(stats[..., 0].sum(1), h.sum(1), atol=1e-3)
    extras = dict(norm=norm, norm_weight=weight, eps=1e-6)
    y = threshold_linear(h, second, limits(1, device), stats=stats, select=select, **extras)[0]
    assert close(y, expected(h, second, limits(1, device), [90], **extras)[0])
    assert torch.allclose(stats, row_stats(h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch, select", [(1, "threshold"), (1, "all"), (7, "threshold")])
def test_few_columns_many_splits_give_the_same_bits_twice(device, dtype, batch, select):
    x, weight_t = make(batch, 133, 150, device, dtype)
    if device == "cpu":
        threshold = None if select == "all" else limits(1, device)
        linear = row.listed if batch == 1 else kernel.linear
        runs = [linear(x, weight_t, select, [150], threshold=threshold, config=CONFIG)[0] for _ in range(2)]
        assert torch.equal(*runs) and len(runs[0]) > 2
        y = kernel.combine(runs[0], None, None, False, dtype)[0]
        assert close(y, expected(x, weight_t, threshold, [150])[0])


def test_without_a_list_or_threshold_nothing_is_dropped(device):
    x, weight_t = make(1, 40, 20, device)
    x[0, 3], x[0, 5] = float("nan"), 0.0
    assert threshold_linear(x, weight_t, None)[0].isnan().all()
    x[0, 3] = float("inf")
    assert torch.equal(threshold_linear(x, weight_t, None)[0].sign(), weight_t[3:4].sign())


@pytest.mark.parametrize("limited", [True, False])
def test_without_a_list_two_runs_give_the_same_bits(device, limited):
    x, weight_t = make(1, 133, 150, device, torch.float16)
    threshold = limits(2, device) if limited else None
    widths = [100, 50] if limited else [150]
    shape = Masked(channels=32, rows=16, columns=64, warps=4, fewest=0, most=0)
    (a, counts), (b, _) = (row.masked(x, weight_t, widths, shape, threshold=threshold) for _ in range(2))
    wanted, active = expected(x, weight_t, threshold, widths)
    assert torch.equal(a, b) and len(a) == 5 and close(a.sum(0).half(), wanted)
    assert torch.equal(counts.sum(1), active[:, 0]) if limited else counts.numel() == 0


def test_few_weights_need_no_list_and_whole_rows_none_either():
    few, many = torch.empty(4096, 1024), torch.empty(4096, 12288)

    def path(select, batch, weight_t, limited, density=None, side=False, parts=None):
        x = torch.empty(batch, len(weight_t)) if parts is None else torch.empty(parts, batch, len(weight_t))
        return path_for(select, x, weight_t, limited, density, side)

    assert path("auto", 1, few, True) == "masked"
    assert path("auto", 1, few, True, side=True) == "threshold"
    assert path("auto", 1, few, False) == "masked"
    assert path("auto", 2, few, True, 0.2) == "threshold"
    assert path("auto", 1, many, True) == path("auto", 1, few[:512, :512], True) == "threshold"
    assert path("auto", 1, many, False) == "all"
    assert path("mask", 1, many, True) == "masked"
    assert path("mask", 2, many, True, 0.5) == "dense"
    stored = many.reshape(12288, 4096).t()
    assert path("auto", 1, stored, False) == path("auto", 1, stored, False, parts=1) == "rows"
    assert path("auto", 2, stored, False) == path("auto", 1, stored, False, parts=2) == "dense"
    assert path("auto", 1, stored, False, side=True) == "dense"
    assert path("auto", 1, torch.empty(16, 8193).t(), False) == "dense"  # 64 KiB of float32 when padded


def stored(channels, outputs, device, dtype=torch.float32):
    """The transposed view of weights that are stored one row per output, with something between the rows."""
    torch.manual_seed(1)
    return torch.randn(outputs, channels + 3, device=device).to(dtype)[:, :channels].t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("outputs", [2, 5, 90])
def test_weights_stored_by_output(device, dtype, batch, outputs):
    x, _ = make(batch, 133, 1, device, dtype)
    weight_t = stored(133, outputs, device, dtype)
    extras = dict(bias=torch.randn(outputs, device=device).to(dtype))
    extras |= dict(residual=torch.randn(batch, outputs, device=device).to(dtype))
    y, counts, stats = threshold_linear(x, weight_t, None, with_stats=True, **extras)
    wanted = expected(x, weight_t, None, [outputs], **extras)[0]
    rounding = 1e-5 if dtype == torch.float32 else 1e-3  # the product is rounded, and then its sum with the residual
    assert (y.double() - wanted).norm() < rounding * wanted.norm() and counts.numel() == 0
    assert torch.allclose(stats, row_stats(y), rtol=1e-3, atol=1e-3)
    assert torch.equal(y, threshold_linear(x, weight_t, None, **extras)[0])


def test_a_whole_row_and_its_bias_are_rounded_once(device):
    x, _ = make(1, 133, 1, device, torch.float16)
    weight_t, bias = stored(133, 900, device, torch.float16), torch.randn(900, device=device).half()
    y = threshold_linear(x, weight_t, None, bias=bias)[0].double()
    wanted = x.double() @ weight_t.double() + bias.double()
    spacing = 2.0 ** (wanted.abs().log2().floor() - 10)
    assert ((y - wanted).abs() / spacing).max() < 0.51


@pytest.mark.parametrize("given", ["x", "one part", "parts"])
@pytest.mark.parametrize("gated", [True, False])
def test_weights_stored_by_output_after_an_activation(device, given, gated):
    x, _ = make(1, 266 if gated else 133, 1, device)
    weight_t, extras = stored(133, 90, device), dict(activation="silu", gated=gated)
    x = x if given == "x" else x[None] if given == "one part" else torch.stack([x - 1, x + 1])
    y, _, _ = threshold_linear(x, weight_t, None, partial=True, **extras)
    wanted = expected(x if given == "x" else x.sum(0), weight_t, None, [90], **extras)[0]
    assert y.shape == (1, 1, 90) and close(y[0], wanted)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_norm_of_more_tiles_than_a_warp_has_threads(device, norm, batch):
    x, weight = make(batch, 2500, 40, device)
    x[:, 2100:] *= 3  # what the last tiles hold moves the norm
    extras = dict(norm=norm, norm_weight=torch.rand(2500, device=device) + 0.5, eps=1e-5)
    y, _, _ = threshold_linear(x, weight, torch.tensor([0.5], device=device), **extras)
    wanted, _ = expected(x, weight, torch.tensor([0.5], device=device), [40], **extras)
    assert (y - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("norm", ["rms", "gemma", "layer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_stored_by_output_after_a_norm(device, norm, batch):
    x, _ = make(batch, 133, 1, device)
    x, weight_t = 3 * x + 1, stored(133, 90, device)
    extras = dict(norm=norm, norm_weight=torch.rand(133, device=device) + 0.5, eps=1e-5)
    extras |= dict(norm_bias=torch.randn(133, device=device)) if norm == "layer" else {}
    assert close(threshold_linear(x, weight_t, None, **extras)[0], expected(x, weight_t, None, [90], **extras)[0])


@pytest.mark.parametrize("step, stages", [(1, 3), (2, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("outputs", [3, 37])
def test_whole_rows_however_they_are_launched(device, step, stages, outputs, monkeypatch):
    """More programs than rows, and shares that the steps do not divide."""
    x, _ = make(1, 133, 1, device)
    weight_t = stored(133, outputs, device)
    monkeypatch.setattr(Rows, "fit", lambda self, width, itemsize: (step, 4))
    for programs in (1, 2, 50):
        y = row.rows(x, weight_t, x.dtype, Rows(step, 4, stages, programs))
        assert close(y, expected(x, weight_t, None, [outputs])[0])


def test_rows_at_any_distance(device):
    x, weight_t = make(2, 96, 200, device)
    narrow, threshold = weight_t[:50, 3:80], limits(1, device)
    y = threshold_linear(x[:, :50], narrow, threshold)[0]
    assert close(y, expected(x[:, :50], narrow, threshold, [77])[0])


def test_statistics_of_rows(device):
    x, _ = make(3, 1000, 1, device)
    x = x + 5
    stats = row_stats(x)
    assert stats.shape == (3, 16, 2)
    assert torch.allclose(stats, naive.row_stats(x, 64), rtol=1e-4)
    assert torch.allclose(F.layer_norm(x, (1000,)).mean(1), torch.zeros(3, device=device), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(65, 8)), "1 to 64 rows"),
        (dict(x=torch.randn(1, 9)), "x must have 8 columns"),
        (dict(activation="silu", gated=True), "x must have 16 columns"),
        (dict(gated=True), "gated needs an activation"),
        (dict(activation="tanh"), "activation must be one of"),
        (dict(partial=True, bias=torch.randn(5)), "A partial result takes no bias"),
        (dict(x=torch.randn(2, 1, 8).half()), "Parts of x must be contiguous float32"),
        (dict(threshold=None, invert=True), "invert needs a threshold"),
        (dict(norm="rms"), "norm and norm_weight need each other"),
        (dict(norm="rms", norm_weight=torch.ones(7)), "norm_weight must have shape"),
        (dict(norm="batch"), "norm must be one of"),
        (dict(norm="rms", norm_weight=torch.ones(8), norm_bias=torch.ones(8)), 'Only norm "layer" takes a norm_bias'),
        (dict(norm="rms", norm_weight=torch.ones(8), stats=torch.ones(1, 0, 2)), "stats must be contiguous float32"),
        (dict(norm="rms", norm_weight=torch.ones(8), stats=torch.ones(2, 1, 2)), "stats must be contiguous float32"),
        (dict(norm="rms", norm_weight=torch.ones(8), stats=torch.ones(1, 1, 2).half()), "stats must be contiguous"),
        (dict(x=far(3, 8, apart=0)), "rows within 2.31 values"),
        (dict(widths=[3, 3]), "sum to 5"),
        (dict(widths=[5, 0]), "of at least 1 that sum to 5"),
        (dict(weight_t=torch.randn(5, 8).t()), "weight_t must have contiguous rows"),
        (dict(weight_t=torch.randn(10, 16)[::2, ::2].t(), threshold=None), "transpose must have contiguous rows"),
        (dict(threshold=torch.zeros(2)), "threshold must be a contiguous"),
        (dict(threshold=torch.zeros(1).double()), "threshold must be a contiguous"),
        (dict(select="sort"), "select must be one of"),
        (dict(side=torch.randn(1, 3)), "need each other"),
        (dict(residual=torch.randn(1, 4)), "residual must have shape"),
        (dict(bias=torch.randn(4)), "bias must have shape"),
    ],
)
def test_threshold_linear_outside_its_domain(change, message):
    arguments = dict(x=torch.randn(1, 8), weight_t=torch.randn(8, 5), threshold=torch.zeros(1)) | change
    with pytest.raises(ValueError, match=message):
        threshold_linear(**arguments)


def test_only_layers_that_norm_or_activate_start_early_and_within_half_of_the_registers(device, monkeypatch):
    launched = []
    monkeypatch.setattr(row, "run", lambda kernel, grid, *args, **options: launched.append(options))
    x, weight_t = make(1, 64, 40, device)
    norm = dict(norm="rms", norm_weight=torch.ones(64, device=device), stats=row_stats(x))
    config = Launch(rows=4, columns=1024, warps=4, stages=4, programs=2)
    for vector in ({}, norm, dict(activation="relu")):
        row.listed(x, weight_t, "threshold", [40], threshold=limits(1, device), config=config, **vector)
    found = [(options.get("pdl", True), options.get("maxnreg")) for options in launched]
    assert found == [(False, None), (True, 128), (True, 128)]
