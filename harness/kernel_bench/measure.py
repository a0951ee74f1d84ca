"""How a kernel is timed: checked against float64 first, then replayed as a CUDA graph beside its dense baseline.

A graph calls the operator once on each of many copies of its weights, so that a replay touches more than the L2 cache
holds. What was timed is what is checked: the outputs are poisoned, and the replay must write them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from statistics import mean, median
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from .case import TOLERANCE, Case, Copy, Draw, Output

KEYS = (
    "op", "case", "batch", "density",
    "time_us", "limit_us", "fraction_of_limit", "baseline", "baseline_us", "rel_error",
)  # fmt: skip
MAX_COPIES = 128
COMPILERS = 8  # threads
CHECKED = (0, -1)  # copies compared with float64; the others must only repeat

Record = dict[str, Any]


class Progress(Protocol):
    """What `progress.Display` offers."""

    def __call__(self, text: str, done: float, total: float) -> None: ...
    def say(self, text: str) -> None: ...
    def cell(self, label: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Setting:
    """Where and how to time. bandwidth: bytes per second that this device reads."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    copies: int = 32  # as many as a 7B model has layers
    cold: float = 300e6  # bytes a replay reads at least: six times the L2 cache of an H200
    rounds: int = 5
    replays: int = 5


class Replay:
    """One call on every copy: a CUDA graph, or on a CPU the calls themselves."""

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device) -> None:
        self.calls, self.graph = calls, None
        if device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                calls[0]()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = [call() for call in calls]
        self()

    def __call__(self) -> None:
        if self.graph is None:
            self.outputs = [call() for call in self.calls]
        else:
            self.graph.replay()

    def poison(self) -> None:
        for output in self.outputs:
            for tensor in _tensors(output):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def times(self, n: int) -> list[float]:
        """Microseconds of each of n replays, after one that warms up."""
        self()
        if self.graph is None:
            marks = [perf_counter()]
            for _ in range(n):
                self()
                marks.append(perf_counter())
            return [1e6 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            self()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def run(cases: Sequence[Case], setting: Setting, progress: Progress) -> Iterator[tuple[Record, str | None]]:
    """A record per case, and what is wrong with it, if anything. All cases are compiled before any is timed.

    `progress` gets one cell for compiling and one per operator.
    """
    with progress.cell(f"compiling {len(cases)} cases"), ThreadPoolExecutor(COMPILERS) as pool:
        broken = []
        for problem in pool.map(lambda case: warm(case, setting), cases):
            broken.append(problem)
            progress("compiling", len(broken), len(cases))
    known = dict(zip(map(id, cases), broken, strict=True))
    for operator, group in groupby(cases, lambda case: case.op):
        together = list(group)
        with progress.cell(operator):
            for number, case in enumerate(together):
                progress(case.label, number, len(together))
                record, problem = measure(case, setting, known[id(case)])
                if problem:
                    progress.say(f"  {case.label} failed: {problem}")
                yield record, problem


def warm(case: Case, setting: Setting) -> str | None:
    """Runs a case once, which compiles its kernels; returns what it raised."""
    try:
        copy = case.build(Draw(setting.device, setting.dtype, 0))
        copy.run()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # out of its domain, out of memory, a kernel that does not compile
        return _sentence(error)
    with suppress(Exception):  # told when it is timed
        if copy.baseline:
            copy.baseline()
    return None


def measure(case: Case, setting: Setting, broken: str | None = None) -> tuple[Record, str | None]:
    """The record of one case and its problem: `broken` if given, what it raised, or what its check found."""
    record = dict.fromkeys(KEYS) | {k: getattr(case, k) for k in ("op", "case", "batch", "density", "baseline")}
    if broken:
        return record, broken
    try:
        return record, _measure(case, setting, record)
    except Exception as error:
        return record, _sentence(error)


def _measure(case: Case, setting: Setting, record: Record) -> str | None:
    """Fills the record as far as the case gets; returns its problem."""
    copies = build(case, setting)
    limit = 1e6 * mean(copy.bytes for copy in copies) / setting.bandwidth
    record |= {"density": _short(mean(copy.density for copy in copies)), "limit_us": _short(limit)}
    replays = [Replay([copy.run for copy in copies], setting.device)]
    error, problem = check(replays[0], copies)
    record["rel_error"] = _short(error)
    if problem:
        return problem
    try:
        if case.baseline:
            replays.append(Replay([copy.baseline for copy in copies if copy.baseline], setting.device))
    except Exception as raised:  # the kernel's time stands without it
        problem = f"its baseline: {_sentence(raised)}"
    time, *baseline = (median(samples) / len(copies) for samples in interleave(replays, setting))
    record |= {"time_us": _short(time), "fraction_of_limit": _short(limit / time)}
    record["baseline_us"] = _short(baseline[0]) if baseline else None
    return problem


def build(case: Case, setting: Setting) -> list[Copy]:
    """As many copies as a model has layers, or as it takes to read from memory and not from cache; at least two."""
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what the case before left is free memory again
    before = torch.cuda.memory_allocated() if on_gpu else 0
    copies = [case.build(Draw(setting.device, setting.dtype, 1))]
    wanted = max(setting.copies, min(MAX_COPIES, int(setting.cold / max(1, copies[0].bytes)) + 1))
    if on_gpu:
        free, _ = torch.cuda.mem_get_info()
        wanted = min(wanted, max(2, int(0.6 * free / max(1, torch.cuda.memory_allocated() - before))))
    return copies + [case.build(Draw(setting.device, setting.dtype, seed)) for seed in range(2, wanted + 1)]


def check(kernel: Replay, copies: Sequence[Copy]) -> tuple[float, str | None]:
    """Relative Frobenius error to float64, the worst of CHECKED; and a sentence if that or a repetition fails."""

    def results() -> list[Tensor]:
        kernel.poison()
        kernel()
        return [copy.result(*_tensors(output)).clone() for copy, output in zip(copies, kernel.outputs, strict=True)]

    found = results()
    errors = [relative_error(found[i], copies[i].reference()) for i in CHECKED]
    error = max(errors, key=lambda e: (e != e, e))  # NaN is the worst
    tolerance = copies[0].tolerance or TOLERANCE.get(found[0].dtype, 0.0)
    if not error <= tolerance:
        return error, f"relative error {error:.2g} to float64, at most {tolerance:g} is allowed."
    if not all(map(torch.equal, found, results())):
        return error, "two runs on the same inputs differ."
    return error, None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius norms in float64. Raises ValueError on different shapes."""
    if actual.shape != expected.shape:
        raise ValueError(f"the result has shape {list(actual.shape)}, its reference {list(expected.shape)}.")
    difference = (actual.double() - expected.double()).norm().item()
    return difference / (expected.double().norm().item() or 1.0)


def interleave(replays: Sequence[Replay], setting: Setting) -> list[list[float]]:
    """Samples of each, microseconds: A B A B, so that a drift of the clocks meets all of them."""
    samples: list[list[float]] = [[] for _ in replays]
    for _ in range(setting.rounds):
        for replay, found in zip(replays, samples, strict=True):
            found += replay.times(setting.replays)
    return samples


def _tensors(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _short(value: float) -> float | None:
    """Four significant digits; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.4g}") if isfinite(value) else None


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
