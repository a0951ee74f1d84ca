from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from harness import cost
from methods import UsageError, sparsify
from methods.base import Data
from methods.registry import parse
from methods.shared.calibration import ffn_inputs
from methods.shared.clustering import balanced_kmeans, random_split
from methods.shared.coactivation import coactivation, graph, kept, partition
from methods.shared.learning import Recipe, fit
from methods.shared.routers import (
    captured,
    centres,
    experts_for,
    held_out,
    labels,
    neuron_means,
    off_target,
    quality,
    similarity,
    tanh_router,
    uniform,
)
from methods.shared.selection import expert_usage, threshold_for, warnings
from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Router
from tests.methods.models import MODELS, data, llama, opt, windows

QUICK = "moefication:expert_size=8:windows=16:epochs=2"
SELECTORS = ("mlp", "similarity", "random", "oracle")


def prepare(model: Any, spec: str = QUICK, density: float = 0.5) -> Any:
    return next(iter(parse(spec).prepare(model, data(), [density])))


def attached(model: Any, spec: str = QUICK, density: float = 0.5) -> Any:
    return sparsify(model, prepare(model, spec, density), "all")


def co_active(groups: int, size: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden values whose neurons fire in groups, in a random order, and each neuron's group."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(groups * size, generator=generator)
    on = torch.rand(tokens, groups, generator=generator) < 0.3
    h = on.repeat_interleave(size, 1) * torch.rand(tokens, groups * size, generator=generator)
    noise = (torch.rand(h.shape, generator=generator) < 0.02) * 0.3
    return (h + noise)[:, order], order // size


def test_splits_are_balanced_partitions_and_reproducible() -> None:
    hidden, _ = co_active(6, 8)
    edges = graph(coactivation(hidden))
    for labels_ in (random_split(48, 8), partition(edges, 8), balanced_kmeans(hidden.t(), 8)):
        assert torch.bincount(labels_).tolist() == [8] * 6
    assert torch.equal(random_split(48, 8, 3), random_split(48, 8, 3))
    assert not torch.equal(random_split(48, 8, 3), random_split(48, 8, 4))
    assert torch.equal(partition(edges, 8), partition(edges, 8))
    with pytest.raises(ValueError, match="cannot be split"):
        partition(edges, 7)


def test_clusters_ignore_the_length_of_rows() -> None:
    rows = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(balanced_kmeans(rows, 8), balanced_kmeans(rows * torch.rand(48, 1).add(0.5), 8))


def test_the_graph_is_symmetric_in_whole_numbers() -> None:
    edges = graph(coactivation(co_active(6, 8)[0]))
    assert torch.equal(edges, edges.t()) and torch.equal(edges, edges.floor())
    assert not edges.diagonal().any() and bool(((edges == 0) | (edges >= 1)).all()) and edges.any()
    assert not graph(torch.zeros(4, 4)).any()


def test_coactivation_follows_its_definition() -> None:
    h = torch.randn(9, 5)
    expected = torch.zeros(5, 5)
    for token in h:
        for n in range(5):
            for m in range(5):
                if token[n] > 0 and token[m] > 0:
                    expected[n, m] += token[n] * token[m]
    assert torch.allclose(coactivation(h), expected, atol=1e-5)


def test_neurons_that_fire_together_share_an_expert() -> None:
    hidden, group = co_active(6, 8)
    edges = graph(coactivation(hidden))
    found = partition(edges, 8)
    pure = sum(int(torch.bincount(group[found == e]).amax()) for e in range(6)) / 48
    assert pure >= 0.95 and kept(edges, found) > 2 * kept(edges, random_split(48, 8, 5))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("variant", ["mean", "direct"])
def test_all_experts_are_the_dense_model(make: Any, selector: str, variant: str) -> None:
    model, ids = make(), windows(2)
    dense = model(input_ids=ids).logits
    split = "coactivation" if selector == "mlp" else "kmeans"
    with attached(model, f"{QUICK}:selector={selector}:variant={variant}:split={split}", 1.0):
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("selector", ["mlp", "oracle"])
def test_all_experts_are_the_dense_model_but_for_rounding(make: Any, selector: str) -> None:
    """bfloat16 itself is further away from float32: neurons only add up in another order."""
    exact, ids = make(), windows(2)
    model = make().bfloat16()
    dense = model(input_ids=ids).logits.float()
    with attached(model, f"{QUICK}:selector={selector}:variant=direct", 1.0):
        sparse = model(input_ids=ids).logits.float()
    assert (sparse - dense).norm() < (dense - exact(input_ids=ids).logits).norm()


def test_a_neurons_bias_goes_with_it_and_the_outputs_is_added_once() -> None:
    """In the model's own order, from its own weights: the neurons that run, and nothing of the others' biases."""
    model, x = opt(), torch.randn(20, 64)
    block = model.model.decoder.layers[0]
    neurons, down, bias = F.relu(block.fc1(x)), block.fc2.weight, block.fc2.bias
    artifact = prepare(model, f"{QUICK}:split=random:selector=random", 0.25)
    with sparsify(model, artifact, "all") as handle:
        layer = handle.layers()[0]
        handle.phase.active = True
        keep = layer.selector(x, layer.hidden(x)).repeat_interleave(8, 1)
        runs = torch.zeros_like(keep)
        runs[:, artifact.tensors["permutation.0"].long()] = keep
        assert torch.equal(runs.sum(1), torch.full((20,), 32))
        assert torch.allclose(layer(x), (neurons * runs) @ down.t() + bias, atol=1e-5)
        layer.selector.rule, layer.selector.threshold[0] = "threshold", torch.inf
        assert torch.equal(layer(x), bias.expand(20, -1))


def test_density_is_k_of_n_for_every_token() -> None:
    model = opt()
    for density, k in ((0.75, 12), (0.5, 8), (0.26, 4), (0.01, 1)):
        artifact = prepare(model, f"{QUICK}:selector=random", density)
        with sparsify(model, artifact, "all") as handle, handle.meter.on():
            model(input_ids=windows(2))
        assert {int(c) for found in handle.meter.counts.values() for c in torch.cat(found)} == {k}
        assert artifact.manifest["k"] == k == experts_for(density, 16)
        assert artifact.manifest["density"] == pytest.approx(k / 16, abs=1e-4)
        assert bool(artifact.manifest["notes"]) == (abs(k / 16 - density) > 0.01)
    assert off_target(0.5, 28) == [] and "20" in off_target(0.7, 28)[0]


def test_tokens_whose_neurons_are_in_k_experts_lose_nothing() -> None:
    model, k = opt(), 4
    with attached(model, f"{QUICK}:selector=oracle", k / 16) as handle:
        layer = handle.layers()[0]
        x = torch.randn(64, 64)
        bias = torch.full_like(layer.up.bias, -50.0).view(16, 8)
        bias[::5] = layer.up.bias.view(16, 8)[::5]  # four experts can fire at all
        layer.up.bias.copy_(bias.flatten())
        handle.phase.active = True
        assert torch.allclose(layer(x), layer.down(layer.hidden(x).flatten(-2)), atol=1e-5)


def test_the_router_starts_from_its_experts() -> None:
    """B is the identity and A the centres, so a token along a planted expert finds it."""
    model = llama()
    with attached(model) as handle:
        layer = handle.layers()[0]
        a = centres(layer)
        rows = F.normalize(layer.gate.weight, dim=1).view(16, 8, -1)
        assert torch.allclose(a, rows.mean(1), atol=1e-6)
        x = torch.randn(10, 64)
        expected = torch.tanh(F.normalize(x, dim=1) @ a.t())
        router = tanh_router(a, torch.eye(16))
        assert torch.allclose(router.score(x), expected, atol=1e-6)
        near = similarity(a).score(x).argsort(1)
        assert torch.equal(near, (-(F.normalize(x, dim=1)[:, None] - a).norm(dim=2)).argsort(1))
    planted = torch.eye(4, 64)
    assert tanh_router(planted, torch.eye(4)).score(3 * planted).argmax(1).tolist() == [0, 1, 2, 3]


def test_labels_are_shares_that_one_outlier_does_not_empty() -> None:
    importance = torch.rand(2000, 8)
    importance[0, 0] = 1e6
    found = labels(importance)
    assert 0 <= found.min() and found.max() == 1 and found.mean() > 0.4
    assert not labels(torch.zeros(10, 4)).any()


def test_much_text_is_thinned_out_by_tokens_and_not_by_experts() -> None:
    """As many scores as are thinned out twofold, from an even number of experts of which every second one scores more.

    Experts 0, 2, ... are uniform in [0, 1], the others in [1, 2].
    """
    score = torch.rand(4000, 300, generator=torch.Generator().manual_seed(0)) + torch.arange(300) % 2
    selector = Router((torch.eye(300),), "threshold")
    for density, expected in ((0.75, 0.5), (0.5, 1.0), (0.25, 1.5)):
        threshold = threshold_for(selector, score, density)
        assert float(threshold) == pytest.approx(expected, abs=0.01)
        assert float((score > threshold).float().mean()) == pytest.approx(density, abs=0.005)
    assert float(labels(score)[:, 0].max()) == pytest.approx(0.5, abs=0.01)


def test_training_makes_a_router_better_than_similarity_and_chance() -> None:
    """Experts with more and less frequent activity, which centres cannot know of; the oracle bounds all."""
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.randn(64, 24, generator=generator), torch.randn(6000, 24, generator=generator)
    bias = torch.linspace(-3, 3, 8).repeat_interleave(8)
    importance = F.relu(x @ rows.t() + bias).unflatten(1, (8, 8)).sum(-1)
    a = F.normalize(rows, dim=1).view(8, 8, -1).mean(1)
    router, before = tanh_router(a, torch.eye(8)), tanh_router(a.clone(), torch.eye(8))
    recipe = Recipe(F.binary_cross_entropy_with_logits, labels, 8, 0.01, "constant")
    fit(router, x, importance, recipe, 0, "test")
    trained, possible = quality(router, x, importance).values()
    chance = quality(tanh_router(uniform(8, 24, generator), torch.eye(8)), x, importance)["captured"]
    assert possible >= trained > max(quality(similarity(a), x, importance)["captured"], chance) + 0.02
    seen, true = x[-held_out(6000) :], importance[-held_out(6000) :]
    losses = [F.binary_cross_entropy_with_logits(r.score(seen), labels(true)) for r in (before, router)]
    assert losses[1] < losses[0]


def test_captured_is_one_for_all_experts_and_grows_with_k() -> None:
    importance, score = torch.rand(50, 8), torch.rand(50, 8)
    importance[:5] = 0  # tokens that fire nothing do not count
    shares = [captured(score, importance, k) for k in range(1, 9)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert all(s <= captured(importance, importance, k) + 1e-6 for k, s in enumerate(shares, 1))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_routers_learn_from_the_inputs_that_the_ffn_sees(make: Any) -> None:
    model, ids = make(), windows(10)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with sparsify(model, parse(QUICK).artifact(model, None, {}, {})) as handle:
        for index, layer in enumerate(handle.layers()):
            layer.register_forward_pre_hook(lambda m, a, to=seen[index]: to.append(a[0].reshape(-1, 64, 64)[:, 1:]))
        model(input_ids=ids)
        expected = [seen[i][0].flatten(0, 1) for i in range(2)]
        for (layer, x), wanted in zip(ffn_inputs(handle, ids, "test", batch=4), expected, strict=True):
            assert isinstance(layer, ExpertFFN) and torch.allclose(x, wanted, atol=1e-4)
            assert torch.allclose(neuron_means(layer, x), layer.hidden(x).flatten(-2).mean(0), atol=1e-5)


def test_silu_needs_a_variant_of_its_own() -> None:
    reason = parse("moefication:variant=relu").why_not(llama().config)
    assert reason and "silu" in reason and "variant=mean" in reason and "\n" not in reason
    with pytest.raises(UsageError, match="variant=relufied"):
        prepare(llama(), f"{QUICK}:variant=relu")
    assert parse("moefication:variant=relu").why_not(opt().config) is None
    assert prepare(llama()).manifest["variant"] == "mean" and prepare(opt()).manifest["variant"] == "relu"


def test_relufied_models_run_with_relu_and_charge_their_tokens() -> None:
    model, ids = llama(), windows(2)
    spec = f"{QUICK}:variant=relufied:relu_steps=3:batch=2"
    artifact = prepare(model, spec)
    assert artifact.manifest["tokens"] == 3 * 2 * 64 + 16 * 64
    with sparsify(model, artifact, "decode") as handle:
        layer = handle.layers()[0]
        assert layer.activation == "relu" and handle.layers()[0].mean is None
        model(input_ids=ids)
        tuned = model.get_parameter("model.layers.0.self_attn.q_proj.weight").clone()
    assert not torch.equal(tuned, model.get_parameter("model.layers.0.self_attn.q_proj.weight"))


def test_bad_settings_and_too_little_text() -> None:
    for spec, hint in (
        ("moefication:split=kmean", "did you mean kmeans"),
        ("moefication:selector=moe", "choose from"),
        ("moefication:epochs=0", "from 1"),
    ):
        with pytest.raises(UsageError, match=hint):
            parse(spec)
    reason = parse("moefication").why_not(llama(intermediate_size=172).config)
    assert reason and "172" in reason and "expert_size=" in reason
    with pytest.raises(UsageError, match="larger --corpus"):
        prepare(opt(), "moefication:windows=2")
    short = Data(windows(8), lambda n: windows(min(n, 16)), {"name": "short", "hash": "0"})
    (artifact,) = parse("moefication:windows=400:epochs=1").prepare(opt(), short, [0.5])
    assert "no more" in artifact.manifest["notes"][0]


def test_a_router_that_ignores_tokens_is_told() -> None:
    assert warnings({0: torch.tensor([1.0, 0.0, 0.995, 0.001])}) and not warnings({0: torch.tensor([1.0, 0.4])})
    model = opt()
    artifact = prepare(model)
    with sparsify(model, artifact) as handle:
        handle.layers()[1].selector.layers[1].zero_()  # all scores equal: always the first experts
        found = warnings(expert_usage(handle, windows(8)))
    assert len(found) == 1 and found[0].startswith("layer 1") and "8 of 16" in found[0]


def test_costs_count_the_router_and_what_an_oracle_reads() -> None:
    model = opt()
    shape, d, f = cost.Shape.of(model), 64, 128
    for selector, expected in (
        ("mlp", 2 * (2 * d * f // 2) + 2 * (16 * d + 16 * 16)),
        ("similarity", 2 * (2 * d * f // 2) + 2 * (16 * d + 16)),
        ("oracle", 2 * d * f + 2 * d * f // 2),
    ):
        with attached(model, f"{QUICK}:selector={selector}") as handle, handle.meter.on():
            model(input_ids=windows(2))
            spent = cost.record(handle, shape, 0, 1)[0]["decode"]
        attention = 2 * (shape.dense - 2 * 2 * d * f + shape.head)
        assert spent["flops"] - attention == 2 * expected, selector


def test_llama_7b_at_80_percent_in_the_units_of_the_lte_paper() -> None:
    with torch.device("meta"):
        shape = cost.Shape.of(LlamaForCausalLM(LlamaConfig()))
    found = {k: 0.8 if k[1] in ("gate", "up", "down") else 1.0 for k in shape.linears}
    spent = cost.decode_cost(shape, found, found, 0, 0, 1)
    assert (spent.flops - 2 * shape.head) / 2**30 == pytest.approx(10.45, abs=0.01)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_random_weights_get_their_density(make: Any) -> None:
    model = make()
    artifact = parse("moefication:expert_size=8").synthesize(model, 0.25, windows(4))
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=windows(2))
    assert {int(c) for found in handle.meter.counts.values() for c in torch.cat(found)} == {4}
    assert handle.layers()[0].overhead >= 16 * 64 + 16 * 16
