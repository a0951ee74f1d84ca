import pytest
import torch
import torch.nn.functional as F
from support import choose, close, double, index_list
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import ACTIVATIONS, gate_first_ffn, gated_ffn, neuron_ffn
from sparse_kernels.launch import Rows, union_density
from sparse_kernels.neuron_ffn import cost, launch, naive

WIDTH, OUT = 72, 50


class Ffn:
    """Weights and a list of `density` of the groups of neurons; the weights of all other neurons are NaN."""

    def __init__(
        self, device, batch=1, neurons=133, density=0.5, gated=True, biased=True, group=1, width=WIDTH, out=OUT,
        dtype=torch.float32, active=None,
    ):  # fmt: skip
        torch.manual_seed(0)
        active = choose(neurons // group, density, device) if active is None else active
        self.neurons = active.repeat_interleave(group)
        self.index, self.count = index_list(active)
        self.group = group

        def weights(*shape):
            return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

        def hidden(*shape):
            value = weights(neurons, *shape)
            value[~self.neurons] = float("nan")
            return value

        self.x = torch.randn(batch, width, device=device).to(dtype)
        self.gate, self.up, self.down_t = hidden(width) if gated else None, hidden(width), hidden(out)
        self.gate_bias, self.up_bias = hidden() if gated and biased else None, hidden() if biased else None
        self.down_bias = weights(out) if biased else None

    def matrices(self):
        return self.x, self.gate, self.up, self.down_t

    def biases(self):
        return self.gate_bias, self.up_bias, self.down_bias

    def __call__(self, activation="silu"):
        return neuron_ffn(*self.matrices(), self.index, self.count, activation, *self.biases(), self.group)

    def expected(self, activation="silu"):
        matrices, biases = double(*self.matrices()), double(*self.biases())
        return naive.neuron_ffn(*matrices, self.index, self.count, activation, *biases, self.group)


def near(actual: Tensor, expected: Tensor) -> bool:
    """`close` for two matrix products in a row: the float32 error of the first is summed over neurons."""
    allowance = 1e-5 * expected.square().mean().sqrt()
    return close(actual, expected) or bool(((actual.double() - expected).abs() <= allowance).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_neuron_ffn_activations(device, activation, gated, batch):
    ffn = Ffn(device, batch, gated=gated)
    assert near(ffn(activation), ffn.expected(activation))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("listed", [True, False])
def test_neuron_ffn_centers_its_neurons(device, gated, batch, listed):
    ffn = Ffn(device, batch, gated=gated, density=0.5 if listed else 1.0)
    center = torch.randn(133, device=device)
    found = (ffn.index, ffn.count) if listed else (None, None)
    y = neuron_ffn(*ffn.matrices(), *found, "silu", *ffn.biases(), center=center)
    wide = naive.neuron_ffn(*double(*ffn.matrices()), *found, "silu", *double(*ffn.biases()), center=center.double())
    chosen = ffn.neurons if listed else slice(None)
    assert near(y, wide)
    assert torch.allclose(ffn("silu") - y, (center[chosen] @ ffn.down_t[chosen])[None], atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("neurons, width, out", [(1, 1, 1), (63, 133, 72), (133, 63, 200), (1000, 24, 17)])
def test_neuron_ffn_shapes(device, batch, neurons, width, out):
    ffn = Ffn(device, batch, neurons, width=width, out=out, biased=neurons == 63)
    assert near(ffn(), ffn.expected())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("density", [0, "one", 1])
@pytest.mark.parametrize("gated", [True, False])
def test_neuron_ffn_empty_one_and_full(device, batch, density, gated):
    ffn = Ffn(device, batch, density=density, gated=gated)
    assert near(ffn(), ffn.expected())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("group", [4, 7, 32])
def test_neuron_ffn_groups(device, batch, group):
    ffn = Ffn(device, batch, neurons=5 * group, group=group)
    assert near(ffn(), ffn.expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 17])
def test_neuron_ffn_half_precision(device, dtype, batch):
    ffn = Ffn(device, batch, dtype=dtype)
    y, expected = ffn(), ffn.expected()
    assert y.dtype == dtype and (batch > 1 or close(y, expected))  # one row: nothing is rounded on the way
    limit = 1e-3 if dtype == torch.float16 else 4e-3 if y.is_cuda else 8e-3  # the interpreter truncates to bfloat16
    assert (y.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_neuron_ffn_without_a_list_computes_every_neuron(device, batch, gated):
    ffn = Ffn(device, batch, density=1, gated=gated)
    y = neuron_ffn(*ffn.matrices(), None, None, "silu", *ffn.biases())
    assert near(y, ffn.expected())


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("listed", [True, False])
def test_neuron_ffn_every_way_of_launching(device, rows, stages, listed, monkeypatch):
    ffn = Ffn(device, density=0.5 if listed else 1)
    ffn.index, ffn.count = (ffn.index, ffn.count) if listed else (None, None)
    table = dict.fromkeys(launch.LAUNCH[90], Rows(rows, 8, stages, 3))
    monkeypatch.setattr(launch, "LAUNCH", {0: table})
    monkeypatch.setattr(Rows, "fit", lambda self, width, itemsize: (rows, 4))
    assert near(ffn(), ffn.expected())


@pytest.mark.parametrize("batch", [1, 2])
def test_neuron_ffn_takes_interleaved_weights(device, batch):
    ffn = Ffn(device, batch, width=WIDTH, out=WIDTH)
    gate, up, down_t = torch.stack([ffn.gate, ffn.up, ffn.down_t], 1).unbind(1)
    y = neuron_ffn(ffn.x, gate, up, down_t, ffn.index, ffn.count, "silu", *ffn.biases())
    assert gate.stride() == (3 * WIDTH, 1) and torch.equal(y, ffn())


@pytest.mark.parametrize("batch", [1, 2])
def test_neuron_ffn_rows_too_long_for_registers(device, batch, monkeypatch):
    ffn = Ffn(device, batch)
    monkeypatch.setattr(launch, "MAX_ROW_BYTES", 64)
    assert near(ffn(), ffn.expected())


@pytest.mark.parametrize("density", [0, 0.5, 1])
@pytest.mark.parametrize("listed", [True, False])
def test_partial_sums_add_up(device, density, listed):
    ffn = Ffn(device, density=density if listed else 1, biased=False)
    chosen = (ffn.index, ffn.count) if listed else (None, None)
    partial = neuron_ffn(*ffn.matrices(), *chosen, "silu", partial=True)
    expected = naive.neuron_ffn_partials(
        *double(*ffn.matrices()), *chosen, "silu", None, None, 1, partial.shape[0]
    )  # fmt: skip
    assert partial.dtype == torch.float32 and partial.shape == (min(133, partial.shape[0]), OUT)
    assert near(partial, expected) and near(partial.sum(0), ffn.expected()[0])


def test_partial_sums_have_the_same_shape_everywhere():
    ffn = Ffn("cpu")
    partial = neuron_ffn(*ffn.matrices(), ffn.index, ffn.count, "silu", partial=True)
    assert torch.allclose(partial.sum(0), neuron_ffn(*ffn.matrices(), ffn.index, ffn.count, "silu")[0], atol=1e-5)


def test_neuron_ffn_twice_is_the_same_to_the_bit(device):
    for batch in (1, 2):
        ffn = Ffn(device, batch)
        assert torch.equal(ffn(), ffn())


def survivors(device, batch, gated, density, biased=True, activation="silu"):
    """An FFN and a threshold between two activations, so that float32 and float64 agree on who survives.

    What must not be read of the neurons that survive in no row is NaN.
    """
    ffn = Ffn(device, batch, density=1, gated=gated, biased=biased)
    first, bias = double(*((ffn.gate, ffn.gate_bias) if gated else (ffn.up, ffn.up_bias)))
    value = ACTIVATIONS[activation](F.linear(ffn.x.double(), first, bias)).abs()
    order = value.flatten().sort(descending=True).values
    kept = round(density * order.numel())
    if 0 < kept < order.numel():
        around = order[max(0, kept - 8) : kept + 9]
        place = int((around[:-1] - around[1:]).argmax())
        limit = (around[place] + around[place + 1]) / 2
    else:
        limit = torch.tensor(-1.0 if kept else 1e6)
    threshold = limit.float().reshape(1).to(device)
    unread = ~(value > threshold).any(0)
    for tensor in (ffn.down_t, *((ffn.up, ffn.up_bias) if gated else ())):
        if tensor is not None:
            tensor[unread] = float("nan")
    return ffn, threshold


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("density", [0, 0.004, 0.3, 1])
def test_gate_first_ffn_equals_naive(device, batch, gated, density):
    ffn, threshold = survivors(device, batch, gated, density, biased=density != 0.3)
    y = gate_first_ffn(*ffn.matrices(), threshold, "silu", *ffn.biases())
    matrices, biases = double(*ffn.matrices()), double(*ffn.biases())
    assert near(y, naive.gate_first_ffn(*matrices, threshold.double(), "silu", *biases))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_gate_first_ffn_at_zero_is_the_dense_relu_ffn(device, batch, activation, gated):
    ffn = Ffn(device, batch, density=1, gated=gated)
    threshold = torch.zeros(1, device=device)
    assert near(gate_first_ffn(*ffn.matrices(), threshold, activation, *ffn.biases()), ffn.expected(activation))


@pytest.mark.parametrize("batch", [1, 2])
def test_gate_first_ffn_is_strict_and_drops_nan(device, batch):
    gate = torch.tensor([[0.5], [-0.5], [0.75], [float("nan")], [2.0]], device=device)
    x, ones = torch.ones(batch, 1, device=device), torch.ones(5, 1, device=device)
    y = gate_first_ffn(x, gate, ones, ones, torch.full((1,), 0.5, device=device), "relu")
    assert y.flatten().tolist() == [2.75] * batch


def test_gate_first_ffn_of_very_many_neurons(device):
    gate = torch.zeros(65600, 4, device=device)
    gate[[0, 300, 65599]] = 1.0
    x, down_t = torch.ones(2, 4, device=device), torch.ones(65600, 2, device=device)
    y = gate_first_ffn(x, gate, gate, down_t, torch.zeros(1, device=device), "relu")
    assert torch.equal(y, torch.full_like(y, 3 * 4 * 4))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_gate_first_ffn_twice_is_the_same_to_the_bit(device, batch, gated):
    ffn, threshold = survivors(device, batch, gated, 0.4)
    first = gate_first_ffn(*ffn.matrices(), threshold, "silu", *ffn.biases())
    assert torch.equal(first, gate_first_ffn(*ffn.matrices(), threshold, "silu", *ffn.biases()))


def test_gate_first_ffn_half_precision(device):
    ffn = Ffn(device, density=1, dtype=torch.float16)
    threshold = torch.zeros(1, device=device)
    assert close(gate_first_ffn(*ffn.matrices(), threshold, "relu", *ffn.biases()), ffn.expected("relu"))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("density", [0, "one", 0.3, 1])
@pytest.mark.parametrize("width", [WIDTH, 63])
def test_gated_ffn_equals_naive(device, batch, density, width):
    ffn = Ffn(device, batch, density=density, width=width, biased=density != 1)
    value = torch.randn(batch, len(ffn.neurons), device=device) * ffn.neurons
    arguments = value, ffn.up, ffn.down_t, ffn.index, ffn.count, ffn.up_bias, ffn.down_bias
    y = gated_ffn(ffn.x, *arguments)
    assert near(y, naive.gated_ffn(*double(ffn.x, *arguments[:3]), *arguments[3:5], *double(*arguments[5:])))
    assert torch.equal(y, gated_ffn(ffn.x, *arguments))


@pytest.mark.parametrize("batch", [1, 2])
def test_gated_ffn_completes_a_gated_ffn(device, batch):
    ffn = Ffn(device, batch, density=1, dtype=torch.float16)
    value = F.silu(F.linear(ffn.x.float(), ffn.gate.float(), ffn.gate_bias.float()))
    y = gated_ffn(ffn.x, value, ffn.up, ffn.down_t, ffn.index, ffn.count, ffn.up_bias, ffn.down_bias)
    assert (y.double() - ffn.expected()).abs().max() < 2e-3 * ffn.expected().abs().max()


def test_tolerance_fails_what_is_one_percent_wrong():
    expected = torch.randn(1, OUT).double()
    assert near(expected.float(), expected) and not near((expected * 1.01).float(), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(65, 8)), "1 to 64 rows"),
        (dict(activation="tanh"), "activation must be one of"),
        (dict(up=torch.randn(8)), "up must have shape"),
        (dict(up=torch.randn(0, 8)), "up must have shape"),
        (dict(gate=torch.randn(15, 8)), r"gate must have shape \[16, 8\]"),
        (dict(gate=torch.randn(16, 8).half()), "gate must be torch.float32"),
        (dict(gate=torch.randn(8, 16).t()), "gate must have contiguous rows"),
        (dict(gate=None, gate_bias=torch.zeros(16)), "gate_bias needs a gate"),
        (dict(up_bias=torch.zeros(4)), "up_bias must have shape"),
        (dict(down_t=torch.randn(15, 5)), r"down_t must have shape \[16, 5\]"),
        (dict(down_bias=torch.zeros(4)), "down_bias must have shape"),
        (dict(count=None), "index and count go together"),
        (dict(index=torch.zeros(99, dtype=torch.int32)), "index must be a contiguous int32"),
        (dict(group=3), "group must divide"),
        (dict(partial=True, down_bias=torch.zeros(5)), "Partial sums take no down_bias"),
        (dict(partial=True, x=torch.randn(2, 8)), "Partial sums need one row"),
    ],
)
def test_neuron_ffn_outside_its_domain(change, message):
    arguments = dict(
        x=torch.randn(1, 8), gate=torch.randn(16, 8), up=torch.randn(16, 8), down_t=torch.randn(16, 5),
        index=torch.zeros(16, dtype=torch.int32), count=torch.zeros(1, dtype=torch.int32), activation="silu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        neuron_ffn(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(threshold=torch.zeros(16)), r"threshold must be a contiguous \[1\]"),
        (dict(threshold=torch.zeros(1).half()), "threshold must be float32"),
        (dict(down_t=torch.randn(15, 5)), r"down_t must have shape \[16, 5\]"),
    ],
)
def test_gate_first_ffn_outside_its_domain(change, message):
    arguments = dict(
        x=torch.randn(1, 8), gate=torch.randn(16, 8), up=torch.randn(16, 8), down_t=torch.randn(16, 5),
        threshold=torch.zeros(1), activation="silu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gate_first_ffn(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(value=torch.zeros(2, 16)), r"value must be a contiguous float32 \[1, 16\]"),
        (dict(value=torch.zeros(1, 16).half()), "value must be a contiguous float32"),
        (dict(index=torch.zeros(99, dtype=torch.int32)), "index must be a contiguous int32"),
        (dict(down_t=torch.randn(15, 5)), r"down_t must have shape \[16, 5\]"),
    ],
)
def test_gated_ffn_outside_its_domain(change, message):
    arguments = dict(
        x=torch.randn(1, 8), value=torch.zeros(1, 16), up=torch.randn(16, 8), down_t=torch.randn(16, 5),
        index=torch.zeros(16, dtype=torch.int32), count=torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gated_ffn(**(arguments | change))


def test_operators_are_well_formed():
    ops, threshold = torch.ops.sparse_kernels, torch.full((1,), 0.1)
    for batch, gated in ((1, True), (2, False)):
        ffn = Ffn("cpu", batch, gated=gated, biased=False)
        ffn.index.clamp_(min=0)
        matrices = [None if t is None else t.nan_to_num(0) for t in ffn.matrices()]
        tail = ("silu", None, None, None, 1, False)
        opcheck(ops.neuron_ffn, (*matrices, ffn.index, ffn.count, *tail))
        opcheck(ops.neuron_ffn, (*matrices, None, None, *tail))
        opcheck(ops.gate_first_ffn, (*matrices, threshold, "silu", None, None, None))
        value = torch.randn(batch, len(ffn.neurons)) * ffn.neurons
        opcheck(ops.gated_ffn, (matrices[0], value, *matrices[2:], ffn.index, ffn.count, None, None))
    opcheck(ops.neuron_ffn, (matrices[0][:1], *matrices[1:], ffn.index, ffn.count, *tail[:-1], True))


def network(x, gate, up, down_t, index, count, threshold):
    y = neuron_ffn(x, gate, up, down_t, index, count, "silu")
    return y + gate_first_ffn(x, gate, up, down_t, threshold, "silu")


def test_compiles_as_one_graph():
    ffn = Ffn("cpu", density=1)
    arguments = (*ffn.matrices(), ffn.index, ffn.count, torch.full((1,), 0.1))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), network(*arguments))


@pytest.mark.parametrize("gated", [True, False])
def test_flops_are_those_of_the_dense_ffn(gated):
    ffn = Ffn("cpu", 2, density=1, gated=gated)
    with FlopCounterMode(display=False) as counter:
        network(*ffn.matrices(), ffn.index, ffn.count, torch.full((1,), 0.1))
    assert counter.get_total_flops() == 2 * cost.ffn_flops(2, WIDTH, OUT, 133, gated)


def test_costs_are_those_of_the_weights_read():
    ffn = Ffn("cpu", batch=3, density=1, biased=False)
    size = sum(t.numel() * t.element_size() for t in ffn.matrices())
    assert cost.ffn_bytes(3, WIDTH, OUT, 133, itemsize=4) == size
    assert cost.gate_first_bytes(3, WIDTH, OUT, 133, itemsize=4) == size
    assert cost.gate_first_bytes(3, WIDTH, OUT, 133, density=0.0, itemsize=4) == 4 * WIDTH * (133 + 3)
    assert cost.ffn_flops(3, WIDTH, OUT, 133) == cost.gate_first_flops(3, WIDTH, OUT, 133)
    assert cost.ffn_flops(3, WIDTH, OUT, 133, gated=False, density=0.5) == 3 * 133 * (WIDTH + OUT)
    assert union_density(0.5, 1) == 0.5 and union_density(0.5, 2) == 0.75
