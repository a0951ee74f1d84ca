"""Records side by side: each cell with the dense cell of its setting, its accuracy loss and its rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import stats
from .store import Record

BASELINES = ("dense", "null")
BUDGETS = (1.0, 3.0)  # per cent of accuracy that a cell may lose; only cells within the last one are ranked
SETTING = ("model", "weights", "mode", "batch", "context", "corpus", "tasks", "limit", "seed", "device", "dtype")


@dataclass(frozen=True)
class Rank:
    """A place by speed-up, and the best and worst that the cells' intervals allow."""

    place: int
    best: int
    worst: int


@dataclass(eq=False)
class Row:
    """A measured cell and the dense cell of its setting, if there is one.

    `ranks`: by budget, once it has any; `source`: the result set it comes from, where several are shown together.
    """

    record: Record
    dense: Record | None
    ranks: dict[float, Rank] = field(default_factory=dict)
    source: str = ""

    def part(self, name: str) -> dict[str, Any]:
        """A section of the record; empty where nothing was measured."""
        return self.record.get(name) or {}

    @property
    def method(self) -> str:
        return self.record["cell"]["method"]

    @property
    def options(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.record["cell"]["options"].items())

    @property
    def target(self) -> float | None:
        return self.record["cell"]["density"]

    @property
    def is_baseline(self) -> bool:
        return self.method in BASELINES

    @property
    def label(self) -> str:
        return self.method if self.target is None or self.is_baseline else f"{self.method} {self.target:g}"

    @property
    def name(self) -> str:
        """The label, with the options that somebody set."""
        return f"{self.label} ({self.options})" if self.options else self.label

    @property
    def decode(self) -> dict[str, Any]:
        return self.part("cost").get("decode") or {}

    @property
    def prompts(self) -> dict[str, Any]:
        """How long a prompt took, by the way it ran."""
        return self.part("latency").get("prefill") or {}

    @property
    def prompt(self) -> dict[str, Any]:
        """How long it took in this cell's mode; under `decode`, where the prompt is dense, that is the dense way."""
        return self.prompts.get("method") or self.prompts.get("dense") or {}

    @property
    def speedup(self) -> stats.Interval | None:
        """Over the fastest dense runner of the same run."""
        latency = self.part("latency")
        if self.method == "dense" or latency.get("speedup") is None:
            return None
        return stats.Interval(latency["speedup"], *latency["ci"])

    @property
    def breakdown(self) -> dict[str, float]:
        """Milliseconds of a step by class of kernel; empty where no step was traced."""
        return (self.part("latency").get("breakdown") or {}).get("ms") or {}

    @property
    def p99(self) -> float | None:
        """Of the density over tokens, at the site where it is largest."""
        sites = (self.part("density").get("sites") or {}).values()
        return max((site["p99"] for site in sites if site.get("p99") is not None), default=None)

    @cached_property
    def nll(self) -> stats.Interval | None:
        """Mean negative log-likelihood minus dense's [nats/token], paired over windows, weighted by their tokens."""
        pair, weights = self._paired("nll"), self.part("items").get("tokens")
        return stats.difference(*pair, weights) if pair and weights and len(weights) == len(pair[0]) else None

    @property
    def perplexity_ratio(self) -> stats.Interval | None:
        d = self.nll
        return d and stats.Interval(math.exp(d.estimate), math.exp(d.low), math.exp(d.high))

    @cached_property
    def tasks(self) -> dict[str, stats.Paired]:
        """Differences to dense, paired over the items, on the tasks that both answered."""
        pairs = {task: self._paired(task) for task in self.part("accuracy")}
        return {task: stats.compare(*pair) for task, pair in pairs.items() if pair}

    @property
    def task_average(self) -> float | None:
        """Plain mean over the tasks whose score is a share."""
        values = [task["value"] for task in self.part("accuracy").values() if is_share(task)]
        return sum(values) / len(values) if values else None

    @property
    def task_average_difference(self) -> stats.Interval | None:
        """Mean of the tasks' differences to dense; their intervals are independent and add in quadrature."""
        accuracy = self.part("accuracy")
        deltas = [pair.difference for task, pair in self.tasks.items() if is_share(accuracy[task])]
        if not deltas:
            return None
        mean = sum(d.estimate for d in deltas) / len(deltas)
        down = math.hypot(*(d.estimate - d.low for d in deltas)) / len(deltas)
        up = math.hypot(*(d.high - d.estimate for d in deltas)) / len(deltas)
        return stats.Interval(mean, mean - down, mean + up)

    @cached_property
    def loss(self) -> tuple[float, float] | None:
        """Accuracy lost against dense [%], and the upper end of its interval.

        The worse of two relative losses: of bits per byte (the mean log-likelihood), and of the task average.
        """
        if self.dense is None:
            return None
        losses = []
        dense = Row(self.dense, None)
        perplexity, average = dense.part("fidelity").get("perplexity"), dense.task_average
        if self.nll and perplexity and perplexity > 1:
            losses.append((self.nll.estimate / math.log(perplexity), self.nll.high / math.log(perplexity)))
        if (delta := self.task_average_difference) and average:
            losses.append((-delta.estimate / average, -delta.low / average))
        return (100 * max(e for e, _ in losses), 100 * max(h for _, h in losses)) if losses else None

    def _paired(self, name: str) -> tuple[list[float], list[float]] | None:
        """This cell's scores and dense's on the same items; None unless both are complete."""
        own = self.part("items").get(name)
        base = Row(self.dense, None).part("items").get(name) if self.dense and self.dense is not self.record else None
        complete = own and base and len(own) == len(base) and None not in own and None not in base
        return (own, base) if own and base and complete else None


@dataclass(frozen=True)
class Group:
    """The rows of one table: all but method, options and density is the same. `left_out`: failed, not applicable."""

    machine: dict[str, Any]
    setting: dict[str, Any]
    rows: list[Row]
    left_out: list[Record]

    @property
    def synthetic(self) -> bool:
        return self.setting["weights"] == "synthetic"

    @property
    def on_cpu(self) -> bool:
        return self.setting["device"] == "cpu"

    @property
    def title(self) -> str:
        s = self.setting
        return f"{s['model']} ({s['weights']} weights), {s['mode']}, batch {s['batch']}, context {s['context']}"

    @property
    def short_title(self) -> str:
        """Without the model."""
        s = self.setting
        return f"{s['mode']}, batch {s['batch']}, context {s['context']}; {self.details}"

    @property
    def details(self) -> str:
        s = self.setting
        tasks = f"{s['limit']} items per task" if s["tasks"] else "no tasks"
        text = "" if self.synthetic else f"corpus {s['corpus']}, {tasks}, "
        return f"{s['device']}, {s['dtype']}, {text}seed {s['seed']}"

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.rows for task in row.part("accuracy")))


def doubts_of(rows: Iterable[Row]) -> list[str]:
    """What casts doubt on the numbers of rows that stand together."""
    rows = list(rows)
    records = [row.record for row in rows]
    gpus = [r["machine"].get("gpu") or {} for r in records]
    gpus += [row.part("latency").get("watch") or {} for row in rows]
    doubts = []
    if any(isinstance(gpu.get("throttle"), list) and gpu["throttle"] for gpu in gpus):
        doubts.append("the GPU throttled its clocks")
    if any(isinstance(gpu.get("processes"), int) and gpu["processes"] for gpu in gpus):
        doubts.append("other processes used the GPU")
    if len({r["machine"].get("identity") for r in records}) > 1:
        doubts.append("not all rows come from the same machine or the same versions")
    if any((r.get("git") or {}).get("dirty") and r["git"].get("commit") for r in records):
        doubts.append("some rows come from a tree with uncommitted changes")
    if len({r.get("source") for r in records}) > 1:
        doubts.append("not all rows come from the same source code")
    doubts += sorted({note for row in rows for note in row.part("latency").get("notes") or ()})
    for row in rows:
        warnings = (row.part("artifact").get("manifest") or {}).get("warnings") or ()
        doubts += [f"{row.label}, {text}" for text in warnings]
    return doubts


@dataclass(frozen=True)
class Grid:
    """Tables that differ in batch or context alone. speedups: by method, then (batch, context): ratio and verdict."""

    title: str
    batches: list[int]
    contexts: list[int]
    speedups: dict[str, dict[tuple[int, int], tuple[float, str]]]


def grids(groups: Iterable[Group]) -> list[Grid]:
    """One per model, machine and setting that has speed-ups at several batches or contexts; none of a CPU."""
    alike: dict[str, list[Group]] = {}
    for found in groups:
        rest = {name: value for name, value in found.setting.items() if name not in ("batch", "context")}
        alike.setdefault(json.dumps([found.machine.get("identity"), rest], sort_keys=True), []).append(found)
    return [grid for found in alike.values() if (grid := _grid(found)) and not found[0].on_cpu]


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


def is_share(task: dict[str, Any]) -> bool:
    """Whether a score is a share of items, larger is better: printed in per cent and averaged."""
    value = task.get("value")
    return value is not None and 0 <= value <= 1 and task.get("higher_is_better", True)


def group(records: Iterable[Record]) -> list[Group]:
    """Records by machine and setting, in order of first appearance; rows by method, then falling density."""
    members: dict[str, list[Record]] = {}
    for record in records:
        setting = [record["cell"].get(name) for name in SETTING]
        members.setdefault(json.dumps([record["machine"].get("identity"), setting], sort_keys=True), []).append(record)
    return [_group(found) for found in members.values()]


def _group(records: list[Record]) -> Group:
    measured = [r for r in records if r["status"] == "ok"]
    dense = next((r for r in measured if r["cell"]["method"] == "dense"), None)
    rows = sorted((Row(r, dense) for r in measured), key=_order)
    setting = {name: records[0]["cell"].get(name) for name in SETTING}
    left_out = [r for r in records if r["status"] != "ok"]
    found = Group(records[0]["machine"], setting, rows, left_out)
    rank(found)
    return found


def _order(row: Row) -> tuple[int, str, str, float]:
    place = BASELINES.index(row.method) if row.is_baseline else len(BASELINES)
    return place, row.method, row.options, -(row.target or 0)


def rank(found: Group) -> None:
    """Ranks by speed-up the cells within each budget; nothing on a CPU, nothing with random weights.

    A cell's best place counts the cells that are faster with their whole interval, its worst one leaves out those that
    are slower with theirs.
    """
    if found.on_cpu or found.synthetic:
        return
    for budget in BUDGETS:
        fit = [
            (row, row.speedup)
            for row in found.rows
            if not row.is_baseline and row.speedup and row.loss and row.loss[0] <= budget
        ]
        for place, (row, own) in enumerate(sorted(fit, key=lambda pair: -pair[1].estimate), 1):
            faster = sum(other.low > own.high for _, other in fit)
            slower = sum(other.high < own.low for _, other in fit)
            row.ranks[budget] = Rank(place, 1 + faster, len(fit) - slower)
