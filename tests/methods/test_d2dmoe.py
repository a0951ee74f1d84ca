from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from harness import cost
from methods import UsageError, sparsify
from methods.base import Data
from methods.d2dmoe import uneven
from methods.registry import info, parse
from methods.shared.learning import Recipe, fit
from methods.shared.penalties import FLOOR, RAMPS, penalty
from methods.shared.routers import norm_router, output_norms, quality, targets, uniform
from methods.shared.search import bisect
from methods.shared.selection import expert_usage, mean_density
from sparse_kernels.layers import ExpertFFN
from tests.methods.models import MODELS, data, llama, opt, windows

QUICK = "d2dmoe:expert_size=8:steps=2:batch=2:windows=16:epochs=4"


def prepare(model: Any, spec: str = QUICK, density: float = 0.5, given: Data | None = None) -> Any:
    return next(iter(parse(spec).prepare(model, given or data(), [density])))


def set_tau(handle: Any, tau: float) -> None:
    for layer in handle.layers():
        layer.selector.threshold.fill_(tau)


def relu_share(model: Any, artifact: Any) -> float:
    """Of gate (or up) outputs that are positive, over both layers: the sparsity that stage 1 works on."""
    found: list[torch.Tensor] = []
    with sparsify(model, artifact) as handle, handle.dense():
        for layer in handle.layers():
            first = layer.up if layer.gate is None else layer.gate
            first.register_forward_hook(lambda m, a, z: found.append((z > 0).float().mean()))
        model(input_ids=windows(8, seed=2))
    return float(torch.stack(found).mean())


def test_square_hoyer_counts_neurons_whatever_the_scale() -> None:
    one, equal, some = torch.zeros(1, 64), torch.full((1, 64), 3.0), torch.rand(5, 64)
    one[0, 7] = 2.0
    assert penalty(one, "hoyer") == pytest.approx(1.0) and penalty(equal, "hoyer") == pytest.approx(64.0)
    assert torch.allclose(penalty(some, "hoyer"), penalty(100 * some, "hoyer"), rtol=1e-4)
    assert ((penalty(some, "hoyer") >= 1) & (penalty(some, "hoyer") <= 64)).all()
    assert penalty(torch.zeros(1, 64), "hoyer") == 0.0
    assert torch.allclose(penalty(some, "l1"), some.sum(1))


def test_ramps_end_at_the_full_weight() -> None:
    assert [RAMPS["linear_warmup"](t) for t in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert [RAMPS["linear"](t) for t in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0] and RAMPS["constant"](0.0) == 1.0


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind, weight", [("hoyer", 13), ("l1", 64)])
def test_the_penalty_makes_activations_sparser(make: Any, kind: str, weight: float) -> None:
    model, shares = make(), []
    for w in (0.0, weight):
        spec = f"d2dmoe:expert_size=8:steps=30:batch=4:lr=0.003:windows=16:epochs=1:penalty={kind}:weight={w}"
        shares.append(relu_share(model, prepare(model, spec)))
    assert shares[1] < shares[0] - 0.03


def test_the_kept_activation_is_pushed_down_from_its_input() -> None:
    """Below the floor the gradient is zero: GELU is off there, and nothing more is to be had."""
    z = torch.tensor([[-12.0, -1.0, 3.0]], requires_grad=True)
    a = z.clamp(min=FLOOR) - FLOOR
    assert torch.equal(a, torch.tensor([[0.0, 9.0, 13.0]]))
    penalty(a, "l1").sum().backward()
    assert z.grad is not None and z.grad.tolist() == [[0.0, 1.0, 1.0]]
    model = llama(hidden_act="gelu")
    with sparsify(model, prepare(model, f"{QUICK}:activation=own:penalty=l1:weight=0.01"), "all") as handle:
        assert handle.layers()[0].activation == "gelu"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_all_experts_are_the_tuned_dense_model(make: Any) -> None:
    """tau 0 runs everything, and is the model after stage 1, ReLU in place of its activation."""
    model, ids = make(), windows(2)
    artifact = prepare(model)
    with sparsify(model, artifact, "all") as handle:
        with handle.dense():
            dense = model(input_ids=ids).logits
        set_tau(handle, 0.0)
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-4)
        assert handle.layers()[0].activation == "relu"
    untuned = prepare(model, f"{QUICK}:steps=0:activation=own")
    with sparsify(model, untuned, "all") as handle:
        set_tau(handle, 0.0)
        sparse = model(input_ids=ids).logits
    assert torch.allclose(sparse, model(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_all_experts_are_the_dense_model_in_half_precision(make: Any) -> None:
    """With ReLU in the place of the activation; 2e-3 of the largest output."""
    model, x = make().half(), torch.randn(50, 64).half()
    artifact = parse(QUICK).synthesize(model, 0.5, windows(4))
    with sparsify(model, artifact, "all") as handle:
        set_tau(handle, 0.0)
        handle.phase.active = True
        for layer in handle.layers():
            first = layer.up if layer.gate is None else layer.gate
            h = F.relu(first(x)) if layer.gate is None else F.relu(first(x)) * layer.up(x)
            dense = layer.down(h)
            assert layer.selector(x, h).all()
            assert (layer(x) - dense).abs().amax() < 2e-3 * dense.abs().amax()


def test_targets_are_the_norms_of_the_experts_outputs() -> None:
    model = opt()
    with sparsify(model, prepare(model)) as handle:
        layer: ExpertFFN = handle.layers()[0]
        x = torch.randn(20, 64)
        h = layer.hidden(x)
        outputs = torch.stack([h[:, e] @ layer.down.weight[:, 8 * e : 8 * e + 8].t() for e in range(16)], 1)
        found = targets(layer, x, output_norms(layer))
        assert torch.allclose(found, outputs.norm(dim=2), atol=1e-4)
        dense = layer.down(h.flatten(-2))
        assert torch.allclose(outputs.sum(1), dense - layer.down.bias, atol=1e-4)
        assert (found.sum(1) >= (dense - layer.down.bias).norm(dim=1) - 1e-4).all()
        handle.phase.active = True
        skipped = ~layer.selector(x, h)
        assert ((layer(x) - dense).norm(dim=1) <= (found * skipped).sum(1) + 1e-4).all()


def test_routers_learn_norms_and_are_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    x, directions = torch.randn(6000, 24, generator=generator), torch.randn(8, 24, generator=generator)
    norms = (x @ directions.t()).relu()
    router = norm_router(uniform(32, 24, generator), uniform(8, 32, generator))
    before = quality(router, x, norms)["captured"]
    fit(router, x, norms, Recipe(F.mse_loss, lambda y: y, 10, 1e-2, "cosine"), 0, "test")
    found = router.score(x)
    assert (found >= 0).all() and F.mse_loss(found, norms) < 0.2 * norms.var()
    assert before < quality(router, x, norms)["captured"] - 0.1


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_density_is_met_on_calibration_text_by_one_tau(make: Any) -> None:
    model = make()
    found = list(parse(f"{QUICK}:epochs=2").prepare(model, data(), [0.8, 0.5, 0.3]))
    taus = []
    for artifact in found:
        assert artifact.manifest["target_reached"] and not artifact.manifest["warnings"]
        with sparsify(model, artifact) as handle:
            usage = expert_usage(handle, data().calibration)
        assert mean_density(usage) == pytest.approx(artifact.density, abs=0.0101)
        assert len(set(artifact.manifest["tau"])) == 1
        taus.append(artifact.manifest["tau"][0])
    assert taus == sorted(taus) and 0 < taus[0] < taus[-1] <= 1
    shared = [{k: v for k, v in a.tensors.items() if "threshold" not in k} for a in found]
    assert all(torch.equal(shared[0][k], other[k]) for other in shared[1:] for k in shared[0])


def test_a_tau_for_each_layer_makes_all_equally_dense() -> None:
    model = opt()
    artifact = prepare(model, f"{QUICK}:scope=layer", 0.4)
    with sparsify(model, artifact) as handle:
        usage = expert_usage(handle, data().calibration)
    assert all(float(share.mean()) == pytest.approx(0.4, abs=0.0101) for share in usage.values())
    assert len(set(artifact.manifest["tau"])) == 2 and artifact.manifest["target_reached"]


def test_layers_that_one_tau_cannot_serve_are_told() -> None:
    """One expert of layer 0 dwarfs the others: no tau that thins out layer 1 leaves more than that one."""
    assert not uneven({0: torch.full((16,), 0.3), 1: torch.full((16,), 0.9)})
    (found,) = uneven({0: torch.full((16,), 0.0625), 1: torch.full((16,), 0.9)})
    assert "layer 0 with density 0.06" in found and "layer 1 with 0.90" in found
    model = opt()
    with torch.no_grad():
        block = model.model.decoder.layers[0]
        block.fc1.weight[:8] = block.fc1.weight[0].clone()  # alike, so that they become one expert
        block.fc1.bias[:8] += 10.0
        block.fc2.weight[:, :8] *= 10.0
    spec = "d2dmoe:expert_size=8:steps=0:windows=16:selector=oracle"
    manifest = prepare(model, spec, 0.4).manifest
    assert any("scope=layer" in text for text in manifest["warnings"]) and manifest["layers"][0] < 0.1
    layered = prepare(model, f"{spec}:scope=layer", 0.4).manifest
    assert not any("scope=layer" in text for text in layered["warnings"])
    assert layered["layers"] == pytest.approx([0.4, 0.4], abs=0.01)


def test_a_random_router_has_learned_nothing_and_meets_the_density() -> None:
    """Its start is the learned router's; tau is found for it as for any other."""
    model, spec = opt(), "d2dmoe:expert_size=8:steps=2:batch=2:windows=64:epochs=8"
    learned, chance = prepare(model, spec), prepare(model, f"{spec}:selector=random")
    assert chance.manifest["target_reached"] and chance.manifest["density"] == pytest.approx(0.5, abs=0.01)
    generator = torch.Generator().manual_seed(0)
    for block in range(2):
        start = uniform(16, 64, generator), uniform(16, 16, generator)
        for name, weight in zip("ab", start, strict=True):
            assert torch.equal(chance.tensors[f"router.{block}.{name}"], weight.bfloat16())
            assert not torch.equal(learned.tensors[f"router.{block}.{name}"], weight.bfloat16())
    assert all(torch.equal(v, learned.tensors[n]) for n, v in chance.tensors.items() if n.startswith("delta"))
    caught = [sum(found.manifest["captured"]) for found in (chance, learned)]
    assert caught[0] < caught[1] - 0.05


def test_bisection_stops_within_tolerance_or_at_the_nearest() -> None:
    asked: list[float] = []

    def measure(tau: float) -> float:
        asked.append(tau)
        return (1 - tau) ** 3

    assert measure(bisect(0.3, measure, 0.01, 20)) == pytest.approx(0.3, abs=0.01) and len(asked) < 12
    assert bisect(0.01, lambda tau: 0.25, 0.01, 5) == 0.5  # out of reach, and nothing is nearer


def test_k_differs_between_tokens_but_not_with_the_ablation() -> None:
    model = opt()
    counts = []
    for rule in ("dynamic", "top-k"):
        with sparsify(model, prepare(model, f"{QUICK}:rule={rule}"), "all") as handle, handle.meter.on():
            model(input_ids=windows(2))
        counts.append({int(c) for found in handle.meter.counts.values() for c in torch.cat(found)})
    assert len(counts[0]) > 2 and min(counts[0]) >= 1 and counts[1] == {8}


def test_a_density_below_one_expert_is_told() -> None:
    artifact = prepare(opt(), QUICK, 0.01)
    assert not artifact.manifest["target_reached"]
    assert artifact.manifest["density"] == pytest.approx(1 / 16, abs=0.005)
    assert any("instead of 0.01: the nearest of" in note for note in artifact.manifest["notes"])
    reached = prepare(opt(), f"{QUICK}:rule=top-k", 0.5)
    assert not any("instead of" in note for note in reached.manifest["notes"])


def test_at_tau_0_the_cost_is_dense_and_the_router() -> None:
    model = opt()
    shape = cost.Shape.of(model)
    with sparsify(model, prepare(model, f"{QUICK}:rank=16"), "all") as handle, handle.meter.on():
        set_tau(handle, 0.0)
        model(input_ids=windows(2))
        spent = cost.record(handle, shape, 32, 1)[0]["decode"]
    assert spent["flops"] - spent["flops_dense"] == spent["flops_overhead"] == 2 * 2 * (16 * 64 + 16 * 16)


def test_interrupted_fine_tuning_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the penalty's ramp where it was: the same artifact to the bit."""
    from methods.shared import student, training

    given = Data(data().calibration, data().train, data().corpus, str(tmp_path))
    spec = "d2dmoe:expert_size=8:steps=6:batch=2:windows=16:epochs=3:weight=13"
    straight = prepare(opt(), spec)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    whole = student.Student.task_loss
    calls = 0

    def killed(self: Any, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(student.Student, "task_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(opt(), spec, given=given)
    assert len(list(tmp_path.iterdir())) == 1
    assert prepare(opt(), spec, given=given).hash == straight.hash
    assert calls == 4 + 3 and len(list(tmp_path.iterdir())) == 3  # one stage and two routers


def test_trained_methods_spend_the_same_tokens_by_default() -> None:
    window = 512
    options = {name: info(name).Options() for name in ("lte", "d2dmoe", "moefication", "dense-finetuned")}
    lte, d2d, moe, dense = options.values()
    budget = (lte.stage1_steps + lte.stage2_steps) * lte.batch * window  # of one trial
    assert d2d.steps * d2d.batch * window + d2d.windows * window == budget
    assert moe.relu_steps * moe.batch * window + moe.windows * window == budget
    assert dense.steps * dense.batch * window == budget


def test_bad_settings_and_models() -> None:
    for spec, hint in (
        ("d2dmoe:penalty=hoyr", "did you mean hoyer"),
        ("d2dmoe:rule=fixed", "choose from"),
        ("d2dmoe:weight=-1", "at least 0"),
        ("d2dmoe:trials=0", "from 1"),
    ):
        with pytest.raises(UsageError, match=hint):
            parse(spec)
    with pytest.raises(UsageError, match="expert_size="):
        prepare(llama(intermediate_size=172), "d2dmoe")
    with pytest.raises(UsageError, match="target density"):
        next(iter(parse(QUICK).prepare(opt(), data(), [None])))
    with pytest.raises(UsageError, match="larger --corpus"):
        prepare(opt(), "d2dmoe:windows=2")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_random_weights_get_their_density(make: Any) -> None:
    model = make()
    artifact = parse("d2dmoe:expert_size=8").synthesize(model, 0.5, windows(4))
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=windows(4))
    counts = torch.cat([c for found in handle.meter.counts.values() for c in found]).float()
    assert float(counts.mean()) / 16 == pytest.approx(0.5, abs=0.05)
