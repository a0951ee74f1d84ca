"""What casts doubt on a number: disturbances of the GPU, machines and sources that differ, what methods warn of."""

from __future__ import annotations

from collections.abc import Iterable

from .machine import kind
from .rows import Row
from .store import Record


def disturbances(record: Record) -> list[str]:
    """What disturbed the GPU, as seen around every timed round and at the end; nothing where nothing was timed."""
    if not record["cell"].get("timed", True):
        return []
    seen = [record["machine"].get("gpu") or {}, (record.get("latency") or {}).get("watch") or {}]
    found = []
    if any(isinstance(gpu.get("throttle"), list) and gpu["throttle"] for gpu in seen):
        found.append("the GPU throttled its clocks")
    if any(isinstance(gpu.get("processes"), int) and gpu["processes"] for gpu in seen):
        found.append("other processes used the GPU")
    return found


def doubts_of(rows: Iterable[Row]) -> list[str]:
    """What casts doubt on the numbers of rows that stand together."""
    rows = [one for row in rows for one in row.repeats or [row]]
    records = [row.record for row in rows]
    doubts = [text for record in records for text in disturbances(record)]
    timed = {r["machine"].get("identity") for r in records if r["cell"].get("timed", True)}
    if len(timed) > 1 or len({kind(r["machine"]) for r in records}) > 1:
        doubts.append("not all rows come from the same machine or the same versions")
    if any((r.get("git") or {}).get("dirty") and r["git"].get("commit") for r in records):
        doubts.append("some rows come from a tree with uncommitted changes")
    if len({r.get("source") for r in records}) > 1:
        doubts.append("not all rows come from the same source code")
    doubts += sorted({note for row in rows for note in row.part("latency").get("notes") or ()})
    for row in rows:
        warnings = (row.part("artifact").get("manifest") or {}).get("warnings") or ()
        doubts += [f"{row.label}, {text}" for text in warnings]
    return list(dict.fromkeys(doubts))
