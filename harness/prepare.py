"""`prepare`: calibrates or trains the artifacts of a run, without measuring anything."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from methods.errors import UsageError

from . import plan
from .plan import Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", default="lte,teal", metavar="LIST", help="names, or name:option=value (default: lte,teal)")
    add("--model", default="reference", metavar="LIST", help="alias, folder or hub id (default: reference)")
    add("--density", metavar="LIST", help="target densities in (0, 1] (default: each method's own)")
    add("--corpus", default="stdlib", help="text to calibrate or train on (default: stdlib)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    add("--dtype", default="auto", help="bf16, fp16, fp32 or auto (default: auto)")
    add("--seed", type=int, default=0, help="of clustering and training (default: 0)")
    add("--save", metavar="FOLDER", help="also save each artifact as FOLDER/<model>/<method>-<density>")
    add("--force", action="store_true", help="prepare anew what is cached or shipped")


def main(args: argparse.Namespace) -> int:
    options = vars(args) | {
        "weights": "real",
        "mode": "all",
        "tasks": "none",
        "batch": "1",
        "context": "1",
        "out": args.save or "results/local",
        "quick": False,
        "no_latency": True,
        "workers": 1,
        "seed": str(args.seed),
        "limit": None,
    }
    cells = [c for c in plan.build_plan(argparse.Namespace(**options)) if c.method not in plan.BASELINES]
    if not cells:
        raise UsageError("these methods have nothing to prepare: name one that calibrates or trains, like teal.")
    from . import artifacts, machine, models
    from .corpus import load_corpus
    from .progress import Display

    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if cell.not_applicable:
            print(f"note: {cell.not_applicable}", file=sys.stderr)
        else:
            groups.setdefault((cell.model, cell.method, tuple(cell.options.items())), []).append(cell)
    from methods.registry import create

    targets = _targets(args.save, [cell for group in groups.values() for cell in group]) if args.save else {}
    for place in targets.values():
        artifacts.ensure_writable(place, "choose another --save")
    corpus = load_corpus(args.corpus)
    with Display([1.0] * len(groups)) as display:
        for group in groups.values():
            first, densities = group[0], [cell.density for cell in group]
            method = create(first.method, first.options)
            loaded = models.load(models.resolve(first.model), "real", first.device, first.dtype, args.seed)
            with display.cell(f"{first.method} on {first.model}"):
                found = artifacts.obtain(loaded, method, densities, corpus, args.seed, display, args.force)
                for cell, artifact in zip(group, found, strict=True):
                    spent = artifact.manifest.get("seconds")
                    display.say(f"  {cell.method} {cell.density}: {artifact.hash}, prepared in {spent} s")
                    if cell in targets and machine.rank() == 0:
                        display.say(f"  saved in {artifact.save_pretrained(targets[cell])}")
            del loaded  # before the next one comes
    return 0


def _targets(save: str, cells: Sequence[Cell]) -> dict[Cell, Path]:
    """Where each artifact goes, with the options in names that would be the same. UsageError if these do not help."""

    def place(cell: Cell, full: bool) -> Path:
        options = [f"{name}={value}" for name, value in cell.options.items()] if full else []
        density = [] if cell.density is None else [f"{cell.density:g}"]
        return Path(save).expanduser() / Path(cell.model).name / "-".join([cell.method, *options, *density])

    short = Counter(place(cell, False) for cell in cells)
    targets = {cell: place(cell, short[place(cell, False)] > 1) for cell in cells}
    for target, number in Counter(targets.values()).items():
        if number > 1:
            raise UsageError(
                f"{number} artifacts would be saved as '{target}': prepare them one by one, each with a --save."
            )
    return targets
