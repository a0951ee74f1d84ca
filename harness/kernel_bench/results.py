"""Records of the kernel benchmark: in files, and as a table.

A folder holds, for each kind of GPU, `<gpu>.jsonl` (a record per line) and `<gpu>.machine.json` (the runs they come
from), and one `KERNELS.md` made from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from methods.errors import UsageError

from .. import machine
from ..formats import NONE, github, number, percent

PAGE = "KERNELS.md"

# Ends the case of what is the same work in another form.
FORM = re.compile(r", (list|mask|stored by output|float32 partials|[\d.]+ per row)$")

Record = dict[str, Any]

HOW_TO_READ = """\
Generated from the records beside it by `python -m harness bench kernels`; do not edit.

- **time**: one call, the median of CUDA-graph replays. A graph calls the operator on 32 or more copies of its weights
  or caches, more than 300 MB in all, so that they come from memory as in a model. Operators that read activations
  only find them in cache, as they do in a model.
- **limit**: the bytes that must be read over the read bandwidth measured at the start of the run.
- **dense baseline**: the same work done densely, timed in the same process in turns with the kernel.
- **speed-up**: over the faster of that baseline and *own*: the same operator, case and batch at density 1, in its
  fastest form, where there are such rows and sparser ones. Where that one is it, *own* and its time are beside it.
- **density**: active / all, as drawn; with a batch, of the union over its rows.
- **error**: relative to a float64 computation of the same inputs, Frobenius norm, at most 4e-3 in 16 bits and 1e-5 in
  float32. A kernel that exceeds it, or whose second run differs in one bit, has *failed* and has no time."""

# Title -> text of a record, with `own_us`: the operator's own time where it skips nothing.
COLUMNS: dict[str, Callable[[Record], str]] = {
    "operator": lambda r: r["op"],
    "case": lambda r: r["case"],
    "batch": lambda r: str(r["batch"]),
    "density": lambda r: f"{r['density']:.3g}",
    "time\n[µs]": lambda r: "failed" if r["time_us"] is None else number(r["time_us"]),
    "limit\n[µs]": lambda r: number(r["limit_us"]),
    "fraction\nof limit": lambda r: percent(r["fraction_of_limit"]),
    "dense\nbaseline": lambda r: r["baseline"] or NONE,
    "baseline\n[µs]": lambda r: number(r["baseline_us"]),
    "speed-up over\nfaster dense": lambda r: _speedup(r["time_us"], r["baseline_us"], r["own_us"]),
    "error to\nfloat64": lambda r: NONE if r["rel_error"] is None else f"{r['rel_error']:.1e}",
}


def table(records: Sequence[Record]) -> str:
    """The records for a terminal."""
    from tabulate import tabulate

    return tabulate(_body(records), list(COLUMNS), tablefmt="simple", disable_numparse=True)


def machine_lines(run: dict[str, Any]) -> list[str]:
    """What a run was measured on, for above its table."""
    bandwidth = f"Read bandwidth at the start: {run['read_bandwidth'] / 1e12:.2f} TB/s; {run['dtype']}."
    return [f"Machine: {machine.line(run['machine'], run)}", bandwidth]


def device_name(run: dict[str, Any]) -> str:
    return run["machine"]["gpu"]["name"] if run["machine"]["gpu"] else run["machine"]["cpu"]["model"]


def file_name(run: dict[str, Any]) -> str:
    """What the files of a GPU are called: h200 for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(run).lower().removeprefix("nvidia")).strip("-")


def save(folder: Path, run: dict[str, Any], records: Sequence[Record]) -> list[Path]:
    """Writes the records and the page; operators that this run did not measure keep the records of their last run.

    run: `ops`, `time`, `read_bandwidth`, `dtype`, `git`, `source`, `machine`. Returns the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_name(run)
    earlier, kept = load(folder).get(stem, ([], []))
    runs = [old | {"ops": [op for op in old["ops"] if op not in run["ops"]]} for old in earlier]
    runs = [old for old in runs if old["ops"]] + [run]
    merged = [record for record in kept if record["op"] not in run["ops"]] + list(records)
    files = [folder / name for name in (f"{stem}.jsonl", f"{stem}.machine.json", PAGE)]
    lines, sidecar, page_file = files
    lines.write_text("".join(f"{json.dumps(record)}\n" for record in merged), encoding="utf-8")
    sidecar.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
    page_file.write_text(page(folder), encoding="utf-8")
    return files


def load(folder: Path) -> dict[str, tuple[list[dict[str, Any]], list[Record]]]:
    """Runs and records by GPU. Raises UsageError when a file cannot be read."""
    found = {}
    for lines in sorted(folder.glob("*.jsonl")):
        sidecar = lines.with_suffix(".machine.json")
        try:
            runs = json.loads(sidecar.read_text(encoding="utf-8"))["runs"]
            records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"'{lines}' or its .machine.json is damaged ({error}): restore or remove both.") from None
        found[lines.stem] = runs, records
    return found


def page(folder: Path) -> str:
    """KERNELS.md. Raises UsageError when there are no records."""
    found = load(folder)
    if not found:
        raise UsageError(f"'{folder}' has no kernel records: run `python -m harness bench kernels` on a GPU first.")
    parts = ["# Kernels", HOW_TO_READ]
    titles = [title.replace("\n", " ") for title in COLUMNS]
    for runs, records in found.values():
        parts.append(f"## {device_name(runs[-1])}")
        for run in runs:
            shown = [record for record in records if record["op"] in run["ops"]]
            parts += [*machine_lines(run), *sums(shown), github(titles, _body(shown))]
    return "\n\n".join(parts) + "\n"


def sums(records: Sequence[Record]) -> list[str]:
    """The linears of a layer together at batch 1, in each form, where all of them have a time."""
    layers: dict[tuple[str, str, str], list[Record]] = {}
    for record in _with_own(records):
        shapes, _, linear = record["case"].partition(" ")
        if record["op"] in ("input_linear", "threshold_linear") and record["batch"] == 1:
            _, comma, form = linear.partition(",")
            layers.setdefault((record["op"] + comma + form, shapes, f"{record['density']:.2g}"), []).append(record)
    body = []
    for layer, linears in layers.items():
        if all(record["time_us"] and record["baseline_us"] for record in linears):
            time, limit, dense = (sum(r[key] for r in linears) for key in ("time_us", "limit_us", "baseline_us"))
            own = sum(r["own_us"] for r in linears) if all(r["own_us"] for r in linears) else None
            texts = [number(time), number(limit), percent(limit / time), number(dense)]
            body.append([*layer, *texts, _speedup(time, dense, own)])
    titles = ["all linears of a layer", "shapes", "density", "time [µs]", "limit [µs]", "fraction of limit"]
    return [github([*titles, "cuBLAS [µs]", "speed-up over faster dense"], body)] if body else []


def _speedup(time: float | None, baseline: float | None, own: float | None) -> str:
    """Over the faster of two dense ways; what is gained over the slower one is not gained by skipping."""
    dense = min((known for known in (baseline, own) if known), default=None)
    if time is None or dense is None:
        return NONE
    return f"{dense / time:.2f}" + (f" (own, {number(own)})" if own == dense != baseline else "")


def _with_own(records: Sequence[Record]) -> list[Record]:
    """The records with the time of their operator at density 1, in the same case and batch and the fastest form; None
    where it has no rows of both kinds: it skips nothing, or a union of all is what a batch drew."""

    def work(record: Record) -> tuple[Any, ...]:
        return record["op"], FORM.sub("", record["case"]), record["batch"]

    skipping = {work(record) for record in records if record["density"] < 1}
    own: dict[tuple[Any, ...], float] = {}
    for record in records:
        if record["density"] == 1 and record["time_us"] and work(record) in skipping:
            own[work(record)] = min(own.get(work(record), inf), record["time_us"])
    return [record | {"own_us": own.get(work(record))} for record in records]


def _body(records: Sequence[Record]) -> list[list[str]]:
    return [[text(record) for text in COLUMNS.values()] for record in _with_own(records)]
