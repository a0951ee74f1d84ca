"""One loaded model and everything its cells share: text, dense reference, dense latency runners, artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from methods import Artifact, SparseModel, sparsify
from methods.artifact import fingerprint
from methods.base import Progress
from methods.registry import create
from methods.runtime import why_not
from sparse_kernels.meter import Union

from . import artifacts, checks, cost, fidelity, latency, models, prefill
from .corpus import Corpus, load_corpus, token_windows
from .plan import Cell
from .store import Record

WINDOW = 1024  # tokens per perplexity window, or what the model can hold
EVALUATION_BATCH = 8  # fixed, because in low precision results depend on it; it is in every record
# What a random model writes to set thresholds and count selections on: texts, fewer where all have more than so many
# tokens, and steps, as many as a timed cache has room for.
SYNTHETIC_TEXTS, SYNTHETIC_TOKENS, SYNTHETIC_STEPS = 8, 8192, latency.ROOM


@dataclass
class Quality:
    """A method's fidelity and tasks, and what the meter saw: shared by cells that differ in batch or context."""

    fidelity: dict[str, Any] | None
    items: dict[str, list[float]]
    accuracy: dict[str, Any]
    scored_in: str | None  # the record whose scores these are, if they were there already
    counts: dict[tuple[str, int], list[Tensor]]
    together: dict[tuple[str, int], Union]


class Session:
    """Measures the cells of one model, weights, device and dtype."""

    def __init__(
        self, cells: Sequence[Cell], progress: Progress, scored: Callable[[Cell], Sequence[Record]] = lambda cell: ()
    ) -> None:
        """cells: all that this session will measure; they agree on model, weights, device, dtype, corpus and seed.
        scored: records of a cell, whose task scores hold for the same artifact."""
        self.cells, cell = cells, cells[0]
        spec = models.resolve(cell.model)
        progress(f"loading {cell.model}", 0, 1)
        weights = "synthetic" if cell.weights == "synthetic" else "real"
        self.loaded = models.load(spec, weights, cell.device, cell.dtype, cell.seed)
        self.model = self.loaded.model
        self.progress, self.scored = progress, scored
        self.device = next(self.model.parameters()).device
        self.synthetic = self.loaded.weights_kind == "synthetic"
        self.shape = cost.Shape.of(self.model)
        self.corpus: Corpus | None = None if self.synthetic else load_corpus(cell.corpus)
        self.windows, self.bytes_per_token = self._windows(cell)
        self._check_tasks()
        self._check_artifacts()
        self.dense = fidelity.DenseReference()
        self.bandwidth = self._bandwidth()
        self._artifacts: dict[tuple[Any, ...], Artifact] = {}
        self._quality: dict[tuple[Any, ...], Quality] = {}
        self._bench: latency.Bench | None = None
        self._bench_shape: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """The record's `model` block."""
        spec = self.loaded.spec
        return {
            "id": spec.hub_id or spec.name,
            "revision": spec.revision,
            "fingerprint": fingerprint(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": self.loaded.config.model_type,
        }

    def _check_tasks(self) -> None:
        """Reads their data: what cannot be loaded ends the run now, not after each cell's perplexity."""
        tasks = dict.fromkeys(name for cell in self.cells for name in cell.tasks)
        if tasks:
            from .accuracy import load

            load(tasks, self.cells[0].seed, self.corpus)

    def _check_artifacts(self) -> None:
        """Reads what is prepared already: a damaged artifact ends the run now, not after an hour."""
        for cell in self.cells:
            if self.corpus is not None and not cell.not_applicable:
                method = create(cell.method, cell.options)
                artifacts.existing(self.loaded, method, cell.density, self.corpus, cell.seed)

    def artifact(self, cell: Cell) -> Artifact:
        """The cell's artifact. All densities of a method are prepared together, so that they can share work."""
        key = (cell.method, tuple(cell.options.items()), cell.context if self.synthetic else None)
        if (*key, cell.density) not in self._artifacts:
            same = [c for c in self.cells if (c.method, tuple(c.options.items())) == key[:2] and not c.not_applicable]
            densities = list(dict.fromkeys(c.density for c in same))
            method = create(cell.method, cell.options)
            if self.corpus is None:
                text = self._own_text(cell.context, 0)[:, :-1]
                found: Iterable[Artifact] = (
                    method.synthesize(self.model, density, text, SYNTHETIC_STEPS) for density in densities
                )
            else:
                found = artifacts.obtain(self.loaded, method, densities, self.corpus, cell.seed, self.progress)
            self._artifacts.update({(*key, d): artifact for d, artifact in zip(densities, found, strict=True)})
        return self._artifacts[*key, cell.density]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything a record says about this cell's method."""
        artifact = self.artifact(cell)
        if not self.synthetic and not self.dense.logprobs and cell.method != "dense":
            self._fill_dense(cell)
        bench = self._bench_for(cell) if cell.timed else None
        with sparsify(self.model, artifact, cell.mode) as handle:
            quality = self._quality_of(cell, handle)
            handle.meter.counts.update(quality.counts)
            handle.meter.together.update(quality.together)
            timing: dict[str, Any] = {}
            if bench is not None:
                paths = self._check_paths(handle, quality)
                timing = self._time(bench, handle, cell, quality) | paths
            costs, density = cost.record(handle, self.shape, cell.context, cell.batch)
        return {
            "model": self.describe(),
            "corpus": None if self.corpus is None else {"name": self.corpus.name, "hash": self.corpus.hash},
            "artifact": {
                "hash": artifact.hash,
                "options": artifact.options,
                "manifest": artifact.manifest,
                "bytes": sum(tensor.nbytes for tensor in artifact.tensors.values()),
            },
            "prepare": {k: artifact.manifest.get(k) for k in ("seconds", "tokens", "device")}
            if "seconds" in artifact.manifest
            else None,
            "density": density,
            "cost": costs,
            "fidelity": quality.fidelity,
            "accuracy": quality.accuracy,
            "items": quality.items,
            "evaluation_batch": EVALUATION_BATCH,
            "scored_in": quality.scored_in,
            "latency": timing,
        }

    def _time(self, bench: latency.Bench, handle: SparseModel, cell: Cell, quality: Quality) -> dict[str, Any]:
        """The record's latency. Controls have none, and so no rank: they may look at what they skip."""
        if create(cell.method, cell.options).control:
            bench.count(handle)
            return {}
        timing = bench.measure(
            handle,
            lambda: self._timed_step(handle, cell),
            lambda text, steps, cache: checks.timed_text(self.model, handle, text, steps, quality.fidelity, cache),
            lambda a, b: self.progress("decode latency", a, b),
        )
        self.progress("prefill", 0, 1)
        return timing | prefill.measure(self.model, handle, bench.decoder(handle))

    def _check_paths(self, handle: SparseModel, quality: Quality) -> dict[str, float]:
        """Nothing is timed whose decode step computes something else than what was evaluated."""
        window = self.windows[:1].to(self.device)
        found: dict[str, float] = {}
        if self.device.type == "cuda" and why_not(self.model) is None:
            found["block_error"], found["reads_error"] = fidelity.block_check(self.model, handle, window)
            if not found["reads_error"] <= fidelity.READS_TOLERANCE:
                raise RuntimeError(
                    f"the timed kernels count {found['reads_error']:.2g} more or less than the masks, relatively "
                    f"(limit {fidelity.READS_TOLERANCE:.2g})"
                )
            if not found["block_error"] <= fidelity.BLOCK_TOLERANCE:  # also true for NaN
                raise RuntimeError(
                    f"the timed decoder blocks are {found['block_error']:.2g} off the evaluated ones, relatively "
                    f"(limit {fidelity.BLOCK_TOLERANCE:.2g})"
                )
        if not self.synthetic or "block_error" not in found:
            found["path_kl"] = fidelity.kernel_check(self.model, handle, window, window.shape[1] // 2)
            limit = fidelity.kernel_tolerance(quality.fidelity)
            if not found["path_kl"] <= limit:
                raise RuntimeError(
                    f"the timed decode step is {found['path_kl']:.2g} nats per token from the evaluated one "
                    f"(limit {limit:.2g})"
                )
        return found

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()

    def _windows(self, cell: Cell) -> tuple[Tensor, float]:
        positions = getattr(self.loaded.config.get_text_config(), "max_position_embeddings", WINDOW)
        window = min(WINDOW, positions)
        if self.corpus is None:
            generator = torch.Generator().manual_seed(cell.seed)
            vocabulary = self.loaded.config.get_text_config().vocab_size
            return torch.randint(vocabulary, (max(8, cell.batch), window), generator=generator), 1.0
        tokenizer = self.loaded.tokenizer
        windows = token_windows(self.corpus.evaluation, tokenizer, window, max(8, cell.limit // 4), seed=cell.seed)
        text = tokenizer.batch_decode(windows.tolist(), skip_special_tokens=True)
        return windows, sum(len(t.encode()) for t in text) / windows.numel()

    def _bandwidth(self) -> float | None:
        if self.device.type != "cuda":
            return None
        from sparse_kernels import read_bandwidth

        return read_bandwidth(self.device)

    def _bench_for(self, cell: Cell) -> latency.Bench:
        shape = (cell.batch, cell.context)
        if self._bench is None or self._bench_shape != shape:
            self.progress("dense baselines", 0, 1)
            if self._bench is not None:
                self._bench.close()
            flat = self.windows.flatten()
            if len(flat) < cell.batch * cell.context:
                flat = flat.repeat(1 + cell.batch * cell.context // len(flat))
            prompt = flat[: cell.batch * cell.context].view(cell.batch, cell.context).to(self.device)
            self._bench, self._bench_shape = latency.Bench(self.model, prompt, self.bandwidth), shape
        else:
            self._bench.refill()  # the cell before may have failed in the middle of its own
        return self._bench

    def _timed_step(self, handle: SparseModel, cell: Cell) -> dict[str, Any]:
        """What the timed steps' own selections kept, and the bytes that one of these steps had to read for it."""
        found = cost.densities(handle, self.shape, unions=True)
        found |= cost.attention(handle, range(cell.context, cell.context + 1))
        overhead = cost.overhead(handle, cell.batch)
        spent = cost.decode_cost(self.shape, found, found, overhead, cell.context, cell.batch)
        return {
            "density": round(cost.model_density(self.shape, found), 5) if handle.layers() else None,
            "bytes": spent.bytes * cell.batch,
            "bytes_dense": spent.bytes_dense * cell.batch,
            "bytes_8bit": spent.bytes_dense * cell.batch - self.shape.dense * (self.shape.itemsize - 1),
        }

    def _fill_dense(self, cell: Cell) -> None:
        """A resumed run has its dense cell already, but other cells need the dense model's outputs again."""
        dense = create("dense", {})
        with sparsify(self.model, dense.artifact(self.model, None, {}, {}), cell.mode) as handle:
            self._fidelity(handle)

    def _fidelity(self, handle: SparseModel) -> tuple[dict[str, Any], dict[str, list[float]]]:
        return fidelity.measure(
            self.model,
            handle,
            self.windows,
            self.dense,
            self.bytes_per_token,
            EVALUATION_BATCH,
            lambda a, b: self.progress("perplexity", a, b),
        )

    def _quality_of(self, cell: Cell, handle: SparseModel) -> Quality:
        key = (cell.method, tuple(cell.options.items()), cell.density, cell.mode, cell.context * self.synthetic)
        if key in self._quality:
            return self._quality[key]
        if self.synthetic:
            self._count_synthetic(handle, cell.context)
            quality = Quality(None, {}, {}, None, dict(handle.meter.counts), dict(handle.meter.together))
        else:
            block, items = self._fidelity(handle)
            counted = dict(handle.meter.counts), dict(handle.meter.together)
            scores: dict[str, Any] = {}
            known = self._known_scores(cell) if cell.tasks else None
            if known is not None:
                scores, items = known["accuracy"], known["items"] | items
            elif cell.tasks:
                from .accuracy import evaluate

                self.progress("tasks", 0, 1)
                scores, answers = evaluate(
                    self.model,
                    self.loaded.tokenizer,
                    handle,
                    cell.mode,
                    list(cell.tasks),
                    cell.limit,
                    EVALUATION_BATCH,
                    cell.seed,
                    self.corpus,
                )
                items = {**items, **answers}
            quality = Quality(block, items, scores, None if known is None else known["key"], *counted)
        checks.reported_density(self.model, handle, self.windows[:4, :1].to(self.device))
        self._quality[key] = quality
        return quality

    def _known_scores(self, cell: Cell) -> Record | None:
        digest = self.artifact(cell).hash
        return next((record for record in self.scored(cell) if record["artifact"]["hash"] == digest), None)

    @torch.inference_mode()
    def _count_synthetic(self, handle: SparseModel, context: int) -> None:
        """Densities on text that the random model generated itself; nothing about it is an accuracy."""
        text = self._own_text(context, 1)
        with handle.positions(fidelity.active_positions(handle, text, SYNTHETIC_STEPS)), handle.meter.on():
            self.model(input_ids=text[:, :-1], use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def _own_text(self, context: int, seed: int) -> Tensor:
        """Random tokens and what the model writes after them: int64 [n, context + SYNTHETIC_STEPS + 1].

        The context is that of the timed steps, because what attention returns shrinks as it grows.
        """
        n = max(1, min(SYNTHETIC_TEXTS, SYNTHETIC_TOKENS // context))
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.loaded.config.get_text_config().vocab_size
        prompts = torch.randint(vocabulary, (n, context), generator=generator)
        return fidelity.greedy(self.model, prompts.to(self.device), SYNTHETIC_STEPS + 1)


def estimate(cell: Cell) -> dict[str, Any]:
    """Columns for `--dry-run`: cost per decoded token at the target density, from the architecture alone."""
    from transformers import AutoModelForCausalLM

    configuration = models.config(models.resolve(cell.model))
    with torch.device("meta"):
        shape = cost.Shape.of(AutoModelForCausalLM.from_config(configuration, dtype=getattr(torch, cell.dtype)))
    sites = set(create(cell.method, cell.options).skips(configuration))
    sites |= {"gate", "up", "down"} if "ffn" in sites else set()
    sites |= {"o", "attention"} if "heads" in sites else set()
    density = 1.0 if cell.density is None else cell.density
    found = {
        key: density if key[1] in sites else 1.0 for key in (*shape.linears, *((b, "attention") for b in shape.kv))
    }
    spent = asdict(cost.decode_cost(shape, found, found, 0, cell.context, cell.batch))
    return {"GFLOP/token": f"{spent['flops'] / 1e9:.3f}", "MB/token": f"{spent['bytes'] / 1e6:.1f}", "_shape": shape}


def seconds(cell: Cell, shape: cost.Shape) -> float:
    """A rough time for one cell: tokens it processes over what this kind of device does in practice."""
    rate = 60e9 if cell.device == "cpu" else 100e12  # FLOP/s that evaluation reaches on small batches
    tokens = max(8, cell.limit // 4) * WINDOW / 2 + cell.limit * len(cell.tasks) * 150
    if cell.weights == "synthetic":
        tokens = 3 * max(cell.context, min(SYNTHETIC_TEXTS * cell.context, SYNTHETIC_TOKENS))
    fixed = 4.0 if cell.device == "cpu" else 20.0  # decode steps; on a GPU also graph capture and compilation
    return fixed + 2 * (shape.dense + shape.head) * tokens / rate


def training(cell: Cell, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Columns for `--dry-run`: what a method that trains reads, and how long it took by the newest record of the like.

    Tokens alone tell no time: as many take the routers of one method a second, and of another minutes.
    """
    method, spec = create(cell.method, cell.options), models.resolve(cell.model)
    trained = method.training == "trained" and cell.weights != "synthetic"
    if not trained or artifacts.shipped(spec, method, cell.density, cell.seed):
        return {}
    configuration = models.config(spec)
    tokens = method.budget(configuration) * artifacts.window_of(configuration)
    alike = {"model": cell.model, "method": cell.method, "options": cell.options, "dtype": cell.dtype}
    taken = ["?"]
    for record in records:
        prepared = record.get("prepare") or {}
        if prepared.get("device") == cell.device.split(":")[0] and alike.items() <= record["cell"].items():
            taken.append(f"{prepared['seconds']:.0f}")
    return {"training [Mtokens]": f"{tokens / 1e6:.2f}" if tokens else "?", "training [s]": taken[-1]}
