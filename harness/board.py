"""All result sets of a folder (`results/<set>/records.jsonl`) as one leaderboard, a section per model and GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.errors import UsageError

from . import machine, store
from .claims import twin_note
from .doubts import counts, doubts_of
from .formats import NONE, ends, github, number
from .plan import BASELINES
from .rows import BUDGETS, LORA, SHARED, Group, Row, combine, group, rank
from .tables import Column, cost_columns, dense_baselines, fidelity_columns, markdown, predictor_means

PRIVATE = "local"  # the user's own results, which no committed page may depend on

HOW_TO_READ = f"""\
Generated from the records of every folder beside it by `python -m harness report --out results`; do not edit. How to
add a machine: [README.md](README.md). What the papers claim: [CLAIMS.md](CLAIMS.md).

- A section is one model on one kind of GPU; numbers of different GPUs never share a table. A table is one setting, with
  the newest record of each cell: first dense and null, then cells by rank, those within {BUDGETS[0]:g} % of
  dense quality before those within {BUDGETS[-1]:g} %, then those that lose more, the least first.
- **Rank** is by the speed-up of a decode step over the fastest dense runner of the same interleaved run, among cells
  within {BUDGETS[0]:g} % and within {BUDGETS[-1]:g} %; in brackets the places that the 95 % intervals allow.
- **Accuracy lost** is the worse of the relative losses of bits per byte and of the task average; `?`: the upper end of
  its interval is over the budget. **Δ tasks** is paired with dense on the same items.
- **Realised density** is that of the evaluated text; *timed*: that of the timed steps, where it is more than 0.01 away.
- **MB/token** follows the union over a batch; **share of byte limit** is what the step had to read, over the measured
  bandwidth, over its time. **Artifact**: what a user downloads. **Extra memory**: peak for a prompt and decode steps,
  beyond the dense model's. **Predictors**: on held-out tokens, means over blocks; block by block in each folder.
  **Fidelity**: whether something is adapted from the paper; the statements are at the end.
- A CPU's milliseconds are those of a reference path that skips nothing. Random weights have FLOPs, bytes and time, and
  no accuracy. Every column is explained in [docs/protocol.md](../docs/protocol.md).
"""


@dataclass(frozen=True)
class Section:
    """The tables of one model on one kind of machine, and the machines that its rows come from."""

    title: str
    groups: list[Group]


def is_collection(folder: str | Path) -> bool:
    """Whether the folder holds result sets rather than records of its own."""
    place = Path(folder).expanduser()
    return not (place / store.FILE).is_file() and bool(_folders(place))


def sets(folder: str | Path) -> dict[str, list[Group]]:
    """The tables of each result set, by the name of its folder. Raises UsageError when there is none."""
    found = {}
    for place in _folders(Path(folder).expanduser()):
        found[place.name] = group(store.latest(store.load(place)))
        for row in (row for table in found[place.name] for row in table.rows):
            for one in (row, *row.repeats):  # tables of several sets join the seeds again
                one.source = place.name
    if not found:
        raise UsageError(
            f"'{folder}' has no result sets: measure one with `python -m harness run --out {folder}/NAME`."
        )
    return found


def place_of(record: store.Record) -> str:
    """The kind of machine, whose numbers may share a table."""
    gpu = record["machine"].get("gpu")
    return str(gpu["name"] if gpu else record["machine"]["cpu"]["model"])


def sections(sets: Mapping[str, Iterable[Group]]) -> list[Section]:
    """Every set's rows by model, kind of machine and setting; of a cell measured twice the newest record, but with
    a latency rather than without.

    Seeds of a cell are one row, wherever they were measured. A row keeps the dense cell that was measured beside it,
    so units and versions of the same GPU may meet in a table.
    """
    tables: dict[tuple[str, ...], list[Row]] = {}
    rows = [one for groups in sets.values() for table in groups for row in table.rows for one in row.repeats or [row]]
    for row in sorted(rows, key=lambda row: (row.record["cell"].get("timed", True), _time(row))):
        setting = (str(row.record["cell"].get(name)) for name in SHARED)
        tables.setdefault((place_of(row.record), *setting), []).append(_unranked(row))
    found: dict[str, list[Group]] = {}
    for table in sorted((_table(combine(found)) for found in tables.values()), key=_place_in_page):
        title = f"{table.setting['model']} ({table.setting['weights']} weights) on {place_of(table.rows[0].record)}"
        found.setdefault(title, []).append(table)
    return [Section(title, groups) for title, groups in found.items()]


def page(found: Sequence[Section]) -> str:
    """The leaderboard of these sections as Markdown, the same text for the same records."""
    parts = ["# Leaderboard", HOW_TO_READ]
    for section in found:
        parts += [f"## {section.title}", *_section(section, found)]
    methods = sorted({row.method for section in found for table in section.groups for row in table.rows})
    parts += ["## Fidelity of the methods", "\n".join(f"- `{name}`: {statement(name)}" for name in methods)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def excerpt(found: Sequence[Section], link: str) -> str:
    """One table per kind of GPU, for a README: every method's speed-up on every model and in every decode setting.

    Of a method stands its fastest cell within the widest budget; where none is, the one that loses least, and with
    random weights the one whose step reads nearest to half of the dense bytes: equal targets are no fair match.
    `link` leads from there to the folder of the sets.
    """
    places: dict[str, list[Group]] = {}
    for section in found:
        for table in section.groups:
            if not table.on_cpu and any(row.speedup for row in table.rows):
                places.setdefault(place_of(table.rows[0].record), []).append(table)
    parts = []
    for place, tables in places.items():
        timed = [row for table in tables for row in table.rows if row.speedup]  # not where quality alone was measured
        methods = ["null", *sorted({row.method for row in timed} - set(BASELINES))]
        body = [[table.title, *(_headline(table, name) for name in methods)] for table in tables]
        lines = machines(timed)
        newest = f", the newest of {len(lines)} of this kind" if len(lines) > 1 else ""
        title = (
            "speed-up over the fastest dense runner, at a target density, and the share of the dense bytes that is read"
        )
        parts += [f"**{place}: {title}**", github(["model, mode", *methods], body)]
        parts.append(f"Machine{newest}: {lines[-1]}")
        parts += [f"**Caution:** {told}."] if (told := counts(timed)) else []
    return "\n\n".join([*parts, f"All cells, with intervals: [LEADERBOARD.md]({link}/LEADERBOARD.md)."])


def _headline(table: Group, method: str) -> str:
    cells = [row for row in table.rows if row.method == method and row.speedup]
    if not cells:
        return NONE
    row = min(cells, key=_preference)
    assert row.speedup is not None
    what = "" if row.is_baseline else f" at {row.target:g}" if row.target is not None else ""
    share = "" if row.is_baseline or row.bytes_share is None else f", {100 * row.bytes_share:.0f} % read"
    lost = f", {row.loss[0]:.1f} % lost" if row.loss and not row.is_baseline else ""
    return f"{row.speedup.estimate:.2f}{what} ({row.part('latency').get('verdict')}{share}{lost})"


def _preference(row: Row) -> tuple[float, ...]:
    speed = -row.speedup.estimate if row.speedup else 0.0
    if row.loss is None:
        return abs((row.bytes_share or 1) - 0.5), speed
    within = row.loss[0] <= BUDGETS[-1]
    return not within, speed if within else row.loss[0]


def columns(table: Group) -> list[Column]:
    """Everything about a cell that one line can hold."""
    quality = [] if table.synthetic else [*fidelity_columns(), Column("Δ tasks, points [95 %]", _tasks)]
    predictors = [predictor_means()] if any(row.predictors for row in table.rows) else []
    return [
        *cost_columns(table),
        *quality,
        *predictors,
        Column("artifact, MB", lambda r: _scaled(r.part("artifact").get("bytes"), 1e6)),
        Column("extra memory, MB", lambda r: _scaled(extra_memory(r), 1e6)),
        Column("fidelity", lambda r: level(r.method)),
        Column("records", lambda r: f"[{r.source}]({r.source}/{store.FILE})"),
    ]


def machines(rows: Iterable[Row]) -> list[str]:
    """A line for every machine that rows were measured on, with the code of its newest record; the newest last."""
    measured = sorted((one for row in rows for one in row.repeats or [row]), key=_time)
    newest: dict[str, store.Record] = {}
    for row in measured:
        identity = str(row.record["machine"].get("identity"))
        newest.pop(identity, None)
        newest[identity] = row.record
    return [machine.line(record["machine"], record) for record in newest.values()]


def extra_memory(row: Row) -> float | None:
    """Peak bytes of tensors for a prompt and decode steps, beyond what the dense model needs for them."""
    own, dense = (Row(r, None).part("latency").get("memory") if r else None for r in (row.record, row.dense))
    alone = [found.get("alone") if found else None for found in (own, dense)]
    return None if row.method == "dense" or None in alone else alone[0] - alone[1]  # type: ignore[operator]


def statement(method: str) -> str:
    """What is the paper's and what is adapted, in the method's own words."""
    from methods import registry

    try:
        text = registry.info(method.removesuffix(LORA)).fidelity
    except UsageError:
        return "not installed here"
    return f"{text}; adapted: low-rank updates in place of all weights" if method.endswith(LORA) else text


def level(method: str) -> str:
    """The statement in a word."""
    if method in BASELINES:
        return "baseline"
    text = statement(method)
    return "adapted" if "adapted" in text else NONE if text == "not installed here" else "paper"


def _section(section: Section, found: Sequence[Section]) -> list[str]:
    rows = [row for table in section.groups for row in table.rows]
    parts = ["\n".join(f"- {line}" for line in machines(rows))]
    everywhere = [table for other in found for table in other.groups]
    notes = [note for table in section.groups if (note := twin_note(table, everywhere))]
    parts += dict.fromkeys(notes)
    if section.groups[0].synthetic:
        together = Group(section.groups[0].machine, section.groups[0].setting, rows, [])
        parts.append(markdown([*_setting_columns(), *columns(together)], rows))
    for table in section.groups:
        if not table.synthetic:
            parts += [f"### {table.short_title}", markdown(columns(table), table.rows)]
        if baselines := dense_baselines(table):
            where = f"{table.short_title}: " if table.synthetic else ""
            parts.append(f"{where}Dense in the same run, ms/step: {baselines}.")
    doubts = doubts_of(rows)
    return [*parts, f"**Caution:** {'; '.join(doubts)}."] if doubts else parts


def _unranked(row: Row) -> Row:
    """The same row, with what it has computed already, for another table."""
    found = copy(row)
    found.ranks = {}
    return found


def _table(rows: list[Row]) -> Group:
    first = rows[0].record
    table = Group(first["machine"], {name: first["cell"].get(name) for name in SHARED}, rows, [])
    rank(table)
    rows.sort(key=_order)
    return table


def _order(row: Row) -> tuple[Any, ...]:
    """Baselines, then by rank in the tightest budget that holds the cell, then by loss; unknown loss by speed."""
    if row.is_baseline:
        return 0, BASELINES.index(row.method)
    for place, limit in enumerate(BUDGETS, 1):
        if limit in row.ranks:
            return place, row.ranks[limit].place
    speed = -row.speedup.estimate if row.speedup else math.inf
    return len(BUDGETS) + 1, row.loss[0] if row.loss else 0, speed, row.method, row.options, -(row.target or 0)


def _place_in_page(table: Group) -> tuple[Any, ...]:
    """GPUs first, weights with an accuracy first, then model and setting."""
    s = table.setting
    model = (table.on_cpu, place_of(table.rows[0].record), table.synthetic, s["model"], s["weights"])
    return *model, s["mode"] != "decode", s["mode"], s["batch"], s["context"], str(s)


def _setting_columns() -> list[Column]:
    def column(name: str) -> Column:
        return Column(name, lambda r: str(r.record["cell"][name]))

    return [column(name) for name in ("mode", "batch", "context")]


def _tasks(row: Row) -> str:
    d = row.task_average_difference
    return NONE if d is None else f"{100 * d.estimate:+.1f}{ends(d.scaled(100), '+.1f')}"


def _scaled(value: float | None, unit: float) -> str:
    return NONE if value is None else number(value / unit)


def _time(row: Row) -> str:
    return str(row.record["time"])


def _folders(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob(f"*/{store.FILE}") if p.parent.name != PRIVATE)
