"""A greedy decode step over a static cache, and the ways to run it that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.families import cached

from .fidelity import decode_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StaticCache

WARM_STEPS = 4
HIDDEN = (10.0, 0.1)  # ms, and share of a block's time, that may pass between its last event and the end of all work


class Decoder:
    """A greedy decode step over a static cache, with every tensor at a fixed address. It begins after the prompt.

    like: a decoder after the same prompt, whose cache this one shares: at large batch and context a cache is larger
    than the model. They take turns, each from a `rewind`.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, steps: int, like: Decoder | None = None) -> None:
        from transformers import StaticCache

        self.model, self.prompt = model, prompt
        batch, context = prompt.shape
        self.cache: StaticCache = (
            like.cache if like else StaticCache(config=model.config, max_cache_len=context + steps)
        )
        self.extra = decode_mask(model, prompt.new_ones(batch, context + steps)) | cached(model, self.cache)
        self.positions = torch.arange(context, device=prompt.device)[None]
        self.first: Tensor = like.first if like else self.prefill()
        self.token = self.first.clone()
        self.position = torch.full((1, 1), context, device=prompt.device)
        self.rewind()

    def prefill(self) -> Tensor:
        """Runs the prompt into the emptied cache; the next token of every sequence, int64 [batch, 1]."""
        self.cache.reset()
        forward = dict(input_ids=self.prompt, position_ids=self.positions, use_cache=True, logits_to_keep=1)
        return self.model(**forward, **self.extra).logits[:, -1:].argmax(-1)

    def rewind(self) -> None:
        """Back to the end of the prompt; later cache entries are masked by position and overwritten."""
        self.token.copy_(self.first)
        self.position.fill_(self.prompt.shape[1])
        layers: Any = self.cache.layers
        for layer in layers:
            if hasattr(layer, "cumulative_length"):  # not where keys and values are those of an earlier layer
                layer.cumulative_length.fill_(self.prompt.shape[1])
            if hasattr(layer, "cumulative_length_int"):  # sliding layers count on the host too
                layer.cumulative_length_int = self.prompt.shape[1]

    def step(self, forward: Callable[..., Any]) -> None:
        logits = forward(input_ids=self.token, position_ids=self.position, use_cache=True, **self.extra).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)


@dataclass
class Runner:
    """One way to run the decode step of `decoder`. keeps: what a graph reads and nobody else holds."""

    name: str
    decoder: Decoder
    step: Callable[[], None]
    keeps: Any = None

    def rewind(self) -> None:
        self.decoder.rewind()

    def block(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps, after some that are not timed."""
        for _ in range(WARM_STEPS):
            self.step()
        if self.decoder.prompt.is_cuda:
            return events(self.step, steps)
        samples = []
        for _ in range(steps):
            start = perf_counter()
            self.step()
            samples.append(1e3 * (perf_counter() - start))
        return samples

    def text(self, steps: int, after: Callable[[], None] = lambda: None) -> Tensor:
        """The prompt, its next token and those of `steps` steps: int64 [batch, context + 1 + steps].

        after: called after every step.
        """
        self.rewind()
        tokens = [self.decoder.prompt, self.decoder.token.clone()]
        for _ in range(steps):
            self.step()
            after()
            tokens.append(self.decoder.token.clone())
        return torch.cat(tokens, 1)


def events(step: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds of each step, between device events; raises RuntimeError for work that hides from them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    marks[-1].synchronize()
    start = perf_counter()
    torch.cuda.synchronize()
    hidden, timed = 1e3 * (perf_counter() - start), marks[0].elapsed_time(marks[-1])
    if hidden > HIDDEN[0] + HIDDEN[1] * timed:
        raise RuntimeError(f"work went on for {hidden:.3g} ms after the events that timed {timed:.3g} ms of steps")
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
