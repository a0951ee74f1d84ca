from __future__ import annotations

import math

import pytest
import torch

from harness import fidelity
from methods import sparsify
from methods.registry import create, parse
from tests.methods.models import data, llama, opt, windows


def measure(
    model: torch.nn.Module, spec: str, dense: fidelity.DenseReference, mode: str = "decode", density: float = 0.4
):  # type: ignore[no-untyped-def]
    method = parse(spec)
    artifact = next(iter(method.prepare(model, data(), [None if method.densities == (None,) else density])))
    with sparsify(model, artifact, mode) as handle:
        return fidelity.measure(model, handle, windows(5, 64, seed=9), dense, 3.0, 2, lambda a, b: None)


@pytest.mark.parametrize("make", [llama, opt])
def test_null_is_dense_and_a_sparse_model_is_not(make: object) -> None:
    model, dense = make(), fidelity.DenseReference()  # type: ignore[operator]
    block, items = measure(model, "dense", dense)
    assert block["kl"] == 0 and block["greedy_agreement"] == 1
    null, null_items = measure(model, "null", dense)
    assert null["perplexity"] == block["perplexity"] and null_items["nll"] == items["nll"]
    assert null["kl"] < 1e-5 and null["greedy_agreement"] == 1
    sparse, sparse_items = measure(model, "teal:allocation=uniform", dense)
    assert sparse["kl"] > 1e-3
    assert len(sparse_items["nll"]) == len(sparse_items["tokens"]) == 5 and sparse["tokens"] == 5 * 32


def test_dense_numbers_follow_their_definitions() -> None:
    model, dense = llama(), fidelity.DenseReference()
    block, items = measure(model, "dense", dense)
    ids = windows(5, 64, seed=9)
    logits = model(input_ids=ids).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")[:, -32:]
    assert items["nll"] == pytest.approx(nll.mean(1).tolist(), rel=1e-5)
    assert block["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert block["bits_per_byte"] == pytest.approx(float(nll.mean()) / math.log(2) / 3, rel=1e-5)


def test_scored_positions_are_the_ones_fed_while_decoding() -> None:
    """Context [0, 32), scored tokens [32, 64): the last context token is the first decode step's input."""
    mask = fidelity.scored_mask(windows(1, 64), 32)[0]
    assert len(mask) == 63 and mask.sum() == 32 and mask[31:].all() and not mask[:31].any()
    model = llama()
    artifact = next(iter(parse("teal:allocation=uniform").prepare(model, data(), [0.4])))
    with sparsify(model, artifact, "decode") as handle, handle.meter.on():
        block = fidelity.measure(model, handle, windows(3), fidelity.DenseReference(), 3.0, 3, lambda a, b: None)
        counted = {len(torch.cat(found)) for found in handle.meter.counts.values()}
    assert counted == {3 * 32} and block[0]["scored"] == 32


def test_modes_sparsify_more_and_more() -> None:
    model = llama()
    handles = {}
    for mode in ("decode", "last-50%", "all"):
        with sparsify(model, create("null", {}).artifact(model, None, {}, {}), mode) as handle:
            active = fidelity.active_positions(handle, windows(2), 32)
            handles[mode] = 2 * 63 if active is True else int(active.sum())  # type: ignore[union-attr]
    assert handles == {"decode": 64, "last-50%": 2 * (32 + 16), "all": 126}


def test_greedy_matches_generate() -> None:
    model = llama()
    model.generation_config.pad_token_id = 0
    prompts = windows(2, 12)
    expected = model.generate(prompts, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(fidelity.greedy(model, prompts, 10), expected)


def test_kernel_check_sees_a_path_that_computes_something_else() -> None:
    """A method whose decode step differs from its batched pass must not go unnoticed."""
    model = llama()
    artifact = next(iter(parse("teal:allocation=uniform").prepare(model, data(), [0.4])))
    with sparsify(model, artifact, "decode") as handle:
        layer = handle.layers()[0]
        honest = type(layer).forward

        def cheating(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            return honest(self, x) * (1.2 if x.shape[1] == 1 else 1.0)

        layer.forward = cheating.__get__(layer)
        assert fidelity.kernel_check(model, handle, windows(1), 32) > 1e-3
        layer.forward = honest.__get__(layer)
        assert fidelity.kernel_check(model, handle, windows(1), 32) < 1e-6
    assert fidelity.kernel_tolerance(None) == fidelity.kernel_tolerance({"kl": 0.0}) == 0.01
    assert fidelity.kernel_tolerance({"kl": 0.6}) == pytest.approx(0.3)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize("name", ["null", "teal"])
def test_block_check_sees_a_block_that_computes_something_else(name, make, monkeypatch):
    from methods.runtime import Projection

    model = make()
    method = create(name, {})
    artifact = next(iter(method.prepare(model, data(), [0.5 if name == "teal" else None])))
    with sparsify(model, artifact) as handle:
        errors = fidelity.block_check(model, handle, windows(1))
        assert errors.output < 1e-4 and errors.reads == 0
        assert not handle.meter.counts and not handle.meter.unions
        call = Projection.__call__
        monkeypatch.setattr(Projection, "__call__", lambda self, x, **o: (call(self, x, **o)[0] * 1.2, None))
        assert fidelity.block_check(model, handle, windows(1)).output > fidelity.BLOCK_TOLERANCE
