"""Speed-ups side by side over batch and context."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from .machine import kind
from .rows import Group


@dataclass(frozen=True)
class Grid:
    """Tables that differ in batch or context alone. speedups: by method, then (batch, context): ratio and verdict."""

    title: str
    batches: list[int]
    contexts: list[int]
    speedups: dict[str, dict[tuple[int, int], tuple[float, str]]]


def grids(groups: Iterable[Group]) -> list[Grid]:
    """One per model, kind of GPU and setting that has speed-ups at several batches or contexts; none of a CPU.

    A speed-up is of one machine; those beside each other may be of several of a kind.
    """
    alike: dict[str, list[Group]] = {}
    for found in groups:
        rest = {name: value for name, value in found.setting.items() if name not in ("batch", "context")}
        alike.setdefault(json.dumps([kind(found.machine), rest], sort_keys=True), []).append(found)
    drawn = [grid for members in alike.values() if (grid := _grid(members)) and not members[0].on_cpu]
    return sorted(drawn, key=lambda grid: grid.title)


def _grid(groups: list[Group]) -> Grid | None:
    speedups: dict[str, dict[tuple[int, int], tuple[float, str]]] = {}
    for found in groups:
        place = found.setting["batch"], found.setting["context"]
        for row in found.rows:
            if row.speedup:
                speedups.setdefault(row.name, {})[place] = row.speedup.estimate, row.part("latency")["verdict"]
    places = {place for found in speedups.values() for place in found}
    if len(places) < 2:
        return None
    batches, contexts = (sorted(set(side)) for side in zip(*places, strict=True))
    s = groups[0].setting
    return Grid(f"{s['model']} ({s['weights']} weights), {s['mode']}", batches, contexts, speedups)
