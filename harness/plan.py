"""From command-line arguments to cells: everything is checked here, before any long work."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from methods.errors import UsageError

if TYPE_CHECKING:
    from methods.base import Method

    from .models import ModelSpec

ROOT = Path(__file__).parent.parent
BASELINES = ("dense", "null")
OFFLINE_TASKS = "stdlib_next_line,stdlib_identifier,stdlib_complete_line"
LIMIT, QUICK_LIMIT = 200, 40
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt")  # weights, config and tokenizer
MAX_BATCH = 64  # rows that the shared kernels take
# How results are shown does not change what was measured.
PRESENTATION = frozenset(
    "__main__.py cli.py ls.py report.py board.py claims.py claims.toml orderings.py orderings.toml webpage.py "
    "compare.py rows.py doubts.py grids.py tables.py formats.py plots progress.py".split()
)

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One measurement: a method with all its options at a target density, on a model, in a mode.

    `weights`: "real", "reference" or "synthetic". `context`: tokens in the cache when decoding is timed. `limit`: items
    per task. `timed`: whether latency is measured. `not_applicable` says why the method cannot serve this model or
    mode; it is no part of the key. `files`: what tells local files from others under the same names, "" without any.
    """

    model: str
    weights: str
    method: str
    options: dict[str, Any] = field(hash=False)
    density: float | None
    mode: str
    batch: int
    context: int
    tasks: tuple[str, ...]
    corpus: str
    limit: int
    seed: int
    device: str
    dtype: str
    timed: bool = True
    files: str = ""
    not_applicable: str | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The cell as the records hold it; `timed` only where it is not the rule."""
        cell = {**asdict(self), "tasks": list(self.tasks)}
        del cell["not_applicable"], cell["files"]
        if self.timed:
            del cell["timed"]
        return cell

    def cell_key(self, source: str, machine: str) -> str:
        """The name of this cell's result: same cell, same files, same source, same machine, same key."""
        parts = [self.to_dict(), source, machine, *([self.files] if self.files else [])]
        content = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people: `teal 0.5 on reference, decode, batch 1, context 384`."""
        method = ":".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])
        density = "" if self.density is None else f" {self.density:g}"
        return f"{method}{density} on {self.model}, {self.mode}, batch {self.batch}, context {self.context}"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`. Lists are separated by commas and multiply into cells."""
    add = parser.add_argument
    add("--methods", default="lte,teal", metavar="LIST", help="names, name:option=value, or all (default: lte,teal)")
    add("--model", default="reference", metavar="LIST", help="alias, folder or hub id (default: reference)")
    add("--weights", default="real", choices=("real", "synthetic"), help="synthetic: random, no accuracy")
    add("--density", metavar="LIST", help="target densities in (0, 1] (default: each method's own)")
    add("--mode", default="decode", metavar="LIST", help="decode, all or last-<x>%% (default: decode)")
    add("--tasks", default=OFFLINE_TASKS, metavar="LIST", help="lm-eval tasks or none (default: the offline three)")
    add("--corpus", default="stdlib", help="stdlib, python, wikitext2, c4 or .txt/.jsonl files (default: stdlib)")
    add("--batch", default="1", metavar="LIST", help="sequences decoded at once (default: 1)")
    add("--context", metavar="LIST", help="tokens in the cache (default: 512, or 3/4 of what the model can hold)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    add("--dtype", default="auto", help="bf16, fp16, fp32 or auto: bf16 on a GPU, fp32 on a CPU (default: auto)")
    add("--out", default="results/local", help="folder of the records (default: results/local)")
    add("--quick", action="store_true", help=f"a first look: {QUICK_LIMIT} items per task")
    add("--limit", type=int, metavar="N", help=f"items per task (default: {LIMIT})")
    add("--no-latency", action="store_true", help="quality and cost only, so that runs can share a GPU")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the device (default: 1)")
    add("--seed", default="0", metavar="LIST", help="of every random choice (default: 0)")
    add("--dry-run", action="store_true", help="print the cells and what they would cost, and stop")
    add("--force", action="store_true", help="measure cells again that are done")


def split(text: str, flag: str) -> list[str]:
    """The entries of a comma-separated list, without repetitions. Raises UsageError for an empty one."""
    entries = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not entries:
        raise UsageError(f"{flag} is empty: give at least one value, or leave the flag out.")
    return entries


def build_plan(args: argparse.Namespace) -> list[Cell]:
    """The cells of a run: models x seeds x batches x contexts x modes x (dense, null, methods x densities).

    A method that cannot serve a model or mode stays in the plan with its reason, unless it was the only one asked for.
    Raises UsageError for anything that is wrong with the arguments or missing on this machine.
    """
    from . import models
    from .corpus import NAMED, load_corpus

    methods, asked = _methods(args.methods)
    specs = [models.resolve(name) for name in split(args.model, "--model")]
    densities = None if args.density is None else numbers(args.density, "--density", _density)
    modes = [_mode(name) for name in split(args.mode, "--mode")]
    batches = numbers(args.batch, "--batch", _positive)
    if args.no_latency and max(batches) > 1:
        raise UsageError(
            "--no-latency leaves out the steps that tell what a batch reads, and no quality depends on it: "
            "drop --no-latency or --batch."
        )
    contexts = None if args.context is None else numbers(args.context, "--context", _positive)
    limit = args.limit if args.limit is not None else QUICK_LIMIT if args.quick else LIMIT
    if limit < 1:
        raise UsageError(f"--limit is {limit}: give 1 or more, or --tasks none.")
    if args.workers < 1:
        raise UsageError(f"--workers is {args.workers}: give 1 or more, or leave the flag out.")
    if args.workers > 1 and not args.no_latency:
        raise UsageError("--workers above 1 needs --no-latency, since timed cells need the machine to themselves.")
    seeds = numbers(args.seed, "--seed", _seed)
    tasks = _tasks(args.tasks)
    device = models.resolve_device(args.device)
    dtype = models.resolve_dtype(args.dtype, device)
    text = "" if args.corpus in NAMED else load_corpus(args.corpus).hash  # its files must exist and be readable

    cells = []
    for spec in specs:
        models.check(spec, args.weights)
        config = models.config(spec)
        synthetic = args.weights == "synthetic"
        files = _files(spec, "" if synthetic else text, () if synthetic else tasks)
        # Modes innermost: all cells of one batch and context share the dense runners that were built for these.
        stepping = synthetic or not args.no_latency
        settings = product(batches, _contexts(spec.name, config, contexts, stepping), modes)
        for seed, (batch, context, mode), method in product(seeds, settings, methods):
            for density in _method_densities(method, densities):
                cells.append(
                    Cell(
                        model=spec.name,
                        weights="synthetic" if synthetic else spec.kind,
                        method=method.name,
                        options=method.given,
                        density=density,
                        mode=mode,
                        batch=batch,
                        context=context,
                        tasks=() if synthetic else tasks,
                        corpus=args.corpus,
                        limit=limit,
                        seed=seed,
                        device=device,
                        dtype=dtype,
                        timed=not args.no_latency,
                        files=files,
                        not_applicable=_why_not(method, config, density, mode, batch),
                    )
                )
    if len(asked) == 1:
        reasons = [cell.not_applicable for cell in cells if cell.method == asked[0].name]
        if reasons and all(reasons):
            raise UsageError(f"{asked[0].name} cannot run here: {reasons[0]}")
    return cells


def notes(cells: Sequence[Cell]) -> list[str]:
    """What a user may not expect of these cells."""
    found = []
    if any(cell.weights == "synthetic" for cell in cells):
        found.append("random weights have FLOPs, bytes and latency only: perplexity and tasks are skipped.")
    if any(cell.device == "cpu" and cell.timed for cell in cells):
        found.append("without a GPU the latency is that of the CPU reference path: labelled so, never ranked.")
    if skipped := sum(cell.not_applicable is not None for cell in cells):
        found.append(f"{skipped} of {len(cells)} cells are not applicable; the table says why.")
    return found


def describe(
    cells: Sequence[Cell], estimates: Sequence[dict[str, Any] | None] | None = None, more: Sequence[str] = ()
) -> str:
    """The plan as a table for `--dry-run`; `estimates`: one dict of further columns (unit in the name) per cell,
    `more`: notes on them."""
    from tabulate import tabulate

    extra = estimates or [None] * len(cells)
    columns = list(dict.fromkeys(key for estimate in extra for key in estimate or ()))
    shared = ("model", "weights", "mode", "batch", "context", "device", "dtype", "corpus", "limit", "seed")
    varying = [name for name in shared if len({getattr(cell, name) for cell in cells}) > 1]
    fixed = [f"{name} {getattr(cells[0], name)}" for name in shared if name not in varying] if cells else []
    rows = []
    for cell, estimate in zip(cells, extra, strict=True):
        options = ", ".join(f"{k}={v}" for k, v in cell.options.items())
        rows.append(
            [*(getattr(cell, name) for name in varying), cell.method, options or "-"]
            + ["-" if cell.density is None else f"{cell.density:g}"]
            + [(estimate or {}).get(column, "-") for column in columns]
            + ([cell.not_applicable or ""] if any(c.not_applicable for c in cells) else [])
        )
    headers = [*varying, "method", "options", "density", *columns]
    headers += ["not applicable because"] if any(c.not_applicable for c in cells) else []
    widths = [None] * (len(headers) - 1) + [60]
    table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, maxcolwidths=widths)
    tasks = f"tasks: {', '.join(cells[0].tasks) or 'none'}" if cells else ""
    lines = [f"{len(cells)} cells", ", ".join(fixed), tasks, "", table]
    return "\n".join([*lines, "", *(f"note: {note}" for note in (*notes(cells), *more))]).rstrip()


@cache
def source_hash() -> str:
    """A hash of our code and data tables, by content; files that only show results are left out."""
    origin = find_spec("sparse_kernels")
    kernels = Path(origin.origin).parent if origin and origin.origin else ROOT / "kernels" / "sparse_kernels"
    digest = hashlib.sha256()
    for name, folder in (("methods", ROOT / "methods"), ("sparse_kernels", kernels), ("harness", ROOT / "harness")):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".toml")):
            if name == "harness" and path.relative_to(folder).parts[0] in PRESENTATION:
                continue
            digest.update(f"{name}/{path.relative_to(folder).as_posix()}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any]:
    """`commit` and `dirty` of our checkout; None for both where the code is not in a git repository of its own."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), "-c", "core.fileMode=false", *arguments]  # a copy may lose those bits
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--", "methods", "kernels", "harness", "pyproject.toml")
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


def numbers(text: str, flag: str, convert: Callable[[str, str], T]) -> list[T]:
    """The entries of a list flag, each through `convert(entry, flag)`. Raises UsageError."""
    return list(dict.fromkeys(convert(part, flag) for part in split(text, flag)))


def _positive(text: str, flag: str) -> int:
    return _whole(text, flag, 1)


def _seed(text: str, flag: str) -> int:
    return _whole(text, flag, 0, 2**32 - 1)  # the most that every generator takes


def _whole(text: str, flag: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f"from {least}" + ("" if most is None else f" to {most}")
        raise UsageError(f"'{text}' is no value for {flag}: give whole numbers {limits}, like {flag} {least},8.")
    return value


def _density(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        hint = (
            f"did you mean {value / 100:g}?" if 2 <= value <= 100 else f"give numbers in (0, 1], like {flag} 0.3,0.5."
        )
        raise UsageError(f"'{text}' is no density (the share that stays active): {hint}")
    return value


def _mode(name: str) -> str:
    from methods.base import parse_mode

    parse_mode(name)
    return name


def _methods(text: str) -> tuple[list[Method], list[Method]]:
    """All methods of the run, dense and null first, and those that the user named."""
    from methods import registry

    names = split(text, "--methods")
    if names == ["all"]:
        return [registry.parse(name) for name in registry.names()], []
    if "all" in names:
        raise UsageError("--methods all has every method already: give either all or names.")
    asked = [registry.parse(name) for name in names]
    given = {method.name for method in asked}
    methods = [*asked, *(registry.parse(name) for name in BASELINES if name not in given)]
    return sorted(methods, key=lambda m: BASELINES.index(m.name) if m.name in BASELINES else len(BASELINES)), asked


def _method_densities(method: Method, asked: Sequence[float] | None) -> Sequence[float | None]:
    """The method's own densities, unless the user gave some and the method has any to set."""
    own = tuple(method.densities) or (None,)
    return own if asked is None or method.name in BASELINES or own == (None,) else asked


def _why_not(method: Method, config: Any, density: float | None, mode: str, batch: int) -> str | None:
    from methods.families import layout_of

    kind = "last" if mode.startswith("last-") else mode
    if kind not in method.modes:
        return f"{method.name} has no mode '{mode}', only {', '.join(method.modes)}."
    if method.name == "dense":
        return None
    if batch > MAX_BATCH:
        return f"the shared kernels decode at most {MAX_BATCH} sequences at once: give --batch {MAX_BATCH} or less."
    try:
        layout_of(config)
    except UsageError as error:
        return str(error)
    return method.why_not(config) or (None if density is None else method.unreachable(config, density))


def _contexts(model: str, config: Any, asked: Sequence[int] | None, stepping: bool) -> Sequence[int]:
    """The contexts of a model's cells. `stepping`: tokens follow the context, as they do when steps are timed.

    Rotary embeddings reach past the positions of their training; a table of positions ends where it ends.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions:
        return asked or [512]
    most: int = positions
    if stepping and not getattr(text, "rope_parameters", None):
        from .latency import ROOM

        most = positions - ROOM
        if most < 1:
            raise UsageError(
                f"{model} has {positions} positions and the steps after a context take {ROOM}: use real weights with "
                "--no-latency, or another model."
            )
    if asked is None:
        return [min(512, positions * 3 // 4, most)]
    if max(asked) > most:
        why = f"the {positions} positions of {model}"
        why += "" if most == positions else f" hold beside {positions - most} steps"
        raise UsageError(f"--context {max(asked)} is more than {why}: give {most} or less.")
    return asked


def _files(spec: ModelSpec, text: str, tasks: Sequence[str]) -> str:
    """A hash over the local files that cells read: those of the model and the tasks by size and time of change, the
    corpus by the hash of its text. Empty where there are none, so that named things keep their keys."""
    from .tasks import is_yaml

    folder = spec.path if spec.path and spec.kind == "real" else None
    files = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES] if folder else []
    files += [Path(name) for name in tasks if is_yaml(name)]
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(f"{text}{stamps}".encode()).hexdigest()[:16] if text or stamps else ""


def _tasks(text: str) -> tuple[str, ...]:
    from .tasks import check

    names = split(text, "--tasks")
    if "none" in names:
        if len(names) > 1:
            raise UsageError("--tasks none excludes other tasks: give either none or names.")
        return ()
    check(names)
    return tuple(names)
