"""MoEfication: FFN layers as mixtures of experts (Zhang et al., arXiv 2110.01786, Findings of ACL 2022).

Neurons are grouped into experts of equal size, by their weights or by what is active together. A small router per FFN,
trained on the frozen model, ranks the experts of a token; the k best run, unscaled. k is the same for every token and
layer. The paper needs ReLU; for other activations there are G-MoEfication's mean compensation (EMNLP 2024), ReLU put in
place by fine-tuning, and the direct form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

SPLITS = ("kmeans", "coactivation", "random")  # methods.shared.splitting has them; it imports torch
SELECTORS = ("mlp", "similarity", "random", "oracle")
VARIANTS = ("auto", "relu", "relufied", "direct", "mean")


@dataclass(frozen=True)
class MoeficationOptions:
    """split: kmeans on normalised input rows, coactivation, or random; selector: mlp (the paper's router), similarity
    to the experts' centres, or one of two controls, random and oracle (true activations, never timed or ranked);
    variant: relu (the paper's, needs a ReLU model), relufied (ReLU put in place by `relu_steps` steps of fine-tuning),
    mean (G-MoEfication: a skipped neuron counts with its mean), direct (nothing done about the activation), auto
    (relu where the model has it, else mean); expert_size: neurons per expert; windows: training windows that routers
    learn from; epochs: passes over them; relu_steps, batch, lr, patience: fine-tuning of relufied (lr 0: as for d2dmoe;
    patience as there)."""

    split: str = "kmeans"
    selector: str = "mlp"
    variant: str = "auto"
    expert_size: int = 32
    windows: int = 400
    epochs: int = 30
    relu_steps: int = 400
    batch: int = 8
    lr: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        for name, known in (("split", SPLITS), ("selector", SELECTORS), ("variant", VARIANTS)):
            if getattr(self, name) not in known:
                raise unknown(f"moefication {name}", getattr(self, name), known)
        if min(self.expert_size, self.windows, self.epochs, self.relu_steps, self.batch) < 1:
            raise UsageError("moefication counts experts, windows, epochs and steps from 1: try moefication:epochs=30.")
        if self.patience < 0:
            raise UsageError("moefication needs a patience of at least 0: try moefication:patience=3.")


class Moefication(Method):
    name = "moefication"
    summary = "FFN experts of 32 neurons, the k best of a trained router"
    paper = "arXiv 2110.01786 (Findings of ACL 2022)"
    training = "trained"
    sites = ("ffn",)
    fidelity = (
        "paper: splits, router (two layers, tanh, normalised input), its start, loss and rates, k fixed for all tokens "
        "and layers; adapted: labels come from the true activations and are scaled by a fixed quantile per layer, the "
        "best epoch is kept and training stops after 3 epochs without a better one, the co-activation graph is cut by "
        "a balanced spectral partition instead of METIS, models without ReLU are mean-compensated as in G-MoEfication; "
        "variant=relufied is fine-tuned at the rate and with the optimiser settings that d2dmoe states, without its "
        "penalty"
    )
    Options = MoeficationOptions
    options: MoeficationOptions

    def why_not(self, config: Any) -> str | None:
        from .families import activation_of, is_relu, why_no_experts

        if reason := why_no_experts(self.name, config, self.options.expert_size):
            return reason
        if self.options.variant == "relu" and not is_relu(config):
            return (
                f"moefication:variant=relu needs a model with ReLU, this one has {activation_of(config)}: "
                "choose variant=mean or variant=relufied."
            )
        return None

    def budget(self, config: Any) -> int:
        relu = self._variant(config) == "relufied"
        return self.options.windows + relu * self.options.relu_steps * self.options.batch

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.routers import enough, experts_for, off_target
        from .shared.selection import expert_usage, mean_density, warnings
        from .shared.splitting import split

        if reason := self.why_not(model.config):
            raise UsageError(reason)
        start, windows = perf_counter(), data.train(self.options.windows)
        notes = enough(windows.numel(), self.options.windows * windows.shape[1])
        tensors, manifest = self._relufy(model, data, progress)
        notes += manifest.get("notes", [])
        tensors = split(
            self, model, tensors, self.options.split, self.options.expert_size, windows, data.seed, progress
        )
        routers, learned = self._routers(model, tensors, windows, data, progress)
        manifest |= learned | {"corpus": data.corpus, "seed": data.seed, "variant": self._variant(model.config)}
        manifest["tokens"] = manifest.get("tokens", 0) + windows.numel()
        manifest["device"] = next(model.parameters()).device.type
        shared = perf_counter() - start
        for density in densities:
            start, artifact = (
                perf_counter(),
                self.artifact(model, self.target(density), tensors | routers, dict(manifest)),
            )
            with sparsify(model, artifact) as handle:
                usage = expert_usage(handle, data.calibration)
                units = handle.layers()[0].units
            artifact.manifest.update(
                k=experts_for(self.target(density), units),
                experts=units,
                density=round(mean_density(usage), 4),
                notes=notes + off_target(self.target(density), units),
                warnings=warnings(usage),
                seconds=round(shared + perf_counter() - start, 1),
            )
            yield artifact

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random routers; the number of experts gives the density."""
        import torch

        from .families import blocks
        from .shared.routers import uniform

        generator, tensors = torch.Generator().manual_seed(0), {}
        for block in blocks(model):
            neurons, width = block.linears["up"].weight.shape
            units = neurons // self.options.expert_size
            tensors[f"router.{block.index}.a"] = uniform(units, width, generator).bfloat16()
            tensors[f"router.{block.index}.b"] = uniform(units, units, generator).bfloat16()
            if self._variant(model.config) == "mean":
                tensors[f"mean.{block.index}"] = torch.zeros(neurons)
        return self.artifact(model, self.target(density), tensors, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from .families import activation_of
        from .shared.experts import attach_experts

        config = attachment.model.config
        activation = "relu" if self._variant(config) == "relufied" else activation_of(config)
        attach_experts(attachment, activation, self.options.expert_size, partial(self._selector, attachment.artifact))

    def _variant(self, config: Any) -> str:
        from .families import is_relu

        return self.options.variant if self.options.variant != "auto" else "relu" if is_relu(config) else "mean"

    def _selector(self, artifact: Artifact, index: int, layer: ExpertFFN) -> Selector | None:
        from sparse_kernels.selectors import Oracle, Router

        from .shared.routers import experts_for, tanh_router

        if artifact.density is None:
            return None  # while preparing
        k, tensors = experts_for(artifact.density, layer.units), artifact.tensors
        if self.options.selector == "oracle":
            return Oracle(layer.units, self._importance(layer, layer.mean), "top-k", k=k)
        if self.options.selector == "mlp":
            return tanh_router(tensors[f"router.{index}.a"], tensors[f"router.{index}.b"], k)
        bias = tensors.get(f"router.{index}.bias")
        return Router((tensors[f"router.{index}.a"],), "top-k", k=k, bias=bias, normalize=bias is not None)

    def _importance(self, layer: ExpertFFN, mean: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Of an expert, from its neurons' values [..., experts, neurons]; with means, the squared distance to them."""
        from .shared.routers import activation_mass

        if mean is None:
            return activation_mass
        centre = mean.view(layer.units, -1).float()
        return lambda hidden: (hidden.float() - centre).square().sum(-1)

    def _relufy(
        self, model: PreTrainedModel, data: Data, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weight differences of the fine-tuned model with ReLU, in the model's own order of neurons."""
        if self._variant(model.config) != "relufied":
            return {}, {}
        from .shared.student import D2DMOE_RATE, Student, Tuning, checkpoint_file, dense_ffn, learning_rate

        steps, batch = self.options.relu_steps, self.options.batch
        rate = learning_rate(model, self.options.lr, D2DMOE_RATE)
        patience = self.options.patience
        tuning = Tuning(data.train(steps * batch), batch, rate, data.seed, progress, patience=patience)
        notes = tuning.notes(steps)
        student = Student(model, tuning, None, dense_ffn("relu"))
        free = ("split", "selector", "expert_size", "windows", "epochs")
        place = checkpoint_file(data, self, model, "relu", free)
        losses = student.train(lambda ids, done: student.task_loss(ids), steps, "moefication with ReLU", place)
        notes += tuning.stopped(losses, steps, "fine-tuning with ReLU")
        told = {"notes": notes, "tokens": tuning.tokens(len(losses)), "lr": rate}
        return student.deltas(model, {}), told | {"relu_loss": losses[:: max(1, len(losses) // 20)]}

    def _routers(
        self, model: PreTrainedModel, tensors: dict[str, Tensor], windows: Tensor, data: Data, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Router tensors and means by layer, and how much of the held-out importance a router catches."""
        from torch.nn.functional import binary_cross_entropy_with_logits as loss

        from .shared.learning import Recipe, learn
        from .shared.routers import labels, neuron_means

        means: dict[str, Tensor] = {}

        def importance(layer: ExpertFFN, x: Tensor) -> Callable[[Tensor], Tensor]:
            if self._variant(model.config) != "mean":
                return self._importance(layer, None)
            means[f"mean.{layer.layer}"] = mean = neuron_means(layer, x)
            return self._importance(layer, mean)

        recipe = Recipe(loss, labels, self.options.epochs, 0.01, "constant")  # the released code's
        start = partial(self._start, data.seed)
        trained = recipe if self.options.selector == "mlp" else None
        found, caught = learn(self, model, tensors, windows, data, start, importance, trained, progress=progress)
        return found | {name: mean.cpu() for name, mean in means.items()}, caught

    def _start(self, seed: int, layer: ExpertFFN) -> Router | None:
        """The router of a layer before training, which only the MLP gets: it starts as its experts' centres."""
        import torch

        from sparse_kernels.selectors import Router

        from .shared.routers import centres, similarity, tanh_router, uniform

        generator = torch.Generator().manual_seed(1009 * seed + layer.layer)
        if self.options.selector == "mlp":
            return tanh_router(centres(layer).cpu(), torch.eye(layer.units))
        if self.options.selector == "similarity":
            return similarity(centres(layer))
        if self.options.selector == "random":  # directions drawn at random: what a router is worth untaught
            return Router((uniform(layer.units, layer.up.in_features, generator),), "top-k", k=1)
        return None
