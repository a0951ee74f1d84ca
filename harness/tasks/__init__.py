"""The tasks a run can score: three built in, made from held-out standard-library code, and whatever lm-eval knows.

`TASKS` and `check` need neither torch nor lm-eval for the built-in names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from methods.errors import UsageError, unknown


@dataclass(frozen=True)
class Task:
    """What a built-in task measures. `chance`: the score of guessing, as a share."""

    name: str
    metric: str
    chance: float
    description: str
    higher_is_better: bool = True


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("stdlib_next_line", "acc_norm", 0.25, "which of 4 lines of the file comes next"),
        Task("stdlib_identifier", "acc", 0.25, "which of 4 identifiers seen before stands here"),
        Task("stdlib_complete_line", "exact_match", 0.0, "write the last few characters of a line"),
    )
}


def check(names: Iterable[str]) -> None:
    """Raises `UsageError`, with the nearest names, unless every task exists. Loads no data.

    Built-in names and YAML paths are checked at once; any other name against lm-eval's index, which takes seconds.
    """
    for name in names:
        if name in TASKS:
            continue
        if is_yaml(name):
            if not Path(name).is_file():
                raise UsageError(f"no such task file '{name}': give the path of an lm-eval YAML file.")
        elif get_close_matches(name.lower(), TASKS, n=1, cutoff=0.8):
            raise unknown("task", name, TASKS)  # at once: lm-eval's index takes some ten seconds
        elif name not in (known := manager().all_tasks):
            raise unknown("task", name, [*TASKS, *known] if _near(name, known) else TASKS)


def is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@cache
def manager(defaults: bool = True) -> Any:
    """lm-eval's task manager; with its own 14 000 YAML files (some ten seconds) only if `defaults`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _near(name: str, known: Iterable[str]) -> bool:
    return bool(get_close_matches(name.lower(), list(known), n=1, cutoff=0.5))
