"""Runs of the whole harness on a small local model, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import store

METHODS = "teal:allocation=uniform,lte:stage1_steps=2:stage2_steps=1:trials=1:batch=2"


def command(model: str, out: Path, *more: str) -> list[str]:
    return ["run", "--model", model, "--methods", METHODS, "--limit", "8", "--out", str(out), *more]


def by_method(out: Path, timed: bool | None = None) -> dict[str, dict[str, Any]]:
    """The newest record of each method and density: of cells with times, without, or of all."""
    found = (r for r in store.load(out) if timed in (None, r["cell"].get("timed", True)))
    return {f"{r['cell']['method']} {r['cell']['density']}": r for r in found}
