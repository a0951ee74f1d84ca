"""The command line: finds the verb, turns a UsageError into one line and exit code 2. One file per verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from methods.errors import UsageError, unknown

DISTRIBUTION = "activation-sparsity-benchmark"
VERBS = {
    "run": "measure methods on a model: FLOPs, bytes, latency, perplexity, tasks",
    "ls": "list methods, models and tasks",
    "prepare": "calibrate or train a method's artifact and save it",
    "report": "rebuild the leaderboard and the plots from the records",
    "compare": "say what is faster, slower or less accurate in one result set than in another",
    "bench": "time the kernels against the memory limit and dense libraries",
}
INTERRUPTED = 130
OURS = ("harness", "methods", "sparse_kernels.")  # a module of these that is missing is our mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 (it says why), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or OURS[0]).startswith(OURS):
            raise
        print(
            f"error: this Python has no module '{error.name}': run `pip install -e .` where pyproject.toml is, "
            "and start with the Python it went to.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        again = " Finished cells are kept: the same command goes on from there." if arguments[:1] == ["run"] else ""
        print(f"\ninterrupted.{again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `harness ls | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        print(f"harness {_version()}")
        return 0
    if verb not in VERBS:
        raise unknown("command", verb, VERBS, "`python -m harness --help` explains them.")
    module = import_module(f".{verb}", __package__)  # only this verb's: `ls` must not wait for torch
    parser = argparse.ArgumentParser(f"python -m harness {verb}", description=VERBS[verb], allow_abbrev=False)
    module.add_arguments(parser)
    return module.main(parser.parse_args(rest))


def _overview() -> str:
    verbs = "\n".join(f"  {name:<9} {text}" for name, text in VERBS.items())
    return (
        "usage: python -m harness <command> [options]\n\n"
        "Compares activation-sparsity methods for language models.\n\n"
        f"{verbs}\n\n"
        "`python -m harness <command> --help` shows the options; `--version` the version."
    )


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # a checkout that is not installed
        import tomllib

        project = Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"] if project.is_file() else "unknown"
