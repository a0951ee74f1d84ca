"""`python -m harness bench kernels`: every kernel against the memory limit and its dense baseline."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.errors import UsageError, unknown

from .kernel_bench import OPERATORS

if TYPE_CHECKING:
    from .kernel_bench.case import Case
    from .kernel_bench.measure import Setting

OUT = "results/local/kernels"
COMMITTED = "results/kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("kernels",), help="the shared operators, on the shapes of three models")
    add("--op", metavar="LIST", help=f"operators, of {', '.join(OPERATORS)} (default: all)")
    add("--model-shapes", metavar="LIST", help="aliases of `ls models`: their shapes instead; the table is not kept")
    add("--json", metavar="FILE", help="also write the records there: a JSON list, or in .jsonl one per line")
    add("--out", metavar="FOLDER", help=f"of records and table (default: {OUT}; without measuring, {COMMITTED})")
    add("--rebuild", action="store_true", help="measure nothing; write KERNELS.md again from its records")
    add("--check", action="store_true", help="measure nothing; exit 1 if KERNELS.md is not what its records say")


def main(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 when a kernel failed its check, something raised, or --check found drift."""
    if args.check or args.rebuild:
        return page(Path(args.out or COMMITTED).expanduser(), args.rebuild)
    from .plan import split

    operators = split(args.op, "--op") if args.op else list(OPERATORS)
    for name in operators:
        if name not in OPERATORS:
            raise unknown("operator", name, OPERATORS)
    from .kernel_bench import case

    cases = case.cases(operators, split(args.model_shapes, "--model-shapes") if args.model_shapes else case.SHAPES)
    if not cases:
        raise UsageError(f"{', '.join(operators)} has no case on these shapes: leave out --model-shapes.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "kernels are timed on a CUDA GPU and torch finds none here: run this on a machine that has one, or read "
            f"{COMMITTED}/KERNELS.md."
        )
    file = _writable(Path(args.json), "--json") if args.json else None
    folder = None if args.model_shapes else _writable(Path(args.out or OUT) / "KERNELS.md", "--out").parent
    from sparse_kernels import read_bandwidth

    from .kernel_bench.measure import Setting

    device = torch.device("cuda")
    return run(cases, Setting(device, torch.bfloat16, read_bandwidth(device)), folder, file)


def run(cases: Sequence[Case], setting: Setting, folder: Path | None, file: Path | None) -> int:
    """Measures, prints the table, writes the records; an interrupted run leaves what it has in `file`."""
    from . import machine, plan
    from .kernel_bench import measure, results
    from .progress import Display

    if folder:
        results.load(folder)  # what is wrong there should not be found after the measurement
    operators = Counter(case.op for case in cases)
    records: list[dict[str, Any]] = []
    failed = 0
    try:
        with Display([len(cases), *operators.values()]) as display:
            for record, problem in measure.run(cases, setting, display):
                records.append(record)
                failed += problem is not None
    finally:
        if file:
            file.write_text(_json(records, file.suffix == ".jsonl"), encoding="utf-8")
    here = {
        "ops": list(operators),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "read_bandwidth": setting.bandwidth,
        "git": plan.git_state(),
        "source": plan.source_hash(),
        "machine": machine.describe(setting.device.type),
    }
    print("\n\n".join([*results.machine_lines(here), results.table(records), *results.sums(records)]))
    for written in results.save(folder, here, records) if folder else []:
        print(f"wrote {written}")
    return 1 if failed else 0


def page(folder: Path, rebuild: bool) -> int:
    """Writes KERNELS.md, or compares: 0 when it is what its records say. Raises UsageError without records."""
    from .kernel_bench import results
    from .report import differences

    place, text = folder / results.PAGE, results.page(folder)
    if rebuild:
        _writable(place, "--out").write_text(text, encoding="utf-8")
        print(f"wrote {place}")
    elif stale := differences({place: text}):
        print(f"{stale[0]}: run `python -m harness bench kernels --rebuild --out {folder}`.")
        return 1
    else:
        print(f"{place} is up to date.")
    return 0


def _writable(file: Path, flag: str) -> Path:
    """The file, with its folder made. Raises UsageError when it cannot be written."""
    file = file.expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise UsageError(f"'{file}' cannot be written ({error.strerror}): choose another {flag}.") from None
    return file


def _json(records: Sequence[dict[str, Any]], lines: bool) -> str:
    """A record per line, and unless `lines`, a JSON list of them."""
    texts = list(map(json.dumps, records))
    return "".join(f"{text}\n" for text in texts) if lines else "[\n" + ",\n".join(texts) + "\n]\n"
