from __future__ import annotations

import pytest
import torch

from harness import latency
from methods import sparsify
from methods.registry import parse
from tests.methods.models import data, llama, opt, windows


@pytest.mark.parametrize("make", [llama, opt])
def test_the_static_decode_step_is_greedy_decoding_and_rewinds(make: object) -> None:
    from harness.fidelity import greedy

    model, prompt = make(), windows(2, 12)  # type: ignore[operator]
    with torch.inference_mode():
        expected = greedy(model, prompt, 6)[:, 12:]
        decoder = latency.Decoder(model, prompt, 8)
        for _ in range(2):  # the second time from a rewound, dirty cache
            decoder.rewind()
            tokens = [decoder.token.clone()]
            for _ in range(5):
                decoder.step(model.forward)
                tokens.append(decoder.token.clone())
            assert torch.equal(torch.cat(tokens, 1), expected)


def test_cpu_latency_is_labelled_and_interleaved() -> None:
    model = llama()
    bench = latency.Bench(model, windows(2, 16), None)
    artifact = next(iter(parse("teal:allocation=uniform").prepare(model, data(), [0.5])))
    with sparsify(model, artifact) as handle:
        found = bench.measure(handle, lambda: 1, lambda a, b: None)
        unions = {key: len(values) for key, values in handle.meter.unions.items()}
    assert found["path"] == "cpu-reference" and found["batch"] == 2
    assert set(found["samples"]) == {"dense cpu", "sparse cpu"}
    rounds = {len(blocks) for blocks in found["samples"].values()}
    assert len(rounds) == 1 and rounds.pop() >= latency.MIN_ROUNDS
    assert found["ci"][0] <= found["speedup"] <= found["ci"][1]
    assert "fraction_of_limit" not in found  # no byte limit without a measured bandwidth
    assert len(unions) == 14 and set(unions.values()) == {latency.CPU_STEPS}


def test_dense_alone_has_no_speedup() -> None:
    model = llama()
    bench = latency.Bench(model, windows(1, 16), None)
    with sparsify(model, parse("dense").artifact(model, None, {}, {})) as handle:
        found = bench.measure(handle, lambda: 1, lambda a, b: None)
    assert "speedup" not in found and found["runner"] == found["baseline"] == "dense cpu"


def test_a_slower_method_is_called_slower() -> None:
    model = llama()
    bench = latency.Bench(model, windows(1, 16), None)
    with sparsify(model, parse("null").artifact(model, None, {}, {})) as handle:
        layer = handle.layers()[0]
        honest = layer.forward

        def slow(x: torch.Tensor) -> torch.Tensor:
            if handle.phase.active is True:
                for _ in range(300):
                    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            return honest(x)

        layer.forward = slow
        found = bench.measure(handle, lambda: 1, lambda a, b: None)
    assert found["verdict"] == "slower" and found["speedup"] < 0.9


def test_summary_keeps_every_sample() -> None:
    found = latency.summary([[1.0, 2.0], [3.0, 100.0]])
    assert found["n"] == 4 and found["median"] == 2.5 and found["p90"] > 50
