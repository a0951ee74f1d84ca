"""Deja Vu against its definition: what predictors hear, what they decide, and what that costs."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from harness import cost
from methods import UsageError, load_artifact, sparsify
from methods.registry import create, parse
from methods.runtime import runtime
from methods.shared.heads import head_norms, largest
from methods.shared.predictors import PredictorRecipe, activations, fit, folded, judge, linear_start
from methods.shared.selection import text_loss
from tests.methods.models import MODELS, data, llama, opt, windows
from tests.methods.test_runtime import decode

QUICK = "dejavu:windows=16:epochs=1"
DEEP = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


def prepared(model, spec=QUICK, density=0.5):
    return next(iter(parse(spec).prepare(model, data(), [density])))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"ffn_tap": "block_in", "ffn_ahead": 0, "heads_tap": "mlp_in"}])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_runtime_decides_as_the_masks_do(kind, options, batch):
    model, prompt = MODELS[kind](), windows(batch, 9)
    with sparsify(model, create("dejavu", options).synthesize(model, 0.5, prompt)) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
    assert served == 5 * 2 and torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_full_density_is_the_dense_model(kind):
    model, ids = MODELS[kind](), windows(2)
    dense = model(input_ids=ids).logits
    with sparsify(model, create("dejavu", {}).synthesize(model, 1.0, ids), "all"):
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-6)


@pytest.mark.parametrize("ahead, wanted", [(1, [1.0, 0.5, 0.5]), (0, [0.5, 0.5, 0.5])])
def test_a_block_that_nothing_came_before_is_dense_the_rest_exactly_at_the_target(ahead, wanted):
    model = llama(**DEEP)
    method = create("dejavu", {"ffn_ahead": ahead, "heads_ahead": ahead})
    with sparsify(model, method.synthesize(model, 0.5, windows(2)), "all") as handle, handle.meter.on():
        model(input_ids=windows(2))
    sites = cost.site_table(handle)
    assert sites["ffn"]["layers"] == sites["heads"]["layers"] == wanted
    for (_, layer), counts in handle.meter.counts.items():
        assert len(torch.cat(counts).unique()) == 1, layer  # every token, not on average


def test_a_selection_is_made_from_the_same_token_one_block_before():
    """Whatever happens to other tokens, or to later blocks' inputs, a token's selection stays."""
    model, ids = llama(**DEEP), windows(2, 12)
    artifact = create("dejavu", {}).synthesize(model, 0.5, ids)
    heard = {}
    with sparsify(model, artifact, "all") as handle:
        layers = [layer for layer in handle.layers() if layer.selector is not None]
        assert {layer.layer for layer in layers} == {1, 2}
        inputs, middles = {}, {}
        blocks = list(model.model.layers)
        for at, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda m, a, at=at: inputs.update({at: a[0].clone()}))
            norm = block.post_attention_layernorm
            norm.register_forward_pre_hook(lambda m, a, at=at: middles.update({at: a[0].clone()}))

        def listen(layer):
            def hook(module, args, keep):
                heard[layer.site, layer.layer] = keep, module.heard(args[0]).clone()

            return hook

        for layer in layers:
            layer.selector.register_forward_hook(listen(layer))
        model(input_ids=ids)
    for (site, layer), (keep, x) in heard.items():
        source = inputs if site == "heads" else middles
        assert torch.equal(x, source[layer - 1].reshape(x.shape))
        assert not torch.allclose(x, source[layer].reshape(x.shape), atol=1e-3)
        router = next(h.selector for h in layers if (h.site, h.layer) == (site, layer))
        best = router.score(source[layer - 1]).topk(router.k, -1).indices.sort(-1).values
        assert torch.equal(keep.nonzero()[:, -1].view(*keep.shape[:-1], router.k), best)


@pytest.mark.parametrize("tap", ["mlp_in", "block_in"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_inside_the_model_predictors_catch_what_they_caught_while_learning(tap, ahead):
    model = opt()
    spec = f"{QUICK}:epochs=3:batch=64:parts=ffn:ffn_tap={tap}:ffn_ahead={ahead}"
    artifact, ids = prepared(model, spec), windows(16, seed=2)[-1:]  # the held-out tokens are the last window's
    caught = {}
    with sparsify(model, artifact, "all") as handle:
        layer = handle.layers()[1]

        def judge(module, args, keep):
            active = args[1].squeeze(-1) > 0
            share = (keep & active).sum(-1) / active.sum(-1)
            caught["recall"] = float(share.reshape(-1)[-50:].mean())

        layer.selector.register_forward_hook(judge)
        for earlier in handle.layers()[:1]:
            earlier.selector = None  # as while learning, what comes in is dense
        model(input_ids=ids)
    assert caught["recall"] == pytest.approx(artifact.manifest["ffn"]["1"]["recall"], abs=0.01)


@pytest.mark.parametrize("ahead", [0, 1])
def test_inside_the_model_predictors_of_heads_catch_what_they_caught_while_learning(ahead):
    model = llama(**DEEP)
    artifact, ids = prepared(model, f"{QUICK}:epochs=3:batch=64:parts=heads:heads_ahead={ahead}"), windows(16, seed=2)
    with sparsify(model, artifact, "all") as handle:
        layer = handle.layers()[2]
        for earlier in handle.layers()[:2]:
            earlier.selector = None  # as while learning, what comes in is dense
        caught = []

        def judge(module, args, keep):
            best = largest(head_norms(args[0], 8).unflatten(-1, (4, 2)).amax(-1), 2)
            caught.append((layer.selector(args[0], args[0]) & best).reshape(-1, 4)[-51:].sum() / 102)

        hook = layer.register_forward_hook(judge)
        model(input_ids=ids[-1:])
        hook.remove()
    assert float(caught[0]) == pytest.approx(artifact.manifest["heads"]["2"]["recall"], abs=0.01)


def test_the_oracle_of_a_relu_model_changes_nothing_when_it_keeps_all_that_is_active():
    model, ids = opt(), windows(2)
    dense = model(input_ids=ids).logits
    most = max(float((b.fc1(torch.randn(1, 64)) > 0).float().mean()) for b in model.model.decoder.layers)
    assert most < 0.9
    artifact = prepared(model, "dejavu:windows=16:parts=ffn:selector=oracle:ffn_ahead=0", 0.9)
    with sparsify(model, artifact, "all"):
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-5)
    assert artifact.manifest["ffn"]["1"]["recall"] == 1.0


def test_learning_beats_chance_and_the_oracle_beats_learning():
    model = opt()
    spec = "dejavu:windows=16:epochs=20:batch=64:parts=ffn"
    found = {s: prepared(model, f"{spec}:selector={s}") for s in ("predictor", "random", "oracle")}
    recall = {s: artifact.manifest["ffn"]["1"]["recall"] for s, artifact in found.items()}
    assert recall["random"] + 0.1 < recall["predictor"] < recall["oracle"], recall


def test_a_linear_rule_is_learned():
    """What a predictor can express it finds, held-out tokens included; chance is the share of k."""
    generator = torch.Generator().manual_seed(0)
    x, rule = torch.randn(4000, 32, generator=generator), torch.randn(24, 32, generator=generator)
    active = largest(x @ rule.T, 6)
    router = linear_start([(24, 32), (24, 24)], False, 0)
    before = judge(router, x, active).at(6)
    fit(router, x, active, 6, PredictorRecipe(1e-2, 20, 256), 0, "rule")
    after = judge(router, x, active).at(6)
    assert before["recall"] < 0.4 and after["recall"] > 0.9
    assert after["precision"] == after["recall"] and after["true"] == 0.25
    assert judge(router, x, active, oracle=True).at(6)["recall"] == 1.0


def test_what_predictors_are_judged_by():
    model = llama()
    manifest = prepared(model).manifest
    assert manifest["notes"] == [] and "1 of them run" in prepared(model, density=0.7).manifest["notes"][0]
    assert set(manifest["ffn"]) == set(manifest["heads"]) == {"1"}
    ffn = manifest["ffn"]["1"]
    assert ffn["k"] == 64 and ffn["true"] == 0.5 and ffn["precision"] == pytest.approx(ffn["recall"], abs=1e-3)
    hidden, taps, norms, marks = 1024 * 64 * 4, 2 * 1008 * 64 * 4, 1008 * 4 * 4, 1008 * 128
    assert manifest["activation_bytes"] == hidden + 2 * taps + norms + marks  # the block before may be listened to
    assert manifest["tokens"] == 1024 and manifest["held_out"] == 51


def test_no_more_activations_are_held_than_stated():
    """Whenever a block's are complete: hidden states of all text, this block's, and what the one before is heard by."""

    def alive():
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    model, before, held = llama(**DEEP), None, []
    text, start = windows(16), alive()
    for found in activations(model, text, ["mlp_in", "block_in"], lambda block, h: (h > 0)[:, None], "test"):
        stated = 1024 * 64 * 4 + found.bytes + (before.bytes if before else 0)
        before = found
        gc.collect()
        held.append((alive() - start) / stated)
    assert len(held) == 3 and max(held) < 1.1, held  # positions of rotary embeddings are beside it


def test_densities_share_what_does_not_depend_on_them():
    """With ReLU a neuron is needed when it is not zero: one predictor serves all densities."""
    model = opt()
    half, quarter = parse(QUICK).prepare(model, data(), [0.5, 0.25])
    assert torch.equal(half.tensors["ffn.1.a"], quarter.tensors["ffn.1.a"])
    assert not torch.equal(half.tensors["heads.1.a"], quarter.tensors["heads.1.a"])
    assert half.tensors["ffn.k"].tolist() == [128, 64] and quarter.tensors["ffn.k"].tolist() == [128, 32]
    gated = list(parse(QUICK).prepare(llama(), data(), [0.75, 0.5]))
    assert not torch.equal(gated[0].tensors["ffn.1.a"], gated[1].tensors["ffn.1.a"])
    assert [a.manifest["ffn"]["1"]["true"] for a in gated] == [0.75, 0.5]
    alone = next(iter(parse(QUICK).prepare(llama(), data(), [0.5])))
    assert alone.hash == gated[1].hash


def test_seconds_are_those_of_the_whole_preparation(monkeypatch):
    """Also of densities that were prepared together, as every other method has it."""
    clock = iter((100.0, 160.0))
    monkeypatch.setattr("methods.dejavu.perf_counter", lambda: next(clock))
    found = list(parse(QUICK).prepare(llama(), data(), [0.75, 0.5]))
    assert [artifact.manifest["seconds"] for artifact in found] == [60.0, 60.0]


def test_equal_recall_lets_blocks_differ():
    model = llama(**{**DEEP, "num_hidden_layers": 4})
    artifact = prepared(model, QUICK + ":parts=ffn:allocation=recall:positives=0.2")
    ks = artifact.tensors["ffn.k"][1:].tolist()
    assert sum(ks) <= 3 * 64 and sum(ks) > 3 * 58 and len(set(ks)) > 1
    recalls = [found["recall"] for found in artifact.manifest["ffn"].values()]
    assert max(recalls) - min(recalls) < 0.02


def test_folding_changes_no_score():
    x, wide, narrow = torch.randn(9, 64), linear_start([(32, 64), (4, 32)], False, 0), None
    narrow = folded(wide)
    assert len(narrow.layers) == 1 and torch.allclose(narrow.score(x), wide.score(x), atol=1e-5)
    kept = folded(linear_start([(16, 64), (128, 16)], False, 0))
    assert len(kept.layers) == 2


def test_what_is_charged():
    model, ids = opt(), windows(2)
    shape = cost.Shape.of(model)
    artifact = create("dejavu", {"rank": 8}).synthesize(model, 0.25, ids)
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=ids)
        spent, _ = cost.record(handle, shape, 100, 1)
    found, d = spent["decode"], 64
    predictors = 8 * (d + 4 * 32) + min(8 * (d + 4), 4 * d)  # one block looked ahead to
    assert found["flops_overhead"] == 2 * predictors == found["bytes_overhead"] // 2
    # OPT: q, k, v stay whole, o and the FFN's two matrices follow the density, attention its heads.
    saved = 0.75 * (2 * (d * d + 2 * d * 128) + 4 * d * 100)
    assert found["flops_dense"] - found["flops"] + 2 * predictors == pytest.approx(saved)


def test_skipping_more_loses_more():
    model = llama(**DEEP)
    losses = []
    for density in (0.75, 0.5, 0.25):
        artifact = create("dejavu", {}).synthesize(model, density, windows(2))
        with sparsify(model, artifact) as handle:
            dense, text = None, windows(8)
            dense = text_loss(handle, text, False)
            with handle.positions(True):
                sparse = model(input_ids=text).logits
            with handle.dense():
                losses.append(float((sparse - model(input_ids=text).logits).square().mean()))
        assert dense > 0
    assert losses == sorted(losses)


def test_bad_options_are_one_sentence():
    for spec, sentence in (
        ("dejavu:parts=attention", "dejavu parts"),
        ("dejavu:ffn_ahead=2", "0 or 1 blocks ahead"),
        ("dejavu:heads_tap=mlp_in:heads_ahead=0", "comes after a block's own attention"),
        ("dejavu:positives=1.5", "positives in"),
        ("dejavu:windows=0", "from 1"),
    ):
        with pytest.raises(UsageError, match=sentence):
            parse(spec)
    assert create("dejavu", {"parts": "ffn"}).unreachable(opt().config, 0.1) is None
    assert "4 KV groups" in create("dejavu", {}).unreachable(opt().config, 0.1)
    with pytest.raises(UsageError, match="cannot reach density 0.1 with 4 KV groups"):
        next(iter(parse(QUICK).prepare(opt(), data(), [0.1])))
    with pytest.raises(UsageError, match="at least 500 tokens"):
        next(iter(parse("dejavu:windows=2").prepare(opt(), data(), [0.5])))
    assert "one norm before attention" in create("dejavu", {}).why_not(type("C", (), {"model_type": "gemma2"})())
    assert "choose rank=64 or less" in create("dejavu", {"rank": 65}).why_not(opt().config)
    few = create("dejavu", {"positives": 0.1})
    assert "choose dejavu:positives=0.25 or more" in few.unreachable(opt().config, 0.5)
    assert few.unreachable(llama(**DEEP).config, 0.5) == few.unreachable(opt().config, 0.5)
    for density in (0.0, 1.5):
        with pytest.raises(UsageError, match=r"choose one in \(0, 1\]"):
            create("dejavu", {"parts": "ffn"}).synthesize(opt(), density, windows(1))


def test_neurons_alone_need_no_groups():
    model = llama(num_key_value_heads=1)
    assert "as lte does" in create("dejavu", {}).why_not(model.config)
    method = create("dejavu", {"parts": "ffn"})
    assert method.why_not(model.config) is None
    with sparsify(model, method.synthesize(model, 0.5, windows(1)), "all"):
        assert torch.isfinite(model(input_ids=windows(1)).logits).all()


def test_an_artifact_without_a_predictor_is_refused(tmp_path):
    """Nothing is drawn in its place: a random predictor would pass for a learned one."""
    model = llama()
    whole = create("dejavu", {}).synthesize(model, 0.5, windows(1))
    for name in ("heads.1.a", "ffn.1.a", "ffn.k"):
        rest = {key: tensor for key, tensor in whole.tensors.items() if key != name}
        dataclasses.replace(whole, tensors=rest).save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=f"has no tensor '{name}'.*prepare --force"):
            with sparsify(model, load_artifact(str(tmp_path / name))):
                pass
    model(input_ids=windows(1))  # what was attached before is off again
    assert not any(type(module).__name__ == "SelectiveHeads" for module in model.modules())
