"""What casts doubt on a number: disturbances of the GPU, machines and sources that differ, what methods warn of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .machine import kind
from .rows import Row
from .store import Record, same_content

DIRTY = "from a tree with uncommitted changes"
MISSED = 0.01  # from here on a density is another one than the target
LINEARS = frozenset(("q", "k", "v", "o", "up", "down"))  # of every block; with a gate in some


def timed_density(row: Row) -> float | None:
    """Density of the timed steps in the meaning of the target, which may be over the FFNs' units alone.

    None where records do not tell: in older ones, with a batch, whose steps read a union, and where what is skipped is
    neither the FFN alone nor all linears.
    """
    step, known = row.part("latency").get("step") or {}, row.part("density")
    timed, model, sites = step.get("density"), known.get("model"), set(known.get("sites") or ())
    if timed is None or model is None or row.is_baseline or known.get("union") is not None:
        return None
    if sites >= LINEARS:
        return float(timed)
    if sites == {"ffn"} and model < 1:  # what is always read is the same share of the model in both
        return float(1 - (1 - timed) * (1 - row.ffn["mean"]) / (1 - model))
    return None


def misses_target(row: Row) -> bool:
    """Whether the timed steps ran at another density than was asked for."""
    timed = timed_density(row)
    return timed is not None and row.target is not None and abs(timed - row.target) > MISSED


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


def counts(rows: Iterable[Row]) -> str:
    """How many timed cells something casts doubt on, for a place without room for which; empty where nothing does."""
    rows = [one for row in rows for one in row.repeats or [row] if one.record["cell"].get("timed", True)]
    found = Counter(text for row in rows for text in disturbances(row.record))
    found[DIRTY] = sum(is_dirty(row.record) for row in rows)
    found["timed steps missed the target density"] = sum(map(misses_target, rows))
    told = [f"{text} ({n})" for text, n in found.items() if n]
    return f"of {len(rows)} timed cells: {', '.join(told)}" if told else ""


def is_dirty(record: Record) -> bool:
    git = record.get("git") or {}
    return bool(git.get("dirty") and git.get("commit"))


def doubts_of(rows: Iterable[Row]) -> list[str]:
    """What casts doubt on the numbers of rows that stand together."""
    rows = [one for row in rows for one in row.repeats or [row]]
    records = [row.record for row in rows]
    doubts = [text for record in records for text in disturbances(record)]
    timed = {r["machine"].get("identity") for r in records if r["cell"].get("timed", True)}
    if len(timed) > 1 or len({kind(r["machine"]) for r in records}) > 1:
        doubts.append("not all rows come from the same machine or the same versions")
    if any(map(is_dirty, records)):
        doubts.append(f"some rows come {DIRTY}")
    if len({r.get("source") for r in records}) > 1:
        doubts.append("not all rows come from the same source code")
    if any(not same_content(record, records[0]) for record in records[1:]):
        doubts.append("not all rows are of the same weights and text")
    if missed := [f"{row.label} ran at {timed_density(row):.2f}" for row in rows if misses_target(row)]:
        doubts.append(f"timed steps missed the target density: {', '.join(dict.fromkeys(missed))}")
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
