"""Counts are exact: against torch's own FLOP counter, against published figures, and null against dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from harness import cost
from methods import sparsify
from methods.registry import create, parse
from tests.methods.models import MODELS, data, gemma2, gemma3n, llama, windows


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_dense_flops_match_torchs_counter(make: object) -> None:
    model, context = make(), 20  # type: ignore[operator]
    out = model(input_ids=windows(1, context - 1), use_cache=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=windows(1, 1), past_key_values=out.past_key_values)
    shape = cost.Shape.of(model)
    full = cost.dense_layers(shape)
    counted = counter.get_total_flops()
    attention = 4 * sum(shape.query.values()) * context
    rotation = model.config.hidden_size // model.config.num_attention_heads
    # torch counts attention only where it knows the kernel, and the product of position and frequencies only where
    # transformers writes it as one of matrices; the linear layers it must count alike.
    found = cost.decode_cost(shape, full, full, 0, context, 1)
    assert found.flops_dense == found.flops
    assert counted - found.flops_dense in (0, -attention, rotation, rotation - attention)


def test_null_costs_exactly_what_dense_costs() -> None:
    for make in MODELS.values():
        model = make()
        shape = cost.Shape.of(model)
        artifact = create("null", {}).artifact(model, None, {}, {})
        with sparsify(model, artifact, "all") as handle, handle.meter.on():
            model(input_ids=windows(3))
            blocks, density = cost.record(handle, shape, 64, 1)
        decode, prefill = blocks["decode"], blocks["prefill"]
        assert decode["flops"] == decode["flops_dense"] and decode["bytes"] == decode["bytes_dense"]
        assert decode["flops_overhead"] == decode["bytes_overhead"] == 0
        assert prefill["flops"] == prefill["flops_dense"]
        assert density is not None and density["model"] == 1.0
        assert {site["p99"] for site in density["sites"].values()} == {1.0}


def test_llama2_7b_in_the_units_of_the_lte_paper() -> None:
    """LTE, table 1: 12.06 'GFLOPs' a token are 2^30 FLOPs of the block linears; its LTE rows include the router."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    shape = cost.Shape.of(model)
    assert 2 * shape.dense / 2**30 == pytest.approx(12.0625)
    routers = 32 * 4096 * (11008 // 32)
    for active, printed in ((0.311, 6.59), (0.070, 4.65), (0.161, 5.38)):
        found = {k: active if k[1] in ("gate", "up", "down") else 1.0 for k in shape.linears}
        spent = cost.decode_cost(shape, found, found, routers, 0, 1)
        assert (spent.flops - 2 * shape.head) / 2**30 == pytest.approx(printed, abs=0.01)
    full = cost.dense_layers(shape)
    # fp32 on the meta device: twice the 13.21 GB that 7B weights in two bytes take per token
    assert cost.decode_cost(shape, full, full, 0, 0, 1).bytes == pytest.approx(2 * 13.21e9, rel=1e-3)


def test_densities_and_percentiles_come_from_the_meter() -> None:
    model = llama()
    shape = cost.Shape.of(model)
    artifact = next(iter(parse("teal:allocation=uniform").prepare(model, data(), [0.5])))
    with sparsify(model, artifact, "decode") as handle:
        for index in range(2):
            for site, linear in (("q", 64), ("down", 128)):
                counts = torch.tensor([linear // 2] * 99 + [linear], dtype=torch.int32)
                handle.meter.counts[site, index].append(counts)
                handle.meter.unions[site, index].append(torch.tensor(linear))
        tokens, union = cost.densities(handle, shape), cost.densities(handle, shape, unions=True)
        sites = cost.site_table(handle)
        handle.meter.unions.clear()  # as where a batch was multiplied densely
        spent, density = cost.record(handle, shape, 8, 2)
    assert spent["decode"]["bytes"] == spent["decode"]["bytes_dense"] and density is not None and density["union"] == 1
    assert tokens[0, "q"] == pytest.approx(0.505) and tokens[0, "v"] == 1.0 and union[0, "q"] == 1.0
    assert sites["down"] == {
        "mean": 0.505,
        "p99": 1.0,
        "layers": [0.505, 0.505],
        "spread": [[0.5, 0.5, 0.5]] * 2,
        "units": [128, 128],
        "histogram": [0] * 16 + [198] + [0] * 15 + [2],
    }
    exact = cost._histogram(torch.tensor([0, 1, 3, 3, 28]).double() / 28, 28)  # a bin per unit, and one for none
    assert exact == [1, 1, 0, 2] + [0] * 24 + [1]
    weights = {"q": 64 * 64, "down": 64 * 128}
    missing = 2 * 0.495 * sum(weights.values())
    assert cost.model_density(shape, tokens) == pytest.approx(1 - missing / shape.dense)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_sequences_use_together(make: Any) -> None:
    """Position by position over sequences, in order and across passes; dense positions do not count."""
    model, ids, late = make(), windows(5), torch.arange(64) >= 40
    artifact = next(iter(parse("d2dmoe:expert_size=8:steps=0:windows=16:epochs=1").prepare(model, data(), [0.4])))
    keeps: list[torch.Tensor] = []
    with sparsify(model, artifact) as handle:
        handle.layers()[0].selector.register_forward_hook(lambda m, a, keep: keeps.append(keep.reshape(-1, 64, 16)))
        with handle.meter.on():
            for part in ids.split(3):
                with handle.positions(late.expand(len(part), -1)):
                    model(input_ids=part)
        site = cost.site_table(handle)["ffn"]
        means = handle.meter.together["ffn", 0].means
    keep = torch.cat(keeps)[:, late].double()
    assert means.keys() == {1, 2, 4} and site["units"] == [16, 16]
    for n, found in means.items():
        assert float(found[0]) == pytest.approx(float(keep[:n].amax(0).sum(-1).mean()))
    assert 0.3 < site["unions"]["1"] < site["unions"]["2"] < site["unions"]["4"] < 1
    low, middle, high = site["spread"][0]
    assert low <= middle <= high and low < site["layers"][0] < high
    assert middle == pytest.approx(
        float(keep.sum(-1).flatten().sort().values[keep[..., 0].numel() // 2]) / 16, abs=1e-4
    )


def test_bytes_share_weights_over_the_batch_but_not_the_cache() -> None:
    shape = cost.Shape.of(llama())
    full = cost.dense_layers(shape)
    one, eight = (cost.decode_cost(shape, full, full, 0, 100, b) for b in (1, 8))
    assert (
        one.bytes_kv == eight.bytes_kv == 2 * 2 * 2 * 16 * 100 * 4
    )  # layers x (k, v) x heads x head size x tokens x 4 B
    assert eight.bytes_weights == pytest.approx(one.bytes_weights / 8) and one.flops == eight.flops


def test_prefill_grows_with_the_share_of_sparse_positions() -> None:
    shape = cost.Shape.of(llama())
    half = dict.fromkeys(shape.linears, 0.5)
    dense, middle, all_sparse = (cost.prefill_cost(shape, half, 0, 100, share) for share in (0.0, 0.5, 1.0))
    assert dense.flops == dense.flops_dense
    assert dense.flops - middle.flops == middle.flops - all_sparse.flops == shape.dense * 50


def mistral() -> Any:
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)).eval()  # type: ignore[arg-type]


# By block: the window, and query width and elements of keys and values.
WINDOWS: dict[Any, tuple[list[int | None], int, int]] = {
    llama: ([None] * 2, 64, 2 * 2 * 16),
    mistral: ([8] * 2, 64, 2 * 2 * 16),
    gemma2: ([12, None], 4 * 32, 2 * 2 * 32),
    gemma3n: ([10, None] * 2, 64, 2 * 2 * 16),  # the last two borrow
}


@pytest.mark.parametrize("make", WINDOWS)
def test_attention_is_charged_for_what_a_window_lets_it_see(make: Any) -> None:
    model = make() if make in (llama, mistral) else make(sliding_window=WINDOWS[make][0][0])
    model.set_attn_implementation("eager")
    layers, width, kv = WINDOWS[make]
    with torch.no_grad():
        weights = model(input_ids=windows(1, 40), output_attentions=True, use_cache=False).attentions
    shape = cost.Shape.of(model)
    full = cost.dense_layers(shape)
    for n in (5, 12, 40):
        # Whatever has a weight was multiplied; the heads of a layer see the same.
        pairs = [int((w[0, 0, :n] > 0).sum()) for w in weights]
        seen = [int((w[0, 0, n - 1] > 0).sum()) for w in weights]
        assert seen == [min(n, window or n) for window in layers]
        found, prompt = cost.decode_cost(shape, full, full, 0, n, 1), cost.prefill_cost(shape, full, 0, n, 0.5)
        assert found.flops == found.flops_dense == 2 * (shape.dense + shape.head) + 4 * width * sum(seen)
        assert found.bytes == found.bytes_dense and found.bytes_kv == 4 * kv * sum(seen)
        assert prompt.flops == prompt.flops_dense == 2 * (shape.dense * n + shape.head) + 4 * width * sum(pairs)


def test_heads_are_left_out_of_what_a_window_shows() -> None:
    shape = cost.Shape.of(gemma2(sliding_window=12))
    full = cost.dense_layers(shape)
    half = {**full, (0, "attention"): 0.5}  # the layer with the window
    found, prompt = cost.decode_cost(shape, half, full, 0, 40, 1), cost.prefill_cost(shape, half, 0, 40, 0.5)
    assert found.flops_dense - found.flops == 0.5 * 4 * 128 * 12
    assert found.bytes_dense - found.bytes == 0.5 * 4 * 128 * 12
    assert prompt.flops_dense - prompt.flops == 0.5 * 4 * 128 * 12 * 20  # from the 21st token on


def test_attention_follows_each_sequence_and_its_projection_the_union() -> None:
    """Half of the heads for every sequence: half of the scores and of the cache, whatever the batch has in common."""
    shape = cost.Shape.of(llama())
    full = cost.dense_layers(shape)
    half = {**full, (0, "attention"): 0.5, (1, "attention"): 0.5}
    dense, sparse = (cost.decode_cost(shape, found, full, 0, 100, 4) for found in (full, half))
    assert 2 * sparse.bytes_kv == dense.bytes_kv and sparse.bytes_dense == dense.bytes
    assert dense.flops - sparse.flops == 2 * 2 * 64 * 100  # half of 4 x layers x width x tokens
    assert sparse.bytes_weights == dense.bytes_weights
    prompt = [cost.prefill_cost(shape, half, 0, 100, share) for share in (0.0, 1.0)]
    assert prompt[0].flops == prompt[0].flops_dense
    assert prompt[0].flops - prompt[1].flops == 2 * 64 * 100 * 101  # half of 2 x layers x width x tokens (tokens + 1)
