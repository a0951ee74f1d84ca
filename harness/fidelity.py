"""How far a sparse model strays from the dense one on held-out text: perplexity, KL divergence, greedy agreement.

Every window is [context | scored]: the first half is context, the second half is scored. Under mode `decode` the
context is dense and the scored half is fed through the sparse path, as decoding would; one batched pass with a
per-position mask computes exactly that, because attention is causal.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.families import cached, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, StaticCache

    from methods import SparseModel

GENERATED = 64  # tokens of dense text per prompt, for greedy agreement
BLOCK_TOLERANCE = 0.1  # bfloat16 rounding is 0.01; a broken kernel is 0.5 and more
READS_TOLERANCE = 0.05  # values that fall on the other side of a threshold by rounding are far fewer
BLOCK_CHECK_STEPS = 8
KERNEL_CHECK_TOKENS = 16
KERNEL_TOLERANCE = 0.01  # nats per token; see `kernel_tolerance`


class BlockErrors(NamedTuple):
    """output: mean relative error of what a block adds to the residual stream. reads: the largest relative difference
    of how many units kernels and masks say they read, over the sites."""

    output: float
    reads: float


@dataclass
class DenseReference:
    """What the dense model says about the windows, computed once: log-probabilities and its own greedy text."""

    logprobs: list[Tensor] = field(default_factory=list)  # per batch, float16 [b, scored, vocab], on the CPU
    text: Tensor | None = None  # int64 [prompts, context + GENERATED]


def scored_mask(windows: Tensor, scored: int) -> Tensor:
    """bool [n, window - 1]: the inputs whose outputs are scored, i.e. those fed during decoding."""
    length = windows.shape[1] - 1
    return (torch.arange(length, device=windows.device) >= length - scored).expand(len(windows), -1)


def active_positions(handle: SparseModel, windows: Tensor, scored: int) -> bool | Tensor:
    """Which inputs go through the sparse path: the scored ones under `decode`, more under `all` and `last-<x>%`."""
    if handle.fraction == 1.0:
        return True
    mask = scored_mask(windows, scored)
    context = mask.shape[1] - scored
    prompt = handle.mask(len(windows), context, windows.device)
    if isinstance(prompt, Tensor):
        mask = torch.cat([prompt, mask[:, context:]], dim=1)
    return mask


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    handle: SparseModel,
    windows: Tensor,
    dense: DenseReference,
    bytes_per_token: float,
    batch: int,
    progress: Callable[[float, float], None],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Fidelity over `windows` (int64 [n, window], even window); returns the record block and the per-window items.

    `dense` is filled by the dense method's own cell and read by all others. The handle's meter listens throughout.
    Perplexity is exp of the mean negative log-likelihood over all scored tokens; bits per byte uses the mean length
    in bytes of this text's tokens; KL is KL(dense || sparse) in nats per token; greedy agreement is the share of
    positions in the dense model's own generated text where the sparse model would pick the same token.
    """
    device = next(model.parameters()).device
    windows = windows.to(device)
    scored = windows.shape[1] // 2
    first = not dense.logprobs
    items: dict[str, list[float]] = {"nll": [], "tokens": [], "kl": [], "agreement": []}
    with handle.meter.on():
        for at, start in enumerate(range(0, len(windows), batch)):
            part = windows[start : start + batch]
            with handle.positions(active_positions(handle, part, scored)):
                logits = model(input_ids=part[:, :-1], use_cache=False, logits_to_keep=scored).logits
            logprobs = F.log_softmax(logits.float(), dim=-1)
            nll = -logprobs.gather(-1, part[:, -scored:, None]).squeeze(-1)
            items["nll"] += nll.mean(1).tolist()
            items["tokens"] += [scored] * len(part)
            if first:
                dense.logprobs.append(logprobs.to("cpu", torch.float16))
                items["kl"] += [0.0] * len(part)
            else:
                reference = dense.logprobs[at].to(device).float()
                kl = (reference.exp() * (reference - logprobs)).sum(-1)
                items["kl"] += kl.mean(1).clamp(min=0).tolist()
            progress(min(start + batch, len(windows)), len(windows))
    if dense.text is None:
        dense.text = greedy(model, windows[: min(8, len(windows)), :scored], GENERATED)
    items["agreement"] = agreement(model, handle, dense.text)
    mean = sum(items["nll"]) / len(items["nll"])
    block = {
        "perplexity": float(torch.tensor(mean).exp()),
        "bits_per_byte": mean / 0.6931471805599453 / bytes_per_token,
        "kl": sum(items["kl"]) / len(items["kl"]),
        "greedy_agreement": sum(items["agreement"]) / len(items["agreement"]),
        "tokens": scored * len(windows),
        "window": windows.shape[1],
        "scored": scored,
    }
    return block, items


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: Tensor, new: int) -> Tensor:
    """Greedy continuation with a KV cache; prompts: int64 [n, length]; returns [n, length + new]."""
    from transformers import DynamicCache

    cache, tokens, step = DynamicCache(config=model.config), [prompts], prompts
    for _ in range(new):
        step = model(input_ids=step, **cached(model, cache), use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens.append(step)
    return torch.cat(tokens, dim=1)


def agreement(model: PreTrainedModel, handle: SparseModel, text: Tensor) -> list[float]:
    """Per text: the share of its last GENERATED tokens that the sparse model picks too, given the same prefix."""
    with handle.positions(active_positions(handle, text, GENERATED)):
        logits = model(input_ids=text[:, :-1], use_cache=False, logits_to_keep=GENERATED).logits
    return (logits.argmax(-1) == text[:, -GENERATED:]).float().mean(1).tolist()


def kernel_tolerance(block: dict[str, Any] | None) -> float:
    """How far the timed path may be from the evaluated one: little, or half of what the method itself changes.

    bfloat16 TEAL at density 0.5 on the reference model is 0.1 to 0.2 from itself and 0.6 from dense; the null method,
    which has no threshold to fall on either side of, runs the same kernels and must meet the absolute tolerance.
    """
    return max(KERNEL_TOLERANCE, 0.5 * block["kl"] if block else 0.0)


def decode_mask(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What a decode step over a static cache as long as `tokens` [B, length] must be told by some architectures.

    Without a mask OPT builds one from the cache length on the host, which no graph can capture.
    """
    return {"attention_mask": torch.ones_like(tokens)} if layout_of(model.config).decode_mask else {}


@torch.inference_mode()
def kernel_check(model: PreTrainedModel, handle: SparseModel, window: Tensor, scored: int) -> float:
    """KL divergence, nats per token, of a prompt and a token-by-token decode from one masked pass over the same text.

    Prompt and decode run the path that is timed (the kernels on a GPU), the one pass the reference path. In bfloat16
    the two round differently, and a value at a threshold may fall on either side of it: tails of the distribution then
    move by several nats while its mass stays, so a mean over the mass is what tells a broken kernel from rounding.
    """
    from methods.runtime import fast_steps

    steps = min(KERNEL_CHECK_TOKENS, scored)
    part = window[:, : window.shape[1] - scored + steps]
    with handle.meter.apart() as meter, meter.on():  # whoever counts takes the reference path
        with handle.positions(active_positions(handle, part, steps)):
            batched = model(input_ids=part[:, :-1], use_cache=False, logits_to_keep=steps).logits.float()
    with fast_steps(model, handle):
        decoded = teacher_forced(model, handle, part, steps)
    expected, found = F.log_softmax(batched, -1), F.log_softmax(decoded, -1)
    return max(0.0, float((expected.exp() * (expected - found)).sum(-1).mean()))


def teacher_forced(
    model: PreTrainedModel, handle: SparseModel, text: Tensor, steps: int, cache: StaticCache | None = None
) -> Tensor:
    """Logits [B, steps, V] of the last `steps` tokens before the end of text [B, length], one decode step each.

    cache: for at least `length` positions, emptied and used again; it then holds the text.
    """
    from transformers import StaticCache

    if cache is None:
        cache = StaticCache(config=model.config, max_cache_len=text.shape[1])
    else:
        cache.reset()
    layers: Any = cache.layers
    longest = max(layer.max_cache_len for layer in layers)
    extra = decode_mask(model, text.new_ones(len(text), longest)) | cached(model, cache)
    context = text.shape[1] - 1 - steps
    places = torch.arange(text.shape[1], device=text.device)[None]  # said, or OPT reads them off its mask
    with handle.positions(handle.mask(len(text), context, text.device)):
        model(input_ids=text[:, :context], position_ids=places[:, :context], use_cache=True, logits_to_keep=1, **extra)
    logits = []
    with handle.sparse():
        for at in range(context, text.shape[1] - 1):
            here = slice(at, at + 1)
            out = model(input_ids=text[:, here], position_ids=places[:, here], use_cache=True, **extra)
            logits.append(out.logits.float())
    return torch.cat(logits, 1)


@torch.inference_mode()
def block_check(
    model: PreTrainedModel, handle: SparseModel, window: Tensor, steps: int = BLOCK_CHECK_STEPS
) -> BlockErrors:
    """How far the blocks of the decode runtime are from the reference path, given the same input.

    Every block is run both ways at every step, the reference path by masks and the runtime by kernels, so nothing
    compounds: what is left is rounding and values that fall on the other side of a threshold by it. That makes it
    the check for random weights too, whose logits a few such flips change beyond recognition.
    """
    from methods.runtime import FastBlock, runtime

    errors: list[Tensor] = []
    reads: dict[str, list[tuple[int, int]]] = defaultdict(list)  # by site: units by masks, units by kernels

    def both_ways(block: FastBlock) -> Any:
        fast = block.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
            if not block.serves(hidden_states, cache):
                return block.slow(hidden_states, *args, **kwargs)
            layers = [layer for layer in handle.layers() if layer.layer == block.index]
            for layer in layers:
                layer.count = None
            with handle.meter.on():  # whoever counts takes the reference path
                wanted = block.slow(hidden_states, *args, **kwargs)
            cache.layers[block.index].cumulative_length.sub_(1)
            found = fast(hidden_states, *args, **kwargs)
            errors.append((found - wanted).float().norm() / (wanted - hidden_states).float().norm())
            for layer in layers:
                if (read := layer.read) is not None:
                    reads[layer.site].append((int(handle.meter.unions[layer.site, layer.layer][-1]), int(read)))
            return found

        return forward

    with handle.meter.apart(), runtime(model, handle) as blocks:
        for block in blocks:
            block.step.mask = True
            block.module.forward = both_ways(block)
        teacher_forced(model, handle, window, steps)
    sums = [[sum(side) for side in zip(*pairs, strict=True)] for pairs in reads.values()]
    differences = (abs(fast - masked) / max(1, masked) for masked, fast in sums)
    return BlockErrors(float(torch.stack(errors).mean()), max(differences, default=0.0))
