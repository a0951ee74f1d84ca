"""The one exception that means: the user asked for something impossible, and here is what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """One sentence with a suggestion; the command line prints it and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """A `UsageError` for a name that does not exist, with the nearest names that do."""
    names = sorted(known)
    near = get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}."
    return UsageError(f"unknown {kind} '{name}': {advice}{' ' + hint if hint else ''}")
