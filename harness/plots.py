"""The figures: accuracy and time over the bytes read, speed-up over batch and context, where the time goes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import log
from pathlib import Path
from textwrap import wrap
from typing import Any

from .grids import Grid, grids
from .rows import Group, Row

# Okabe and Ito's, and two of Tol's for the methods beyond.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933")
MARKERS = "osD^vPX"
FRONT, NULL = "#bbbbbb", "#777777"
CROWDED = 9  # variants above which a panel shows each method's best alone, or a method has panels of its own
DENSITY = "realised density of the blocks' linear weights"

Value = Callable[[Row], "float | None"]


def _megabytes(row: Row) -> float | None:
    read = row.decode.get("bytes")
    return None if read is None else read / 1e6


@dataclass(frozen=True)
class Panel:
    """One value over the bytes read, or over another `x`. `larger`: whether more of it is better; None where no front
    is drawn."""

    label: str
    value: Value
    larger: bool | None
    log: bool = False
    x: Value = _megabytes
    x_label: str = "MB read per decoded token"


def _perplexity(row: Row) -> float | None:
    if row.method == "dense":
        return 1.0 if row.part("fidelity").get("perplexity") else None
    return row.perplexity_ratio.estimate if row.perplexity_ratio else None


def _average(row: Row) -> float | None:
    return None if row.task_average is None else 100 * row.task_average


def _milliseconds(row: Row) -> float | None:
    return row.part("latency").get("median")


def panels(group: Group) -> list[Panel]:
    """What a group can show. Random weights have no accuracy, a CPU has no time worth a plot."""
    wanted = []
    if not group.synthetic:
        wanted.append(Panel("perplexity ÷ dense (log)", _perplexity, larger=False, log=True))
        wanted.append(Panel("task average, %", _average, larger=True))
    if not group.on_cpu:
        wanted.append(Panel("decode, ms/step (median)", _milliseconds, larger=None))
    return [p for p in wanted if any(p.value(row) is not None and not row.is_baseline for row in group.rows)]


@dataclass(frozen=True)
class Figure:
    """A picture of a leaderboard. `file`: .svg for those of many panels, which would be large as .png too; `parts`:
    what of the groups it can show; `draw`: a matplotlib figure of these."""

    file: str
    caption: str
    parts: Callable[[Sequence[Group]], list[Any]]
    draw: Callable[[list[Any]], Any]


def write(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes every figure that has something to show as .svg, and where its `file` is one as .png: byte for byte the
    same for the same records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    files: list[Path] = []
    for figure in FIGURES:
        if parts := figure.parts(groups):
            path = folder / figure.file
            with plt.rc_context({"svg.hashsalt": path.stem, "font.size": 9}):
                drawn = figure.draw(parts)
                if path.suffix == ".png":
                    drawn.savefig(path, dpi=100)
                    with Image.open(path) as image:  # 64 colours are enough for lines, and a third of the bytes
                        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
                    small.save(path, optimize=True)
                drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
                plt.close(drawn)
            files += dict.fromkeys((path, path.with_suffix(".svg")))
    return files


def shown(groups: Sequence[Group]) -> list[Figure]:
    """The figures that these groups have."""
    return [figure for figure in FIGURES if figure.parts(groups)]


def _with_curves(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """Tables and their methods, where there are two methods or controls with three densities each."""
    found = []
    for group in groups:
        rows = [row for row in group.rows if row.density is not None and _perplexity(row) is not None]
        series = Counter((row.method, row.options) for row in rows if not row.is_baseline)
        curves = [method for (method, _), n in series.items() if n >= 3]
        if len(curves) >= 2:
            found += [(group, method) for method in dict.fromkeys(curves)]
    return found


def _density(row: Row) -> float:
    return 1.0 if row.density is None else row.density


def _with_profiles(groups: Sequence[Group]) -> list[tuple[Group, list[Row]]]:
    """Of each method and options the cell whose FFNs are nearest to half dense, if it says how its tokens differ; a
    part per method where variants are many."""
    found = []
    for group in groups:
        rows: dict[tuple[str, str], Row] = {}
        for row in group.rows:
            if "spread" in row.ffn and row.ffn["mean"] < 1:
                key = row.method, row.options
                rows[key] = min(rows.get(key, row), row, key=lambda r: abs(r.ffn["mean"] - 0.5))
        parts: dict[str, list[Row]] = defaultdict(list)
        for row in rows.values():
            parts[row.method if len(rows) > CROWDED else "all"].append(row)
        found += [(group, part) for part in parts.values()]
    return found


def _with_panels(groups: Sequence[Group]) -> list[tuple[Group, list[Panel]]]:
    return [(group, found) for group in groups if (found := panels(group))]


def _pareto(parts: list[tuple[Group, list[Panel]]]) -> Any:
    """A table's panels side by side, without controls; where variants are many, each method's best alone."""
    from matplotlib import pyplot as plt

    columns = max(len(found) for _, found in parts)
    starts, free = [], 0  # the next place, by lines
    for _, found in parts:
        free += -free % columns if free % columns + len(found) > columns else 0
        starts.append(free)
        free += len(found)
    lines = -(-free // columns)
    size = (4.6 * columns + 0.4, 3.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    tables = [[row for row in group.rows if not row.control] for group, _ in parts]
    names = [_method if len({_variant(row) for row in rows}) > CROWDED else _variant for rows in tables]
    named_rows = [(name, row) for rows, name in zip(tables, names, strict=True) for row in rows]
    styles = _styles({name(row) for name, row in named_rows if not row.is_baseline}, _first_word)
    for start, (group, found), rows, name in zip(starts, parts, tables, names, strict=True):
        line = axes.flat[start : start + len(found)]
        for axis, panel in zip(line, found, strict=True):
            axis.set_visible(True)
            shown = _best(rows, panel) if name is _method and panel.larger is not None else rows
            _draw(axis, shown, panel, name, rows, styles)
        named: dict[str, Any] = {}
        for axis in line:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        line[-1].legend(named.values(), named.keys(), fontsize=7.5, frameon=False, **place)
        title = [part for text in (group.title, group.details) for part in wrap(text, 42 * len(found))]
        line[0].set_title("\n".join(title), loc="left", fontsize=8.5)
    return figure


def _curves(parts: list[tuple[Group, str]]) -> Any:
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
    for axis, (group, method) in zip(axes.flat, parts, strict=False):
        own = [row for row in group.rows if row.method == method or row.density is None]
        _draw(axis, own, panel, _within, group.rows, _styles({_within(row) for row in own if not row.is_baseline}))
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_title(f"{method}: {group.setting['model']}, {group.setting['mode']}", loc="left", fontsize=8.5)
    return figure


def _method(row: Row) -> str:
    return row.method


def _within(row: Row) -> str:
    """In a panel of one method."""
    return row.method if row.density is None else row.options or row.method


def _variant(row: Row) -> str:
    return f"{row.method} ({row.options})" if row.options else row.method


def _styles(series: Iterable[str], kind: Callable[[str], str] = str) -> dict[str, tuple[str, str]]:
    """A colour for each kind of name and a marker for each name of it; a second round of colours has other markers."""
    of_kind: dict[str, list[str]] = defaultdict(list)
    for name in sorted(series):
        of_kind[kind(name)].append(name)
    n, styles = len(COLOURS), {}
    for i, names in enumerate(of_kind[key] for key in sorted(of_kind)):
        for j, name in enumerate(names):
            styles[name] = COLOURS[i % n], MARKERS[(i + i // n + j) % len(MARKERS)]
    return styles


def _profiles(parts: list[tuple[Group, list[Row]]]) -> Any:
    """Density layer by layer, most tokens within the shade; what several tokens read together, if they were alike in
    nothing (dotted) and as they are; and how many tokens use how much, where records say so (older ones do not)."""
    from matplotlib import pyplot as plt

    everywhere = _styles({_variant(row) for _, rows in parts for row in rows}, _first_word)
    columns = 2 + any("histogram" in row.ffn for _, rows in parts for row in rows)
    size = (4.8 * columns + 2.4, 3.9 * len(parts))
    figure, axes = plt.subplots(len(parts), columns, figsize=size, squeeze=False, layout="constrained")
    for (left, right, *last), (group, rows) in zip(axes, parts, strict=True):
        several = len({row.method for row in rows}) > 1
        styles = everywhere if several else _styles(map(_variant, rows))
        for row in rows:
            (colour, marker), ffn = styles[_variant(row)], row.ffn
            layers = range(len(ffn["layers"]))
            low, _, high = zip(*ffn["spread"], strict=True)
            left.plot(layers, ffn["layers"], marker + "-", color=colour, markersize=4, linewidth=1.3, label=row.name)
            left.fill_between(layers, low, high, color=colour, alpha=0.1, linewidth=0)
            together = {int(n): share for n, share in ffn.get("unions", {}).items()}
            if together:
                right.plot(together.keys(), together.values(), marker + "-", color=colour, markersize=4, linewidth=1.3)
                chance = [sum(1 - (1 - d) ** n for d in ffn["layers"]) / len(layers) for n in together]
                right.plot(together.keys(), chance, ":", color=colour, linewidth=1)
            if counts := ffn.get("histogram"):
                shares = [n / (len(counts) - 1) for n in range(len(counts))]
                last[0].step(shares, [n / sum(counts) for n in counts], where="mid", color=colour, linewidth=1.3)
        left.set_xlabel("layer (shade: 10th to 90th percentile over tokens)")
        left.set_ylabel("density of FFN")
        right.set_xlabel("sequences decoded together (dotted: independent choices)")
        right.set_ylabel("density of their union")
        right.set_xscale("log", base=2)
        right.set_xticks(ticks := sorted({int(n) for row in rows for n in row.ffn.get("unions", {})}), map(str, ticks))
        for axis in last:
            axis.set_xlabel("density of FFN, of one token in one layer")
            axis.set_ylabel("share of tokens, all layers")
            axis.set_ylim(bottom=0)
        for axis in (left, right):
            axis.set_ylim(0, 1.02)
        for axis in (left, right, *last):
            axis.set_visible(bool(axis.lines))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2, linewidth=0.5)
        left.xaxis.get_major_locator().set_params(integer=True)
        beside = [axis for axis in (left, right, *last) if axis.get_visible()][-1]
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        beside.legend(*left.get_legend_handles_labels(), fontsize=7, frameon=False, **place)
        left.set_title("\n".join(wrap(group.title, 100)), loc="left", fontsize=8.5)
    return figure


def _traced(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if any(row.breakdown for row in group.rows)]


def _bars(groups: list[Group]) -> Any:
    """A stacked bar per method, in milliseconds of a decode step by class of kernel."""
    from matplotlib import pyplot as plt

    heights = [1.1 + 0.26 * sum(bool(row.breakdown) for row in group.rows) for group in groups]
    size = (8.5, sum(heights) + 0.3)
    figure, axes = plt.subplots(
        len(groups), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    titles = Counter(group.title for group in groups)
    for group, axis in zip(groups, axes[:, 0], strict=True):
        rows = [row for row in group.rows if row.breakdown]
        left = [0.0] * len(rows)
        for kind, colour in zip(rows[0].breakdown, cycle((*COLOURS[:6], FRONT)), strict=False):
            widths = [row.breakdown.get(kind, 0.0) for row in rows]
            axis.barh(range(len(rows)), widths, left=left, color=colour, label=kind, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("ms per decode step")
        axis.spines[["top", "right"]].set_visible(False)
        machine = "" if titles[group.title] == 1 else f" ({group.machine['identity']})"
        axis.set_title("\n".join(wrap(group.title + machine, 100)), loc="left", fontsize=8.5)
    axes[0, 0].legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _lines(found: list[Grid]) -> Any:
    """Speed-up over the batch, a panel per context and a line per method."""
    from matplotlib import pyplot as plt

    columns = max(len(grid.contexts) for grid in found)
    size = (4.2 * columns + 1.6, 3.6 * len(found))
    figure, axes = plt.subplots(len(found), columns, figsize=size, squeeze=False, sharey="row", layout="constrained")
    # A colour for a method, in all panels, and a marker for each of its densities.
    colours = _styles({_first_word(name) for grid in found for name in grid.speedups} - {"null"})
    for line, grid in zip(axes, found, strict=True):
        of_method: dict[str, Iterator[str]] = defaultdict(lambda: cycle(MARKERS))
        styles = {}
        for name in sorted(grid.speedups):
            method = _first_word(name)
            styles[name] = colours[method][0] if method in colours else NULL, next(of_method[method])
        for axis, context in zip(line, grid.contexts, strict=False):
            for name, speedups in grid.speedups.items():
                points = [(batch, s[0]) for batch in grid.batches if (s := speedups.get((batch, context)))]
                if points:
                    colour, marker = styles[name]
                    axis.plot(*zip(*points, strict=True), marker + "-", color=colour, markersize=5, label=name)
            axis.axhline(1, color="black", linewidth=0.6, linestyle=":", zorder=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(grid.batches, [str(batch) for batch in grid.batches])
            axis.set_xlabel(f"batch, at context {context}")
            axis.spines[["top", "right"]].set_visible(False)
        for axis in line[len(grid.contexts) :]:
            axis.set_visible(False)
        line[0].set_ylabel("speed-up over fastest dense")
        line[0].set_title("\n".join(wrap(grid.title, 64 * columns)), loc="left", fontsize=8.5)
        # Also of lines that the first panel lacks.
        named = {label: h for axis in line for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        names = sorted(named)
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        line[len(grid.contexts) - 1].legend([named[n] for n in names], names, fontsize=7.5, frameon=False, **place)
    return figure


def _first_word(name: str) -> str:
    """The method of a row's name."""
    return name.split()[0]


FIGURES = (
    Figure("pareto.png", "Accuracy over bytes read per token", _with_panels, _pareto),
    Figure("quality.svg", "Accuracy over density, variants and controls of each method", _with_curves, _curves),
    Figure("density.svg", "Density by layer and token, and what sequences read together", _with_profiles, _profiles),
    Figure("grid.png", "Speed-up over batch and context", grids, _lines),
    Figure("breakdown.png", "Where the time of a decode step goes", _traced, _bars),
)


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
    return front([(x, y) for x, y, _ in _points(able, panel)], bool(panel.larger))


def _best(rows: Sequence[Row], panel: Panel) -> list[Row]:
    """The rows on their own method's front, from left to right, and the baselines."""
    kept: list[Row] = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        edge = _edge(own, panel)
        found = [point for point in _points(own, panel) if point[:2] in edge or point[2].is_baseline]
        kept += [row for *_, row in sorted(found, key=lambda point: point[:2])]
    return kept


def _draw(
    axis: Any,
    rows: Sequence[Row],
    panel: Panel,
    name: Callable[[Row], str],
    behind: Sequence[Row],
    styles: dict[str, tuple[str, str]],
) -> None:
    """A line for the rows of each name, and the front of the rows behind."""
    series: dict[str, list[tuple[float, float, Row]]] = {}
    for point in _points(rows, panel):
        series.setdefault(name(point[2]), []).append(point)
    if panel.larger is not None:
        steps = _edge(behind, panel)
        axis.step(*zip(*steps, strict=True), where="post", color=FRONT, linewidth=5, alpha=0.5, label="Pareto front")
    for label, found in series.items():
        xs, ys = [x for x, _, _ in found], [y for _, y, _ in found]
        if label == "dense":
            axis.plot(xs, ys, "*", color="black", markersize=12, label=label, zorder=4)
            axis.axhline(ys[0], color="black", linewidth=0.6, linestyle=":", zorder=0)
        elif label == "null":
            axis.plot(xs, ys, "x", color=NULL, markersize=8, label=label, zorder=3)
        else:
            colour, marker = styles[label]
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
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2, linewidth=0.5)
    if panel.larger is None:
        axis.set_ylim(bottom=0)
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
