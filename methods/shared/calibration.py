"""Statistics of hidden states, gathered in one dense pass over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base import Progress, silent
from ..families import Block, blocks

BINS = 1 << 16  # 8 exponent bits and 8 mantissa bits of a float32: bins are 0.4 % wide at every magnitude


class MagnitudeHistogram:
    """The distribution of |x|, counted over float32 bit patterns, which grow with magnitude.

    Quantiles come out to a fraction of 0.4 % of their value, from any amount of data, in 0.5 MB.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        bits = x.detach().abs().float().contiguous().view(torch.int32) >> 15
        self.counts += torch.bincount(bits.flatten(), minlength=BINS)

    def quantiles(self, p: Tensor) -> Tensor:
        """float32 thresholds t with P(|x| <= t) = p, linear within a bin; p: float [n] in [0, 1]; p = 0 gives 0."""
        counts = self.counts.cpu().double()
        cumulative = counts.cumsum(0)
        rank = p.double() * cumulative[-1]
        at = torch.searchsorted(cumulative, rank).clamp(max=BINS - 1)
        edges = (torch.arange(BINS + 1, dtype=torch.int32) << 15).view(torch.float32).double()
        low, high = edges[at], edges[at + 1]
        # Bin 0 starts at exactly zero, and holds all exact zeros (of a ReLU, say): the threshold stays 0 there.
        share = ((rank - cumulative[at] + counts[at]) / counts[at].clamp(min=1)).clamp(0, 1)
        value = torch.where(at == 0, torch.zeros_like(low), low + share * (high - low))
        return torch.where(p.double() <= 0, torch.zeros_like(value), value).float()


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def input_histograms(
    model: PreTrainedModel, windows: Tensor, progress: Progress = silent, batch: int = 4
) -> dict[tuple[int, str], MagnitudeHistogram]:
    """|x| histograms of every linear layer's input, by (block, linear name), from dense activations.

    windows: int64 [n, window]. q, k, v (and gate, up) read the same tensor and share one histogram.
    """
    device = next(model.parameters()).device
    found: dict[tuple[int, str], MagnitudeHistogram] = {}
    handles = []

    def listen(histogram: MagnitudeHistogram) -> Callable[..., None]:
        return lambda module, args: histogram.add(args[0])

    for block in blocks(model):
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            present = [name for name in names if name in block.linears]
            histogram = MagnitudeHistogram(device)
            handles.append(block.linears[present[0]].register_forward_pre_hook(listen(histogram)))
            found.update({(block.index, name): histogram for name in present})
    with _hooks(handles):
        for start in range(0, len(windows), batch):
            model(input_ids=windows[start : start + batch].to(device), use_cache=False, logits_to_keep=1)
            progress("calibration pass", start + batch, len(windows))
    return found


@torch.inference_mode()
def block_calls(model: PreTrainedModel, windows: Tensor) -> Iterator[tuple[Block, Tensor, dict[str, Any]]]:
    """For each decoder block: the block, its dense input [n, window, d] and the other arguments of its call.

    One dense pass learns each block's keyword arguments (masks, rotary embeddings) and the first block's input;
    the inputs of later blocks follow by running the blocks one after another, so only two are alive at a time.
    """
    device = next(model.parameters()).device
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
        calls.append((hidden if not calls else hidden[:0], rest))

    found = list(blocks(model))
    handles = [b.module.register_forward_pre_hook(remember, with_kwargs=True) for b in found]
    with _hooks(handles):
        model(input_ids=windows.to(device), use_cache=False, logits_to_keep=1)
    hidden = calls[0][0]
    for block, (_, kwargs) in zip(found, calls, strict=True):
        yield block, hidden, kwargs
        hidden = block.module(hidden, **kwargs)
