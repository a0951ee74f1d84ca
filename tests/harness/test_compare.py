"""Two result sets side by side: verdicts, paired differences, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest

from harness import cli, store
from tests.harness.fabricated import GPU, TASKS, record

Capture = pytest.CaptureFixture[str]


def cell(method: str = "dense", density: float | None = None, ms: float = 2.0, blocks: int = 3, **changes: Any) -> Any:
    """A record with raw samples around `ms`."""
    built = record(method, density, **changes)
    samples = [[ms * (1 + 0.001 * ((7 * block + step) % 5 - 2)) for step in range(16)] for block in range(blocks)]
    built["latency"] |= {"runner": "sparse runtime", "samples": {"sparse runtime": samples}, "median": ms}
    built["corpus"] = {"name": "stdlib", "hash": "h"}
    return built


def on_cpu(built: Any) -> Any:
    built["cell"]["device"], built["machine"]["gpu"] = "cpu", None
    built["latency"]["path"] = "cpu-reference"
    return built


def on_gpu(built: Any, **changes: Any) -> Any:
    built["machine"] = {**built["machine"], "identity": str(changes), "gpu": GPU | changes}
    return built


@pytest.fixture
def compare(tmp_path: Path, capsys: Capture) -> Any:
    def run(a: list[Any], b: list[Any], *flags: str) -> tuple[int, str, str]:
        for name, records in (("a", a), ("b", b)):
            (tmp_path / name).mkdir(exist_ok=True)
            for entry in records:
                store.append(tmp_path / name, entry)
        code = cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / store.FILE), *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def line(out: str, start: str) -> str:
    return next(text for text in out.splitlines() if text.strip().startswith(start))


@pytest.mark.parametrize(
    ("ms", "verdict", "ratio"), [(1.0, "faster", "2.000"), (2.01, "same", "0.99"), (4.0, "slower", "0.500")]
)
def test_verdicts(compare: Any, ms: float, verdict: str, ratio: str) -> None:
    code, out, _ = compare([cell("teal", 0.5)], [cell("teal", 0.5, ms, blocks=5, source="other")])
    assert code == 0 and verdict in line(out, "teal 0.5") and ratio in line(out, "teal 0.5")
    assert out.count("Test GPU (abc123)") == 2 and "Caution" not in out


def test_an_interval_across_the_band_is_ambiguous(compare: Any) -> None:
    noisy = cell("teal", 0.5)
    noisy["latency"]["samples"]["sparse runtime"] = [[1.5] * 8, [2.0] * 8, [2.5] * 8]
    code, out, _ = compare([cell("teal", 0.5)], [noisy], "--fail-on-slower")
    assert code == 0 and "ambiguous" in line(out, "teal 0.5")


def test_fail_on_slower(compare: Any) -> None:
    pairs = [cell(), cell("teal", 0.5)], [cell(), cell("teal", 0.5, 4.0)]
    assert compare(*pairs, "--fail-on-slower")[0] == 1
    assert compare([], [cell("teal", 0.5)], "--fail-on-slower")[0] == 0  # the newest record of a cell counts


def test_accuracy_is_paired_also_for_dense(compare: Any) -> None:
    worse = cell()
    worse["items"] = copy.deepcopy(worse["items"])
    worse["items"]["nll"] = [value + 0.1 for value in worse["items"]["nll"]]
    worse["items"][TASKS[0]] = [0.0] * 100
    code, out, _ = compare([cell()], [worse])
    assert code == 0 and "1.105" in line(out, "dense")
    drop = 100 * sum(cell()["items"][TASKS[0]]) / 100
    assert f"{-drop:+.1f}" in " ".join(out.split()) and "+0.0" in out


@pytest.mark.parametrize("other", ["corpus", "python"])
def test_other_text_has_no_accuracy_difference(compare: Any, other: str) -> None:
    changed = cell("teal", 0.5)
    if other == "corpus":
        changed["corpus"] = {"name": "stdlib", "hash": "another"}
    else:
        changed["machine"]["python"] = "3.12"
    _, out, _ = compare([cell("teal", 0.5)], [changed])
    assert "1 of 1 cells were evaluated on other text" in out and "perplexity" not in out and "same" in out


def test_cells_of_one_side_are_named(compare: Any) -> None:
    code, out, _ = compare([cell(), cell("lte", 0.5)], [cell(), cell(batch=8), cell("teal", 0.5, status="failed")])
    assert code == 0 and "teal" not in out
    assert (
        "only in A: lte 0.5, reference, decode, batch 1" in out
        and "only in B: dense, reference, decode, batch 8" in out
    )


def test_settings_that_differ_are_columns(compare: Any) -> None:
    cells = [cell(), cell(batch=8)]
    _, out, _ = compare(cells, cells)
    assert "setting" in out and "batch 8" in line(out, "dense") + out.split("batch 1")[1] and "context" not in out


def test_nothing_in_common(compare: Any) -> None:
    code, out, err = compare([cell()], [cell("null", 1.0)])
    assert code == 2 and "no measured cell in common" in err and "only in A: dense" in out


def test_other_gpus_are_refused(compare: Any) -> None:
    code, out, err = compare([cell()], [on_gpu(cell(), name="Other GPU")])
    assert code == 2 and "different GPUs are never compared" in err and err.count("\n") == 1 and not out


def test_gpus_of_one_name_are_told_apart(compare: Any) -> None:
    both = [cell(), on_gpu(cell(ms=9.0), name="Other GPU")]
    code, out, _ = compare([cell()], both)
    assert code == 0 and "same" in line(out, "dense") and "only in B: dense" in out and "Other GPU" in out


def test_another_unit_is_a_caution(compare: Any) -> None:
    changed = on_gpu(cell(), uuid_hash="def456", throttle=["power cap"], driver="1.3")
    changed["latency"]["watch"] = {"throttle": [], "processes": 2}
    code, out, _ = compare([cell()], [changed])
    text = " ".join(out.split())
    assert code == 0 and "same" in line(out, "dense")
    assert "two units of Test GPU (abc123 and def456)" in text and "throttled its clocks in B" in text
    assert "other processes used the GPU in B" in text
    assert "driver 1.2 in A, 1.3 in B" in text


def test_cpu_latencies_are_never_compared(compare: Any) -> None:
    code, out, _ = compare([on_cpu(cell())], [on_cpu(cell(ms=9.0))], "--fail-on-slower")
    assert code == 0 and "never compared" in out
    assert "slower" not in out and "ms/step" not in out and "perplexity" in out


@pytest.mark.parametrize("b", ["nowhere", "empty"])
def test_wrong_usage(tmp_path: Path, capsys: Capture, b: str) -> None:
    store.append(tmp_path / "a", cell())
    (tmp_path / "empty").mkdir()
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / b)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "harness run" in err
