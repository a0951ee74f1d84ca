import pytest
import torch
from support import choose, close, double, far, index_list, limits

from sparse_kernels import input_linear
from sparse_kernels.input_linear import naive


def make(batch, channels, width, density, device, dtype=torch.float32, group=1):
    """Inputs in which a channel outside the list would spoil the result: its weights are NaN."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, device=device).to(dtype)
    weight_t = torch.randn(channels, width, device=device).to(dtype)
    active = choose(channels // group, density, device)
    weight_t[~active.repeat_interleave(group)] = float("nan")
    return x, weight_t, *index_list(active)


def test_naive_is_a_masked_linear():
    x, weight_t, index, count = make(3, 24, 10, 0.5, "cpu", torch.float64, group=4)
    active = ~weight_t.isnan().any(1)
    bias, threshold = torch.randn(10).double(), torch.tensor([0.5])
    kept = x * active * (x.abs() > 0.5)
    expected = kept @ weight_t.nan_to_num(0) + bias
    assert torch.allclose(naive.input_linear(x, weight_t, index, count, threshold, bias, 4), expected)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("channels, width", [(60, 63), (133, 130), (256, 600)])
@pytest.mark.parametrize("density", [0.0, "one", 0.4, 1.0])
def test_input_linear_equals_naive(device, batch, channels, width, density):
    x, weight_t, index, count = make(batch, channels, width, density, device)
    bias = torch.randn(width, device=device)
    y = input_linear(x, weight_t, index, count, None, bias)
    assert close(y, naive.input_linear(*double(x, weight_t), index, count, None, bias.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("group", [1, 4, 32])
@pytest.mark.parametrize("kind", [None, "one", "each"])
def test_input_linear_groups_and_thresholds(device, dtype, batch, group, kind):
    x, weight_t, index, count = make(batch, 192, 70, 0.5, device, dtype, group)
    threshold = limits(kind, 192, device)
    y = input_linear(x, weight_t, index, count, threshold, None, group)
    assert y.dtype == dtype
    assert close(y, naive.input_linear(*double(x, weight_t), index, count, threshold, None, group))


@pytest.mark.parametrize("batch", [16, 17, 33, 64])
def test_input_linear_larger_batches(device, batch):
    x, weight_t, index, count = make(batch, 100, 150, 0.5, device)
    threshold = limits("one", 100, device)
    y = input_linear(x, weight_t, index, count, threshold)
    assert close(y, naive.input_linear(*double(x, weight_t), index, count, threshold))


@pytest.mark.parametrize("batch", [1, 3])
def test_input_linear_one_split_adds_the_bias_itself(device, batch):
    x, weight_t, index, count = make(batch, 8, 64, 1.0, device, torch.float16)
    bias = torch.randn(64, device=device).half()
    y = input_linear(x, weight_t, index, count, None, bias)
    assert close(y, naive.input_linear(*double(x, weight_t), index, count, None, bias.double()))


def test_input_linear_rows_at_any_distance(device):
    wide_x, wide, index, count = make(2, 96, 200, 0.5, device)
    column_major = wide[:, :77].t().contiguous().t()
    x = wide_x[:, :50].contiguous()
    index, count = index_list(~wide[:50].isnan().any(1))
    y = input_linear(wide_x[:, :50], wide[:50, 3:80], index, count)
    assert close(y, naive.input_linear(*double(x, wide[:50, 3:80]), index, count))
    with pytest.raises(ValueError, match="weight_t must have contiguous rows"):
        input_linear(wide_x, column_major, *index_list(torch.ones(96, dtype=torch.bool, device=device)))
    linear = torch.randn(77, 96, device=device).t().contiguous().t()  # [N, K] stored column by column
    y = input_linear(wide_x, linear.t(), *index_list(torch.ones(96, dtype=torch.bool, device=device)))
    assert close(y, wide_x.double() @ linear.double().t())


def test_input_linear_threshold_is_strict(device):
    x = torch.tensor([[0.5, -0.5, 0.75, -0.75]], device=device)
    everything = index_list(torch.ones(4, dtype=torch.bool, device=device))
    y = input_linear(x, torch.eye(4, device=device), *everything, torch.full((1,), 0.5, device=device))
    assert y.tolist() == [[0.0, 0.0, 0.75, -0.75]]


@pytest.mark.parametrize("batch", [1, 4])
def test_input_linear_twice_is_the_same_to_the_bit(device, batch):
    arguments = make(batch, 300, 90, 0.6, device)
    assert torch.equal(input_linear(*arguments), input_linear(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tolerance_fails_what_is_one_percent_wrong(dtype):
    expected = torch.randn(4, 50).double()
    assert close(expected.to(dtype), expected)
    assert not close((expected * 1.01).to(dtype), expected)
    one = expected.clone()
    one[2, 7] += 0.02 * expected.abs().mean()
    assert not close(one.to(dtype), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(65, 8)), "1 to 64 rows"),
        (dict(x=far(3, 8, apart=0)), "rows within 2.31 values"),
        (dict(weight_t=torch.randn(7, 5)), r"weight_t must have shape \[8, 5\]"),
        (dict(weight_t=torch.randn(8, 5).half()), "weight_t must be torch.float32"),
        (dict(weight_t=torch.randn(8)), "weight_t must have shape"),
        (dict(index=torch.zeros(8)), "index must be a contiguous int32"),
        (dict(count=torch.zeros(2, dtype=torch.int32)), "count must be a contiguous int32"),
        (dict(group=3), "group must divide"),
        (dict(threshold=torch.zeros(5)), "threshold must be a contiguous"),
        (dict(bias=torch.zeros(4)), "bias must have shape"),
    ],
)
def test_input_linear_outside_its_domain(change, message):
    arguments = dict(
        x=torch.randn(1, 8),
        weight_t=torch.randn(8, 5),
        index=torch.zeros(8, dtype=torch.int32),
        count=torch.zeros(1, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=message):
        input_linear(**(arguments | change))
