from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from methods import UsageError, sparsify
from methods.base import Data
from methods.lte import LteOptions, _Student, penalties
from methods.registry import parse
from methods.shared import training
from methods.shared.clustering import _stable, balanced_kmeans, expert_permutation
from methods.shared.experts import dequantise, quantise
from methods.shared.routers import output_norms
from methods.shared.search import search
from methods.shared.selection import expert_usage, mean_density
from methods.shared.student import Student, Tuning
from methods.shared.training import train
from sparse_kernels.layers import ExpertFFN
from sparse_kernels.meter import Meter, Phase
from sparse_kernels.selectors import Router
from tests.methods.models import MODELS, data, llama, opt, windows

TUNING = Tuning(windows(16), batch=8, lr=0.01, seed=0, progress=lambda *a: None)


def student(model: torch.nn.Module, **options: float) -> _Student:
    permutations = {f"permutation.{i}": torch.randperm(128).int() for i in range(2)}
    return _Student(LteOptions(**options), model, TUNING, permutations, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("n,size", [(128, 32), (96, 8), (64, 64), (40, 1)])
def test_clusters_are_balanced_and_reproducible(n: int, size: int) -> None:
    features = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    labels = balanced_kmeans(features, size)
    assert torch.bincount(labels).tolist() == [size] * (n // size)
    assert torch.equal(labels, balanced_kmeans(features, size))
    assert sorted(expert_permutation(labels).tolist()) == list(range(n))


def test_clusters_find_planted_groups() -> None:
    centres = torch.eye(4, 16).repeat_interleave(8, 0)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    labels = balanced_kmeans((centres + 0.05 * torch.randn(32, 16))[order], 8)
    groups = [set(labels[(order // 8) == g].tolist()) for g in range(4)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 4


def test_the_matching_for_large_layers_is_balanced() -> None:
    cost = torch.rand(96, 6, generator=torch.Generator().manual_seed(0))
    labels = _stable(cost, 16)
    assert torch.bincount(labels).tolist() == [16] * 6
    assert cost[torch.arange(96), labels].mean() < cost.mean()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_all_experts_on_is_the_dense_model(make: object) -> None:
    """Permuting neurons and switching every expert on changes nothing; switching all off leaves only biases."""
    model, ids = make(), windows(2)  # type: ignore[operator]
    dense = model(input_ids=ids).logits
    s = student(model)
    for layer in s.layers:
        layer.selector.threshold.fill_(-torch.inf)
    assert torch.allclose(s.student.model(input_ids=ids).logits, dense, atol=1e-4)
    for layer in s.layers:
        layer.selector.threshold.fill_(torch.inf)
    x = torch.randn(3, 64)
    off = s.layers[0](x)
    bias = s.layers[0].down.bias
    assert torch.allclose(off, torch.zeros_like(off) if bias is None else bias.expand_as(off))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("logit", [0.0, -1.5, 40.0])
def test_soft_scores_scale_experts_and_not_the_bias(make: object, logit: float) -> None:
    s = student(make())  # type: ignore[operator]
    layer, x = s.layers[0], torch.randn(5, 64)
    layer.soft, x[:, 0] = True, 1.0
    with torch.no_grad():
        layer.selector.layers[0].zero_()[:, 0] = logit  # of every token and expert
    score = float(torch.sigmoid(torch.tensor(logit)))
    bias = 0.0 if layer.down.bias is None else layer.down.bias
    dense = layer.down(layer.hidden(x).flatten(-2))
    assert torch.allclose(layer(x), score * (dense - bias) + bias, atol=1e-6)
    assert torch.equal(layer.scores, torch.full((5, 4), score))
    assert logit < 40 or torch.allclose(layer(x), dense, atol=1e-6)


def test_an_expert_runs_if_its_sigmoid_is_above_the_threshold_strictly() -> None:
    """The logit is compared instead; a token of zeros, with all scores at the threshold, runs nothing."""
    x, weight = torch.randn(200, 16), torch.randn(8, 16)
    x[:2] = torch.tensor([0.0, -0.0])[:, None]
    for tau in (0.5, 0.2):
        router = Router((weight,), threshold=torch.logit(torch.tensor(tau)))
        keep = router(x, torch.empty(0))
        assert torch.equal(keep[2:], torch.sigmoid(x[2:] @ weight.t()) > tau)
        assert not keep[:2].any() if tau == 0.5 else keep[:2].all()


@pytest.mark.parametrize("rule", ["threshold", "relative", "top-k"])
def test_the_host_never_waits_for_what_a_token_selects(rule: str) -> None:
    """Fake tensors have no values to ask for: a decode step that did could not be captured in a CUDA graph."""
    with FakeTensorMode(), torch.no_grad():
        gate, up, down = (torch.nn.Linear(*shape, bias=False) for shape in ((64, 128), (64, 128), (128, 64)))
        layer = ExpertFFN(gate, up, down, "silu", 32, Router((torch.randn(4, 64),), rule, 0.1, 2), 0, Phase(), Meter())
        for rows in (1, 4):
            assert layer._skip(torch.randn(rows, 64), layer.selector).shape == (rows, 64)
        assert layer.count is not None
        with pytest.raises(DataDependentOutputException):
            int(layer.count)


def test_the_hard_decision_ignores_the_size_of_scores() -> None:
    gate, up, down = torch.nn.Linear(16, 64), torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
    phase = Phase()
    phase.active = True
    x, router = torch.randn(7, 16), torch.randn(8, 16)
    outputs = []
    for scale in (1.0, 3.0):
        layer = ExpertFFN(gate, up, down, "silu", 8, Router((scale * router,)), 0, phase, Meter())
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    z = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0])])
    assert torch.equal(torch.sigmoid(z) > 0.5, z > 0)


def test_penalties_follow_their_definitions() -> None:
    scores = torch.rand(3, 5, 4)
    efficiency, separability = penalties(scores, 1e-2)
    assert efficiency == pytest.approx(float((scores**2).mean()))
    assert separability == pytest.approx(float((1 / ((scores - 0.5) ** 2 + 1e-2)).mean()), rel=1e-5)
    assert penalties(torch.ones(2, 4), 1e-12)[0] == 1.0
    assert penalties(torch.ones(2, 4), 1e-12)[1] == pytest.approx(4.0)
    assert penalties(torch.full((2, 4), 0.5), 1e-2)[1] == pytest.approx(100.0)


def test_the_efficiency_penalty_alone_closes_gates_and_separability_alone_parts_them() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).mul(0.3).requires_grad_()
    means = []
    for _ in range(20):
        efficiency, _ = penalties(torch.sigmoid(logits), 1e-2)
        means.append(float(torch.sigmoid(logits.detach()).mean()))
        (grad,) = torch.autograd.grad(efficiency, logits)
        logits = (logits - 100 * grad).detach().requires_grad_()
    assert means == sorted(means, reverse=True)
    logits = torch.tensor([-0.5, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(penalties(torch.sigmoid(logits), 1e-2)[1], logits)
    assert grad[0] > 0 > grad[1]  # descent moves each away from the threshold, on its own side


def test_separability_empties_the_neighbourhood_of_the_threshold() -> None:
    near = []
    for weight in (0.0, 0.5):
        s = student(llama(), lambda_sep=weight, sep_eps=0.01)
        s.train_soft(0.0, 40, "stage 1", None)
        scores = torch.cat([layer.scores.detach().flatten() for layer in s.layers])
        near.append(float(((scores - 0.5).abs() < 0.1).float().mean()))
    assert near[1] < 0.8 * near[0]


def test_penalties_stay_finite_at_the_threshold_under_autocast() -> None:
    """A router of zeros scores 0.5 everywhere; bfloat16 would round near scores there as well."""
    s = student(llama())
    for layer in s.layers:
        layer.soft = True
        layer.selector.layers[0].data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = s.student.task_loss(windows(2)) + sum(penalties(torch.stack([n.scores for n in s.layers]), 1e-3))
    loss.backward()
    trained = {name: p for name, p in s.student.model.named_parameters() if p.requires_grad}
    assert s.layers[0].scores.dtype == torch.float32 and "model.layers.0.mlp.selector.layers.0" in trained
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())


def test_stages_train_what_they_should() -> None:
    model = llama()
    s = student(model)
    embedding = model.get_input_embeddings().weight.clone()
    routers = [layer.selector.layers[0].detach().clone() for layer in s.layers]
    s.train_soft(1.0, 2, "stage 1", None)
    assert all(
        not torch.equal(layer.selector.layers[0], before) for layer, before in zip(s.layers, routers, strict=True)
    )
    routers = [layer.selector.layers[0].detach().clone() for layer in s.layers]
    before = {n: p.detach().clone() for n, p in s.student.parameters.items() if p.requires_grad}
    s.train_hard(2, "stage 2", None)
    for layer, router in zip(s.layers, routers, strict=True):
        weight = layer.selector.layers[0]
        assert torch.equal(weight, router) and not weight.requires_grad and weight.grad is None
    assert len(before) == 2 * 9 + 1 and not any(torch.equal(s.student.parameters[n], v) for n, v in before.items())
    assert torch.equal(s.student.model.get_input_embeddings().weight, embedding)


def test_a_larger_eta_gives_a_lower_density() -> None:
    densities = []
    for eta in (0.0, 2.0, 20.0):
        s = student(llama())
        s.train_soft(eta, 30, "stage 1", None)
        densities.append(mean_density(expert_usage(s.student, data().calibration)))
    assert densities[0] >= densities[1] >= densities[2] and densities[0] > densities[2] + 0.1


def test_the_artifact_reproduces_the_student() -> None:
    """Only the rounding of the stored differences to 8 bits lies between them, which moves few scores across 0.5."""
    model, ids = llama(), windows(2)
    s = student(model)
    s.train_soft(1.0, 10, "stage 1", None)
    s.train_hard(0, "stage 2", None)
    permutations = {f"permutation.{i}": torch.arange(128).int() for i in range(2)}
    torch.manual_seed(0)
    s2 = _Student(LteOptions(), model, TUNING, permutations, None)
    s2.train_soft(1.0, 10, "stage 1", None)
    s2.train_hard(0, "stage 2", None)
    artifact = parse("lte").artifact(model, 0.5, s2.tensors(model, permutations), {})
    with torch.no_grad(), sparsify(model, artifact, "all"):
        stored = model(input_ids=ids).logits
    expected = s2.student.model(input_ids=ids).logits
    assert ((stored - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02


def test_differences_in_eight_bits() -> None:
    delta = torch.randn(6, 50) * torch.logspace(-4, 0, 6)[:, None]
    values, scale = quantise(delta)
    found = dequantise({"delta.w": values, "scale.w": scale}, "w")
    assert (
        values.dtype == torch.int8 and ((found - delta).abs() <= delta.abs().amax(1, keepdim=True) / 254 + 1e-9).all()
    )
    vector = torch.randn(7)
    values, scale = quantise(vector)
    assert torch.allclose(
        dequantise({"delta.b": values, "scale.b": scale}, "b"), vector, atol=float(vector.abs().max()) / 200
    )
    assert torch.equal(
        dequantise(dict(zip(("delta.z", "scale.z"), quantise(torch.zeros(2, 3)), strict=True)), "z"), torch.zeros(2, 3)
    )


def test_interrupted_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(model: torch.nn.Module, steps_before_kill: int | None) -> list[float]:
        seen = 0

        def loss(ids: torch.Tensor, done: float) -> torch.Tensor:
            nonlocal seen
            if steps_before_kill is not None and seen == steps_before_kill:
                raise KeyboardInterrupt
            seen += 1
            return model(input_ids=ids, labels=ids).loss

        kwargs = {"steps": 6, "batch": 2, "learning_rate": 1e-3}
        return train(model.requires_grad_(True), windows(8), loss, checkpoint=tmp_path / "state.safetensors", **kwargs)  # type: ignore[arg-type]

    straight = llama()
    expected = train(
        straight.requires_grad_(True),
        windows(8),
        lambda ids, done: straight(input_ids=ids, labels=ids).loss,
        steps=6,
        batch=2,
        learning_rate=1e-3,
    )
    training.CHECKPOINT_SECONDS, before = 0.0, training.CHECKPOINT_SECONDS
    try:
        with pytest.raises(KeyboardInterrupt):
            run(llama(), 3)
        resumed = llama()
        losses = run(resumed, None)
    finally:
        training.CHECKPOINT_SECONDS = before
    assert losses == pytest.approx(expected, rel=1e-5)
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert run(llama(), 0) == losses  # a finished stage is read back, not trained again


@pytest.mark.parametrize("die_at", [6, 9], ids=["stage 1 of the second trial", "stage 2"])
def test_interrupted_preparation_goes_on_where_it_stopped(
    die_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same artifact to the bit, and no step is taken twice: two trials of three steps, and three of stage 2."""
    given = Data(data().calibration, data().train, data().corpus, str(tmp_path))
    method = parse("lte:stage1_steps=3:stage2_steps=3:trials=2:tolerance=0:batch=2:lr=0.01")
    (straight,) = method.prepare(llama(), data(), [0.3])
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    whole, calls = Student.task_loss, 0

    def killed(self: Student, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(Student, "task_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        list(method.prepare(llama(), given, [0.3]))
    (resumed,) = method.prepare(llama(), given, [0.3])
    assert calls == 1 + 9 and len(list(tmp_path.iterdir())) == 3  # the one that died, and a file for each training
    assert resumed.tensors.keys() == straight.tensors.keys()
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in straight.tensors.items())
    assert resumed.manifest["search"] == straight.manifest["search"]


def test_the_search_stops_within_tolerance_and_shares_trials() -> None:
    known: dict[float, float] = {}

    def trial(strength: float) -> None:
        known[strength] = 1 / (1 + strength)

    for target in (0.9, 0.5, 0.2, 0.05):
        assert abs(known[search(target, known, trial, 0.01, 12)] - target) <= 0.01
    before = len(known)
    assert search(0.5, known, trial, 0.01, 12) in known and len(known) == before < 30


def test_the_search_returns_the_nearest_when_the_target_is_out_of_reach() -> None:
    known: dict[float, float] = {}
    found = search(0.9, known, lambda s: known.__setitem__(s, 0.5 + 0.001 / s), 0.01, 4)
    assert len(known) == 4 and known[found] == max(known.values())


def test_a_density_out_of_reach_is_told_in_the_record() -> None:
    spec = "lte:stage1_steps=1:stage2_steps=1:trials=1:batch=2"
    (artifact,) = parse(spec).prepare(llama(), data(), [0.01])
    assert not artifact.manifest["target_reached"]
    assert any("instead of 0.01: the nearest of at most 1 trials" in note for note in artifact.manifest["notes"])


def test_a_density_that_stage_2_moves_is_told_in_the_record() -> None:
    """The search sees stage 1; what counts is what the artifact does."""
    spec = "lte:stage1_steps=1:stage2_steps=40:lr=0.05:trials=1:batch=2:tolerance={}"
    (wide,) = parse(spec.format(0.9)).prepare(llama(), data(), [0.5])
    moved = abs(wide.manifest["stage2_density"] - wide.manifest["stage1_density"])
    assert wide.manifest["target_reached"] and not wide.manifest["notes"] and moved > 0.02
    target = wide.manifest["stage1_density"]
    (artifact,) = parse(spec.format(0.01)).prepare(llama(), data(), [target])
    assert not artifact.manifest["target_reached"]
    assert any("stage 2 moved it from" in note for note in artifact.manifest["notes"])


def test_controls_are_the_same_weights_with_other_experts(tmp_path: Path) -> None:
    """As many of them in every layer, trained once for all three."""
    model, given = opt(), Data(data().calibration, data().train, data().corpus, str(tmp_path))
    found, usages, kept = [], [], []
    for selector in ("router", "random", "oracle"):
        spec = f"lte:expert_size=8:eta=1:stage1_steps=8:stage2_steps=4:batch=2:lr=0.02:selector={selector}"
        found += parse(spec).prepare(model, given, [0.5])
        with sparsify(model, found[-1]) as handle:
            usages.append([float(share.mean()) for share in expert_usage(handle, given.calibration).values()])
            handle.phase.active = True
            layer, x = handle.layers()[0], torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
            h = layer.hidden(x)
            keep, norms = layer.selector(x, h), output_norms(layer)(h)
            kept.append(float((norms * keep).sum() / (norms.mean() * keep.sum())))
            if selector == "oracle":
                assert torch.equal(keep, norms > layer.selector.threshold) and not layer.fast(x)
    assert len(list(tmp_path.iterdir())) == 2
    router, chance, oracle = found
    assert usages[1] == pytest.approx(usages[0], abs=0.01) and usages[2] == pytest.approx(usages[0], abs=0.01)
    assert abs(chance.manifest["stage2_density"] - router.manifest["stage2_density"]) < 0.01
    assert kept[2] > max(kept[0], kept[1]) and abs(kept[1] - 1) < 0.2
    for name, tensor in router.tensors.items():
        if not name.startswith("router"):
            assert torch.equal(chance.tensors[name], tensor) and torch.equal(oracle.tensors[name], tensor)
    start = student(model, expert_size=8).layers[1].selector.layers[0]
    assert torch.equal(chance.tensors["router.1"], start.bfloat16())
    assert not torch.equal(router.tensors["router.1"], start.bfloat16())
    synthetic = parse("lte:expert_size=8:selector=oracle").synthesize(model, 0.25, windows(8, seed=1))
    with sparsify(model, synthetic) as handle:
        assert mean_density(expert_usage(handle, windows(8, seed=1))) == pytest.approx(0.25, abs=0.01)
    with pytest.raises(UsageError, match="did you mean random"):
        parse("lte:selector=randm")


def test_a_width_that_experts_do_not_divide_is_explained() -> None:
    reason = parse("lte").why_not(llama(intermediate_size=172).config)
    assert reason and "172" in reason and "expert_size=4" in reason or "expert_size=" in str(reason)
    assert parse("lte:expert_size=4").why_not(llama(intermediate_size=172).config) is None
