"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .stats import Interval

NONE = "–"
WIDE = 240  # characters of a line


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits: 0.0120, 1.23, 13,262; an exponent only below 0.0001."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == 0 or abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.3g} %"


def count(value: float | None) -> str:
    """Tokens: 512, 96 k, 1.3 M, 1.2 G."""
    if value is None:
        return NONE
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def interval(value: Interval | None) -> str:
    return NONE if value is None else f"{value.estimate:.3f}{ends(value, '.3f')}"


def ends(value: Interval, form: str, before: str = " ") -> str:
    """Of an interval, in brackets; nothing where it has no limits."""
    return f"{before}[{value.low:{form}}, {value.high:{form}}]" if math.isfinite(value.high) else ""


def github(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A GitHub table from finished texts."""
    from tabulate import tabulate

    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in body]
    table: str = tabulate(cells, list(titles), tablefmt="github", disable_numparse=True)
    if table.find("\n") <= WIDE:
        return table
    # Padding serves who reads the text: not in lines that no screen holds, where it is half of the file.
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*titles], ["---"] * len(titles), *cells))
