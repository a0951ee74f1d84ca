"""D2DMoE's option: attention projections as distilled MLPs, with experts and routers of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import cost
from methods import UsageError, load_artifact, runtime, sparsify
from methods.base import Data
from methods.registry import parse
from methods.shared.calibration import ffn_inputs
from methods.shared.projections import SITES, ProjectionMLP, distil, hidden_width
from methods.shared.selection import expert_usage
from tests.methods.models import MODELS, data, gemma3n, windows

SPEC = "d2dmoe:expert_size=8:steps=2:batch=2:windows=16:epochs=2:distill=2:projections=true"


def prepare(model: Any, spec: str = SPEC, density: float = 0.5, given: Data | None = None) -> Any:
    return next(iter(parse(spec).prepare(model, given or data(), [density])))


def set_tau(handle: Any, tau: float) -> None:
    for layer in handle.layers():
        layer.selector.threshold.fill_(tau)


def test_the_width_costs_what_the_layer_does() -> None:
    assert hidden_width(nn.Linear(4096, 4096, device="meta"), 32) == 2048
    assert hidden_width(nn.Linear(4096, 1024, device="meta"), 32) == 832  # of 819
    assert hidden_width(nn.Linear(8, 8), 32) == 32


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_distillation_approaches_the_projections(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as 32 neurons can: the inputs of a random model fill all 64 dimensions."""
    monkeypatch.setattr("methods.shared.projections.LEARNING_RATE", 1e-2)
    model, text = make(), windows(24, seed=2)
    errors = [distil(model, text, "relu", 8, epochs, 0, "test")[1] for epochs in (1, 30)]
    assert errors[0].keys() == {f"{block}.{site}" for block in (0, 1) for site in SITES}
    assert all(later < 0.8 * errors[0][name] for name, later in errors[1].items()), errors
    found, told = distil(model, text, "relu", 8, 30, 0, "test")
    assert told == errors[1]  # by seed
    weights = {name.removeprefix("projection.0.q."): w.float() for name, w in found.items() if ".0.q." in name}
    linear = model.get_submodule(f"{'model.decoder' if 'up.bias' in weights else 'model'}.layers.0.self_attn.q_proj")
    with sparsify(model, parse("d2dmoe:expert_size=8").artifact(model, None, {}, {})) as handle:
        seen: list[torch.Tensor] = []
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        next(ffn_inputs(handle, text, "test"))
    x = torch.cat([part[:, 1:] for part in seen[:3]]).flatten(0, 1)
    made = nn.functional.linear(x, weights["up.weight"], weights.get("up.bias")).relu()
    made = nn.functional.linear(made, weights["down.weight"], weights.get("down.bias"))
    expected = linear(x)
    assert float((made - expected).square().mean() / expected.square().mean()) == pytest.approx(told["0.q"], rel=0.1)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_all_experts_are_the_model_that_was_fine_tuned(make: Any) -> None:
    model, ids = make(), windows(2)
    with sparsify(model, prepare(model), "all") as handle:
        assert [layer.name for layer in handle.layers()] == [
            *(f"0.{site}" for site in _order(model)),
            "0",
            *(f"1.{site}" for site in _order(model)),
            "1",
        ]
        with handle.dense():
            dense = model(input_ids=ids).logits
        set_tau(handle, 0.0)
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-4)
        set_tau(handle, 0.9)
        assert not torch.allclose(model(input_ids=ids).logits, dense, atol=1e-2)


def _order(model: Any) -> str:
    return "qkvo" if model.config.model_type == "llama" else "kvqo"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_one_tau_serves_all_and_the_density_is_weighted(make: Any) -> None:
    model = make()
    artifact = prepare(model, f"{SPEC}:epochs=20", 0.6)
    assert artifact.manifest["target_reached"] and len(artifact.manifest["tau"]) == 2 * 5
    assert len(set(artifact.manifest["tau"])) == 1 and len(artifact.manifest["layers"]) == 2 * 5
    assert artifact.manifest["tokens"] == 2 * 2 * 64 + 2 * 16 * 64
    with sparsify(model, artifact) as handle:
        usage = expert_usage(handle, data().calibration)
        sizes = {layer.name: layer.up.weight.numel() + layer.down.weight.numel() for layer in handle.layers()}
    weighted = sum(float(usage[name].mean()) * size for name, size in sizes.items()) / sum(sizes.values())
    assert weighted == pytest.approx(0.6, abs=0.0101)


def active(model: Any, artifact: Any) -> float:
    """Of the hidden values of the projections, how many are positive."""
    found: list[torch.Tensor] = []
    with sparsify(model, artifact) as handle, handle.dense():
        for layer in (n for n in handle.layers() if isinstance(n, ProjectionMLP)):
            layer.up.register_forward_hook(lambda m, a, z: found.append((z > 0).float().mean()))
        model(input_ids=windows(8, seed=2))
    return float(torch.stack(found).mean())


def test_the_penalty_reaches_projections() -> None:
    """It makes their hidden values sparser, as it does those of FFNs."""
    model, shares = MODELS["opt"](), []
    for weight in (0.0, 40.0):
        spec = f"{SPEC}:steps=30:batch=4:lr=0.003:weight={weight}:epochs=1"
        shares.append(active(model, prepare(model, spec)))
    assert shares[1] < shares[0] - 0.02


def test_costs_are_those_of_the_mlps() -> None:
    model = MODELS["llama"]()
    shape, d = cost.Shape.of(model), 64
    rank, size = 16, 8
    widths = {"q": (32, 64), "k": (24, 32), "v": (24, 32), "o": (32, 64)}  # neurons, outputs
    for selector in ("router", "oracle"):
        artifact = prepare(model, f"{SPEC}:rank={rank}:selector={selector}")
        with sparsify(model, artifact, "decode") as handle, handle.meter.on():
            with handle.sparse():
                for layer in handle.layers():
                    layer.selector.threshold.fill_(1.0)  # the largest alone
                model(input_ids=windows(1))
            spent = cost.record(handle, shape, 0, 1)[0]
        routers = 2 * sum(rank * (d + w // size) for w in (128, *(w for w, _ in widths.values())))
        executed = routers if selector == "router" else 0
        for width, outputs in widths.values():
            executed += 2 * (size * outputs + (size if selector == "router" else width) * d)
        executed += 2 * (size * d + (size if selector == "router" else 128) * 2 * d)
        assert spent["decode"]["flops"] == 2 * (executed + shape.head)
        prompt = 2 * sum(w * (d + n) for w, n in widths.values()) + 2 * 3 * 128 * d
        nothing = cost.prefill_cost(shape, {}, 0, 10, 0.0, cost.complete(handle, shape))
        assert nothing.flops - nothing.flops_dense == 2 * 10 * (prompt - shape.dense)


def test_it_survives_the_disk_and_comes_off(tmp_path: Path) -> None:
    model, ids = MODELS["opt"](), windows(2)
    before, modules = model(input_ids=ids).logits, dict(model.named_modules())
    artifact = prepare(model)
    loaded = load_artifact(str(artifact.save_pretrained(tmp_path / "a")))
    for found in (artifact, loaded):
        with sparsify(model, found, "all"):
            assert runtime.why_not(model) is not None and "MLPs" in str(runtime.why_not(model))
            outputs = model(input_ids=ids).logits
    with sparsify(model, artifact, "all"):
        assert torch.equal(model(input_ids=ids).logits, outputs)
    assert dict(model.named_modules()) == modules and torch.equal(model(input_ids=ids).logits, before)
    assert runtime.why_not(model) is None


def test_distillation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Data(data().calibration, data().train, data().corpus, str(tmp_path))
    model = MODELS["opt"]()
    straight = prepare(model)
    assert prepare(model, given=given).hash == straight.hash
    stages = {path.stem.split("-", 2)[2] for path in tmp_path.iterdir()}
    assert {"projection0.q", "projection1.o", "sparsity", "router0", "router1.v"} <= stages
    monkeypatch.setattr("methods.shared.projections.HOYER", 1e9)  # would show if anything were trained again
    assert prepare(model, given=given).hash == straight.hash


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_random_weights_have_projections_too(make: Any) -> None:
    model = make()
    artifact = parse("d2dmoe:expert_size=8:projections=true").synthesize(model, 0.5, windows(4))
    with sparsify(model, artifact, "all") as handle:
        assert len(handle.layers()) == 10
        usage = expert_usage(handle, windows(4))
    assert all(float(share.mean()) == pytest.approx(0.5, abs=0.2) for share in usage.values())


def test_models_without_a_place_for_it_are_told() -> None:
    with pytest.raises(UsageError, match="projections=true"):
        prepare(gemma3n())


@pytest.mark.parametrize("rows", [1, 3])
def test_decode_steps_read_the_chosen_experts_alone(rows: int) -> None:
    """The path of the kernels, whose definitions run here; in and out differ for k and v."""
    model = MODELS["llama"]()
    with sparsify(model, prepare(model, density=0.3)) as handle, handle.sparse():
        for layer in (n for n in handle.layers() if isinstance(n, ProjectionMLP)):
            x = torch.randn(rows, 64)
            expected = layer(x)
            assert torch.allclose(layer._skip(x, layer.selector), expected, atol=1e-5)
            assert layer.count is not None and 0 < int(layer.count) <= layer.units
