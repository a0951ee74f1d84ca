"""Records as `run` writes them, without running anything."""

import random
from pathlib import Path
from typing import Any

from harness import plan, store

GPU = {
    "name": "Test GPU",
    "uuid_hash": "abc123",
    "driver": "1.2",
    "cuda": "13.0",
    "sm_clock": 1900,
    "max_sm_clock": 1980,
    "throttle": [],
    "ecc": "on",
    "processes": 0,
}
TASKS = ["stdlib_next_line", "stdlib_identifier"]


def record(method: str = "dense", density: float | None = None, **changes: Any) -> dict[str, Any]:
    """A record as `run` writes it: a method that keeps `density` costs as much less, and answers a little worse."""
    keep = 1.0 if density is None else density
    rng, items = random.Random(0), 100
    harm = 0.0 if method in plan.BASELINES else (1 - keep) ** 3
    answers = {t: [float(rng.random() < 0.6 - 0 * harm) for _ in range(items)] for t in TASKS}
    for scores in answers.values():
        for index in range(round(harm * 20)):
            scores[index] = 0.0
    nll = [2 + rng.random() / 10 + harm for _ in range(20)]
    built: dict[str, Any] = {
        "key": f"{method}-{density}",
        "time": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "status": "ok",
        "error": None,
        "cell": {
            "model": "reference",
            "weights": "reference",
            "method": method,
            "options": {},
            "density": density,
            "mode": "decode",
            "batch": 1,
            "context": 384,
            "tasks": TASKS,
            "corpus": "stdlib",
            "limit": items,
            "seed": 0,
            "device": "cuda",
            "dtype": "bfloat16",
        },
        "source": "s",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "machine": {
            "identity": "m",
            "gpu": GPU,
            "cpu": {"model": "Test CPU", "cores": 2, "threads": 1},
            "os": "Linux",
            "python": "3.11",
            "torch": "2.13",
            "triton": None,
            "transformers": "5.23",
            "lm_eval": "0.4",
        },
        "density": {
            "model": keep,
            "sites": {"q": {"mean": keep, "p99": min(1.0, keep + 0.1), "layers": []}},
            "union": None,
        },
        "cost": {
            "decode": {"flops": 2e7 * keep, "flops_dense": 2e7, "bytes": 1.4e7 * keep, "bytes_dense": 1.4e7},
            "prefill": {"flops": 1e9, "flops_dense": 1e9},
        },
        "fidelity": {"perplexity": 7.8, "bits_per_byte": 1.0, "kl": harm, "greedy_agreement": 1 - harm},
        "accuracy": {
            t: {"metric": "acc", "value": sum(a) / items, "n": items, "chance": 0.25, "higher_is_better": True}
            for t, a in answers.items()
        },
        "items": {"nll": nll, "tokens": [512] * 20, **answers},
        "latency": {
            "path": "gpu",
            "unit": "ms/step",
            "median": 2.0 * keep,
            "p10": 1.9 * keep,
            "p90": 2.1 * keep,
            "n": 100,
            "dense": {"eager": {"median": 9.0}, "graph": {"median": 2.0}},
            "baseline": "graph",
            "speedup": 1 / keep,
            "ci": [0.98 / keep, 1.02 / keep],
            "verdict": "faster" if keep < 1 else "same",
            "fraction_of_limit": 0.7,
        },
        "prepare": None if method in plan.BASELINES else {"seconds": 61.2, "tokens": 1_310_720, "device": "cuda"},
    }
    for name, value in changes.items():
        if name in built["cell"]:
            built["cell"][name] = value
        else:
            built[name] = value
    return built


def synthetic(method: str, density: float | None = None) -> dict[str, Any]:
    return record(method, density, weights="synthetic", tasks=[], fidelity=None, accuracy={}, items={})


FULL = [
    record(),
    record("null", 1.0),
    record("teal", 0.9),
    record("teal", 0.8),
    record("teal", 0.4),
    record("lte", 0.7),
]


def write(folder: Path, records: list[dict[str, Any]]) -> str:
    for entry in records:
        store.append(folder, entry)
    return str(folder)
