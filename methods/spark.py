"""Spark Transformer: statistical top-k in the FFN (arXiv 2506.06644, NeurIPS 2025), built in or put in afterwards.

A neuron goes on if its score is above mean + c * deviation of the token's own scores: two sums instead of a sort. The
paper trains models with it; `harness.reference.train --model reference-spark` trains one from scratch, and Gemma 3n
has it in its first layers. For such a model this method skips what the model zeroes anyway, to the same output. Other
models can be given the operator without training, which is not the paper's method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent, sparsify
from .errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# How a neuron is scored, and whether the threshold is subtracted from what goes on.
VARIANTS = {
    "native": ("value", True),
    "mask": ("magnitude", False),
    "output": ("output", False),
    "soft": ("value", True),
}
MULTIPLIERS = ("calibrated", "gaussian")


@dataclass(frozen=True)
class SparkOptions:
    """variant: native (the model was trained with statistical top-k: spark_llama, gemma3n); without training: mask
    (neurons with a large activation of the gate), output (large value of the hidden layer; only down is skipped), soft
    (Gemma 3n's operator on the gate, which subtracts the threshold); auto: native where the model has it, else mask,
    though not in a Gemma 3n that lacks it; multiplier, of all but native: calibrated on text, or gaussian, as if scores
    were normal; windows: calibration windows."""

    variant: str = "auto"
    multiplier: str = "calibrated"
    windows: int = 16

    def __post_init__(self) -> None:
        if self.variant not in (*VARIANTS, "auto"):
            raise unknown("spark variant", self.variant, [*VARIANTS, "auto"])
        if self.multiplier not in MULTIPLIERS:
            raise unknown("spark multiplier", self.multiplier, MULTIPLIERS)
        if self.windows < 1:
            raise UsageError("spark needs at least one calibration window: try spark:windows=16.")


class Spark(Method):
    name = "spark"
    summary = "neurons above mean + c * deviation of the gate; built into the model, or put in without training"
    paper = "arXiv 2506.06644 (NeurIPS 2025)"
    training = "training-free"
    sites = ("ffn", "attention")
    densities = (0.5, 0.3, 0.08)
    fidelity = (
        "native, on a model trained with it: the paper's FFN and attention (or Gemma 3n's FFN), same output as the "
        "model; the scaling of attention scores is not published and ours; mask, output and soft, on other models: "
        "post-hoc variants of ours, not the paper's method, which trains from scratch (mask and output never read what "
        "meets a zero of ReLU); statistics in float32, multipliers calibrated on dense activations, so that the "
        "density of sparse ones can differ (if by more than 0.01, it is noted)"
    )
    Options = SparkOptions
    options: SparkOptions

    def why_not(self, config: Any) -> str | None:
        from .families import activation_of, layout_of

        try:
            activation_of(config)
        except UsageError as error:
            return str(error)
        variant, native = self.options.variant, built_in(config) is not None
        if variant == "native" and not native:
            return "spark:variant=native needs a model trained with statistical top-k: choose variant=mask."
        if variant not in ("native", "auto") and native:
            return (
                f"this model selects neurons itself, so spark:variant={variant} has no meaning: choose variant=native."
            )
        if variant == "auto" and not native and layout_of(config).own_selection:
            return (
                f"this {config.model_type} has no statistical top-k in any layer (activation_sparsity_pattern), so "
                "nothing native can be skipped: choose spark:variant=mask to put one in."
            )
        return None

    def skips(self, config: Any) -> tuple[str, ...]:
        """The gate decides, and is dense; how many tokens a Spark Transformer attends to is not the density's."""
        from .families import layout_of

        alone = self._variant(config) == "output" or "gate" not in layout_of(config).linears
        return ("down",) if alone else ("up", "down")

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.search import missed
        from .shared.selection import realised

        start, windows = perf_counter(), data.calibration[: self.options.windows]
        for artifact in self._artifacts(model, windows, densities, progress):
            reached = realised(model, artifact, windows)
            if artifact.density is not None:
                artifact.manifest["notes"] += missed(
                    artifact.density, reached, self._why_missed(model.config, reached < artifact.density)
                )
            artifact.manifest.update(
                corpus=data.corpus,
                tokens=windows.numel(),
                density=round(reached, 4),
                seconds=round(perf_counter() - start, 2),
                device=next(model.parameters()).device.type,
            )
            yield artifact

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        (artifact,) = self._artifacts(model, tokens, [density], last=last)
        artifact.manifest["synthetic"] = True
        return artifact

    def attach(self, attachment: Attachment) -> None:
        from sparse_kernels.gate_first import GateFirstFFN

        from .families import activation_of, blocks
        from .shared.experts import place_ffn

        config, tensors = attachment.model.config, attachment.artifact.tensors
        variant, activation = self._variant(config), activation_of(config)
        score, soft = VARIANTS[variant]
        split, native = getattr(config, "ffn_split", 0), variant == "native"
        attended: int = getattr(config, "attended", 0)
        for block in blocks(attachment.model):
            found = tensors.get(f"multiplier.{block.index}")
            if found is None and tensors:
                continue  # a dense layer of Gemma 3n
            matrices = block.linears.get("gate"), block.linears["up"], block.linears["down"]
            multiplier = None if found is None else float(found)  # none yet: the layer is dense and listened to
            place = block.index, attachment.phase, attachment.meter
            layer = GateFirstFFN(*matrices, activation, multiplier, *place, score, soft, split, native)
            place_ffn(block, layer, attachment.replace)
            if attended:
                from .shared.spark_llama import SparkAttentionLayer

                attention: Any = block.module.get_submodule("self_attn")
                attachment.replace(f"{block.path}.self_attn", SparkAttentionLayer(attention, *place))

    def _variant(self, config: Any) -> str:
        if self.options.variant != "auto":
            return self.options.variant
        return "mask" if built_in(config) is None else "native"

    def _why_missed(self, config: Any, below: bool) -> str:
        from .families import is_relu

        if below and is_relu(config) and VARIANTS[self._variant(config)][0] != "value":
            return "what ReLU leaves at zero is not read"
        if built_in(config) is None and self.options.multiplier == "calibrated":
            return "multipliers are calibrated on dense activations"
        return "multipliers are those of normal scores"

    def _artifacts(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        densities: Sequence[float | None],
        progress: Progress = silent,
        last: int | None = None,
    ) -> Iterator[Artifact]:
        """Artifacts with a multiplier for every sparse layer, which windows calibrate where they are to."""
        import torch

        from sparse_kernels import gaussian_multiplier

        from .families import blocks
        from .shared.calibration import multipliers

        if reason := self.why_not(model.config):
            raise UsageError(reason)
        variant, own = self._variant(model.config), built_in(model.config)
        if own is not None:
            found = [
                {i: gaussian_multiplier(density or share) for i, share in enumerate(own) if share}
                for density in densities
            ]
        elif self.options.multiplier == "gaussian":
            layers = [block.index for block in blocks(model)]
            found = [dict.fromkeys(layers, gaussian_multiplier(self.target(density))) for density in densities]
        else:
            with sparsify(model, self.artifact(model, None, {}, {})) as handle:
                wanted = [self.target(density) for density in densities]
                found = multipliers(handle, windows, wanted, progress, last=last)
        for density, values in zip(densities, found, strict=True):
            tensors = {f"multiplier.{index}": torch.tensor([value]) for index, value in values.items()}
            manifest: dict[str, Any] = {"variant": variant, "notes": []}
            if own is not None:
                manifest["trained_density"] = max(own)
                if density not in (None, max(own)):
                    manifest["notes"] += [f"the model was trained to keep {max(own):g} of its neurons, not {density:g}"]
            yield self.artifact(model, density, tensors, manifest)


def built_in(config: Any) -> list[float] | None:
    """By layer, the share of neurons that a model's own statistical top-k keeps (0: dense); None without any."""
    config = config.get_text_config()
    if config.model_type == "spark_llama":
        return [config.ffn_density] * config.num_hidden_layers
    pattern = getattr(config, "activation_sparsity_pattern", None)
    if pattern is None or not any(pattern):
        return None
    return [round(1 - share, 9) if share else 0.0 for share in pattern]
