"""`python -m harness compare A B`: the same cells in two result sets, and what became of them from A to B."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.errors import UsageError

from . import machine, stats, store
from .doubts import disturbances
from .formats import NONE, ends, interval, number
from .rows import SETTING, Row, is_share
from .store import Record
from .tables import Column, terminal

WIDTH = 120
SHOWN_MISSING = 20
VERSIONS = ("torch", "triton", "transformers", "python")


class Pair(Row):
    """A cell of B. Its record in A stands where elsewhere the dense one does, so differences are `B - A`."""

    @property
    def before(self) -> Row:
        assert self.dense is not None
        return Row(self.dense, None)

    @property
    def on_gpu(self) -> bool:
        return self.record["machine"].get("gpu") is not None

    @cached_property
    def speedup(self) -> stats.Interval | None:
        """`median(A) / median(B)` from the raw samples; blocks are drawn apart, since the runs were not interleaved.

        None on a CPU, whose reference path skips nothing, and where either has no time.
        """
        before, after = (_samples(row.part("latency")) for row in (self.before, self))
        return stats.speedup(before, after, paired=False) if self.on_gpu and before and after else None

    @property
    def verdict(self) -> str | None:
        return stats.verdict((self.speedup.low, self.speedup.high)) if self.speedup else None

    @property
    def same_text(self) -> bool:
        """Whether both were evaluated on the same text; the built-in tasks are made from Python's own library."""
        from .tasks import TASKS

        one, other = self.before.record, self.record
        built_in = any(task in TASKS for task in other["cell"]["tasks"])
        same_python = one["machine"].get("python") == other["machine"].get("python")
        return one.get("corpus") == other.get("corpus") and (same_python or not built_in)

    def _paired(self, name: str) -> tuple[list[float], list[float]] | None:
        return super()._paired(name) if self.same_text else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="the folder of the earlier records, or its records.jsonl")
    parser.add_argument("b", metavar="B", help="the later one: verdicts say what B is against A")
    parser.add_argument("--fail-on-slower", action="store_true", help="exit 1 if a verdict is slower")


def main(args: argparse.Namespace) -> int:
    """Prints the comparison. Exit code 0, or 1 with --fail-on-slower when a cell is slower in B."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.width > WIDTH or not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    a, b = _read(args.a), _read(args.b)
    _refuse_other_gpus(a, b, args)
    pairs = [Pair(b[key], a[key]) for key in b if key in a]
    missing = [("A", a[key]) for key in a if key not in b] + [("B", b[key]) for key in b if key not in a]
    for side, record in missing[:SHOWN_MISSING]:
        console.print(f"only in {side}: {_name(record)}", markup=False)
    if len(missing) > SHOWN_MISSING:
        console.print(f"... and {len(missing) - SHOWN_MISSING} more in only one of the two")
    if not pairs:
        raise UsageError(f"'{args.a}' and '{args.b}' have no measured cell in common: run the command of one for both.")
    for side, path, row in (("A", args.a, pairs[-1].before), ("B", args.b, pairs[-1])):
        console.print(f"{side}: {path} · {machine.line(row.record['machine'], row.record)}", style="dim", markup=False)
    console.print(terminal(columns(pairs), pairs))
    for note in notes(pairs):
        console.print(note, markup=False)
    return int(args.fail_on_slower and any(pair.verdict == "slower" for pair in pairs))


def columns(pairs: Sequence[Pair]) -> list[Column]:
    """Method, what differs between the cells, times and verdict, perplexity and tasks; only what some cell has."""
    shown = [_column("method", lambda p: "\n".join(filter(None, [p.label, p.options])))]
    differing = [name for name in SETTING if len({str(pair.record["cell"].get(name)) for pair in pairs}) > 1]
    if differing:
        shown.append(
            _column("setting", lambda p: "\n".join(_value(name, p.record["cell"][name]) for name in differing))
        )
    if any(pair.speedup for pair in pairs):
        shown += [
            _column("ms/step\nA → B", lambda p: f"{_median(p.before)} → {_median(p)}" if p.on_gpu else NONE),
            _column("speed-up of B\n[95 %]", lambda p: _interval(p.speedup)),
            _column("B is", lambda p: p.verdict or NONE),
        ]
    if any(pair.perplexity_ratio for pair in pairs):
        shown.append(_column("perplexity\nB ÷ A [95 %]", lambda p: _interval(p.perplexity_ratio)))
    for task in dict.fromkeys(task for pair in pairs for task in pair.tasks):
        shown.append(_task(task, next(pair.part("accuracy")[task] for pair in pairs if task in pair.tasks)))
    return shown


def notes(pairs: Sequence[Pair]) -> list[str]:
    """What was not compared, and what casts doubt on what was."""
    found = []
    if not all(pair.on_gpu for pair in pairs):
        found.append("Latencies of the CPU reference path are never compared: it skips nothing. Accuracy is.")
    if other := [pair for pair in pairs if not pair.same_text]:
        found.append(f"{len(other)} of {len(pairs)} cells were evaluated on other text: no accuracy is compared there.")
    doubts = {text: None for pair in pairs for text in _doubts(pair)}
    return [*found, f"Caution: {'; '.join(doubts)}."] if doubts else found


def _doubts(pair: Pair) -> list[str]:
    one, other = pair.before.record["machine"], pair.record["machine"]
    texts = []
    if pair.on_gpu:
        before, after = one["gpu"], other["gpu"]
        if before.get("uuid_hash") != after.get("uuid_hash"):
            units = f"{before.get('uuid_hash')} and {after.get('uuid_hash')}"
            texts.append(f"two units of {after['name']} ({units}), whose clocks and memory differ")
        if before.get("driver") != after.get("driver"):
            texts.append(f"driver {before.get('driver')} in A, {after.get('driver')} in B")
        for side, record in (("A", pair.before.record), ("B", pair.record)):
            texts += [f"{text} in {side}" for text in disturbances(record)]
    for name in VERSIONS:
        if one.get(name) != other.get(name):
            texts.append(f"{name} {one.get(name)} in A, {other.get(name)} in B")
    return texts


def _read(place: str) -> dict[str, Record]:
    """The newest measured record of each cell on each model of GPU. Raises UsageError when there is none."""
    path = Path(place)
    records = store.load(path.parent if path.name == store.FILE else path)
    found = {_key(record): record for record in records if record["status"] == "ok"}
    if not found:
        raise UsageError(f"'{place}' has no measured cell: fill it with `python -m harness run --out {place}`.")
    return found


def _key(record: Record) -> str:
    return json.dumps([record["cell"], _gpu(record)], sort_keys=True)


def _gpu(record: Record) -> str | None:
    return (record["machine"].get("gpu") or {}).get("name")


def _refuse_other_gpus(a: dict[str, Record], b: dict[str, Record], args: argparse.Namespace) -> None:
    one, other = ({name for name in map(_gpu, side.values()) if name} for side in (a, b))
    if one and other and not one & other:
        raise UsageError(
            f"'{args.a}' was measured on {', '.join(sorted(one))} and '{args.b}' on {', '.join(sorted(other))}: "
            "different GPUs are never compared, measure both on the same one."
        )


def _samples(latency: dict[str, Any]) -> list[list[float]] | None:
    """The blocks of the runner that stands for the cell."""
    return (latency.get("samples") or {}).get(latency.get("runner"))


def _column(title: str, text: Callable[[Any], str]) -> Column:
    return Column(title, text, title)


def _task(name: str, facts: dict[str, Any]) -> Column:
    """B - A with its interval: in points where the score is a share."""
    scale, unit = (100, "points") if is_share(facts) else (1, facts["metric"])

    def text(pair: Pair) -> str:
        if name not in pair.tasks:
            return NONE
        found = pair.tasks[name].difference.scaled(scale)
        return f"{found.estimate:+.1f}{ends(found, '+.1f', before=chr(10))}"

    words = name.replace("_", "\n")
    return _column(f"{words}\nB - A, {unit}", text)


def _value(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} {name}"
    return str(value) if isinstance(value, str) else f"{name} {value}"


def _interval(value: stats.Interval | None) -> str:
    return interval(value).replace(" ", "\n", 1)


def _median(row: Row) -> str:
    return number(row.part("latency").get("median"))


def _name(record: Record) -> str:
    cell, gpu = record["cell"], _gpu(record)
    row = Row(record, None)
    parts = [
        row.label,
        row.options,
        cell["model"],
        cell["mode"],
        f"batch {cell['batch']}",
        f"context {cell['context']}",
    ]
    return ", ".join([*filter(None, parts), gpu or cell["device"]])
