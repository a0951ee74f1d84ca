"""Polar Sparsity against its definition, through masks, lists and the decode runtime."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache

from harness import cost
from methods import UsageError, sparsify
from methods.families import cached, coarse, groups_for
from methods.registry import create, parse
from methods.runtime import runtime
from methods.shared.heads import group_norms, head_norms
from methods.shared.predictors import Judgement, equal_recall, judge, weighted_loss
from sparse_kernels.selectors import BatchRouter, Router, Tap
from tests.methods.models import MODELS, data, llama, opt, windows
from tests.methods.test_runtime import built, decode

QUICK = "polar:windows=16:epochs=1"
SIX = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


def prepared(model, spec=QUICK, density=0.5):
    return next(iter(parse(spec).prepare(model, data(), [density])))


@pytest.mark.parametrize("kind", ["llama", "opt", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_lists_of_the_runtime_are_the_masks(kind, batch):
    """What is timed is what is evaluated: every sequence attends with its own groups."""
    model = built(kind)
    artifact, prompt = create("polar", {"ffn": "dense"}).synthesize(model, 0.5, windows(2)), windows(batch, 9)
    with sparsify(model, artifact) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
    assert served == 5 * 2 and torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_full_density_is_the_dense_model(kind):
    model, ids = MODELS[kind](), windows(2)
    dense = model(input_ids=ids).logits
    with sparsify(model, create("polar", {"ffn": "dense"}).synthesize(model, 1.0, ids), "all"):
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_neurons_and_heads_hear_the_same_in_the_runtime():
    model, prompt = opt(), windows(1, 9)
    with sparsify(model, create("polar", {}).synthesize(model, 0.5, prompt)) as handle:
        assert {layer.site for layer in handle.layers()} == {"heads", "ffn"}
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
    assert served == 5 * 2 and torch.allclose(found, wanted, atol=2e-4)


def test_layer_0_is_dense_and_the_rest_keeps_exactly_its_share():
    model = llama(**SIX)
    with sparsify(model, create("polar", {}).synthesize(model, 0.5, windows(2)), "all") as handle, handle.meter.on():
        model(input_ids=windows(3))
    counts = {layer: torch.cat(found) for (site, layer), found in handle.meter.counts.items() if site == "heads"}
    assert [counts[layer].unique().tolist() for layer in range(3)] == [[4], [2], [2]]
    spent = cost.site_table(handle)
    assert spent["heads"]["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_heads_left_out_are_zero_before_the_projection(kind):
    model, ids = MODELS[kind](), windows(2)
    seen = []
    with sparsify(model, create("polar", {"ffn": "dense"}).synthesize(model, 0.5, ids), "all") as handle:
        layer = handle.layers()[1]
        hook = layer.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(input_ids=ids)
        hook.remove()
    norms = group_norms(head_norms(seen[0].reshape(2, 64, -1), 4), layer.groups)
    assert ((norms == 0).sum(-1) == layer.groups // 2).all() and ((norms > 0).sum(-1) == layer.groups // 2).all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_is_written_for_all_heads(kind):
    """Keys and values of a layer follow from its input alone, whatever its heads did."""
    model, ids = MODELS[kind](), windows(2)
    artifact = create("polar", {"ffn": "dense"}).synthesize(model, 0.5, ids)
    with sparsify(model, artifact, "all"):
        inputs = []
        blocks = [m for m in model.modules() if hasattr(m, "self_attn")]
        hook = blocks[1].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
        out = model(input_ids=ids, use_cache=True)
        hook.remove()
    value = blocks[1].self_attn.v_proj(inputs[0]).unflatten(-1, (-1, 16)).transpose(1, 2)
    assert torch.allclose(out.past_key_values.layers[1].values, value, atol=1e-5)
    assert (value.flatten(2).norm(dim=-1) > 0).all()


@pytest.mark.parametrize("name", ["polar", "dejavu"])
@pytest.mark.parametrize("kind", MODELS)
def test_steps_of_the_runtime_write_what_dense_ones_do(kind, name):
    """Block 0 is dense in both methods, so block 1 hears the dense model, and leaves heads out only after it wrote."""
    model, ids = MODELS[kind](), windows(2, 15)
    artifact = create(name, {"ffn": "dense"} if name == "polar" else {}).synthesize(model, 0.5, ids)

    def caches():
        cache = StaticCache(config=model.config, max_cache_len=16)
        extra = {"attention_mask": torch.ones(2, 16)} if kind == "opt" else {}
        for start, end in ((0, 9), *((at, at + 1) for at in range(9, 15))):
            place = torch.arange(start, end)[None]
            out = model(input_ids=ids[:, start:end], position_ids=place, **cached(model, cache), **extra)
        return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers], out.logits

    dense, logits = caches()
    with sparsify(model, artifact) as handle, runtime(model, handle):
        found, strayed = caches()
    assert not torch.allclose(strayed, logits, atol=1e-3)
    for own, wanted in zip(found, dense, strict=True):
        for a, b in zip(own, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-5) and (b[:, :, :15].norm(dim=-1) > 0).all()


def test_a_sequence_does_not_depend_on_its_batch():
    model, prompt = llama(**SIX), windows(3, 9)
    with sparsify(model, create("polar", {}).synthesize(model, 0.5, prompt)) as handle, runtime(model, handle):
        together, _ = decode(model, prompt, 5, handle)
        for row in range(3):
            alone, _ = decode(model, prompt[row : row + 1], 5, handle)
            assert torch.allclose(alone[0], together[row], atol=2e-4)


def test_groups_score_their_best_head_or_are_scored_themselves():
    model = llama()
    heads, groups = prepared(model), prepared(model, QUICK + ":outputs=groups")
    assert heads.tensors["heads.1.a"].shape == (4, 64) and groups.tensors["heads.1.a"].shape == (2, 64)
    with sparsify(model, heads) as handle:
        selector = handle.layers()[1].selector
        x = torch.randn(5, 64)
        score = F.linear(x, heads.tensors["heads.1.a"].float(), heads.tensors["heads.1.bias"].float())
        best = score.view(5, 2, 2).amax(-1).argmax(-1)
        selector.tap.value = x
        assert torch.equal(selector(x, x).int().argmax(-1), best)


def test_how_many_groups_run():
    assert [groups_for("polar", 0.3, 72), groups_for("polar", 0.625, 8), groups_for("polar", 0.5, 8)] == [21, 5, 4]
    assert groups_for("polar", 0.7, 10) == 7  # 6.999... in floating point
    with pytest.raises(UsageError, match="choose --density 0.25 or more"):
        groups_for("polar", 0.2, 4)


def test_the_loss_weighs_positives_1_and_negatives_their_share():
    score, active = torch.tensor([[0.3, -1.0, 2.0, 0.5]]), torch.tensor([[True, False, False, False]])
    each = F.binary_cross_entropy_with_logits(score, active.float(), reduction="none")
    expected = (each[0, 0] + 0.255 * each[0, 1:].sum()) / 4
    assert weighted_loss(score, active, 0.005) == pytest.approx(float(expected))


def test_a_batch_is_ranked_by_what_is_positive():
    score = torch.tensor([[3.0, -9.0, 1.0, -1.0, -2.0], [-8.0, -9.0, 1.5, -3.0, -0.5]])
    router = BatchRouter((torch.eye(5),), [1, 3])
    for k, wanted in ((2, [0, 2]), (3, [0, 2, 4]), (4, [0, 2, 3, 4])):
        router.ks = [1, k]
        index, count = router.select(score)[2:]
        assert index[: int(count)].tolist() == wanted
    single, count = router.select(score[1:])[2:]
    assert single[: int(count)].tolist() == [2]
    assert [router.k_for(rows) for rows in (1, 2, 64)] == [1, 4, 4]
    assert not router.idle(1) and not router.idle(2)
    most = BatchRouter((torch.eye(6),), [2, 4, 5])
    assert most.ks == [2, 4, 6] and not most.idle(2) and most.idle(4)  # 5 of 6 are more than 0.8
    many = BatchRouter((torch.eye(6),), [2, 2, 2, 2, 2, 3, 3])
    assert [many.idle(rows) for rows in (1, 16, 17, 32, 33, 64)] == [False] * 4 + [True] * 2  # and 3 than 0.45
    most.tap = Tap()
    most.tap.value = torch.randn(4, 6)
    assert most(torch.empty(4, 1, 6), torch.empty(0)).all()


def test_neurons_are_left_out_of_relu_models_alone():
    assert not any(name.startswith("ffn") for name in prepared(llama()).tensors)
    artifact = prepared(opt())
    ks = artifact.tensors["ffn.0.k"]
    assert len(ks) == len(BatchRouter.SIZES) and (ks.diff() >= 0).all() and ks[0] >= 1
    assert artifact.manifest["ffn"]["0"]["recall"] >= 0.99
    assert not any(name.startswith("ffn") for name in prepared(opt(), QUICK + ":ffn=dense").tensors)
    with pytest.raises(UsageError, match="needs a model with ReLU, this one has silu"):
        prepared(llama(), QUICK + ":ffn=sparse")


def test_all_neurons_that_are_active_suffice():
    """A selection that holds every positive neuron changes nothing with ReLU."""
    model, ids = opt(), windows(2)
    dense = model(input_ids=ids).logits
    oracle = prepared(model, QUICK + ":selector=oracle:recall=1", density=1.0)
    with sparsify(model, oracle, "all") as handle, handle.meter.on():
        assert torch.allclose(model(input_ids=ids).logits, dense, atol=2e-2)
        assert cost.site_table(handle)["ffn"]["mean"] < 0.9


def test_a_batch_that_runs_what_any_of_it_needs_is_dense():
    """And one neuron less is not: here the router scores what it has to predict."""
    model = opt()
    dense, rows = model.model.decoder.layers[0], torch.randn(3, 64)
    dense.fc1.bias.zero_()
    dense.fc1.weight[::3].copy_(-dense.fc1.weight[::3].abs())
    rows = rows.abs()  # so that a third of the neurons is silent for all rows
    active = dense.fc1(rows) > 0
    needed, expected = int(active.any(0).sum()), dense.fc2(dense.fc1(rows).relu())
    assert active.sum(1).max() < needed < 0.8 * 128
    artifact = create("polar", {}).synthesize(model, 0.5, windows(1))
    with sparsify(model, artifact, "all") as handle:
        ffn = next(layer for layer in handle.layers() if layer.site == "ffn")
        for ks, same in (([needed], True), ([needed - 1], False), ([128], True)):
            ffn.selector = BatchRouter((ffn.up.weight,), ks)
            ffn.selector.tap = Tap()
            ffn.selector.tap.value = rows
            with handle.sparse():
                assert torch.allclose(ffn(rows), expected, atol=1e-6) == same


def test_the_kernels_choose_neurons_for_the_batch(device):
    model = opt()
    artifact = create("polar", {}).synthesize(model, 0.5, windows(2))
    with sparsify(model, artifact, "all") as handle:
        ffn = [layer for layer in handle.layers() if layer.site == "ffn"][1]
        rows = torch.randn(3, 64)
        ffn.selector.tap.value = torch.randn(3, 64)
        score, threshold, index, count = ffn.selector.select(rows)
        # 4 tokens run 1 - 0.905 ** (4 ** 0.57) of 128 neurons, one token 0.095 of them
        assert int(count) == 25 and ffn.selector.k == 12 and (score > threshold).all()
        keep = torch.zeros(128, dtype=torch.bool).index_fill_(0, index[: int(count)].long(), True)
        expected = ffn.down(ffn.hidden(rows).squeeze(-1) * keep)
        assert torch.allclose(ffn._skip(rows, ffn.selector), expected, atol=1e-5)
        with handle.sparse():
            assert torch.allclose(ffn(rows), expected, atol=1e-5)
            tap = ffn.selector.tap
            tap.value = tap.value[:, None]  # three sequences of one token
            assert torch.allclose(ffn(rows), expected, atol=1e-5)
            tap.value = tap.value.transpose(0, 1)  # a text of three tokens, each with neurons of its own
            assert not torch.allclose(ffn(rows), expected, atol=1e-3)


def test_what_is_charged():
    model, ids = llama(**SIX), windows(2)
    shape = cost.Shape.of(model)
    artifact = create("polar", {}).synthesize(model, 0.5, ids)
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=ids)
        spent, density = cost.record(handle, shape, 100, 1)
    decode_ = spent["decode"]
    router = 2 * (8 * 64 + 8)  # two blocks, heads x width and a bias
    assert decode_["flops_overhead"] == 2 * router and decode_["bytes_overhead"] == 4 * router
    kv = 2 * 4 * 8 * 100 * 4  # K and V x groups x head size x tokens x 4 B, a block
    assert decode_["bytes_kv"] == kv + 2 * kv // 2
    assert decode_["flops_dense"] - decode_["flops"] + 2 * router == 2 * 0.5 * (4 * 64 * 100 + 2 * 64 * 64)
    assert density["sites"]["heads"]["layers"] == [1.0, 0.5, 0.5]


def test_an_oracle_is_charged_for_the_attention_of_all_heads():
    model, ids = llama(**SIX), windows(2)
    shape = cost.Shape.of(model)
    artifact = create("polar", {"selector": "oracle"}).synthesize(model, 0.5, ids)
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=ids)
        spent, density = cost.record(handle, shape, 100, 1)
    found, o = spent["decode"], 2 * 0.5 * 64 * 64  # of two blocks
    assert density["sites"]["heads"]["layers"] == [1.0, 0.5, 0.5]
    assert found["flops_dense"] - found["flops"] == 2 * o and found["bytes_dense"] - found["bytes"] == 4 * o
    assert spent["prefill"]["flops_dense"] - spent["prefill"]["flops"] == 2 * o * 100


@pytest.mark.parametrize("active, whole", [(0.01, False), (0.2, True)])
def test_a_batch_is_charged_what_its_steps_ran(active, whole):
    """All of its rows run the same neurons, and the router costs something where it is asked."""
    model, prompt = opt(), windows(17, 4)
    shape = cost.Shape.of(model)
    with sparsify(model, create("polar", {"active": active}).synthesize(model, 0.5, prompt)) as handle:
        ffns = [layer for layer in handle.layers() if layer.site == "ffn"]
        with handle.meter.on():
            with handle.sparse():
                model(input_ids=prompt)  # as quality is evaluated: every token with neurons of its own
            decode(model, prompt, 3, handle)
        spent, density = cost.record(handle, shape, 100, 17)
        alone = cost.record(handle, shape, 100, 1)[0]["decode"]
    heads = 4 * 64 + 4  # one block, heads x width and a bias
    neurons = 2 * (16 * 64 + 128 * 16)  # two blocks
    assert all(layer.idle(17) == whole and not layer.idle(1) for layer in ffns)
    assert spent["decode"]["flops_overhead"] == 2 * (heads + (0 if whole else neurons))
    assert alone["flops_overhead"] == 2 * (heads + neurons)
    share = ffns[0].selector.k_for(17) / 128
    assert (share == 1) == whole
    saved = (1 - share) * 2 * 2 * 64 * 128 * 2 + 0.5 * (2 * 64 * 64 + 4 * 64 * 100)
    found = spent["decode"]["flops_dense"] - spent["decode"]["flops"] + spent["decode"]["flops_overhead"]
    assert found == pytest.approx(saved)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert density["model"] == pytest.approx(1 - ((1 - share) * 4 * 64 * 128 + 0.5 * 64 * 64) / weights, abs=1e-5)


def test_learned_routers_find_the_heads_that_matter():
    """On a model whose heads' sizes depend on the token, learning beats chance by a wide margin."""
    model = llama(**SIX)
    spec = "polar:windows=16:epochs=20:batch=64:outputs=groups"
    learned, chance = prepared(model, spec).manifest["heads"], prepared(model, spec + ":selector=random")
    for block, found in learned.items():
        assert found["recall"] > chance.manifest["heads"][block]["recall"] + 0.1
        assert found["true"] == 0.5 and found["k"] == 2


def test_the_critical_density_is_the_smallest_within_the_budget():
    model = llama(**SIX)
    strict, loose = (prepared(model, f"{QUICK}:budget={b}", 0.25) for b in (1e-9, 100.0))
    assert loose.manifest["critical_density"] == 0.25 and loose.tensors["heads.k"].tolist() == [4, 1, 1]
    rises = strict.manifest["perplexity_rise"]
    k = round(4 * strict.manifest["critical_density"])
    assert strict.tensors["heads.k"].tolist() == [4, k, k]
    assert all(rise > 1e-9 for density, rise in rises.items() if float(density) < k / 4)
    assert rises[f"{k / 4:.3f}"] <= 1e-9


def test_a_batch_is_judged_by_tokens_of_different_texts():
    """Eight held-out windows of eight tokens, each with a neuron of its own: any batch needs as many as it has rows."""
    active = torch.eye(8, dtype=torch.bool).repeat_interleave(8, 0).repeat(20, 1)  # the last 64 of 1280 tokens judge
    for size in (1, 2, 4, 8):
        found = judge(Router((torch.eye(8),)), active.float(), active, size, oracle=True)
        assert found.active == size and found.needed(1.0) == size
    everything = judge(Router((torch.eye(8),)), active.float(), active, 64, oracle=True)
    assert everything.active == 8 and everything.hits[-1] == 8


def test_equal_recall_spends_what_is_given():
    easy, hard = torch.tensor([0.9, 1.0, 1.0, 1.0]), torch.tensor([0.3, 0.6, 0.9, 1.0])
    known = {i: Judgement(curve, curve, 1.0, 1.0) for i, curve in enumerate((easy, hard))}
    assert equal_recall(known, 2) == {0: 1, 1: 3}


def test_what_cannot_be_served_is_one_sentence():
    method = create("polar", {})
    config = llama().config
    for changes, sentence in (
        ({"num_key_value_heads": 1}, "more than one KV group .* has one for its 4 heads: choose"),
        ({"num_key_value_heads": 3}, "cannot be grouped by 3: choose another model"),
        ({"model_type": "gemma2"}, "one norm before attention"),
    ):
        changed = type(config)(**{**config.to_dict(), "num_key_value_heads": 2})
        for name, value in changes.items():
            setattr(changed, name, value)
        assert re.search(sentence, method.why_not(changed))
    assert "choose rank=64 or less" in create("polar", {"rank": 65}).why_not(config)
    assert method.unreachable(llama().config, 0.5) is None
    assert coarse(0.5, 4) == [] and "2 of them run, density 0.500" in coarse(0.7, 4)[0]
    assert "choose --density 0.5 or more" in method.unreachable(llama().config, 0.49)
    with pytest.raises(UsageError, match="add --density"):
        method.synthesize(llama(), None, windows(1))
    with pytest.raises(UsageError, match="did you mean groups"):
        parse("polar:outputs=group")
    with pytest.raises(UsageError, match="recall and active in"):
        parse("polar:recall=2")


def test_routers_go_on_where_they_stopped(tmp_path):
    place = dataclasses.replace(data(), workspace=str(tmp_path))
    first = next(iter(parse(QUICK).prepare(opt(), place, [0.5])))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 3 and all(name.startswith("polar-") for name in files)  # two FFNs, one block's heads
    again = next(iter(parse(QUICK).prepare(opt(), place, [0.5])))
    assert again.hash == first.hash
