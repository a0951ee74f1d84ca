"""Columns of the leaderboard, each said once: for the page in full, for the terminal in short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .doubts import MISSED
from .formats import NONE, count, ends, github, interval, number, percent
from .grids import Grid
from .rows import BUDGETS, PREDICTED, Group, Row, is_share

SITE_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "ffn")

PREDICTOR_MEASURES = ("recall", "recall"), ("precision", "precision"), ("predicted density", "predicted")

Text = Callable[[Row], str]


@dataclass(frozen=True)
class Column:
    """`title` and `text` on the page; in the terminal `short` (None: left out) and `brief` (default: `text`)."""

    title: str
    text: Text
    short: str | None = None
    brief: Text | None = None


def name_columns(group: Group) -> list[Column]:
    """Who a row is about; without a column of options where nobody set any."""
    options = [Column("options", lambda r: r.options or NONE, "options")] if any(r.options for r in group.rows) else []
    seeds = [Column("seeds", lambda r: str(len(r.seeds)), "seeds")] if any(r.repeats for r in group.rows) else []
    return [
        Column("method", lambda r: r.method, "method", lambda r: r.label),
        *options,
        Column("target density", lambda r: NONE if r.target is None else f"{r.target:g}"),
        *seeds,
    ]


def cost_columns(group: Group) -> list[Column]:
    """Density, FLOPs, bytes, time and preparation. On a CPU the time is headed as what it is, and not compared."""
    columns = [
        *name_columns(group),
        Column("realised density", _density, "density", lambda r: number(r.density)),
        Column("density p99, densest site", lambda r: number(r.p99)),
    ]
    if any(row.part("density").get("union") is not None for row in group.rows):
        columns.append(Column("density, union over batch", lambda r: number(r.part("density").get("union")), "union"))
    columns += [
        Column("executed GFLOP/token (÷ dense)", _of_dense("flops", 1e9), "GFLOP/token\n(÷ dense)"),
        Column("prefill FLOPs ÷ dense", _prefill),
        Column("read MB/token (÷ dense)", _of_dense("bytes", 1e6), "MB/token\n(÷ dense)"),
    ]
    if group.on_cpu:
        title = "CPU reference path, not ranked: ms/step, median [p10, p90]"
        columns.append(Column(title, _time, "CPU reference path,\nnot ranked: ms/step"))
    else:
        columns += [
            Column("ms/step, median [p10, p90]", _time, "ms/step\n[p10, p90]"),
            Column("speed-up over fastest dense [95 %]", _speedup(3), "speed-up\n[95 %]", _speedup(2)),
            Column(
                "verdict",
                lambda r: NONE if r.method == "dense" else r.part("latency").get("verdict") or NONE,
                "verdict",
            ),
            *(_beside(name) for name in quantised_names(group)),
            Column("share of byte limit", lambda r: percent(r.part("latency").get("fraction_of_limit"))),
        ]
        if not group.synthetic:
            columns[:0] = rank_columns()
    return [
        *columns,
        Column("preparation, s", lambda r: number(r.part("prepare").get("seconds")), "prep. s"),
        Column("preparation, tokens", lambda r: count(r.part("prepare").get("tokens"))),
    ]


def prompt_columns(group: Group) -> list[Column]:
    """Prefill, memory and energy, as far as anything of them was measured; none where no prompt was."""
    columns = [
        Column("prefill, ms [p10, p90]", lambda r: _spread(r.prompt.get("prefill"))),
        Column("÷ dense prompt", lambda r: _over(r.prompts.get("method"), r.prompts.get("dense"))),
        Column("single storage ÷ own weights", lambda r: _over(r.prompts.get("single storage"), r.prompt)),
        Column("first token, ms", lambda r: number((r.prompt.get("first_token") or {}).get("median"))),
        Column("memory alone, GiB", _memory("alone")),
        Column("reserved, GiB", _memory("reserved")),
        Column("process, GiB", _memory("process")),
        Column("decode, J/token", lambda r: number((r.part("latency").get("energy") or {}).get("joules_per_token"))),
        Column("÷ fastest dense", _energy_ratio),
        Column("mean W", lambda r: number((r.part("latency").get("energy") or {}).get("watts"))),
    ]
    if not any(row.prompt for row in group.rows):
        return []
    told = [column for column in columns if any(column.text(row) != NONE for row in group.rows)]
    return [*name_columns(group), *told]


def rank_columns() -> list[Column]:
    """A place within each budget, with the places that its interval allows; in the terminal within the widest."""

    def column(budget: float) -> Column:
        return Column(
            f"rank within {budget:g} %", lambda r: ranked(r, budget), "rank" if budget == BUDGETS[-1] else None
        )

    return [column(budget) for budget in BUDGETS]


def breakdown_columns(group: Group) -> list[Column]:
    """Milliseconds of a decode step by class of kernel; none where no step was traced."""

    def column(kind: str) -> Column:
        return Column(kind, lambda r: number(r.breakdown.get(kind)))

    kinds = list(dict.fromkeys(kind for row in group.rows for kind in row.breakdown))
    kernels = Column("kernels/step", lambda r: str((r.part("latency").get("breakdown") or {}).get("kernels", NONE)))
    return [*name_columns(group), *map(column, kinds), kernels] if kinds else []


def quality_columns(group: Group) -> list[Column]:
    """Perplexity, divergence and tasks, each with its paired difference to dense."""
    return [*name_columns(group), *fidelity_columns(), *(task_column(name, group) for name in group.task_names)]


def fidelity_columns() -> list[Column]:
    """How far a cell is from dense."""
    return [
        Column("accuracy lost, %", _loss, "lost %", lambda r: budget(r) if r.loss else NONE),
        Column("perplexity", lambda r: number(r.part("fidelity").get("perplexity"), 4), "perplexity"),
        Column("perplexity ÷ dense [95 %]", lambda r: interval(r.perplexity_ratio), "÷ dense [95 %]"),
        Column("bits/byte", lambda r: number(r.part("fidelity").get("bits_per_byte"))),
        Column("KL to dense, nats/token", lambda r: number(r.part("fidelity").get("kl"), 2), "KL, nats"),
        Column("greedy agreement", lambda r: percent(r.part("fidelity").get("greedy_agreement")), "agreement"),
    ]


def readme_columns(group: Group) -> list[Column]:
    """The few columns of the short table: density, cost, time, and how far the model strays from dense."""
    columns = [
        *name_columns(group),
        Column("model density", _density),
        Column("GFLOP/token", lambda r: _per(r.decode.get("flops"), 1e9)),
        Column("MB/token", lambda r: _per(r.decode.get("bytes"), 1e6)),
        Column("ms/step, CPU reference path" if group.on_cpu else "ms/step (speed-up, verdict)", _brief_time(group)),
    ]
    if group.synthetic:
        return columns
    return [
        *columns,
        Column("perplexity", lambda r: number(r.part("fidelity").get("perplexity"), 4)),
        Column("KL, nats/token", lambda r: number(r.part("fidelity").get("kl"), 2)),
        Column("greedy agreement", lambda r: percent(r.part("fidelity").get("greedy_agreement"))),
        Column(f"tasks, average of {len(group.task_names)}", lambda r: percent(r.task_average)),
    ]


def task_column(name: str, group: Group) -> Column:
    """Score and difference to dense of one task: in per cent and points where the score is a share."""
    facts = next(row.part("accuracy")[name] for row in group.rows if name in row.part("accuracy"))
    share = is_share(facts)
    scale = 100 if share else 1
    title = f"{name}, {facts['metric']}{' %' if share else ''}"
    title += f" (chance {percent(facts['chance'])})" if facts.get("chance") else ""
    title += "" if facts.get("higher_is_better", True) else " (lower is better)"

    def value(row: Row) -> str:
        found = row.part("accuracy").get(name) or {}
        return NONE if found.get("value") is None else f"{found['value'] * scale:.1f}"

    def text(row: Row) -> str:
        if name not in row.tasks:
            return value(row)
        pair = row.tasks[name]
        points = pair.difference.scaled(scale)
        p = "" if pair.p is None else f", p {pair.p:.2g}"
        return f"{value(row)}; {points.estimate:+.1f}{ends(points, '+.1f')}{p}"

    def brief(row: Row) -> str:
        return f"{value(row)} ({row.tasks[name].difference.estimate * scale:+.1f})" if name in row.tasks else value(row)

    unit = "points" if share else "difference"
    return Column(f"{title}; {unit} to dense [95 %], McNemar p", text, f"{name.replace('_', ' ')}\n(Δ {unit})", brief)


def site_columns(group: Group) -> list[Column]:
    """Mean (p99) density of every site that some row skips at."""
    names = {site for row in group.rows for site in row.part("density").get("sites") or {}}
    ordered = sorted(names, key=lambda n: (SITE_ORDER.index(n) if n in SITE_ORDER else len(SITE_ORDER), n))

    def column(name: str) -> Column:
        def text(row: Row) -> str:
            site = (row.part("density").get("sites") or {}).get(name)
            return f"{number(site['mean'])} ({number(site.get('p99'))})" if site else NONE

        return Column(name, text)

    return [*name_columns(group), *map(column, ordered)] if ordered else []


def predictor_columns(group: Group) -> list[Column]:
    """How good predictors are, block by block; none where no row has any."""

    def column(site: str, title: str, name: str) -> Column:
        def text(row: Row) -> str:
            return " ".join(number(found[name], 2) for found in row.predictors.get(site, {}).values()) or NONE

        return Column(f"{site}: {title}", text)

    def blocks(row: Row) -> str:
        return ", ".join(f"{site} {span(list(map(int, found)))}" for site, found in row.predictors.items())

    def span(found: list[int]) -> str:
        return f"{found[0]}–{found[-1]}" if found == list(range(found[0], found[-1] + 1)) else " ".join(map(str, found))

    sites = [site for site in PREDICTED if any(site in row.predictors for row in group.rows)]
    judged = [column(site, *measure) for site in sites for measure in PREDICTOR_MEASURES]
    return [*name_columns(group), Column("blocks", blocks), *judged] if judged else []


def predictor_means() -> Column:
    """How good predictors are, in a line: means over blocks."""

    def text(row: Row) -> str:
        parts = []
        for site, found in row.predictors.items():
            means = (sum(one[name] for one in found.values()) / len(found) for _, name in PREDICTOR_MEASURES)
            parts.append(f"{site} {' / '.join(number(mean, 2) for mean in means)}")
        return ", ".join(parts) or NONE

    return Column(f"predictors: {' / '.join(title for title, _ in PREDICTOR_MEASURES)}", text)


def markdown(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """A GitHub table."""
    body = [[column.text(row) for column in columns] for row in rows]
    return github([column.title for column in columns], body)


def grid_table(grid: Grid) -> str:
    """Speed-up and verdict of every method, by batch and context."""
    places = sorted({p for found in grid.speedups.values() for p in found}, key=lambda place: place[::-1])
    titles = ["method", *(f"batch {batch}, context {context}" for batch, context in places)]
    body = []
    for name, found in grid.speedups.items():
        body.append([name, *(f"{found[p][0]:.2f} {found[p][1]}" if p in found else NONE for p in places)])
    return github(titles, body)


def terminal(columns: Sequence[Column], rows: Iterable[Row]) -> Any:
    """A rich table of the columns that have a short title."""
    from rich import box
    from rich.table import Table

    shown = [column for column in columns if column.short]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(column.short or "", overflow="fold")
    for row in rows:
        table.add_row(*((column.brief or column.text)(row) for column in shown), style="dim" if row.is_baseline else "")
    return table


def dense_baselines(group: Group) -> str:
    """The dense runners of the same run, ms/step: the fastest is what speed-ups refer to; 8-bit ones stand beside."""
    latency: dict[str, Any] = next((r.part("latency") for r in group.rows if r.part("latency").get("dense")), {})
    baseline = latency.get("baseline")
    texts = []
    quantised = latency.get("quantised") or {}
    for name, runner in ((latency.get("dense") or {}) | quantised).items():
        if runner and runner.get("median") is not None:
            share = runner.get("fraction_of_limit")
            remarks = ["the fastest"] if name == baseline else []
            remarks += ["weights in 8 bits, in no speed-up"] if name in quantised else []
            remarks += [] if share is None else [f"{percent(share)} of the byte limit"]
            texts.append(f"{name} {number(runner['median'])}" + (f" ({', '.join(remarks)})" if remarks else ""))
    return ", ".join(texts)


def budget(row: Row) -> str:
    """The budget that holds a cell's loss; a question mark where only the estimate, not its interval, is inside."""
    if row.is_baseline or row.loss is None:
        return NONE
    estimate, high = row.loss
    for limit in BUDGETS:
        if estimate <= limit:
            return f"≤ {limit:g} %{'' if high <= limit else ' ?'}"
    return f"> {BUDGETS[-1]:g} %"


def ranked(row: Row, budget: float) -> str:
    found = row.ranks.get(budget)
    if found is None:
        return NONE
    return str(found.place) if found.best == found.worst else f"{found.place} ({found.best}–{found.worst})"


def _density(row: Row) -> str:
    """Of the evaluated text, and of the timed steps where that is another; with a batch, theirs is the union's."""
    timed, of_text = (row.part("latency").get("step") or {}).get("density"), row.density
    if timed is None or of_text is None or row.part("density").get("union") is not None:
        return number(of_text)
    return number(of_text) + (f"; timed {number(timed)}" if abs(timed - of_text) > MISSED else "")


def _per(value: float | None, unit: float) -> str:
    return NONE if value is None else number(value / unit)


def _brief_time(group: Group) -> Text:
    def text(row: Row) -> str:
        latency = row.part("latency")
        time = number(latency.get("median"))
        if group.on_cpu or row.method == "dense" or latency.get("speedup") is None:
            return time
        return f"{time} ({latency['speedup']:.2f}, {latency.get('verdict')})"

    return text


def _of_dense(name: str, unit: float) -> Text:
    def text(row: Row) -> str:
        value, dense = row.decode.get(name), row.decode.get(f"{name}_dense")
        if value is None:
            return NONE
        return f"{number(value / unit)} ({value / dense:.3f})" if dense else number(value / unit)

    return text


def _prefill(row: Row) -> str:
    prefill = row.part("cost").get("prefill") or {}
    return f"{prefill['flops'] / prefill['flops_dense']:.3f}" if prefill.get("flops_dense") else NONE


def _time(row: Row) -> str:
    return _spread(row.part("latency"))


def _spread(times: dict[str, Any] | None) -> str:
    if not times or times.get("median") is None:
        return NONE
    return f"{number(times['median'])} [{number(times.get('p10'))}, {number(times.get('p90'))}]"


def _over(way: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Of median prefill times."""
    return f"{way['prefill']['median'] / other['prefill']['median']:.3f}" if way and other else NONE


def _memory(name: str) -> Text:
    def text(row: Row) -> str:
        found = (row.part("latency").get("memory") or {}).get(name)
        return NONE if found is None else number(found / 2**30)

    return text


def _energy_ratio(row: Row) -> str:
    latency = row.part("latency")
    own, dense = latency.get("energy"), (latency.get("dense") or {}).get(latency.get("baseline"), {}).get("energy")
    return f"{own['joules_per_token'] / dense['joules_per_token']:.3f}" if own and dense else NONE


def _speedup(digits: int) -> Text:
    def text(row: Row) -> str:
        latency = row.part("latency")
        if latency.get("speedup") is None or row.method == "dense":
            return NONE
        ends = ", ".join(f"{end:.{digits}f}" for end in latency["ci"])
        return f"{latency['speedup']:.{digits}f} [{ends}]"

    return text


def quantised_names(group: Group) -> list[str]:
    return list(dict.fromkeys(name for row in group.rows for name in row.part("latency").get("quantised") or ()))


def _beside(name: str) -> Column:
    def text(row: Row) -> str:
        found = (row.part("latency").get("quantised") or {}).get(name) or {}
        if found.get("speedup") is None or row.method == "dense":
            return NONE
        return f"{found['speedup']:.3f} [{', '.join(f'{end:.3f}' for end in found['ci'])}]"

    return Column(f"beside it: over {name} [95 %]", text)


def _loss(row: Row) -> str:
    return NONE if row.is_baseline or row.loss is None else f"{row.loss[0]:.2f} ({budget(row)})"
