"""What selectors choose on text: how often each expert runs, and whether a router still listens to its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Selector

from ..base import sparsify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..artifact import Artifact
    from ..base import SparseModel
    from .student import Student

WINDOWS, BATCH = 16, 4  # calibration windows that a density is measured on
RARELY = 0.01  # an expert that fewer tokens use, or that all but these use, tells tokens nothing apart


@torch.no_grad()
def expert_usage(handle: SparseModel | Student, windows: Tensor) -> dict[str, Tensor]:
    """For each layer by name the share of tokens that run each expert, float [experts], over up to 16 windows.

    As under mode decode: the first half of every window is dense, and the second half, all sparse, is counted.
    """
    device = next(handle.model.parameters()).device
    layers: list[ExpertFFN] = list(handle.layers())
    counts = {layer.name: torch.zeros(layer.units, device=device) for layer in layers}
    late = torch.arange(windows.shape[1], device=device) >= windows.shape[1] // 2
    tokens = 0

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, keep: Tensor) -> None:
            counts[name] += keep.reshape(-1, len(late), keep.shape[-1])[:, late].float().sum((0, 1))

        return hook

    hooks = [n.selector.register_forward_hook(listen(n.name)) for n in layers if n.selector is not None]
    try:
        for part in windows[:WINDOWS].split(BATCH):
            with handle.positions(late.expand(len(part), -1)):
                handle.model(input_ids=part.to(device), use_cache=False, logits_to_keep=1)
            tokens += len(part) * int(late.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (count / tokens).cpu() for name, count in counts.items()}


@torch.no_grad()
def realised(model: PreTrainedModel, artifact: Artifact, windows: Tensor) -> float:
    """The density of the layers that an artifact makes sparse, by their weights, where every token of 4 windows is."""
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        handle.model(input_ids=windows[:BATCH].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
        counts, used, total = handle.meter.counts, 0.0, 0
        for layer in handle.layers():
            weights = sum(linear.weight.numel() for linear in layer.linears().values())
            share = torch.cat(counts[layer.site, layer.layer]).double().mean() / layer.units
            used, total = used + weights * float(share), total + weights
    return used / total


def mean_density(usage: dict[str, Tensor], weights: dict[str, int] | None = None) -> float:
    """Of all layers; weights: how much each counts, by name, all the same if None."""
    shares = torch.stack([share.mean() for share in usage.values()])
    if weights is None:
        return float(shares.mean())
    counted = torch.tensor([weights[name] for name in usage], dtype=torch.float64)
    return float((shares * counted).sum() / counted.sum())


def warnings(usage: dict[str, Tensor]) -> list[str]:
    """One sentence for every layer whose experts run for all tokens or for none: its router has collapsed."""
    found = []
    for name, share in usage.items():
        always, never = int((share >= 1 - RARELY).sum()), int((share <= RARELY).sum())
        if always + never == len(share):
            found.append(
                f"layer {name}: the router does not depend on the token, {always} of {len(share)} experts run for "
                f"practically all tokens and {never} for none"
            )
    return found


@torch.no_grad()
def text_loss(handle: SparseModel, windows: Tensor, sparse: bool) -> float:
    """Mean negative log-likelihood of the second half of up to 16 windows, with that half sparse or with all dense."""
    device = next(handle.model.parameters()).device
    half, total, tokens = windows.shape[1] // 2, 0.0, 0
    late = torch.arange(windows.shape[1], device=device) >= half
    for part in windows[:WINDOWS].to(device).split(BATCH):
        with handle.positions(late.expand(len(part), -1) if sparse else False):
            logits = handle.model(input_ids=part, use_cache=False, logits_to_keep=half).logits[:, :-1]
        target = part[:, -half + 1 :]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum"))
        tokens += target.numel()
    return total / tokens


def quantile(score: Tensor, share: float) -> Tensor:
    """The value that this share of scores [tokens, experts] does not exceed; from about a million of them at most.

    Whole tokens are left out: every second score of an even number of experts would be those of half the experts.
    """
    return score[:: 1 + score.numel() // 1_000_000].flatten().quantile(share)


def threshold_for(selector: Selector, score: Tensor, density: float) -> Tensor:
    """float32 [1]: the threshold above which this share of scores [tokens, experts] is; relative, if the rule is.

    A relative one is never 0: at 0, experts whose score is 0 would run.
    """
    if selector.rule == "relative":
        score = score / score.amax(-1, keepdim=True).clamp(min=1e-12)
    found = quantile(score, 1 - density).reshape(1)
    return found.clamp(min=1e-9) if selector.rule == "relative" else found


@torch.no_grad()
def set_thresholds(
    handle: SparseModel, windows: Tensor, density: float | dict[str, float], last: int | None = None
) -> None:
    """Gives every layer the threshold at which it has this density on the second half of up to 16 windows.

    density: of all layers, or by a layer's name. last: how many tokens of a window instead of its second half.
    In one pass: a layer's threshold is set before it computes, on inputs that the layers before it made with theirs.
    """
    windows = windows[:WINDOWS].to(next(handle.model.parameters()).device)
    first = windows.shape[1] // 2 if last is None else windows.shape[1] - last
    late = torch.arange(windows.shape[1], device=windows.device) >= first

    def decide(density: float) -> Callable[[Selector, tuple[Tensor, Tensor]], None]:
        def hook(module: Selector, args: tuple[Tensor, Tensor]) -> None:
            score = module.scores(*args)
            score = score.reshape(-1, len(late), score.shape[-1])[:, late].flatten(0, 1)
            module.threshold.copy_(threshold_for(module, score, density))

        return hook

    wanted = density if isinstance(density, dict) else {layer.name: density for layer in handle.layers()}
    hooks = [layer.selector.register_forward_pre_hook(decide(wanted[layer.name])) for layer in handle.layers()]
    try:
        with handle.positions(late.expand(len(windows), -1)):
            handle.model(input_ids=windows, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def thresholds(handle: SparseModel) -> dict[str, Tensor]:
    """`threshold.<block>` float32 [1] as they are now."""
    return {f"threshold.{layer.name}": layer.selector.threshold.cpu().clone() for layer in handle.layers()}
