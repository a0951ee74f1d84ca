"""How dense the FFNs are: by layer, over tokens, and for several sequences together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..rows import Group, Row
from .style import CROWDED, first_word, plain, styles, titled, variant


def with_profiles(groups: Sequence[Group]) -> list[tuple[Group, list[Row]]]:
    """Of each method and options the cell whose FFNs are nearest to half dense, if it says how its tokens differ; a
    part per method where variants are many. What random weights choose tells nothing of a method."""
    found = []
    for group in groups:
        rows: dict[tuple[str, str], Row] = {}
        for row in group.rows:
            if not group.synthetic and "spread" in row.ffn and row.ffn["mean"] < 1:
                key = row.method, row.options
                rows[key] = min(rows.get(key, row), row, key=lambda r: abs(r.ffn["mean"] - 0.5))
        parts: dict[str, list[Row]] = defaultdict(list)
        for row in rows.values():
            parts[row.method if len(rows) > CROWDED else "all"].append(row)
        found += [(group, part) for part in parts.values()]
    return found


def profiles(parts: list[tuple[Group, list[Row]]]) -> Any:
    """Density layer by layer, most tokens within the shade; what several tokens read together, if they were alike in
    nothing (dotted) and as they are; and how many tokens use how much, where records say so (older ones do not)."""
    from matplotlib import pyplot as plt

    everywhere = styles({variant(row) for _, rows in parts for row in rows}, first_word)
    # The last column is the legends'.
    columns = 2 + any("histogram" in row.ffn for _, rows in parts for row in rows)
    size = (4.6 * columns + 3.4, 3.7 * len(parts))
    grid: dict[str, Any] = dict(figsize=size, squeeze=False, layout="constrained", width_ratios=[4.6] * columns + [3.4])
    figure, axes = plt.subplots(len(parts), columns + 1, **grid)
    for (left, right, *last, beside), (group, rows) in zip(axes, parts, strict=True):
        several = len({row.method for row in rows}) > 1
        own = everywhere if several else styles(map(variant, rows))
        for row in rows:
            (colour, marker), ffn = own[variant(row)], row.ffn
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
        left.set_xlabel("layer (shade: 10th to 90th percentile of tokens)")
        left.set_ylabel("density of FFN")
        right.set_xlabel("sequences together (dotted: independent choices)")
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
            plain(axis)
        left.xaxis.get_major_locator().set_params(integer=True)
        beside.set_axis_off()
        beside.legend(*left.get_legend_handles_labels(), fontsize=7, frameon=False, loc="upper left", borderaxespad=0)
        titled(left, 100, group.title)
    return figure
