"""LTE: learn to be efficient (Zheng et al., arXiv 2402.06126, NeurIPS 2024).

FFN neurons are clustered into experts of 32. Stage 1 trains the model and one linear router per FFN together, with
every expert weighted by its sigmoid score and two penalties: one pushes scores down (efficiency), one pushes them
away from the threshold (separability). Stage 2 freezes the routers, switches each expert fully on or off, and lets
the model adapt. Density follows from the efficiency weight eta, which is searched: one stage-1 training per trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent, sparsify
from .errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparse_kernels.layers import ExpertFFN
    from sparse_kernels.meter import Meter, Phase
    from sparse_kernels.selectors import Selector

    from .families import Block
    from .shared.student import Tuning


SELECTORS = ("router", "oracle", "random")
TAU = 0.5  # the paper's threshold on sigmoid scores, in all experiments; the same decision as logit > 0


@dataclass(frozen=True)
class LteOptions:
    """expert_size: neurons per expert; eta: efficiency weight (0: searched to reach the target density);
    lambda_sep: separability weight; sep_eps: keeps the separability penalty finite at the threshold, and low enough
    for scores to cross it: with 0.01, every eta from 0.03 to 1 ended at the same density on the reference model;
    stage1_steps, stage2_steps, batch (windows per step): the training budget; lr: learning rate (0: the paper's
    1.5e-5 for 4096-wide models, scaled by 4096 / hidden size); tolerance: accepted distance to the target density;
    trials: stage-1 trainings the search may spend on one target; dense_prefix: in stage 2 a random prefix of every
    window uses all experts, as a prompt does under mode decode (false: the paper's, every token routed); lora_rank: for
    large models, train updates of the linear layers of this rank and the routers (0: the paper's, all weights; lr 0
    is then ten times the rate); patience: early stopping, off at 0: a stage ends when so many of 20 validations in a
    row (on held-out training windows, with all of the stage's loss) bring no lower loss, and the best weights are
    kept; selector: router, or one of two controls on the same fine-tuned weights, each layer as dense as its router
    makes it: random (the router before it learned anything) and oracle (the experts whose output has the largest
    norm: no upper bound, since the weights have adapted to the routers); neither is ever timed or ranked."""

    expert_size: int = 32
    eta: float = 0.0
    lambda_sep: float = 0.5
    sep_eps: float = 0.25
    stage1_steps: int = 150
    stage2_steps: int = 300
    batch: int = 8
    lr: float = 0.0
    tolerance: float = 0.01
    trials: int = 8
    dense_prefix: bool = True
    lora_rank: int = 0
    patience: int = 0
    selector: str = "router"

    def __post_init__(self) -> None:
        if self.selector not in SELECTORS:
            raise unknown("lte selector", self.selector, SELECTORS)
        if self.expert_size < 1 or self.batch < 1 or self.trials < 1:
            raise UsageError("lte needs expert_size, batch and trials of at least 1: try lte:expert_size=32.")
        if self.eta < 0 or self.lambda_sep < 0 or self.sep_eps <= 0:
            raise UsageError("lte needs eta >= 0, lambda_sep >= 0 and sep_eps > 0: try lte:sep_eps=0.01.")
        if self.stage1_steps < 1 or self.stage2_steps < 0 or self.lora_rank < 0:
            raise UsageError("lte needs stage1_steps >= 1, stage2_steps and lora_rank >= 0: try lte:stage1_steps=150.")
        if self.patience < 0:
            raise UsageError("lte needs a patience of at least 0: try lte:patience=3.")


class Lte(Method):
    name = "lte"
    summary = "FFN experts of 32 neurons with a trained linear router and a threshold"
    paper = "arXiv 2402.06126 (NeurIPS 2024)"
    training = "trained"
    sites = ("ffn",)
    fidelity = (
        "paper: balanced k-means on gate rows, both losses, two stages, threshold 0.5, experts not scaled by their "
        "score; adapted: the separability penalty has an epsilon (0.25, not a tiny one), no dense fine-tuning comes "
        "before stage 1 as the paper's language models have it, embeddings and lm_head stay frozen, stage 2 sees dense "
        "prompts as decoding does, the training text is the run's corpus, weight differences are stored in 8 bits"
    )
    Options = LteOptions
    options: LteOptions

    def why_not(self, config: Any) -> str | None:
        from .families import why_no_experts

        return why_no_experts(self.name, config, self.options.expert_size)

    def budget(self, config: Any) -> int:
        options = self.options
        trials = 1 if options.eta else options.trials
        return options.batch * (trials * options.stage1_steps + options.stage2_steps)

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        if reason := self.why_not(model.config):
            raise UsageError(reason)
        trainer = _Trainer(self, model, data, progress)
        for density in densities:
            tensors, manifest = trainer.reach(self.target(density))
            yield self.artifact(model, density, tensors, manifest)

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random routers; the threshold of each is the quantile of its scores that gives the density."""
        import torch

        from .families import blocks
        from .shared.selection import set_thresholds, thresholds

        target = self.target(density)
        tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for block in blocks(model):
            width, hidden = block.linears["up"].weight.shape
            router = torch.randn(width // self.options.expert_size, hidden, generator=generator) * hidden**-0.5
            tensors[f"router.{block.index}"] = router.to(torch.bfloat16)
        with sparsify(model, self.artifact(model, density, tensors, {})) as handle:
            set_thresholds(handle, tokens, target, last)
            tensors |= thresholds(handle)
        return self.artifact(model, density, tensors, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        import torch

        from sparse_kernels.selectors import Oracle, Router

        from .families import activation_of
        from .shared.experts import attach_experts
        from .shared.routers import output_norms

        tensors = attachment.artifact.tensors

        def selector(index: int, layer: ExpertFFN) -> Selector:
            threshold = tensors.get(f"threshold.{index}", torch.zeros(1))
            if self.options.selector == "oracle":
                return Oracle(layer.units, output_norms(layer), "threshold", threshold)
            return Router((tensors[f"router.{index}"],), "threshold", threshold)

        attach_experts(attachment, activation_of(attachment.model.config), self.options.expert_size, selector)


class _Trainer:
    """Stage 1 for as many eta as the search asks for (each trained once), stage 2 for the chosen one."""

    def __init__(self, method: Lte, model: PreTrainedModel, data: Data, progress: Progress) -> None:
        from .families import blocks
        from .shared.clustering import balanced_kmeans, expert_permutation
        from .shared.student import LTE_RATE, Tuning, learning_rate

        start, options = perf_counter(), method.options
        self.method, self.options, self.model, self.data = method, options, model, data
        longest = max(options.stage1_steps, options.stage2_steps)
        windows = data.train(options.batch * longest)
        rank = options.lora_rank
        rate = learning_rate(model, options.lr, LTE_RATE, rank)
        self.tuning = Tuning(windows, options.batch, rate, data.seed, progress, rank, options.patience)
        self.notes = self.tuning.notes(longest)
        self.trained: dict[float, dict[str, Tensor]] = {}
        self.density: dict[float, float] = {}
        self.stopped: dict[float, list[str]] = {}  # notes on stage 1
        self.permutations = {}
        found = list(blocks(model))
        for block in found:
            key = block.linears.get("gate", block.linears["up"]).weight
            labels = balanced_kmeans(key, options.expert_size, seed=data.seed)
            self.permutations[f"permutation.{block.index}"] = expert_permutation(labels).int().cpu()
            progress("lte clustering neurons", block.index + 1, len(found))
        # What all densities share: clustering and the stage-1 trainings so far.
        self.tokens, self.seconds = 0, perf_counter() - start

    def reach(self, density: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The artifact's tensors and manifest for one target density."""
        from .shared.search import missed, search
        from .shared.selection import expert_usage, mean_density, warnings

        eta = self.options.eta or search(
            density, self.density, self._stage1, self.options.tolerance, self.options.trials
        )
        if eta not in self.density:
            self._stage1(eta)
        why = "eta is given" if self.options.eta else f"the nearest of at most {self.options.trials} trials of eta"
        start, label = perf_counter(), f"lte stage 2 at density {density:.2f}"
        student = self._student(self.trained[eta])
        losses = student.train_hard(self.options.stage2_steps, label, self._file(eta, 2))
        tensors = student.tensors(self.model, self.permutations)
        usage = expert_usage(student.student, self.data.calibration)
        if self.options.selector != "router":
            tensors, usage = self._control(density, tensors, usage)
        reached, tolerance = mean_density(usage), self.options.tolerance
        if abs(self.density[eta] - density) <= tolerance:
            why = f"stage 2 moved it from {self.density[eta]:.3f}"
        stopped = self.stopped[eta] + self.tuning.stopped(losses, self.options.stage2_steps, "stage 2")
        manifest = {
            "corpus": self.data.corpus,
            "seed": self.data.seed,
            "eta": eta,
            "search": {f"{e:.4g}": round(d, 4) for e, d in sorted(self.density.items())},
            "lr": self.tuning.lr,
            "stage1_density": round(self.density[eta], 4),
            "target_reached": abs(reached - density) <= tolerance,
            "stage2_loss": [round(v, 4) for v in losses[:: max(1, len(losses) // 20)]],
            "stage2_density": round(reached, 4),
            "notes": self.notes + stopped + missed(density, reached, why, tolerance),
            "warnings": warnings(usage),
            "tokens": self.tokens + self.tuning.tokens(len(losses)),
            "seconds": round(self.seconds + perf_counter() - start, 1),
            "device": next(self.model.parameters()).device.type,
        }
        return tensors, manifest

    def _control(
        self, density: float, tensors: dict[str, Tensor], usage: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors and the usage of a control: thresholds at which each layer is as dense as by its own router."""
        import torch

        from .families import blocks
        from .shared.selection import expert_usage, set_thresholds, thresholds

        generator = torch.Generator().manual_seed(self.tuning.seed)
        for block in blocks(self.model):
            tensors[f"router.{block.index}"] = untaught(block, self.options.expert_size, generator).bfloat16()
        shares = {name: float(share.mean()) for name, share in usage.items()}
        with sparsify(self.model, self.method.artifact(self.model, density, tensors, {})) as handle:
            set_thresholds(handle, self.data.calibration, shares)
            return tensors | thresholds(handle), expert_usage(handle, self.data.calibration)

    def _stage1(self, eta: float) -> None:
        from .shared.selection import expert_usage, mean_density
        from .shared.training import agreed

        start = perf_counter()
        student = self._student(None)
        steps, label = self.options.stage1_steps, f"lte stage 1 at eta {eta:.3g}"
        losses = student.train_soft(eta, steps, label, self._file(eta, 1))
        self.stopped[eta] = self.tuning.stopped(losses, steps, "stage 1")
        self.density[eta] = agreed(mean_density(expert_usage(student.student, self.data.calibration)))
        self.trained[eta] = student.state()
        self.tokens += self.tuning.tokens(len(losses))
        self.seconds += perf_counter() - start

    def _student(self, state: dict[str, Tensor] | None) -> _Student:
        return _Student(self.options, self.model, self.tuning, self.permutations, state)

    def _file(self, eta: float, stage: int) -> Path | None:
        from .shared.student import checkpoint_file

        return checkpoint_file(self.data, self.method, self.model, f"eta{eta:.6g}-stage{stage}", ("selector",))


class _Student:
    """A student with neurons in expert order and a trainable router in every FFN."""

    def __init__(
        self,
        options: LteOptions,
        model: PreTrainedModel,
        tuning: Tuning,
        permutations: dict[str, Tensor],
        state: dict[str, Tensor] | None,
    ) -> None:
        import torch

        from sparse_kernels.selectors import Router

        from .families import activation_of
        from .shared.routing import SoftExpertFFN
        from .shared.student import Student

        generator, activation = torch.Generator().manual_seed(tuning.seed), activation_of(model.config)

        def layer(block: Block, phase: Phase, meter: Meter) -> SoftExpertFFN:
            gate, up, down = block.linears.get("gate"), block.linears["up"], block.linears["down"]
            router = Router((untaught(block, options.expert_size, generator),))
            shared = activation, options.expert_size, router, block.index, phase, meter
            made = SoftExpertFFN(gate, up, down, *shared)
            return made.requires_grad_(True)

        self.options, self.seed = options, tuning.seed
        self.student = Student(model, tuning, permutations, layer)
        if state is not None:
            self.student.load(state)

    @property
    def layers(self) -> list[Any]:
        return self.student.layers()

    def state(self) -> dict[str, Tensor]:
        return self.student.state()

    def train_soft(self, eta: float, steps: int, label: str, checkpoint: Path | None) -> list[float]:
        """Stage 1: task + eta * efficiency + lambda * separability (LTE, eqs. 4-6), everything trained."""
        import torch

        for layer in self.layers:
            layer.soft = True

        def loss(windows: Tensor, done: float) -> Tensor:
            task = self.student.task_loss(windows)
            scores = torch.stack([layer.scores for layer in self.layers])
            efficiency, separability = penalties(scores, self.options.sep_eps)
            return task + eta * efficiency + self.options.lambda_sep * separability

        losses = self.student.train(loss, steps, label, checkpoint)
        for layer in self.layers:
            layer.soft = False
        return losses

    def train_hard(self, steps: int, label: str, checkpoint: Path | None) -> list[float]:
        """Stage 2: routers frozen, experts on or off, the model adapts on the task loss alone."""
        for layer in self.layers:
            layer.selector.requires_grad_(False)
        return self.student.train(self._hard_loss, steps, label, checkpoint) if steps else []

    def _hard_loss(self, windows: Tensor, done: float) -> Tensor:
        import torch

        if not self.options.dense_prefix:
            return self.student.task_loss(windows)
        positions = torch.arange(windows.shape[1], device=windows.device)
        # Drawn from the batch itself, so that a resumed training cuts the same windows at the same places.
        generator = torch.Generator().manual_seed(int(windows.sum()))
        cut = torch.randint(windows.shape[1], (len(windows), 1), generator=generator).to(windows.device)
        with self.student.positions(positions >= cut):
            return self.student.task_loss(windows)

    def tensors(self, base: PreTrainedModel, permutations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The artifact: permutations, routers, and every trained parameter as a difference to the dense one."""
        routers = {f"router.{n.layer}": n.selector.layers[0].detach().cpu().bfloat16() for n in self.layers}
        return {**permutations, **routers, **self.student.deltas(base, permutations)}


def untaught(block: Block, size: int, generator: Any) -> Tensor:
    """A router of a block's experts of `size` neurons before training, float32 [experts, d]."""
    from .shared.routers import uniform

    up = block.linears["up"]
    return uniform(up.out_features // size, up.in_features, generator)


def penalties(scores: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LTE's efficiency and separability penalties (eqs. 4 and 5) of sigmoid scores [..., experts], float32.

    Efficiency is the mean of G^2; separability the mean of 1 / ((G - tau)^2 + eps), with eps = 0 in the paper: as
    written it has no finite mean over scores that start near tau.
    """
    return scores.square().mean(), (1 / ((scores - TAU).square() + eps)).mean()
