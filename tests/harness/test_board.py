"""The leaderboard over several result sets: sections, ranks with their uncertainty, and what each column says."""

from pathlib import Path
from typing import Any

import pytest

from harness import board, report, rows
from harness.rows import Rank
from harness.tables import NONE
from methods.errors import UsageError
from tests.harness.fabricated import FULL, GPU, record, synthetic, write


def on(gpu: str | None, found: dict[str, Any], **machine: Any) -> dict[str, Any]:
    """The record as if measured on this kind of GPU; None: without one."""
    place = None if gpu is None else {**GPU, "name": gpu}
    return {**found, "machine": {**found["machine"], "identity": f"{gpu}{machine}", **machine, "gpu": place}}


def merged(tmp_path: Path, **sets: list[dict[str, Any]]) -> str:
    for name, records in sets.items():
        write(tmp_path / name, records)
    return board.page(board.sections(board.sets(tmp_path)))


def table(text: str) -> list[list[str]]:
    """The cells of the first table, with its titles."""
    lines = [line for line in text.split("\n\n|")[1].split("\n\n")[0].splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def column(text: str, title: str) -> dict[str, str]:
    titles, *body = table(text)
    method, target, wanted = (titles.index(name) for name in ("method", "target density", title))
    return {f"{line[method]} {line[target]}".removesuffix(" –"): line[wanted] for line in body}


def test_one_section_per_model_and_kind_of_gpu(tmp_path: Path) -> None:
    other = [on("Other GPU", record()), on("Other GPU", record("teal", 0.7))]
    text = merged(tmp_path, one=FULL, two=other, cpu=[on(None, record(device="cpu"))])
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## reference (reference weights) on Other GPU",
        "## reference (reference weights) on Test GPU",
        "## reference (reference weights) on Test CPU",
        "## Fidelity of the methods",
    ]
    one, two = text.split("on Test GPU")[1], text.split("on Other GPU")[1].split("## ref")[0]
    assert "[two](two/records.jsonl)" in two and "[one]" not in two and "[two]" not in one


def test_order_is_by_rank_and_the_losers_stay(tmp_path: Path) -> None:
    text = merged(tmp_path, one=FULL)
    assert list(column(text, "rank within 3 %")) == ["dense", "null 1", "teal 0.8", "teal 0.9", "lte 0.7", "teal 0.4"]
    assert list(column(text, "rank within 1 %").values()) == ["–", "–", "1", "2", "–", "–"]
    assert list(column(text, "rank within 3 %").values()) == ["–", "–", "2", "3", "1", "–"]
    assert column(text, "fidelity") == {
        "dense": "baseline", "null 1": "baseline", "teal 0.8": "adapted", "teal 0.9": "adapted", "lte 0.7": "adapted",
        "teal 0.4": "adapted",
    }  # fmt: skip


def test_rank_interval_counts_the_cells_that_are_surely_faster_and_slower() -> None:
    def cell(density: float, speedup: float, low: float, high: float) -> dict[str, Any]:
        found = record("teal", density)
        found["latency"] |= {"speedup": speedup, "ci": [low, high]}
        found["items"] = record()["items"]
        return found

    cells = [cell(0.9, 1.5, 1.4, 1.6), cell(0.8, 1.45, 1.35, 1.55), cell(0.7, 1.2, 1.1, 1.3), cell(0.6, 1.1, 1.0, 1.2)]
    (group,) = rows.group([record(), *cells])
    ranks = {row.target: row.ranks[1.0] for row in group.rows if row.ranks}
    assert ranks == {0.9: Rank(1, 1, 2), 0.8: Rank(2, 1, 2), 0.7: Rank(3, 3, 4), 0.6: Rank(4, 3, 4)}


def test_the_newest_record_of_a_cell_counts_and_keeps_its_own_dense(tmp_path: Path) -> None:
    old = [on("Test GPU", record(), torch="2.0"), on("Test GPU", record("teal", 0.9), torch="2.0")]
    new = on("Test GPU", record("teal", 0.9, time="2026-02-01T00:00:00+00:00"), torch="2.1")
    new["cost"]["decode"]["bytes"] = 1.1e7
    text = merged(tmp_path, one=old, two=[new])
    assert column(text, "read MB/token (÷ dense)")["teal 0.9"].startswith("11.0 ")
    assert column(text, "accuracy lost, %")["teal 0.9"] == "–"  # no dense cell was measured beside it
    assert "not all rows come from the same machine" in text and "torch 2.0" in text and "torch 2.1" in text


def test_what_is_stored_and_kept_in_memory(tmp_path: Path) -> None:
    dense, teal = record(), record("teal", 0.9)
    dense["latency"]["memory"], teal["latency"]["memory"] = {"alone": 5e9}, {"alone": 5.25e9}
    teal["artifact"] = {"bytes": 1.5e6}
    text = merged(tmp_path, one=[dense, teal])
    assert column(text, "extra memory, MB") == {"dense": "–", "teal 0.9": "250"}
    assert column(text, "artifact, MB") == {"dense": "–", "teal 0.9": "1.50"}


def test_random_weights_share_a_table_and_have_no_quality(tmp_path: Path) -> None:
    cells = [synthetic("dense"), synthetic("teal", 0.5)]
    wide = [{**c, "cell": {**c["cell"], "batch": 8}} for c in cells]
    text = merged(tmp_path, one=[*wide, *cells])
    titles, *body = table(text)
    assert [line[titles.index("batch")] for line in body] == ["1", "1", "8", "8"]
    assert not {"perplexity", "rank within 3 %", "accuracy lost, %"} & set(titles)


def test_a_folder_without_sets_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result sets"):
        board.sets(tmp_path)
    assert not board.is_collection(write(tmp_path / "one", FULL)) and board.is_collection(tmp_path)
    assert [f.name for f in report.build(tmp_path)] == ["LEADERBOARD.md", "CLAIMS.md"]
    assert report.check(tmp_path) == 0


def test_readme_holds_a_headline_per_method_and_gpu(tmp_path: Path) -> None:
    cells = [*FULL, synthetic("dense"), synthetic("teal", 0.5), synthetic("teal", 0.8)]
    untimed = record("spark", 0.5) | {"latency": {}}
    write(tmp_path / "results" / "one", [*cells, record("lte", 0.5), record("teal", 0.9, batch=8), untimed])
    readme = tmp_path / "README.md"
    begin, end = report.BOARD
    with pytest.raises(UsageError, match="no place for a table"):
        report.build(tmp_path / "results", readme)
    readme.write_text(f"before\n{begin}\n{end}\n{report.BEGIN}\nother\n{report.END}\n")
    report.build(tmp_path / "results", readme)
    text = readme.read_text()
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][1:] == ["null", "lte", "teal"]
    assert {line[0]: line[1:] for line in lines[2:]} == {
        "reference (reference weights), decode, batch 1, context 384": [
            "1.00 (same)", "1.43 at 0.7 (faster, 70 % read, 1.3 % lost)", "1.25 at 0.8 (faster, 80 % read, 0.4 % lost)",
        ],  # lte at 0.5 is faster, but over the budget
        "reference (reference weights), decode, batch 8, context 384": [NONE, NONE, "1.11 at 0.9 (faster, 90 % read)"],
        "reference (synthetic weights), decode, batch 1, context 384": [NONE, NONE, "2.00 at 0.5 (faster, 50 % read)"],
    }  # fmt: skip
    assert "**Test GPU: speed-up" in text and "(results/LEADERBOARD.md)" in text and "(results/CLAIMS.md)" in text
    assert text.endswith(f"{report.BEGIN}\nother\n{report.END}\n")
    assert report.check(tmp_path / "results", readme) == 0
    readme.write_text(text.replace("1.43", "1.44"))
    assert report.check(tmp_path / "results", readme) == 1


def test_random_weights_are_shown_where_a_step_reads_half_of_the_dense_bytes() -> None:
    cells = [synthetic("teal", density) for density in (0.6, 0.5, 0.3)]
    cells[2]["cost"]["decode"]["bytes"] = 0.5 * 1.4e7  # with what the target leaves out

    def shown() -> str:
        return board.excerpt(board.sections({"one": rows.group([synthetic("dense"), *cells])}), "results")

    cells[1]["latency"]["step"] = {"bytes": 4e6, "bytes_dense": 1e7, "density": 0.4}
    assert "| 3.33 at 0.3 (faster, 50 % read) " in shown()
    cells[0]["latency"]["step"] = {"bytes": 4.9e6, "bytes_dense": 1e7, "density": 0.49}
    cells[2]["latency"]["step"] = {"bytes": 4e6, "bytes_dense": 1e7, "density": 0.3}
    assert "| 1.67 at 0.6 (faster, 49 % read) " in shown()


def test_headlines_count_what_casts_doubt_and_name_the_newest_machine() -> None:
    def excerpt(*records: dict[str, Any]) -> str:
        return board.excerpt(board.sections({"one": rows.group(records)}), "results")

    quiet = record("teal", 0.8)
    assert "**Caution:**" not in excerpt(record(), quiet) and "newest" not in excerpt(record(), quiet)
    hot = on("Test GPU", record("teal", 0.7, batch=8), torch="2.1")
    hot["machine"]["gpu"] |= {"throttle": ["power cap"], "processes": 1}
    dirty = record("lte", 0.7, batch=16, git={"commit": "1" * 40, "dirty": True})
    dirty["latency"]["watch"] = {"throttle": ["power cap"], "processes": 0}
    text = excerpt(record(), quiet, hot, dirty)
    assert "Machine, the newest of 2 of this kind: " in text
    assert (
        "**Caution:** of 3 timed cells: the GPU throttled its clocks (2), other processes used the GPU (1), "
        "from a tree with uncommitted changes (1)." in text
    )


def test_records_of_a_method_that_is_not_installed_are_shown() -> None:
    assert board.statement("gone") == "not installed here" and board.level("gone") == NONE
    assert board.statement("teal") != "not installed here"


def test_low_rank_training_is_a_method_of_its_own(tmp_path: Path) -> None:
    text = merged(tmp_path, one=[record(), record("lte", 0.7), record("lte", 0.7, options={"lora_rank": 16}, key="l")])
    assert list(column(text, "fidelity")) == ["dense", "lte 0.7", "lte-lora 0.7"]
    assert "`lte-lora`: paper: " in text and text.count("low-rank updates in place of all weights") == 1
