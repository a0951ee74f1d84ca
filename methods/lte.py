"""LTE: learn to be efficient (Zheng et al., arXiv 2402.06126, NeurIPS 2024).

FFN neurons are clustered into experts of 32. Stage 1 trains the model and one linear router per FFN together, with
every expert weighted by its sigmoid score and two penalties: one pushes scores down (efficiency), one pushes them
away from the threshold (separability). Stage 2 freezes the routers, switches each expert fully on or off, and lets
the model adapt. Density follows from the efficiency weight eta, which is searched: one stage-1 training per trial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact, fingerprint
from .base import Attachment, Data, Method, Progress, silent
from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


TAU = 0.5  # the paper's threshold on sigmoid scores, in all experiments; the same decision as logit > 0


@dataclass(frozen=True)
class LteOptions:
    """expert_size: neurons per expert; eta: efficiency weight (0: searched to reach the target density);
    lambda_sep: separability weight; sep_eps: keeps the separability penalty finite at the threshold, and low enough
    for scores to cross it: with 0.01, every eta from 0.03 to 1 ended at the same density on the reference model;
    stage1_steps, stage2_steps, batch (windows per step): the training budget; lr: learning rate (0: the paper's
    1.5e-5 for 4096-wide models, scaled by 4096 / hidden size); tolerance: accepted distance to the target density;
    trials: stage-1 trainings the search may spend on one target; dense_prefix: in stage 2 a random prefix of every
    window uses all experts, as a prompt does under mode decode (false: the paper's, every token routed)."""

    expert_size: int = 32
    eta: float = 0.0
    lambda_sep: float = 0.5
    sep_eps: float = 0.25
    stage1_steps: int = 150
    stage2_steps: int = 300
    batch: int = 8
    lr: float = 0.0
    tolerance: float = 0.03
    trials: int = 5
    dense_prefix: bool = True

    def __post_init__(self) -> None:
        if self.expert_size < 1 or self.batch < 1 or self.trials < 1:
            raise UsageError("lte needs expert_size, batch and trials of at least 1: try lte:expert_size=32.")
        if self.eta < 0 or self.lambda_sep < 0 or self.sep_eps <= 0:
            raise UsageError("lte needs eta >= 0, lambda_sep >= 0 and sep_eps > 0: try lte:sep_eps=0.01.")
        if self.stage1_steps < 1 or self.stage2_steps < 0:
            raise UsageError("lte needs stage1_steps >= 1 and stage2_steps >= 0: try lte:stage1_steps=150.")


class Lte(Method):
    name = "lte"
    summary = "FFN experts of 32 neurons with a trained linear router and a threshold"
    paper = "arXiv 2402.06126 (NeurIPS 2024)"
    training = "trained"
    sites = ("ffn",)
    fidelity = (
        "paper: balanced k-means on gate rows, both losses, two stages, threshold 0.5, experts not scaled by their "
        "score; adapted: the separability penalty has an epsilon, embeddings and lm_head stay frozen, stage 2 sees "
        "dense prompts as decoding does, the training text is the run's corpus, weight differences are stored in 8 bits"
    )
    Options = LteOptions
    options: LteOptions

    def why_not(self, config: Any) -> str | None:
        from .families import activation_of

        try:
            activation_of(config)
        except UsageError as error:
            return str(error)
        width = getattr(config, "intermediate_size", None) or config.ffn_dim
        size = self.options.expert_size
        if width % size:
            fits = max(s for s in range(1, size + 1) if width % s == 0)
            return (
                f"lte groups FFN neurons into experts of {size}, which does not divide this model's {width}: "
                f"choose --methods lte:expert_size={fits}."
            )
        return None

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        trainer = _Trainer(self.options, model, data, progress)
        for density in densities:
            if density is None:
                raise UsageError("lte needs a target density: add --density 0.5.")
            tensors, manifest = trainer.reach(density)
            yield self.artifact(model, density, tensors, manifest)

    def synthesize(self, model: PreTrainedModel, density: float | None, tokens: Tensor) -> Artifact:
        """Random routers; the threshold of each is the quantile of its scores that gives the density."""
        import torch

        from .families import blocks

        if density is None:
            raise UsageError("lte needs a target density: add --density 0.5.")
        tensors: dict[str, Tensor] = {}
        handles = []

        def listen(index: int, router: Tensor) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                scores = torch.nn.functional.linear(args[0], router.to(args[0])).float().flatten()
                sample = scores[torch.randint(len(scores), (100_000,), device=scores.device)]
                tensors[f"threshold.{index}"] = sample.quantile(1 - density).reshape(1).cpu()

            return hook

        generator = torch.Generator().manual_seed(0)
        for block in blocks(model):
            width, hidden = block.linears["up"].weight.shape
            router = torch.randn(width // self.options.expert_size, hidden, generator=generator) * hidden**-0.5
            tensors[f"router.{block.index}"] = router.to(torch.bfloat16)
            handles.append(block.linears["up"].register_forward_pre_hook(listen(block.index, router)))
        with torch.inference_mode():
            model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return self.artifact(model, density, tensors, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        import torch

        from sparse_kernels.layers import ExpertFFN

        from .families import activation_of, blocks
        from .shared.experts import dequantise, neuron_order, permuted, place_ffn

        tensors = attachment.artifact.tensors
        order = neuron_order(attachment.model, tensors)
        for name, parameter in list(attachment.model.named_parameters(remove_duplicate=False)):
            if name in order or f"delta.{name}" in tensors:
                value = permuted(parameter.detach(), order.get(name))
                if f"delta.{name}" in tensors:
                    value = value.float() + dequantise(tensors, name).to(value.device)
                attachment.set_parameter(name, value)
        activation = activation_of(attachment.model.config)
        for block in blocks(attachment.model):
            router = tensors[f"router.{block.index}"]
            threshold = tensors.get(f"threshold.{block.index}", torch.zeros(1))
            gate, up, down = block.linears.get("gate"), block.linears["up"], block.linears["down"]
            shared = block.index, attachment.phase, attachment.meter
            place_ffn(block, ExpertFFN(gate, up, down, activation, router, threshold, *shared), attachment.replace)


class _Trainer:
    """Stage 1 for as many eta as the search asks for (each trained once), stage 2 for the chosen one."""

    def __init__(self, options: LteOptions, model: PreTrainedModel, data: Data, progress: Progress) -> None:
        from .families import blocks
        from .shared.clustering import balanced_kmeans, expert_permutation

        start = perf_counter()
        self.options, self.model, self.data, self.progress = options, model, data, progress
        self.windows = data.train(options.batch * max(options.stage1_steps, options.stage2_steps))
        hidden: Any = model.config.hidden_size
        self.lr = options.lr or 1.5e-5 * 4096 / hidden
        self.trained: dict[float, dict[str, Tensor]] = {}
        self.density: dict[float, float] = {}
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
        from .shared.search import search

        eta = self.options.eta or search(
            density, self.density, self._stage1, self.options.tolerance, self.options.trials
        )
        if eta not in self.density:
            self._stage1(eta)
        start, label = perf_counter(), f"lte stage 2 at density {density:.2f}"
        student = self._student(self.trained[eta])
        losses = student.train_hard(self.options.stage2_steps, label, self._file(eta, 2))
        manifest = {
            "corpus": self.data.corpus,
            "seed": self.data.seed,
            "eta": eta,
            "search": {f"{e:.4g}": round(d, 4) for e, d in sorted(self.density.items())},
            "lr": self.lr,
            "stage1_density": round(self.density[eta], 4),
            "target_reached": abs(self.density[eta] - density) <= self.options.tolerance,
            "stage2_loss": [round(v, 4) for v in losses[:: max(1, len(losses) // 20)]],
            "stage2_density": round(student.density(self.data.calibration), 4),
            "tokens": self.tokens + self.options.stage2_steps * self.options.batch * self.windows.shape[1],
            "seconds": round(self.seconds + perf_counter() - start, 1),
            "device": next(self.model.parameters()).device.type,
        }
        return student.tensors(self.model, self.permutations), manifest

    def _stage1(self, eta: float) -> None:
        start = perf_counter()
        student = self._student(None)
        student.train_soft(eta, self.options.stage1_steps, f"lte stage 1 at eta {eta:.3g}", self._file(eta, 1))
        self.density[eta] = student.density(self.data.calibration)
        self.trained[eta] = student.state()
        self.tokens += self.options.stage1_steps * self.options.batch * self.windows.shape[1]
        self.seconds += perf_counter() - start

    def _student(self, state: dict[str, Tensor] | None) -> _Student:
        data = self.windows, self.data.seed
        return _Student(self.options, self.model, self.permutations, state, self.lr, *data, self.progress)

    def _file(self, eta: float, stage: int) -> Path | None:
        if self.data.workspace is None:
            return None
        identity = json.dumps([asdict(self.options), self.data.corpus, self.data.seed, fingerprint(self.model)])
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return Path(self.data.workspace) / f"lte-{name}-eta{eta:.6g}-stage{stage}.safetensors"


class _Student:
    """A float32 copy of the model, neurons in expert order, with a trainable router in every FFN."""

    def __init__(
        self,
        options: LteOptions,
        model: PreTrainedModel,
        permutations: dict[str, Tensor],
        state: dict[str, Tensor] | None,
        lr: float,
        windows: Tensor,
        seed: int,
        progress: Progress,
    ) -> None:
        import copy

        import torch

        from sparse_kernels.layers import Meter, Phase

        from .families import activation_of, blocks
        from .shared.experts import neuron_order, permuted, place_ffn
        from .shared.routing import SoftExpertFFN

        self.options, self.lr, self.windows, self.seed, self.progress = options, lr, windows, seed, progress
        self.phase, self.meter = Phase(), Meter()
        self.phase.active = True
        self.model = copy.deepcopy(model).float().requires_grad_(True)
        self.parameters = dict(self.model.named_parameters())
        embeddings = {id(m.weight) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        with torch.no_grad():
            for name, order in neuron_order(self.model, permutations).items():
                self.parameters[name].copy_(permuted(self.parameters[name], order))
        for parameter in self.parameters.values():
            parameter.requires_grad_(id(parameter) not in embeddings)
        self.layers: list[SoftExpertFFN] = []
        generator = torch.Generator().manual_seed(seed)
        for block in list(blocks(self.model)):
            linears = block.linears
            experts, bound = linears["up"].out_features // options.expert_size, linears["up"].in_features ** -0.5
            router = (torch.rand(experts, linears["up"].in_features, generator=generator) * 2 - 1) * bound
            layer = SoftExpertFFN(
                linears.get("gate"),
                linears["up"],
                linears["down"],
                activation_of(self.model.config),
                router,
                torch.zeros(1),
                block.index,
                self.phase,
                self.meter,
            )
            layer.router.requires_grad_(True)
            self.layers.append(layer)
            place_ffn(block, layer, self._set)
        if state is not None:
            self._load(state)

    def _set(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}

    def _load(self, state: dict[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def _task_loss(self, windows: Tensor) -> Tensor:
        import torch

        logits = self.model(input_ids=windows, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())

    def train_soft(self, eta: float, steps: int, label: str, checkpoint: Path | None) -> list[float]:
        """Stage 1: task + eta * efficiency + lambda * separability (LTE, eqs. 4-6), everything trained."""
        import torch

        for layer in self.layers:
            layer.soft = True

        def loss(windows: Tensor) -> Tensor:
            task = self._task_loss(windows)
            scores = torch.stack([layer.scores for layer in self.layers])
            efficiency, separability = penalties(scores, self.options.sep_eps)
            return task + eta * efficiency + self.options.lambda_sep * separability

        return self._train(loss, steps, label, checkpoint)

    def train_hard(self, steps: int, label: str, checkpoint: Path | None) -> list[float]:
        """Stage 2: routers frozen, experts on or off, the model adapts on the task loss alone."""
        for layer in self.layers:
            layer.soft = False
            layer.router.requires_grad_(False)
        return self._train(self._hard_loss, steps, label, checkpoint) if steps else []

    def _hard_loss(self, windows: Tensor) -> Tensor:
        import torch

        if self.options.dense_prefix:
            positions = torch.arange(windows.shape[1], device=windows.device)
            # Drawn from the batch itself, so that a resumed training cuts the same windows at the same places.
            generator = torch.Generator().manual_seed(int(windows.sum()))
            cut = torch.randint(windows.shape[1], (len(windows), 1), generator=generator).to(windows.device)
            self.phase.active = positions >= cut
        try:
            return self._task_loss(windows)
        finally:
            self.phase.active = True

    def _train(self, loss: Any, steps: int, label: str, checkpoint: Path | None) -> list[float]:
        from .shared.training import train

        return train(
            self.model,
            self.windows,
            loss,
            steps=steps,
            batch=self.options.batch,
            learning_rate=self.lr,
            seed=self.seed,
            label=label,
            progress=self.progress,
            checkpoint=checkpoint,
        )

    def density(self, windows: Tensor) -> float:
        """The share of experts that the threshold leaves on, over calibration text, all layers weighted equally."""
        import torch

        for layer in self.layers:
            layer.soft = False
        self.meter.reset()
        device = next(self.model.parameters()).device
        with torch.inference_mode(), self.meter.on():
            for start in range(0, min(len(windows), 16), 4):
                self.model(input_ids=windows[start : start + 4].to(device), use_cache=False, logits_to_keep=1)
        counts = [torch.cat(found).float().mean() for found in self.meter.counts.values()]
        return float(torch.stack(counts).mean()) / self.layers[0].units

    def tensors(self, base: PreTrainedModel, permutations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The artifact: permutations, routers, and every trained parameter as a difference to the dense one."""
        import torch

        from .shared.experts import neuron_order, permuted, quantise

        found = dict(permutations)
        order = neuron_order(base, permutations)
        for layer in self.layers:
            found[f"router.{layer.layer}"] = layer.router.detach().cpu().to(torch.bfloat16)
        for name, original in base.named_parameters():
            parameter = self.parameters[name]
            if parameter.requires_grad:
                delta = parameter.detach() - permuted(original.detach(), order.get(name)).float()
                found[f"delta.{name}"], found[f"scale.{name}"] = quantise(delta)
        return found


def penalties(scores: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LTE's efficiency and separability penalties (eqs. 4 and 5) of sigmoid scores [..., experts], float32.

    Efficiency is the mean of G^2; separability the mean of 1 / ((G - tau)^2 + eps), with eps = 0 in the paper: as
    written it has no finite mean over scores that start near tau.
    """
    return scores.square().mean(), (1 / ((scores - TAU).square() + eps)).mean()
