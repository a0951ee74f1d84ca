import pytest
import torch
import torch.nn.functional as F
from support import close, double

from sparse_kernels import ACTIVATIONS, compact, expert_ffn, expert_hidden, input_linear
from sparse_kernels.expert_ffn import naive

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
