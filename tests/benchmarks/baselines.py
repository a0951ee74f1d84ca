"""Accepted times of one model of GPU, with their noise floors: `results/baselines/<gpu>.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness.stats import PRACTICAL
from methods.errors import UsageError

FOLDER = Path(__file__).parents[2] / "results" / "baselines"
REPEATS = 3
ACCEPT = "accept one with `pytest tests/benchmarks --accept-baseline`."


@dataclass
class Baseline:
    """cases: name -> {"ms": median, "noise": the relative excess that still is noise}. `accepting`: take what comes."""

    gpu: str
    cases: dict[str, dict[str, float]] = field(default_factory=dict)
    accepting: bool = False

    def check(self, case: str, measure: Callable[[], float]) -> str | None:
        """One sentence if `measure`, in milliseconds, is above the noise floor twice in a row, else None.

        Raises UsageError for a case without a baseline.
        """
        if self.accepting:
            times = [measure() for _ in range(REPEATS)]
            spread = (max(times) - min(times)) / median(times)
            self.cases[case] = {"ms": round(median(times), 5), "noise": round(max(PRACTICAL, 2 * spread), 4)}
            return None
        if case not in self.cases:
            raise UsageError(f"there is no baseline of '{case}' on {self.gpu}: {ACCEPT}")
        accepted = self.cases[case]
        limit = accepted["ms"] * (1 + accepted["noise"])
        if measure() <= limit or (again := measure()) <= limit:
            return None
        return f"{case} takes {again:.4g} ms, accepted are {accepted['ms']:.4g} ms and noise up to {limit:.4g} ms."


def place(gpu: str, folder: Path = FOLDER) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def load(gpu: str, folder: Path = FOLDER) -> Baseline:
    """Raises UsageError when there is none for this model of GPU: times of two GPUs are never compared."""
    path = place(gpu, folder)
    if not path.is_file():
        others = ", ".join(sorted(json.loads(p.read_text())["gpu"] for p in folder.glob("*.json"))) or "no GPU"
        raise UsageError(f"there is no baseline for {gpu}, only for {others}: {ACCEPT}")
    stored = json.loads(path.read_text())
    if stored["gpu"] != gpu:
        raise UsageError(f"'{path}' was measured on {stored['gpu']}, this is {gpu}: {ACCEPT}")
    return Baseline(gpu, stored["cases"])


def expected(gpu: str, accepting: bool, folder: Path = FOLDER) -> Baseline | None:
    """What this GPU's times are held to; None where no GPU's were accepted yet. Raises UsageError as `load` does."""
    if accepting:
        return Baseline(gpu, accepting=True)
    return load(gpu, folder) if any(folder.glob("*.json")) else None


def save(baseline: Baseline, machine: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes what was accepted over what was there; other cases stay."""
    path = place(baseline.gpu, folder)
    kept = load(baseline.gpu, folder).cases if path.is_file() else {}
    content = {"gpu": baseline.gpu, "machine": machine, "cases": dict(sorted((kept | baseline.cases).items()))}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
