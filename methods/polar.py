"""Polar Sparsity: attention heads chosen for every sequence, FFN neurons for the batch (Shrestha et al., 2505.14884).

What a batch needs of an FFN between all its sequences grows towards everything; what a sequence needs of its own cache
does not depend on the others. A router per layer therefore ranks the heads of each token (KV groups, where heads share
keys) by what attention's norm puts out, and the best of them attend; keys and values are computed and cached for all.
Layer 0 stays dense. In ReLU models a second router ranks FFN neurons for the batch, as many as it takes in that layer
and at that batch size to catch 99 % of the active ones; every row runs all of these. Where they are so many that a
dense FFN is faster, and in other models, the FFN is dense and no router is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent, sparsify
from .errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparse_kernels.layers import ExpertFFN
    from sparse_kernels.selectors import Router, Selector

    from .shared.predictors import Activations

TAP = "attn_norm"  # both routers read what q, k and v read
DENSE_BLOCKS = 1
GROWTH = 0.57  # of neurons with batch size B, in the paper's table for OPT-6.7B: 1 - k / all is a power B ** 0.57
CHOICES = {
    "ffn": ("auto", "dense", "sparse"),
    "outputs": ("heads", "groups"),
    "selector": ("router", "oracle", "random"),
}


@dataclass(frozen=True)
class PolarOptions:
    """ffn: sparse (needs ReLU), dense, or auto (sparse where the model has ReLU); outputs: what a router scores where
    heads share keys, heads (a group counts as its best one, as in the paper's accuracy tables) or groups (as in its
    kernels); selector: router, or one of two controls, random and oracle (true norms, never timed or ranked); budget:
    accepted rise of calibration perplexity, 0.01 for 1 % (above 0, the density is a lower limit and the smallest one
    within the budget is taken); recall: of active neurons, which sets how many run; active: for random weights, the
    share of neurons that one token runs (published: 0.095 for OPT-6.7B), from which larger batches follow; rank: of FFN
    routers (0: hidden size / 4, at most the published 1024); windows: training windows; epochs, batch (tokens), lr: of
    routers."""

    ffn: str = "auto"
    outputs: str = "heads"
    selector: str = "router"
    budget: float = 0.0
    recall: float = 0.99
    active: float = 0.095
    rank: int = 0
    windows: int = 100
    epochs: int = 20
    batch: int = 512
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"polar {name}", getattr(self, name), known)
        if not 0 < self.recall <= 1 or not 0 < self.active <= 1 or self.budget < 0 or self.rank < 0 or self.lr <= 0:
            raise UsageError(
                "polar needs recall and active in (0, 1], budget and rank from 0, lr above 0: try polar:recall=0.99."
            )
        if min(self.windows, self.epochs, self.batch) < 1:
            raise UsageError("polar counts windows, epochs and batch from 1: try polar:epochs=20.")


class Polar(Method):
    name = "polar"
    summary = "attention of the heads or KV groups a router picks for each sequence; in ReLU models FFN neurons too"
    paper = "arXiv 2505.14884 (NeurIPS 2025)"
    training = "trained"
    sites = ("heads", "ffn")
    fidelity = (
        "paper: routers, their input, labels and loss, layer 0 dense, density of heads in all other layers, groups as "
        "the best of their heads, FFN neurons for the batch with k by layer and batch size, for the token alone where "
        "quality is evaluated; adapted: the label share is the target density, the epoch with the best recall at k is "
        "kept, batches of 512 at rate 1e-3, o reads no channels of heads that no sequence kept, the FFN is dense from "
        "the share of neurons on where that is faster here (published: 0.8), nothing runs beside"
    )
    Options = PolarOptions
    options: PolarOptions

    def why_not(self, config: Any) -> str | None:
        from .families import activation_of, is_relu, why_no_heads, why_no_rank, why_no_taps

        if reason := why_no_taps(self.name, config) or why_no_heads(self.name, config):
            return reason
        if self.options.ffn == "sparse" and not is_relu(config):
            return f"polar:ffn=sparse needs a model with ReLU, this one has {activation_of(config)}: choose ffn=auto."
        return why_no_rank(self.name, config, self.options.rank)

    def skips(self, config: Any) -> tuple[str, ...]:
        """How many neurons run follows from the recall, and not from the density."""
        return ("heads",)

    def unreachable(self, config: Any, density: float) -> str | None:
        from .families import heads_of, no_groups

        return no_groups(self.name, density, heads_of(config)[1])

    def budget(self, config: Any) -> int:
        return self.options.windows

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .families import coarse, groups_for, heads_of
        from .shared.predictors import activations, manifest_of

        if reason := self.why_not(model.config):
            raise UsageError(reason)
        start, windows = perf_counter(), data.train(self.options.windows)
        told = manifest_of(model, windows, self.options.windows, data)
        groups = heads_of(model.config)[1]
        wanted = {self.target(density): groups_for(self.name, self.target(density), groups) for density in densities}
        tensors: dict[float, dict[str, Tensor]] = {density: {} for density in wanted}
        judged: dict[float, dict[str, Any]] = {density: {} for density in wanted}
        shared: dict[str, Tensor] = {}
        ffn: dict[str, Any] = {}
        held = 0
        mark = (lambda block, h: h > 0) if self._sparse_ffn(model.config) else None
        for found in activations(model, windows, (TAP,), mark, self.name, progress):
            index, held = found.block.index, max(held, found.bytes)
            for density, k in wanted.items():
                if index >= DENSE_BLOCKS:
                    made, judged[density][str(index)] = self._head_router(model, data, found, density, k, progress)
                    tensors[density] |= made
            if mark is not None:
                made, ffn[str(index)] = self._ffn_router(model, data, found, progress)
                shared |= made
            found.taps.clear()  # no later block listens to this one
        told |= {"activation_bytes": held + told["activation_bytes"]} | ({"ffn": ffn} if ffn else {})
        notes, spent = told["notes"], perf_counter() - start
        for given in densities:
            start, target = perf_counter(), self.target(given)
            done = self._with_k(tensors[target] | shared, model, wanted[target])
            done, critical = self._critical(model, done, target, wanted[target], data, progress)
            told |= {
                "notes": notes + coarse(target, groups),
                "heads": judged[target],
                "seconds": round(spent + perf_counter() - start, 1),
            }
            yield self.artifact(model, given, done, told | critical)

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random routers; heads at the density, neurons as many as published for OPT at each batch size."""
        import torch

        from sparse_kernels.selectors import BatchRouter

        from .families import blocks, groups_for, heads_of
        from .shared.predictors import stored

        tensors: dict[str, Tensor] = {}
        target = self.target(density)
        k = groups_for(self.name, target, heads_of(model.config)[1])
        for block in blocks(model):
            if block.index >= DENSE_BLOCKS:
                tensors |= stored(f"heads.{block.index}", self._start_heads(model.config, block.index))
            if self._sparse_ffn(model.config):
                neurons = block.linears["up"].out_features
                tensors |= stored(f"ffn.{block.index}", self._start_ffn(model.config, neurons, block.index))
                shares = [1 - (1 - self.options.active) ** (size**GROWTH) for size in BatchRouter.SIZES]
                ks = [max(1, round(share * neurons)) for share in shares]
                tensors[f"ffn.{block.index}.k"] = torch.tensor(ks, dtype=torch.int32)
        return self.artifact(model, density, self._with_k(tensors, model, k), {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from .families import activation_of
        from .shared.experts import attach_experts
        from .shared.heads import attach_heads

        config = attachment.model.config
        attach_heads(attachment, partial(self._heads, attachment))
        if self._sparse_ffn(config):
            attach_experts(attachment, activation_of(config), 1, partial(self._neurons, attachment))

    def _heads(self, attachment: Attachment, index: int) -> Selector | None:
        from sparse_kernels.selectors import Oracle, Router

        from .families import heads_of
        from .shared.heads import group_importance
        from .shared.predictors import restored

        tensors = attachment.artifact.tensors
        heads, groups = heads_of(attachment.model.config)
        k = int(tensors["heads.k"][index])
        if k == groups:
            return None
        if self.options.selector == "oracle":
            return Oracle(groups, group_importance(heads, groups), "top-k", k=k)
        layers, bias = restored(tensors, f"heads.{index}")
        router = Router(layers, "top-k", k=k, bias=bias, pool=layers[0].shape[0] // groups)
        router.tap = attachment.tap(TAP, index)
        return router

    def _neurons(self, attachment: Attachment, index: int, layer: ExpertFFN) -> Selector | None:
        from sparse_kernels.selectors import BatchRouter, Oracle

        from .shared.predictors import neuron_importance, restored

        tensors = attachment.artifact.tensors
        ks = tensors[f"ffn.{index}.k"].tolist()
        if self.options.selector == "oracle":
            return Oracle(layer.units, neuron_importance(layer.down.weight), "top-k", k=ks[0])
        router = BatchRouter(restored(tensors, f"ffn.{index}")[0], ks, attachment.phase)
        router.tap = attachment.tap(TAP, index)
        return router

    def _sparse_ffn(self, config: Any) -> bool:
        from .families import is_relu

        return self.options.ffn != "dense" and is_relu(config)

    def _start_heads(self, config: Any, seed: int) -> Router:
        from .families import heads_of
        from .shared.predictors import linear_start

        return linear_start([(heads_of(config)[self.options.outputs == "groups"], config.hidden_size)], True, seed)

    def _start_ffn(self, config: Any, neurons: int, seed: int) -> Router:
        from .shared.predictors import linear_start

        rank = self.options.rank or min(1024, max(16, config.hidden_size // 4))
        return linear_start([(rank, config.hidden_size), (neurons, rank)], False, seed)

    def _with_k(self, tensors: dict[str, Tensor], model: PreTrainedModel, k: int) -> dict[str, Tensor]:
        """`heads.k`: int32, how many groups run in each block."""
        import torch

        from .families import heads_of

        ks = torch.full((model.config.num_hidden_layers,), k, dtype=torch.int32)
        ks[:DENSE_BLOCKS] = heads_of(model.config)[1]
        return tensors | {"heads.k": ks}

    def _recipe(self, floor: float) -> Any:
        from .shared.predictors import PredictorRecipe

        options = self.options
        trained = PredictorRecipe(options.lr, options.epochs, options.batch, floor)
        return trained if options.selector == "router" else None

    def _head_router(
        self, model: PreTrainedModel, data: Data, found: Activations, density: float, k: int, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Labels: the heads, a share `density` of them, with the largest norms."""
        from .families import groups_for, heads_of
        from .shared.heads import group_norms, largest
        from .shared.predictors import fit, judge, stored
        from .shared.student import checkpoint_file

        heads, groups = heads_of(model.config)
        by_group = self.options.outputs == "groups"
        norms = group_norms(found.norms, groups) if by_group else found.norms
        positives = k if by_group else groups_for(self.name, density, heads)
        index = found.block.index
        router = self._start_heads(model.config, 1009 * data.seed + index)
        place = checkpoint_file(
            data, self, model, f"heads{index}-{positives}", ("budget", "ffn", "rank", "recall", "active")
        )
        label = f"polar heads {index}, density {density:g}"
        active = largest(norms, positives)
        x, oracle = found.taps[TAP], self.options.selector == "oracle"
        fit(router, x, active, positives, self._recipe(0.0), data.seed, label, progress, place)
        return stored(f"heads.{index}", router), judge(router, x, active, oracle=oracle).at(positives)

    def _ffn_router(
        self, model: PreTrainedModel, data: Data, found: Activations, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Labels: the active neurons. `ffn.<block>.k` int32: how many run, by batch size."""
        import torch

        from sparse_kernels.selectors import BatchRouter

        from .shared.predictors import fit, judge, stored
        from .shared.student import checkpoint_file

        index, x, active = found.block.index, found.taps[TAP], found.marks
        units, oracle = active.shape[1], self.options.selector == "oracle"
        typical = max(1, round(float(active.float().mean()) * units))
        router = self._start_ffn(model.config, units, 1009 * data.seed + index)
        place = checkpoint_file(data, self, model, f"ffn{index}", ("budget", "outputs", "recall", "active"))
        recipe = self._recipe(0.005)  # the published floor of FFN routers
        fit(router, x, active, typical, recipe, data.seed, f"polar ffn {index}", progress, place)
        step = max(1, units // 128)  # the published 128 at OPT-6.7B's width
        judged = {size: judge(router, x, active, size, oracle) for size in BatchRouter.SIZES}
        needed = [-(-one.needed(self.options.recall) // step) * step for one in judged.values()]
        ks = torch.tensor(needed).clamp(max=units).cummax(0).values.int()
        told: dict[str, Any] = {"k": dict(zip(map(str, judged), ks.tolist(), strict=True))}
        told["true"] = {str(size): round(one.active / units, 4) for size, one in judged.items()}
        return stored(f"ffn.{index}", router) | {f"ffn.{index}.k": ks}, judged[1].at(int(ks[0])) | {"batches": told}

    def _critical(
        self, model: PreTrainedModel, tensors: dict[str, Tensor], density: float, k: int, data: Data, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """With a budget, the smallest number of groups from k on whose calibration perplexity stays within it."""
        import math

        from .families import heads_of
        from .shared.selection import text_loss

        if not self.options.budget:
            return tensors, {}
        groups, rises = heads_of(model.config)[1], {}
        for more in range(k, groups + 1):
            progress("polar critical density", more - k + 1, groups - k + 1)
            tensors = self._with_k(tensors, model, more)
            with sparsify(model, self.artifact(model, density, tensors, {})) as handle:
                dense, sparse = (text_loss(handle, data.calibration, on) for on in (False, True))
            rises[f"{more / groups:.3f}"] = round(math.exp(sparse - dense) - 1, 5)
            if math.exp(sparse - dense) - 1 <= self.options.budget:
                break
        return tensors, {"critical_density": round(more / groups, 4), "perplexity_rise": rises}
