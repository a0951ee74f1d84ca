"""Verdicts on claims from made-up records, and the drift check of a folder of result sets."""

import argparse
from math import inf
from pathlib import Path
from typing import Any

import pytest

from harness import board, claims, report, rows
from harness.claims import Claim
from methods import registry
from methods.errors import UsageError
from tests.harness.fabricated import GPU, record, synthetic, write

SPEED = {"method": "teal", "paper": "T", "arxiv": "1", "claim": "c", "setting": "s", "quantity": "speed-up"}

OVER_EAGER = (
    "3.00x [3.00, 3.00] over dense eager at its best (the fastest dense alone: 2.40x), 1.25x over the fastest dense"
)


def claim(**changes: Any) -> Claim:
    return Claim(**{**SPEED, "value": 1.25, "models": ["reference"], "batch": [1, 1], **changes})


def judge(wanted: Claim, *records: dict[str, Any]) -> claims.Finding:
    return claims.judge(wanted, {"here": rows.group(records)})


def test_shipped_claims_are_complete_and_name_known_things() -> None:
    from harness import models

    found = claims.load()
    assert {c.paper for c in found} == {
        "TEAL", "LTE", "Deja Vu", "MoEfication", "D2DMoE", "Polar Sparsity", "Spark Transformer",
    }  # fmt: skip
    values = {(c.method, c.value) for c in found}
    assert {("teal", 1.53), ("teal", 1.8), ("lte", 2.59), ("lte", 1.83), ("dejavu", 2), ("dejavu", 6)} <= values
    assert {("moefication", 95), ("d2dmoe", 2.5), ("polar", 2.2), ("spark", 2.5), ("spark", 1.4)} <= values
    for c in found:
        assert c.quantity in ("speed-up", "FLOPs", "quality")
        assert c.models or c.similar or c.needs
        for name in {*c.models, *c.similar} - {"twins/spark"}:  # trained, not shipped
            models.resolve(name)
    assert {"teal", "lte", "moefication", "d2dmoe"} <= {c.method for c in found} & set(registry.names())


@pytest.mark.parametrize(
    ("changes", "records", "verdict", "remark"),
    [
        ({}, [record("teal", 0.8)], "reproduced", ""),
        ({"gpu": ["A100"]}, [record("teal", 0.8)], "reproduced", "another GPU"),
        ({"gpu": ["Test"]}, [record("teal", 0.8)], "reproduced", ""),
        ({"models": [], "similar": ["reference"]}, [record("teal", 0.8)], "partly", "another model (reference)"),
        ({"value": 1.5}, [record("teal", 0.8)], "partly", ""),  # 1.25 is half of the gain
        ({"value": 1.51}, [record("teal", 0.8)], "not reproduced", ""),
        ({}, [record("teal", 0.9)], "not reproduced", ""),
        ({"loss": 5}, [record(), record("teal", 0.8)], "reproduced", ""),
        ({"loss": 5}, [record(), record("teal", 0.4)], "not reproduced", "more than 5 % lost"),
        ({"loss": 5}, [synthetic("teal", 0.8)], "partly", "random weights: quality unknown"),
        ({}, [synthetic("teal", 0.8)], "partly", "random weights: quality unknown"),
        (
            {"models": [], "similar": ["reference"], "value": 2},
            [record("teal", 0.8)],
            claims.SHORT,
            "another model (reference)",
        ),
        ({"at": {"batch": [64, inf]}}, [record("teal", 0.8)], "reproduced", "batch 1 (paper: 64 and above)"),
        (
            {"at": {"density": [0.1, 0.5], "context": [512, 512], "batch": [1, 1]}},
            [record("teal", 0.8)],
            "reproduced",
            "density 0.8 (paper: 0.1 to 0.5); context 384 (paper: 512)",
        ),
        ({"density": [0.75, 0.85]}, [record("teal", 0.4), record("teal", 0.8)], "reproduced", ""),
        ({"density": [0.5, 0.6]}, [record("teal", 0.8)], "not measured", "no record of such a cell"),
        ({"batch": [8, 64]}, [record("teal", 0.8)], "not measured", "no record of such a cell"),
        ({"batch": [8, 64]}, [record("teal", 0.8, batch=16)], "reproduced", ""),
        ({"context": [2048, 4096]}, [record("teal", 0.8)], "not measured", "no record of such a cell"),
        ({"models": ["llama2-7b"]}, [record("teal", 0.8)], "not measured", "no record of such a cell"),
        ({}, [record("lte", 0.8)], "not measured", "no record of teal"),
        ({"needs": "eight GPUs"}, [record("lte", 0.8)], "not measured", "eight GPUs"),
        ({}, [record("teal", 0.8, status="failed")], "not measured", "no record of teal"),
        ({"quantity": "FLOPs"}, [record("teal", 0.8)], "reproduced", ""),
        ({"quantity": "FLOPs"}, [synthetic("teal", 0.8)], "not measured", "no record of such a cell"),
        ({"quantity": "quality", "value": 95}, [record(), record("teal", 0.9)], "reproduced", ""),
        ({"quantity": "quality", "value": 95}, [record(), record("teal", 0.4)], "not reproduced", ""),
    ],
)
def test_verdict(changes: dict[str, Any], records: list[dict[str, Any]], verdict: str, remark: str) -> None:
    found = judge(claim(**changes), *records)
    assert (found.verdict, "; ".join(found.remarks)) == (verdict, remark)


def test_a_cpu_has_no_speed_and_a_site_density_is_the_realised_one() -> None:
    cpu = record("teal", 0.8)
    cpu["machine"] = {**cpu["machine"], "gpu": None}
    assert judge(claim(), cpu).verdict == "not measured"
    ffn = record("teal", 0.8)
    ffn["density"] = {**ffn["density"], "sites": {"ffn": {"mean": 0.25, "p99": 0.3}}}
    wanted = claim(quantity="FLOPs", ffn_density=[0.1, 0.3])
    assert judge(wanted, ffn).verdict == "reproduced"
    assert judge(wanted, record("teal", 0.8)).verdict == "not measured"


def test_quality_can_be_that_of_a_twin() -> None:
    harmed = record("spark", 0.5, model="reference-spark")
    cells = [record(), record("dense", model="reference-spark", items=harmed["items"]), harmed]
    wanted = claim(method="spark", quantity="FLOPs", models=[], similar=["reference-spark"], loss=1)
    assert judge(wanted, *cells).verdict == "partly"  # its own model loses nothing
    found = judge(claim(**{**vars(wanted), "twin": "reference"}), *cells)
    assert found.verdict == claims.SHORT and "quality against dense reference" in found.remarks
    assert judge(claim(**{**vars(wanted), "twin": "absent"}), *cells).remarks[-1] == "quality not measured"


def test_a_model_that_selects_by_itself_is_told_apart_from_its_twin() -> None:
    cells = [record(model=model, key=model) for model in ("twins/dense", "twins/spark")]
    cells[0]["fidelity"]["bits_per_byte"], cells[1]["fidelity"]["bits_per_byte"] = 0.852, 0.884
    said = "The dense twin, twins/dense, is another model, trained alike: bits per byte 0.884 against its 0.852."
    groups = rows.group([*cells, record(model="twins/spark", batch=8, key="wide")])
    text = report.page(groups)
    assert text.split("## twins/spark")[1].count(said) == 1 and said not in text.split("## twins/spark")[0]
    assert "trained alike, not measured in this setting." in text.split("batch 8")[1]
    merged = board.page(board.sections({"one": groups}))
    assert merged.count(said) == 1 and said in merged.split("## twins/spark")[1]


def test_a_named_baseline_is_compared_from_its_samples() -> None:
    cell = record("teal", 0.8)
    cell["latency"] |= {"runner": "sparse", "samples": {"dense eager": [[6.0] * 9] * 3, "sparse": [[2.0] * 9] * 3}}
    found = judge(claim(baseline="dense eager", value=3), cell)
    assert found.verdict == "reproduced" and claims.measured(found) == OVER_EAGER


@pytest.mark.parametrize("gained", [0.9, 1.003])
def test_what_a_dense_runner_gains_alone_is_no_gain_of_a_method(gained: float) -> None:
    cell = record("teal", 0.8)
    samples = {"dense eager": [[6.0] * 9] * 3, "sparse": [[2.0] * 9] * 3}
    interval = [gained - 0.001, gained + 0.001]
    cell["latency"] |= {"runner": "sparse", "samples": samples, "speedup": gained, "ci": interval}
    found = judge(claim(baseline="dense eager", value=2), cell)
    assert found.verdict == "not reproduced" and "no faster than the fastest dense" in found.remarks
    alone = f"dense eager at its best (the fastest dense alone: {3 / gained:.2f}x), {gained:.2f}x over"
    assert alone in claims.measured(found)
    cell["latency"]["baseline"] = "dense eager"
    assert "alone" not in claims.measured(found)


def test_a_speed_up_is_of_the_density_that_was_timed() -> None:
    cell = record("teal", 0.6)
    cell["density"]["sites"] = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), {"mean": 0.6})
    wanted = claim(density=[0.58, 0.62])
    assert judge(wanted, cell).verdict == "reproduced"  # an older record does not say
    cell["latency"]["step"] = {"density": 0.55}
    found = judge(wanted, cell)
    assert found.verdict == "not measured" and found.remarks[0].endswith("(teal 0.6 at 0.55)")
    assert judge(claim(density=[0.5, 0.55]), cell).verdict == "reproduced"
    assert judge(claim(density=[0.58, 0.62], quantity="FLOPs"), cell).verdict == "reproduced"
    cell["density"] |= {"model": 0.8, "sites": {"ffn": {"mean": 0.6}}}  # half of the weights are FFN
    cell["latency"]["step"] = {"density": 0.7}
    assert judge(claim(density=[0.39, 0.41]), cell).verdict == "reproduced"


def test_a_slow_run_of_a_named_baseline_is_no_gain() -> None:
    cells = []
    for density, eager in ((0.8, 6.0), (0.7, 8.0)):
        cells.append(record("teal", density))
        dense = {**cells[-1]["latency"]["dense"], "dense eager": {"median": eager}}
        samples = {"dense eager": [[eager] * 9] * 3, "sparse": [[2.0] * 9] * 3}
        cells[-1]["latency"] |= {"runner": "sparse", "dense": dense, "samples": samples}
    found = judge(claim(baseline="dense eager", value=3.5), *cells)
    assert found.verdict == "partly" and claims.measured(found) == OVER_EAGER


def test_the_most_supporting_cell_of_all_sets_is_shown() -> None:
    other = record("teal", 0.7)
    other["machine"] = {**other["machine"], "identity": "n", "gpu": {**GPU, "name": "Other GPU"}}
    sets = {"one": rows.group([record("teal", 0.8)]), "two": rows.group([other])}
    sets["two"][0].rows[0].source = "two"
    text = claims.page([claim(), claim(method="lte")], sets)
    assert "2 claims: 1 reproduced, 0 partly, 0 not reproduced, 0 fell short on another model, 1 not measured." in text
    assert "1.43x [1.40, 1.46]" in text and "Other GPU, [two](two/records.jsonl)" in text and "1.25x" not in text
    assert text == claims.page([claim(), claim(method="lte")], sets)


def test_report_merges_a_folder_of_sets_and_sees_drift(tmp_path: Path) -> None:
    for name in ("one", "two", "local"):
        write(tmp_path / name, [record(), record("teal", 0.8)])
    assert list(board.sets(tmp_path)) == ["one", "two"]
    arguments = argparse.Namespace(out=str(tmp_path), readme=None, check=True)
    assert report.main(arguments) == 1 and not (tmp_path / claims.PAGE).exists()
    assert tmp_path / claims.PAGE in report.build(tmp_path)
    assert not (tmp_path / "records.jsonl").exists()  # a folder of sets stays one
    assert report.main(arguments) == 0
    (tmp_path / claims.PAGE).write_text("1.80x")
    assert report.main(arguments) == 1


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    write(tmp_path / "one", [record()])
    (tmp_path / claims.PAGE).mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        report.build(tmp_path)


def test_a_control_supports_no_claim_and_of_equals_the_smaller_loss_does() -> None:
    wanted = claim(method="moefication", quantity="FLOPs", value=9.0, loss=-99.0)
    near, far = (
        record("moefication", 0.8, options={"split": "random"}, key="near"),
        record("moefication", 0.4, key="far"),
    )
    far["cost"] = near["cost"]
    control = record("moefication", 0.2, options={"selector": "random"}, key="control")
    found = judge(wanted, record(), near, far, control)
    assert found.row is not None and found.row.options == "split=random"
    assert judge(wanted, record(), control).row is None
