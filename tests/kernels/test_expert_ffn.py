import pytest
import torch
import torch.nn.functional as F
from support import close, double
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import ACTIVATIONS, compact, expert_ffn, expert_ffn_prefill, expert_hidden, input_linear
from sparse_kernels.expert_ffn import cost, naive, op
from sparse_kernels.launch import crowded

WIDTH = 72


def make(batch, blocks, block, gated, biased, device, dtype=torch.float32, active=None):
    """FFN weights and scores; the weights of blocks that no row selects are NaN."""
    torch.manual_seed(0)
    neurons = blocks * block

    def weights(*shape):
        return (torch.randn(*shape, device=device) / 8).to(dtype)

    x = torch.randn(batch, WIDTH, device=device).to(dtype)
    gate, up = weights(neurons, WIDTH) if gated else None, weights(neurons, WIDTH)
    gate_bias = weights(neurons) if gated and biased else None
    up_bias = weights(neurons) if biased else None
    score = torch.randn(batch, blocks, device=device)
    if active is not None:  # how many blocks are selected in all
        score[:, active:] = -1.0
        score[0, :active] = 1.0
    threshold = torch.zeros(1, device=device)
    unread = (score <= 0).all(0).repeat_interleave(block)
    for tensor in (gate, up, gate_bias, up_bias):
        if tensor is not None:
            tensor[unread] = float("nan")
    return x, gate, up, gate_bias, up_bias, score, threshold


def selected_equal(arguments, activation):
    """Whether the kernel's listed blocks are the definition's; the others must not have been written."""
    x, gate, up, gate_bias, up_bias, score, threshold = arguments
    index, count = compact(score, threshold, False)
    h = expert_hidden(*arguments, index, count, activation)
    weights = double(x, gate, up, gate_bias, up_bias)
    expected = naive.expert_hidden(*weights, score, threshold, index, count, activation)
    listed = (score > 0).any(0).repeat_interleave(up.shape[0] // score.shape[1])
    return close(h[:, listed], expected[:, listed]) and bool(h[:, ~listed].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_expert_hidden_activations(device, activation, gated, batch):
    assert selected_equal(make(batch, 5, 4, gated, True, device), activation)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("blocks, block", [(11, 4), (3, 32), (5, 7)])
@pytest.mark.parametrize("biased", [True, False])
def test_expert_hidden_shapes(device, batch, blocks, block, biased):
    assert selected_equal(make(batch, blocks, block, True, biased, device), "silu")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("active", [0, 1, 6])
def test_expert_hidden_empty_one_and_full(device, batch, active):
    assert selected_equal(make(batch, 6, 8, True, False, device, active=active), "silu")


@pytest.mark.parametrize("batch", [1, 17, 33])
def test_expert_hidden_half_precision(device, batch):
    assert selected_equal(make(batch, 3, 32, True, True, device, torch.float16), "gelu")


def test_expert_hidden_score_is_strict(device):
    x, gate, up, _, _, score, _ = make(1, 4, 8, True, False, device, active=4)
    score.copy_(torch.tensor([[0.5, 0.5000001, 0.4, 2.0]]))
    threshold = torch.full((1,), 0.5, device=device)
    everything = compact(score, torch.full((1,), -9.0, device=device), False)
    h = expert_hidden(x, gate, up, None, None, score, threshold, *everything, "silu")
    assert (h.reshape(4, 8) != 0).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("active", [None, 0, 4])
def test_expert_ffn_equals_naive(device, batch, gated, active):
    x, gate, up, gate_bias, up_bias, score, threshold = make(batch, 4, 32, gated, True, device, active=active)
    down_t = torch.randn(128, 50, device=device)
    down_t[(score <= 0).all(0).repeat_interleave(32)] = float("nan")
    down_bias = torch.randn(50, device=device)
    y = expert_ffn(x, gate, up, down_t, gate_bias, up_bias, down_bias, score, threshold, "silu")
    weights = double(x, gate, up, down_t, gate_bias, up_bias, down_bias)
    expected = naive.expert_ffn(*weights, score, threshold, "silu")
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().mean().item())


@pytest.mark.parametrize("gated", [True, False])
def test_rows_that_need_most_blocks_between_them_are_multiplied_densely(device, gated, monkeypatch):
    x, gate, up, gate_bias, up_bias, score, threshold = make(6, 4, 32, gated, True, device)
    gate, up = (None if w is None else w.nan_to_num(0.5) for w in (gate, up))
    weights = x, gate, up, torch.randn(128, 50, device=device), gate_bias, up_bias, torch.randn(50, device=device)
    expected = naive.expert_ffn(*double(*weights), score, threshold, "silu")
    monkeypatch.setattr(op, "compact", None)  # nobody lists anything
    y = expert_ffn(*weights, score, threshold, "silu", density=0.5)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().mean().item())
    with pytest.raises(TypeError):
        expert_ffn(*weights, score, threshold, "silu", density=0.2)
    assert not crowded(0.5, 1, 0.4) and not crowded(None, 6, 0.4) and not crowded(0.5, 2, 0.8) and crowded(0.5, 3, 0.8)


def test_naive_is_a_dense_ffn_when_everything_is_selected():
    x, gate, up, gate_bias, up_bias, score, _ = make(3, 4, 8, True, True, "cpu", torch.float64, active=4)
    down_t, down_bias = torch.randn(32, 20).double(), torch.randn(20).double()
    biases = (gate_bias, up_bias, down_bias)
    y = naive.expert_ffn(x, gate, up, down_t, *biases, score, torch.tensor([-9.0]), "gelu")
    dense = F.gelu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    assert torch.allclose(y, dense @ down_t + down_bias)


def test_expert_ffn_twice_is_the_same_to_the_bit(device):
    x, gate, up, _, _, score, threshold = make(2, 4, 32, True, False, device)
    down_t = torch.randn(128, 50, device=device)
    arguments = (x, gate, up.nan_to_num(0), down_t, None, None, None, score, threshold, "silu")
    assert torch.equal(expert_ffn(*arguments), expert_ffn(*arguments))


def prefill(tokens, blocks, block, device, density=0.3, gated=True, biased=True, dtype=torch.float32, out=50):
    """Arguments of `expert_ffn_prefill`; the weights of blocks that no token selects are NaN."""
    x, gate, up, gate_bias, up_bias, score, threshold = make(tokens, blocks, block, gated, biased, device, dtype)
    score.copy_(density - torch.rand(tokens, blocks, device=device))
    score[:, blocks // 2] = -1.0  # in any case one block for nobody
    unread = (score <= 0).all(0).repeat_interleave(block)
    down_t = (torch.randn(blocks * block, out, device=device) / 8).to(dtype)
    for tensor in (gate, up, gate_bias, up_bias, down_t):
        if tensor is not None:
            tensor[unread] = float("nan")
            tensor[~unread] = tensor[~unread].nan_to_num(0.5)
    down_bias = torch.randn(out, device=device).to(dtype) if biased else None
    return x, gate, up, down_t, gate_bias, up_bias, down_bias, score, threshold


def matches(y, arguments, activation, tolerance=1e-5):
    expected = naive.expert_ffn(*double(*arguments[:7]), *arguments[7:], activation)
    return bool(((y.double() - expected).abs() <= tolerance * (expected.abs() + expected.abs().mean())).all())


@pytest.mark.parametrize("tokens", [1, 7, 133, 300])
@pytest.mark.parametrize("blocks, block", [(5, 32), (3, 7), (2, 100)])
def test_expert_ffn_prefill_shapes(device, tokens, blocks, block):
    arguments = prefill(tokens, blocks, block, device)
    assert matches(expert_ffn_prefill(*arguments, "silu"), arguments, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_expert_ffn_prefill_activations(device, activation, gated):
    arguments = prefill(63, 4, 16, device, gated=gated, biased=not gated)
    assert matches(expert_ffn_prefill(*arguments, activation), arguments, activation)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_expert_ffn_prefill_empty_few_and_full(device, density):
    arguments = prefill(140, 6, 16, device, density)
    assert matches(expert_ffn_prefill(*arguments, "silu"), arguments, "silu")


def test_expert_ffn_prefill_more_experts_than_a_step_takes(device):
    arguments = prefill(20, 150, 4, device, 0.1)
    assert matches(expert_ffn_prefill(*arguments, "silu"), arguments, "silu")


def test_expert_ffn_prefill_half_precision(device):
    arguments = prefill(70, 4, 32, device, dtype=torch.float16, out=133)
    y = expert_ffn_prefill(*arguments, "gelu")
    assert y.dtype == torch.float16 and matches(y, arguments, "gelu", 2e-3)


def test_expert_ffn_prefill_twice_is_the_same_to_the_bit(device):
    arguments = prefill(150, 4, 32, device)
    assert torch.equal(expert_ffn_prefill(*arguments, "silu"), expert_ffn_prefill(*arguments, "silu"))


@pytest.mark.parametrize("density", [None, 0.9])
def test_scores_may_lie_apart(device, density):
    torch.manual_seed(0)
    x, up, down_t = (torch.randn(*size, device=device) for size in ((4, 8), (64, 8), (64, 8)))
    score, threshold = torch.randn(4, 11, device=device)[:, :8], torch.zeros(1, device=device)
    rest = (None, None, None)
    found = expert_ffn(x, None, up, down_t, *rest, score, threshold, "relu", density)
    assert torch.equal(found, expert_ffn(x, None, up, down_t, *rest, score.contiguous(), threshold, "relu", density))


def test_expert_ffn_prefill_is_expert_ffn(device):
    arguments = prefill(7, 4, 32, device)
    few, many = expert_ffn(*arguments, "silu"), expert_ffn_prefill(*arguments, "silu")
    assert torch.allclose(few, many, rtol=1e-4, atol=1e-5)


def test_a_prompts_tokens_are_grouped_by_expert_once_each(device):
    from sparse_kernels.expert_ffn.kernel import group_kernel, run

    torch.manual_seed(0)
    score, threshold = torch.rand(300, 11, device=device), torch.full((1,), 0.7, device=device)
    score[:, 4] = 0.7  # none is above
    score[7, 5] = 0.7
    tokens, sizes = torch.empty(11, 300, dtype=torch.int32), torch.empty(11, dtype=torch.int32)
    tokens, sizes = tokens.to(device), sizes.to(device)
    run(group_kernel, (2,), score, threshold, tokens, sizes, 300, 11, score.stride(0), TOKENS=256, EXPERTS=8)
    keep = score > threshold
    assert int(sizes.sum()) == int(keep.sum()) > 0 and sizes.tolist() == keep.sum(0).tolist()
    for e, size in enumerate(sizes.tolist()):
        assert tokens[e, :size].tolist() == keep[:, e].nonzero().flatten().tolist()


def test_expert_ffn_prefill_is_well_formed():
    arguments = tuple(None if t is None else t.nan_to_num(0.5) for t in prefill(7, 4, 8, "cpu"))
    opcheck(torch.ops.sparse_kernels.expert_ffn_prefill, (*arguments, "silu"))
    compiled = torch.compile(expert_ffn_prefill, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, "silu"), expert_ffn_prefill(*arguments, "silu"))
    with FlopCounterMode(display=False) as counter:
        expert_ffn_prefill(*arguments, "silu")
        expert_ffn(*arguments, "silu")
        expert_ffn(arguments[0][:1], *arguments[1:7], arguments[7][:1], arguments[8], "silu")
    assert counter.get_total_flops() == 2 * cost.expert_flops(7, WIDTH, 50, 32) + cost.expert_flops(1, WIDTH, 50, 32)


def test_costs_are_those_of_the_union():
    assert cost.expert_bytes(1, 64, 64, 96, density=0.5) == 2 * (3 * 64 * 48 + 64)
    assert cost.expert_bytes(2, 64, 64, 96, density=0.5) == 2 * (3 * 64 * 72 + 2 * 64)
    assert cost.expert_flops(2, 64, 64, 96, density=0.5) == 2 * 2 * 3 * 64 * 48


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(0, 8)), r"x must have shape \[tokens, channels\]"),
        (dict(x=torch.randn(3, 8).long()), "x must be float32"),
        (dict(x=torch.randn(8, 3).t()), "x must have contiguous rows"),
        (dict(score=torch.zeros(2, 4)), r"score must have shape \[3, 4\]"),
        (dict(score=torch.zeros(3, 5)), "must divide the 16 neurons"),
        (dict(threshold=torch.zeros(4)), r"threshold must be a contiguous \[1\]"),
        (dict(down_t=torch.randn(15, 8)), r"down_t must have shape \[16, 8\]"),
        (dict(activation="tanh"), "activation must be one of"),
    ],
)
def test_expert_ffn_prefill_outside_its_domain(change, message):
    arguments = dict(x=torch.randn(3, 8), gate=torch.randn(16, 8), up=torch.randn(16, 8), down_t=torch.randn(16, 8))
    arguments |= dict(gate_bias=None, up_bias=None, down_bias=None, activation="silu")
    arguments |= dict(score=torch.zeros(3, 4), threshold=torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        expert_ffn_prefill(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation="tanh"), "activation must be one of"),
        (dict(score=torch.zeros(1, 5)), "must divide the 16 neurons"),
        (dict(score=torch.zeros(1, 4).half()), "score must be torch.float32"),
        (dict(score=torch.zeros(2, 4)), r"score must have shape \[1, 4\]"),
        (dict(threshold=torch.zeros(4)), r"threshold must be a contiguous \[1\]"),
        (dict(up=torch.randn(16, 7)), "up must have shape"),
        (dict(gate=torch.randn(16, 8).t().contiguous().t()), "gate must have contiguous rows"),
        (dict(gate=None, gate_bias=torch.zeros(16)), "gate_bias needs a gate"),
        (dict(up_bias=torch.zeros(4)), "up_bias must have shape"),
    ],
)
def test_expert_hidden_outside_its_domain(change, message):
    arguments = dict(x=torch.randn(1, 8), gate=torch.randn(16, 8), up=torch.randn(16, 8), gate_bias=None, up_bias=None)
    arguments |= dict(score=torch.zeros(1, 4), threshold=torch.zeros(1), activation="silu")
    arguments |= dict(index=torch.zeros(4, dtype=torch.int32), count=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        expert_hidden(**(arguments | change))


def test_down_projection_skips_zero_rows_of_other_sequences(device):
    """A block listed for one row only is zero in the others, whatever the list's unwritten blocks hold."""
    x, gate, up, _, _, score, threshold = make(2, 4, 8, True, False, device, active=2)
    score[1, 0] = -1.0
    index, count = compact(score, threshold, False)
    h = expert_hidden(x, gate, up, None, None, score, threshold, index, count, "silu")
    assert (h[1, :8] == 0).all() and h[:, 16:].isnan().all()
    y = input_linear(h, torch.ones(32, 16, device=device), index, count, None, None, 8)
    assert close(y, h[:, :16].double().sum(1, keepdim=True).expand(2, 16))
