"""Statistical top-k: the kernel against its definition, and that against the paper's equations."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from support import same

from sparse_kernels import ACTIVATIONS, gaussian_multiplier, statistical_top_k
from sparse_kernels.selection import naive
from sparse_kernels.selection.launch import Scan


@pytest.fixture
def kernel(device) -> types.ModuleType:
    """The kernels' launchers, for launches that the table does not choose at small shapes."""
    from sparse_kernels.selection import kernel

    return kernel


def test_gaussian_multiplier():
    for fraction, expected in ((0.08, 1.40507), (0.05, 1.64485), (0.10, 1.28155), (0.03, 1.88079), (0.5, 0.0)):
        assert math.isclose(gaussian_multiplier(fraction), expected, abs_tol=6e-6)
    assert gaussian_multiplier(1.0) == -math.inf and gaussian_multiplier(0.0) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        gaussian_multiplier(1.1)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("channels", [1, 63, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.08, 0.5, 1.0])
def test_statistical_top_k_equals_naive(device, soft, batch, channels, fraction):
    torch.manual_seed(0)
    score = torch.randn(batch, channels, device=device) * 3 - 1
    multiplier = gaussian_multiplier(fraction)
    value, threshold, *found = statistical_top_k(score, multiplier, soft)
    expected, limit, _, _ = naive.statistical_top_k(score.double(), multiplier, soft)
    assert torch.allclose(threshold.double(), limit.double(), rtol=1e-5, atol=1e-6)
    keep = score > threshold[:, None] if soft else score >= threshold[:, None]
    assert same(found, naive.union(keep))
    assert torch.equal(value == 0, ~keep | (value == 0)) and not value[~keep].any()
    assert torch.allclose(value.double(), torch.where(keep, expected, 0), rtol=1e-5, atol=2e-6 * 3)
    assert fraction < 1 or torch.equal(value, score)
    assert fraction > 0 or not value.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["soft", "hard", "magnitude"])
@pytest.mark.parametrize("block", [128, 2048])
def test_statistical_top_k_activates_what_it_keeps(kernel, device, block, form, activation):
    torch.manual_seed(0)
    score = torch.randn(2, 1500, device=device)
    options = 0.7, form == "soft", activation, form == "magnitude"
    value, threshold, *found = kernel.statistical_top_k(score, *options, Scan(block, 4))
    expected, limit, *listed = naive.statistical_top_k(score.double(), *options)
    assert same(found, listed) and 0 < int(found[1]) < 1500
    assert torch.allclose(threshold.double(), limit.double(), rtol=1e-5)
    assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("block", [128, 2048])
def test_statistics_keep_their_precision(kernel, device, block, dtype):
    torch.manual_seed(0)
    score = (50 + 0.1 * torch.randn(2, 1500, device=device)).to(dtype)  # mean far above the deviation
    _, threshold, _, _ = kernel.statistical_top_k(score, 3.0, True, "identity", False, Scan(block, 4))
    std, mean = torch.std_mean(score.double(), 1, correction=0)
    assert torch.allclose((threshold.double() - mean) / std, torch.full_like(mean, 3.0), rtol=3e-4)


def test_statistical_top_k_keeps_about_k_and_scales_with_its_input(device):
    torch.manual_seed(0)
    score = torch.randn(1, 8192, device=device)
    value, _, _, count = statistical_top_k(score, gaussian_multiplier(0.08))
    assert abs(int(count) - 0.08 * 8192) < 5 * 0.029 * 0.08 * 8192
    scaled = statistical_top_k(4 * score + 2, gaussian_multiplier(0.08))[0]
    assert torch.allclose(scaled, 4 * value, atol=1e-5)


@pytest.mark.parametrize("multiplier", [-math.inf, -2.0, 0.5])
@pytest.mark.parametrize("block", [128, 2048])
def test_what_an_activation_leaves_at_zero_is_not_selected(kernel, device, block, multiplier):
    """However low the threshold: two of these three are below zero."""
    torch.manual_seed(0)
    score = torch.randn(3, 1500, device=device) - 1
    value, limit, index, count = kernel.statistical_top_k(score, multiplier, False, "relu", True, Scan(block, 4))
    expected, wanted, *listed = naive.statistical_top_k(score.double(), multiplier, False, "relu", True)
    assert torch.allclose(value.double(), expected) and torch.allclose(limit.double(), wanted.double(), rtol=1e-5)
    assert same((index, count), listed) and int(count) == int((value != 0).any(0).sum())
    assert multiplier > 0 or torch.equal(value, score.relu())


def test_statistical_top_k_is_that_of_gemma_3n(device):
    gate = torch.randn(3, 500, device=device)
    mean, std = gate.mean(-1, keepdim=True), gate.std(-1, keepdim=True, unbiased=False)
    expected = F.relu(gate - (mean + std * torch.distributions.Normal(0, 1).icdf(torch.tensor(0.95)).to(device)))
    assert torch.allclose(statistical_top_k(gate, gaussian_multiplier(0.05))[0], expected, atol=1e-6)


def test_statistical_top_k_of_equal_scores(device):
    score = torch.ones(1, 40, device=device)
    assert int(statistical_top_k(score, 1.0, soft=True)[3]) == 0
    assert int(statistical_top_k(score, 1.0, soft=False)[3]) == 40


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("block", [64, 2048])
@pytest.mark.parametrize("multiplier", [0.0, 1.4])
def test_hard_statistical_top_k_keeps_equal_scores(kernel, device, block, magnitude, multiplier):
    """Whatever their mean is rounded to."""
    score = torch.linspace(-1, 1, 30, device=device)[:, None].repeat(1, 999)
    value, _, _, count = kernel.statistical_top_k(score, multiplier, False, "identity", magnitude, Scan(block, 4))
    assert torch.equal(value, score) and int(count) == 999
    wanted, *_ = naive.statistical_top_k(score, multiplier, False, "identity", magnitude)
    assert torch.equal(wanted, score)


@pytest.mark.parametrize("magnitude", [False, True])
def test_hard_statistical_top_k_keeps_the_largest_unless_there_is_nan(kernel, device, magnitude):
    torch.manual_seed(0)
    score = -1 - torch.rand(3, 100, device=device)
    score[2, 50] = float("nan")
    options = 50.0, False, "identity", magnitude
    value, limit, *found = kernel.statistical_top_k(score, *options, Scan(64, 4))
    expected, wanted, *listed = naive.statistical_top_k(score, *options)
    assert same(found, listed) and (value != 0).sum(1).tolist() == [1, 1, 0]
    assert torch.equal(value, expected) and torch.equal(limit[:2], wanted[:2]) and limit[2].isnan()
