from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cost
from methods import sparsify
from methods.registry import parse
from methods.shared.calibration import MagnitudeHistogram, block_calls, input_histograms
from methods.teal import greedy_allocation
from tests.methods.models import MODELS, data, llama, opt, windows


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.99), st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 99))
def test_histogram_quantiles_are_exact_to_a_bin(p: float, scale: float, seed: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * scale
    histogram = MagnitudeHistogram("cpu")
    histogram.add(x[:1000])
    histogram.add(x[1000:])
    threshold = histogram.quantiles(torch.tensor([p]))
    assert abs(float((x.abs() <= threshold).float().mean()) - p) < 5e-3


def test_histogram_of_a_relu_keeps_zero_as_threshold() -> None:
    histogram = MagnitudeHistogram("cpu")
    histogram.add(torch.tensor([0.0] * 90 + [1.0] * 10))
    found = histogram.quantiles(torch.tensor([0.0, 0.5, 0.89, 1.0]))
    assert found[:3].tolist() == [0.0, 0.0, 0.0] and found[3] >= 1.0


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_uniform_meets_the_target_on_its_calibration_text(make: object) -> None:
    model, target = make(), 0.4  # type: ignore[operator]
    method = parse("teal:allocation=uniform")
    artifact = next(iter(method.prepare(model, data(), [target])))
    histograms = input_histograms(model, data().calibration)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, a, name=name: inputs.__setitem__(name, a[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(input_ids=data().calibration)
    for hook in hooks:
        hook.remove()
    for (index, site), _ in histograms.items():
        name = next(n for n in inputs if f"layers.{index}." in n and n.endswith(_leaf(model, site)))
        kept = (inputs[name].abs() > artifact.tensors[f"threshold.{index}.{site}"]).float().mean()
        if not (site == "down" and model.config.model_type == "opt"):  # half of a ReLU's outputs are zero already
            assert abs(float(kept) - target) < 5e-3, (index, site)


def test_a_density_that_zeros_of_a_relu_lower_is_told() -> None:
    """0.1 of each linear layer's inputs are to go, and half of what `down` reads is zero already."""
    model, text = opt(), data().calibration[:4]
    (artifact,) = parse("teal:allocation=uniform").prepare(model, data(), [0.9])
    shape = cost.Shape.of(model)
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=text)
        density = cost.model_density(shape, cost.densities(handle, shape))
    assert density < 0.85 and artifact.manifest["density"] == pytest.approx(density, abs=1e-4)
    (note,) = artifact.manifest["notes"]
    assert note.startswith(f"density {density:.3f} instead of 0.9: ")
    (met,) = parse("teal:allocation=uniform").prepare(llama(), data(), [0.9])
    assert met.manifest["density"] == pytest.approx(0.9, abs=0.01) and met.manifest["notes"] == []


def _leaf(model: torch.nn.Module, site: str) -> str:
    from methods.families import layout_of

    return layout_of(model.config).linears[site]


def test_greedy_steps_are_equal_in_parameters_and_meet_the_target() -> None:
    weights = {"q": 100, "k": 50, "down": 275}
    calls: list[dict[str, float]] = []

    def error(sparsity: dict[str, float]) -> float:
        calls.append(sparsity)
        return sparsity["q"] * 3 + sparsity["k"] + sparsity["down"] ** 2

    found = greedy_allocation(weights, 0.6, 0.1, error)
    total = sum(weights.values())
    assert sum(found[n] * w for n, w in weights.items()) / total == pytest.approx(0.6, abs=1e-9)
    assert all(0 <= p <= 1 for p in found.values())
    assert found["q"] < found["down"]  # the costly one is spared
    first = calls[:3]
    steps = [next((n, p) for n, p in c.items() if p > 0) for c in first]
    assert {n: pytest.approx(p * weights[n]) for n, p in steps} == dict.fromkeys(weights, 10.0)


def test_greedy_picks_the_candidate_with_the_least_error() -> None:
    order = iter([3.0, 1.0, 2.0])
    assert greedy_allocation({"a": 1, "b": 1, "c": 1}, 1 / 3, 1.0, lambda s: next(order))["b"] == pytest.approx(1.0)


def test_greedy_is_no_worse_than_uniform_on_the_block_error() -> None:
    from methods.shared.calibration import input_histograms
    from methods.teal import _BlockError, _curve

    model = llama()
    histograms = input_histograms(model, data().calibration)
    with torch.inference_mode():
        for block, hidden, kwargs in block_calls(model, data().calibration[:2]):
            weights = {name: linear.weight.numel() for name, linear in block.linears.items()}
            error = _BlockError(block, hidden, kwargs, {n: _curve(histograms[block.index, n]) for n in weights})
            none = dict.fromkeys(weights, 0.0)
            alone = [error({**none, name: 0.9}) for name in weights]
            assert len(set(alone)) == len(weights) and min(alone) > 0  # each linear has a threshold of its own
            found = greedy_allocation(weights, 0.5, 0.2, error)
            assert error(found) < error(dict.fromkeys(weights, 0.5)) and error(none) < 1e-6
            error.remove()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_block_calls_replay_the_model(make: object) -> None:
    model, ids = make(), windows(2)  # type: ignore[operator]
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    for (block, hidden, kwargs), output in zip(block_calls(model, ids), expected[1:-1], strict=False):
        assert torch.allclose(block.module(hidden, **kwargs), output, atol=1e-5)


def test_threshold_is_strict_and_lower_density_keeps_less() -> None:
    from sparse_kernels.layers import SparseLinear
    from sparse_kernels.meter import Meter, Phase

    phase = Phase()
    phase.active = True
    linear = torch.nn.Linear(4, 3)
    layer = SparseLinear(linear, torch.tensor([0.5]), "q", 0, phase, Meter())
    x = torch.tensor([[0.5, -0.5, 0.6, -0.7]])
    kept = torch.tensor([[0.0, 0.0, 0.6, -0.7]])
    assert torch.allclose(layer(x), linear(kept))
    model = llama()
    shape, densities = cost.Shape.of(model), []
    for artifact in parse("teal:allocation=uniform").prepare(model, data(), [0.9, 0.5, 0.2]):
        with sparsify(model, artifact, "all") as handle, handle.meter.on():
            model(input_ids=windows(4))
        densities.append(cost.model_density(shape, cost.densities(handle, shape)))
    assert densities == sorted(densities, reverse=True)
    assert densities == pytest.approx([0.9, 0.5, 0.2], abs=0.05)
