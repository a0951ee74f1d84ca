"""Records side by side: each cell with the dense cell of its setting, its accuracy loss and its rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import stats
from .store import Record

BASELINES = ("dense", "null")
BUDGETS = (1.0, 3.0)  # per cent of accuracy that a cell may lose; only cells within the last one are ranked
SETTING = ("model", "weights", "mode", "batch", "context", "corpus", "tasks", "limit", "seed", "device", "dtype")


@dataclass(eq=False)
class Row:
    """A measured cell, the dense cell of its setting if there is one, and its rank once it has one."""

    record: Record
    dense: Record | None
    rank: int | None = None

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
    def details(self) -> str:
        s = self.setting
        tasks = f"{s['limit']} items per task" if s["tasks"] else "no tasks"
        text = "" if self.synthetic else f"corpus {s['corpus']}, {tasks}, "
        return f"{s['device']}, {s['dtype']}, {text}seed {s['seed']}"

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.rows for task in row.part("accuracy")))


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
    _rank(found)
    return found


def _order(row: Row) -> tuple[int, str, str, float]:
    place = BASELINES.index(row.method) if row.is_baseline else len(BASELINES)
    return place, row.method, row.options, -(row.target or 0)


def _rank(found: Group) -> None:
    """Ranks by speed-up the cells within the widest budget; nothing on a CPU, nothing with random weights."""
    if found.on_cpu or found.synthetic:
        return
    timed = [row for row in found.rows if not row.is_baseline and row.part("latency").get("speedup")]
    fit = [row for row in timed if row.loss and row.loss[0] <= BUDGETS[-1]]
    for rank, row in enumerate(sorted(fit, key=lambda row: -row.part("latency")["speedup"]), 1):
        row.rank = rank
