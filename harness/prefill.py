"""What a prompt costs, apart from decoding: prefill, the time to the first token, and memory.

The ways take turns on one prompt. `dense`: every position dense, weights as the model stores them. `method`: as the
cell's mode has it, in `decode` dense too and so not run again. `single storage`: the same positions, over the weights
as the decode runtime stores them when there is one copy for both, which shows what the sparse layout costs a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.runtime import runtime, why_not

from . import latency, machine
from .decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods import SparseModel

ROUNDS, PROMPTS = 3, 4  # and prompts a round and way, after one that is not timed
WAY_SECONDS, SECONDS = 0.1, 1.0  # a way's turn, and all rounds, end after the prompt that exceeds this
STEPS = 2  # decode steps that memory is measured over, after the prompt


@torch.no_grad()
def measure(model: PreTrainedModel, handle: SparseModel, decoder: Decoder) -> dict[str, Any]:
    """The record's `latency.prefill` and `latency.memory`, of the decoder's prompt. Its cache then holds what the
    last way made of it."""
    prompt = decoder.prompt
    batch, context = prompt.shape
    active = handle.mask(batch, context, prompt.device)
    ways = ["dense", "method"] if handle.layers() and active is not False else ["dense"]
    ways += ["single storage"] if why_not(model) is None else []
    runs: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in ways}
    memory: dict[str, Any] = {}
    start = perf_counter()
    for number in range(ROUNDS):
        for way in tuple(runs):
            try:
                with ExitStack() as stack:
                    stack.enter_context(handle.dense() if way == "dense" else handle.positions(active))
                    if way == "single storage":
                        stack.enter_context(single_storage(model, handle))
                    runs[way].append(_block(decoder))
                    if number == 0 and way == ways[-1]:
                        memory = _memory(model, handle, decoder)
            except torch.OutOfMemoryError:  # beside the copies that the captured baselines hold
                runs.pop(way)
        if perf_counter() - start > SECONDS:
            break
    found: dict[str, Any] = {"tokens": prompt.numel()}
    for way, blocks in runs.items():
        names = ("prefill", "first_token")
        found[way] = {name: latency.summary([[run[i] for run in b] for b in blocks]) for i, name in enumerate(names)}
        found[way]["samples"] = [[[round(ms, 4) for ms in run] for run in block] for block in blocks]
    return {"prefill": found, "memory": memory}


@contextmanager
def single_storage(model: PreTrainedModel, handle: SparseModel) -> Iterator[None]:
    """Within: the decode runtime, on the only copy of the weights in use. Afterwards they are where they were, because
    captured graphs read those addresses."""
    own = [(parameter, parameter.data) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, data in own:
            parameter.data = data

    try:
        with runtime(model, handle if handle.layers() else None, share=True):
            try:
                yield
            finally:
                put_back()  # before the runtime makes copies of what it shared
    finally:
        put_back()  # where memory ended while the runtime was made


def resident(model: PreTrainedModel) -> int:
    """Bytes of all tensors that the model's modules hold, each storage once."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _block(decoder: Decoder) -> list[tuple[float, float]]:
    """Prompts one after another: each time (prefill, first token) in milliseconds."""
    run = _on_gpu if decoder.prompt.is_cuda else _on_cpu
    run(decoder)
    found: list[tuple[float, float]] = []
    start = perf_counter()
    while len(found) < PROMPTS and perf_counter() - start < WAY_SECONDS:
        found.append(run(decoder))
    return found


def _on_gpu(decoder: Decoder) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = perf_counter()
    begin.record()
    tokens = decoder.prefill()
    end.record()
    tokens.tolist()
    first_token = 1e3 * (perf_counter() - start)
    torch.cuda.synchronize()
    return begin.elapsed_time(end), first_token


def _on_cpu(decoder: Decoder) -> tuple[float, float]:
    start = perf_counter()
    tokens = decoder.prefill()
    prefill = 1e3 * (perf_counter() - start)
    tokens.tolist()
    return prefill, 1e3 * (perf_counter() - start)


def _memory(model: PreTrainedModel, handle: SparseModel, decoder: Decoder) -> dict[str, Any]:
    """`alone`: peak bytes of tensors over the prompt and some decode steps, with one copy of the weights and nothing
    else in memory; `reserved`, `process`: all that this process holds, dense baselines and captured graphs included."""
    found: dict[str, Any] = {
        "alone": None,
        "reserved": None,
        "process": machine.process_memory(str(decoder.prompt.device)),
    }
    if not decoder.prompt.is_cuda:
        return found
    found["reserved"] = torch.cuda.max_memory_reserved()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    decoder.prefill()
    decoder.rewind()
    with handle.sparse():
        for _ in range(STEPS):
            decoder.step(model.forward)
    torch.cuda.synchronize()
    cache: Any = decoder.cache.layers
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache if hasattr(layer, "keys"))
    found["alone"] = resident(model) + kept + torch.cuda.max_memory_allocated() - held
    return found
