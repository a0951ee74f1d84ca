"""What selectors choose on text: how often each expert runs, and whether a router still listens to its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Router

from .calibration import ffn_inputs

if TYPE_CHECKING:
    from ..base import SparseModel
    from .student import Student

WINDOWS, BATCH = 16, 4  # calibration windows that a density is measured on
RARELY = 0.01  # an expert that fewer tokens use, or that all but these use, tells tokens nothing apart


@torch.no_grad()
def expert_usage(handle: SparseModel | Student, windows: Tensor) -> dict[int, Tensor]:
    """For each layer the share of tokens that run each expert, float [experts], over up to 16 windows.

    As under mode decode: the first half of every window is dense, and the second half, all sparse, is counted.
    """
    device = next(handle.model.parameters()).device
    layers: list[ExpertFFN] = list(handle.layers())
    counts = {layer.layer: torch.zeros(layer.units, device=device) for layer in layers}
    late = torch.arange(windows.shape[1], device=device) >= windows.shape[1] // 2
    tokens = 0

    def listen(index: int) -> Any:
        def hook(module: nn.Module, args: Any, keep: Tensor) -> None:
            counts[index] += keep.reshape(-1, len(late), keep.shape[-1])[:, late].float().sum((0, 1))

        return hook

    hooks = [n.selector.register_forward_hook(listen(n.layer)) for n in layers if n.selector is not None]
    try:
        for part in windows[:WINDOWS].split(BATCH):
            with handle.positions(late.expand(len(part), -1)):
                handle.model(input_ids=part.to(device), use_cache=False, logits_to_keep=1)
            tokens += len(part) * int(late.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return {index: (count / tokens).cpu() for index, count in counts.items()}


def mean_density(usage: dict[int, Tensor]) -> float:
    """All layers weighted equally."""
    return float(torch.stack([share.mean() for share in usage.values()]).mean())


def warnings(usage: dict[int, Tensor]) -> list[str]:
    """One sentence for every layer whose experts run for all tokens or for none: its router has collapsed."""
    found = []
    for index, share in usage.items():
        always, never = int((share >= 1 - RARELY).sum()), int((share <= RARELY).sum())
        if always + never == len(share):
            found.append(
                f"layer {index}: the router does not depend on the token, {always} of {len(share)} experts run for "
                f"practically all tokens and {never} for none"
            )
    return found


@torch.no_grad()
def threshold_quantiles(handle: SparseModel, tokens: Tensor, density: float) -> dict[str, Tensor]:
    """`threshold.<block>` float32 [1] at which each router of an attached model selects this share of its experts.

    For random weights: the thresholds of real routers are trained or searched.
    """
    found = {}
    for layer, x in ffn_inputs(handle, tokens, "thresholds"):
        assert isinstance(layer.selector, Router)
        score = layer.selector.score(x)
        if layer.selector.rule == "relative":
            score = score / score.amax(-1, keepdim=True).clamp(min=1e-12)
        sample = score.flatten()[torch.randint(score.numel(), (100_000,), device=score.device)]
        found[f"threshold.{layer.layer}"] = sample.quantile(1 - density).reshape(1).cpu()
    return found
