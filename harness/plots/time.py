"""Times of decode steps, as shares of the fastest dense step of the same run: so cells of several runs and machines of
a kind can stand in one panel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from ..grids import Grid
from ..machine import kind
from ..rows import LORA, Group, Row, order
from .style import COLOURS, FRONT, MARKERS, NULL, first_word, fullest, legend, plain, styles, titled, variant


@dataclass(frozen=True)
class Setting:
    """The timed cells of a model at a batch and a context, on machines of a kind; of each cell the newest."""

    title: str
    where: str
    rows: list[Row]


def settings(groups: Sequence[Group]) -> list[Setting]:
    """Those in which a method was timed on a GPU, by model, mode, batch and context."""
    alike: dict[tuple[Any, ...], list[Group]] = defaultdict(list)
    for group in groups:
        if not group.on_cpu:
            s = group.setting
            alike[s["model"], s["weights"], s["mode"], s["batch"], s["context"], kind(group.machine)].append(group)
    found = []
    for key in sorted(alike):
        newest: dict[str, Row] = {}
        for row in sorted((row for group in alike[key] for row in group.rows), key=lambda r: str(r.record["time"])):
            if share_of_dense(row) is not None and not row.control:
                newest[row.name] = row
        if any(not row.is_baseline for row in newest.values()):
            title = f"{key[0]} ({key[1]} weights)"
            found.append(Setting(title, alike[key][0].where, sorted(newest.values(), key=order)))
    return found


def share_of_dense(row: Row) -> float | None:
    """A step's time over that of the fastest dense runner in the same run."""
    if row.method == "dense":
        return 1.0 if row.part("latency").get("median") else None
    return 1 / row.speedup.estimate if row.speedup else None


def over_bytes(parts: list[Setting]) -> Any:
    """A panel per setting: time over bytes, both ÷ dense. On the diagonal a step takes as much less time as it reads
    less. Where variants are many, one stands for its method."""
    from matplotlib import pyplot as plt

    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    size = (5.0 * columns, 3.6 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    everywhere = styles({variant(row) for part in parts for row in part.rows if not row.is_baseline}, first_word)
    for axis, part in zip(axes.flat, parts, strict=False):
        points = [(share, y, row) for row in part.rows if (share := row.bytes_share) and (y := share_of_dense(row))]
        main = fullest([row for *_, row in points])
        points = [point for point in points if main.get(point[2].method, variant(point[2])) == variant(point[2])]
        axis.axline((0, 0), (1, 1), color=FRONT, linewidth=1.5, label="as the bytes")
        axis.axhline(1, color="black", linewidth=0.6, linestyle=":", zorder=0)
        for name in dict.fromkeys(variant(row) for *_, row in points):
            own = [point for point in points if variant(point[2]) == name]
            xs, ys = [x for x, _, _ in own], [y for _, y, _ in own]
            if name in everywhere:
                colour, marker = everywhere[name]
                axis.plot(xs, ys, marker + "-", color=colour, markersize=5, linewidth=1.3, label=name)
                for x, y, row in own:
                    text = "" if row.target is None else f"{row.target:g}"
                    axis.annotate(text, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
            elif name == "dense":
                axis.plot(xs, ys, "*", color="black", markersize=12, label=name, zorder=4)
            else:
                axis.plot(xs, ys, "x", color=NULL, markersize=8, label=name)
        axis.set_xlim(0, 1.1)
        axis.set_ylim(0, 1.12 * max(y for _, y, _ in points))
        axis.set_xlabel("bytes read per step ÷ dense")
        axis.set_ylabel("decode step ÷ fastest dense")
        plain(axis)
        titled(axis, 48, part.title, part.where)
        legend(axis, [axis])
    return figure


def traced(groups: Sequence[Group]) -> list[Setting]:
    """The settings with a trace of a step, and their traced rows."""
    found = ((part, [row for row in part.rows if row.breakdown]) for part in settings(groups))
    return [Setting(part.title, part.where, rows) for part, rows in found if rows]


def bars(parts: list[Setting]) -> Any:
    """A panel per setting, of a stacked bar per method, by class of kernel, in units of the dense step."""
    from matplotlib import pyplot as plt

    columns = min(2, len(parts))
    lines = [parts[i : i + columns] for i in range(0, len(parts), columns)]
    most = [max(len(part.rows) for part in line) for line in lines]
    heights = [0.9 + 0.2 * n for n in most]
    size = (7.0 * columns + 1.2, sum(heights) + 0.3)
    grid: dict[str, Any] = dict(figsize=size, squeeze=False, layout="constrained", height_ratios=heights)
    figure, axes = plt.subplots(len(lines), columns, **grid)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for part, axis in zip(parts, axes.flat, strict=False):
        dense = [row.part("latency")["median"] / (share_of_dense(row) or 1) for row in part.rows]
        left = [0.0] * len(part.rows)
        for name, colour in zip(part.rows[0].breakdown, cycle((*COLOURS[:6], FRONT)), strict=False):
            widths = [row.breakdown.get(name, 0.0) / ms for row, ms in zip(part.rows, dense, strict=True)]
            axis.barh(range(len(widths)), widths, left=left, color=colour, label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.axvline(1, color="black", linewidth=0.6, linestyle=":")
        axis.set_yticks(range(len(part.rows)), [row.name for row in part.rows])
        axis.set_xlabel("decode step ÷ fastest dense")
        axis.spines[["top", "right"]].set_visible(False)
        titled(axis, 100, f"{part.title}, {part.where}")
    for line, beside, n in zip(lines, axes, most, strict=True):
        legend(beside[len(line) - 1], beside[:1])  # at every height of a tall picture
        plt.setp(beside, ylim=(n - 0.4, -0.6))  # from the top, bars of one height
    return figure


def over_batch(found: list[Grid]) -> Any:
    """Speed-up over the batch, a panel per context and a line per method."""
    from matplotlib import pyplot as plt

    columns = max(len(grid.contexts) for grid in found)
    size = (4.2 * columns + 1.6, 3.6 * len(found))
    figure, axes = plt.subplots(len(found), columns, figsize=size, squeeze=False, sharey="row", layout="constrained")
    # A colour for a method, in all panels, and a marker for each of its densities.
    colours = styles({first_word(name) for grid in found for name in grid.speedups} - {"null"})
    for line, grid in zip(axes, found, strict=True):
        of_method: dict[str, Iterator[str]] = defaultdict(lambda: cycle(MARKERS))
        own = {}
        for name in sorted(grid.speedups):
            method = first_word(name)
            own[name] = colours[method][0] if method in colours else NULL, next(of_method[method.removesuffix(LORA)])
        for axis, context in zip(line, grid.contexts, strict=False):
            for name, speedups in grid.speedups.items():
                points = [(batch, s[0]) for batch in grid.batches if (s := speedups.get((batch, context)))]
                if points:
                    colour, marker = own[name]
                    axis.plot(*zip(*points, strict=True), marker + "-", color=colour, markersize=5, label=name)
            axis.axhline(1, color="black", linewidth=0.6, linestyle=":", zorder=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(grid.batches, [str(batch) for batch in grid.batches])
            axis.set_xlabel(f"batch, at context {context}")
            axis.spines[["top", "right"]].set_visible(False)
        for axis in line[len(grid.contexts) :]:
            axis.set_visible(False)
        line[0].set_ylabel("speed-up over fastest dense")
        titled(line[0], 64 * columns, grid.title)
        legend(line[len(grid.contexts) - 1], line, ordered=True)  # also of lines that a panel lacks
    return figure
