import pytest
import torch
from support import limits

from sparse_kernels import compact
from sparse_kernels.selection import naive


def same(actual, expected):
    n = int(expected[1])
    return int(actual[1]) == n and torch.equal(actual[0][:n], expected[0][:n])


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
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


@pytest.mark.parametrize("value, count", [(0.0, 0), (1.0, 2500)])
def test_compact_empty_and_full(device, value, count):
    x = torch.full((3, 2500), value, device=device)
    index, found = compact(x, torch.full((1,), 0.5, device=device))
    assert int(found) == count and index[:count].tolist() == list(range(count))


@pytest.mark.parametrize("position", [0, 1023, 1024, 2499])
def test_compact_one_channel_in_one_row(device, position):
    x = torch.zeros(7, 2500, device=device)
    x[4, position] = -3.0
    index, count = compact(x, torch.full((1,), 0.5, device=device))
    assert int(count) == 1 and int(index[0]) == position


def test_compact_negative_threshold_takes_everything_but_nothing_beyond(device):
    x = torch.zeros(2, 1100, device=device)[:, :1030]
    index, count = compact(x, torch.full((1,), -1.0, device=device))
    assert int(count) == 1030 and index.tolist() == list(range(1030))


@pytest.mark.parametrize(
    "x, threshold, message",
    [
        (torch.randn(65, 4), torch.zeros(1), "1 to 64 rows"),
        (torch.randn(4), torch.zeros(1), "shape"),
        (torch.randn(1, 65537), torch.zeros(1), "at most 65536"),
        (torch.randn(1, 4), torch.zeros(1).double(), "float32"),
        (torch.randn(1, 4), torch.zeros(3), r"\[4\]"),
        (torch.randn(4, 4).t(), torch.zeros(1), "contiguous rows"),
        (torch.ones(1, 4, dtype=torch.int64), torch.zeros(1), "float32, float16 or bfloat16"),
    ],
)
def test_compact_outside_its_domain(x, threshold, message):
    with pytest.raises(ValueError, match=message):
        compact(x, threshold)
