"""Cells to records, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from time import perf_counter
from typing import TYPE_CHECKING, Any

from methods.errors import UsageError

from . import plan
from .plan import Cell

if TYPE_CHECKING:
    from .progress import Display
    from .session import Session
    from .store import Record


LOST = (
    "{} left a GPU that fails every further call of this process: the same command goes on, in a new one, with the "
    "cells that are left, and tries this one last."
)
FRAMES = 30  # of a traceback, the last ones, that a record keeps


def measure(
    cells: list[Cell], source: str, here: str, known: Collection[Record] = (), quiet: bool = False
) -> Iterator[Record]:
    """A record per cell, as soon as it is known; one model is in memory at a time.

    known: records whose task scores may be taken over (`scored`). Raises DeviceLost after the record of a cell that
    left no working device for the next ones.
    """
    from . import machine
    from .progress import Display

    git = plan.git_state()

    def same_model(cell: Cell) -> tuple[Any, ...]:
        return cell.model, cell.weights, cell.device, cell.dtype, cell.corpus, cell.seed, cell.limit

    def scored(cell: Cell) -> list[Record]:
        """Of the same cell, in any batch and context and timed or not: by the same code and files, on this machine."""
        found = []
        for record in known:
            other = record["cell"]
            twin = replace(cell, batch=other["batch"], context=other["context"], timed=other.get("timed", True))
            if record["status"] == "ok" and record["key"] == twin.cell_key(source, here):
                found.append(record)
        return found

    with Display([0.1 if cell.not_applicable else 1.0 for cell in cells], quiet) as display:
        for _, group in groupby(cells, same_model):
            session: Session | None = None
            together = list(group)
            for cell in together:
                record: Record = {
                    "key": cell.cell_key(source, here),
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "cell": cell.to_dict(),
                    "source": source,
                    "git": git,
                }
                start = perf_counter()
                with display.cell(cell.label):
                    result, session = _measure_cell(cell, together, session, display, scored)
                record["seconds"] = round(perf_counter() - start, 2)
                record |= {"machine": machine.describe(cell.device), **result}
                yield record
                if record["status"] == "failed" and not machine.answers(cell.device):
                    raise machine.DeviceLost(LOST.format(cell.label))
            if session is not None:
                session.close()


def _measure_cell(
    cell: Cell,
    together: list[Cell],
    session: Session | None,
    display: Display,
    scored: Callable[[Cell], list[Record]],
) -> tuple[Record, Session | None]:
    """The result of one cell; a failure becomes part of the record, so that the other cells still run."""
    if cell.not_applicable:
        return {"status": "not-applicable", "error": cell.not_applicable}, session
    from .session import Session

    if session is None:
        session = Session(together, display, scored)  # what is wrong with its files is found here, and ends the run
    try:
        result = session.measure(cell)
        for kind in ("notes", "warnings"):
            for text in result["artifact"]["manifest"].get(kind) or ():
                display.say(f"  {cell.label}: {text}")
        return {"status": "ok", "error": None, **result}, session
    except UsageError as error:
        display.say(f"  {cell.label} failed: {error}")
        return {"status": "failed", "error": str(error)}, session
    except Exception as error:  # out of memory, a kernel that does not compile: recorded, and the next cell goes on
        import traceback

        text = "".join(traceback.format_exception(error, limit=-FRAMES))
        display.say(f"  {cell.label} failed: {type(error).__name__}: {error}")
        return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": text}, session
