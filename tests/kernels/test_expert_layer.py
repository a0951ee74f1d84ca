"""`ExpertFFN` and its selectors: what is timed (kernels) is what is evaluated (masks)."""

import itertools

import pytest
import torch
from torch import nn

from sparse_kernels import gaussian_multiplier
from sparse_kernels.layers import ExpertFFN
from sparse_kernels.meter import Meter, Phase
from sparse_kernels.selectors import BatchRouter, Oracle, Router, Tap

WIDTH, UNITS, SIZE = 40, 6, 16


def router(kind: str, device: str = "cpu", units: int = UNITS) -> Router:
    torch.manual_seed(1)
    one, a, b = (torch.randn(*s, device=device) for s in ((units, WIDTH), (16, WIDTH), (units, 16)))
    return {
        "lte": lambda: Router((one,), "threshold", 0.3),
        "two-layers": lambda: Router((a, b), "threshold", 0.3),
        "d2dmoe": lambda: Router((a, b), "relative", 0.4, hidden="relu", activation="abs"),
        "linear-relative": lambda: Router((one,), "relative", 0.4, activation="abs"),
        "moefication": lambda: Router((a, b), "top-k", k=2, hidden="tanh", normalize=True),
        "similarity": lambda: Router((one,), "top-k", k=3, bias=torch.randn(units, device=device), normalize=True),
        "statistical": lambda: Router((one,), "statistical", 0.3),
        "two-statistical": lambda: Router((a, b), "statistical", 0.3, hidden="relu"),
    }[kind]()


KINDS = (
    "lte",
    "two-layers",
    "d2dmoe",
    "linear-relative",
    "moefication",
    "similarity",
    "statistical",
    "two-statistical",
)


def ffn(selector, gated=True, mean=None, device="cpu", active=True, activation=None) -> ExpertFFN:
    torch.manual_seed(0)
    phase = Phase()
    phase.active = active
    neurons = UNITS * SIZE
    gate = nn.Linear(WIDTH, neurons, bias=not gated, device=device) if gated else None
    up, down = nn.Linear(WIDTH, neurons, device=device), nn.Linear(neurons, WIDTH, device=device)
    activation, size = activation or ("silu" if gated else "relu"), neurons // selector.units
    layer = ExpertFFN(gate, up, down, activation, size, selector, 0, phase, Meter(), mean)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, gated, compensated", [(1, True, False), (3, False, False), (2, True, True)])
def test_the_kernels_compute_what_the_masks_do(device, kind, rows, gated, compensated):
    torch.manual_seed(2)
    mean = torch.randn(UNITS * SIZE, device=device) if compensated else None
    selector = router(kind, device)
    layer = ffn(selector, gated, mean, device)
    x = torch.randn(rows, WIDTH, device=device)
    expected = layer(x) if device == "cpu" else _reference(layer, x)
    found = layer._skip(x, selector)
    assert torch.allclose(found, expected, atol=1e-5)
    assert int(layer.count) == int(selector(x, layer.hidden(x)).any(0).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated, compensated", [(True, False), (False, False), (True, True)])
def test_prompts_are_routed_to_what_the_masks_leave(device, kind, gated, compensated):
    torch.manual_seed(2)
    mean = torch.randn(UNITS * SIZE, device=device) if compensated else None
    selector = router(kind, device)
    layer, x = ffn(selector, gated, mean, device), torch.randn(2, 35, WIDTH, device=device)
    found = layer._prefill(x, selector)
    assert found.shape == x.shape and torch.allclose(found, _reference(layer, x), atol=1e-5)


def test_what_a_prompt_is_routed_for(monkeypatch):
    """Sparse at every position, by a selector that needs no hidden layer, in experts that fill matrix units."""
    layer, x = ffn(router("lte")), torch.randn(1, 70, WIDTH)
    cuda = torch.empty(1, 70, WIDTH, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"))
    assert not layer.routed(cuda)  # gradients may be asked for: the kernels have none
    with torch.no_grad():
        assert layer.routed(cuda) and not layer.routed(x)
        with layer.meter.on():
            assert not layer.routed(cuda)
        layer.phase.active = torch.ones(1, 70, dtype=torch.bool)
        assert not layer.routed(cuda)
        assert not ffn(Oracle(UNITS, lambda h: h.abs().sum(-1), "threshold", 0.3)).routed(cuda)
        assert not ffn(router("lte", units=UNITS * SIZE)).routed(cuda)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensated", [False, True])
def test_parts_and_the_constant_are_the_whole(device, kind, compensated, monkeypatch):
    torch.manual_seed(2)
    mean = torch.randn(UNITS * SIZE, device=device) if compensated else None
    selector = router(kind, device)
    layer, x = ffn(selector, True, mean, device), torch.randn(1, WIDTH, device=device)
    assert layer.parts(x.cpu()) is None  # no fast path
    layer.materialize()
    monkeypatch.setattr(ExpertFFN, "fast", lambda self, x: True)
    parts = layer.parts(x)
    assert parts.dtype == torch.float32 and parts.shape[1:] == x.shape
    assert torch.allclose(parts.sum(0) + layer.constant, layer._skip(x, selector), atol=1e-5)
    assert int(layer.count) == int(selector(x, layer.hidden(x)).sum())
    assert layer.parts(x.repeat(2, 1)) is None  # rows of a batch do not share their neurons


@pytest.mark.parametrize("rows, k, idle", [(5, 1, False), (5, 4, False), (5, 5, True), (20, 4, True), (40, 2, False)])
def test_a_batch_that_shares_its_units_runs_them_or_all_and_asks_nobody(device, rows, k, idle, monkeypatch):
    """Masks, kernels and meter agree on it: 20 rows that want 4 of 6 units are served faster by dense products."""
    torch.manual_seed(2)
    selector = BatchRouter((torch.randn(16, WIDTH), torch.randn(UNITS, 16)), [k] * 7).to(device)
    layer, x = ffn(selector, device=device), torch.randn(rows, WIDTH, device=device)
    layer.density = 0.5  # of what a row is expected to need: nothing that rows with a common list are crowded by
    selector.tap = Tap()
    selector.tap.value = x
    with layer.meter.on():
        wanted = layer(x[:, None])[:, 0]
    assert layer.shared and layer.idle(rows) == idle and int(layer.meter.unions["ffn", 0][0]) == (UNITS if idle else k)
    monkeypatch.setattr(ExpertFFN, "fast", lambda self, x: True)
    if idle:
        selector.tap.value = None  # nobody listens
        assert torch.allclose(wanted, layer.down(layer.hidden(x).flatten(-2)), atol=1e-5)
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert (layer.count is None) if idle else int(layer.count) == k


def test_a_dense_pass_between_leaves_the_count_of_the_sparse_one(device):
    """A replayed graph writes to that tensor, and its owner reads it after dense steps were timed in turns."""
    selector = router("lte", device)
    layer, x = ffn(selector, device=device), torch.randn(1, WIDTH, device=device)
    layer._skip(x, selector)
    count = layer.count
    layer.phase.active = False
    layer(x)
    assert count is not None and layer.count is count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated, compensated", [(True, False), (True, True), (False, False)])
def test_rows_that_need_most_experts_between_them_are_multiplied_densely(device, kind, gated, compensated):
    torch.manual_seed(2)
    mean = torch.randn(UNITS * SIZE, device=device) if compensated else None
    selector = router(kind, device)
    layer, x = ffn(selector, gated, mean, device), torch.randn(5, WIDTH, device=device)
    listed = layer._skip(x, selector)
    assert layer.count is not None
    layer.density = 2 / UNITS
    assert torch.allclose(layer._skip(x, selector), listed, atol=1e-5)
    assert layer.count is None  # everything was read
    layer._skip(x[:1], selector)
    assert int(layer.count) == int(selector(x[:1], layer.hidden(x[:1])).sum())  # one row keeps what it keeps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, gated, activation", [(1, True, "silu"), (1, False, "relu"), (17, True, "gelu_tanh")])
def test_experts_may_be_single_neurons(device, kind, rows, gated, activation):
    torch.manual_seed(2)
    selector = router(kind, device, UNITS * SIZE)
    layer, x = ffn(selector, gated, device=device, activation=activation), torch.randn(rows, WIDTH, device=device)
    expected = layer(x) if device == "cpu" else _reference(layer, x)
    assert torch.allclose(layer._skip(x, selector), expected, atol=1e-5)
    keep = selector(x, layer.hidden(x))
    assert 0 < int(layer.count) == int(keep.any(0).sum()) and int(keep.sum(1).min()) < layer.units
    h = layer.hidden(x).squeeze(-1)
    assert torch.allclose(expected, layer.down(torch.where(keep, h, 0)), atol=1e-5)


def test_statistical_selection():
    """About the share asked for of normal scores, whatever their scale; everything or nothing at the ends."""
    torch.manual_seed(7)
    weight, x = torch.randn(4000, WIDTH), torch.randn(20, WIDTH)
    for share in (0.08, 0.5):
        selector = Router((weight,), "statistical", gaussian_multiplier(share))
        keep = selector(x, torch.empty(0))
        assert abs(float(keep.float().mean()) - share) < 0.01
        assert torch.equal(keep, selector(4 * x, torch.empty(0)))  # a power of two scales without rounding
        best = selector.score(x).masked_fill(~keep, torch.inf).amin(1) > selector.score(x).masked_fill(keep, -1e9).amax(
            1
        )
        assert best.all()
    for share in (0.0, 1.0):
        assert (Router((weight,), "statistical", gaussian_multiplier(share))(x, torch.empty(0)) == bool(share)).all()


def _reference(layer: ExpertFFN, x: torch.Tensor) -> torch.Tensor:
    with layer.meter.on():  # counting keeps the layer on its reference path
        return layer(x)


@pytest.mark.parametrize("k", [1, 2, UNITS - 1, UNITS])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_any_number_of_experts(k, rows):
    torch.manual_seed(3)
    selector = Router((torch.randn(UNITS, WIDTH),), "top-k", k=k)
    layer, x = ffn(selector), torch.randn(rows, WIDTH)
    assert torch.allclose(layer._skip(x, selector), layer(x), atol=1e-5)
    if k == UNITS:
        assert torch.allclose(layer(x), layer.down(layer.hidden(x).flatten(-2)), atol=1e-6)


def test_ties_never_select_more_than_k():
    selector = Router((torch.zeros(UNITS, WIDTH),), "top-k", k=2)
    keep = selector(torch.randn(5, WIDTH), torch.empty(0))
    assert keep.tolist() == 5 * [[True, True] + (UNITS - 2) * [False]]
    assert ffn(selector)._skip(torch.randn(1, WIDTH), selector).shape == (1, WIDTH)


def test_relative_selections_are_nested_and_never_empty():
    x, before = torch.randn(50, WIDTH), None
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        selector = router("d2dmoe")
        selector.threshold.fill_(share)
        keep = selector(x, torch.empty(0))
        assert keep.any(1).all() and (before is None or not (keep & ~before).any())
        before = keep
        if share == 0:
            assert keep.all()
    score = selector.score(x)
    assert torch.equal(keep, score == score.amax(1, keepdim=True)) and (score >= 0).all()


@pytest.mark.parametrize("kind", ["moefication", "similarity", "d2dmoe"])
def test_selection_does_not_depend_on_scale(kind):
    x, selector = torch.randn(50, WIDTH), router(kind)
    assert torch.equal(selector(x, torch.empty(0)), selector(4 * x, torch.empty(0)))


@pytest.mark.parametrize("kind", ["moefication", "d2dmoe"])
def test_output_does_not_depend_on_the_size_of_scores(kind):
    selector, x = router(kind), torch.randn(9, WIDTH)
    layer = ffn(selector)
    expected = layer(x)
    selector.layers[1].mul_(10)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_a_token_does_not_depend_on_its_batch():
    selector, x = router("d2dmoe"), torch.randn(9, WIDTH)
    layer, order = ffn(selector), torch.randperm(9)
    for run in (layer, lambda rows: layer._skip(rows, selector)):
        assert torch.allclose(run(x)[order], run(x[order]), atol=1e-6)
        assert torch.allclose(run(x)[:1], run(x[:1]), atol=1e-5)


def test_mean_compensation_follows_its_definition():
    """The folded form is: what is not computed counts with its mean."""
    torch.manual_seed(4)
    selector, x, mean = router("moefication"), torch.randn(7, WIDTH), torch.randn(UNITS * SIZE)
    layer, plain = ffn(selector, mean=mean), ffn(selector)
    h, keep = layer.hidden(x), selector(x, torch.empty(0)).unsqueeze(-1)
    explicit = torch.where(keep, h, mean.view(UNITS, SIZE)).flatten(-2)
    assert torch.allclose(layer(x), layer.down(explicit), atol=1e-5)
    assert torch.allclose(ffn(selector, mean=torch.zeros_like(mean))(x), plain(x), atol=1e-6)
    still = ffn(selector, mean=h[0].flatten())
    assert torch.allclose(still(x[:1]), still.down(h[:1].flatten(-2)), atol=1e-5)


def test_mixed_positions_are_dense_where_they_should_be():
    torch.manual_seed(5)
    mask = torch.tensor([[False, True, False], [True, True, False]])
    x, mean = torch.randn(2, 3, WIDTH), torch.randn(UNITS * SIZE)
    layer, sparse = ffn(router("similarity"), mean=mean, active=mask), ffn(router("similarity"), mean=mean)
    dense = layer.down(layer.hidden(x).flatten(-2))
    assert torch.allclose(layer(x)[~mask], dense[~mask], atol=1e-5)
    assert torch.allclose(layer(x)[mask], sparse(x)[mask], atol=1e-5)


def test_the_oracle_is_the_best_subset():
    torch.manual_seed(6)
    h, k = torch.randn(20, 8, 4), 3
    chosen = Oracle(8, lambda v: v.abs().sum(-1), "top-k", k=k)(h, h)
    importance = h.abs().sum(-1)
    best = torch.stack([importance[:, list(s)].sum(1) for s in itertools.combinations(range(8), k)]).amax(0)
    assert torch.allclose((importance * chosen).sum(1), best)


def test_what_is_charged():
    two, oracle = router("moefication"), Oracle(UNITS, lambda h: h.abs().sum(-1), "top-k", k=2)
    assert ffn(two).overhead == 16 * WIDTH + UNITS * 16 and set(ffn(two).linears()) == {"gate", "up", "down"}
    assert ffn(two, mean=torch.zeros(UNITS * SIZE)).overhead == ffn(two).overhead + UNITS * SIZE
    assert ffn(oracle).overhead == 0 and set(ffn(oracle).linears()) == {"down"}  # it reads the hidden layer whole
    assert not ffn(oracle).fast(torch.randn(1, WIDTH))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rule must be"):
        Router((torch.zeros(4, 8),), "best")
    with pytest.raises(ValueError, match="k 1 to 4"):
        Router((torch.zeros(4, 8),), "top-k", k=5)
    with pytest.raises(ValueError, match="one layer"):
        Router((torch.zeros(4, 8), torch.zeros(3, 4)), bias=torch.zeros(3))
    with pytest.raises(ValueError, match="do not divide"):
        ExpertFFN(None, nn.Linear(8, 30), nn.Linear(30, 8), "relu", 8, None, 0, Phase(), Meter())
