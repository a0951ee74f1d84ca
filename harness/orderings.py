"""Whether the papers' orderings (`orderings.toml`) are seen in a result set, from pairs of its cells."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from methods.errors import UsageError
from methods.registry import create

from . import stats
from .formats import ends, github
from .rows import Group, Row

DATA = Path(__file__).with_name("orderings.toml")
VERDICTS = ("seen", "open", "reversed")
DENSITIES = {"density": "ffn", "density of heads": "heads"}  # the site whose realised density is held equal
MORE, LESS = 0.01, 0.05  # which the better cell may have more, or less, of what should be equal
# Options that say how a cell reaches its density, or when to stop trying: they may differ within a pair.
SEARCH = frozenset(("tolerance", "trials", "scope", "eta"))

HOW_TO_READ = f"""\
Pairs of cells of one table, the first with not more than {MORE:g} more and {LESS:g} less than the second of what the
ordering holds equal: realised density of the FFNs or of the heads, or executed FLOPs of a token as a share of dense.
Difference of the mean negative log-likelihood, nats/token, paired over windows, with its 95 % interval; below zero the
ordering holds.
A pair is **seen** where the whole interval is below zero, **reversed** where all of it is above, else **open**;
**mixed**: pairs differ; **not measured**: there is none. LTE and D2DMoE fine-tune the model, MoEfication trains routers
alone: on a gated model it is the one whose activation fine-tuning replaced by ReLU, on a ReLU model the weights as they
were."""


@dataclass(frozen=True)
class Ordering:
    """An entry of `orderings.toml`, which says what each field means."""

    ordering: str
    source: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    equal: str

    def amount(self, row: Row) -> float | None:
        """What the cells of a pair should have equally much of, as a share of dense."""
        if self.equal in DENSITIES:
            return row.site(DENSITIES[self.equal]).get("mean")
        executed, dense = row.decode.get("flops"), row.decode.get("flops_dense")
        return executed / dense if executed and dense else None


@dataclass(frozen=True)
class Pair:
    """Two cells that an ordering can be told from."""

    better: Row
    worse: Row

    @cached_property
    def difference(self) -> stats.Interval:
        """Mean negative log-likelihood, the better cell's minus the worse one's [nats/token], paired over windows of
        the seeds that both have."""
        one, other = _items(self.better), _items(self.worse)
        parts = [(one[seed]["nll"], other[seed]["nll"], one[seed]["tokens"]) for seed in one if seed in other]
        return stats.difference(*parts[0]) if len(parts) == 1 else stats.repeated_difference([[p] for p in parts])

    @property
    def verdict(self) -> str:
        return "seen" if self.difference.high < 0 else "reversed" if self.difference.low > 0 else "open"


def load(path: Path = DATA) -> list[Ordering]:
    return [Ordering(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["ordering"]]


def pairs(ordering: Ordering, rows: Sequence[Row]) -> list[Pair]:
    """Each cell that should be better, with the worse one that is nearest in what should be equal, if one is near."""
    found = []
    for row in rows:
        amount = ordering.amount(row)
        if amount is None or not _is(row, ordering.better):
            continue
        others = [
            (abs(other_amount - amount), other)
            for other in rows
            if _is(other, ordering.worse)
            and _alike(row, other, ordering)
            and (other_amount := ordering.amount(other)) is not None
            and amount - MORE <= other_amount <= amount + LESS
        ]
        if others:
            found.append(Pair(row, min(others, key=lambda pair: pair[0])[1]))
    return found


def sections(groups: Sequence[Group]) -> list[str]:
    """Markdown: a table per model and mode with at least one pair; nothing if there is none."""
    orderings, parts, done = load(), [], set()
    for group in groups:
        # Quality does not depend on batch and context: the first of these tables stands for all.
        setting = {name: value for name, value in group.setting.items() if name not in ("batch", "context")}
        key = json.dumps([group.place, setting], sort_keys=True)
        measured = [] if key in done or group.synthetic else [(o, pairs(o, group.rows)) for o in orderings]
        done.add(key)
        if any(found for _, found in measured):
            titles = [
                "better, says the paper",
                "source",
                "at equal",
                "Δ nats/token [95 %] at target density",
                "verdict",
            ]
            s = group.setting
            told = [_line(ordering, found) for ordering, found in measured if found]
            parts += [f"### {s['model']}, {s['mode']}", github(titles, told)]
            untold = "; ".join(ordering.ordering for ordering, found in measured if not found)
            parts += [f"**Not measured** here: {untold}."] if untold else []
    return ["## The papers' orderings", HOW_TO_READ, *parts] if parts else []


def _line(ordering: Ordering, found: list[Pair]) -> list[str]:
    texts = []
    for pair in found:
        d = pair.difference
        told = "" if pair.verdict == "seen" else f" {pair.verdict}"
        texts.append(f"{_name(pair, ordering)}: {d.estimate:+.3f}{ends(d, '+.3f')}{told}")
    counts = {name: n for name in VERDICTS if (n := sum(pair.verdict == name for pair in found))}
    mixed = "**mixed**: " + ", ".join(f"{n} {name}" for name, n in counts.items())
    verdict = mixed if len(counts) > 1 else f"**{next(iter(counts))}** ({len(found)} of {len(found)})"
    return [ordering.ordering, ordering.source, ordering.equal, "; ".join(texts), verdict]


def _name(pair: Pair, ordering: Ordering) -> str:
    """The target density, and what somebody set beside the options that the ordering is about."""
    given = {**pair.worse.record["cell"]["options"], **pair.better.record["cell"]["options"]}
    silent = {*ordering.better, *ordering.worse, "tolerance", "trials"}
    texts = [f"{name}={value}" for name, value in given.items() if name not in silent]
    return f"{pair.better.target:g}" + (f" ({', '.join(texts)})" if texts else "")


@cache
def _defaults(method: str) -> dict[str, Any]:
    try:
        return asdict(create(method, {}).options)
    except UsageError:  # a method of a package that is not installed here
        return {}


def _options(row: Row) -> dict[str, Any]:
    """All of them, defaults included, as of options younger than the record; the variant as what `auto` chose."""
    artifact, cell = row.part("artifact"), row.record["cell"]
    chosen = {name: value for name, value in (artifact.get("manifest") or {}).items() if name == "variant"}
    return {**_defaults(cell["method"]), **(artifact.get("options") or cell["options"]), **chosen}


def _items(row: Row) -> dict[int, dict[str, Any]]:
    """The scores of single windows, by seed."""
    found = {one.record["cell"]["seed"]: one.part("items") for one in row.repeats or [row]}
    return {seed: items for seed, items in found.items() if items.get("nll")}


def _is(row: Row, wanted: Mapping[str, Any]) -> bool:
    """Whether this is a cell of the wanted kind that has scores and a target density to be named by.

    A control is no cell of its method, unless it is what is wanted.
    """
    options = {"method": row.method, **_options(row)}
    scored = row.target is not None and bool(_items(row))
    meant = not row.control or "selector" in wanted
    allowed = {name: value if isinstance(value, list) else [value] for name, value in wanted.items()}
    return scored and meant and all(options.get(name) in values for name, values in allowed.items())


def _alike(one: Row, other: Row, ordering: Ordering) -> bool:
    """With a seed in common, evaluated on the same windows; of two cells of one method, no option differs that the
    ordering does not name.

    Of two methods, the size of experts alone.
    """
    a, b = _options(one), _options(other)
    free = SEARCH | set(ordering.better) | set(ordering.worse)
    names = (set(a) | set(b)) - free if one.method == other.method else {"expert_size"}
    first, second = _items(one), _items(other)
    common = [seed for seed in first if seed in second]
    same_text = all(first[seed].get("tokens") == second[seed].get("tokens") for seed in common)
    return bool(common) and same_text and all(a.get(name) == b.get(name) for name in names)
