"""Records side by side: each cell with the dense cell of its setting, its accuracy loss and its rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from methods.base import CONTROLS

from . import stats
from .machine import kind
from .plan import BASELINES
from .store import Record, mean, mean_record, place, same_content

BUDGETS = (1.0, 3.0)  # per cent of accuracy that a cell may lose; only cells within the last one are ranked
# A table's rows agree in these; with `seed`, which rows of one cell may differ in, it is the whole setting of a cell.
SHARED = ("model", "weights", "mode", "batch", "context", "corpus", "tasks", "limit", "device", "dtype")
SETTING = (*SHARED, "seed")
PREDICTED = ("heads", "ffn")  # sites under which a manifest says how good its predictors are
LORA = "-lora"  # ends the name of a method whose `lora_rank` is set


@dataclass(frozen=True)
class Rank:
    """A place by speed-up, and the best and worst that the cells' intervals allow."""

    place: int
    best: int
    worst: int


@dataclass(eq=False)
class Row:
    """A measured cell and the dense cell of its setting, if there is one.

    `repeats`: where it was measured with several seeds, a row for each; `record` and `dense` then hold their means, and
    no items or samples.
    `ranks`: by budget, once it has any; `source`: the result set it comes from, where several are shown together.
    """

    record: Record
    dense: Record | None
    ranks: dict[float, Rank] = field(default_factory=dict)
    source: str = ""
    repeats: list[Row] = field(default_factory=list)

    def part(self, name: str) -> dict[str, Any]:
        """A section of the record; empty where nothing was measured."""
        return self.record.get(name) or {}

    @property
    def method(self) -> str:
        """Its name. What trained low-rank updates alone is a method of its own, which nothing takes for the paper's."""
        cell = self.record["cell"]
        return cell["method"] + (LORA if cell["options"].get("lora_rank") else "")

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
    def control(self) -> bool:
        """Whether the cell is no method but a control of one."""
        return self.record["cell"]["options"].get("selector") in CONTROLS

    @property
    def label(self) -> str:
        return self.method if self.target is None or self.is_baseline else f"{self.method} {self.target:g}"

    @property
    def name(self) -> str:
        """The label, with the options that somebody set."""
        return f"{self.label} ({self.options})" if self.options else self.label

    @property
    def seeds(self) -> list[int]:
        return [row.record["cell"]["seed"] for row in self.repeats or [self]]

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

    @cached_property
    def predictors(self) -> dict[str, dict[str, dict[str, float]]]:
        """By site and block, what predictors caught of held-out tokens; means over seeds, empty without predictors."""
        manifests = [row.part("artifact").get("manifest") or {} for row in self.repeats or [self]]
        judged = [{site: found[site] for site in PREDICTED if site in found} for found in manifests]
        return mean(judged) or {}

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

    def speedup_over(self, runner: str | None) -> stats.Interval | None:
        """From the raw samples, over a dense runner of the same run; None: over the fastest one."""
        runs = []
        for row in self.repeats or [self]:
            latency = row.part("latency")
            samples = latency.get("samples") or {}
            dense, own = samples.get(runner or latency.get("baseline")), samples.get(latency.get("runner"))
            if row.method != "dense" and dense and own:
                runs.append((dense, own))
        return stats.repeated_speedup(runs) if len(runs) > 1 else stats.speedup(*runs[0]) if runs else None

    @property
    def density(self) -> float | None:
        """Realised, of the linear weights in the blocks."""
        return self.part("density").get("model")

    @property
    def ffn(self) -> dict[str, Any]:
        """What is known of the density of the FFNs' units; empty where these are no site."""
        return self.site("ffn")

    def site(self, name: str) -> dict[str, Any]:
        return (self.part("density").get("sites") or {}).get(name) or {}

    @property
    def bytes_share(self) -> float | None:
        """Bytes that a step reads over dense's: of the timed steps where records have them."""
        read = self.part("latency").get("step") or self.decode
        return read["bytes"] / read["bytes_dense"] if read.get("bytes_dense") else None

    @property
    def p99(self) -> float | None:
        """Of the density over tokens, at the site where it is largest."""
        sites = (self.part("density").get("sites") or {}).values()
        return max((site["p99"] for site in sites if site.get("p99") is not None), default=None)

    @cached_property
    def nll(self) -> stats.Interval | None:
        """Mean negative log-likelihood minus dense's [nats/token], paired over windows, weighted by their tokens."""
        parts = [row._part("nll") for row in self.repeats or [self]]
        found = [[part] for part in parts if part and part[2] and len(part[2]) == len(part[0])]
        if len(found) < len(parts):
            return None
        return stats.repeated_difference(found) if self.repeats else stats.difference(*found[0][0])

    @property
    def perplexity_ratio(self) -> stats.Interval | None:
        d = self.nll
        return d and stats.Interval(math.exp(d.estimate), math.exp(d.low), math.exp(d.high))

    @cached_property
    def tasks(self) -> dict[str, stats.Paired]:
        """Differences to dense, paired over the items, on the tasks that both answered; p of single seeds only."""
        found = {}
        for task in self.part("accuracy"):
            parts = [part for row in self.repeats or [self] if (part := row._part(task))]
            if parts and not self.repeats:
                found[task] = stats.compare(*parts[0])
            elif parts and len(parts) == len(self.repeats):
                n = sum(len(candidate) for candidate, _, _ in parts)
                found[task] = stats.Paired(n, stats.repeated_difference([[part] for part in parts]), None)
        return found

    @property
    def task_average(self) -> float | None:
        """Plain mean over the tasks whose score is a share."""
        values = [task["value"] for task in self.part("accuracy").values() if is_share(task)]
        return sum(values) / len(values) if values else None

    @property
    def task_average_difference(self) -> stats.Interval | None:
        """Mean of the tasks' differences to dense. Items of tasks are independent, so their intervals add in
        quadrature; what a seed changes is common to the tasks, so seeds are drawn for all of them together."""
        shares = [task for task in self.tasks if is_share(self.part("accuracy")[task])]
        if not shares:
            return None
        if self.repeats:
            parts = [[row._part(task) for task in shares] for row in self.repeats]
            return stats.repeated_difference([[part for part in own if part] for own in parts])
        deltas = [self.tasks[task].difference for task in shares]
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

    def _part(self, name: str) -> stats.Part | None:
        """Scores, dense's scores and weights; windows weigh as much as they have scored tokens."""
        pair = self._paired(name)
        return pair and (*pair, self.part("items").get("tokens") if name == "nll" else None)

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
    def place(self) -> str:
        """Where it was timed, if it was."""
        records = [*(one.record for row in self.rows for one in row.repeats or [row]), *self.left_out]
        return place(max(records, key=lambda record: record["cell"].get("timed", True)))

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
        return f"{self.where}; {self.details}"

    @property
    def where(self) -> str:
        """What is timed."""
        return f"{self.setting['mode']}, batch {self.setting['batch']}, context {self.setting['context']}"

    @property
    def details(self) -> str:
        s = self.setting
        tasks = f"{s['limit']} items per task" if s["tasks"] else "no tasks"
        text = "" if self.synthetic else f"corpus {s['corpus']}, {tasks}, "
        seeds = sorted({seed for row in self.rows for seed in row.seeds})
        return f"{s['device']}, {s['dtype']}, {text}seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.rows for task in row.part("accuracy")))


def is_share(task: dict[str, Any]) -> bool:
    """Whether a score is a share of items, larger is better: printed in per cent and averaged."""
    value = task.get("value")
    return value is not None and 0 <= value <= 1 and task.get("higher_is_better", True)


def group(records: Iterable[Record]) -> list[Group]:
    """Records by place and setting, by model, mode, batch and context; rows by method, then falling density.

    Cells without latency join the timed ones of their setting, where all these are of one machine.
    """
    alike: dict[str, list[Record]] = {}
    for record in records:
        setting = [record["cell"].get(name) for name in SHARED]
        alike.setdefault(json.dumps([kind(record["machine"]), setting], sort_keys=True), []).append(record)
    found: list[list[Record]] = []
    for members in alike.values():
        by_place: dict[str, list[Record]] = {}
        for record in members:
            by_place.setdefault(place(record), []).append(record)
        of_one = len({place(record) for record in members if record["cell"].get("timed", True)}) <= 1
        found += [members] if of_one else by_place.values()
    return sorted((_group(members) for members in found), key=_setting_order)


def _setting_order(found: Group) -> tuple[Any, ...]:
    """What has an accuracy first, and the mode that is the default."""
    s = found.setting
    return found.synthetic, s["model"], s["mode"] != "decode", s["batch"], s["context"]


def _group(records: list[Record]) -> Group:
    measured = sorted((r for r in records if r["status"] == "ok"), key=lambda r: r["cell"].get("timed", True))
    dense = [r for r in measured if r["cell"]["method"] == "dense"]
    found = Group(
        records[0]["machine"],
        {name: records[0]["cell"].get(name) for name in SHARED},
        sorted(combine(Row(r, _dense_of(r, dense)) for r in measured), key=order),
        [r for r in records if r["status"] != "ok"],
    )
    rank(found)
    return found


def _dense_of(record: Record, dense: Iterable[Record]) -> Record | None:
    """The last dense record of the same seed, weights and text; a folder may hold others than it did."""
    alike = [d for d in dense if d["cell"]["seed"] == record["cell"]["seed"] and same_content(record, d)]
    return alike[-1] if alike else None


def combine(rows: Iterable[Row]) -> list[Row]:
    """Rows of one table with the seeds of a cell joined; of the same cell and seed the last one counts."""
    cells: dict[str, dict[int, Row]] = {}
    for row in rows:
        cell = row.record["cell"]
        cells.setdefault(json.dumps([row.method, cell["options"], row.target]), {})[cell["seed"]] = row
    return [_joined([found[seed] for seed in sorted(found)]) for found in cells.values()]


def _joined(repeats: list[Row]) -> Row:
    repeats = [row for row in repeats if row.dense] or repeats  # a seed without a dense cell tells of no loss
    if len(repeats) == 1:
        return repeats[0]
    dense = [row.dense for row in repeats if row.dense]
    record = mean_record([row.record for row in repeats])
    source = max(repeats, key=lambda row: str(row.record["time"])).source
    found = Row(record, mean_record(dense) if len(dense) == len(repeats) else None, source=source, repeats=repeats)
    if record.get("latency"):  # without samples there is no interval that includes the seed
        ratio = found.speedup_over(None)
        ends = [ratio.low, ratio.high] if ratio else None
        verdict = stats.verdict((ratio.low, ratio.high)) if ratio else None
        record["latency"] |= {"speedup": ratio and ratio.estimate, "ci": ends, "verdict": verdict}
    return found


def order(row: Row) -> tuple[int, str, str, float]:
    """As a table has its rows: dense and null, then by method, options and falling density."""
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
        for number, (row, own) in enumerate(sorted(fit, key=lambda pair: -pair[1].estimate), 1):
            faster = sum(other.low > own.high for _, other in fit)
            slower = sum(other.high < own.low for _, other in fit)
            row.ranks[budget] = Rank(number, 1 + faster, len(fit) - slower)
