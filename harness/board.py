"""All result sets of a folder as one: `results/<set>/records.jsonl`."""

from __future__ import annotations

from pathlib import Path

from . import store
from .rows import Group, group

PRIVATE = "local"  # the user's own results, which no committed page may depend on


def is_collection(folder: str | Path) -> bool:
    """Whether the folder holds result sets rather than records of its own."""
    place = Path(folder).expanduser()
    return not (place / store.FILE).is_file() and bool(_folders(place))


def sets(folder: str | Path) -> dict[str, list[Group]]:
    """The tables of each result set, by the name of its folder."""
    return {place.name: group(store.latest(store.load(place))) for place in _folders(Path(folder).expanduser())}


def _folders(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob(f"*/{store.FILE}") if p.parent.name != PRIVATE)
