"""Append-only results: one JSON line per measured cell in `<out>/records.jsonl`.

A process may be killed at any byte of a write: a torn last line is ignored by readers and removed by the next append.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from methods.errors import UsageError

from . import machine

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None  # type: ignore[assignment]

MEASURED = ("density", "cost", "fidelity", "accuracy", "latency", "prepare")  # sections that seeds are averaged over
SCHEMA = 1
FILE = "records.jsonl"
NEEDED = {"key": str, "status": str, "cell": dict, "machine": dict, "time": str}  # what every reader relies on
FINISHED = ("ok", "not-applicable")

Record = dict[str, Any]


def ensure_writable(out: str | Path) -> Path:
    """Creates the folder. Raises UsageError when records could not be appended there."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644))
    except OSError as error:
        raise UsageError(f"results cannot be written to '{out}' ({error.strerror}): choose another --out.") from None
    return folder


def append(out: str | Path, record: Record) -> None:
    """Appends one record durably: one write under a lock, then fsync. NaN and infinity become null.

    Raises UsageError when the folder is not writable or the disk is full; the file then is as it was before.
    """
    line = json.dumps(_plain({"schema": SCHEMA, **record}), ensure_ascii=False, allow_nan=False) + "\n"
    folder = ensure_writable(out)
    with _locked(folder / FILE, os.O_RDWR | os.O_APPEND) as descriptor:
        size = _repair(descriptor)
        data = line.encode()
        try:
            written = os.write(descriptor, data)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise UsageError(f"a record cannot be written to '{out}' ({error.strerror}): free some space.") from None
        if written != len(data):
            os.ftruncate(descriptor, size)
            raise UsageError(f"the disk of '{out}' is full: free some space and run the command again.")


def load(out: str | Path) -> list[Record]:
    """All records in the order of writing; none if there is no file.

    Raises UsageError for a folder that does not exist, a damaged line, or records of a newer schema.
    """
    folder = Path(out).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder '{out}': measure something first with `python -m harness run`.")
    path = folder / FILE
    if not path.is_file():
        return []
    with _locked(path, os.O_RDONLY) as descriptor:
        lines = _read(descriptor).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None and number == len(lines):  # torn by a kill in the middle of a write
            break
        schema = record.get("schema", 0) if record else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise UsageError(f"'{path}' has records of schema {schema}, this version reads up to {SCHEMA}: update it.")
        if record is None or not all(isinstance(record.get(name), kind) for name, kind in NEEDED.items()):
            raise UsageError(f"line {number} of '{path}' is not a record: restore or remove that line.")
        records.append(record)
    return records


def so_far(out: str | Path) -> list[Record]:
    """As `load`, of a folder that a run may only be about to make."""
    return load(out) if Path(out).expanduser().is_dir() else []


def by_key(out: str | Path) -> dict[str, Record]:
    """The newest record of every cell that has one; once it is finished (measured, or not applicable), such a one."""
    return {r["key"]: r for r in sorted(so_far(out), key=lambda r: r["status"] in FINISHED)}


def place(record: Record) -> str:
    """Where a record was measured, as far as it matters to the table it stands in: times are those of one machine, the
    rest is that of any machine with the same model of GPU or CPU and the same versions."""
    if record["cell"].get("timed", True):
        return str(record["machine"].get("identity"))
    return machine.kind(record["machine"])


def same_content(one: Record, other: Record) -> bool:
    """Whether two records are of the same weights and text, as far as both tell."""
    for part, name in (("model", "fingerprint"), ("corpus", "hash")):
        found = {(record.get(part) or {}).get(name) for record in (one, other)} - {None}
        if len(found) > 1:
            return False
    return True


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each cell at each place, whatever source measured it; order of first appearance."""
    newest: dict[str, Record] = {}
    for record in records:
        newest[json.dumps([record["cell"], place(record)], sort_keys=True)] = record
    return list(newest.values())


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


def _read(descriptor: int, start: int = 0) -> bytes:
    chunks = []
    os.lseek(descriptor, start, os.SEEK_SET)
    while chunk := os.read(descriptor, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def _repair(descriptor: int) -> int:
    """Ends a complete last line that lacks its newline, removes a torn one; returns the size of the file."""
    size = os.fstat(descriptor).st_size
    if size == 0 or _read(descriptor, size - 1) == b"\n":
        return size
    content = _read(descriptor)
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is not None:
        os.write(descriptor, b"\n")
        return size + 1
    os.ftruncate(descriptor, start)
    return start


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: Any) -> Any:
    """The value as JSON holds it: numpy and torch scalars as numbers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def mean_record(records: list[Record]) -> Record:
    """The newest record, with what was measured averaged."""
    newest = max(records, key=lambda record: str(record["time"]))
    return {**newest, "items": {}, **{name: mean([record.get(name) for record in records]) for name in MEASURED}}


def mean(values: list[Any]) -> Any:
    """Numbers averaged through all levels, over the values that have them; of anything else the last value."""
    known = [value for value in values if value is not None and value != {}]
    if known and all(isinstance(value, dict) for value in known):
        names = [name for name in dict.fromkeys(n for value in known for n in value) if name != "samples"]
        return {name: mean([value[name] for value in known if name in value]) for name in names}
    if known and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        return known[0] if len(set(known)) == 1 else sum(known) / len(known)
    if known and all(isinstance(value, list) and len(value) == len(known[0]) for value in known):
        return [mean(list(members)) for members in zip(*known, strict=True)]
    return known[-1] if known else values[-1]
