"""TEAL: training-free activation sparsity (Liu et al., arXiv 2408.14690, ICLR 2025).

Every linear layer of a decoder block zeroes the input channels whose magnitude does not exceed a per-layer
threshold. Thresholds are quantiles of |x| on calibration text; which layer gets how much sparsity is either
uniform or found per block by a greedy search that lowers the error of the block's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .base import Attachment, Data, Method, Progress, silent
from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from .shared.calibration import MagnitudeHistogram

SITES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class TealOptions:
    """allocation: greedy (the paper's block-wise search) or uniform; base_step: sparsity added per greedy step, in
    units of the q matrix; windows: calibration windows; search_windows: windows the greedy search looks at."""

    allocation: str = "greedy"
    base_step: float = 0.05
    windows: int = 40
    search_windows: int = 4

    def __post_init__(self) -> None:
        if self.allocation not in ("greedy", "uniform"):
            raise UsageError(f"teal allocation '{self.allocation}' does not exist: choose greedy or uniform.")
        if not 0 < self.base_step <= 1:
            raise UsageError(f"teal base_step {self.base_step} is out of (0, 1]: the paper uses 0.05.")
        if self.windows < 1 or self.search_windows < 1:
            raise UsageError("teal needs at least one calibration window: try windows=40:search_windows=4.")


class Teal(Method):
    name = "teal"
    summary = "thresholds on the input of every linear layer, calibrated on |x| quantiles"
    paper = "arXiv 2408.14690 (ICLR 2025)"
    training = "training-free"
    sites = SITES
    fidelity = (
        "paper: operator, sites, greedy allocation (step in equal bytes, error over the last quarter, sparsity over "
        "the last half); adapted: thresholds are quantiles of |x| instead of a signed, symmetric histogram, so that "
        "the target density is met on dense activations of calibration text; where layers before are sparse it can "
        "differ, and zeros of a ReLU are left out whatever a layer's share (if by more than 0.01, it is noted)"
    )
    Options = TealOptions

    def why_not(self, config: Any) -> str | None:
        from .families import layout_of

        try:
            layout_of(config)
        except UsageError as error:
            return str(error)
        return None

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        from .shared.calibration import input_histograms
        from .shared.search import missed
        from .shared.selection import realised

        start = perf_counter()
        windows = data.calibration[: self.options.windows]
        histograms = input_histograms(model, windows, progress)
        calibrated = perf_counter() - start
        why = "thresholds come from dense activations, and zeros count as left out"
        for density in densities:
            start = perf_counter()
            sparsity = self._allocate(model, histograms, windows, 1 - self.target(density), progress)
            tensors = _thresholds(histograms, sparsity)
            artifact = self.artifact(model, density, tensors, {})
            reached = realised(model, artifact, windows)
            artifact.manifest.update(
                corpus=data.corpus,
                tokens=windows.numel(),
                density=round(reached, 4),
                notes=missed(self.target(density), reached, why),
                seconds=round(calibrated + perf_counter() - start, 2),
                device=str(next(model.parameters()).device.type),
                sparsity={f"{i}.{name}": round(p, 4) for (i, name), p in sparsity.items()},
            )
            yield artifact

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        from .shared.calibration import input_histograms

        histograms = input_histograms(model, tokens, last=last)
        sparsity = dict.fromkeys(histograms, 1 - self.target(density))
        return self.artifact(model, density, _thresholds(histograms, sparsity), {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        from sparse_kernels.layers import SparseLinear

        from .families import blocks

        for block in blocks(attachment.model):
            for site, linear in block.linears.items():
                threshold = attachment.artifact.tensors[f"threshold.{block.index}.{site}"]
                layer = SparseLinear(linear, threshold, site, block.index, attachment.phase, attachment.meter)
                attachment.replace(f"{block.path}.{block.layout.linears[site]}", layer)

    def _allocate(
        self,
        model: PreTrainedModel,
        histograms: dict[tuple[int, str], MagnitudeHistogram],
        windows: Tensor,
        target: float,
        progress: Progress,
    ) -> dict[tuple[int, str], float]:
        """Sparsity by (block, linear name) whose parameter-weighted mean in every block is `target`."""
        if self.options.allocation == "uniform":
            return dict.fromkeys(histograms, target)
        import torch

        from .shared.calibration import block_calls

        sparsity: dict[tuple[int, str], float] = {}
        total = 1 + max(index for index, _ in histograms)
        with torch.inference_mode():
            for block, hidden, kwargs in block_calls(model, windows[: self.options.search_windows]):
                weights = {name: linear.weight.numel() for name, linear in block.linears.items()}
                curves = {name: _curve(histograms[block.index, name]) for name in weights}
                error = _BlockError(block, hidden, kwargs, curves)
                try:
                    found = greedy_allocation(weights, target, self.options.base_step, error)
                finally:
                    error.remove()
                sparsity.update({(block.index, name): p for name, p in found.items()})
                progress(f"teal greedy allocation at density {1 - target:.2f}", block.index + 1, total)
        return sparsity


def greedy_allocation(weights: dict[str, int], target: float, base_step: float, error: Any) -> dict[str, float]:
    """Raises one linear's sparsity at a time, always the one that hurts least, until the weighted mean is `target`.

    A step has the same size in parameters for every linear: base_step of the first one's. The last step is cut so
    that the mean is met exactly. Source: TEAL, algorithm 1. error: callable on {name: sparsity} -> float.
    """
    sparsity = dict.fromkeys(weights, 0.0)
    unit = next(iter(weights.values()))
    remaining = target * sum(weights.values())
    while remaining > 1e-9 * unit:
        amount = min(base_step * unit, remaining)
        trials = {n: min(1.0, p + amount / weights[n]) for n, p in sparsity.items() if p < 1.0}
        best = min(trials, key=lambda n: error({**sparsity, n: trials[n]}))
        remaining -= (trials[best] - sparsity[best]) * weights[best]
        sparsity[best] = trials[best]
    return sparsity


class _BlockError:
    """The error of one block's output under trial sparsities: 2-norm over positions, mean over batch and channels.

    The last half of the positions is sparse, the last quarter is compared, as in the authors' released search.
    """

    def __init__(self, block: Any, hidden: Tensor, kwargs: dict[str, Any], curves: dict[str, Tensor]) -> None:
        import torch

        from sparse_kernels.layers import SparseLinear
        from sparse_kernels.meter import Meter, Phase

        self.block, self.hidden, self.kwargs, self.curves = block, hidden, kwargs, curves
        self.dense = block.module(hidden, **kwargs)
        self.quarter = hidden.shape[1] - max(1, hidden.shape[1] // 4)
        phase = Phase()
        positions = torch.arange(hidden.shape[1], device=hidden.device) >= hidden.shape[1] - hidden.shape[1] // 2
        phase.active = positions.expand(hidden.shape[0], -1)
        zero = torch.zeros(1)
        self.layers = {}
        for name, linear in block.linears.items():
            self.layers[name] = SparseLinear(linear, zero, name, block.index, phase, Meter())
            self._set(name, self.layers[name])

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = self.block.layout.linears[name].rpartition(".")
        setattr(self.block.module.get_submodule(parent), leaf, module)

    def __call__(self, sparsity: dict[str, float]) -> float:
        for name, p in sparsity.items():
            self.layers[name].threshold.fill_(_lookup(self.curves[name], p))
        output = self.block.module(self.hidden, **self.kwargs)
        difference = (output - self.dense)[:, self.quarter :].float()
        return float(difference.norm(dim=1).mean())

    def remove(self) -> None:
        for name, linear in self.block.linears.items():
            self._set(name, linear)


def _curve(histogram: MagnitudeHistogram) -> Tensor:
    """Thresholds at sparsities 0, 0.001, ..., 1."""
    import torch

    return histogram.quantiles(torch.linspace(0, 1, 1001))


def _lookup(curve: Tensor, p: float) -> float:
    at = min(p, 1.0) * (len(curve) - 1)
    low = min(int(at), len(curve) - 2)
    return float(curve[low] + (at - low) * (curve[low + 1] - curve[low]))


def _thresholds(
    histograms: dict[tuple[int, str], MagnitudeHistogram], sparsity: dict[tuple[int, str], float]
) -> dict[str, Tensor]:
    import torch

    return {
        f"threshold.{index}.{name}": histograms[index, name].quantiles(torch.tensor([p]))
        for (index, name), p in sparsity.items()
    }
