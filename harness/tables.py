"""Rows and columns of the leaderboard, from records alone; the same columns serve the page and the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import stats
from .store import Record

BASELINES = ("dense", "null")
BUDGETS = (1.0, 3.0)  # per cent of accuracy that a ranked cell may lose
SETTING = ("model", "weights", "mode", "batch", "context", "corpus", "tasks", "limit", "seed", "device", "dtype")
NONE = "–"


@dataclass(frozen=True)
class Row:
    """A measured cell beside the dense cell of its setting, if that was measured."""

    record: Record
    dense: Record | None

    @property
    def cell(self) -> dict[str, Any]:
        return self.record["cell"]

    @property
    def method(self) -> str:
        return self.cell["method"]

    @property
    def options(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.cell["options"].items())

    @property
    def label(self) -> str:
        target = self.cell["density"]
        return self.method if target is None or self.method in BASELINES else f"{self.method} {target:g}"

    @property
    def skips(self) -> bool:
        return self.method not in BASELINES

    def decode(self, key: str) -> float | None:
        return ((self.record.get("cost") or {}).get("decode") or {}).get(key)

    @property
    def density(self) -> float | None:
        return (self.record.get("density") or {}).get("model")

    @property
    def p99(self) -> float | None:
        sites = (self.record.get("density") or {}).get("sites") or {}
        return max((s["p99"] for s in sites.values() if s.get("p99") is not None), default=None)

    @property
    def latency(self) -> dict[str, Any]:
        return self.record.get("latency") or {}

    @property
    def fidelity(self) -> dict[str, Any]:
        return self.record.get("fidelity") or {}

    @cached_property
    def nll(self) -> stats.Interval | None:
        """Mean negative log-likelihood minus dense's [nats/token], paired over the windows, weighted by tokens."""
        own, base = self._paired("nll")
        weights = self.record.get("items", {}).get("tokens")
        if not own or weights is None or len(weights) != len(own):
            return None
        return stats.difference(own, base, weights)

    @property
    def perplexity_ratio(self) -> stats.Interval | None:
        return self.nll and stats.Interval(*(math.exp(x) for x in (self.nll.estimate, self.nll.low, self.nll.high)))

    @cached_property
    def tasks(self) -> dict[str, stats.Paired]:
        """The paired differences to dense on every task that both answered."""
        found = {}
        for task in self.record.get("accuracy") or {}:
            own, base = self._paired(task)
            if own:
                found[task] = stats.compare(own, base)
        return found

    @property
    def task_average(self) -> float | None:
        values = [v["value"] for v in (self.record.get("accuracy") or {}).values() if is_share(v)]
        return sum(values) / len(values) if values else None

    @property
    def task_average_difference(self) -> stats.Interval | None:
        """Mean of the tasks' differences; their intervals, independent of each other, combine in quadrature."""
        shares = {name for name, v in (self.record.get("accuracy") or {}).items() if is_share(v)}
        deltas = [pair.difference for name, pair in self.tasks.items() if name in shares]
        if not deltas:
            return None
        mean = sum(d.estimate for d in deltas) / len(deltas)
        low = math.hypot(*(d.estimate - d.low for d in deltas)) / len(deltas)
        high = math.hypot(*(d.high - d.estimate for d in deltas)) / len(deltas)
        return stats.Interval(mean, mean - low, mean + high)

    @cached_property
    def loss(self) -> tuple[float, float] | None:
        """Accuracy lost against dense [%], and the upper end of its interval: the worse of bits per byte and tasks."""
        if self.dense is None:
            return None
        losses = []
        base = (self.dense.get("fidelity") or {}).get("perplexity")
        if self.nll and base and base > 1:
            losses.append((self.nll.estimate / math.log(base), self.nll.high / math.log(base)))
        average, delta = Row(self.dense, None).task_average, self.task_average_difference
        if average and delta:
            losses.append((-delta.estimate / average, -delta.low / average))
        return (100 * max(e for e, _ in losses), 100 * max(h for _, h in losses)) if losses else None

    @property
    def budget(self) -> str:
        """The smallest budget that holds the loss; with a question mark where only its estimate is inside."""
        if not self.skips or self.loss is None:
            return NONE
        estimate, high = self.loss
        for budget in BUDGETS:
            if estimate <= budget:
                return f"≤ {budget:g} %{'' if high <= budget else ' ?'}"
        return f"> {BUDGETS[-1]:g} %"

    def _paired(self, name: str) -> tuple[list[float], list[float]]:
        own = (self.record.get("items") or {}).get(name) or []
        base = ((self.dense or {}).get("items") or {}).get(name) or []
        if len(own) != len(base) or None in own or None in base or self.method == "dense":
            return [], []
        return own, base


@dataclass(frozen=True)
class Group:
    """The rows of one table: everything but method, options and density is the same."""

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
        return f"{s['device']}, {s['dtype']}, corpus {s['corpus']}, {tasks}, seed {s['seed']}"

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(t for row in self.rows for t in row.record.get("accuracy") or {}))

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Row index -> rank by speed-up, among the cells within the widest budget. Empty on a CPU, which is not ranked."""
        if self.on_cpu or self.synthetic:
            return {}
        ranked = [
            (-row.latency["speedup"], index)
            for index, row in enumerate(self.rows)
            if row.skips and row.latency.get("speedup") and row.loss and row.loss[0] <= BUDGETS[-1]
        ]
        return {index: rank for rank, (_, index) in enumerate(sorted(ranked), 1)}


def group(records: Iterable[Record]) -> list[Group]:
    """Records by machine and setting, in order of first appearance; rows by method, then falling density."""
    found: dict[str, list[Record]] = {}
    for record in records:
        setting = {name: record["cell"].get(name) for name in SETTING}
        key = json.dumps([record["machine"].get("identity"), setting], sort_keys=True)
        found.setdefault(key, []).append(record)
    groups = []
    for members in found.values():
        measured = [r for r in members if r["status"] == "ok"]
        dense = next((r for r in measured if r["cell"]["method"] == "dense"), None)
        rows = sorted((Row(r, dense) for r in measured), key=_order)
        left_out = [r for r in members if r["status"] != "ok"]
        setting = {name: members[0]["cell"].get(name) for name in SETTING}
        groups.append(Group(members[0]["machine"], setting, rows, left_out))
    return groups


def _order(row: Row) -> tuple[int, str, str, float]:
    place = BASELINES.index(row.method) if row.method in BASELINES else len(BASELINES)
    return place, row.method, row.options, -(row.cell["density"] or 0)


@dataclass(frozen=True)
class Column:
    """`title` on the page, `short` in the terminal (None: page only), `text(group, index)` of one row."""

    title: str
    short: str | None
    text: Callable[[Group, int], str]


def of_row(function: Callable[[Row], str]) -> Callable[[Group, int], str]:
    return lambda group, index: function(group.rows[index])


METHOD = [
    Column("method", None, of_row(lambda r: r.method)),
    Column("options", None, of_row(lambda r: r.options or NONE)),
    Column("target density", None, of_row(lambda r: number(r.cell["density"]))),
]


def cost_columns(group: Group) -> list[Column]:
    """Density, FLOPs, bytes and time. Latency is headed as what it is: on a CPU nothing is compared or ranked."""
    columns = [Column("", "method", _terminal_label), *METHOD]
    columns += [
        Column("realised density", "density", of_row(lambda r: number(r.density))),
        Column("p99 of densest site", None, of_row(lambda r: number(r.p99))),
        Column("executed GFLOP/token", "GFLOP /token", of_row(lambda r: scaled(r.decode("flops"), 1e9))),
        Column("FLOPs ÷ dense", "÷ dense", of_row(lambda r: ratio(r.decode("flops"), r.decode("flops_dense")))),
        Column("prefill FLOPs ÷ dense", None, of_row(_prefill)),
        Column("read MB/token", "MB /token", of_row(lambda r: scaled(r.decode("bytes"), 1e6))),
        Column("bytes ÷ dense", "÷ dense", of_row(lambda r: ratio(r.decode("bytes"), r.decode("bytes_dense")))),
    ]
    if any((r.record.get("density") or {}).get("union") is not None for r in group.rows):
        columns.insert(6, Column("union over batch", None, of_row(lambda r: number(r.record["density"].get("union")))))
    if group.on_cpu:
        columns.append(Column("CPU reference path, not ranked: ms/token, median [p10, p90]", "CPU ms/token", of_row(_time)))
    else:
        if not group.synthetic:
            columns.insert(0, Column("rank", "rank", lambda g, i: str(g.ranks.get(i, NONE))))
        columns += [
            Column("ms/token, median [p10, p90]", "ms/token [p10, p90]", of_row(_time)),
            Column("speed-up over fastest dense [95 %]", "speed-up [95 %]", of_row(_speedup)),
            Column("verdict", "verdict", of_row(lambda r: r.latency.get("verdict") or NONE if r.skips else NONE)),
            Column("share of byte limit", None, of_row(lambda r: percent(r.latency.get("fraction_of_limit")))),
        ]
    return columns + [
        Column("preparation, s", "prep. s", of_row(lambda r: number((r.record.get("prepare") or {}).get("seconds")))),
        Column("preparation, tokens", None, of_row(lambda r: count((r.record.get("prepare") or {}).get("tokens")))),
    ]


def quality_columns(group: Group) -> list[Column]:
    """Perplexity, divergence and tasks, each beside its paired difference to dense."""
    columns = [Column("", "method", _terminal_label), *METHOD]
    columns += [
        Column("accuracy budget", "budget", of_row(lambda r: r.budget)),
        Column("perplexity", "perplexity", of_row(lambda r: number(r.fidelity.get("perplexity"), 4))),
        Column("perplexity ÷ dense [95 %]", "÷ dense [95 %]", of_row(lambda r: interval(r.perplexity_ratio))),
        Column("bits/byte", None, of_row(lambda r: number(r.fidelity.get("bits_per_byte")))),
        Column("KL to dense, nats/token", "KL nats", of_row(lambda r: number(r.fidelity.get("kl"), 2))),
        Column("greedy agreement", "agreement", of_row(lambda r: percent(r.fidelity.get("greedy_agreement")))),
    ]
    return columns + [task_column(name, group) for name in group.task_names]


def task_column(name: str, group: Group) -> Column:
    facts = next(r.record["accuracy"][name] for r in group.rows if name in (r.record.get("accuracy") or {}))
    share = is_share(facts)
    arrow = "" if facts.get("higher_is_better", True) else ", lower is better"
    chance = f", chance {percent(facts['chance'])}" if facts.get("chance") else ""
    title = f"{name}, {facts['metric']}{' %' if share else ''}{chance}{arrow}; Δ points [95 %], McNemar p"

    def text(row: Row, long: bool) -> str:
        found = (row.record.get("accuracy") or {}).get(name)
        if not found or found.get("value") is None:
            return NONE
        scale = 100 if share else 1
        value = f"{found['value'] * scale:.1f}"
        pair = row.tasks.get(name)
        if pair is None:
            return value
        d = pair.difference
        if not long:
            return f"{value} ({d.estimate * scale:+.1f})"
        p = "" if pair.p is None else f", p {pair.p:.2g}"
        return f"{value}; {d.estimate * scale:+.1f} [{d.low * scale:+.1f}, {d.high * scale:+.1f}]{p}"

    short = name.replace("_", " ")
    return Column(title, f"{short} (Δ)", lambda g, i: text(g.rows[i], True)) if not group else _TaskColumn(
        title, f"{short} (Δ)", lambda g, i: text(g.rows[i], True), lambda g, i: text(g.rows[i], False)
    )
