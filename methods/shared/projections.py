"""Attention projections as two-layer MLPs, distilled from them, whose neurons can be experts (D2DMoE, section 1.5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.meter import Meter, Phase
from sparse_kernels.selectors import Selector

from ..base import Attachment, Progress, silent
from ..families import Block, blocks
from .calibration import later, walk
from .penalties import penalty
from .routers import uniform
from .training import train

SITES = "qkvo"
HOYER = 0.4  # of the share of hidden neurons that are on: the paper's 1e-3 at the 384 neurons of its ViT
BATCH = 512  # tokens a step
LEARNING_RATE = 1e-3

Make = Callable[[Block, Phase, Meter], dict[str, ExpertFFN]]


class ProjectionMLP(ExpertFFN):
    """down(act(up(x))) in place of a linear layer, over experts of contiguous neurons like an FFN's."""

    def __init__(
        self,
        site: str,
        replaced: int,
        up: nn.Linear,
        down: nn.Linear,
        activation: str,
        size: int,
        layer: int,
        phase: Phase,
        meter: Meter,
    ) -> None:
        """site: of the linear layer that it replaces, which has `replaced` weights."""
        super().__init__(None, up, down, activation, size, None, layer, phase, meter)
        self.site, self.replaced = site, replaced

    def share(self, density: float) -> float:
        hidden = density if self.selector is None or self.selector.fast else 1.0  # an oracle computes it whole
        return (hidden * self.up.weight.numel() + density * self.down.weight.numel()) / self.replaced

    def linears(self) -> dict[str, nn.Linear]:
        if self.selector is not None and not self.selector.fast:
            return {self.site: self.down}
        return {self.site: self.down, f"{self.site} hidden": self.up}


def hidden_width(linear: nn.Linear, size: int) -> int:
    """Neurons at which the MLP costs about what the layer does, a multiple of an expert's size, at least one expert."""
    inputs, outputs = linear.in_features, linear.out_features
    return size * max(1, round(inputs * outputs / (inputs + outputs) / size))


def drawn(linear: nn.Linear, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of an MLP before distillation, with biases if the layer has one; float32."""
    found = {
        "up.weight": uniform(width, linear.in_features, generator),
        "down.weight": uniform(linear.out_features, width, generator),
    }
    if linear.bias is not None:
        found |= {"up.bias": torch.zeros(width), "down.bias": linear.bias.detach().float().cpu()}
    return found


def mlp(
    block: Block, site: str, weights: dict[str, Tensor], activation: str, size: int, phase: Phase, meter: Meter
) -> ProjectionMLP:
    """From weights as `drawn` gives them, on the device of the layer, in float32."""
    linear = block.linears[site]

    def part(name: str) -> nn.Linear:
        own = {n.removeprefix(f"{name}."): w.float() for n, w in weights.items() if n.startswith(f"{name}.")}
        outputs, inputs = own["weight"].shape
        made = nn.Linear(inputs, outputs, bias="bias" in own, device=linear.weight.device)
        made.load_state_dict(own)
        return made

    place = block.index, phase, meter
    return ProjectionMLP(site, linear.weight.numel(), part("up"), part("down"), activation, size, *place)


def of_block(tensors: dict[str, Tensor], block: Block, site: str) -> dict[str, Tensor]:
    """The weights of one MLP from `projection.<block>.<site>.<name>`; empty if there is none."""
    start = f"projection.{block.index}.{site}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def stored(layers: list[ExpertFFN]) -> dict[str, Tensor]:
    """`projection.<block>.<site>.<name>` bfloat16 of these layers, as far as they are projections."""
    return {
        f"projection.{layer.layer}.{layer.site}.{name}": value.detach().bfloat16().cpu()
        for layer in layers
        if isinstance(layer, ProjectionMLP)
        for part in ("up", "down")
        for name, value in ((f"{part}.{n}", v) for n, v in getattr(layer, part).named_parameters())
    }


def makes(tensors: dict[str, Tensor], activation: str, size: int) -> Make:
    """Makes a block's MLPs, by site, from stored tensors."""

    def make(block: Block, phase: Phase, meter: Meter) -> dict[str, ExpertFFN]:
        weights = {site: of_block(tensors, block, site) for site in SITES if site in block.linears}
        return {site: mlp(block, site, w, activation, size, phase, meter) for site, w in weights.items() if w}

    return make


def attach_projections(
    attachment: Attachment, activation: str, size: int, selector: Callable[[ExpertFFN], Selector | None]
) -> None:
    """Puts the artifact's MLPs, if it has any, in place of the projections."""
    make = makes(attachment.artifact.tensors, activation, size)
    for block in blocks(attachment.model):
        for site, layer in make(block, attachment.phase, attachment.meter).items():
            layer.to(block.linears[site].weight.dtype).requires_grad_(False)
            layer.set_selector(selector(layer))
            attachment.replace(f"{block.path}.{block.layout.linears[site]}", layer)


def distil(
    model: PreTrainedModel,
    windows: Tensor,
    activation: str,
    size: int,
    epochs: int,
    seed: int,
    label: str,
    progress: Progress = silent,
    checkpoint: Callable[[str], Path | None] = lambda stage: None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors as `stored`, and by block and site the error, relative to the outputs' mean square.

    Each MLP learns from the inputs and outputs of its own layer in the unchanged model: relative squared error plus
    HOYER, growing linearly, times the square Hoyer share of its hidden values. checkpoint: from a stage's name, where.
    """
    found: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    every = list(blocks(model))
    inputs: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def listen(index: int) -> list[object]:
        def keep(site: str) -> Callable[..., None]:
            return lambda module, args: inputs[site].append(args[0].detach())

        linears = every[index].linears
        return [linears[site].register_forward_pre_hook(keep(site)) for site in SITES if site in linears]

    for index in walk(model, windows, listen, label, progress):
        block, generator = every[index], torch.Generator().manual_seed(1009 * seed + index)
        for site in (s for s in SITES if s in block.linears):
            linear = block.linears[site]
            x = torch.cat([later(part, windows.shape[1]) for part in inputs[site]])
            weights = drawn(linear, hidden_width(linear, size), generator)
            layer = mlp(block, site, weights, activation, size, Phase(), Meter())
            name = f"{index}.{site}"
            place = checkpoint(f"projection{name}")
            errors[name] = _learn(layer, linear, x, epochs, seed, f"{label} {site} of block {index}", progress, place)
            found |= stored([layer])
            inputs[site].clear()
    return found, errors


def _learn(
    layer: ExpertFFN,
    linear: nn.Linear,
    x: Tensor,
    epochs: int,
    seed: int,
    label: str,
    progress: Progress,
    checkpoint: Path | None,
) -> float:
    power = float(linear(x[:8192]).float().square().mean())

    def error(rows: Tensor, hidden: Tensor) -> Tensor:
        return (layer.down(hidden) - linear(rows).float()).square().mean() / power

    def loss(rows: Tensor, done: float) -> Tensor:
        inputs = x[rows.flatten()]
        hidden = layer.hidden(inputs.float()).flatten(-2)
        share = penalty(hidden.clamp(min=0), "hoyer").mean() / hidden.shape[-1]
        return error(inputs, hidden) + HOYER * done * share

    batch = min(BATCH, len(x))
    with torch.enable_grad():
        layer.requires_grad_(True)
        train(
            layer,
            torch.arange(len(x))[:, None],
            loss,
            steps=epochs * max(1, len(x) // batch),
            batch=batch,
            learning_rate=LEARNING_RATE,
            schedule="cosine",
            mixed=False,
            seed=seed,
            label=label,
            progress=progress,
            checkpoint=checkpoint,
        )
    with torch.no_grad():
        seen = x[-8192:]
        return float(error(seen, layer.hidden(seen.float()).flatten(-2)))
