"""Nothing appended is lost or doubled, whatever kills the writer; what cannot be stored is said in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import store
from methods.errors import UsageError

WRITER = """
import sys
from harness import store
n = int(sys.argv[2])
while True:
    rest = {"status": "ok", "cell": {}, "machine": {}, "time": "", "pad": "x" * 20000}
    store.append(sys.argv[1], {"key": str(n), **rest})
    print(n, flush=True)  # acknowledged
    n += 1
"""


def entry(key: str, status: str = "ok") -> store.Record:
    return {"key": key, "status": status, "cell": {}, "machine": {}, "time": "2026-01-01T00:00:00+00:00"}


def keys(folder: Path) -> list[str]:
    return [record["key"] for record in store.load(folder)]


def test_round_trip_in_order(tmp_path: Path) -> None:
    for key in "abc":
        store.append(tmp_path / "new" / "folder", entry(key))
    assert keys(tmp_path / "new" / "folder") == ["a", "b", "c"]
    assert store.load(tmp_path / "new" / "folder")[0]["schema"] == store.SCHEMA


def test_cells_are_known_by_their_newest_record_once_finished_by_that(tmp_path: Path) -> None:
    assert store.by_key(tmp_path / "absent") == {}
    told = (("a", "ok"), ("b", "failed"), ("c", "not-applicable"), ("d", "failed"), ("d", "ok"), ("d", "failed"))
    for key, status in told:
        store.append(tmp_path, entry(key, status))
    found = {key: record["status"] for key, record in store.by_key(tmp_path).items()}
    assert found == {"a": "ok", "b": "failed", "c": "not-applicable", "d": "ok"}


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    import numpy as np
    import torch

    values = [
        float("nan"),
        float("inf"),
        np.float32("nan"),
        np.int64(3),
        np.arange(2),
        torch.tensor(1.5),
        (1, None),
        Path("p"),
    ]
    store.append(tmp_path, {**entry("a"), "values": values, 3: {"x": -float("inf")}})
    (found,) = store.load(tmp_path)
    assert found["values"] == [None, None, None, 3, [0, 1], 1.5, [1, None], "p"]
    assert found["3"] == {"x": None}
    assert "NaN" not in (tmp_path / store.FILE).read_text()


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_torn_last_line_is_ignored_and_removed(tmp_path: Path, cut: int) -> None:
    store.append(tmp_path, entry("a"))
    whole = json.dumps(entry("torn"))
    with (tmp_path / store.FILE).open("a") as file:
        file.write(whole[:cut])
    assert keys(tmp_path) == ["a"]
    store.append(tmp_path, entry("b"))
    assert keys(tmp_path) == ["a", "b"]
    assert len((tmp_path / store.FILE).read_text().splitlines()) == 2


def test_complete_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / store.FILE).write_text(json.dumps(entry("a")))
    assert keys(tmp_path) == ["a"]
    store.append(tmp_path, entry("b"))
    assert keys(tmp_path) == ["a", "b"]


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / store.FILE).write_text(f"{json.dumps(entry('a'))}\n{{broken\n{json.dumps(entry('b'))}\n")
    with pytest.raises(UsageError, match="line 2"):
        store.load(tmp_path)


@pytest.mark.parametrize("line", ['{"hello": 1}', '{"schema": "v3"}', "{}", '{"key": "a", "status": "ok"}'])
@pytest.mark.parametrize("end", ["", "\n"])
def test_json_that_is_no_record_is_an_error(line: str, end: str, tmp_path: Path) -> None:
    """Also as the last line: what a kill leaves of a record is no JSON object."""
    (tmp_path / store.FILE).write_text(f"{json.dumps(entry('a'))}\n{line}{end}")
    for read in (store.load, store.by_key):
        with pytest.raises(UsageError, match="line 2 of .* is not a record"):
            read(tmp_path)


def test_newer_schema_is_an_error(tmp_path: Path) -> None:
    store.append(tmp_path, {"schema": store.SCHEMA + 1, "written": "in another way"})
    with pytest.raises(UsageError, match="update"):
        store.load(tmp_path)


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="choose another --out"):
            store.append(out, entry("a"))
        with pytest.raises(UsageError, match="no folder"):
            store.load(out)


def test_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(tmp_path, entry("a"))
    before = (tmp_path / store.FILE).read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(UsageError, match="full"):
        store.append(tmp_path, entry("b"))
    assert (tmp_path / store.FILE).read_bytes() == before


def test_killed_writers_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    next_key, acknowledged = 0, []
    for attempt in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(next_key)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged.append(int(writer.stdout.readline()))
        time.sleep(0.01 * attempt + 0.003)
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        writer.stdout.close()
        found = [int(key) for key in keys(tmp_path)]
        # The last one may be on disk without its writer having lived to say so.
        assert found[: len(acknowledged)] == acknowledged and len(found) <= len(acknowledged) + 1
        acknowledged, next_key = found, found[-1] + 1
    assert found == list(range(next_key)) and len(found) > 6


def test_concurrent_writers_do_not_mix(tmp_path: Path) -> None:
    code = WRITER.replace("while True:", "for _ in range(30):")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(1000 * i)], stdout=subprocess.DEVNULL)
        for i in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(map(int, keys(tmp_path))) == [1000 * i + n for i in range(3) for n in range(30)]
