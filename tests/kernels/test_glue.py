import pytest
import torch
from support import close, double, limits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_kernels import ACTIVATIONS, glu, residual_norm
from sparse_kernels.glue import cost, naive
from sparse_kernels.glue.op import KINDS
from sparse_kernels.selection.naive import compact


def listed(y, threshold, index, count):
    """Whether index, count list what of y is above the threshold."""
    expected, number = compact(y, threshold, True)
    n = int(number)
    return index.shape == y.shape[1:] and int(count) == n and torch.equal(index[:n], expected[:n])


def stream(batch, width, device, dtype=torch.float32, parts=None):
    """x, residual, weight and bias; what is beside the rows of the first two in memory is NaN."""
    torch.manual_seed(0)
    wide = torch.full((parts or 1, batch, width + 8), float("nan"), device=device)
    wide[..., :width] = torch.randn(parts or 1, batch, width, device=device)
    x = wide[..., :width] if parts else wide[0, :, :width].to(dtype)
    residual = torch.full((batch, width + 8), float("nan"), device=device, dtype=dtype)
    residual[:, :width] = torch.randn(batch, width, device=device)
    weight, bias = torch.randn(2, width, device=device).to(dtype)
    return x, residual[:, :width], weight, bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("width", [1, 63, 133, 1000])
@pytest.mark.parametrize("parts", [None, 1, 3])
def test_residual_norm_equals_naive(device, kind, batch, width, parts):
    x, residual, weight, bias = stream(batch, width, device, parts=parts)
    bias = bias if kind == "layer" else None
    threshold = limits("each" if batch == 2 else "one", width, device)
    h, y, *found = residual_norm(x, residual, weight, bias, 1e-5, kind, threshold)
    expected = naive.residual_norm(*double(x, residual, weight, bias), 1e-5, kind)
    assert close(h, expected[0]) and close(y, expected[1])
    assert listed(y, threshold, *found)
    bare = residual_norm(x, residual, weight, bias, 1e-5, kind)
    assert len(bare) == 2 and torch.equal(bare[0], h) and torch.equal(bare[1], y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("parts", [None, 2])
def test_residual_norm_rounds_as_the_definition_does(device, kind, batch, parts):
    x, residual, weight, bias = stream(batch, 300, device, torch.float16, parts)
    bias = bias if kind == "layer" else None
    threshold = limits("one", 300, device)
    h, y, *found = residual_norm(x, residual, weight, bias, 1e-5, kind, threshold)
    expected = naive.residual_norm(x, residual, weight, bias, 1e-5, kind)
    assert torch.equal(h, expected[0]) and listed(y, threshold, *found)
    assert (y != expected[1]).float().mean() < 0.02  # a sum in another order may tip a rounding
    assert close(y, expected[1].double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_residual_norm_without_residual(device, kind, batch):
    x, _, weight, _ = stream(batch, 133, device)
    h, y = residual_norm(x, None, weight, None, 1e-6, kind)
    assert torch.equal(h, x) and h.data_ptr() != x.data_ptr()
    assert close(y, naive.norm(*double(x, weight), None, 1e-6, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_naive_norms_are_those_of_the_models(dtype):
    x, residual, weight, bias = (t.to(dtype) for t in stream(4, 96, "cpu", dtype))
    for kind, module in (("rms", LlamaRMSNorm(96, eps=1e-5)), ("gemma", GemmaRMSNorm(96, eps=1e-5))):
        module.weight.data = weight
        h, y = naive.residual_norm(x, residual, weight, None, 1e-5, kind)
        assert torch.equal(h, residual + x) and torch.equal(y, module(residual + x))
    norm = torch.nn.LayerNorm(96, dtype=dtype)
    norm.weight.data, norm.bias.data = weight, bias
    assert torch.equal(naive.residual_norm(x, residual, weight, bias, 1e-5, "layer")[1], norm(residual + x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit, share", [(-1.0, 1.0), (1e9, 0.0)])
def test_residual_norm_lists_all_and_none(device, batch, limit, share):
    x, residual, weight, _ = stream(batch, 130, device)
    _, _, index, count = residual_norm(x, residual, weight, threshold=torch.full((1,), limit, device=device))
    assert int(count) == 130 * share and (share == 0 or index.tolist() == list(range(130)))


def test_residual_norm_lists_one_channel_of_one_row(device):
    x, residual, weight, _ = stream(5, 130, device)
    x, residual = torch.zeros_like(x), torch.zeros_like(residual)
    x[3, 77] = -2.0
    _, _, index, count = residual_norm(x, residual, weight, threshold=torch.zeros(1, device=device))
    assert int(count) == 1 and int(index[0]) == 77


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_glu_activations(device, activation, batch, gated):
    gate, up = torch.randn(batch, 2 * 260, device=device).chunk(2, 1)  # rows of one tensor
    up = up if gated else None
    threshold = limits("one", 260, device)
    h, *found = glu(gate, up, activation, threshold)
    assert close(h, naive.glu(*double(gate, up), activation)) and listed(h, threshold, *found)
    assert torch.equal(glu(gate, up, activation), h)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 63, 2500])
@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_glu_equals_naive(device, batch, width, kind, dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, batch, width, device=device).to(dtype)
    threshold = limits(kind, width, device)
    h, *found = glu(gate, up, "silu", threshold)
    assert h.dtype == dtype and close(h, naive.glu(*double(gate, up), "silu"))
    assert listed(h, threshold, *found)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit, share", [(-1.0, 1.0), (1e9, 0.0)])
def test_glu_lists_all_and_none(device, batch, limit, share):
    gate, up = torch.randn(2, batch, 1100, device=device)
    _, index, count = glu(gate, up, threshold=torch.full((1,), limit, device=device))
    assert int(count) == 1100 * share and (share == 0 or index.tolist() == list(range(1100)))


@pytest.mark.parametrize("batch, blocks, size", [(1, 1, 5), (3, 7, 32), (8, 90, 1), (64, 3, 50)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("filled, rows", [(True, 1), (False, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_glu_keeps_the_blocks_a_row_chose(device, batch, blocks, size, masked, filled, rows, dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, batch, blocks * size, device=device).to(dtype)
    score = torch.randn(rows or batch, blocks, device=device)
    limit, other = torch.full((1,), 0.2, device=device), torch.randn(blocks * size, device=device).to(dtype)
    keep = (score > limit).repeat_interleave(size, 1).expand(batch, -1)
    gate[~keep] = torch.nan  # what is not chosen does not show
    chosen = dict(score=score > limit) if masked else dict(score=score, limit=limit)
    h = glu(gate, up, "silu", other=other if filled else None, **chosen)
    assert h.dtype == dtype and torch.equal(h[~keep], other.expand_as(h)[~keep] if filled else 0 * up[~keep])
    assert close(h[keep][None], naive.glu(*double(gate[keep][None], up[keep][None]), "silu"))


@pytest.mark.parametrize("batch", [1, 3])
def test_glue_twice_is_the_same_to_the_bit(device, batch):
    x, residual, weight, _ = stream(batch, 300, device)
    assert torch.equal(residual_norm(x, residual, weight)[1], residual_norm(x, residual, weight)[1])
    assert torch.equal(glu(x, residual), glu(x, residual))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="batch"), "kind must be one of"),
        (dict(bias=torch.zeros(8)), 'Only kind "layer" takes a bias'),
        (dict(weight=torch.randn(2, 8)), "weight must have shape"),
        (dict(x=torch.randn(2, 7)), r"x must be \[batch, 8\] or 1 to 64 parts"),
        (dict(x=torch.randn(65, 2, 8)), "parts of that"),
        (dict(x=torch.randn(65, 8)), "1 to 64 rows"),
        (dict(x=torch.randn(2, 8).half()), "x must be torch.float32"),
        (dict(x=torch.randn(8, 2).t()), "contiguous rows"),
        (dict(residual=torch.randn(1, 8)), "residual must have shape"),
        (dict(residual=torch.randn(2, 8).half()), "residual must be torch.float32"),
        (dict(threshold=torch.zeros(5)), "threshold must be a contiguous"),
    ],
)
def test_residual_norm_outside_its_domain(change, message):
    arguments = dict(x=torch.randn(2, 8), residual=torch.randn(2, 8), weight=torch.randn(8))
    with pytest.raises(ValueError, match=message):
        residual_norm(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation="tanh"), "activation must be one of"),
        (dict(gate=torch.randn(65, 8)), "1 to 64 rows"),
        (dict(gate=torch.randn(1, 65537)), "at most 65536"),
        (dict(up=torch.randn(2, 7)), "up must have shape"),
        (dict(up=torch.randn(2, 8).half()), "up must be torch.float32"),
        (dict(threshold=torch.zeros(5)), "threshold must be a contiguous"),
        (dict(limit=torch.zeros(1)), "need a score"),
        (dict(score=torch.zeros(2, 3), limit=torch.zeros(1)), "a divisor of 8"),
        (dict(score=torch.zeros(3, 4), limit=torch.zeros(1)), "a divisor of 8"),
        (dict(score=torch.zeros(2, 4)), "score must be contiguous torch.bool"),
        (dict(score=torch.zeros(2, 4), limit=torch.zeros(8)), "threshold must be a contiguous"),
        (dict(score=torch.zeros(2, 4), limit=torch.zeros(1), other=torch.zeros(4)), "other must have shape"),
    ],
)
def test_glu_outside_its_domain(change, message):
    arguments = dict(gate=torch.randn(2, 8), up=torch.randn(2, 8))
    with pytest.raises(ValueError, match=message):
        glu(**(arguments | change))


def test_glue_is_well_formed():
    x, residual, weight, bias = (t.contiguous() for t in stream(2, 24, "cpu", torch.float16))
    ops = torch.ops.sparse_kernels
    opcheck(ops.residual_norm, (x, residual, weight, None, 1e-5, "rms"))
    opcheck(ops.residual_norm, (torch.randn(3, 2, 24), None, weight, bias, 1e-5, "layer"))
    opcheck(ops.glu, (x, residual, "silu"))
    opcheck(ops.glu, (x, None, "relu"))
    opcheck(ops.glu, (x, residual, "silu", torch.randn(2, 4), torch.zeros(1), bias))


def block(x, residual, weight):
    one = torch.ones(1)
    h, y, _, count = residual_norm(x, residual, weight, threshold=one)
    return h, y, count, glu(y, h), *glu(y, None, "relu", one)[::2]


def test_glue_compiles_as_one_graph():
    arguments = stream(2, 24, "cpu")[:3]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), block(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_fakes_have_the_real_shapes():
    with FakeTensorMode():
        parts = torch.empty(5, 4, 64, device="cuda")
        weight = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        h, y, index, count = residual_norm(parts, None, weight, threshold=torch.empty(1, device="cuda"))
        assert h.shape == y.shape == (4, 64) and h.dtype == y.dtype == torch.bfloat16
        assert (index.shape, count.shape) == ((64,), (1,)) and glu(h).shape == (4, 64)


def test_costs_of_known_shapes():
    assert cost.norm_bytes(1, 4096) == 3 * 4096 * 2 and cost.norm_bytes(2, 64, 2, False) == 3 * 64 * 2
    assert cost.norm_bytes(1, 64, 2, True, parts=8) == 8 * 64 * 4 + 2 * 64 * 2
    assert cost.glu_bytes(1, 11008) == 4 * 11008 and cost.glu_bytes(1, 11008, False) == 2 * 11008
