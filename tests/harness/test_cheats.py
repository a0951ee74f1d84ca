"""Methods that are fast by not doing what they claim must have no numbers: they are honest only while watched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import checks, fidelity, latency
from harness.decoder import Decoder, Runner, events
from methods import SparseModel, sparsify
from methods.registry import parse
from tests.methods.models import data, llama, opt, windows

QUALITY = {"kl": 0.05}
BEFORE_TIMING = 20  # decode steps that a watched method may see: block and kernel checks, warm-up


@contextmanager
def attached(model: Any, spec: str = "teal:allocation=uniform") -> Iterator[SparseModel]:
    method = parse(spec)
    artifact = next(iter(method.prepare(model, data(), [None if method.densities == (None,) else 0.5])))
    with sparsify(model, artifact) as handle:
        yield handle


def measure(model: Any, handle: SparseModel, bandwidth: float | None = None, step_bytes: int = 1) -> dict[str, Any]:
    """As a session times a method: checked before and after."""
    bench = latency.Bench(model, windows(2, 16), bandwidth)
    assert fidelity.kernel_check(model, handle, windows(1), 16) <= fidelity.kernel_tolerance(QUALITY)
    step = {"density": 0.5, "bytes": step_bytes, "bytes_dense": 2, "bytes_8bit": 1}

    def check(text: torch.Tensor, steps: int, cache: Any) -> float:
        return checks.timed_text(model, handle, text, steps, QUALITY, cache)

    return bench.measure(handle, lambda: step, check, lambda a, b: None)


class Cheat:
    """Wraps a layer's forward: honest in passes over several positions, and in the first decode steps."""

    def __init__(self, layer: Any, honest_steps: int) -> None:
        self.layer, self.honest, self.left = layer, layer.forward, honest_steps
        layer.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1 or self.layer.phase.active is not True:
            return self.honest(x)
        self.left -= 1
        return self.honest(x) if self.left >= 0 else self.cheat(x)

    def cheat(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class CachedOutput(Cheat):
    """Keeps the first output that it made when nobody looked."""

    kept: Tensor | None = None

    def cheat(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape[0] != x.shape[0]:
            self.kept = self.honest(x)
        return self.kept


class SkippedWork(Cheat):
    def cheat(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.layer.linear.out_features)


class StaleBuffer(Cheat):
    """Returns the output of the step before."""

    buffer: Tensor | None = None

    def cheat(self, x: Tensor) -> Tensor:
        last, self.buffer = self.buffer, self.honest(x)
        return self.buffer if last is None or last.shape != self.buffer.shape else last


class Unsynchronised(Cheat):
    """Returns a buffer that another thread is still to fill, as a kernel on a stream nobody waits for would."""

    def cheat(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.layer.linear.out_features)
        given = x.clone()

        def late() -> None:
            time.sleep(0.002)
            out.copy_(torch.nn.functional.linear(given, self.layer.linear.weight))

        Thread(target=late).start()
        return out


def cheated(model: Any, handle: SparseModel, cheat: type[Cheat]) -> None:
    for layer in handle.layers():
        cheat(layer, BEFORE_TIMING)


def test_an_honest_method_passes_every_check() -> None:
    model = llama()
    with attached(model) as handle:
        found = measure(model, handle)
        assert checks.reported_density(model, handle, windows(4, 1)) <= checks.UNREPORTED
    assert 0 <= found["regret"] < 1e-3


@pytest.mark.parametrize("cheat", [CachedOutput, SkippedWork, StaleBuffer, Unsynchronised])
def test_steps_that_are_only_honest_when_checked_have_no_time(cheat: type[Cheat]) -> None:
    model = llama()
    with attached(model) as handle:
        cheated(model, handle, cheat)
        with pytest.raises(RuntimeError, match="computed something else|ended in other tokens"):
            measure(model, handle)


def test_steps_that_are_only_honest_when_run_again_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows that a block is being timed, and is honest in the text that is checked."""
    model, timing = llama(), []
    block = Runner.block

    def watched(self: Runner, steps: int) -> list[float]:
        timing.append(True)
        try:
            return block(self, steps)
        finally:
            timing.pop()

    class Hasty(SkippedWork):
        def __call__(self, x: Tensor) -> Tensor:
            return self.cheat(x) if timing and self.layer.phase.active is True else self.honest(x)

    monkeypatch.setattr(Runner, "block", watched)
    with attached(model) as handle:
        cheated(model, handle, Hasty)
        with pytest.raises(RuntimeError, match="ended in other tokens"):
            measure(model, handle)


@pytest.mark.parametrize("quality", [None, QUALITY])
@pytest.mark.parametrize("batch", [1, 2])
def test_honest_text_passes_and_other_text_does_not(batch: int, quality: dict[str, Any] | None) -> None:
    model = llama()
    with attached(model) as handle:
        decoder = Decoder(model, windows(batch, 16), 8)
        runner = Runner("", decoder, lambda: decoder.step(model.forward))
        with handle.sparse():
            text = runner.text(6)
        assert checks.timed_text(model, handle, text, 6, quality) < 1e-3 and not handle.meter.counts
        wrong = text.clone()
        wrong[:, -3:] = (wrong[:, -3:] + 1) % 300
        with pytest.raises(RuntimeError, match="computed something else"):
            checks.timed_text(model, handle, wrong, 6, quality)


def test_a_method_that_attaches_nothing_reports_nothing() -> None:
    model = llama()
    with attached(model, "dense") as handle:
        assert checks.reported_density(model, handle, windows(4, 1)) == 0


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (llama, "teal:allocation=uniform"),
        (opt, "teal:allocation=uniform"),
        (llama, "lte:stage1_steps=1:stage2_steps=1:trials=1:batch=2"),
    ],
)
def test_a_density_below_what_is_used_is_refused(spec: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make(), windows(4, 1)
    with attached(model, spec) as handle:
        before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        handle.meter.counts["q", 0].append(torch.tensor([7]))
        assert checks.reported_density(model, handle, tokens) <= checks.UNREPORTED
        assert list(handle.meter.counts) == [("q", 0)] and not handle.meter.unions  # what was measured stays
        assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
        layer = handle.layers()[-1]
        honest = layer.mask
        units = torch.arange(layer.units)

        def mask(keep: Tensor) -> Tensor:
            honest(keep & (units % 2 == 0))
            return keep

        monkeypatch.setattr(layer, "mask", mask)
        with pytest.raises(RuntimeError, match="reports a density of .* and uses"):
            checks.reported_density(model, handle, tokens)


def test_kernels_that_report_less_than_they_read_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from methods.runtime import Projection

    model, call = llama(), Projection.__call__

    def modest(self: Projection, x: Tensor, **options: Any) -> Any:
        found = call(self, x, **options)
        for layer in self.layers:
            if layer is not None and layer.count is not None:
                layer.count = layer.count * 9 // 10
        return found

    with attached(model) as handle:
        assert fidelity.block_check(model, handle, windows(1)).reads == 0
        monkeypatch.setattr(Projection, "__call__", modest)
        assert fidelity.block_check(model, handle, windows(1)).reads > fidelity.READS_TOLERANCE


def test_a_step_faster_than_its_bytes_allow_is_refused() -> None:
    model = llama()
    with attached(model) as handle, pytest.raises(RuntimeError, match="for bytes that take"):
        measure(model, handle, bandwidth=1e6, step_bytes=10**6)


@pytest.mark.parametrize(("pending", "caught"), [(0.0, False), (0.05, True)])
def test_work_that_outlives_its_events_is_seen(pending: float, caught: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: the events are done at once, work on another stream is not."""

    class Event(SimpleNamespace):
        def __init__(self, enable_timing: bool) -> None:
            super().__init__()

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(pending))
    if caught:
        with pytest.raises(RuntimeError, match="work went on for"):
            events(lambda: None, 4)
    else:
        assert len(events(lambda: None, 4)) == 4
