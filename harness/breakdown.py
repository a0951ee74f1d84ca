"""Where the time of a decode step goes, from a profiler trace of its kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

CLASSES = ("selection", "linears", "attention", "glue", "lm_head", "other", "idle")
STEPS = 8
SHOWN = 5  # names of unknown kernels that a record keeps

# The Triton kernels of sparse_kernels. What is fused goes where most of its time goes: `fill` also norms, which in a
# dense step is all it does; `combine` also adds the residual; `listed`, which selects too, `linear` and the FFN kernels
# norm or activate; `token` rotates.
KERNELS = {
    "fill_kernel": "selection",
    "linear_kernel": "linears",
    "listed_kernel": "linears",
    "masked_kernel": "linears",
    "rows_kernel": "linears",
    "combine_kernel": "linears",
    "group_kernel": "selection",
    "union_kernel": "selection",
    "routed_hidden_kernel": "linears",
    "routed_down_kernel": "linears",
    "fused_kernel": "linears",
    "reduce_kernel": "linears",
    "first_kernel": "linears",
    "hidden_kernel": "linears",
    "list_kernel": "selection",
    "mark_kernel": "selection",
    "mask_kernel": "selection",
    "top_kernel": "selection",
    "statistical_kernel": "selection",
    "near_best_kernel": "selection",
    "score_kernel": "selection",
    "batch_kernel": "selection",
    "attention_kernel": "attention",
    "merge_kernel": "attention",
    "rotary_kernel": "attention",
    "rope_kernel": "attention",
    "token_kernel": "attention",
    "spark_score_kernel": "selection",
    "spark_attend_kernel": "attention",
    "spark_merge_kernel": "attention",
    "norm_kernel": "glue",
    "glu_kernel": "glue",
}
# Kernels of libraries, by a part of their name in lower case. A product may be the lm_head's: see `classes`.
LIBRARIES = {
    "fmha": "attention",
    "flash": "attention",
    "sdpa": "attention",
    "splitk": "linears",
    "gemv": "linears",
    "gemm": "linears",
    "nvjet": "linears",
    "cutlass": "linears",
}


@dataclass(frozen=True)
class Event:
    """A kernel on the GPU; begin and end in microseconds."""

    name: str
    begin: float
    end: float


def trace(runner: Any, steps: int = STEPS) -> list[Event]:
    """The kernels of some decode steps of a `decoder.Runner`, in order of their begin."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    runner.block(1)  # warm, and everything loaded
    runner.rewind()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            runner.step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return sorted((Event(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda e: e.begin)


def breakdown(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Milliseconds of a step by class, and the names that took most of `other`.

    Kernels overlap where one is launched before its predecessor ends: it then only waits, so a moment belongs to the
    kernel that began first. `idle` is the time within a step when none ran. Raises ValueError unless all steps have the
    same number of kernels.
    """
    if not events or len(events) % steps:
        raise ValueError(f"{len(events)} kernels are not {steps} equal steps.")
    length = len(events) // steps
    spent: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    unknown: dict[str, float] = defaultdict(float)
    for first in range(0, len(events), length):
        step = events[first : first + length]
        end = step[0].begin
        for event, kind in zip(step, classes([e.name for e in step]), strict=True):
            spent["idle"] += max(0.0, event.begin - end)
            own = max(0.0, event.end - max(event.begin, end))
            spent[kind] += own
            if kind == "other":
                unknown[event.name[:100]] += own
            end = max(end, event.end)
    largest = sorted(unknown, key=lambda name: -unknown[name])[:SHOWN]
    scale = 1e-3 / steps
    return {
        "ms": {kind: round(time * scale, 5) for kind, time in spent.items()},
        "other": {name: round(unknown[name] * scale, 5) for name in largest},
        "kernels": length,
    }


def classes(names: Sequence[str]) -> list[str]:
    """The class of every kernel of a step; the last matrix product of a library, with its reduction, is the lm_head."""
    found = [KERNELS.get(name) or _library(name) for name in names]
    products = [i for i, name in enumerate(names) if found[i] == "linears" and name not in KERNELS]
    whole = [i for i in products if "splitk" not in names[i].lower()]
    return ["lm_head" if i in products and i >= whole[-1] else kind for i, kind in enumerate(found)] if whole else found


def _library(name: str) -> str:
    return next((kind for part, kind in LIBRARIES.items() if part in name.lower()), "other")
