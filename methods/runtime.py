"""The decode runtime: a model's decoder blocks assembled from the shared operators, for decode steps.

Within `runtime(model, handle)` a decoder block that is given one token per sequence and a static cache runs as a few
fused launches: norm, threshold and list | q, k and v at once | rotation and cache | attention | o, residual | and the
same for the FFN. Selections are those of the sparse layers that a method attached; without any, the same runtime is a
dense baseline. Everything else (prompts, other caches) runs as before, and afterwards the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_kernels import (
    add_parts,
    attention_decode,
    neuron_ffn,
    residual_norm,
    rope_cache_write,
    row_stats,
    threshold_linear,
    token_attention,
)
from sparse_kernels.attention.launch import one_launch
from sparse_kernels.heads import SelectiveHeads
from sparse_kernels.layers import FAST_ROWS, ExpertFFN, SparseLayer, SparseLinear, TransposedLinear
from sparse_kernels.neuron_ffn.launch import takes_rows

from .errors import UsageError
from .families import activation_of, layout_of, windows_of
from .shared.around import FIXED_ROPES, last_norm, rotation, unmasked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparse_kernels.selectors import Tap

    from .base import SparseModel

NORMS = {"rms": "variance_epsilon", "gemma": "eps", "layer": "eps"}
DENSE = -1.0  # no magnitude is below it


@dataclass
class Step:
    """What the blocks of one decode step hand on: `stats` of the residual stream `hidden`, for the next norm.

    mask: the decoder makes its mask all the same, for somebody who calls the blocks' own forwards too.
    """

    hidden: Tensor | None = None
    stats: Tensor | None = None
    lengths: Tensor | None = None
    mask: bool = False


class Projection:
    """Linear layers side by side, with a threshold each; None for all of them if none is sparse.

    The weights are stored transposed, by input channel, if one is sparse or `by_channel`; else by output, as they were.
    share: the layers' own weights become views of that one matrix, until `restore`.
    """

    def __init__(self, modules: list[nn.Module], share: bool, by_channel: bool = False) -> None:
        linears: list[Any] = [getattr(m, "linear", m) for m in modules]
        self.layers: list[Any] = [m if getattr(m, "threshold", None) is not None else None for m in modules]
        self.heads = modules[0] if isinstance(modules[0], SelectiveHeads) else None
        for module in modules:
            if isinstance(module, TransposedLinear):  # its own transposed copy would be a second one
                module.release()
        self.widths = [linear.out_features for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        self.weight_t = (torch.cat(weights) if len(weights) > 1 else weights[0]).t()
        if by_channel or any(layer is not None for layer in self.layers):
            self.weight_t = self.weight_t.contiguous()
        given = [linear.bias for linear in linears]
        first = self.weight_t
        self.bias = None
        if any(b is not None for b in given):
            zeros = [first.new_zeros(width) for width in self.widths]
            self.bias = torch.cat([z if b is None else b.detach() for z, b in zip(zeros, given, strict=True)])
        self.threshold: Tensor | None = None
        self.segments = self.widths
        if any(layer is not None for layer in self.layers):
            dense = torch.full((1,), DENSE, device=first.device)
            self.threshold = torch.cat([dense if layer is None else layer.threshold for layer in self.layers])
            if len(self.threshold.unique()) == 1:  # one selection serves all of them
                self.threshold, self.segments = self.threshold[:1], [sum(self.widths)]
        known = [1.0 if layer is None else layer.density for layer in self.layers]
        self.density: float | None = None if None in known else max(known)
        copied = self.weight_t.data_ptr() != weights[0].data_ptr()
        self.shared = [linear.weight for linear in linears] if share and copied else []
        for weight, view in zip(self.shared, self.weight_t.split(self.widths, 1), strict=False):
            weight.data = view.t()

    def restore(self) -> None:
        """Gives shared weights a storage of their own again, with the same bits."""
        for weight in self.shared:
            if weight.untyped_storage().data_ptr() == self.weight_t.untyped_storage().data_ptr():
                alone(weight)

    def __call__(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(output or its parts, stats); also leaves with each sparse layer how many channels it read."""
        options.setdefault("bias", None if options.get("partial") else self.bias)
        options["density"] = self.density
        threshold = self.threshold if self.heads is None else self.heads.limit(x.shape[-2])
        y, counts, stats = threshold_linear(x, self.weight_t, threshold, self.segments, **options)
        for segment, layer in enumerate(self.layers):
            if layer is not None:
                layer.count = counts[segment % len(counts)] if counts.numel() else None
        return y, stats


def alone(weight: Any) -> None:
    """A shared weight has a storage of its own again, with the same bits."""
    weight.data = weight.data.clone(memory_format=torch.contiguous_format)


class Norm:
    """A norm module as the operators take it."""

    def __init__(self, module: Any, gemma: bool) -> None:
        self.kind = "layer" if isinstance(module, nn.LayerNorm) else "gemma" if gemma else "rms"
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self.eps = float(getattr(module, NORMS[self.kind]))

    def __call__(self, h: Tensor) -> Tensor:
        """The norm of h by itself, for who else needs it."""
        return residual_norm(h, None, self.weight, self.bias, self.eps, self.kind)[1]

    def options(self, stats: Tensor) -> dict[str, Any]:
        return dict(norm=self.kind, norm_weight=self.weight, norm_bias=self.bias, eps=self.eps, stats=stats)


class FastBlock:
    """One decoder block: `forward` takes the place of the module's own, which it calls whenever it cannot serve."""

    def __init__(
        self,
        model: PreTrainedModel,
        module: Any,
        index: int,
        last: bool,
        step: Step,
        phase: Any,
        taps: dict[str, Tap],
        share: bool,
    ) -> None:
        layout = layout_of(model.config)
        find = module.get_submodule
        self.taps = taps
        self.module, self.slow, self.index, self.last = module, module.forward, index, last
        self.step, self.phase = step, phase
        attention: Any = find("self_attn")
        self.qkv = Projection([find(layout.linears[name]) for name in "qkv"], share)
        output = find(layout.linears["o"])
        self.o = Projection([output], share)
        self.heads = output if isinstance(output, SelectiveHeads) else None
        assert layout.norms is not None  # `why_not` has seen to it
        norms = [Norm(find(path), layout.gemma_norms) for path in (*layout.norms, *(layout.after or ()))]
        self.first, self.second, *self.after = norms
        self.dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.scaled_query = layout.scaled_query
        self.softcap: float | None = getattr(attention, "attn_logit_softcapping", None)
        self.window = window_of(model.config) or 0
        self.query_norm = getattr(getattr(attention, "q_norm", None), "weight", None)
        self.key_norm = getattr(getattr(attention, "k_norm", None), "weight", None)
        self.head_eps = float(getattr(getattr(attention, "q_norm", None), "variance_epsilon", 1e-6))
        self.ffn: Any = None
        self.lent: Any = None  # weights of a sparse FFN's last layer, while they are a view of what its kernels read
        self.whole: Callable[..., Tensor] | None = None  # an FFN that is read whole, for one token: neuron by neuron
        leader: Any = find(layout.ffn[0])
        dense = isinstance(leader, ExpertFFN) and leader.selector is None
        if isinstance(leader, SparseLayer) and not isinstance(leader, SparseLinear) and not dense:
            self.ffn = leader
            leader.materialize()
            if share:
                self.lent = self.ffn.linears()["down"].weight
                self.lent.data = self.ffn.down_t.t()
        else:
            names = [name for name in ("gate", "up", "down") if name in layout.linears]
            *before, down = leader.linears().values() if dense else (find(layout.linears[name]) for name in names)
            self.up, self.down = Projection(before, share), Projection([down], share, by_channel=True)
            self.activation = leader.activation if dense else activation_of(model.config)
            self.gated = len(before) == 2
            if self.up.threshold is None and self.down.threshold is None:
                rows, bias = self.up.weight_t.t().split(self.up.widths), self.up.bias
                biases = [None] * len(rows) if bias is None else bias.split(self.up.widths)
                gate, gate_bias = (rows[0], biases[0]) if self.gated else (None, None)
                weights: dict[str, Any] = dict(gate=gate, up=rows[-1], down_t=self.down.weight_t)
                weights |= dict(index=None, count=None, gate_bias=gate_bias, up_bias=biases[-1])
                self.whole = partial(neuron_ffn, activation=self.activation, **weights)

    def restore(self) -> None:
        """Puts the module's own forward and weights back."""
        self.module.__dict__.pop("forward", None)
        if self.lent is not None:
            alone(self.lent)
        for projection in (self.qkv, self.o) if self.ffn is not None else (self.qkv, self.o, self.up, self.down):
            projection.restore()

    def serves(self, hidden: Tensor, cache: Any) -> bool:
        """One token per sequence, a static cache with something in it, every position sparse, nobody counting.

        hidden: [B, 1, d], or the tokens [B, 1] themselves.
        A cache shorter than its sliding window never slides. All blocks serve a step or none: they count it together.
        """
        if hidden.shape[1] != 1 or hidden.shape[0] > FAST_ROWS or not hasattr(cache, "layers"):
            return False
        layer = cache.layers[self.index]
        if not isinstance(getattr(layer, "cumulative_length", None), Tensor):
            return False
        if any(getattr(entry, "is_sliding", True) and entry.max_cache_len >= self.window for entry in cache.layers):
            return False
        return layer.is_initialized and (self.phase is None or self.phase())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        if args or not self.serves(hidden_states, cache):
            return self.slow(hidden_states, *args, **kwargs)
        step, layer = self.step, cache.layers[self.index]
        batch = hidden_states.shape[0]
        h = hidden_states[:, 0]
        if self.index == 0:
            step.lengths = None
            step.hidden = None
        stats = step.stats if step.hidden is hidden_states and step.stats is not None else row_stats(h)

        if "attn_norm" in self.taps:
            x = self.first(h)
            self._tell("attn_norm", x)
            qkv, _ = self.qkv(x, partial=self.qkv.bias is None)
        else:
            qkv, _ = self.qkv(h, partial=self.qkv.bias is None, **self.first.options(stats))
        q, k, v = (part.view(*qkv.shape[:-1], -1, self.dim) for part in qkv.split(self.qkv.widths, -1))
        position = layer.cumulative_length.reshape(1)
        embeddings = kwargs.get("position_embeddings") or (None, None)
        cos, sin = (t if t is None else t[:, 0].contiguous() for t in embeddings)
        token = (q, k, v, cos, sin, position, layer.keys, layer.values, self.query_norm, self.key_norm, self.head_eps)
        lists = None if self.heads is None else self.heads.lists(batch)
        if lists is None and one_launch(q, k):
            mixed = token_attention(*token, self.scale, self.scaled_query, self.softcap)
        else:
            q = rope_cache_write(*token)
            # A query that the model scales itself is rounded before the product with the keys.
            q, scale = (q * self.scale, 1.0) if self.scaled_query else (q, self.scale)
            if step.lengths is None:  # of the layers alike
                step.lengths = (position + 1).int()
            mixed = attention_decode(q, layer.keys, layer.values, step.lengths, lists, scale, softcap=self.softcap)
        mixed = mixed.view(batch, -1)
        if self.heads is not None and lists is None:
            mixed = self.heads.kept(mixed)

        whole = self.whole if self.whole is not None and takes_rows(h, self.down.weight_t) else None
        if self.ffn is None and not self.after and whole is None:
            h, stats = self.o(mixed, residual=h, with_stats=True)
            self._tell("mlp_in", h)
            x, _ = self.up(h, partial=self.up.bias is None, **self.second.options(stats))
            h, stats = self.down(x, activation=self.activation, gated=self.gated, residual=h, with_stats=True)
        else:
            mixed, _ = self.o(mixed)
            mixed = self.after[0](mixed) if self.after else mixed
            h, x = residual_norm(mixed, h, self.second.weight, self.second.bias, self.second.eps, self.second.kind)
            self._tell("mlp_in", h)
            parts: Tensor | None = None
            if whole is not None and not self.after:
                parts, constant = whole(x, partial=True)[:, None], self.down.bias
            elif isinstance(self.ffn, ExpertFFN) and not self.after:
                parts, constant = self.ffn.parts(x), self.ffn.constant
            if parts is not None:
                h, stats = add_parts(parts, h, constant)
            else:
                y = self._feed(x) if whole is None else whole(x, down_bias=self.down.bias)
                h, stats = add_parts((self.after[1](y) if self.after else y)[None], h)
        if self.last:
            torch._foreach_add_([entry.cumulative_length for entry in cache.layers], 1)
        step.hidden, step.stats = h[:, None], stats
        return step.hidden

    def _feed(self, x: Tensor) -> Tensor:
        """The FFN of the normed x [B, d], without the residual."""
        if self.ffn is not None:
            return self.ffn(x[:, None])[:, 0]
        x, _ = self.up(x, partial=self.up.bias is None)
        return self.down(x, activation=self.activation, gated=self.gated)[0]

    def _tell(self, place: str, value: Tensor) -> None:
        """Leaves a hidden state where somebody listens; the block's own input comes through its hook."""
        if place in self.taps:
            self.taps[place].value = value


def window_of(config: Any) -> int | None:
    """How many positions some layers see at most; None where all see all."""
    return next(filter(None, windows_of(config)), None)


def why_not(model: PreTrainedModel, length: int = 0) -> str | None:
    """One sentence when the runtime has no block for this model, or for caches of `length` positions; else None."""
    layout, window = layout_of(model.config), window_of(model.config)
    if window and length >= window:
        return f"the decode runtime cannot slide: the model's window is {window}, the cache holds {length} positions."
    if layout.norms is None:
        return f"the decode runtime has no block for architecture '{model.config.model_type}' yet."
    if getattr(model.config, "do_layer_norm_before", True) is False:
        return "the decode runtime norms before attention and FFN, this model after them."
    modules = model.get_submodule(layout.layers).children()
    if any(isinstance(m.get_submodule(layout.linears[site]), ExpertFFN) for m in modules for site in "qkvo"):
        return "the decode runtime has no block for attention projections that are MLPs."
    return None


def fast_steps(model: PreTrainedModel, handle: SparseModel | None = None) -> Any:
    """`runtime` where the model is on a GPU and has blocks for it, else nothing: how decode steps are timed here."""
    if model.device.type == "cuda" and why_not(model) is None:
        return runtime(model, handle)
    return nullcontext()


@contextmanager
def runtime(
    model: PreTrainedModel, handle: SparseModel | None = None, share: bool = False
) -> Iterator[list[FastBlock]]:
    """Within: decode steps of `model` over a StaticCache run through the fused operators.

    handle: the attached method, whose selections are used; None for the dense model. Prompts of a batch must be of one
    length, without padding. The runtime reads transposed weights: a copy, or with `share` the only one, of which the
    model's own weights are then views (prompts run as fast, docs/kernels.md; graphs captured before must not be
    replayed within). A CUDA graph captured within stays valid as long as its owner keeps what `with` returns.
    Raises UsageError for an architecture without a block.
    """
    reason = why_not(model)
    if reason:
        raise UsageError(reason)
    layout, step = layout_of(model.config), Step()
    modules = list(model.get_submodule(layout.layers).children())
    phase: Callable[[], bool] | None = None
    if handle is not None:
        phase = lambda: handle.phase.active is True and not handle.meter.enabled  # noqa: E731
    blocks: list[FastBlock] = []
    decoder: Any = model.get_submodule(layout.layers.rpartition(".")[0])
    norm, rotary = attrgetter(layout.last_norm)(model), getattr(decoder, "rotary_emb", None)
    around: dict[Any, Callable[..., Any]] = {decoder: unmasked(decoder, lambda *given: blocks[0].serves(*given), step)}
    if norm is not None:  # an OPT may have none
        around[norm] = last_norm(norm, Norm(norm, layout.gemma_norms), step)
    if getattr(rotary, "rope_type", None) in FIXED_ROPES:
        around[rotary] = rotation(rotary)
    try:
        for index, module in enumerate(modules):
            taps = {} if handle is None else {place: tap for (place, at), tap in handle.taps.items() if at == index}
            blocks.append(FastBlock(model, module, index, index + 1 == len(modules), step, phase, taps, share))
        for block in blocks:
            block.module.forward = block.forward
        for module, forward in around.items():
            module.forward = forward
        yield blocks
    finally:
        for module in around:
            module.__dict__.pop("forward", None)
        for block in blocks:
            block.restore()
