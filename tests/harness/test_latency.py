from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import latency, machine, prefill
from harness.decoder import WARM_STEPS, Decoder, Runner
from methods import SparseModel, sparsify
from methods.registry import parse
from tests.methods.models import data, gemma2, llama, opt, windows


def step() -> dict[str, Any]:
    return {"density": 0.5, "bytes": 1000, "bytes_dense": 2000, "bytes_8bit": 1000}


def unchecked(text: torch.Tensor, steps: int, cache: Any) -> float:
    return 0.0


@contextmanager
def attached(model: Any, spec: str = "teal:allocation=uniform", mode: str = "decode") -> Iterator[SparseModel]:
    method = parse(spec)
    artifact = next(iter(method.prepare(model, data(), [None if method.densities == (None,) else 0.5])))
    with sparsify(model, artifact, mode) as handle:
        yield handle


@pytest.mark.parametrize("make", [llama, opt, gemma2])
def test_the_static_decode_step_is_greedy_decoding_and_rewinds(make: object) -> None:
    from harness.fidelity import greedy

    model, prompt = make(), windows(2, 12)  # type: ignore[operator]
    with torch.inference_mode():
        expected = greedy(model, prompt, 6)[:, 12:]
        decoder = Decoder(model, prompt, 8)
        for _ in range(2):  # the second time from a rewound, dirty cache
            decoder.rewind()
            tokens = [decoder.token.clone()]
            for _ in range(5):
                decoder.step(model.forward)
                tokens.append(decoder.token.clone())
            assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.parametrize(("make", "sites"), [(llama, 7), (opt, 6)])
def test_cpu_latency_is_labelled_and_interleaved(make: Any, sites: int) -> None:
    model = make()
    bench = latency.Bench(model, windows(2, 16), None)
    artifact = next(iter(parse("teal:allocation=uniform").prepare(model, data(), [0.5])))
    with sparsify(model, artifact) as handle:
        found = bench.measure(handle, step, unchecked, lambda a, b: None)
        unions = {key: len(values) for key, values in handle.meter.unions.items()}
    assert found["path"] == "cpu-reference" and found["batch"] == 2
    assert set(found["samples"]) == {"dense cpu", "sparse cpu"}
    rounds = {len(blocks) for blocks in found["samples"].values()}
    assert len(rounds) == 1 and rounds.pop() >= latency.MIN_ROUNDS
    assert found["ci"][0] <= found["speedup"] <= found["ci"][1]
    assert "fraction_of_limit" not in found  # no byte limit without a measured bandwidth
    assert len(unions) == 2 * sites and set(unions.values()) == {latency.CPU_STEPS}


@pytest.mark.parametrize(
    ("spec", "mode", "caches"),
    [
        ("teal:allocation=uniform", "decode", 1),
        ("teal:allocation=uniform", "all", 2),
        ("lte:stage1_steps=1:stage2_steps=1:trials=1:batch=2:lr=0.01", "decode", 2),
    ],
)
def test_runners_share_the_cache_of_a_dense_prompt(spec: str, mode: str, caches: int) -> None:
    model = llama()
    bench = latency.Bench(model, windows(2, 16), None)
    dense = bench.dense[0].text(latency.CPU_STEPS)
    with attached(model, spec, mode) as handle:
        sparse = bench._runners("sparse", handle)[0]
        assert len({id(runner.decoder.cache) for runner in (*bench.dense, sparse)}) == caches
        with handle.sparse():
            taken_turns = [sparse.text(latency.CPU_STEPS) for _ in range(2)]
    for layer in bench.dense[0].decoder.cache.layers:
        layer.keys.fill_(3.0)  # type: ignore[attr-defined]
    assert not torch.equal(bench.dense[0].text(latency.CPU_STEPS), dense)
    bench.refill()
    assert torch.equal(bench.dense[0].text(latency.CPU_STEPS), dense)
    assert torch.equal(*taken_turns) and not torch.equal(taken_turns[0], dense)


def test_dense_alone_has_no_speedup() -> None:
    model = llama()
    bench = latency.Bench(model, windows(1, 16), None)
    with sparsify(model, parse("dense").artifact(model, None, {}, {})) as handle:
        found = bench.measure(handle, step, unchecked, lambda a, b: None)
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
        found = bench.measure(handle, step, unchecked, lambda a, b: None)
    assert found["verdict"] == "slower" and found["speedup"] < 0.9


def test_summary_keeps_every_sample() -> None:
    found = latency.summary([[1.0, 2.0], [3.0, 100.0]])
    assert found["n"] == 4 and found["median"] == 2.5 and found["p90"] > 50


def test_shares_of_the_byte_limit_stand_beside_every_latency() -> None:
    model = llama()
    bench = latency.Bench(model, windows(1, 16), bandwidth=1e7)
    with attached(model, "null") as handle:
        found = bench.measure(handle, step, unchecked, lambda a, b: None)
    assert found["step"] == step() and found["limit_ms"] == pytest.approx(0.1)
    assert found["fraction_of_limit"] == pytest.approx(0.1 / found["median"])
    (dense,) = found["dense"].values()
    assert dense["fraction_of_limit"] == pytest.approx(0.2 / dense["median"])


@pytest.mark.parametrize(
    ("rounds", "noise", "seconds", "reason"),
    [
        (3, [0.02], 1, None),
        (3, [0.005], 1, "noise under target"),
        (6, [0.04, 0.03, 0.03, 0.02], 1, None),
        (6, [0.04, 0.04, 0.04, 0.039], 1, "noise has settled"),
        (8, [0.1, 0.08, 0.07, 0.06, 0.05, 0.04], 1, "at the limit of rounds"),
        (4, [0.1, 0.08], 100, "at the time limit"),
    ],
)
def test_a_run_says_why_it_stopped(rounds: int, noise: list[float], seconds: float, reason: str | None) -> None:
    assert latency._stop(rounds, noise, seconds) == reason


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize(("mode", "ways"), [("decode", ["dense"]), ("all", ["dense", "method"])])
def test_a_prompt_runs_in_its_mode_and_over_the_single_storage(make: Any, mode: str, ways: list[str]) -> None:
    model, prompt = make(), windows(2, 16)
    weights = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    decoder = Decoder(model, prompt, 8)
    with attached(model, mode=mode) as handle:
        found = prefill.measure(model, handle, decoder)
        assert not handle.meter.counts
    assert list(found["prefill"]) == ["tokens", *ways, "single storage"] and found["prefill"]["tokens"] == 32
    for way in (*ways, "single storage"):
        samples = [run for block in found["prefill"][way]["samples"] for run in block]
        assert found["prefill"][way]["prefill"]["n"] == len(samples) >= 3
        assert all(0 < until_logits <= until_token for until_logits, until_token in samples)
    assert set(found["memory"].values()) == {None}
    for name, parameter in model.named_parameters():  # captured graphs read these addresses
        address, value = weights[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, value)


@pytest.mark.parametrize("spec", ["null", "dejavu:parts=heads"])
def test_within_the_single_storage_there_is_one_copy_of_the_weights(spec: str) -> None:
    model = llama()
    before = prefill.resident(model)
    assert 0 <= before - 4 * sum(p.numel() for p in model.parameters()) < 1024  # the rest is a table of the rotation
    artifact = parse(spec).synthesize(model, 0.5, windows(2, 32))
    with sparsify(model, artifact) as handle, handle.dense():
        own, wanted = prefill.resident(model), model(windows(1)).logits
        for layer in handle.layers():
            layer.materialize()  # as steps outside the runtime do
        with prefill.single_storage(model, handle):
            assert prefill.resident(model) == own  # transposed, not added
            assert not model.model.layers[1].self_attn.o_proj.linear.weight.is_contiguous()
            torch.testing.assert_close(model(windows(1)).logits, wanted)
    assert prefill.resident(model) == before


def test_a_storage_for_which_memory_ends_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from methods.runtime import Projection

    model, made = llama(), Projection.__init__
    weights = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}

    def full(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if self.widths == [64]:  # in the middle of a block
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Projection, "__init__", full)
    with attached(model) as handle:
        found = prefill.measure(model, handle, Decoder(model, windows(1, 16), 8))
    assert list(found["prefill"]) == ["tokens", "dense"] and found["memory"] == {}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights[name][0] and torch.equal(parameter, weights[name][1])


class Nvml(SimpleNamespace):
    """NVML with one GPU, whose energy counter ticks at every third reading."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, **changes: Any) -> None:
        reads = count()
        own, other = SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=-1, usedGpuMemory=7)
        found: dict[str, Any] = {
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 600 * (next(reads) // 3),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [own, other],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x5,
            "nvmlDeviceGetClockInfo": lambda handle, kind: 1000 * kind,
        }
        super().__init__(**found | changes)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setattr(machine, "_library", lambda: found)
    monkeypatch.setattr(machine.os, "getpid", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    return found


def test_what_the_driver_tells_of_a_gpu(nvml: Nvml) -> None:
    assert machine.watch("cuda:0") == {"throttle": ["power cap"], "processes": 1, "sm_clock": 1000}
    assert machine.process_memory("cuda:0") == 5
    counter = machine.energy_counter("cuda:0")
    assert counter is not None and [counter() for _ in range(4)] == [0, 0, 600, 600]
    del nvml.nvmlDeviceGetTotalEnergyConsumption
    assert machine.energy_counter("cuda:0") is None  # a GPU without the counter has no energy, not zero
    assert machine.watch("cpu") is None and machine.energy_counter("cpu") is None


def test_disturbances_of_all_rounds_are_kept() -> None:
    quiet = {"throttle": [], "processes": 0, "sm_clock": 1980}
    loud = {"throttle": ["power cap"], "processes": machine.UNAVAILABLE, "sm_clock": 1200}
    assert latency._disturbances([None, None]) is None
    found = latency._disturbances([quiet, loud, {**quiet, "processes": 2}])
    assert found == {"throttle": ["power cap"], "processes": 2, "sm_clock": [1200, 1980]}


def test_energy_is_per_token_between_ticks_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    decoder = Decoder(model, windows(2, 8), WARM_STEPS + latency.GPU_STEPS)
    runner = Runner("fake", decoder, lambda: None)
    read = Nvml().nvmlDeviceGetTotalEnergyConsumption
    found = latency.energy(runner, lambda: read(0), seconds=0.05)
    steps = 3 * (WARM_STEPS + latency.GPU_STEPS)  # per tick of 0.6 J
    assert found is not None and found["joules_per_token"] == pytest.approx(0.6 / steps / 2)
    assert found["watts"] > 0 and latency.energy(runner, None) is None
    assert latency.energy(runner, lambda: 7, seconds=0.01) is None  # never ticked


@pytest.mark.parametrize("answers", [True, False])
def test_a_trace_that_costs_the_device_is_no_note(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that fails leaves a note; one that leaves no working device would fail whatever comes next."""

    def failing(runner: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(latency.breakdown, "trace", failing)
    monkeypatch.setattr(latency.machine, "answers", lambda device: answers)
    bench = object.__new__(latency.Bench)
    bench.gpu, bench.device = True, "cuda"
    notes: list[str] = []
    handle: Any = SimpleNamespace(sparse=nullcontext, dense=nullcontext)
    bench.dense, bench.quantised = [], []
    runner: Any = SimpleNamespace(name="sparse runtime")
    with nullcontext() if answers else pytest.raises(RuntimeError, match="illegal"):
        assert bench._breakdown(handle, [runner], notes) is None
        assert "illegal memory access" in notes[0]
