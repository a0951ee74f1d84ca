"""Kernels of a trace by class: the table is complete, and the times add up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparse_kernels
from harness import breakdown, plots, report, rows
from harness.breakdown import Event
from tests.harness.fabricated import record


def launched() -> set[str]:
    """The Triton kernels that sparse_kernels launches, by its source: `run(name, ...)`."""
    found = set()
    for path in Path(sparse_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run" and node.args:
                assert isinstance(node.args[0], ast.Name), f"{path}:{node.lineno} launches what has no name"
                found.add(node.args[0].id)
    return found


def jitted() -> set[str]:
    """All functions decorated with triton.jit whose name says that they are kernels."""
    found = set()
    for path in Path(sparse_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                if node.name.endswith("_kernel"):
                    found.add(node.name)
    return found


def test_every_kernel_of_ours_has_a_class_and_no_other_is_listed() -> None:
    measuring = {"read_kernel"}  # the bandwidth's, in no step
    assert launched() | jitted() == set(breakdown.KERNELS) | measuring
    assert set(breakdown.KERNELS.values()) | set(breakdown.LIBRARIES.values()) < set(breakdown.CLASSES)


def test_the_last_product_of_a_library_is_the_lm_head() -> None:
    names = [
        "at::native::embedding", "fill_kernel", "linear_kernel", "combine_kernel", "rope_kernel", "attention_kernel",
        "norm_kernel", "void gemv2T_kernel_val<int>", "void cublasLt::splitKreduce_kernel<32>", "at::native::rms",
        "nvjet_tst_128x8", "void cublasLt::splitKreduce_kernel<32>", "at::native::reduce_argmax",
    ]  # fmt: skip
    assert breakdown.classes(names) == [
        "other", "selection", "linears", "linears", "attention", "attention",
        "glue", "linears", "linears", "other", "lm_head", "lm_head", "other",
    ]  # fmt: skip
    assert breakdown.classes(["linear_kernel", "odd"]) == ["linears", "other"]


def test_times_add_up_to_the_step_and_waiting_kernels_do_not_count_twice() -> None:
    step = [
        Event("fill_kernel", 0, 10),
        Event("linear_kernel", 6, 30),  # launched early: waits for fill until 10
        Event("mystery", 35, 39),  # 5 us after anything ran
        Event("combine_kernel", 36, 38),  # within another one
    ]
    found = breakdown.breakdown([Event(e.name, e.begin + at, e.end + at) for at in (0, 1000) for e in step], 2)
    spent = {kind: ms for kind, ms in found["ms"].items() if ms}
    assert spent == {"selection": 0.010, "linears": 0.020, "other": 0.004, "idle": 0.005}
    assert sum(spent.values()) == pytest.approx(0.039) and found["kernels"] == 4
    assert found["other"] == {"mystery": 0.004} and list(found["ms"]) == list(breakdown.CLASSES)


@pytest.mark.parametrize("number", [0, 3])
def test_a_trace_that_lost_kernels_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} kernels are not 2 equal steps"):
        breakdown.breakdown([Event("fill_kernel", i, i + 1) for i in range(number)], 2)


def test_the_report_has_a_table_and_bars(tmp_path: Path) -> None:
    groups = rows.group([record(), record("teal", 0.5)])
    assert "decode step's time goes" not in report.page(groups)
    traced = record("teal", 0.5)
    traced["latency"]["breakdown"] = {"ms": {"selection": 0.25, "linears": 1.5, "idle": 0.125}, "kernels": 9}
    groups = rows.group([record(), traced])
    text = report.page(groups)
    assert "![Where the time of a decode step goes](breakdown.png)" in text
    table = text.split("### Where a decode step's time goes, ms")[1].split("###")[0]
    (line,) = [line for line in table.splitlines() if "| teal" in line]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["teal", "0.5", "0.250", "1.50", "0.125", "9"]
    files = plots.write(groups, tmp_path)
    assert {f.name for f in files} == {
        f"{name}.{kind}" for name in ("pareto", "time", "breakdown") for kind in ("png", "svg")
    }


def test_every_line_of_bars_has_a_legend_and_bars_of_one_height() -> None:
    from matplotlib import pyplot as plt

    records = [record(name, d, context=c, key=f"{name}{d}{c}") for c in range(1, 17) for name, d in (("dense", None),
               *(("teal", n / 10) for n in range(1, 2 + c % 9)))]  # fmt: skip
    for each in records:
        each["latency"]["breakdown"] = {"ms": {"selection": 0.25, "linears": 1.5}, "kernels": 9}
    figure = plots.time.bars(plots.time.traced(rows.group(records)))
    width, height = figure.get_size_inches()
    lines = [figure.axes[i : i + 2] for i in range(0, 16, 2)]
    plt.close(figure)
    assert height < 2 * width
    for line in lines:
        assert sum(axis.get_legend() is not None for axis in line) == 1
        assert len({axis.get_ylim() for axis in line}) == 1
