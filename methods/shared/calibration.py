"""Statistics of hidden states, gathered in one dense pass over calibration text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_kernels.gate_first import GateFirstFFN
from sparse_kernels.layers import ExpertFFN

from ..base import Progress, silent
from ..families import Block, blocks, layout_of

if TYPE_CHECKING:
    from ..base import SparseModel

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
    model: PreTrainedModel, windows: Tensor, progress: Progress = silent, batch: int = 4, last: int | None = None
) -> dict[tuple[int, str], MagnitudeHistogram]:
    """|x| histograms of every linear layer's input, by (block, linear name), from dense activations.

    windows: int64 [n, window], of which the `last` tokens count, or all. q, k, v (and gate, up) read the same tensor
    and share one histogram.
    """
    device = next(model.parameters()).device
    found: dict[tuple[int, str], MagnitudeHistogram] = {}
    handles = []

    def listen(histogram: MagnitudeHistogram) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            histogram.add(args[0].reshape(-1, windows.shape[1], args[0].shape[-1])[:, -(last or 0) :])

        return hook

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
def multipliers(
    handle: SparseModel,
    windows: Tensor,
    densities: list[float],
    progress: Progress = silent,
    batch: int = 4,
    last: int | None = None,
) -> list[dict[int, float]]:
    """For each density, by block: the multiplier at which that share of an attached model's scores is kept.

    From the scores z = (score - mean) / deviation, statistics a token's own, of the layers `GateFirstFFN` when
    everything is dense. windows: int64 [n, window], of which the `last` tokens count; if None all but the first, as in
    `ffn_inputs`.
    """
    device, window = next(handle.model.parameters()).device, windows.shape[1]
    layers = [layer for layer in handle.layers() if isinstance(layer, GateFirstFFN)]
    found = {layer.layer: MagnitudeHistogram(device) for layer in layers}

    def listen(layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, window, args[0].shape[-1])[:, 1 if last is None else -last :]
        score = layer.scores(x, layer.first(x))
        std, mean = torch.std_mean(score, -1, correction=0, keepdim=True)
        z = ((score - mean) / std.clamp(min=1e-12)).clamp(-80, 80)
        if layer.score != "value":  # no zero is kept, so none is worth a higher threshold
            z = z.masked_fill(score == 0, -80)
        found[layer.layer].add(z.exp())  # the histogram is one of magnitudes: its bins are then 0.004 wide in z

    with handle.dense(), _hooks([layer.register_forward_pre_hook(listen) for layer in layers]):
        for start in range(0, len(windows), batch):
            handle.model(input_ids=windows[start : start + batch].to(device), use_cache=False, logits_to_keep=1)
            progress("calibration pass", start + batch, len(windows))
    share = 1 - torch.tensor(densities, dtype=torch.float64)
    values = {index: histogram.quantiles(share).log().tolist() for index, histogram in found.items()}
    return [{index: value[i] for index, value in values.items()} for i in range(len(densities))]


@torch.no_grad()
def block_calls(model: PreTrainedModel, windows: Tensor) -> Iterator[tuple[Block, Tensor, dict[str, Any]]]:
    """For each decoder block: the block, its dense input [n, window, d] and the other arguments of its call.

    One dense pass learns each block's keyword arguments (masks, rotary embeddings) and the first block's input;
    the inputs of later blocks follow by running the blocks one after another, so only two are alive at a time.
    """
    found = list(blocks(model))
    hidden, arguments = _first_call(model, [b.module for b in found], windows)
    for block, kwargs in zip(found, arguments, strict=True):
        yield block, hidden, kwargs
        hidden = block.module(hidden, **kwargs)


def _first_call(
    model: PreTrainedModel, modules: list[nn.Module], windows: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The input [n, window, d] of the first of these blocks, and the other arguments of each."""
    inputs: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        arguments.append(
            {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "cache", "use_cache")}
        )
        inputs.append(hidden if not inputs else hidden[:0])

    with _hooks([m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]):
        device = next(model.parameters()).device
        model(input_ids=windows.to(device), use_cache=False, logits_to_keep=1)
    return inputs[0], arguments


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    windows: Tensor,
    listen: Callable[[int], list[Any]],
    label: str,
    progress: Progress = silent,
    batch: int = 8,
) -> Iterator[int]:
    """Takes text through the model one block after the other; yields a block's index when all of it went through it.

    listen: from that index, hooks to hold meanwhile. Of the model's hidden states, one per token is alive at a time.
    """
    modules = list(model.get_submodule(layout_of(model.config).layers).children())
    chunks = []
    for part in windows.split(batch):
        chunks.append(_first_call(model, modules, part))
        progress(f"{label}, reading text", len(chunks) * batch, len(windows))
    hidden, calls = (list(found) for found in zip(*chunks, strict=True))
    del chunks  # they would keep what enters the first block
    for index, module in enumerate(modules):
        with _hooks(listen(index)):
            for at, arguments in enumerate(calls):
                hidden[at] = module(hidden[at], **arguments[index])
        yield index


def later(x: Tensor, window: int) -> Tensor:
    """x [..., d] of whole windows without the first position of each, [tokens, d].

    Large models put activations there that dwarf all others.
    """
    return x.reshape(-1, window, x.shape[-1])[:, 1:].flatten(0, 1)


@torch.no_grad()
def ffn_inputs(
    handle: SparseModel, windows: Tensor, label: str, progress: Progress = silent, batch: int = 8
) -> Iterator[tuple[ExpertFFN, Tensor]]:
    """For each layer of experts of an attached model: it and its inputs [tokens, d] when everything is dense.

    Block after block, so that the inputs of one are alive at a time; without first positions.
    """
    layers: dict[int, list[ExpertFFN]] = defaultdict(list)
    for layer in handle.layers():
        if isinstance(layer, ExpertFFN):
            layers[layer.layer].append(layer)
    found: dict[ExpertFFN, list[Tensor]] = defaultdict(list)

    def remember(layer: Any, args: tuple[Any, ...]) -> None:
        found[layer].append(args[0].detach())

    def listen(index: int) -> list[Any]:
        return [layer.register_forward_pre_hook(remember) for layer in layers[index]]

    with handle.dense():
        for index in walk(handle.model, windows, listen, label, progress, batch):
            for layer in layers[index]:
                yield layer, torch.cat([later(x, windows.shape[1]) for x in found.pop(layer)])
