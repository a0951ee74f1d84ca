"""`SelectiveHeads`: what it leaves out is exactly zero, and its lists are its masks."""

import pytest
import torch
from torch import nn

from sparse_kernels import to_mask
from sparse_kernels.heads import SelectiveHeads
from sparse_kernels.meter import Meter, Phase
from sparse_kernels.selectors import Oracle, Router, Tap

GROUPS, SIZE, WIDTH, OUT = 4, 6, 20, 10


def router(k=2, pool=1) -> Router:
    torch.manual_seed(1)
    outputs = GROUPS * pool
    selector = Router((torch.randn(outputs, WIDTH),), "top-k", k=k, bias=torch.randn(outputs), pool=pool)
    selector.tap = Tap()
    return selector


def heads(selector, active=True) -> SelectiveHeads:
    torch.manual_seed(0)
    phase = Phase()
    phase.active = active
    layer = SelectiveHeads(nn.Linear(GROUPS * SIZE, OUT), GROUPS, selector, 0, phase, Meter())
    return layer.requires_grad_(False)


def test_what_is_left_out_is_zero_whatever_it_was():
    selector, x = router(), torch.randn(3, 5, GROUPS * SIZE)
    selector.tap.value = torch.randn(3, 5, WIDTH)
    layer = heads(selector)
    keep = selector(x, x.unflatten(-1, (GROUPS, -1)))
    assert keep.sum(-1).unique().tolist() == [2]
    wide = keep.repeat_interleave(SIZE, -1)
    x[~wide] = torch.nan  # heads that the fast path never computes
    kept = layer.kept(x)
    assert torch.equal(kept[wide], x[wide]) and not kept[~wide].any()
    assert torch.equal(layer(x), layer.linear(torch.where(wide, x, 0)))


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("k", [1, 3, GROUPS])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_lists_are_the_masks(device, pool, k, batch):
    selector = router(k, pool)
    layer = heads(selector).to(device)
    selector.tap.value = torch.randn(batch, 1, WIDTH, device=device)  # a block's input has positions, lists have none
    index, count = layer.lists(batch)
    assert index.shape == (batch, k) and count.tolist() == batch * [k] and index.dtype == torch.int32
    keep = selector(torch.empty(batch, 1, 0, device=device), torch.empty(0))
    assert torch.equal(to_mask(index, count, GROUPS), keep[:, 0])


def test_a_group_scores_its_best_head():
    selector = router(1, pool=2)
    selector.layers[0].zero_()
    selector.bias.copy_(torch.tensor([0.0, 0, 5, -9, 3, 3, 4, 4]))
    selector.tap.value = torch.zeros(1, 1, WIDTH)
    assert selector(torch.empty(1, 1, 0), torch.empty(0)).tolist() == [[[False, True, False, False]]]


def test_mixed_positions_are_dense_where_they_should_be():
    mask = torch.tensor([[False, True, False], [True, True, False]])
    selector, x = router(), torch.randn(2, 3, GROUPS * SIZE)
    selector.tap.value = torch.randn(2, 3, WIDTH)
    layer, sparse = heads(selector, mask), heads(selector)
    with layer.meter.on():
        y = layer(x)
    assert torch.equal(y[~mask], layer.linear(x)[~mask]) and torch.equal(y[mask], sparse(x)[mask])
    assert torch.cat(layer.meter.counts["heads", 0]).tolist() == 3 * [2]


def test_a_dense_layer_is_counted_as_one():
    layer, x = heads(None), torch.randn(2, 3, GROUPS * SIZE)
    with layer.meter.on():
        assert torch.equal(layer(x), layer.linear(x))
    assert torch.cat(layer.meter.counts["heads", 0]).tolist() == 6 * [GROUPS]
    assert layer.lists(2) is None and layer.overhead == 0


def test_the_oracle_sees_the_outputs_and_has_no_lists():
    norm = lambda h: h.float().norm(dim=-1)  # noqa: E731
    layer, x = heads(Oracle(GROUPS, norm, "top-k", k=1)), torch.randn(5, GROUPS * SIZE)
    kept = layer.kept(x).unflatten(-1, (GROUPS, -1))
    assert torch.equal(norm(kept).amax(-1), norm(x.unflatten(-1, (GROUPS, -1))).amax(-1))
    assert layer.lists(5) is None and not layer.fast(x)
    assert not layer.attends and not heads(None).attends  # with every head, before any is left out


def test_what_is_charged():
    layer = heads(router(pool=2))
    assert layer.overhead == 2 * GROUPS * (WIDTH + 1) and set(layer.linears()) == {"o"} and layer.attends
    assert layer.density == 0.5
    layer.count = torch.tensor([SIZE, 2 * SIZE - 1])  # channels: an output that happens to be zero is no head less
    assert int(layer.read) == 3


def test_rows_that_keep_nearly_all_heads_between_them_are_not_searched_for_zeros(device, monkeypatch):
    selector, x = router(), torch.randn(5, GROUPS * SIZE, device=device)
    layer = heads(selector).to(device)
    monkeypatch.setattr(SelectiveHeads, "fast", lambda self, x: True)
    for rows, dense in ((1, False), (2, True), (5, True)):
        selector.tap.value = torch.randn(rows, WIDTH, device=device)
        assert (layer.limit(rows) is None) == dense
        assert torch.allclose(layer(x[:rows]), layer.linear(layer.kept(x[:rows])), atol=1e-5)
        assert (layer.read is None) == dense


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        SelectiveHeads(nn.Linear(10, 4), 4, None, 0, Phase(), Meter())
    with pytest.raises(ValueError, match="do not divide"):
        SelectiveHeads(nn.Linear(12, 4), 2, router(), 0, Phase(), Meter())
    with pytest.raises(ValueError, match="pools"):
        Router((torch.zeros(7, 4),), "top-k", k=1, pool=2)
    with pytest.raises(ValueError, match="without"):
        Router((torch.zeros(2, 4), torch.zeros(8, 2)), "top-k", k=1, pool=2)
