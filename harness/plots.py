"""The Pareto figure: accuracy (and, on a GPU, time) over the bytes read per decoded token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import log
from pathlib import Path
from textwrap import wrap
from typing import Any

from .rows import Group, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vPX"
FRONT = "#bbbbbb"

Value = Callable[[Row], "float | None"]


@dataclass(frozen=True)
class Panel:
    """One value over the bytes read. `larger`: whether more of it is better; None where no front is drawn."""

    label: str
    value: Value
    larger: bool | None
    log: bool = False


def _perplexity(row: Row) -> float | None:
    if row.method == "dense":
        return 1.0 if row.part("fidelity").get("perplexity") else None
    return row.perplexity_ratio.estimate if row.perplexity_ratio else None


def _average(row: Row) -> float | None:
    return None if row.task_average is None else 100 * row.task_average


def _milliseconds(row: Row) -> float | None:
    return row.part("latency").get("median")


def _megabytes(row: Row) -> float | None:
    read = row.decode.get("bytes")
    return None if read is None else read / 1e6


def panels(group: Group) -> list[Panel]:
    """What a group can show. Random weights have no accuracy, a CPU has no time worth a plot."""
    wanted = []
    if not group.synthetic:
        wanted.append(Panel("perplexity ÷ dense (log)", _perplexity, larger=False, log=True))
        wanted.append(Panel("task average, %", _average, larger=True))
    if not group.on_cpu:
        wanted.append(Panel("decode, ms/step (median)", _milliseconds, larger=None))
    return [p for p in wanted if any(p.value(row) is not None and not row.is_baseline for row in group.rows)]


def pareto(groups: Iterable[Group], path: Path) -> list[Path]:
    """Writes `path` (.png) and the same figure as .svg, byte for byte the same for the same records.

    One line of panels per table. Returns the files; none when no group has anything to show.
    """
    groups = list(groups)
    shown = [(group, found) for group in groups if (found := panels(group))]
    if not shown:
        return []
    methods = sorted({row.method for group in groups for row in group.rows if not row.is_baseline})
    styles = dict(zip(methods, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "pareto", "font.size": 9}):
        columns = max(len(found) for _, found in shown)
        size = (4.6 * columns + 0.4, 3.9 * len(shown))
        figure, axes = plt.subplots(len(shown), columns, figsize=size, squeeze=False, layout="constrained")
        for line, (group, found) in zip(axes, shown, strict=True):
            for axis, panel in zip(line, found, strict=False):
                _draw(axis, group, panel, styles)
            for axis in line[len(found) :]:
                axis.set_visible(False)
            title = [part for text in (group.title, group.details) for part in wrap(text, 64 * columns)]
            line[0].set_title("\n".join(title), loc="left", fontsize=8.5)
        files = [path, path.with_suffix(".svg")]
        figure.savefig(files[0], dpi=100, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return files


def front(points: Sequence[tuple[float, float]], larger: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: fewer bytes, and a better value."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if larger else p[1])):
        if not best or (y > best[-1][1] if larger else y < best[-1][1]):
            best.append((x, y))
    return best


def _draw(axis: Any, group: Group, panel: Panel, styles: dict[str, tuple[str, str]]) -> None:
    series: dict[tuple[str, str], list[tuple[float, float, Row]]] = {}
    for row in group.rows:
        x, y = _megabytes(row), panel.value(row)
        if x is not None and y is not None:
            series.setdefault((row.method, row.options), []).append((x, y, row))
    if panel.log:
        _log_axis(axis, [y for points in series.values() for _, y, _ in points])
    if panel.larger is not None:
        points = [(x, y) for (method, _), found in series.items() if method != "null" for x, y, _ in found]
        edge = front(points, panel.larger)
        axis.step(*zip(*edge, strict=True), where="post", color=FRONT, linewidth=5, alpha=0.5, label="Pareto front")
    drawn: set[str] = set()
    for (method, options), found in series.items():
        xs, ys = [x for x, _, _ in found], [y for _, y, _ in found]
        if method == "dense":
            axis.plot(xs, ys, "*", color="black", markersize=12, label="dense", zorder=4)
            axis.axhline(ys[0], color="black", linewidth=0.6, linestyle=":", zorder=0)
        elif method == "null":
            axis.plot(xs, ys, "x", color="#777777", markersize=8, label="null", zorder=3)
        else:
            (colour, marker), line = styles[method], ":" if method in drawn else "-"  # other options: dotted
            drawn.add(method)
            label = f"{method} ({options})" if options else method
            axis.plot(xs, ys, marker + line, color=colour, markersize=5, linewidth=1.3, label=label, zorder=3)
            for x, y, row in found:
                text = "" if row.target is None else f"{row.target:g}"
                axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
    axis.set_xlabel("MB read per decoded token")
    axis.set_ylabel(panel.label)
    axis.margins(x=0.12, y=0.14)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2, linewidth=0.5)
    axis.legend(fontsize=7.5, frameon=False)
    if panel.larger is None:
        axis.set_ylim(bottom=0)


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    """A log axis with plain labels at steps that fit its range."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    steps = (1, 0.9, 1000, 100, 10, 2, 5, 1.5, 1.2, 3, 20, 50, 1.1, 1.35, 1.05, 1.02)  # the welcome ones first
    bottom, top = min(values) / 1.02, max(values) * 1.1
    ticks: list[float] = []
    for step in steps:
        if bottom <= step <= top and all(abs(log(step / tick)) > log(top / bottom) / 14 for tick in ticks):
            ticks.append(step)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator(sorted(ticks) or [1]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
