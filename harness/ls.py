"""`python -m harness ls`: what there is to choose from. Imports no torch, so it answers at once."""

from __future__ import annotations

import argparse
import json
from typing import Any

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("methods", "models", "tasks"), help="default: all three")
    parser.add_argument("--json", action="store_true", help="machine-readable, with every field")


def main(args: argparse.Namespace) -> int:
    listings = {"methods": methods, "models": models, "tasks": tasks}
    chosen = [args.what] if args.what else list(listings)
    rows = {name: listings[name]() for name in chosen}
    if args.json:
        print(json.dumps(rows[args.what] if args.what else rows, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_table(name, rows[name]) for name in chosen))
    return 0


def methods() -> list[Row]:
    """The registered methods, third parties' too."""
    from methods import registry

    found = []
    for name in registry.names():
        method = registry.info(name)
        found.append(
            {
                "name": name,
                "summary": method.summary,
                "training": method.training,
                "sites": list(method.sites),
                "activation": method.activation,
                "modes": list(method.modes),
                "paper": method.paper,
                "fidelity": method.fidelity,
                "origin": method.origin,
            }
        )
    return found


def models() -> list[Row]:
    """The aliases of --model."""
    from .models import aliases, resolve

    found = []
    for name in aliases():
        spec = resolve(name)
        found.append(
            {
                "name": name,
                "id": spec.hub_id or ("embedded" if spec.path else "-"),
                "parameters": spec.parameters,
                "layout": spec.layout,
                "activation": spec.activation,
                "gated": spec.gated,
                "mirror": spec.mirror,
                "revision": spec.revision,
                "note": spec.note,
            }
        )
    return found


def tasks() -> list[Row]:
    """The built-in tasks; lm-eval's own names work as well."""
    from .tasks import TASKS

    return [
        {"name": task.name, "metric": task.metric, "chance": task.chance, "description": task.description}
        for task in TASKS.values()
    ]


def _table(what: str, rows: list[Row]) -> str:
    from tabulate import tabulate

    shown = {
        "methods": ("name", "training", "sites", "activation", "modes", "summary", "origin"),
        "models": ("name", "id", "parameters", "activation", "layout", "gated"),
        "tasks": ("name", "metric", "chance", "description"),
    }[what]
    body = [[_text(key, row[key]) for key in shown] for row in rows]
    table = tabulate(body, shown, tablefmt="simple", disable_numparse=True)
    hints = {
        "methods": "Options: --methods name:option=value.",
        "models": "A folder or a Hugging Face id works too.",
        "tasks": "Any lm-eval task or YAML file works too.",
    }
    return f"{table}\n\n{hints[what]}"


def _text(key: str, value: Any) -> str:
    if key == "parameters":
        return "-" if value is None else f"{value / 1e9:.2f} B"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "-" if value is None else str(value)
