"""The papers' orderings from fabricated records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from harness import orderings, report, rows, store
from harness.orderings import Ordering, pairs
from methods.registry import info
from tests.harness.fabricated import record, synthetic

RULE = Ordering(
    "dynamic beats fixed",
    "a paper",
    {"method": "d2dmoe", "rule": "dynamic"},
    {"method": "d2dmoe", "rule": "top-k"},
    "FLOPs",
)


def cell(method: str, density: float, shift: float = 0.0, flops: float = 1.0, **options: Any) -> dict[str, Any]:
    """A record whose windows are `shift` nats worse than another's, give or take a little of its own."""
    found = record(method, density, options=options, key=f"{method}{density}{options}")
    base = record()["items"]
    noise = [0.002 * ((7 * i) % 5 - 2) for i in range(len(base["nll"]))]
    found["items"] = {**base, "nll": [v + shift + n for v, n in zip(base["nll"], noise, strict=True)]}
    found["artifact"] = {"options": {**asdict(info(method).Options()), **options}, "manifest": {}}
    found["density"] = {"model": density, "union": None, "sites": {"ffn": {"mean": density, "p99": 1.0}}}
    found["cost"]["decode"]["flops"] *= flops
    return found


def measured(*records: dict[str, Any]) -> list[rows.Row]:
    (group,) = rows.group(store.latest([record(), *records]))
    return group.rows


def text(*records: dict[str, Any]) -> str:
    return report.page(rows.group(store.latest([record(), *records])))


def line(page: str, ordering: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {ordering}"))


def test_the_entries_name_methods_and_options_that_exist() -> None:
    found = orderings.load()
    assert len(found) == len({entry.ordering for entry in found}) >= 8
    for entry in found:
        assert entry.equal in (*orderings.DENSITIES, "FLOPs")
        # An oracle is charged for what it then skips.
        assert entry.equal != "FLOPs" or "oracle" not in (entry.better.get("selector"), entry.worse.get("selector"))
        for side in (entry.better, entry.worse):
            options = asdict(info(side["method"]).Options())
            for name, wanted in side.items():
                for value in wanted if isinstance(wanted, list) else [wanted]:
                    assert name == "method" or type(options[name]) is type(value)
    defaults = asdict(info("d2dmoe").Options())
    assert any(entry.better.get("weight") == defaults["weight"] for entry in found)


def test_a_control_is_no_cell_of_its_method_unless_it_is_named() -> None:
    better, fixed = cell("d2dmoe", 0.5), cell("d2dmoe", 0.5, 0.2, rule="top-k")
    controls = [cell("d2dmoe", 0.5, 0.1, rule=rule, selector="random") for rule in ("dynamic", "top-k")]
    assert len(pairs(RULE, measured(better, fixed, *controls))) == 1 and not pairs(RULE, measured(*controls))
    chance = Ordering("", "", {"method": "d2dmoe"}, {"method": "d2dmoe", "selector": "random"}, "density")
    (found,) = pairs(chance, measured(better, controls[0]))
    assert not found.better.control and found.worse.control


def test_cells_pair_on_the_seeds_that_both_have() -> None:
    def seeded(found: dict[str, Any], seed: int, shift: float = 0.0) -> dict[str, Any]:
        items = found["items"]
        changed = {**items, "nll": [v + shift for v in items["nll"]]}
        return {**found, "key": f"{found['key']}-{seed}", "cell": {**found["cell"], "seed": seed}, "items": changed}

    one, two = cell("d2dmoe", 0.5), seeded(cell("d2dmoe", 0.5), 1, shift=9.0)
    fixed = cell("d2dmoe", 0.5, 0.2, rule="top-k")
    dense = seeded(record(), 1)
    ((alone,),) = [pairs(RULE, measured(one, fixed))]
    ((joined,),) = [pairs(RULE, measured(one, two, dense, fixed))]
    assert joined.better.seeds == [0, 1] and joined.worse.seeds == [0]
    assert joined.difference == alone.difference  # the other seed says nothing about this pair
    both = measured(one, two, dense, fixed, seeded(fixed, 1, shift=9.0))
    ((wide,),) = [pairs(RULE, both)]
    assert wide.difference.estimate == pytest.approx(alone.difference.estimate)
    assert not pairs(RULE, measured(two, dense, fixed))  # no seed in common


@pytest.mark.parametrize("shift, verdict", [(0.2, "**seen** (1 of 1)"), (0.0, "**open** (1 of 1)")])
def test_verdicts(shift: float, verdict: str) -> None:
    page = text(cell("moefication", 0.5), cell("moefication", 0.5, shift, selector="similarity"))
    found = line(page, "a learned router beats similarity")
    assert verdict in found and "MoEfication, table 2" in found
    assert (f"0.5: {-shift:+.3f} [" in found) == bool(shift)
    assert "LTE beats MoEfication;" in page.split("**Not measured** here: ")[1]


def test_every_density_counts_and_is_told() -> None:
    def both(density: float, shift: float) -> list[dict[str, Any]]:
        return [cell("lte", density, eta=1.0, trials=4), cell("moefication", density, shift, variant="relu")]

    page = text(*both(0.7, 0.1), *both(0.5, 0.1), *both(0.3, -0.1))
    found = line(page, "LTE beats MoEfication ")
    assert "**mixed**: 2 seen, 1 reversed" in found and "0.3 (eta=1.0): +0.1" in found
    assert found.count("] reversed") == 1 and "**reversed** (1 of 1)" in line(text(*both(0.5, -0.1)), "LTE beats")


def test_moefication_of_a_gated_model_counts_where_fine_tuning_gave_it_relu() -> None:
    entry = next(entry for entry in orderings.load() if entry.ordering == "LTE beats MoEfication")
    mean, relufied = cell("moefication", 0.5, 0.5), cell("moefication", 0.5, 0.1, variant="relufied")
    mean["artifact"]["manifest"]["variant"] = "mean"  # what auto chose
    assert not pairs(entry, measured(cell("lte", 0.5), mean))
    (found,) = pairs(entry, measured(cell("lte", 0.5), mean, relufied))
    assert found.worse.options == "variant=relufied" and found.verdict == "seen"
    mean["artifact"]["manifest"]["variant"] = "relu"
    assert pairs(entry, measured(cell("lte", 0.5), mean))


def test_a_pair_is_equal_where_it_should_be_and_the_better_one_has_no_more() -> None:
    dynamic = cell("d2dmoe", 0.5)
    for flops, told in ((1.0, 1), (0.99, 1), (1.08, 1), (0.95, 0), (1.2, 0)):  # of half of dense
        assert len(pairs(RULE, measured(dynamic, cell("d2dmoe", 0.5, 0.1, flops, rule="top-k")))) == told, flops
    near, far = cell("d2dmoe", 0.5, 0.1, 1.01, rule="top-k"), cell("d2dmoe", 0.54, 0.1, rule="top-k")
    (found,) = pairs(RULE, measured(dynamic, far, near))
    assert found.worse.target == 0.5


def test_an_oracle_of_heads_pairs_with_the_router_that_keeps_as_many() -> None:
    entry = next(entry for entry in orderings.load() if entry.better == {"method": "polar", "selector": "oracle"})

    def polar(density: float, shift: float, flops: float = 1.0, **options: Any) -> dict[str, Any]:
        found = cell("polar", density, shift, flops, **options)
        found["density"]["sites"] = {"heads": {"mean": density}, "ffn": {"mean": 0.3}}
        return found

    routers = [polar(0.5, 0.2), polar(0.75, 0.1)]
    (found,) = pairs(entry, measured(polar(0.5, 0.0, 1.5, selector="oracle"), *routers))
    assert found.worse.target == 0.5 and found.verdict == "seen"


def test_what_an_ordering_does_not_name_is_equal() -> None:
    fixed = cell("d2dmoe", 0.5, 0.1, rule="top-k")
    assert pairs(RULE, measured(cell("d2dmoe", 0.5, scope="layer"), fixed))  # how a density is reached
    assert not pairs(RULE, measured(cell("d2dmoe", 0.5, weight=0.0), fixed))
    learned = next(entry for entry in orderings.load() if entry.ordering == "LTE beats MoEfication")
    assert not pairs(learned, measured(cell("lte", 0.5), cell("moefication", 0.5, 0.1, expert_size=16, variant="relu")))
    other = cell("d2dmoe", 0.5, 0.1, rule="top-k")
    other["items"]["tokens"] = [100] * 20
    assert not pairs(RULE, measured(cell("d2dmoe", 0.5), other))


def test_nothing_is_said_where_nothing_was_measured() -> None:
    assert "orderings" not in text(record("teal", 0.5), cell("lte", 0.5))
    assert "orderings" not in report.page(rows.group([synthetic("dense"), synthetic("lte", 0.5)]))
    twice = [cell("moefication", 0.5), cell("moefication", 0.5, 0.1, selector="similarity")]
    again = [{**r, "key": r["key"] + "b", "cell": {**r["cell"], "batch": 8}} for r in [record(), *twice]]
    assert text(*twice, *again).count("a learned router beats similarity") == 1
