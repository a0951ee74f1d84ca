"""Deja Vu: contextual sparsity (Liu et al., arXiv 2310.17157, ICML 2023).

For every token, small predictors say which FFN neurons and which attention heads matter; only these are computed. A
predictor is two linear layers with nothing between, reads the residual stream before its norm, and looks ahead: what it
hears in one block decides about the next one, whose selection is then known in time. Blocks that nothing came before
stay dense. Keys and values are computed for all heads, which gives the paper's result without its bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent
from .errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparse_kernels.layers import ExpertFFN
    from sparse_kernels.selectors import Router, Selector

    from .families import Block
    from .shared.learning import Importance
    from .shared.predictors import Activations

CHOICES = {
    "parts": ("both", "ffn", "heads"),
    "selector": ("predictor", "oracle", "random"),
    "ffn_tap": ("mlp_in", "block_in"),
    "heads_tap": ("block_in", "mlp_in"),
    "allocation": ("uniform", "recall"),
}
RATE = (1e-3, 12288)  # published, and the width of its model
FASTEST = 5e-3  # beyond, narrow models learn no better
FLOOR = {"heads": 0.0, "ffn": 0.005}  # published, of the weight of negatives


@dataclass(frozen=True)
class DejavuOptions:
    """parts: what is left out, neurons (ffn), heads or both, each at the target density; ffn_tap, heads_tap: where
    predictors listen, mlp_in (residual stream before the FFN's norm) or block_in (before attention's); ffn_ahead,
    heads_ahead: how many blocks earlier, 0 or 1; allocation: uniform, or recall (layers differ, by equal recall);
    positives: the share of heads, and without ReLU of neurons, that labels call needed (0: the target density);
    rank: of predictors (0: hidden size / 12, which is the published 1000 at OPT-175B's); selector: predictor, or one of
    two controls, random and oracle (true activations, never timed or ranked); windows: training windows; epochs, batch
    (tokens), lr: of predictors (lr 0: the published 1e-3 at OPT-175B's width, scaled, at most 5e-3)."""

    parts: str = "both"
    ffn_tap: str = "mlp_in"
    ffn_ahead: int = 1
    heads_tap: str = "block_in"
    heads_ahead: int = 1
    allocation: str = "uniform"
    positives: float = 0.0
    rank: int = 0
    selector: str = "predictor"
    windows: int = 100
    epochs: int = 10
    batch: int = 1024
    lr: float = 0.0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"dejavu {name}", getattr(self, name), known)
        if not {self.ffn_ahead, self.heads_ahead} <= {0, 1}:
            raise UsageError("dejavu looks 0 or 1 blocks ahead: try dejavu:ffn_ahead=1.")
        if self.heads_tap == "mlp_in" and not self.heads_ahead:
            raise UsageError("mlp_in comes after a block's own attention: choose dejavu:heads_tap=block_in.")
        if not 0 <= self.positives < 1 or self.rank < 0 or self.lr < 0:
            raise UsageError("dejavu needs positives in [0, 1), rank and lr from 0: try dejavu:positives=0.3.")
        if min(self.windows, self.epochs, self.batch) < 1:
            raise UsageError("dejavu counts windows, epochs and batch from 1: try dejavu:epochs=10.")

    def place(self, part: str, block: int) -> tuple[str, int]:
        """Where the predictor of a block's "heads" or "ffn" listens; a negative block is none."""
        ahead = self.heads_ahead if part == "heads" else self.ffn_ahead
        return (self.heads_tap if part == "heads" else self.ffn_tap), block - ahead


class Dejavu(Method):
    name = "dejavu"
    summary = "FFN neurons and attention heads that low-rank predictors pick for each token, one block ahead"
    paper = "arXiv 2310.17157 (ICML 2023)"
    training = "trained"
    sites = ("ffn", "heads")
    fidelity = (
        "paper: linear predictors, their labels, loss and optimiser, top-k per token, look-ahead from the residual "
        "stream with the first block dense; adapted: rank scaled to the model, keys, values and queries computed for "
        "all heads, KV groups whole where heads share keys, neurons without ReLU by the norm of their output (an "
        "extension), a head predictor's two matrices multiplied out where that is smaller, the union of a batch's "
        "neurons is read, nothing runs beside"
    )
    Options = DejavuOptions
    options: DejavuOptions

    def why_not(self, config: Any) -> str | None:
        from .families import why_no_experts, why_no_heads, why_no_rank, why_no_taps

        return (
            why_no_taps(self.name, config)
            or (why_no_heads(self.name, config) if "heads" in self._parts() else None)
            or why_no_experts(self.name, config, 1)
            or why_no_rank(self.name, config, self.options.rank)
        )

    def unreachable(self, config: Any, density: float) -> str | None:
        from .families import heads_of, no_groups

        if "heads" not in self._parts():
            return None
        groups, share = heads_of(config)[1], self.options.positives
        if share and no_groups(self.name, share, groups):
            return (
                f"dejavu:positives={share:g} calls none of {groups} KV groups needed, from which predictors of heads "
                f"learn nothing: choose dejavu:positives={math.ceil(100 / groups) / 100:g} or more."
            )
        return no_groups(self.name, density, groups)

    def skips(self, config: Any) -> tuple[str, ...]:
        return self._parts()

    def budget(self, config: Any) -> int:
        return self.options.windows

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.predictors import activations, manifest_of

        if reason := self.why_not(model.config):
            raise UsageError(reason)
        start, windows = perf_counter(), data.train(self.options.windows)
        manifest = manifest_of(model, windows, self.options.windows, data)
        plans = {self.target(density): _Plan(self, model, self.target(density)) for density in densities}
        places = {self.options.place(part, 0)[0] for part in self._parts()}
        kinds = {part: list(dict.fromkeys(plan.kinds[part] for plan in plans.values())) for part in self._parts()}
        mark = partial(_needed, kinds["ffn"]) if "ffn" in kinds else None
        before: Activations | None = None
        held = 0
        for found in activations(model, windows, places, mark, self.name, progress):
            for part in self._parts():
                place, source = self.options.place(part, found.block.index)
                heard = {found.block.index: found, found.block.index - 1: before}.get(source)
                if heard is None:
                    continue
                for kind, active in zip(kinds[part], _labels(model.config, part, found, kinds[part]), strict=True):
                    router = self._learn(part, found.block.index, heard.taps[place], active, model, data, progress)
                    for plan in plans.values():
                        if plan.kinds[part] == kind:
                            plan.add(part, found.block.index, router, (heard.taps[place], active))
            held, before = max(held, found.bytes + (before.bytes if before else 0)), found
        manifest["activation_bytes"] += held
        seconds = round(perf_counter() - start, 1)  # of all densities together, whose predictors learn side by side
        for density in densities:
            plan = plans[self.target(density)]
            tensors = plan.finish()
            more = {"notes": manifest["notes"] + plan.notes, "seconds": seconds}
            yield self.artifact(model, density, tensors, manifest | plan.told | more)

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random predictors; their k gives the density."""
        from .families import blocks

        plan = _Plan(self, model, self.target(density))
        for block in blocks(model):
            for part in self._parts():
                if self.options.place(part, block.index)[1] >= 0:
                    plan.add(part, block.index, self._start(model.config, part, block.index))
        return self.artifact(model, density, plan.finish(), {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from .families import activation_of
        from .shared.experts import attach_experts
        from .shared.heads import attach_heads

        if "heads" in self._parts():
            attach_heads(attachment, partial(self._heads, attachment))
        if "ffn" in self._parts():
            attach_experts(attachment, activation_of(attachment.model.config), 1, partial(self._neurons, attachment))

    def _parts(self) -> tuple[str, ...]:
        return ("heads", "ffn") if self.options.parts == "both" else (self.options.parts,)

    def _heads(self, attachment: Attachment, index: int) -> Selector | None:
        from .families import heads_of
        from .shared.heads import group_importance

        heads, groups = heads_of(attachment.model.config)
        return self._selector(attachment, "heads", index, groups, lambda: group_importance(heads, groups))

    def _neurons(self, attachment: Attachment, index: int, layer: ExpertFFN) -> Selector | None:
        from .shared.predictors import neuron_importance

        return self._selector(attachment, "ffn", index, layer.units, lambda: neuron_importance(layer.down.weight))

    def _selector(
        self, attachment: Attachment, part: str, index: int, units: int, importance: Callable[[], Importance]
    ) -> Selector | None:
        """importance: makes what an oracle ranks by."""
        from sparse_kernels.selectors import Oracle, Router

        from .shared.predictors import restored

        tensors = attachment.artifact.tensors
        k = int(tensors[f"{part}.k"][index])
        if k == units:
            return None
        if self.options.selector == "oracle":
            return Oracle(units, importance(), "top-k", k=k)
        router = Router(restored(tensors, f"{part}.{index}")[0], "top-k", k=k)
        router.tap = attachment.tap(*self.options.place(part, index))
        return router

    def _start(self, config: Any, part: str, seed: int) -> Router:
        from .families import heads_of, neurons_of
        from .shared.predictors import linear_start

        hidden = config.hidden_size
        rank = self.options.rank or 16 * max(1, -(-hidden // (12 * 16)))
        units = heads_of(config)[1] if part == "heads" else neurons_of(config)
        return linear_start([(rank, hidden), (units, rank)], False, seed)

    def _learn(
        self, part: str, index: int, x: Tensor, active: Tensor, model: PreTrainedModel, data: Data, progress: Progress
    ) -> Router:
        """The predictor of active [tokens, units] from x [tokens, d]; a control's stays as it was drawn."""
        from .shared.predictors import PredictorRecipe, fit
        from .shared.student import checkpoint_file, learning_rate

        options = self.options
        rate = options.lr or min(FASTEST, learning_rate(model, 0.0, RATE))
        recipe = PredictorRecipe(rate, options.epochs, options.batch, FLOOR[part])
        router = self._start(model.config, part, 1009 * data.seed + index)
        typical = max(1, round(float(active.float().mean()) * active.shape[1]))
        place = checkpoint_file(data, self, model, f"{part}{index}-{typical}", ("allocation", "parts", "positives"))
        trained = recipe if options.selector == "predictor" else None
        fit(router, x, active, typical, trained, data.seed, f"dejavu {part} {index}", progress, place)
        return router


def _labels(config: Any, part: str, found: Activations, kinds: list[int]) -> list[Tensor]:
    """Bool [tokens, units] for each kind: that many units count as needed, or those that are not zero."""
    from .families import heads_of
    from .shared.heads import group_norms, largest

    if part == "heads":
        return [largest(group_norms(found.norms, heads_of(config)[1]), n) for n in kinds]
    return list(found.marks.unbind(1))


def _needed(kinds: list[int], block: Block, h: Tensor) -> Tensor:
    """bool [tokens, kinds, neurons] from neurons' values [tokens, neurons]: 0 marks those that are not zero, n the n
    that add most to the output."""
    import torch

    from .shared.heads import largest
    from .shared.predictors import neuron_importance

    importance = neuron_importance(block.linears["down"].weight)
    return torch.stack([largest(importance(h), n) if n else h != 0 for n in kinds], 1)


class _Plan:
    """What one density takes: predictors, and how many units run in each block."""

    def __init__(self, method: Dejavu, model: PreTrainedModel, density: float) -> None:
        from .families import coarse, groups_for, heads_of, is_relu, neurons_of
        from .shared.routers import experts_for

        self.method, self.density, self.blocks = method, density, model.config.num_hidden_layers
        groups, neurons = heads_of(model.config)[1], neurons_of(model.config)
        share = method.options.positives or density
        self.units = {"heads": groups, "ffn": neurons}
        self.k = {"ffn": experts_for(density, neurons)}
        # How many units labels call needed; with ReLU it is those neurons that are not zero, whatever the density.
        self.kinds = {"ffn": 0 if is_relu(model.config) else experts_for(share, neurons)}
        if "heads" in method._parts():
            self.k["heads"] = groups_for(method.name, density, groups)
            self.kinds["heads"] = groups_for(method.name, share, groups)
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[str, dict[int, Any]] = {"heads": {}, "ffn": {}}
        self.told: dict[str, Any] = {}
        self.notes = coarse(density, groups) if "heads" in method._parts() else []

    def add(self, part: str, index: int, router: Router, seen: tuple[Tensor, Tensor] | None = None) -> None:
        """seen: x and labels, whose last tokens judge the predictor; without them nothing is known of it."""
        from .shared.predictors import folded, judge, stored

        self.tensors |= stored(f"{part}.{index}", folded(router))
        oracle = self.method.options.selector == "oracle"
        self.known[part][index] = judge(router, *seen, oracle=oracle) if seen else None

    def finish(self) -> dict[str, Tensor]:
        """Tensors with `<part>.k`, int32 [blocks]; what predictors caught goes to `told`."""
        import torch

        from .shared.predictors import equal_recall

        for part in self.method._parts():
            known, units = self.known[part], self.units[part]
            ks = torch.full((self.blocks,), units, dtype=torch.int32)
            if self.method.options.allocation == "recall" and all(known.values()):
                chosen = equal_recall(known, self.k[part])
            else:
                chosen = dict.fromkeys(known, self.k[part])
            for index, k in chosen.items():
                ks[index] = k
            self.tensors[f"{part}.k"] = ks
            if all(known.values()):
                self.told[part] = {str(i): found.at(chosen[i]) for i, found in known.items()}
        return self.tensors
