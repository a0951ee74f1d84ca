"""`prepare`: calibrates or trains the artifacts of a run, without measuring anything."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from methods.errors import UsageError

from . import plan


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

    groups: dict[tuple[str, str, tuple[tuple[str, object], ...]], list[float | None]] = {}
    for cell in cells:
        if cell.not_applicable:
            print(f"note: {cell.not_applicable}", file=sys.stderr)
        else:
            groups.setdefault((cell.model, cell.method, tuple(cell.options.items())), []).append(cell.density)
    from methods.registry import create

    corpus = load_corpus(args.corpus)
    with Display([1.0] * len(groups)) as display:
        for (name, method_name, given), densities in groups.items():
            method = create(method_name, dict(given))
            loaded = models.load(models.resolve(name), "real", cells[0].device, cells[0].dtype, args.seed)
            with display.cell(f"{method_name} on {name}"):
                found = artifacts.obtain(loaded, method, densities, corpus, args.seed, display, args.force)
                for density, artifact in zip(densities, found, strict=True):
                    spent = artifact.manifest.get("seconds")
                    display.say(f"  {method_name} {density}: {artifact.hash}, prepared in {spent} s")
                    if args.save and machine.rank() == 0:
                        suffix = "" if density is None else f"-{density:g}"
                        place = Path(args.save) / Path(name).name / f"{method_name}{suffix}"
                        display.say(f"  saved in {artifact.save_pretrained(place)}")
    return 0
