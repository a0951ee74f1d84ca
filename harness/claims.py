"""The claims ledger: what the papers state (`claims.toml`), beside what the records of all result sets say about it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf, isfinite
from pathlib import Path
from typing import Any

from . import stats, store
from .doubts import MISSED, timed_density
from .formats import NONE, github
from .machine import kind
from .rows import SETTING, Group, Row, combine

PAGE = "CLAIMS.md"
DATA = Path(__file__).with_name("claims.toml")
SHORT = "fell short on another model"
VERDICTS = ("reproduced", "partly", "not reproduced", SHORT, "not measured")
HALF = 0.5  # of a claimed gain, from which on it is partly reproduced

HOW_TO_READ = """\
Generated from `harness/claims.toml` and the records of all result sets by `python -m harness report --out results`; do
not edit.

- **Measured here** is the cell that supports a claim most: of the claim's method, its models or similar ones, and the
  stated density, batch and context. Speed-ups, with their 95 % interval, are over the fastest dense runner of the same
  run; where the paper names its baseline, over that one, with the fastest beside it, and what that reaches alone. A
  cell's density is that of its timed steps, where records say it. FLOPs are dense ÷ executed, of a decoded token,
  lm_head and attention scores included. FLOPs and quality need weights that have an accuracy.
- **reproduced**: the claimed number is reached on one of the paper's models, and the quality that the claim states was
  measured and holds. GPUs differ from the papers' in most rows; what differs is always said.
- **partly**: reached on another model or with random weights, whose quality is unknown; or at least half of the claimed
  gain is reached. A speed-up counts only if the cell is *faster* than the fastest dense runner, whatever it is over.
- **not reproduced**: measured on one of the paper's models, and less than that.
- **fell short on another model**: the same on another model alone, which refutes nothing, but supports nothing either.
- **not measured**: no record here is within the claim's setting; the reason is given.
"""


@dataclass(frozen=True)
class Claim:
    """An entry of `claims.toml`, which says what each field means."""

    method: str
    paper: str
    arxiv: str
    claim: str
    quantity: str
    value: float
    setting: str
    gpu: Sequence[str] = ()
    models: Sequence[str] = ()
    similar: Sequence[str] = ()
    density: Sequence[float] | None = None
    ffn_density: Sequence[float] | None = None
    batch: Sequence[float] | None = None
    context: Sequence[float] | None = None
    at: Mapping[str, Sequence[float]] = field(default_factory=dict)
    loss: float | None = None
    twin: str | None = None
    baseline: str | None = None
    needs: str | None = None

    def measure(self, row: Row) -> stats.Interval | None:
        """The claim's quantity in a cell; None where the cell does not have it."""
        if self.quantity == "speed-up":
            return _speedup(row, self.baseline)
        if row.record["cell"]["weights"] == "synthetic":
            return None
        if self.quantity == "FLOPs":
            executed, dense = row.decode.get("flops"), row.decode.get("flops_dense")
            return stats.Interval(dense / executed, dense / executed, dense / executed) if executed and dense else None
        return stats.Interval(100 - row.loss[0], 100 - row.loss[1], 100 - row.loss[0]) if row.loss else None

    def accepts(self, row: Row, timed: bool = True) -> bool:
        """Whether a cell is within the claim's setting, or near enough to it to say something about the claim.

        A control is no cell of its method.
        """
        place = self.place(row, timed) | {"ffn_density": row.ffn.get("mean")}
        ranges = ((getattr(self, name), x) for name, x in place.items())
        within = all(span is None or (x is not None and span[0] <= x <= span[1]) for span, x in ranges)
        known = row.record["cell"]["model"] in (*self.models, *self.similar)
        return row.method == self.method and not row.control and known and within

    def place(self, row: Row, timed: bool = True) -> dict[str, Any]:
        """Where a cell is. What it gains in time it gains at the density of its timed steps, where that is known."""
        cell = row.record["cell"]
        density = timed_density(row) if timed and self.quantity == "speed-up" else None
        return {
            "density": row.target if density is None else density,
            "batch": cell["batch"],
            "context": cell["context"],
        }

    def keeps_quality(self, row: Row) -> bool | None:
        """Whether the loss is within what the claim allows; True where it allows any, None where it is unknown."""
        if self.loss is None:
            return True
        return None if row.loss is None else row.loss[0] <= self.loss

    def gain(self, value: float) -> float:
        """The reached share of the claimed gain: 0 where nothing is gained over dense, 1 where all of it is."""
        return float(value >= self.value) if self.quantity == "quality" else (value - 1) / (self.value - 1)


@dataclass(frozen=True)
class Finding:
    """What the records say about a claim: the cell that supports it most, and the verdict."""

    claim: Claim
    verdict: str
    row: Row | None = None
    value: stats.Interval | None = None
    remarks: tuple[str, ...] = ()


def load(path: Path = DATA) -> list[Claim]:
    return [Claim(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]]


def judge(claim: Claim, sets: Mapping[str, Iterable[Group]]) -> Finding:
    """The verdict on one claim from the groups of each result set."""
    tables = [group.rows for groups in sets.values() for group in groups]
    rows = [row for table in tables for row in table]
    best = {id(row): share for table in tables for row, share in _at_best(claim.baseline, table)}
    accepted = [row for row in rows if claim.accepts(row)]
    if claim.twin:
        accepted = _beside(claim.twin, accepted, rows)
    measured = [
        Finding(claim, _verdict(claim, row, value), row, value, tuple(_remarks(claim, row)))
        for row in accepted
        if (found := claim.measure(row)) is not None
        for value in (found.scaled(best.get(id(row), 1.0)),)
    ]
    if measured:
        return max(measured, key=_support)
    of_method = any(row.method == claim.method for row in rows)
    nothing = "no record of such a cell" if of_method else f"no record of {claim.method}"
    drifted = [row for row in rows if claim.accepts(row, timed=False) and not claim.accepts(row)]
    if labels := [f"{row.label} at {timed_density(row):.2f}" for row in drifted]:
        nothing += f": timed steps ran at another density than the target ({', '.join(dict.fromkeys(labels))})"
    return Finding(claim, "not measured", remarks=(claim.needs or nothing,))


def twin_note(table: Group, groups: Iterable[Group]) -> str | None:
    """Of a model that selects by itself, how far it is from its dense twin, which no row of its table shows; None for
    other models. The twin's cells are looked for in `groups`."""
    pairs = {model: claim.twin for claim in load() if claim.twin for model in (*claim.models, *claim.similar)}
    twin = pairs.get(model := table.setting["model"])
    if twin is None:
        return None
    alike = table.setting | {"model": twin}
    beside = [other for other in groups if other.setting == alike and kind(other.machine) == kind(table.machine)]
    own, dense = (_bits_per_byte(rows) for rows in (table.rows, [row for other in beside for row in other.rows]))
    apart = f": bits per byte {own:.3f} against its {dense:.3f}" if own and dense else ", not measured in this setting"
    return (
        f"*dense* is {model} itself, computed whole, so a cell that skips what it would not use looks lossless. "
        f"The dense twin, {twin}, is another model, trained alike{apart}."
    )


def page(claims: Sequence[Claim], sets: Mapping[str, Iterable[Group]]) -> str:
    """The ledger as Markdown, the same text for the same records."""
    findings = [judge(claim, sets) for claim in claims]
    parts = ["# Claims", HOW_TO_READ, f"{summary(findings)}."]
    for (paper, arxiv), group in groupby(findings, lambda found: (found.claim.paper, found.claim.arxiv)):
        parts.append(f"## {paper} ([arXiv {arxiv}](https://arxiv.org/abs/{arxiv}))")
        titles = ["claim", "its setting", "measured here", "cell", "what differs or lacks", "verdict"]
        parts.append(github(titles, [texts(found) for found in group]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def summary(findings: Sequence[Finding]) -> str:
    """How many claims have which verdict."""
    counts = Counter(found.verdict for found in findings)
    return f"{len(findings)} claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def texts(found: Finding) -> list[str]:
    """A line of the ledger."""
    cell = NONE
    if found.row:
        gpu = found.row.record["machine"].get("gpu")
        place = gpu["name"] if gpu else "CPU"
        cell = f"{described(found.row)}; {place}, [{found.row.source}]({found.row.source}/{store.FILE})"
    remarks = "; ".join(found.remarks) or NONE
    return [found.claim.claim, found.claim.setting, measured(found), cell, remarks, f"**{found.verdict}**"]


def measured(found: Finding) -> str:
    """The number with its unit and interval, and the loss where the claim limits it."""
    if found.row is None or found.value is None:
        return NONE
    value, claim = found.value, found.claim
    if claim.quantity == "quality":
        return f"{value.estimate:.1f} %" + (f" (95 % interval from {value.low:.1f} %)" if isfinite(value.low) else "")
    text = f"{value.estimate:.2f}x"
    if claim.quantity == "speed-up":
        text += f" [{value.low:.2f}, {value.high:.2f}]"
        if claim.baseline and found.row.speedup:
            own = found.row.speedup.estimate
            weak = found.row.part("latency").get("baseline") != claim.baseline
            alone = f" (the fastest dense alone: {value.estimate / own:.2f}x)" if weak else ""
            text += f" over {claim.baseline} at its best{alone}, {own:.2f}x over the fastest dense"
    if claim.loss is not None and found.row.loss:
        text += f", {found.row.loss[0]:.1f} % lost"
    return text


def described(row: Row) -> str:
    """A cell in words."""
    cell = row.record["cell"]
    parts = [row.label, row.options, f"{cell['model']} ({cell['weights']} weights)", cell["mode"]]
    return ", ".join([*filter(None, parts), f"batch {cell['batch']}", f"context {cell['context']}"])


def _bits_per_byte(rows: Iterable[Row]) -> float | None:
    """Of the dense cell."""
    return next((row.part("fidelity").get("bits_per_byte") for row in rows if row.method == "dense"), None)


def _beside(twin: str, accepted: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """The rows with the dense cell of another model, measured on the same machine and text, in place of their own."""

    def setting(record: store.Record) -> str:
        return str([store.place(record), *(record["cell"].get(n) for n in SETTING if n != "model")])

    dense = {
        setting(one.record): one.record
        for row in rows
        for one in row.repeats or [row]
        if one.method == "dense" and one.record["cell"]["model"] == twin
    }
    return [
        joined
        for row in accepted
        for joined in combine(
            Row(one.record, dense.get(setting(one.record)), source=row.source) for one in row.repeats or [row]
        )
    ]


def _verdict(claim: Claim, row: Row, value: stats.Interval) -> str:
    quality, gain, cell = claim.keeps_quality(row), claim.gain(value.estimate), row.record["cell"]
    own = cell["model"] in claim.models
    if quality is False or gain < HALF or (claim.quantity == "speed-up" and not _gains(row)):
        return "not reproduced" if own else SHORT  # what another model does not reach refutes nothing
    return "reproduced" if gain >= 1 and own and quality and cell["weights"] != "synthetic" else "partly"


def _gains(row: Row) -> bool:
    """Whether skipping gains time at all. Over a weak baseline a dense runner can gain as much without it."""
    return row.speedup is not None and stats.verdict((row.speedup.low, row.speedup.high)) == "faster"


def _remarks(claim: Claim, row: Row) -> Iterable[str]:
    cell, gpu = row.record["cell"], row.record["machine"].get("gpu")
    if cell["model"] not in claim.models:
        yield f"another model ({cell['model']})"
    if claim.gpu and gpu and not any(name in gpu["name"] for name in claim.gpu):
        yield "another GPU"
    for name, x in claim.place(row).items():
        low, high = claim.at.get(name, (-inf, inf))
        if x is not None and not low - MISSED <= x <= high + MISSED:
            yield f"{name} {round(x, 2):g} (paper: {_span(low, high)})"
    if claim.quantity == "speed-up" and not _gains(row):
        yield "no faster than the fastest dense"
    if claim.twin:
        yield f"quality against dense {claim.twin}"
    quality = claim.keeps_quality(row)
    if cell["weights"] == "synthetic":
        yield "random weights: quality unknown"
    elif quality is None:
        yield "quality not measured"
    if quality is False:
        yield f"more than {claim.loss:g} % lost"


def _span(low: float, high: float) -> str:
    if low == high:
        return f"{low:g}"
    return f"{low:g} and above" if high == inf else f"{low:g} to {high:g}"


def _support(found: Finding) -> tuple[Any, ...]:
    """A better verdict first, then the paper's own models, known quality, the larger number and the smaller loss."""
    assert found.row is not None and found.value is not None
    own = found.row.record["cell"]["model"] in found.claim.models
    kept = {True: 2, None: 1, False: 0}[found.claim.keeps_quality(found.row)]
    loss = found.row.loss[0] if found.row.loss else 0.0
    return -VERDICTS.index(found.verdict), own, kept, found.value.estimate, -loss


def _at_best(runner: str | None, table: Sequence[Row]) -> list[tuple[Row, float]]:
    """Of a dense runner: its time where it was fastest in a table, over that in each row's run.

    An eager step waits for the host, and takes up to twice as long in one run as in another: a speed-up over a slow run
    of it would be luck.
    """
    times = [
        (row, dense["median"])
        for row in table
        if runner and (dense := (row.part("latency").get("dense") or {}).get(runner))
    ]
    return [(row, min(time for _, time in times) / own) for row, own in times]


def _speedup(row: Row, baseline: str | None) -> stats.Interval | None:
    """Over the fastest dense runner, or over `baseline` from the raw samples; None on a CPU, which skips nothing."""
    if row.record["machine"].get("gpu") is None:
        return None
    return row.speedup if baseline is None else row.speedup_over(baseline)
