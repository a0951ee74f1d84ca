import types

import pytest
import torch
import torch.nn.functional as F
from support import choose, limits, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import (
    compact,
    linear_router,
    low_rank_predictor,
    router_scores,
    statistical_top_k,
    to_index,
    to_mask,
    top_k,
    top_mask,
    union,
    union_lists,
)
from sparse_kernels.selection import cost, naive
from sparse_kernels.selection.launch import Scan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernel(device) -> types.ModuleType:
    """The kernels' launchers, for launches that the table does not choose at small shapes."""
    from sparse_kernels.selection import kernel

    return kernel


@pytest.fixture
def top(device) -> types.ModuleType:
    from sparse_kernels.selection import top

    return top


def masks(batch, channels, density, device):
    """A mask with entries at this density in each row: [channels], or [batch, channels]."""
    torch.manual_seed(0)
    rows = [choose(channels, density, device) for _ in range(batch or 1)]
    return torch.stack(rows) if batch else rows[0]


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("channels", [1, 63, 1024, 2500])
@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("magnitude", [True, False])
def test_compact_equals_naive(device, batch, channels, kind, magnitude):
    x = torch.randn(batch, channels, device=device)
    threshold = limits(kind, channels, device) + 0.5
    index, count = compact(x, threshold, magnitude)
    assert index.dtype == count.dtype == torch.int32 and index.shape == (channels,) and count.shape == (1,)
    assert same((index, count), naive.compact(x, threshold, magnitude))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_compares_in_float32(device, dtype):
    x = torch.linspace(-2, 2, 300, device=device).to(dtype).reshape(1, -1)
    for threshold in (torch.full((1,), 0.3, device=device), torch.full((300,), 0.3, device=device)):
        assert same(compact(x, threshold), naive.compact(x, threshold, True))


def test_compact_is_strict_and_ignores_nan(device):
    x = torch.tensor([[0.5, -0.5, 0.5000001, -0.6, float("nan"), float("inf"), 0.0]], device=device)
    threshold = torch.full((1,), 0.5, device=device)
    index, count = compact(x, threshold)
    assert index[: int(count)].tolist() == [2, 3, 5]
    index, count = compact(x, threshold, False)
    assert index[: int(count)].tolist() == [2, 5]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("value, count", [(0.0, 0), (1.0, 2500)])
def test_compact_empty_and_full(device, batch, value, count):
    x = torch.full((batch, 2500), value, device=device)
    index, found = compact(x, torch.full((1,), 0.5, device=device))
    assert int(found) == count and index[:count].tolist() == list(range(count))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("position", [0, 1023, 1024, 2499])
def test_compact_one_channel_in_one_row(device, batch, position):
    x = torch.zeros(batch, 2500, device=device)
    x[batch // 2, position] = -3.0
    index, count = compact(x, torch.full((1,), 0.5, device=device))
    assert int(count) == 1 and int(index[0]) == position


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_compact_negative_threshold_takes_everything_but_nothing_beyond(device, batch):
    x = torch.zeros(batch, 1100, device=device)[:, :1030]
    index, count = compact(x, torch.full((1,), -1.0, device=device))
    assert int(count) == 1030 and index.tolist() == list(range(1030))


@pytest.mark.parametrize("block", [64, 1024, 4096])
@pytest.mark.parametrize("batch", [1, 3])
def test_compact_counts_again_in_any_block(kernel, device, block, batch, monkeypatch):
    monkeypatch.setattr(kernel, "RECOUNT", 512)
    x, threshold = torch.randn(batch, 2500, device=device), torch.full((1,), 1.5, device=device)
    config = Scan(block, 4)
    assert same(kernel.compact(x, threshold, True, config, config), naive.compact(x, threshold, True))


@pytest.mark.parametrize("batch", [None, 1, 2, 7])
@pytest.mark.parametrize("channels", [1, 63, 133, 1100])
@pytest.mark.parametrize("density", [0.0, "one", 0.4, 1.0])
def test_masks_and_lists(device, batch, channels, density):
    mask = masks(batch, channels, density, device)
    lists = to_index(mask)
    assert lists[0].shape == mask.shape and lists[1].shape == (batch or 1,)
    assert same(lists, naive.to_index(mask)) and same(to_index(mask.to(torch.int8) * -2), lists)
    assert torch.equal(to_mask(*lists, channels), mask) and torch.equal(naive.to_mask(*lists, channels), mask)
    if batch:
        assert same(union(mask), naive.to_index(mask.any(0))) and same(union_lists(*lists, channels), union(mask))


def test_lists_in_any_order_shorter_and_longer_than_the_mask(device):
    index = torch.tensor([[5, 2, 9, -1], [2, 7, -1, -1]], dtype=torch.int32, device=device)
    count = torch.tensor([3, 2], dtype=torch.int32, device=device)
    mask = to_mask(index, count, 12)
    assert mask.shape == (2, 12) and torch.equal(mask, naive.to_mask(index, count, 12))
    found, number = union_lists(index, count, 12)
    assert found.shape == (12,) and found[: int(number)].tolist() == [2, 5, 7, 9]
    wide = F.pad(index, (0, 20), value=-1)
    assert torch.equal(to_mask(wide, count, 12), mask) and same(union_lists(wide, count, 12), (found, number))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("channels", [1, 8, 63, 1000])
def test_top_k_equals_naive(device, dtype, batch, channels):
    torch.manual_seed(0)
    score = torch.randn(batch, channels, device=device).to(dtype)
    for k in {0, 1, channels // 3, channels - 1, channels}:
        index, count = top_k(score, k)
        assert index.shape == (batch, k) and same((index, count), naive.top_k(score, k))
        assert torch.equal(top_mask(score, k), naive.top_mask(score, k))


def test_top_k_of_more_than_a_program_lists(device):
    torch.manual_seed(0)
    score = torch.stack([torch.randn(9001, device=device), torch.randn(9001, device=device).round(decimals=1)])
    for k in (0, 1, 4000, 9001):
        assert same(top_k(score, k), naive.top_k(score, k)) and torch.equal(
            top_mask(score, k), naive.top_mask(score, k)
        )


@pytest.mark.parametrize("block", [512, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_takes_ties_from_the_left(top, device, block, dtype):
    torch.manual_seed(0)
    score = torch.randint(-3, 3, (3, 900), device=device).to(dtype)  # a block of 512 is less: tile by tile
    score[1] = 2.5
    score[2, ::2] = -0.0  # equal to the zeros between
    for k in (1, 500, 900):
        assert same(top.top_k(score, k, Scan(block, 4)), naive.top_k(score, k))
        assert torch.equal(top.top_mask(score, k, Scan(block, 4)), naive.top_mask(score, k))
    assert top.top_k(score, 5, Scan(block, 4))[0][1].tolist() == list(range(5))


@pytest.mark.parametrize("block", [512, 2048])
def test_top_k_of_what_no_normal_distribution_has(top, device, block):
    """Where the first guess is far off, most scores are alike, or few of them make the mean."""
    torch.manual_seed(0)
    normal = torch.randn(6, 900, device=device)
    score = torch.stack([normal[0].exp(), normal[1].relu(), normal[2] * 1e-30, normal[3].sign(), *normal[4:] + 1e6])
    score[2, 7], score[4, :890] = 3e38, -1e-38
    for k in (1, 40, 450, 899):
        assert same(top.top_k(score, k, Scan(block, 4)), naive.top_k(score, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_of_infinities_and_nan(device, dtype):
    values = [float("nan"), -float("inf"), 1.0, float("inf"), -1e-7, 0.0, float("-nan"), -3.0]
    score = torch.tensor([values], device=device).to(dtype)
    assert [top_k(score, k)[0][0].tolist() for k in (1, 3, 5, 7)] == [
        [3],
        [2, 3, 5],
        [2, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 7],
    ]


def test_top_k_twice_is_the_same(device):
    score = torch.randn(2, 700, device=device).round(decimals=1)
    assert torch.equal(top_k(score, 100)[0], top_k(score, 100)[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: compact(torch.randn(65, 4), torch.zeros(1)), "1 to 64 rows"),
        (lambda: compact(torch.randn(4), torch.zeros(1)), "shape"),
        (lambda: compact(torch.randn(1, 65537), torch.zeros(1)), "at most 65536"),
        (lambda: compact(torch.randn(1, 4), torch.zeros(1).double()), "float32"),
        (lambda: compact(torch.randn(1, 4), torch.zeros(3)), r"\[4\]"),
        (lambda: compact(torch.randn(4, 4).t(), torch.zeros(1)), "contiguous rows"),
        (lambda: compact(torch.ones(1, 4, dtype=torch.int64), torch.zeros(1)), "float32, float16 or bfloat16"),
        (lambda: to_index(torch.zeros(4)), "bool or int8"),
        (lambda: to_index(torch.zeros(4, 4, dtype=torch.bool).t()), "contiguous"),
        (lambda: to_index(torch.zeros(65, 4, dtype=torch.bool)), "1 to 64 rows"),
        (lambda: union(torch.zeros(4, dtype=torch.bool)), "1 to 64 rows"),
        (lambda: to_mask(torch.zeros(4), torch.zeros(1).int(), 4), "index must be a contiguous int32"),
        (lambda: to_mask(torch.zeros(2, 4).int(), torch.zeros(1).int(), 4), "lists"),
        (lambda: to_mask(torch.zeros(4).int(), torch.zeros(1).int(), 0), "size must be 1 to 65536"),
        (lambda: union_lists(torch.zeros(4).int(), torch.zeros(1).int(), 4), "lists"),
        (lambda: top_k(torch.randn(1, 4), 5), "k must be 0 to 4"),
        (lambda: top_mask(torch.randn(1, 4), -1), "k must be 0 to 4"),
        (lambda: top_k(torch.ones(1, 4, dtype=torch.int64), 2), "float32, float16 or bfloat16"),
        (lambda: statistical_top_k(torch.randn(1, 4), float("nan")), "multiplier must be a number"),
        (lambda: statistical_top_k(torch.randn(4), 1.0), "shape"),
        (lambda: statistical_top_k(torch.randn(1, 4), 1.0, activation="tanh"), "activation must be one of"),
        (lambda: statistical_top_k(torch.randn(1, 4), 1.0, magnitude=True), "pass soft=False"),
        (lambda: router_scores(torch.randn(1, 4), torch.randn(5, 3)), "weight must have shape"),
        (lambda: router_scores(torch.randn(1, 4), torch.randn(5, 4).half()), "weight must be torch.float32"),
        (lambda: router_scores(torch.randn(1, 4), torch.randn(5, 4), torch.randn(4)), "bias must have shape"),
        (lambda: router_scores(torch.randn(1, 4), torch.randn(5, 4), None, "softmax"), "activation must be one of"),
        (
            lambda: linear_router(torch.randn(1, 4), torch.randn(5, 4), None, torch.zeros(4)),
            r"contiguous \[1\] or \[5\]",
        ),
        (
            lambda: linear_router(torch.randn(1, 4), torch.randn(5, 4), None, torch.zeros(5), "abs", True),
            r"contiguous \[1\] or \[1\]",
        ),
        (lambda: low_rank_predictor(torch.randn(1, 4), torch.randn(3, 4), torch.randn(9, 3)), "either threshold or k"),
        (lambda: low_rank_predictor(torch.randn(1, 4), torch.randn(3, 4), torch.randn(9, 2), k=1), "weight must have"),
    ],
)
def test_selections_outside_their_domain(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_selections_are_well_formed():
    ops = torch.ops.sparse_kernels
    torch.manual_seed(0)
    score, mask = torch.randn(2, 64), torch.rand(2, 64) < 0.5
    index, count = to_index(mask)
    opcheck(ops.compact, (score, torch.tensor([0.5]), True))
    opcheck(ops.to_index, (mask,))
    opcheck(ops.to_index, (mask[0],))
    opcheck(ops.to_mask, (index, count, 64))
    opcheck(ops.union, (mask,))
    opcheck(ops.union_lists, (index, count, 64))
    opcheck(ops.top_k, (score, 5))
    opcheck(ops.top_mask, (score, 5))
    opcheck(ops.statistical_top_k, (score, 1.5, True, "identity", False))
    opcheck(ops.statistical_top_k, (score, 0.5, False, "silu", True))
    opcheck(ops.near_best, (score.abs(), torch.tensor([0.5])))
    opcheck(ops.batch_score, (score,))
    for narrow in (False, True):
        opcheck(ops.router_scores, (score.half(), torch.randn(9, 64).half(), None, "relu", True, narrow))


def selector(x, weight, a, b):
    one = torch.full((1,), 0.5)
    score, index, count = linear_router(x, weight, None, one)
    lists = top_k(score, 3)
    value, threshold, *found = statistical_top_k(score, 1.0)
    return (
        score,
        count,
        *union_lists(*lists, 9)[1:],
        value,
        threshold,
        to_mask(index, count, 9),
        top_mask(score, 3),
        *found[1:],
        *(low_rank_predictor(x, a, b, k=4, hidden="tanh", normalize=True)),
    )


def test_selections_compile_as_one_graph_and_count_their_layers():
    torch.manual_seed(0)
    arguments = (torch.randn(2, 64), torch.randn(9, 64), torch.randn(16, 64), torch.randn(30, 16))
    compiled = torch.compile(selector, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), selector(*arguments), strict=True):
        assert torch.equal(actual, expected)
    with FlopCounterMode(display=False) as counter:
        selector(*arguments)
    assert counter.get_total_flops() == cost.score_flops(2, 64, 9) + cost.predictor_flops(2, 64, 16, 30)


def test_fakes_have_the_real_shapes():
    with FakeTensorMode():
        x = torch.empty(4, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(12, 64, dtype=torch.bfloat16, device="cuda")
        score, index, count = linear_router(x, weight, None, torch.empty(1, device="cuda"))
        assert (score.shape, score.dtype, index.shape, count.shape) == ((4, 12), torch.float32, (12,), (1,))
        value, threshold, index, count = statistical_top_k(x, 1.0)
        assert (value.dtype, threshold.shape, threshold.dtype) == (torch.bfloat16, (4,), torch.float32)
        assert to_mask(index, count, 64).dtype == torch.bool


def test_costs_of_known_shapes():
    assert cost.score_flops(1, 4096, 344) == 2 * 4096 * 344
    assert cost.score_bytes(1, 4096, 344) == 344 * 4096 * 2 + 4096 * 2
    assert cost.predictor_bytes(1, 4096, 1024, 11008) == 1024 * 4096 * 2 + 11008 * 1024 * 2 + 4096 * 2 + 1024 * 2
    assert cost.list_bytes(2, 11008) == 2 * 11008 * 2
