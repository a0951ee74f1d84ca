"""The leaderboard from fabricated records: formats, pairing, ranking, what is left out, and drift."""

import argparse
import copy
from typing import Any

import pytest

from harness import formats, grids, plots, report, rows, store, tables, webpage
from harness.doubts import doubts_of
from methods.errors import UsageError
from tests.harness.fabricated import FULL, GPU, TASKS, record, synthetic, write


def page(records: list[dict[str, Any]]) -> str:
    return report.page(rows.group(store.latest(records)))


def test_page_has_units_machine_and_every_row() -> None:
    text = page(FULL)
    for expected in (
        "Test GPU (abc123)",
        "driver 1.2",
        "git 0123456789",
        "SM clock 1900 of 1980 MHz",
        "executed GFLOP/token (÷ dense)",
        "read MB/token (÷ dense)",
        "ms/step, median [p10, p90]",
        "Dense in the same run, ms/step: eager 9.00, graph 2.00 (the fastest).",
        "stdlib_next_line, acc % (chance 25 %)",
        "preparation, s",
    ):
        assert expected in text
    cost = text.split("### Cost")[1].split("###")[0]
    assert [line.split("|")[3].strip() for line in cost.splitlines() if line.startswith("|")][2:] == [
        "dense", "null", "lte", "teal", "teal", "teal",
    ]  # fmt: skip
    assert "0.0160 (0.800)" in cost  # GFLOP/token of teal 0.8 and its ratio to dense
    assert "1.31 M" in cost


def test_null_and_dense_are_exact() -> None:
    cost = page(FULL).split("### Cost")[1].split("###")[0]
    null = next(line for line in cost.splitlines() if "| null" in line)
    assert "0.0200 (1.000)" in null and "14.0 (1.000)" in null


def test_rank_is_by_speed_within_the_budget_and_losers_stay() -> None:
    (group,) = rows.group(FULL)
    ranks = {row.label: row.ranks[3.0].place if row.ranks else None for row in group.rows}
    assert ranks["lte 0.7"] == 1 and ranks["teal 0.8"] == 2 and ranks["teal 0.9"] == 3
    assert ranks["teal 0.4"] is None and ranks["dense"] is None and ranks["null"] is None
    assert tables.budget(next(r for r in group.rows if r.label == "teal 0.4")) == "> 3 %"


def test_loss_is_the_worse_of_bits_and_tasks() -> None:
    dense = record()
    harmless = record("teal", 0.5, items=dense["items"], accuracy=dense["accuracy"])
    (group,) = rows.group([dense, harmless])
    assert group.rows[1].loss == (0.0, 0.0)
    worse = copy.deepcopy(dense["items"])
    worse["nll"] = [x + 0.1 for x in worse["nll"]]
    (group,) = rows.group([dense, record("teal", 0.5, items=worse, accuracy=dense["accuracy"])])
    loss = group.rows[1].loss
    assert loss is not None and loss[0] == pytest.approx(100 * 0.1 / 2.0541, rel=0.01)  # ln 7.8 = 2.0541


def test_perplexity_ratio_is_weighted_by_tokens() -> None:
    dense, sparse = record(), record("teal", 0.5)
    dense["items"] |= {"nll": [1.0, 1.0], "tokens": [300, 100]}
    sparse["items"] |= {"nll": [1.0, 2.0], "tokens": [300, 100]}
    ratio = rows.Row(sparse, dense).perplexity_ratio
    assert ratio is not None and ratio.estimate == pytest.approx(2.718281828**0.25)


def test_what_rests_on_one_item_is_uncertain() -> None:
    def short(*cell: Any) -> dict[str, Any]:
        """Of one window, and of one item of a task."""
        made = record(*cell)
        made["items"] = {name: scores[:1] for name, scores in made["items"].items() if name != TASKS[1]}
        return made

    (found,) = rows.group([short(), short("teal", 0.99)])
    assert tables.budget(found.rows[-1]) == "≤ 1 % ?"
    assert tables.budget(rows.group([record(), record("teal", 0.99)])[0].rows[-1]) == "≤ 1 %"
    texts = {column.title: column.text(found.rows[-1]) for column in tables.quality_columns(found)}
    assert texts["perplexity ÷ dense [95 %]"] == "1.000" and not any("inf" in text for text in texts.values())
    assert webpage.page({"set": [found]})  # JSON has no infinity
    assert [row["ratio"] and len(row["ratio"]) for row in webpage.data({"set": [found]})["rows"]] == [None, 1]


def test_what_has_other_weights_or_text_is_not_compared() -> None:
    """As after a model's folder was written anew: the old rows lose their baseline, the new ones keep theirs."""

    def of(weights: str, text: str, *cell: Any) -> dict[str, Any]:
        return record(*cell) | {"model": {"fingerprint": weights}, "corpus": {"hash": text}}

    made = [of("b", "x"), of("a", "x", "teal", 0.4), of("b", "y", "lte", 0.4), of("b", "x", "spark", 0.4)]
    (found,) = rows.group([*made, record("polar", 0.4)])
    compared = {row.method for row in found.rows if row.loss is not None and row.method != "dense"}
    assert compared == {"spark", "polar"}  # a record that does not tell is taken as it is
    assert "not all rows are of the same weights and text" in doubts_of(found.rows)
    assert "not all rows are of the same weights and text" not in doubts_of(rows.group(FULL)[0].rows)


def test_items_of_other_length_are_not_compared() -> None:
    sparse = record("teal", 0.5)
    sparse["items"]["nll"] = sparse["items"]["nll"][:-1]
    assert rows.Row(sparse, record()).nll is None
    assert rows.Row(sparse, None).tasks == {} and rows.Row(sparse, None).loss is None


def test_synthetic_weights_have_no_accuracy_and_no_rank() -> None:
    text = page([synthetic("dense"), synthetic("teal", 0.5)])
    assert "an accuracy does not exist" in text
    tables_only = text.split("## reference")[1]
    assert "perplexity" not in tables_only and "### Quality" not in tables_only and "| rank" not in tables_only


def test_cpu_latency_is_labelled_and_not_compared() -> None:
    text = page([record(device="cpu"), record("teal", 0.8, device="cpu")])
    cost = text.split("### Cost")[1].split("###")[0]
    assert "CPU reference path, not ranked" in cost
    assert "speed-up" not in cost and "verdict" not in cost and "rank " not in cost.replace("not ranked", "")


def prompt(**ways: float) -> dict[str, Any]:
    return {name: {part: {"median": ms, "p10": ms, "p90": ms} for part in ("prefill", "first_token")} for name, ms in
            ways.items()} | {"tokens": 384}  # fmt: skip


def test_prefill_memory_and_energy_have_a_table_where_they_were_measured() -> None:
    assert "### Prefill" not in page(FULL)
    dense, sparse = record(), record("teal", 0.5)
    dense["latency"] |= {"prefill": prompt(dense=10.0), "memory": {"alone": 2**31, "reserved": None, "process": None}}
    sparse["latency"] |= {"prefill": prompt(dense=10.0, method=20.0) | {"single storage": prompt(x=15.0)["x"]}}
    sparse["latency"]["energy"] = {"joules_per_token": 1.0, "watts": 300.0}
    sparse["latency"]["dense"]["graph"] = {"median": 2.0, "fraction_of_limit": 0.6, "energy": {"joules_per_token": 2.0}}
    text = page([dense, sparse])
    lines = text.split("### Prefill, memory, energy")[1].split("###")[0].splitlines()
    titles, _, first, second = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert titles == [
        "method", "target density", "prefill, ms [p10, p90]", "÷ dense prompt", "single storage ÷ own weights",
        "first token, ms", "memory alone, GiB", "decode, J/token", "÷ fastest dense", "mean W",
    ]  # fmt: skip
    assert first == ["dense", "–", "10.0 [10.0, 10.0]", "–", "–", "10.0", "2.00", "–", "–", "–"]
    assert second == ["teal", "0.5", "20.0 [20.0, 20.0]", "2.000", "0.750", "20.0", "–", "1.00", "0.500", "300"]
    sparse["latency"]["watch"] = {"throttle": ["power cap"], "processes": 0}
    assert "throttled" in page([sparse]) and "60 % of the byte limit" in page([sparse])


def test_several_batches_or_contexts_make_a_grid(tmp_path: Any) -> None:
    assert "## Speed-up by batch" not in page(FULL) and not grids.grids(rows.group(FULL))
    records = [record(name, d, batch=b, context=c) for name, d in (("dense", None), ("teal", 0.5), ("lte", 0.5))
               for b, c in ((1, 512), (16, 512), (1, 4096))]  # fmt: skip
    records[-1]["machine"] = records[-2]["machine"] = {**records[0]["machine"], "identity": "another of its kind"}
    groups = rows.group(records)
    (grid,) = grids.grids(groups)
    assert (grid.batches, grid.contexts, list(grid.speedups)) == ([1, 16], [512, 4096], ["lte 0.5", "teal 0.5"])
    text = report.page(groups).split("## Speed-up by batch and context: reference (reference weights), decode")[1]
    titles, _, lte, teal = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:6]]
    assert titles[1:] == [f"batch {b}, context {c}" for b, c in ((1, 512), (16, 512), (1, 4096))]
    assert teal == ["teal 0.5", "2.00 faster", "2.00 faster", "2.00 faster"] and lte[0] == "lte 0.5"
    assert {"grid.png", "grid.svg"} <= {f.name for f in plots.write(groups, tmp_path)}
    assert not grids.grids(rows.group([{**r, "cell": {**r["cell"], "device": "cpu"}} for r in records]))


def test_settings_and_machines_never_share_a_table() -> None:
    other = record("teal", 0.5)
    other["machine"] = {**other["machine"], "identity": "another"}
    groups = rows.group([record(), record("teal", 0.5, batch=8), other])
    assert len(groups) == 3 and all(len(group.rows) == 1 for group in groups)


def elsewhere(entry: dict[str, Any], unit: str, **gpu: Any) -> dict[str, Any]:
    return {**entry, "machine": {**entry["machine"], "identity": unit, "gpu": {**GPU, **gpu}}}


def test_on_a_cpu_times_alone_depend_on_the_threads() -> None:
    """Processes that share a CPU have fewer threads each than one that has it alone."""
    two, one = ({"cpu": {"model": "CPU", "cores": 2, "threads": n}, "identity": f"{n} threads"} for n in (2, 1))
    dense, teal = ({**record(*cell), "machine": two} for cell in ((), ("teal", 0.5)))
    assert len(rows.group([dense, {**teal, "machine": one}])) == 2
    untimed = {**teal, "cell": {**teal["cell"], "timed": False}, "latency": {}, "machine": one}
    assert len(store.latest([untimed, {**untimed, "machine": two}])) == 1
    (found,) = rows.group([dense, untimed])
    assert [row.method for row in found.rows] == ["dense", "teal"]


def test_cells_without_latency_share_a_table_with_those_of_other_units_of_the_same_gpu() -> None:
    cells = [record(), record("teal", 0.5)]
    cells = [{**cell, "cell": {**cell["cell"], "timed": False}, "latency": {}} for cell in cells]
    there = [elsewhere(cell, "there") for cell in cells]
    assert len(store.latest([cells[0], there[0]])) == 1
    (found,) = rows.group([cells[0], there[1]])
    assert [row.method for row in found.rows] == ["dense", "teal"] and found.rows[1].dense == cells[0]
    assert "of this kind" in report.page([found]) and not doubts_of(found.rows)
    other_gpu, other_torch = elsewhere(cells[1], "o", name="Other GPU"), elsewhere(cells[1], "v")
    other_torch["machine"]["torch"] = "2.12"
    assert len(rows.group([*cells, other_gpu, other_torch])) == 3


def test_cells_without_latency_join_those_timed_on_one_unit() -> None:
    quick = record("lte", 0.5, latency={})
    quick["cell"]["timed"] = False
    timed = [elsewhere(record(), "there"), elsewhere(record("teal", 0.5), "there")]
    (found,) = rows.group([quick, *timed])
    assert [row.method for row in found.rows] == ["dense", "lte", "teal"] and found.place == "there"
    assert found.rows[1].dense == timed[0]
    quick_group, *units = rows.group([quick, *timed, record()])
    assert [row.method for row in quick_group.rows] == ["lte"] and [unit.place for unit in units] == ["there", "m"]


def test_latest_record_of_a_cell_wins() -> None:
    older, newer = record("teal", 0.5), record("teal", 0.5, source="t", seconds=2.0)
    assert store.latest([older, record(), newer]) == [newer, record()]


def test_failed_and_not_applicable_cells_are_listed_with_their_reason() -> None:
    failed = record("lte", 0.5, status="failed", error="Traceback\nOutOfMemoryError: too | large", cost=None)
    absent = record("teal", 0.3, status="not-applicable", error="teal needs a layout.")
    text = page([record(), failed, absent])
    listed = text.split("## Not measured")[1]
    assert "OutOfMemoryError: too \\| large" in listed and "teal needs a layout." in listed
    assert "OutOfMemoryError" not in text.split("## Not measured")[0]


def test_missing_parts_are_dashes() -> None:
    bare = record("teal", 0.5, latency=None, fidelity=None, accuracy={}, items={}, cost={}, prepare=None)
    bare["density"] = None
    assert formats.NONE in page([record(), bare])


def test_warnings() -> None:
    dirty = record(git={"commit": "1" * 40, "dirty": True})
    dirty["machine"] = {**dirty["machine"], "gpu": {**GPU, "throttle": ["power cap"], "processes": 2}}
    text = page([dirty])
    untimed = {**dirty, "latency": {}, "cell": {**dirty["cell"], "timed": False}}
    assert "throttled" not in page([untimed]) and "other processes used" not in page([untimed])
    for doubt in ("uncommitted changes", "throttled", "other processes used"):
        assert doubt in text.split("**Caution:**")[1]


def test_timed_steps_at_another_density_are_told() -> None:
    cell = record("teal", 0.5)
    cell["density"] |= {
        "model": 0.491,
        "sites": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), {"mean": 0.5}),
    }
    for timed, shown, caution in (
        (0.46, "0.491; timed 0.460", True),
        (0.495, "0.491", False),
        (0.52, "0.491; timed 0.520", True),
    ):
        cell["latency"]["step"] = {"density": timed}
        (group,) = rows.group([record(), cell])
        assert tables.markdown(tables.cost_columns(group), group.rows).count(f"| {shown} ") == 1
        assert tables.markdown(tables.readme_columns(group), group.rows).count(f"| {shown} ") == 1
        doubt = f"timed steps missed the target density: teal 0.5 ran at {timed:.2f}"
        assert (doubt in doubts_of(group.rows)) is caution
    cell["density"]["union"] = 1.0  # what a batch reads together is no miss
    cell["latency"]["step"] = {"density": 1.0}
    (group,) = rows.group([record(), cell])
    assert not doubts_of(group.rows) and "timed 1" not in tables.markdown(tables.cost_columns(group), group.rows)


def test_what_methods_tell_is_said_once_per_density() -> None:
    def told(density: float, seed: int, **manifest: Any) -> dict[str, Any]:
        return record("lte", density, seed=seed, key=f"{density}{seed}", artifact={"manifest": manifest})

    reached = [f"density {value} instead of 0.5: the nearest of 8 trials" for value in (0.52, 0.47)]
    uniform = [f"layer {i}: the router does not depend on the token" for i in range(3)]
    text = "fine-tuned 1.5 times over 9000 tokens"  # is no density
    cells = [told(0.5, 0, notes=[reached[0], text], warnings=uniform), told(0.5, 1, notes=reached[1:]), told(0.7, 0)]
    assert doubts_of(rows.group(cells)[0].rows) == [
        f"lte 0.5, {uniform[0]} (and 2 like it)",
        f"lte 0.5, {reached[0]} (and 1 like it)",
    ]


def test_predictors_are_shown_block_by_block_as_means_over_seeds() -> None:
    def told(seed: int, recall: float) -> dict[str, Any]:
        facts = {"k": 2, "recall": recall, "precision": 0.5, "predicted": 0.25, "true": 0.5}
        judged = {"heads": {"1": facts, "2": {**facts, "predicted": 0.75}}}
        return record("polar", 0.5, seed=seed, key=str(seed), artifact={"manifest": judged})

    assert "### Predictors" not in page(FULL)
    cells = [record(seed=0, key="a"), record(seed=1, key="b"), told(0, 0.8), told(1, 0.9), record("teal", 0.5)]
    table = page(cells).split("### Predictors, block by block")[1]
    titles, _, *body = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    (line,) = (dict(zip(titles, row, strict=True)) for row in body)  # teal has none
    assert line["method"] == "polar" and line["blocks"] == "heads 1–2" and line["heads: recall"] == "0.85 0.85"
    assert line["heads: precision"] == "0.50 0.50" and line["heads: predicted density"] == "0.25 0.75"
    means = tables.predictor_means()
    assert [means.text(r) for r in rows.group(cells)[0].rows if r.predictors] == ["heads 0.85 / 0.50 / 0.50"]


def test_report_writes_and_check_sees_drift(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = write(tmp_path, FULL)
    assert report.check(out) == 1  # nothing written yet
    files = report.build(out)
    assert [f.name for f in files] == ["LEADERBOARD.md", "pareto.png", "pareto.svg", "time.png", "time.svg"]
    before = [f.read_bytes() for f in files]
    assert report.main(argparse.Namespace(out=out, readme=None, check=True)) == 0
    report.build(out)
    assert [f.read_bytes() for f in files] == before
    store.append(tmp_path, record("teal", 0.6))
    capsys.readouterr()
    assert report.main(argparse.Namespace(out=out, readme=None, check=True)) == 1
    assert "run `python -m harness report" in capsys.readouterr().out
    assert [f.read_bytes() for f in files] == before
    report.build(out)
    (tmp_path / "pareto.png").unlink()
    assert report.check(out) == 1


def test_readme_holds_a_short_table_between_its_marks(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, readme = write(tmp_path / "results" / "cpu", FULL), tmp_path / "README.md"
    readme.write_text(f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    arguments = argparse.Namespace(out=out, readme=str(readme), check=True)
    report.build(out)
    assert report.check(out) == 0 and report.main(arguments) == 1
    assert f"--out {out} --readme {readme}`" in capsys.readouterr().out
    assert readme in report.build(out, readme)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\nbefore\n\n{report.BEGIN}\n") and text.endswith(f"{report.END}\n\nafter\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(FULL) and "old" not in text
    teal = next([cell.strip() for cell in line.split("|")] for line in table if "0.8" in line and "teal" in line)
    assert teal[1:7] == ["teal", "0.8", "0.800", "0.0160", "11.2", "1.60 (1.25, faster)"]
    assert "(results/cpu/LEADERBOARD.md)" in text and "Test GPU (abc123)" in text
    report.build(out, readme)
    assert readme.read_text() == text and report.main(arguments) == 0
    readme.write_text(text.replace("0.0160", "0.0161"))
    assert report.main(arguments) == 1


def test_readme_table_says_what_a_cpu_time_is_and_has_no_accuracy_of_random_weights() -> None:
    on_cpu = report.excerpt(rows.group([record(device="cpu"), record("teal", 0.8, device="cpu")]), "x.md")
    assert "ms/step, CPU reference path" in on_cpu and "faster" not in on_cpu
    random_weights = report.excerpt(rows.group([synthetic("dense"), synthetic("teal", 0.5)]), "x.md")
    assert "MB/token" in random_weights and "perplexity" not in random_weights


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}\n{report.BEGIN}"])
def test_a_readme_without_marks_is_a_usage_error_and_nothing_is_written(text: str, tmp_path: Any) -> None:
    out, readme = write(tmp_path / "out", FULL), tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UsageError, match="no place for a table"):
        report.build(out, readme)
    assert readme.read_text() == text and not (tmp_path / "out" / report.PAGE).exists()


def test_terminal_tables_fit_120_columns(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = write(tmp_path, FULL)
    assert report.main(argparse.Namespace(out=out, readme=None, check=False, html=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("teal 0.8" in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith("wrote")) <= 120


def test_no_records_is_a_usage_error(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="no folder"):
        report.build(tmp_path / "absent")
    with pytest.raises(UsageError, match="no records"):
        report.build(tmp_path)


def test_front() -> None:
    from harness.plots.quality import front

    points = [(10.0, 1.0), (5.0, 1.2), (7.0, 1.3), (3.0, 2.0)]
    assert front(points, larger=False) == [(3.0, 2.0), (5.0, 1.2), (10.0, 1.0)]
    assert front([(3.0, 0.5), (5.0, 0.4), (6.0, 0.9)], larger=True) == [(3.0, 0.5), (6.0, 0.9)]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (0.02, "0.0200"), (1.234, "1.23"), (13.26, "13.3"), (13262.4, "13,262")]
)
def test_number(value: float | None, text: str) -> None:
    assert formats.number(value) == text
