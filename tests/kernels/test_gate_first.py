"""`GateFirstFFN`: what is timed (kernels) is what is evaluated (masks), and both follow the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_kernels import ACTIVATIONS, gaussian_multiplier
from sparse_kernels.gate_first import GateFirstFFN
from sparse_kernels.meter import Meter, Phase

WIDTH, NEURONS, SPLIT = 40, 96, 16
# score, soft, gated, split, activation
KINDS = {
    "spark": ("value", True, True, SPLIT, "gelu_tanh"),
    "gemma 3n": ("value", True, True, 0, "gelu_tanh"),
    "hard": ("value", False, True, 0, "silu"),
    "ungated": ("value", True, False, 0, "relu"),
    "magnitude": ("magnitude", False, True, 0, "silu"),
    "ungated magnitude": ("magnitude", False, False, 0, "relu"),
    "output": ("output", False, True, 0, "silu"),
}


def ffn(kind, multiplier=0.5, device="cpu", active=True, native=False) -> GateFirstFFN:
    torch.manual_seed(0)
    score, soft, gated, split, activation = KINDS[kind]
    phase = Phase()
    phase.active = active
    gate = nn.Linear(split or WIDTH, NEURONS, bias=not split, device=device) if gated else None
    up, down = nn.Linear(WIDTH - split, NEURONS, device=device), nn.Linear(NEURONS, WIDTH, device=device)
    layer = GateFirstFFN(gate, up, down, activation, multiplier, 0, phase, Meter(), score, soft, split, native)
    return layer.requires_grad_(False)


def definition(layer: GateFirstFFN, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations, a token at a time, in float64."""
    rows, act = [], ACTIVATIONS[layer.activation]
    for token in x.double():
        left, right = (token[: layer.split], token[layer.split :]) if layer.split else (token, token)
        first = layer.up if layer.gate is None else layer.gate
        u = F.linear(left, first.weight.double(), None if first.bias is None else first.bias.double())
        v = 1.0 if layer.gate is None else F.linear(right, layer.up.weight.double(), layer.up.bias.double())
        score = {"value": u, "magnitude": act(u).abs(), "output": (act(u) * v).abs()}[layer.score]
        limit = score.mean() + layer.multiplier * ((score - score.mean()) ** 2).mean().sqrt()
        u = torch.where(score > limit, u - limit if layer.soft else u, 0)
        rows.append(F.linear(act(u) * v, layer.down.weight.double(), layer.down.bias.double()))
    return torch.stack(rows).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_both_paths_follow_the_definition(device, kind, rows):
    layer, x = ffn(kind, device=device), torch.randn(rows, WIDTH, device=device)
    expected = definition(layer, x)
    with layer.meter.on():
        assert torch.allclose(layer(x[:, None])[:, 0], expected, atol=1e-5)
    assert torch.allclose(layer._skip(x, 0.5), expected, atol=1e-5)
    assert 0 < int(layer.count) == int(layer.meter.unions["ffn", 0][0])
    assert rows > 1 or int(layer.count) == int(layer.meter.counts["ffn", 0][0]) < NEURONS


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_need_most_neurons_between_them_are_multiplied_densely(device, kind):
    layer, x = ffn(kind, device=device), torch.randn(9, WIDTH, device=device)
    layer.density = 0.3
    assert torch.allclose(layer._skip(x, 0.5), definition(layer, x), atol=1e-5) and layer.count is None
    layer._skip(x[:1], 0.5)
    assert 0 < int(layer.count) < NEURONS  # one row keeps what it keeps


@pytest.mark.parametrize("kind", KINDS)
def test_everything_on_is_the_dense_layer_bit_for_bit(kind):
    layer, x = ffn(kind, -math.inf), torch.randn(5, WIDTH)
    sparse = layer(x)
    layer.multiplier = None
    assert torch.equal(sparse, layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_on_is_the_bias(device, kind):
    layer, x = ffn(kind, math.inf, device), torch.randn(2, WIDTH, device=device)
    with layer.meter.on():
        assert torch.equal(layer(x), layer.down.bias.expand(2, -1))
    assert torch.equal(layer._skip(x, math.inf), layer.down.bias.expand(2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_positions_are_dense_where_they_should_be(kind):
    mask = torch.tensor([[False, True, False], [True, True, False]])
    x = torch.randn(2, 3, WIDTH)
    layer, sparse, dense = ffn(kind, active=mask), ffn(kind), ffn(kind, active=False)
    assert torch.equal(layer(x)[mask], sparse(x)[mask]) and torch.allclose(layer(x)[~mask], dense(x)[~mask], atol=1e-6)
    assert not torch.allclose(sparse(x), dense(x), atol=1e-2)
    native = [ffn(kind, active=active, native=True)(x) for active in (mask, False, True)]
    assert torch.equal(native[0], native[2]) and torch.equal(native[1], native[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_are_about_the_share_asked_for_and_statistics_are_float32(dtype):
    """In float32 a mean of 50 and a deviation near 0.06: E[x^2] - E[x]^2 would lose it."""
    torch.manual_seed(1)
    neurons, share = 13824, 0.08
    up, down = nn.Linear(8, neurons), nn.Linear(neurons, 8)
    up.weight.data.normal_(0, 0.02)
    up.bias.data.fill_(50 if dtype == torch.float32 else 0)
    phase = Phase()
    phase.active = True
    layer = GateFirstFFN(None, up, down, "relu", gaussian_multiplier(share), 0, phase, Meter(), soft=True).to(dtype)
    with layer.meter.on(), torch.no_grad():
        layer(torch.randn(64, 8, dtype=dtype))
    counts = layer.meter.counts["ffn", 0][0] / neurons
    assert abs(float(counts.mean()) - share) < 0.002 and float(counts.std()) < 0.005


def test_shifting_and_scaling_scores_scales_the_survivors():
    u = torch.randn(4, NEURONS, dtype=torch.float64)
    layer = ffn("ungated")
    layer.up = nn.Linear(NEURONS, NEURONS).double()
    layer.down = nn.Linear(NEURONS, NEURONS).double()
    for linear in (layer.up, layer.down):
        linear.weight.data.copy_(torch.eye(NEURONS))
        linear.bias.data.zero_()
    order = torch.randperm(NEURONS)
    assert torch.allclose(layer(3 * u + 7), 3 * layer(u), atol=1e-5)
    assert torch.allclose(layer(u[:, order]), layer(u)[:, order], atol=1e-12)


@pytest.mark.parametrize("kind", ["spark", "hard", "magnitude", "output"])
def test_survivors_are_the_best_and_the_rest_is_zero(kind):
    """By either form of the threshold the same ones survive, and none that scores less than one that does not."""
    layer, x = ffn(kind), torch.randn(5, WIDTH)
    values = []
    layer.down.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    layer(x)
    score = layer.scores(x, layer.first(x))
    kept = values[0] != 0
    best = score.argsort(-1, descending=True)
    assert 0 < kept.sum(-1).min() and kept.sum(-1).max() < NEURONS
    assert all(
        set(row[: int(k.sum())].tolist()) == set(k.nonzero().flatten().tolist())
        for row, k in zip(best, kept, strict=True)
    )
    if layer.soft:
        layer.soft = False
        layer(x)
        assert torch.equal(values[1] != 0, kept) and not torch.equal(values[1], values[0])


@pytest.mark.parametrize("dtype, error", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("kind", ["spark", "gemma 3n"])  # soft: what is near the threshold is near zero on either side
def test_half_precision(device, kind, dtype, error):
    layer, x = ffn(kind, device=device).to(dtype), torch.randn(7, WIDTH, device=device).to(dtype)
    expected = definition(layer, x)
    for found in (layer(x[:, None])[:, 0], layer._skip(x, 0.5)):
        assert found.dtype == dtype and (found.float() - expected).abs().max() < error * expected.abs().max()


def test_what_is_charged():
    assert set(ffn("spark").linears()) == {"up", "down"} and set(ffn("output").linears()) == {"down"}
    assert set(ffn("ungated").linears()) == {"down"} and ffn("spark").overhead == 0


def test_what_does_not_fit_is_refused():
    parts = None, nn.Linear(4, 8), nn.Linear(8, 4), "relu", 0.0, 0, Phase(), Meter()
    for options, message in ((dict(score="best"), "score must be"), (dict(score="magnitude", soft=True), "if soft")):
        with pytest.raises(ValueError, match=message):
            GateFirstFFN(*parts, **options)
    with pytest.raises(ValueError, match="ungated"):
        GateFirstFFN(*parts, split=2)
