"""D2DMoE: dense to dynamic-k mixture of experts (Szatkowski et al., arXiv 2310.04361, NeurIPS 2024).

Fine-tuning with a penalty on activations makes the model sparser; FFN neurons are grouped into experts; a small router
per FFN learns to predict the norm of every expert's output. A token runs the experts whose prediction is at least tau
times its largest one, unscaled: easy tokens run few. One training serves all densities, tau alone differs.
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

LATE = ("rule", "scope", "selector", "tolerance", "trials")  # options that matter after training
ENFORCING = ("penalty", "weight", "ramp", "steps", "batch", "lr", "patience")  # and of the fine-tuning alone
CHOICES = {
    "penalty": ("hoyer", "l1"),
    "ramp": ("linear_warmup", "linear", "constant"),
    "activation": ("relu", "own"),
    "rule": ("dynamic", "top-k"),
    "scope": ("model", "layer"),
    "selector": ("router", "oracle", "random"),
}


@dataclass(frozen=True)
class D2dmoeOptions:
    """penalty: hoyer (square Hoyer) or l1; weight: of the penalty as a share of the neurons, so that it serves all
    widths (16 is 1e-3 at Gemma's 16384); ramp: how it grows, linear_warmup (over the first half), linear or constant;
    activation: relu (takes the place of the model's) or own (kept, and its inputs pushed below -10); steps, batch, lr:
    fine-tuning (0 steps: none, the model as it is; lr 0: 1e-4 at width 2048, scaled); patience: early stopping, off at
    0: fine-tuning ends when so many of 20 validations in a row (on held-out training windows, with the penalty at its
    full weight) bring no lower loss, and the best weights are kept; expert_size: neurons per expert;
    rank: of the routers (0: hidden size / 4, at most 512); windows: training windows that routers learn from; epochs:
    passes over them; rule: dynamic (the paper's) or top-k (its ablation, k fixed); scope: one tau for the model (the
    paper's) or one for each layer, all layers equally dense; selector: router, or one of two controls, random (the
    router before it learned anything) and oracle (true norms, never timed or ranked); projections: q, k, v, o become
    MLPs of the same cost first, distilled from them, with experts of their own (the paper's option; density is then
    that of both, by weights); distill: passes over the windows for it; tolerance: accepted distance to the target
    density; trials: values of tau."""

    penalty: str = "hoyer"
    weight: float = 16.0
    ramp: str = "linear_warmup"
    activation: str = "relu"
    steps: int = 400
    batch: int = 8
    lr: float = 0.0
    patience: int = 0
    expert_size: int = 32
    rank: int = 0
    windows: int = 400
    epochs: int = 30
    rule: str = "dynamic"
    scope: str = "model"
    selector: str = "router"
    projections: bool = False
    distill: int = 10
    tolerance: float = 0.01
    trials: int = 20

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"d2dmoe {name}", getattr(self, name), known)
        if self.weight < 0 or self.steps < 0 or self.rank < 0 or self.tolerance <= 0:
            raise UsageError("d2dmoe needs weight, steps and rank of at least 0 and a tolerance: try d2dmoe:steps=400.")
        if self.patience < 0:
            raise UsageError("d2dmoe needs a patience of at least 0: try d2dmoe:patience=3.")
        if min(self.expert_size, self.windows, self.epochs, self.distill, self.batch, self.trials) < 1:
            raise UsageError("d2dmoe counts experts, windows, epochs and trials from 1: try d2dmoe:epochs=30.")


class D2dmoe(Method):
    name = "d2dmoe"
    summary = "FFN experts of 32 neurons, as many as a router finds worth it for each token"
    paper = "arXiv 2310.04361 (NeurIPS 2024)"
    training = "trained"
    sites = ("ffn",)
    fidelity = (
        "paper: sparsity fine-tuning, split by k-means, routers that regress output norms, dynamic k; adapted: SwiGLU "
        "through its gate as the paper does GEGLU, routers learn layer by layer from stored inputs, k-means is seeded, "
        "embeddings and lm_head stay frozen, weight differences are stored in 8 bits, fine-tuning has the optimiser "
        "settings of LTE (AdamW with betas (0.9, 0.999) and weight decay 0, 6 % warm-up, then linear to zero; "
        "published for Gemma: betas (0.9, 0.95), weight decay 0.01, 5 % warm-up, then a cosine), routers keep the "
        "epoch whose 20 % best-scored experts hold most of the held-out norms and stop after 3 epochs without a better "
        "one (MoEfication's criterion; published: a fixed number of steps); attention projections stay dense unless "
        "projections is set"
    )
    Options = D2dmoeOptions
    options: D2dmoeOptions

    def why_not(self, config: Any) -> str | None:
        from .families import layout_of, why_no_experts

        if self.options.projections and layout_of(config).norms is None:
            return f"d2dmoe:projections=true is for blocks as Llama's or OPT's, not those of {config.model_type}."
        return why_no_experts(self.name, config, self.options.expert_size)

    def skips(self, config: Any) -> tuple[str, ...]:
        return (*self.sites, "q", "k", "v", "o") if self.options.projections else self.sites

    def budget(self, config: Any) -> int:
        options = self.options
        return options.steps * options.batch + options.windows * (1 + options.projections)

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.routers import enough
        from .shared.splitting import split

        if reason := self.why_not(model.config):
            raise UsageError(reason)
        start, windows = perf_counter(), data.train(self.options.windows)
        notes = enough(windows.numel(), self.options.windows * windows.shape[1])
        projections, distilled = self._distil(model, windows, data, progress)
        tensors, manifest = self._enforce(model, data, progress, projections)
        notes += manifest.get("notes", [])
        tensors = split(self, model, tensors, "kmeans", self.options.expert_size, windows, data.seed, progress)
        routers, learned = self._routers(model, tensors, windows, data, progress)
        tensors |= routers
        manifest |= learned | distilled | {"corpus": data.corpus, "seed": data.seed}
        manifest["tokens"] = manifest.get("tokens", 0) + windows.numel() * (1 + self.options.projections)
        manifest["device"] = next(model.parameters()).device.type
        shared = perf_counter() - start
        for density in densities:
            start = perf_counter()
            found, told = self._reach(model, tensors, self.target(density), data.calibration, progress)
            told |= {"notes": notes + told["notes"], "seconds": round(shared + perf_counter() - start, 1)}
            yield self.artifact(model, density, tensors | found, manifest | told)

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random routers; the tau of each is the quantile of its scores that gives the density."""
        import torch

        from .families import blocks
        from .shared import projections
        from .shared.selection import set_thresholds, thresholds

        tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        size = self.options.expert_size
        for block in blocks(model):
            up = block.linears["up"].weight
            experts = {str(block.index): (up.shape[0] // size, up.shape[1])}
            for site in projections.SITES if self.options.projections else "":
                linear, name = block.linears[site], f"{block.index}.{site}"
                width = projections.hidden_width(linear, size)
                experts[name] = width // size, linear.in_features
                weights = projections.drawn(linear, width, generator)
                tensors |= {f"projection.{name}.{key}": value.bfloat16() for key, value in weights.items()}
            for name, shape in experts.items():
                a, b = self._start(*shape, generator)
                tensors |= {f"router.{name}.a": a.bfloat16(), f"router.{name}.b": b.bfloat16()}
        artifact = self.artifact(model, self.target(density), tensors, {})
        if self.options.rule == "dynamic" and self.options.selector != "oracle":
            with sparsify(model, artifact) as handle:
                set_thresholds(handle, tokens, self.target(density), last)
                tensors |= thresholds(handle)
        return self.artifact(model, density, tensors, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from .families import activation_of
        from .shared.experts import attach_experts
        from .shared.projections import attach_projections

        activation = "relu" if self.options.activation == "relu" else activation_of(attachment.model.config)
        selector, size = partial(self._selector, attachment.artifact), self.options.expert_size
        attach_projections(attachment, self._hidden(), size, selector)
        attach_experts(attachment, activation, size, lambda index, layer: selector(layer))

    def _hidden(self) -> str:
        """The activation in the MLPs that take the place of projections."""
        return "relu" if self.options.activation == "relu" else "gelu"

    def _selector(self, artifact: Artifact, layer: ExpertFFN) -> Selector | None:
        from sparse_kernels.selectors import Oracle

        from .shared.routers import experts_for, norm_router, output_norms

        tensors = artifact.tensors
        if artifact.density is None:
            return None  # while preparing
        threshold = tensors.get(f"threshold.{layer.name}", 0.0)
        rule = "relative" if self.options.rule == "dynamic" else "top-k"
        choice = rule, threshold, experts_for(artifact.density, layer.units)
        if self.options.selector == "oracle":
            return Oracle(layer.units, output_norms(layer), *choice)
        return norm_router(tensors[f"router.{layer.name}.a"], tensors[f"router.{layer.name}.b"], *choice)

    def _start(self, experts: int, width: int, generator: Any) -> tuple[Tensor, Tensor]:
        """The two layers of a router before training."""
        from .shared.routers import uniform

        rank = self.options.rank or min(512, max(16, width // 4))  # 512 of 2048 for Gemma
        return uniform(rank, width, generator), uniform(experts, rank, generator)

    def _distil(
        self, model: PreTrainedModel, windows: Tensor, data: Data, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Stage 0: the MLPs that take the place of attention projections, if they are to."""
        if not self.options.projections:
            return {}, {}
        from .shared.projections import distil
        from .shared.student import checkpoint_file

        free = (*LATE, *ENFORCING, "rank", "epochs")
        found, errors = distil(
            model,
            windows,
            self._hidden(),
            self.options.expert_size,
            self.options.distill,
            data.seed,
            "d2dmoe distilling",
            progress,
            lambda stage: checkpoint_file(data, self, model, stage, free),
        )
        return found, {"distillation_error": {name: round(error, 4) for name, error in errors.items()}}

    def _enforce(
        self, model: PreTrainedModel, data: Data, progress: Progress, projections: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Stage 1: task + weight * mean over FFNs of the penalty, all parameters trained. In the model's own order."""
        if not self.options.steps:
            return projections, {}
        from .families import activation_of
        from .shared.penalties import sparse_loss
        from .shared.projections import makes, stored
        from .shared.student import D2DMOE_RATE, Student, Tuning, checkpoint_file, dense_ffn, learning_rate

        options, relu = self.options, self.options.activation == "relu"
        rate = learning_rate(model, options.lr, D2DMOE_RATE)
        windows = data.train(options.steps * options.batch)
        tuning = Tuning(windows, options.batch, rate, data.seed, progress, patience=options.patience)
        notes = tuning.notes(options.steps)
        mlps = makes(projections, self._hidden(), options.expert_size) if projections else None
        student = Student(model, tuning, None, dense_ffn("relu" if relu else activation_of(model.config)), mlps)
        loss = sparse_loss(student, options.penalty, options.weight, options.ramp, relu)
        free = (*LATE, "rank", "epochs", *(() if projections else ("expert_size", "windows", "distill")))
        place = checkpoint_file(data, self, model, "sparsity", free)
        losses = student.train(loss, options.steps, "d2dmoe sparsity", place)
        tensors = student.deltas(model, {}) | stored(student.layers())
        notes += tuning.stopped(losses, options.steps, "fine-tuning")
        told = {"notes": notes, "lr": rate, "tokens": tuning.tokens(len(losses))}
        return tensors, told | {"loss": [round(v, 4) for v in losses[:: max(1, len(losses) // 20)]]}

    def _routers(
        self, model: PreTrainedModel, tensors: dict[str, Tensor], windows: Tensor, data: Data, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Router tensors by layer, and how much of the held-out norms the best-predicted experts hold."""
        import torch
        from torch.nn.functional import mse_loss

        from .shared.learning import Recipe, learn
        from .shared.routers import norm_router, output_norms

        generator = torch.Generator().manual_seed(data.seed)

        def start(layer: ExpertFFN) -> Router | None:
            if self.options.selector == "oracle":
                return None
            return norm_router(*self._start(layer.units, layer.up.in_features, generator))

        recipe = Recipe(mse_loss, lambda norms: norms, self.options.epochs, 1e-3, "cosine")
        learned = recipe if self.options.selector == "router" else None
        how = start, lambda layer, x: output_norms(layer), learned, LATE
        return learn(self, model, tensors, windows, data, *how, progress)

    def _reach(
        self, model: PreTrainedModel, tensors: dict[str, Tensor], density: float, windows: Tensor, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`threshold.<block>` whose density on calibration text is the target, and what the manifest says about it."""
        from .shared.search import bisect, missed
        from .shared.selection import expert_usage, mean_density, set_thresholds, thresholds, warnings

        options, tried = self.options, 0
        weights: dict[str, int] | None = None
        with sparsify(model, self.artifact(model, density, tensors, {})) as handle:
            if options.projections:
                weights = {n.name: sum(w.numel() for w in (n.up.weight, n.down.weight)) for n in handle.layers()}

            def measure(tau: float) -> float:
                nonlocal tried
                tried += 1
                progress(f"d2dmoe tau for density {density:.2f}", tried, options.trials)
                fill(tau)
                return mean_density(expert_usage(handle, windows), weights)

            def fill(tau: float) -> None:
                for layer in handle.layers():
                    layer.selector.threshold.fill_(tau)

            if options.rule == "dynamic" and options.scope == "layer":
                set_thresholds(handle, windows, density)
            elif options.rule == "dynamic":
                fill(bisect(density, measure, options.tolerance, options.trials))
            usage, found = expert_usage(handle, windows), thresholds(handle)
        reached = mean_density(usage, weights)
        told: dict[str, Any] = {"density": round(reached, 4)}
        if options.rule == "dynamic":
            told["tau"] = [round(float(tau), 6) for tau in found.values()]
        doubts = warnings(usage) + (uneven(usage) if options.scope == "model" and options.rule == "dynamic" else [])
        told |= {"warnings": doubts, "target_reached": abs(reached - density) <= options.tolerance}
        how = "a whole number of experts" if options.rule == "top-k" else "quantiles of each layer's own scores"
        told["notes"] = missed(
            density, reached, f"the nearest of {tried} tau tried" if tried else how, options.tolerance
        )
        told["layers"] = [round(float(share.mean()), 4) for share in usage.values()]
        return found, told


def uneven(usage: dict[str, Tensor]) -> list[str]:
    """A sentence if one tau leaves a layer with a fraction of the mean density, which then says little about it.

    The rule sees ratios to the token's largest prediction alone. Where one expert outweighs all others, these are below
    any tau that thins out the layers whose norms are alike; regression widens the gap, because predictions are nearer
    to each other than true norms, the less a router knows the more.
    """
    density = {name: float(share.mean()) for name, share in usage.items()}
    low, high = min(density, key=density.__getitem__), max(density, key=density.__getitem__)
    if density[low] >= 0.25 * sum(density.values()) / len(density):
        return []
    return [
        f"one tau for the model leaves layer {low} with density {density[low]:.2f} and layer {high} with "
        f"{density[high]:.2f}: scope=layer gives each layer its own"
    ]
