"""A model with a method attached, as lm-eval sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import DynamicCache

from methods import load_artifact, sparsify_
from methods.base import parse_mode
from methods.errors import UsageError
from methods.families import cached


@register_model("sparse")
class SparseLM(HFLM):
    """lm-eval's `HFLM` for a causal model some of whose positions are sparse.

    A request has context tokens c_0..c_{m-1} and continuation tokens t_0..t_{n-1}. The model reads all but the last,
    m + n - 1 positions, of which the last n yield the scored logits. As in decoding, the prefill takes c_0..c_{m-2} and
    the decode steps take c_{m-1}, t_0..t_{n-2} (teacher-forced, in one pass); so every scored token comes from a
    decode step. Sparse are, by mode:

    - decode: the n decode steps
    - last-<x>%: the n decode steps, and the last x % of the prefill
    - all: every position

    Padding is always dense and thus counts in no density. The choices of an item share one prefill of their context.
    Without a method, log-likelihoods equal those of `HFLM(logits_cache=False)` up to rounding. (HFLM's default cache
    mixes up requests whose tokens are the same but split elsewhere into context and continuation.)

    `sparsity`: an artifact's folder or hub id, attached in place; `handle`: a `SparseModel` that is attached already.
    Raises UsageError on an unknown mode, an encoder-decoder model, and requests to sample.
    """

    def __init__(
        self,
        pretrained: Any,
        sparsity: str | None = None,
        mode: str = "decode",
        handle: Any = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        self.fraction = parse_mode(mode)
        if not str(batch_size).isdigit():
            raise UsageError(f"batch size '{batch_size}': give a number, since results depend on it in low precision.")
        super().__init__(pretrained, batch_size=int(batch_size), **kwargs)
        if self.backend != "causal":
            raise UsageError(f"{type(self.model).__name__} is not a decoder-only model: choose one that is.")
        if sparsity is not None:
            sparsify_(self.model, load_artifact(sparsity), mode=mode)
        self.handle = handle or getattr(self.model, "sparse_model", None)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval; but where merged tokens leave no continuation (it then fails), the two are encoded apart."""
        left, right = super()._encode_pair(context, continuation)
        return left, right or self.tok_encode(continuation, add_special_tokens=False)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is greedy) of each (strings, context, continuation)."""
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"an answer of {len(continuation)} tokens exceeds the model's {self.max_length} positions: "
                    "choose a task with shorter answers."
                )
            inputs = (context + continuation)[-(self.max_length + 1) : -1]
            cut = len(inputs) - len(continuation)
            rows.append((tuple(inputs[:cut]), inputs[cut:], continuation))
        # Long first, so that memory runs out at once if at all; equal contexts next to each other.
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), rows[i][0], -len(rows[i][1])))
        answers: list[Any] = [None] * len(rows)
        size = override_bs or self.batch_size
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for index, answer in zip(chunk, self._score([rows[i] for i in chunk]), strict=True):
                answers[index] = answer
        return answers

    def _score(self, rows: list[tuple[tuple[int, ...], list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As above, for one batch of (prefill, decode steps, continuation)."""
        prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
        ids, known = _pad(prompts, self.device, left=True)
        cache = self._prefill(ids, known)
        owner = torch.tensor([prompts.index(prompt) for prompt, _, _ in rows], device=self.device)
        cache.batch_select_indices(owner)

        steps, valid = _pad([steps for _, steps, _ in rows], self.device)
        targets, _ = _pad([continuation for _, _, continuation in rows], self.device)
        logits = self._forward(steps, torch.cat([known[owner], valid], dim=1), valid, cache)
        picked = log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(2, targets[..., None])[..., 0]
        totals = picked.masked_fill(~valid, 0).sum(1)
        greedy = ((logits.argmax(-1) == targets) | ~valid).all(1)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Greedy continuation of left-padded prompts [B, P]: tokens [B, at most max_length], padded on the right."""
        if kwargs.get("do_sample") or kwargs.get("temperature") or kwargs.get("num_beams", 1) > 1:
            raise UsageError("a task asks for sampling or beams: choose a greedy one, so that methods stay comparable.")
        seen = (torch.ones_like(context) if attention_mask is None else attention_mask).bool()
        cache = self._prefill(context[:, :-1], seen[:, :-1])
        ends = set(_as_list(self.model.generation_config.eos_token_id)) | {self.eot_token_id}
        written: list[list[int]] = [[] for _ in context]
        live, token = list(range(len(context))), context[:, -1:]
        for _ in range(max_length - context.shape[1]):
            token = self._forward(token, seen, True, cache)[:, -1].argmax(-1, keepdim=True)
            for row, new in zip(live, token[:, 0].tolist(), strict=True):
                written[row].append(new)
            keep = [i for i, row in enumerate(live) if not self._finished(written[row], ends, stop)]
            if not keep:
                break
            if len(keep) < len(live):
                index = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(index)
                seen, token, live = seen[index], token[index], [live[i] for i in keep]
            seen = torch.cat([seen, torch.ones_like(token, dtype=torch.bool)], dim=1)
        new, valid = _pad(written, self.device)
        return torch.cat([context, new.masked_fill(~valid, self.tokenizer.pad_token_id)], dim=1)

    def _finished(self, tokens: list[int], ends: set[int], stop: list[str]) -> bool:
        if tokens[-1] in ends:
            return True
        text = self.tok_decode(tokens)
        return any(term in text for term in stop if term)

    def _prefill(self, ids: Tensor, valid: Tensor) -> DynamicCache:
        """The cache of left-padded tokens [B, T], dense but for the share of its end that the mode makes sparse."""
        cache = DynamicCache(config=self.config)
        if ids.shape[1]:
            length = valid.sum(1, keepdim=True)
            late = valid.cumsum(1) > length - (length * self.fraction).round()
            self._forward(ids, valid, late & valid, cache, logits_to_keep=1)
        return cache

    def _forward(self, ids: Tensor, seen: Tensor, sparse: bool | Tensor, cache: DynamicCache, **kwargs: Any) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] after a cache of P positions, `sparse` where that [B, T] is true.

        seen: bool [B, P + T], False where a position is padding.
        """
        position = (seen.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        if isinstance(sparse, Tensor) and (sparse.all() or not sparse.any()):
            sparse = bool(sparse.all())  # lets the layers take their fast path
        with self.handle.positions(sparse, apart=True) if self.handle else nullcontext():
            return self.model(
                input_ids=ids,
                attention_mask=seen.long(),
                position_ids=position,
                use_cache=True,
                **cached(self.model, cache),
                **kwargs,
            ).logits


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, longest], zero where padded, and which of them are valid."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        valid[i, place] = True
    return ids.to(device), valid.to(device)


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
