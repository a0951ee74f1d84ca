"""The dense model, fine-tuned on as many tokens as the trained methods: the baseline that is fair to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent
from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DenseFinetunedOptions:
    """steps, batch (windows per step): the budget, by default what lte and d2dmoe spend on one artifact; lr: learning
    rate (0: as for lte); lora_rank, patience: as for lte."""

    steps: int = 450
    batch: int = 8
    lr: float = 0.0
    lora_rank: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise UsageError("dense-finetuned needs steps and batch of at least 1: try dense-finetuned:steps=450.")
        if self.lora_rank < 0 or self.patience < 0:
            raise UsageError("dense-finetuned needs lora_rank and patience from 0: try dense-finetuned:patience=3.")


class DenseFinetuned(Method):
    name = "dense-finetuned"
    summary = "the model, dense, fine-tuned as long as the trained methods"
    training = "trained"
    densities = (None,)
    fidelity = "the baseline of fine-tuned methods: same text, loop, rate and storage of weight differences"
    Options = DenseFinetunedOptions
    options: DenseFinetunedOptions

    def budget(self, config: Any) -> int:
        return self.options.steps * self.options.batch

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.student import LTE_RATE, Student, Tuning, checkpoint_file, learning_rate

        start, steps, batch = perf_counter(), self.options.steps, self.options.batch
        rank, patience = self.options.lora_rank, self.options.patience
        rate = learning_rate(model, self.options.lr, LTE_RATE, rank)
        tuning = Tuning(data.train(steps * batch), batch, rate, data.seed, progress, rank, patience)
        notes = tuning.notes(steps)
        student = Student(model, tuning)
        place = checkpoint_file(data, self, model, "dense")
        losses = student.train(lambda ids, done: student.task_loss(ids), steps, "dense fine-tuning", place)
        manifest = {
            "corpus": data.corpus,
            "seed": data.seed,
            "lr": rate,
            "loss": [round(v, 4) for v in losses[:: max(1, len(losses) // 20)]],
            "notes": notes + tuning.stopped(losses, steps, "fine-tuning"),
            "tokens": tuning.tokens(len(losses)),
            "seconds": round(perf_counter() - start, 1),
            "device": next(model.parameters()).device.type,
        }
        for density in densities:
            yield self.artifact(model, density, student.deltas(model, {}), dict(manifest))

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """Random weights need no fine-tuning: it changes no cost."""
        return self.artifact(model, density, {}, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from .shared.experts import attach_weights

        attach_weights(attachment)
