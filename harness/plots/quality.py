"""Accuracy over the bytes read of all methods, and over density of one method's variants and controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from ..rows import Group, Row
from .style import FRONT, NULL, first_word, fullest, legend, plain, styles, titled, variant

DENSITY = "realised density of the blocks' linear weights"
OTHERS = ", other options"

Value = Callable[[Row], "float | None"]


def _megabytes(row: Row) -> float | None:
    read = row.decode.get("bytes")
    return None if read is None else read / 1e6


@dataclass(frozen=True)
class Panel:
    """One value over the bytes read, or over another `x`. `larger`: whether more of it is better."""

    label: str
    value: Value
    larger: bool
    log: bool = False
    x: Value = _megabytes
    x_label: str = "MB read per decoded token"


def _perplexity(row: Row) -> float | None:
    if row.method == "dense":
        return 1.0 if row.part("fidelity").get("perplexity") else None
    return row.perplexity_ratio.estimate if row.perplexity_ratio else None


def _average(row: Row) -> float | None:
    return None if row.task_average is None else 100 * row.task_average


def panels(group: Group) -> list[Panel]:
    """What a group can show: random weights have no accuracy."""
    wanted = [Panel("perplexity ÷ dense (log)", _perplexity, False, log=True), Panel("task average, %", _average, True)]
    return [
        p
        for p in wanted
        if not group.synthetic and any(p.value(row) is not None and not row.is_baseline for row in group.rows)
    ]


def with_curves(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """Tables and their methods, where there are two methods or controls with three densities each."""
    found = []
    for group in groups:
        rows = [row for row in group.rows if row.density is not None and _perplexity(row) is not None]
        series = Counter((row.method, row.options) for row in rows if not row.is_baseline)
        curves = [name for (name, _), n in series.items() if n >= 3]
        if len(curves) >= 2:
            found += [(group, name) for name in dict.fromkeys(curves)]
    return found


def _density(row: Row) -> float:
    return 1.0 if row.density is None else row.density


def with_panels(groups: Sequence[Group]) -> list[tuple[Group, list[Panel]]]:
    return [(group, found) for group in groups if (found := panels(group))]


def pareto(parts: list[tuple[Group, list[Panel]]]) -> Any:
    """A table's panels side by side, without controls, and a line per method and options; where variants are many, one
    per method, and of its other options marks where they are better."""
    from matplotlib import pyplot as plt

    columns = max(len(found) for _, found in parts)
    size = (4.6 * columns + 2.2, 3.9 * len(parts))
    figure, axes = plt.subplots(len(parts), columns, figsize=size, squeeze=False, layout="constrained")
    tables = [[row for row in group.rows if not row.control] for group, _ in parts]
    names = [_names(rows) for rows in tables]
    named_rows = [(name, row) for rows, name in zip(tables, names, strict=True) for row in rows]
    everywhere = styles({name(row).removesuffix(OTHERS) for name, row in named_rows if not row.is_baseline}, first_word)
    for line, (group, found), rows, name in zip(axes, parts, tables, names, strict=True):
        for axis, panel in zip(line, found, strict=False):
            _draw(axis, _shown(rows, panel, name), panel, name, rows, everywhere)
        for axis in line[len(found) :]:
            axis.set_visible(False)
        legend(line[len(found) - 1], line)
        titled(line[0], 42 * len(found), group.title, group.details)
    return figure


def curves(parts: list[tuple[Group, str]]) -> Any:
    """A panel per table and method: its variants and controls, over the front of all methods, beside what skips
    nothing: dense, and dense fine-tuned on the same text, which is the fair baseline of what is fine-tuned."""
    from matplotlib import pyplot as plt

    columns = min(2, len(parts))
    lines = -(-len(parts) // columns)
    panel = Panel("perplexity ÷ dense (log)", _perplexity, larger=False, log=True, x=_density, x_label=DENSITY)
    size = (6.6 * columns, 3.7 * lines)  # a third of it for the legend
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis, (group, name) in zip(axes.flat, parts, strict=False):
        own = [row for row in group.rows if row.method == name or row.density is None]
        _draw(axis, own, panel, _within, group.rows, styles({_within(row) for row in own if not row.is_baseline}))
        legend(axis, [axis], size=7)
        titled(axis, 100, f"{name}: {group.setting['model']}, {group.setting['mode']}")
    return figure


def _within(row: Row) -> str:
    """In a panel of one method."""
    return row.method if row.density is None else row.options or row.method


def front(points: Sequence[tuple[float, float]], larger: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: fewer bytes, and a better value."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if larger else p[1])):
        if not best or (y > best[-1][1] if larger else y < best[-1][1]):
            best.append((x, y))
    return best


def _points(rows: Sequence[Row], panel: Panel) -> list[tuple[float, float, Row]]:
    return [(x, y, row) for row in rows if (x := panel.x(row)) is not None and (y := panel.value(row)) is not None]


def _edge(rows: Sequence[Row], panel: Panel) -> list[tuple[float, float]]:
    """The front of what is a method, or dense."""
    able = [row for row in rows if row.method != "null" and not row.control]
    return front([(x, y) for x, y, _ in _points(able, panel)], panel.larger)


def _names(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What a row's line is called: the variant, or that of its method which stands for the others."""
    main = fullest(rows)
    return lambda row: variant(row) if main.get(row.method, variant(row)) == variant(row) else main[row.method] + OTHERS


def _shown(rows: Sequence[Row], panel: Panel, name: Callable[[Row], str]) -> list[Row]:
    """All but the other options that are not on their own method's front."""
    edges = {m: _edge([row for row in rows if row.method == m], panel) for m in {row.method for row in rows}}
    points = _points(rows, panel)
    return [row for x, y, row in points if not name(row).endswith(OTHERS) or (x, y) in edges[row.method]]


def _draw(
    axis: Any,
    rows: Sequence[Row],
    panel: Panel,
    name: Callable[[Row], str],
    behind: Sequence[Row],
    looks: dict[str, tuple[str, str]],
) -> None:
    """A line for the rows of each name, and the front of the rows behind."""
    series: dict[str, list[tuple[float, float, Row]]] = {}
    for point in _points(rows, panel):
        series.setdefault(name(point[2]), []).append(point)
    steps = _edge(behind, panel)
    axis.step(*zip(*steps, strict=True), where="post", color=FRONT, linewidth=5, alpha=0.5, label="Pareto front")
    if any(label.endswith(OTHERS) for label in series):
        axis.plot([], [], "o", color=NULL, markerfacecolor="none", markersize=4, label=OTHERS[2:])
    for label, found in series.items():
        xs, ys = [x for x, _, _ in found], [y for _, y, _ in found]
        if label == "dense":
            axis.plot(xs, ys, "*", color="black", markersize=12, label=label, zorder=4)
            axis.axhline(ys[0], color="black", linewidth=0.6, linestyle=":", zorder=0)
        elif label == "null":
            axis.plot(xs, ys, "x", color=NULL, markersize=8, label=label, zorder=3)
        elif label.endswith(OTHERS):
            colour, marker = looks[label.removesuffix(OTHERS)]
            axis.plot(xs, ys, marker, color=colour, markerfacecolor="none", markersize=4, zorder=2)
        else:
            colour, marker = looks[label]
            line = "--" if found[0][2].control else "-"
            axis.plot(xs, ys, marker + line, color=colour, markersize=5, linewidth=1.3, label=label, zorder=3)
            if found[0][2].density is None:
                axis.axhline(ys[0], color=colour, linewidth=1, linestyle="--", zorder=0)
            for x, y, row in found:
                text = "" if row.target is None else f"{row.target:g}"
                axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.label)
    axis.margins(x=0.12, y=0.14)
    plain(axis)
    if panel.log:
        _log_axis(axis, [y for found in series.values() for _, y, _ in found])


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
    room = max((top / bottom) ** 0.14, 1.02)  # the front of others may reach further than what the panel is about
    axis.set_ylim(bottom / room, top * room)
    axis.yaxis.set_major_locator(FixedLocator(sorted(ticks) or [1]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
