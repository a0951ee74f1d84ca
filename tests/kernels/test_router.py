import pytest
import torch
import torch.nn.functional as F
from support import close, double, limits, same

from sparse_kernels import (
    batch_score,
    linear_router,
    low_rank_predictor,
    router_scores,
    to_mask,
    top_k,
    union,
    union_lists,
)
from sparse_kernels.selection import naive
from sparse_kernels.selection.launch import Scan, Score

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(batch, width, experts, device, dtype=torch.float32):
    """Input, weight and bias of a router; what is beside the rows of the first two in memory is NaN."""
    torch.manual_seed(0)
    x, weight = (torch.full((n, width + 16), float("nan"), device=device) for n in (batch, experts))
    x[:, :width] = torch.randn(batch, width, device=device)
    weight[:, :width] = torch.randn(experts, width, device=device) / width**0.5
    return x.to(dtype)[:, :width], weight.to(dtype)[:, :width], torch.randn(experts, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 12, 33])
@pytest.mark.parametrize("width, experts", [(1, 1), (63, 133), (200, 40), (24, 2100)])
def test_linear_router_equals_naive(device, dtype, batch, width, experts):
    x, weight, bias = layer(batch, width, experts, device, dtype)
    for kind, offset in (("one", None), ("each", bias)):
        threshold = limits(kind, experts, device)
        score, *found = linear_router(x, weight, offset, threshold)
        assert score.dtype == torch.float32 and found[0].shape == (experts,)
        assert close(score, F.linear(*double(x, weight, offset)))
        assert same(found, naive.union(score > threshold))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 33])
@pytest.mark.parametrize("units", [1, 133, 2100])
def test_batch_score_equals_naive(device, dtype, batch, units):
    torch.manual_seed(0)
    score = torch.full((batch, units + 3), float("nan"), device=device, dtype=dtype)[:, :units]
    score.copy_(torch.randn(batch, units, device=device))
    score[:, ::5] = -score[:, ::5].abs()  # nobody's
    found = batch_score(score)
    assert found.dtype == dtype and close(found, naive.batch_score(score.double()))
    assert torch.equal(found[::5], score[:, ::5].amax(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_score_of_nan_is_nan(device, dtype):
    nan = float("nan")
    score = torch.tensor([[1.0, -1.0, nan, nan, 2.0], [2.0, nan, -1.0, nan, -1.0]], device=device).to(dtype)
    assert torch.equal(batch_score(score).isnan(), naive.batch_score(score).isnan())
    assert batch_score(score).isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("threshold", [-99.0, 99.0, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_linear_router_all_none_and_one(device, threshold, batch):
    x, weight, _ = layer(batch, 64, 50, device)
    limit = router_scores(x, weight).max() - 1e-3 if threshold is None else torch.tensor(threshold, device=device)
    _, index, count = linear_router(x, weight, None, limit.reshape(1))
    number = {-99.0: 50, 99.0: 0, None: 1}[threshold]
    assert int(count) == number and (number < 50 or index.tolist() == list(range(50)))


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "abs"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("columns", [64, 256])
def test_router_scores(device, activation, normalize, batch, columns):
    if device == "cpu":
        pytest.importorskip("triton")
    from sparse_kernels.selection.score import scores

    x, weight, bias = layer(batch, 250, 30, device)
    arguments = (activation, normalize, False)
    score = scores(x, weight, bias, *arguments, Score(1024, columns, 4, 2))
    assert close(score, naive.scores(*double(x, weight, bias), *arguments))
    assert close(router_scores(x, weight, bias, activation, normalize), score.double())


def test_router_of_a_zero_row_normalizes_to_zero(device):
    x, weight, bias = layer(2, 48, 10, device)
    x[1] = 0
    score = router_scores(x, weight, bias, normalize=True)
    assert torch.equal(score[1], bias)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("experts", [1, 63, 700])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_router_relative_to_the_best(device, batch, experts, share):
    x, weight, _ = layer(batch, 40, experts, device)
    score, *found = linear_router(x, weight, None, torch.full((1,), share, device=device), "abs", relative=True)
    raw = router_scores(x, weight, None, "abs")
    keep = raw >= share * raw.amax(1, keepdim=True)
    assert same(found, naive.union(keep))
    assert torch.equal(score, raw.masked_fill(~keep, -float("inf")))  # so score > -inf is each row's own selection
    assert (keep.sum(1) >= 1).all() and (share > 0 or keep.all())


@pytest.mark.parametrize("place", [0, 5, 39])
@pytest.mark.parametrize("tile", [16, 4096])
def test_relative_to_nan_nothing_is_selected(device, place, tile, monkeypatch):
    if device == "cpu":
        pytest.importorskip("triton")
    from sparse_kernels.selection import kernel

    monkeypatch.setattr(kernel, "pick", lambda *_: {"near best": Scan(2 * tile, 1)})
    score = torch.rand(2, 40, device=device)
    score[0, place], score[0, 20] = float("nan"), float("inf")
    share = torch.full((1,), 0.5, device=device)
    (near, *found), (wanted, *listed) = (f(score, share) for f in (kernel.near_best, naive.near_best))
    assert torch.equal(near, wanted) and same(found, listed)
    assert near[0].isneginf().all() and int(found[1]) == int((score[1] >= score[1].max() / 2).sum())


@pytest.mark.parametrize("batch", [1, 4])
def test_router_twice_is_the_same_to_the_bit(device, batch):
    arguments = (*layer(batch, 300, 90, device), torch.zeros(1, device=device))
    once, again = linear_router(*arguments), linear_router(*arguments)
    assert torch.equal(once[0], again[0]) and same(once[1:], again[1:])


@pytest.mark.parametrize("hidden, normalize", [("identity", False), ("relu", False), ("tanh", True)])
@pytest.mark.parametrize("batch", [1, 3])
def test_low_rank_predictor(device, hidden, normalize, batch):
    x, a, _ = layer(batch, 80, 32, device)
    _, b, _ = layer(batch, 32, 200, device)
    options = dict(hidden=hidden, normalize=normalize, activation="abs")
    rank = naive.RESPONSES[hidden](F.linear(F.normalize(x.double()) if normalize else x.double(), a.double()))
    expected = F.linear(rank, b.double()).abs()
    score, *found = low_rank_predictor(x, a, b, torch.full((1,), 0.2, device=device), **options)
    assert torch.allclose(score.double(), expected, rtol=1e-5, atol=2e-6) and same(found, naive.union(score > 0.2))
    score, *found = low_rank_predictor(x, a, b, k=17, **options)
    assert same(found, naive.top_k(score, 17))
    share = torch.full((1,), 0.3, device=device)
    score, *found = low_rank_predictor(x, a, b, share, relative=True, **options)
    assert same(found, naive.union(expected >= 0.3 * expected.amax(1, keepdim=True)))


def test_top_experts_of_a_router_are_those_of_torch(device):
    x, weight, _ = layer(4, 64, 96, device)
    score = router_scores(x, weight)
    index, count = top_k(score, 20)
    assert torch.equal(index.long(), score.topk(20).indices.sort(1).values) and count.tolist() == [20] * 4
    joined = union_lists(index, count, 96)
    assert same(joined, union(to_mask(index, count, 96)))
