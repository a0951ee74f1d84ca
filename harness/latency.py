"""Latency of a decode step, dense and sparse interleaved in one process (docs/protocol.md, "Latency").

A step feeds one token per sequence and returns the next greedy one, so every step sees hidden states the model made
itself. On a GPU the dense model runs as stock eager, as a CUDA graph, compiled inside a CUDA graph, and through our own
runtime; the sparse model through the runtime, or as a CUDA graph and compiled inside one where the runtime has no block
for the architecture; speed-up is the fastest dense over the fastest sparse. On a CPU the reference path is timed, which
masks instead of skipping: it is labelled so and never ranked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.runtime import runtime, why_not

from . import breakdown, machine, quantised, stats
from .decoder import WARM_STEPS, Decoder, Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods import SparseModel

MAX_ROUNDS = 8
MIN_ROUNDS = 3
MAX_SECONDS = 60.0
TARGET_NOISE = 0.01  # stop once the interval of the speed-up is this narrow, as a share of the speed-up
SETTLED = 0.9  # or once three more rounds left more than this share of the noise
ENERGY_SECONDS = 1.5  # the GPU's counter ticks every 20 to 100 ms: its share of such a window is what energy is good to
IMPOSSIBLE = 1.1  # of the byte limit, above the noise of both sides
GPU_STEPS = 32  # timed steps per block
CPU_STEPS = 6
START, SAME = 64, 0.01  # tokens, and the relative error of logits up to which two models are one, up to rounding
ROOM = WARM_STEPS + max(GPU_STEPS, CPU_STEPS) + 4  # of the cache, for steps


class Bench:
    """Times methods against one model's dense runners, which are built once and run in every comparison."""

    @torch.no_grad()  # not inference mode: its tensors cannot be updated in place by compiled code
    def __init__(self, model: PreTrainedModel, prompt: Tensor, bandwidth: float | None) -> None:
        """model: with nothing attached, because the dense graphs keep the addresses of the weights they see here;
        prompt: int64 [batch, context] on the model's device; bandwidth: measured bytes per second, GPU only."""
        self.model, self.prompt, self.bandwidth = model, prompt, bandwidth
        self.gpu, self.device = prompt.is_cuda, str(prompt.device)
        self._shape: tuple[int, int] = (prompt.shape[0], prompt.shape[1])
        # A step that reads less than this may have found part of it in the cache of the one before.
        self._cached = 4 * torch.cuda.get_device_properties(prompt.device).L2_cache_size if self.gpu else 0
        self.notes: list[str] = []
        self.energy: dict[str, dict[str, float] | None] = {}  # of the dense runners
        self._shared = Decoder(model, prompt, ROOM)  # after a dense prompt
        self._logits = self._start()
        self.dense: list[Runner] = self._runners("dense", None)
        self.quantised: list[Runner] = self._quantised() if self.gpu else []

    @torch.no_grad()
    def measure(
        self,
        handle: SparseModel,
        timed_step: Callable[[], dict[str, Any]],
        check: Callable[[Tensor, int, Any], float],
        progress: Callable[[float, float], None],
    ) -> dict[str, Any]:
        """The record's `latency` block. Raises RuntimeError for times that cannot be.

        `check` raises for a text whose last tokens, as many as it is told, the sparse steps should not have made, and
        may use the cache that they used; it returns the record's `regret`. `timed_step` is asked after the timed steps,
        whose selections it counts: their `density`, the `bytes` they had to read, and the dense model's `bytes_dense`,
        also with `bytes_8bit` weights.
        """
        sparse: list[Runner] = []
        if handle.layers():
            with handle.sparse():
                for layer in handle.layers():
                    layer.count = None  # an earlier pass had another batch
                sparse = self._runners("sparse", handle)
        runners = self.dense + self.quantised + sparse
        blocks: dict[str, list[list[float]]] = {runner.name: [] for runner in runners}
        steps = GPU_STEPS if self.gpu else CPU_STEPS
        ends: dict[str, list[Tensor]] = {runner.name: [] for runner in runners}
        noise: list[float] = []
        watched = [machine.watch(self.device)]
        stop, start = None, perf_counter()
        while stop is None:
            for runner in runners:  # A B A B: every runner once per round
                with self._phase(handle, runner):
                    runner.rewind()
                    blocks[runner.name].append(runner.block(steps))
                ends[runner.name].append(runner.decoder.token.clone())
            watched.append(machine.watch(self.device))
            rounds = len(watched) - 1
            if sparse and rounds >= MIN_ROUNDS:
                noise.append(self._noise(blocks, sparse))
            if rounds >= MIN_ROUNDS:
                stop = _stop(rounds, noise, perf_counter() - start) if sparse else "dense only"
            progress(rounds, MAX_ROUNDS)
        if sparse and not self.gpu:
            self.count(handle)
        texts = [self._again(handle, runner, ends[runner.name], runner is sparse[-1]) for runner in sparse]
        found = self._block(blocks, sparse, stop, timed_step())
        checked = (
            check(text, WARM_STEPS + steps, runner.decoder.cache) for text, runner in zip(texts, sparse, strict=True)
        )
        found["regret"] = max(checked, default=None)
        found["watch"] = _disturbances(watched)
        energy = {r.name: self._energy(handle, r) for r in runners if r.name in (found["runner"], found["baseline"])}
        found["energy"] = energy[found["runner"]]
        found["dense"][found["baseline"]]["energy"] = energy[found["baseline"]]
        found["breakdown"] = self._breakdown(handle, sparse or self.dense, found["notes"])
        return found

    def _phase(self, handle: SparseModel, runner: Runner) -> Any:
        return handle.dense() if runner in self.dense + self.quantised else handle.sparse()

    def _noise(self, blocks: dict[str, list[list[float]]], sparse: list[Runner]) -> float:
        ratio = stats.speedup(blocks[self._fastest(blocks, self.dense)], blocks[self._fastest(blocks, sparse)], 200)
        return (ratio.high - ratio.low) / 2 / ratio.estimate

    def _fastest(self, blocks: dict[str, list[list[float]]], runners: list[Runner]) -> str:
        return min((r.name for r in runners), key=lambda name: summary(blocks[name])["median"])

    def _energy(self, handle: SparseModel, runner: Runner) -> dict[str, float] | None:
        """Of dense runners once for all methods: it takes seconds, and they change nothing about it."""
        if runner.name not in self.energy or runner not in self.dense:
            with self._phase(handle, runner):
                self.energy[runner.name] = energy(runner, machine.energy_counter(self.device))
        return self.energy[runner.name]

    def _again(self, handle: SparseModel, runner: Runner, ends: list[Tensor], counted: bool) -> Tensor:
        """The text of the timed steps, run once more: what was timed is what is checked, and whose selections are
        counted. They must end in the tokens that every block ended in.

        counted: of the runner that was captured last, whose counts the layers keep.
        """
        steps = WARM_STEPS + (GPU_STEPS if self.gpu else CPU_STEPS)
        with handle.sparse():
            text = runner.text(steps, (lambda: self._count(handle)) if counted else (lambda: None))
        if not all(torch.equal(text[:, -1:], end) for end in ends):
            raise RuntimeError(f"{runner.name}: timed steps ended in other tokens than the same steps run again")
        return text

    def _breakdown(self, handle: SparseModel, runners: list[Runner], notes: list[str]) -> dict[str, Any] | None:
        """Of the decode runtime where it runs: only its kernels have a class of their own each."""
        runner = next((r for r in runners if r.name.endswith("runtime")), runners[0])
        if not self.gpu:
            return None
        try:
            with self._phase(handle, runner):
                events = breakdown.trace(runner)
            return {"runner": runner.name, **breakdown.breakdown(events, breakdown.STEPS)}
        except Exception as error:  # a driver may refuse to be traced, or lose kernels
            if not machine.answers(self.device):
                raise
            notes.append(f"no breakdown of {runner.name}: {type(error).__name__}: {str(error)[:200]}")
            return None

    def _block(
        self, blocks: dict[str, list[list[float]]], sparse: list[Runner], stop: str, step: dict[str, Any]
    ) -> dict[str, Any]:
        baseline = self._fastest(blocks, self.dense)
        chosen = self._fastest(blocks, sparse) if sparse else baseline
        batch = self.prompt.shape[0]
        found: dict[str, Any] = {
            "path": "gpu" if self.gpu else "cpu-reference",
            "unit": "ms/step",
            "batch": batch,
            "runner": chosen,
            **summary(blocks[chosen]),
            "samples": {name: [[round(v, 5) for v in block] for block in b] for name, b in blocks.items()},
            "dense": {r.name: summary(blocks[r.name]) for r in self.dense},
            "quantised": {r.name: summary(blocks[r.name]) for r in self.quantised},
            "quantised_by": quantised.library() if self.gpu else None,
            "baseline": baseline,
            "stopped": stop,
            "step": step,
            "notes": list(self.notes),
        }
        if sparse:
            ratio = stats.speedup(blocks[baseline], blocks[chosen])
            found["speedup"], found["ci"] = ratio.estimate, [ratio.low, ratio.high]
            found["verdict"] = stats.verdict((ratio.low, ratio.high))
            for name, beside in found["quantised"].items():
                ratio = stats.speedup(blocks[name], blocks[chosen])
                beside["speedup"], beside["ci"] = ratio.estimate, [ratio.low, ratio.high]
        if self.bandwidth:
            found["limit_ms"] = 1e3 * step["bytes"] / self.bandwidth
            found["fraction_of_limit"] = found["limit_ms"] / found["median"]
            if found["fraction_of_limit"] > IMPOSSIBLE and step["bytes"] > self._cached:
                raise RuntimeError(
                    f"{chosen} takes {found['median']:.3g} ms for bytes that take {found['limit_ms']:.3g} to read"
                )
            for dense in found["dense"].values():
                dense["fraction_of_limit"] = 1e3 * step["bytes_dense"] / self.bandwidth / dense["median"]
            for beside in found["quantised"].values():
                beside["fraction_of_limit"] = 1e3 * step["bytes_8bit"] / self.bandwidth / beside["median"]
            found["read_bandwidth"] = self.bandwidth
        return found

    def _runners(self, prefix: str, handle: SparseModel | None) -> list[Runner]:
        if not self.gpu:
            return [self._eager(f"{prefix} cpu", handle)]
        made = [self._eager("dense eager")] if prefix == "dense" else []
        kinds = ["graph", "compiled"] if prefix == "dense" else []
        reason = why_not(self.model, self.prompt.shape[1] + ROOM)
        kinds = [*kinds, "runtime"] if reason is None else ["graph", "compiled"]
        if reason and reason not in self.notes:
            self.notes.append(reason)
        for kind in kinds:
            try:
                if kind == "runtime":
                    with runtime(self.model, handle) as blocks:
                        made.append(self._graph(f"{prefix} {kind}", False, blocks, handle))
                else:
                    for layer in handle.layers() if handle else []:
                        layer.materialize()
                    made.append(self._graph(f"{prefix} {kind}", kind == "compiled", None, handle))
            except Exception as error:  # torch.compile and capture raise many types; the other runners still count
                text = str(error).splitlines()[0][:200] if str(error) else ""
                self.notes.append(f"{prefix} {kind} unavailable: {type(error).__name__}: {text}")
                torch.cuda.synchronize()
        if not made:
            raise RuntimeError(f"no way to run the {prefix} decode step: {'; '.join(self.notes)}")
        return made

    def _quantised(self) -> list[Runner]:
        made: list[Runner] = []
        for kind in quantised.CONFIGS if quantised.library() else ():
            try:
                with quantised.in_8_bits(self.model, kind) as weights:
                    made.append(self._graph(f"dense {kind}", True, weights))
            except Exception as error:  # as above: a baseline that this stack cannot build is left out
                self.notes.append(f"dense {kind} unavailable: {type(error).__name__}: {str(error)[:200]}")
                torch.cuda.synchronize()
        return made

    def decoder(self, handle: SparseModel | None = None) -> Decoder:
        """With the prompt as the mode has it, whatever its decode steps will be. Of a dense prompt there is one cache,
        unless the method's dense positions differ from the model's: weights can be fine-tuned."""
        mask = handle.mask(*self._shape, self.device) if handle else False
        if handle is None or (mask is False and self._same_when_dense(handle)):
            return Decoder(self.model, self.prompt, ROOM, self._shared)
        with handle.positions(mask):
            return Decoder(self.model, self.prompt, ROOM)

    @torch.no_grad()
    def refill(self) -> None:
        """The shared cache holds the dense prompt again, whatever used it since; with nothing attached."""
        self._shared.prefill()

    def _same_when_dense(self, handle: SparseModel) -> bool:
        with handle.dense():
            error = (self._start() - self._logits).norm() / self._logits.norm()
        return bool(error <= SAME)

    def _start(self) -> Tensor:
        """What the model says after the first tokens of the first prompt; float32 [vocab]."""
        return self.model(input_ids=self.prompt[:1, :START], use_cache=False).logits[0, -1].float()

    def _eager(self, name: str, handle: SparseModel | None = None) -> Runner:
        decoder = self.decoder(handle)
        return Runner(name, decoder, lambda: decoder.step(self.model.forward))

    def _graph(self, name: str, compiled: bool, keep: Any = None, handle: SparseModel | None = None) -> Runner:
        decoder = self.decoder(handle)
        forward = self.model.forward
        if compiled:
            torch._dynamo.reset()  # the modules behind `forward` differ from one method to the next
            # Coordinate descent makes Inductor generate matrix-vector products instead of calling cuBLAS: at batch 1
            # that is the strongest dense baseline known. A batch has no such products, and sparse layers bring their
            # own kernels: there it would only take minutes.
            tuned = "dense" in name and len(self.prompt) == 1
            options: dict[str, Any] = {"coordinate_descent_tuning": tuned}
            forward = torch.compile(forward, fullgraph=True, dynamic=False, options=options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                decoder.step(forward)
        torch.cuda.current_stream().wait_stream(stream)
        decoder.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.step(forward)

        return Runner(name, decoder, graph.replay, keep)

    def _count(self, handle: SparseModel) -> None:
        """Reads what the last step selected; on a GPU only, where the kernels leave it on the device."""
        if self.gpu:
            for layer in handle.layers():
                if layer.read is not None:
                    handle.meter.unions[layer.site, layer.layer].append(layer.read.cpu())

    @torch.no_grad()
    def count(self, handle: SparseModel) -> None:
        """The reference path counts while it computes, which costs time: a few steps that are not timed."""
        decoder = self.decoder(handle)
        with handle.sparse(), handle.meter.apart() as meter:
            with meter.on():
                for _ in range(CPU_STEPS):
                    decoder.step(self.model)  # with its hooks: the meter learns from one that these are steps
            unions = meter.unions
        handle.meter.unions.update(unions)

    def close(self) -> None:
        self.dense, self.quantised = [], []
        del self._shared
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


def _stop(rounds: int, noise: list[float], seconds: float) -> str | None:
    """Why no further round is needed; None where one is. noise: of the speed-up, after every round from the third."""
    if noise[-1] < TARGET_NOISE:
        return "noise under target"
    if len(noise) > 3 and noise[-1] > SETTLED * noise[-4]:
        return "noise has settled"
    if rounds >= MAX_ROUNDS:
        return "at the limit of rounds"
    return "at the time limit" if seconds > MAX_SECONDS else None


def _disturbances(watched: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What `machine.watch` saw before and after every round: all throttle reasons, most processes, range of clocks."""
    seen = [found for found in watched if found is not None]

    def told(name: str) -> list[Any]:
        return [found[name] for found in seen if found[name] != machine.UNAVAILABLE]

    if not seen:
        return None
    return {
        "throttle": sorted({reason for reasons in told("throttle") for reason in reasons}),
        "processes": max(told("processes"), default=None),
        "sm_clock": [min(told("sm_clock"), default=None), max(told("sm_clock"), default=None)],
    }


def energy(
    runner: Runner, counter: Callable[[], int] | None, seconds: float = ENERGY_SECONDS
) -> dict[str, float] | None:
    """Joules per token and mean watts of steps that follow each other for `seconds`, from one tick of the counter [mJ]
    to another; None without a counter, or with one that ticks too rarely."""
    if counter is None:
        return None
    ticks: list[tuple[int, int, float]] = []  # steps done, mJ, time
    done, start, last = 0, perf_counter(), counter()
    while perf_counter() - start < seconds:
        runner.rewind()
        runner.block(GPU_STEPS)
        done += WARM_STEPS + GPU_STEPS
        if (now := counter()) != last:
            ticks.append((done, now, perf_counter()))
            last = now
    if len(ticks) < 3:
        return None
    (steps, used, begun), (steps_end, used_end, end) = ticks[0], ticks[-1]
    joules = (used_end - used) / 1e3
    tokens = (steps_end - steps) * runner.decoder.prompt.shape[0]
    return {"joules_per_token": joules / tokens, "watts": joules / (end - begun), "seconds": end - begun}


def summary(blocks: list[list[float]]) -> dict[str, float]:
    """Median, 10th and 90th percentile of all samples, in milliseconds, and how many there are."""
    flat = torch.tensor([v for block in blocks for v in block], dtype=torch.float64)
    p10, median, p90 = flat.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median": median, "p10": p10, "p90": p90, "n": len(flat)}
