"""What casts doubt on a number: disturbances of the GPU, machines and sources that differ, what methods warn of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .machine import kind
from .rows import Row
from .store import Record, same_content


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
    if any(not same_content(record, records[0]) for record in records[1:]):
        doubts.append("not all rows are of the same weights and text")
    doubts += sorted({note for row in rows for note in row.part("latency").get("notes") or ()})
    return list(dict.fromkeys(doubts + told_by_methods(rows)))


def told_by_methods(rows: Iterable[Row]) -> list[str]:
    """Their warnings, and densities that they did not reach. Of what variants, seeds and layers of a method and density
    say alike, but for numbers, the first stands for all."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        manifest = row.part("artifact").get("manifest") or {}
        notes = [text for text in manifest.get("notes") or () if "densit" in text]
        for text in [*(manifest.get("warnings") or ()), *notes]:
            found.setdefault((row.label, re.sub(r"\d[\d.]*", "#", text)), {})[text] = None
    more = [f" (and {len(texts) - 1} like it)" if len(texts) > 1 else "" for texts in found.values()]
    return [f"{label}, {next(iter(texts))}{n}" for ((label, _), texts), n in zip(found.items(), more, strict=True)]
