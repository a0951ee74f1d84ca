"""A copy of a model that is fine-tuned, and what of it an artifact keeps."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.meter import Meter, Phase

from ..artifact import fingerprint
from ..base import Data, Method, Progress
from ..errors import UsageError
from ..families import Block, blocks
from . import lora
from .experts import neuron_order, permuted, place_ffn, quantise
from .training import accelerator, sharded, train, whole

MINIMUM = 5000  # tokens; less is learned by heart
VALIDATIONS = 20  # of a training with early stopping
FORMAT = 2  # of checkpoints: those that an earlier version left are not read


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune. windows: int64 [n, window]; batch: windows per step; lr: peak rate.

    lora_rank: of the updates of linear layers that are trained in place of all weights; 0 for all; patience: of
    VALIDATIONS on held-out windows, those in a row without a lower loss before training stops; 0 for never.
    """

    windows: Tensor
    batch: int
    lr: float
    seed: int
    progress: Progress
    lora_rank: int = 0
    patience: int = 0

    def tokens(self, steps: int) -> int:
        return steps * self.batch * self.windows.shape[1]

    @property
    def held_out(self) -> int:
        """The windows, last of all, that early stopping judges by: whole batches, about a tenth, four at most."""
        return self.batch * max(1, min(4, len(self.windows) // (10 * self.batch))) if self.patience else 0

    def stopped(self, losses: Sequence[float], steps: int, label: str) -> list[str]:
        """A note if early stopping ended a training of `steps`."""
        early = len(losses) < steps
        return [f"{label} stopped early, after {len(losses)} of {steps} steps"] if early else []

    def notes(self, steps: int) -> list[str]:
        """A note if the text is shorter than what `steps` read. Raises UsageError if there is hardly any."""
        if len(self.windows) < 2 * self.held_out:
            raise UsageError(
                f"early stopping holds out {self.held_out} windows of training text, of {len(self.windows)}: "
                "choose a larger --corpus or patience=0."
            )
        found, wanted = self.windows.numel(), self.tokens(steps)
        if found >= 0.95 * wanted:
            return []
        if found < MINIMUM:
            raise UsageError(
                f"fine-tuning found {found} tokens of training text and needs {MINIMUM}: choose a larger --corpus."
            )
        return [
            f"fine-tuned {wanted / found:.1f} times over {found} tokens, because the corpus has no more of {wanted}"
        ]


LTE_RATE = (1.5e-5, 4096)  # a published rate and the width of its model
D2DMOE_RATE = (1e-4, 2048)  # Gemma's, of ReLU-fication too


def learning_rate(model: PreTrainedModel, given: float, published: tuple[float, int], lora_rank: int = 0) -> float:
    """The given rate, or a published one scaled to this model's width."""
    hidden: int = model.config.hidden_size  # type: ignore[assignment]
    rate, width = published
    return given or rate * width / hidden * (lora.RATE if lora_rank else 1.0)


def checkpoint_file(
    data: Data, method: Method, model: PreTrainedModel, stage: str, free: Sequence[str] = ()
) -> Path | None:
    """Where a stage of this very training keeps its state; None without a workspace.

    free: options that make no difference to this stage, so that methods that differ in them alone train it once.
    """
    if data.workspace is None:
        return None
    options = {name: value for name, value in asdict(method.options).items() if name not in free}
    identity = [FORMAT, options, data.corpus, data.seed, fingerprint(model)]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Path(data.workspace) / f"{method.name}-{name}-{stage}.safetensors"


def dense_ffn(activation: str) -> Callable[[Block, Phase, Meter], ExpertFFN]:
    """Makes an FFN that computes everything, with this activation in place of its own."""

    def make(block: Block, phase: Phase, meter: Meter) -> ExpertFFN:
        found = block.linears
        return ExpertFFN(found.get("gate"), found["up"], found["down"], activation, 1, None, block.index, phase, meter)

    return make


class Student:
    """A float32 copy of a model, everything but embeddings and lm_head trainable; or low-rank updates and routers.

    permutations: neuron orders, `permutation.<block>` int [neurons]; layer: makes what stands in for a block's FFN;
    projections: makes what stands in for linear layers of a block, by their names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tuning: Tuning,
        permutations: dict[str, Tensor] | None = None,
        layer: Callable[[Block, Phase, Meter], ExpertFFN] | None = None,
        projections: Callable[[Block, Phase, Meter], dict[str, ExpertFFN]] | None = None,
    ) -> None:
        self.tuning, self.phase, self.meter = tuning, Phase(), Meter()
        self.phase.active = True
        self.model = copy.deepcopy(model).float().requires_grad_(True)
        named = dict(self.model.named_parameters())
        embeddings = {id(m.weight) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        with torch.no_grad():
            for name, order in neuron_order(self.model, permutations or {}).items():
                named[name].copy_(permuted(named[name], order))
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) not in embeddings)
        self._layers: list[ExpertFFN] = []
        found = list(blocks(self.model))
        for block in found if layer else ():
            assert layer is not None
            self._layers.append(layer(block, self.phase, self.meter))
            place_ffn(block, self._layers[-1], self._set)
        for block in found if projections else ():
            assert projections is not None
            for site, made in projections(block, self.phase, self.meter).items():
                self._layers.append(made.requires_grad_(True))
                self._set(f"{block.path}.{block.layout.linears[site]}", made)
        now = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._names = {name: now[id(p)] for name, p in named.items() if id(p) in now}
        if tuning.lora_rank:
            for parameter in named.values():
                parameter.requires_grad_(False)
            lora.adapt((n for block in found for n in block.linears.values()), tuning.lora_rank, tuning.seed)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By the names of the base model, updates merged; without those of layers that another stands in for."""
        found = {}
        for name, now in self._names.items():
            module, _, attribute = now.rpartition(".")
            found[name] = getattr(self.model.get_submodule(module), attribute)
        return found

    def layers(self) -> list[ExpertFFN]:
        """What stands in for the FFNs, in model order, and then for projections."""
        return self._layers

    @contextmanager
    def positions(self, active: bool | Tensor) -> Iterator[None]:
        """Within: exactly these positions are sparse; outside, all are."""
        self.phase.active = active
        try:
            yield
        finally:
            self.phase.active = True

    def _set(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def state(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()).cpu().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])

    def task_loss(self, windows: Tensor) -> Tensor:
        """Mean negative log-likelihood of the next token, nats."""
        logits = self.model(input_ids=windows, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())

    def train(
        self, loss: Callable[[Tensor, float], Tensor], steps: int, label: str, checkpoint: Path | None = None
    ) -> list[float]:
        """`training.train` on this student's text; `loss` is called with windows and the share of the steps done.

        FSDP turns a model's parameters into shards for good: a copy that stayed whole takes the trained values over.
        """
        spare, device = None, next(self.model.parameters()).device
        if sharded():
            self.model.cpu()
            spare = copy.deepcopy((self.model, self._layers, self.phase, self.meter))
            self.model.to(device)
        judges = self.tuning.held_out
        learned, held_out = self.tuning.windows.split([len(self.tuning.windows) - judges, judges])
        losses = train(
            self.model,
            learned,
            loss,
            steps=steps,
            batch=self.tuning.batch,
            learning_rate=self.tuning.lr,
            accumulate=accelerator().gradient_accumulation_steps,
            divide=True,
            held_out=held_out if judges else None,
            every=max(1, steps // VALIDATIONS),
            patience=self.tuning.patience,
            seed=self.tuning.seed,
            label=label,
            progress=self.tuning.progress,
            checkpoint=checkpoint,
        )
        if spare is not None:
            trained = self.state()
            self.model, self._layers, self.phase, self.meter = spare
            self.load(trained)
            self.model.to(device)
        return losses

    def deltas(self, base: PreTrainedModel, permutations: dict[str, Tensor]) -> dict[str, Tensor]:
        """`delta.<name>` and `scale.<name>`: trained parameters as 8-bit differences to the base model's.

        Both in the order of `permutations`, which must be the one the student was made with.
        """
        found: dict[str, Tensor] = {}
        order, parameters = neuron_order(base, permutations), self.parameters
        for name, original in base.named_parameters():
            parameter = parameters.get(name)
            if parameter is not None and parameter.requires_grad:
                delta = parameter.detach() - permuted(original.detach(), order.get(name)).float()
                found[f"delta.{name}"], found[f"scale.{name}"] = quantise(delta)
        return found
