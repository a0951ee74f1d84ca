"""`python -m harness report`: leaderboards, claims ledger and plots, rebuilt from the records alone."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from methods.errors import UsageError

from . import board, claims, machine, orderings, store
from .doubts import doubts_of
from .formats import github
from .grids import grids
from .rows import BUDGETS, Group, group
from .store import Record
from .tables import (
    breakdown_columns,
    cost_columns,
    dense_baselines,
    grid_table,
    markdown,
    predictor_columns,
    prompt_columns,
    quality_columns,
    readme_columns,
    site_columns,
    terminal,
)

PAGE = "LEADERBOARD.md"
TABLE = BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"  # of one result set
BOARD = "<!-- results:begin -->", "<!-- results:end -->"  # of all of them
WIDTH = 120
SHOWN_DIFFERENCES = 20

HOW_TO_READ = f"""\
## How to read this

- **Method, options, target density.** `dense` is the model as it is. `null` skips nothing but runs the sparse path: its
  distance from dense is the framework's own cost. Density is active / all; the target is what was asked for.
- **Realised density** is measured on the evaluation text: the share of the decoder blocks' linear weights that is used,
  weighted by parameters, without embeddings and lm_head; *timed*: that of the timed steps, where it is more than 0.01
  away. p99 is over tokens.
- **GFLOP/token, MB/token**: executed and read for one decoded token, routers and predictors included, at this batch
  and context; in brackets the ratio to dense. FLOPs count 2 per multiply-add; bytes are weights, predictors and KV.
- **ms/step**: one decode step, a token for every sequence of the batch; median [10th, 90th percentile] of all samples.
  Speed-ups are against the fastest dense runner of the same interleaved run. The verdict needs the whole 95 % interval
  on one side of a 3 % band around 1; `ambiguous` is never rounded up. On a CPU the path is a reference: not compared,
  not ranked.
- **Accuracy lost** is the worse of two relative losses against dense: bits per byte, and the task average. A question
  mark means that the estimate is within the budget but its 95 % interval is not. **Rank** is by speed-up, among cells
  within {BUDGETS[0]:g} % and within {BUDGETS[-1]:g} %; in brackets the places that the speed-ups' intervals allow. The
  losers stay in the table.
- Figures show steps as shares of the fastest dense step of their own run, so that cells of several machines of a kind
  can stand in one panel.
- Differences to dense are paired on the same items or windows, with bootstrap intervals; p is McNemar's.
- Equal target density is no fair match between methods: compare at equal MB/token or at equal accuracy lost.
"""

HOW_TO_READ_PROMPTS = """\
Prefill is the pass over the prompt in the row's mode, dense under `decode`; the first token also waits for the host.
*Single storage* is the same prompt over the transposed weights of the decode runtime as the only copy, over the time
with the model's own. Memory *alone*: peak of tensors for prompt and decode steps with that one copy; reserved and
process count the dense baselines too. Energy is the GPU's counter over 1.5 s of decode steps."""

HOW_TO_READ_BREAKDOWN = """\
From a trace of 8 replays of the decode runtime; tracing slows a step a little. Fused kernels count where most of their
time goes: the norm and the threshold before a linear layer are in *linears* for one token, in *selection* for more, and
in older rows, in a dense step too. *Idle*: no kernel ran."""


HOW_TO_READ_PREDICTORS = """\
On held-out tokens of the training text, against what its labels call needed: *recall* and *precision* of the units that
run; *predicted density* is the share whose score is positive, whatever runs. Other blocks are dense."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="results/local", help="folder of records, or of such folders (default: results/local)")
    add("--readme", metavar="FILE", help="also put a short table between the marks of FILE")
    add("--html", action="store_true", help="also write index.html: everything on one interactive page")
    add("--check", action="store_true", help="change nothing; exit 1 if a text is out of date")


def main(args: argparse.Namespace) -> int:
    if args.check:
        return check(args.out, args.readme)
    files = build(args.out, args.readme)
    if args.html:
        files.append(write_html(args.out))
    if not board.is_collection(args.out):
        show(args.out)
    print("\n".join(f"wrote {path}" for path in files))
    return 0


def build(out: str | Path, readme: str | Path | None = None) -> list[Path]:
    """Writes LEADERBOARD.md, the table of `readme` and the figures that have something to show.

    Of a folder of result sets it writes one LEADERBOARD.md over all, and CLAIMS.md. Returns the files. Raises
    UsageError when there are no records or they cannot be read, when nothing can be written, and when `readme` has no
    place for a table.
    """
    from . import plots

    texts = _texts(out, readme)
    _write(texts)
    return [*texts, *([] if board.is_collection(out) else plots.write(_groups(out), Path(out).expanduser()))]


def write_html(out: str | Path) -> Path:
    """Writes index.html from one result set, or from a folder of them."""
    from . import webpage

    folder = Path(out).expanduser()
    sets = board.sets(folder) if board.is_collection(folder) else {"": _groups(out)}
    place = folder / webpage.PAGE
    _write({place: webpage.page(sets)})
    return place


def check(out: str | Path, readme: str | Path | None = None) -> int:
    """0 when the generated texts are what the records say and the plots exist, else 1 with the differences."""
    from . import plots

    texts = _texts(out, readme)
    stale = differences(texts)
    if not board.is_collection(out):
        files = [figure.file for figure in plots.shown(_groups(out))]
        stale += [f"{file} is missing" for file in files if not (Path(out).expanduser() / file).is_file()]
    if not stale:
        print("\n".join(f"{place} is up to date." for place in texts))
        return 0
    option = f" --readme {readme}" if readme else ""
    print(f"{' and '.join(stale)}: run `python -m harness report --out {out}{option}`.")
    return 1


def _write(texts: dict[Path, str]) -> None:
    try:
        for place, text in texts.items():
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{error.filename}' cannot be written ({error.strerror}): choose another --out.") from None


def differences(texts: dict[Path, str]) -> list[str]:
    """Prints how generated texts differ from their files; returns a clause for each file that does."""
    lines: list[str] = []
    stale = []
    for place, text in texts.items():
        committed = place.read_text(encoding="utf-8") if place.is_file() else ""
        pair = committed.splitlines(), text.splitlines()
        if found := list(difflib.unified_diff(*pair, str(place), "records", n=0, lineterm="")):
            lines += found
            stale.append(f"{place} differs from its records")
    if lines:
        print("\n".join(line[:200] for line in lines[:SHOWN_DIFFERENCES]))
    if len(lines) > SHOWN_DIFFERENCES:
        print(f"... and {len(lines) - SHOWN_DIFFERENCES} more lines")
    return stale


def page(groups: Sequence[Group]) -> str:
    """The leaderboard as Markdown, the same text for the same records."""
    from . import plots

    parts = ["# Leaderboard", "Generated from `records.jsonl` by `python -m harness report`; do not edit.", HOW_TO_READ]
    parts += [f"![{figure.caption}]({figure.file})" for figure in plots.shown(groups)]
    for grid in grids(groups):
        parts += [f"## Speed-up by batch and context: {grid.title}", grid_table(grid)]
    for found in groups:
        parts += _section(found, groups) if found.rows else []
    parts += orderings.sections(groups)
    parts += _left_out(groups)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def excerpt(groups: Sequence[Group], link: str) -> str:
    """The leaderboard in short, for a README; `link` leads from there to the whole."""
    parts = []
    for found in groups:
        if found.rows:
            parts += [f"**{found.title}**", markdown(readme_columns(found), found.rows), _machine(found)]
            parts += _warnings(found)
    return "\n\n".join([*parts, f"Intervals, densities by site and preparation costs: [{PAGE}]({link})."])


def show(out: str | Path) -> None:
    """Prints the leaderboard to the terminal: a table of cost and one of quality, each at most 120 columns wide."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.width > WIDTH or not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    groups = _groups(out)
    for found in filter(lambda g: g.rows, groups):
        console.print(f"[bold]{found.title}[/bold]\n{found.details}", style="", markup=True)
        console.print(machine.line(found.machine), style="dim", markup=False)
        console.print(terminal(cost_columns(found), found.rows))
        if baselines := dense_baselines(found):
            console.print(f"dense, ms/step: {baselines}\n", markup=False)
        if found.synthetic:
            console.print("random weights: no accuracy\n", markup=False)
        else:
            console.print(terminal(quality_columns(found), found.rows))
    for record in _not_measured(groups):
        console.print(f"{record['status']}: {_name(record)}: {_reason(record)}", markup=False)


def _texts(out: str | Path, readme: str | Path | None) -> dict[Path, str]:
    """Every generated text by its file."""
    folder = Path(out).expanduser()
    if board.is_collection(folder):
        sets = board.sets(folder)
        sections = board.sections(sets)
        texts = {folder / PAGE: board.page(sections), folder / claims.PAGE: claims.page(claims.load(), sets)}
        if readme is not None:
            texts |= _between(readme, BOARD, lambda base: _headlines(sections, sets, _link(folder, base)))
        return texts
    groups = _groups(out)
    texts = {folder / PAGE: page(groups)}
    if readme is not None:
        texts |= _between(readme, TABLE, lambda base: excerpt(groups, _link(folder / PAGE, base)))
    return texts


def _between(readme: str | Path, marks: tuple[str, str], text: Callable[[Path], str]) -> dict[Path, str]:
    """`readme` with `text(its folder)` between the marks. Raises UsageError where they are missing."""
    place = Path(readme).expanduser()
    begin, end = marks
    before, opened, rest = (place.read_text(encoding="utf-8") if place.is_file() else "").partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise UsageError(f"'{readme}' has no place for a table: write '{begin}' and '{end}' where it belongs.")
    return {place: f"{before}{begin}\n\n{text(place.parent)}\n\n{end}{after}"}


def _link(target: Path, base: Path) -> str:
    return Path(os.path.relpath(target, base)).as_posix()


def _headlines(sections: Sequence[board.Section], sets: Mapping[str, Sequence[Group]], link: str) -> str:
    """The merged leaderboard and the claims in short, for a README."""
    verdicts = claims.summary([claims.judge(claim, sets) for claim in claims.load()])
    table = board.excerpt(sections, link)
    return f"{table} What the papers claim, beside these records: [{verdicts}]({link}/{claims.PAGE})."


def _groups(out: str | Path) -> list[Group]:
    """The tables of these records, computed once: their rows keep what they have resampled."""
    file = Path(out).expanduser() / store.FILE
    state = file.stat() if file.is_file() else None
    return _grouped(out, state and (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=1)
def _grouped(out: str | Path, state: object) -> list[Group]:
    records = store.latest(store.load(out))
    if not records:
        raise UsageError(f"'{out}' has no records: measure something first with `python -m harness run --out {out}`.")
    return group(records)


def _section(found: Group, groups: Sequence[Group]) -> list[str]:
    parts = [f"## {found.title}", f"{found.details}.", _machine(found)]
    parts += [note] if (note := claims.twin_note(found, groups)) else []
    parts += ["### Cost", markdown(cost_columns(found), found.rows)]
    if baselines := dense_baselines(found):
        parts.append(f"Dense in the same run, ms/step: {baselines}.")
    if prompts := prompt_columns(found):
        path = "CPU reference path, not ranked. " if found.on_cpu else ""
        parts += ["### Prefill, memory, energy", markdown(prompts, found.rows), path + HOW_TO_READ_PROMPTS]
    if kinds := breakdown_columns(found):
        parts += ["### Where a decode step's time goes, ms", markdown(kinds, found.rows), HOW_TO_READ_BREAKDOWN]
    if found.synthetic:
        parts.append("Random weights: FLOPs, bytes and time are meaningful, an accuracy does not exist.")
    else:
        parts += ["### Quality", markdown(quality_columns(found), found.rows)]
    if sites := site_columns(found):
        rows = [row for row in found.rows if not row.is_baseline]
        parts += ["### Density by site: mean (p99 over tokens)", markdown(sites, rows)] if rows else []
    if judged := predictor_columns(found):
        rows = [row for row in found.rows if row.predictors]
        parts += ["### Predictors, block by block", markdown(judged, rows), HOW_TO_READ_PREDICTORS]
    return [*parts, *_warnings(found)]


def _machine(found: Group) -> str:
    newest = max((row.record for row in found.rows), key=lambda record: str(record["time"]))
    units = {one.record["machine"].get("identity") for row in found.rows for one in row.repeats or [row]}
    more = f" · and {len(units) - 1} more of this kind" if len(units) > 1 else ""
    return f"Machine: {machine.line(newest['machine'], newest)}{more}"


def _warnings(found: Group) -> list[str]:
    """What casts doubt on the numbers of a group."""
    doubts = doubts_of(found.rows)
    return [f"**Caution:** {'; '.join(doubts)}."] if doubts else []


def _not_measured(groups: Sequence[Group]) -> list[Record]:
    return [record for found in groups for record in found.left_out]


def _left_out(groups: Sequence[Group]) -> list[str]:
    if not (records := _not_measured(groups)):
        return []
    body = [[_name(record), record["status"], _reason(record)] for record in records]
    return ["## Not measured", github(["cell", "status", "reason"], body)]


def _name(record: Record) -> str:
    cell: dict[str, Any] = record["cell"]
    density = "" if cell["density"] is None else f" {cell['density']:g}"
    return (
        f"{cell['method']}{density}, {cell['model']}, {cell['mode']}, batch {cell['batch']}, context {cell['context']}"
    )


def _reason(record: Record) -> str:
    lines = str(record.get("error") or "unknown").strip().splitlines()
    return lines[-1][:300] if lines else "unknown"
