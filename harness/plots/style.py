"""What the figures share: colours and markers, the names of series, axes, legends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from textwrap import wrap
from typing import Any

from ..plan import BASELINES
from ..rows import LORA, Row

# Okabe and Ito's, and two of Tol's for the methods beyond; black, which is dense's, last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#000000")
MARKERS = "osD^vPX"
FRONT, NULL = "#bbbbbb", "#777777"
CROWDED = 9  # variants above which a method has one line in a panel, or panels of its own
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}


def registered() -> list[str]:
    """The methods in the order of the registry, which is that of their colours and markers."""
    from methods import registry

    return [name for name in registry.names() if name not in BASELINES]


def styles(series: Iterable[str], kind: Callable[[str], str] = str) -> dict[str, tuple[str, str]]:
    """A colour for each kind of name and a marker for each name of it; a second round of colours has other markers.

    A registered method looks the same whatever is shown beside it; other kinds have what is left.
    """
    of_kind: dict[str, list[str]] = defaultdict(list)
    for name in sorted(series):
        of_kind[kind(name).removesuffix(LORA)].append(name)
    own = {name: i for i, name in enumerate(registered()) if name in of_kind}
    left = (i for i in count() if i not in own.values())
    n, found = len(COLOURS), {}
    for key in sorted(of_kind):
        i = own[key] if key in own else next(left)
        for j, name in enumerate([key, *(name for name in of_kind[key] if name != key)]):
            found[name] = COLOURS[i % n], MARKERS[(i + i // n + j) % len(MARKERS)]
    return found


def variant(row: Row) -> str:
    return f"{row.method} ({row.options})" if row.options else row.method


def fullest(rows: Sequence[Row]) -> dict[str, str]:
    """By method, the variant that stands for it where variants are many: the one of the most densities, if several
    have as many the default options. Empty where they are few, so that every one stands for itself."""
    cells = Counter(map(variant, rows))
    many = sorted(rows, key=lambda row: (cells[variant(row)], not row.options)) if len(cells) > CROWDED else ()
    return {row.method: variant(row) for row in many}


def first_word(name: str) -> str:
    """The method of a row's name."""
    return name.split()[0]


def plain(axis: Any) -> None:
    """Without a box, over a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2, linewidth=0.5)


def titled(axis: Any, width: int, *texts: str) -> None:
    """Lines of at most `width` characters above the left end."""
    axis.set_title("\n".join(part for text in texts for part in wrap(text, width)), loc="left", fontsize=8.5)


def legend(axis: Any, axes: Iterable[Any], size: float = 7.5, ordered: bool = False) -> None:
    """Beside `axis`, of what any of the axes shows."""
    named = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    names = sorted(named) if ordered else list(named)
    axis.legend([named[name] for name in names], names, fontsize=size, **BESIDE)
