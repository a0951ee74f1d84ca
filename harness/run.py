"""`run`: plans cells, measures those without a record, appends their records and shows the result."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from methods.errors import UsageError

from . import plan
from .plan import Cell

TRAINING = (
    "training comes on top where the cache lacks its artifact, and densities of a method share most of it: the tokens "
    "are the most that it reads, the time is that of a record of the like in {out} (?: not known)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan.add_run_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Exit code 0 when every cell has a result, 1 when one failed (its record says why)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("run measures in one process: only `prepare` goes under `accelerate launch`.")
    cells = plan.build_plan(args)
    if args.dry_run:
        print(dry_run(cells, args.out))
        return 0
    from . import machine, models, report, store, workers
    from .cells import measure

    store.ensure_writable(args.out)
    source, here = plan.source_hash(), machine.identity(cells[0].device)
    known = {} if args.force else store.by_key(args.out)
    status = {cell: known.get(cell.cell_key(source, here), {}).get("status") for cell in cells}
    pending = [cell for cell in cells if status[cell] not in store.FINISHED]
    pending.sort(key=lambda cell: status[cell] == "failed")  # what may end the run again goes last
    for model, device, dtype in dict.fromkeys((c.model, c.device, c.dtype) for c in pending if not c.not_applicable):
        models.require_memory(models.resolve(model), device, dtype)  # of the last model too, before the first's cells
    for note in plan.notes(cells):
        print(f"note: {note}", file=sys.stderr)
    if len(pending) < len(cells):
        done_already = f"{len(cells) - len(pending)} of {len(cells)} cells are done already"
        print(f"{done_already} (--force repeats them)", file=sys.stderr)
    if args.workers > 1:
        failed = workers.measure(pending, args.out, source, here, args.workers)
    else:
        failed = 0
        try:
            for record in measure(pending, source, here, known.values()):
                store.append(args.out, record)
                failed += record["status"] == "failed"
        except machine.DeviceLost as lost:
            print(lost, file=sys.stderr)
    report.build(args.out)
    report.show(args.out)
    return 1 if failed else 0


def dry_run(cells: list[Cell], out: str) -> str:
    """The plan as a table, with the cost of a decoded token, a rough time per cell, and what its training takes."""
    from . import store
    from .session import estimate, seconds, training

    records = store.so_far(out)
    columns: list[dict[str, Any] | None] = []
    for cell in cells:
        if cell.not_applicable:
            columns.append(None)
            continue
        column = estimate(cell)
        about = seconds(cell, column.pop("_shape"))
        columns.append({**column, "about [s]": f"{about:.0f}", **training(cell, records)})
    trains = any("training [s]" in (column or ()) for column in columns)
    return plan.describe(cells, columns, [TRAINING.format(out=out)] if trains else [])
