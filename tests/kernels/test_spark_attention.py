"""Spark attention of a decode step: kernels against the definition, and that against the paper's equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import double, far
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import spark_attention_decode, spark_attention_multipliers
from sparse_kernels.spark_attention import cost, naive
from sparse_kernels.spark_attention.launch import Attend, Pass


def inputs(device, batch=1, heads=4, groups=2, positions=100, dim=16, dtype=torch.float32, visible=None):
    """A cache in which everything that is not visible is NaN."""
    torch.manual_seed(0)
    query = torch.randn(batch, heads, dim, device=device).to(dtype)
    key, value = (torch.randn(batch, groups, positions, dim, device=device).to(dtype) for _ in range(2))
    if visible is None:
        lengths = torch.randint(1, positions + 1, (batch, 1), device=device)
        visible = torch.arange(positions, device=device) < lengths
    for cache in (key, value):
        cache.masked_fill_(~visible.expand(batch, -1)[:, None, :, None], float("nan"))
    return query, key, value, visible


def expected(query, key, value, visible, attended):
    """The equations, head by head, in float64."""
    (batch, heads, dim), group, half = query.shape, query.shape[1] // key.shape[1], query.shape[2] // 2
    y = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        seen = visible.expand(batch, -1)[b].nonzero().flatten()
        for h in range(heads if len(seen) else 0):
            q, k, v = double(query[b, h], key[b, h // group, seen], value[b, h // group, seen])
            a = k[:, :half] @ q[:half] / math.sqrt(half)
            if len(seen) > attended:
                share = torch.tensor(1 - attended / len(seen), dtype=torch.float64)
                limit = a.mean() + ((a - a.mean()) ** 2).mean().sqrt() * torch.special.ndtri(share)
                a = torch.where(a >= torch.minimum(limit, a.max()), a, -torch.inf)
            y[b, h] = (a.softmax(0) * F.softplus(k[:, half:] @ q[half:] / math.sqrt(half))) @ v
    return y


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads, groups", [(1, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("positions, dim, attended", [(1, 2, 1), (63, 16, 7), (133, 24, 200), (500, 10, 31)])
def test_decode_follows_the_equations(device, batch, heads, groups, positions, dim, attended):
    query, key, value, visible = inputs(device, batch, heads, groups, positions, dim)
    table = spark_attention_multipliers(attended, positions, device)
    y = spark_attention_decode(query, key, value, visible, table)
    wanted = expected(*(t.cpu() for t in (query, key, value, visible)), attended)
    assert torch.allclose(y.cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(y, spark_attention_decode(query, key, value, visible, table))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    arguments = inputs(device, 2, positions=300, dim=32, dtype=dtype)
    y = spark_attention_decode(*arguments, spark_attention_multipliers(300, 300, device))
    wanted = expected(*(t.cpu() for t in arguments), 300)
    assert (y.cpu().double() - wanted).abs().max() < (2e-3 if dtype == torch.float16 else 1.6e-2)


@pytest.mark.parametrize("heads, groups, positions", [(4, 2, 333), (2, 2, 333), (3, 1, 2200)])
def test_any_launch_gives_the_same(device, heads, groups, positions):
    """Splits of one step and of several, all at once, and added by the last program or by another kernel."""
    if device == "cpu":
        pytest.importorskip("triton")
    from sparse_kernels.spark_attention import kernel

    case = inputs(device, 2, heads, groups, positions)
    arguments = *case, spark_attention_multipliers(20, positions, device)
    wanted = expected(*(t.cpu() for t in case), 20)
    few, many = Pass(128, 1, 1, 1), Pass(16, 2, 3, 64)
    for config in (Attend(few, many), Attend(many, few), Attend(many, many)):
        y = kernel.spark_attention_decode(*arguments, config)
        assert torch.allclose(y.cpu().double(), wanted, rtol=1e-4, atol=1e-5)


def test_gates_far_below_zero_keep_their_digits(device):
    """softplus(b) is about exp(b) there, far less than the rounding of 1 + exp(b)."""
    b = torch.linspace(-80, 20, 101, device=device)
    query, key = torch.ones(1, 1, 2, device=device), torch.stack([torch.zeros_like(b), b], 1)
    visible, table = torch.ones(1, 1, dtype=torch.bool, device=device), spark_attention_multipliers(1, 1, device)
    for gate, one in zip(b, key, strict=True):
        y = spark_attention_decode(query, one.view(1, 1, 1, 2), torch.ones(1, 1, 1, 2, device=device), visible, table)
        assert torch.allclose(y.double(), F.softplus(gate.double()), rtol=1e-5, atol=0), gate


def test_padding_is_like_absence(device):
    query, key, value, _ = inputs(device, positions=40, visible=torch.ones(1, 40, dtype=torch.bool, device=device))
    visible = torch.arange(48, device=device)[None] >= 8
    longer = [torch.cat([torch.full_like(t[:, :, :8], float("nan")), t], 2) for t in (key, value)]
    a = spark_attention_decode(query, key, value, visible[:, 8:], spark_attention_multipliers(5, 40, device))
    b = spark_attention_decode(query, *longer, visible, spark_attention_multipliers(5, 48, device))
    assert torch.allclose(a, b, atol=1e-6)


def test_nothing_visible_is_zero(device):
    visible = torch.zeros(1, 40, dtype=torch.bool, device=device)
    arguments = inputs(device, positions=40, visible=visible)
    assert not naive.spark_attention_decode(*arguments, spark_attention_multipliers(5, 40, device)).any()
    if device == "cuda" or torch.utils._triton.has_triton_package():
        assert not spark_attention_decode(*arguments, spark_attention_multipliers(5, 40, device)).any()


def test_what_is_not_attended_to_is_not_read(device):
    """The second halves of keys and the values of the tokens below the limit may be anything."""
    query, key, value, visible = inputs(device, heads=2, groups=2, positions=200)
    table = spark_attention_multipliers(10, 200, device)
    before = spark_attention_decode(query, key, value, visible, table)
    a = naive.scores(query[:, :, None, :8], key[..., :8])[:, :, 0]
    shown = visible[:, None].expand_as(a)
    keep = naive.attended_to(a, shown, table[shown.sum(-1, keepdim=True)])
    assert 0 < int(keep.sum()) < int(shown.sum())
    key[..., 8:][~keep], value[~keep] = float("nan"), float("nan")
    assert torch.equal(spark_attention_decode(query, key, value, visible, table), before)


@pytest.mark.parametrize("seen, low, high", [(300, 243, 270), (1024, 220, 292), (200, 200, 200)])
def test_about_as_many_are_attended_to_as_asked_for(seen, low, high):
    torch.manual_seed(4)
    shown = torch.arange(1500) < seen
    a, visible = torch.randn(200, 1500), shown.expand(200, -1)
    counts = naive.attended_to(a, visible, naive.multipliers(256, visible.sum(-1, keepdim=True))).sum(-1)
    assert low <= int(counts.min()) and int(counts.max()) <= high
    assert abs(float(counts.float().mean()) - min(256, seen)) < 2


def test_work():
    assert cost.spark_attention_flops(1, 8, 8192, 256) == 4 * 8192 * 8 * 256
    kept = cost.spark_attention_flops(1, 1, 8192, 256, 256 / 8192)
    assert kept == 2 * 128 * 8192 + 2 * 128 * 256 + 2 * 256 * 256  # 2 r n + 2 (d - r) k + 2 d k
    assert cost.spark_attention_bytes(2, 4, 100, 64, density=0.0) == 2 * 4 * 100 * 32 * 2
    arguments = *inputs("cpu"), spark_attention_multipliers(5, 100)
    with FlopCounterMode(display=False) as counter:
        spark_attention_decode(*arguments)
    assert counter.get_total_flops() == 4 * 4 * 100 * 16
    full = torch.ones(1, 100, dtype=torch.bool)
    opcheck(torch.ops.sparse_kernels.spark_attention_decode, (*inputs("cpu", visible=full), arguments[-1]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.randn(1, 4, 15)), "key must have shape"),
        (dict(query=torch.randn(65, 4, 16)), "1 to 64 rows"),
        (dict(query=far(1, 4, 16, apart=1)), "heads within 2.31 values"),
        (dict(query=far(1, 4, 16), key=far(1, 2, 100, 16, apart=2)), "128 positions within 2.31 values"),
        (dict(key=torch.randn(1, 3, 100, 16)), "dividing 4 heads"),
        (dict(visible=torch.ones(1, 99, dtype=torch.bool)), r"visible must be a bool \[1, 100\]"),
        (dict(visible=torch.ones(1, 100)), "visible must be a bool"),
        (dict(multiplier=torch.zeros(100)), r"multiplier must be a float32 \[101\]"),
    ],
)
def test_outside_its_domain(change, message):
    query, key, value, visible = inputs("cpu")
    arguments = dict(query=query, key=key, value=value, visible=visible, multiplier=torch.zeros(101))
    with pytest.raises(ValueError, match=message):
        spark_attention_decode(**(arguments | change))
    with pytest.raises(ValueError, match="at least 1"):
        spark_attention_multipliers(0, 10)
