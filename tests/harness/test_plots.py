"""The figures from fabricated records: what is drawn, in whose colour, beside what."""

import math
from typing import Any

import pytest

from harness import plots, report, rows, store
from harness.plots import style, time
from tests.harness.fabricated import record


def test_curves_and_profiles_are_drawn_where_records_have_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = {"mean": 0.5, "p99": 0.9, "layers": [0.4, 0.6], "spread": [[0.3, 0.4, 0.5]] * 2, "units": [16, 16]}
    ffn["unions"] = {"1": 0.5, "2": 0.7}
    for method, options in (("moefication", {}), ("moefication", {"selector": "oracle"}), ("lte", {})):
        for density in (0.7, 0.5, 0.3):
            found = record(method, density, options=options, key=f"{method}{options}{density}")
            store.append(tmp_path, {**found, "density": {"model": density, "sites": {"ffn": ffn}, "union": None}})
    store.append(tmp_path, record())
    files = {path.name for path in report.build(tmp_path)}
    assert {"quality.svg", "density.svg"} <= files
    page = (tmp_path / "LEADERBOARD.md").read_text()
    assert "](quality.svg)" in page and "](density.svg)" in page
    groups = rows.group(store.load(tmp_path))
    ((_, shown),) = profiles = plots.density.with_profiles(groups)
    assert len(plots.density.profiles(profiles).axes) == 3  # one is the legend's
    shown[0].ffn["histogram"] = [10, 0, 30]
    by_token = plots.density.profiles(profiles).axes[2]
    assert [list(line.get_ydata()) for line in by_token.lines] == [[0.25, 0, 0.75]]
    assert {(row.method, row.options) for row in shown} == {
        ("lte", ""),
        ("moefication", ""),
        ("moefication", "selector=oracle"),
    }
    assert [method for _, method in plots.quality.with_curves(groups)] == ["lte", "moefication"]
    monkeypatch.setattr(plots.density, "CROWDED", 2)
    apart = plots.density.with_profiles(groups)
    assert [{row.method for row in part} for _, part in apart] == [{"lte"}, {"moefication"}]


def test_a_method_has_a_colour_and_each_of_its_variants_a_marker() -> None:
    styles = style.styles(str(i) for i in range(20))
    assert len(set(styles.values())) == 20
    styles = style.styles(("lte", "lte (lr=1)", "teal"), style.first_word)
    assert styles["lte"][0] == styles["lte (lr=1)"][0] != styles["teal"][0] and len(set(styles.values())) == 3


def test_a_registered_method_looks_the_same_whatever_stands_beside_it() -> None:
    methods = style.registered()
    assert methods[:3] == ["teal", "lte", "moefication"] and not {"dense", "null"} & set(methods)
    looks = style.styles(methods)
    assert len(set(looks.values())) == len(methods)
    for i, name in enumerate(methods):
        assert looks[name][0] == style.COLOURS[i]
        beside = [name, f"{name} (a=1)", "gone", "split=random"]
        for kind in (str, style.first_word):
            found = style.styles(beside, kind)
            assert found[name] == looks[name] and len(set(found.values())) == len(beside)
    lora = style.styles(["lte-lora", "teal"], style.first_word)["lte-lora"]
    assert lora[0] == looks["lte"][0] and lora[1] != looks["lte"][1]


def drawn(records: list[Any]) -> dict[str, tuple[list[float], str, str]]:
    """Of each line of a table's first Pareto panel: bytes read per token in MB, line style and fill."""
    from matplotlib import pyplot as plt

    (found,) = rows.group(records)
    figure = plots.quality.pareto([(found, plots.quality.panels(found)[:1])])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    plt.close(figure)
    return {
        str(name): (sorted(line.get_xdata()), line.get_linestyle(), line.get_markerfacecolor())
        for name, line in lines.items()
    }


@pytest.mark.parametrize("variants", [1, style.CROWDED])
def test_a_line_is_one_method_with_one_set_of_options_and_never_a_control(variants: int) -> None:
    cells = [record("moefication", d, key=f"m{d}") for d in (0.7, 0.5)]
    for i in range(variants):  # half the bytes for the same quality: on the method's front, where the default is not
        better = record("moefication", 0.6, options={"split": str(i)}, key=f"v{i}")
        better["cost"]["decode"]["bytes"] /= 2
        cells.append(better)
    cells.append(record("lte", 0.5, options={"lr": 1.0}, key="lte"))
    cells.append(record("moefication", 0.5, options={"selector": "oracle"}, key="control"))
    found = drawn([record(), *cells])
    own = found["moefication"]
    assert own[0] == [7.0, 9.8] and own[1] == "-" and found["lte (lr=1.0)"][0] == [7.0]
    if variants == 1:
        assert found["moefication (split=0)"][0] == [4.2] and "other options" not in found
    else:
        assert found["other options"][1:] == ("None", "none")
        assert not any("split" in name or "selector" in name for name in found)
        (marks,) = (line for name, line in found.items() if name.startswith("_child") and line[2] == "none")
        assert marks == ([pytest.approx(4.2)] * variants, "None", "none")
    cells += [record("moefication", d, options={"split": "0"}, key=f"w{d}") for d in (0.8, 0.4)]
    if variants > 1:  # now that one has more densities than the default options
        found = drawn([record(), *cells])
        assert len(found["moefication (split=0)"][0]) == 3 and "moefication" not in found


def test_times_of_machines_of_a_kind_share_a_panel_as_ratios() -> None:
    from matplotlib import pyplot as plt

    first = [record(), record("teal", 0.5)]
    other = [record(), record("lte", 0.5), record("lte", 0.5, options={"selector": "oracle"}, key="control")]
    for entry in other:
        entry["machine"] = {**entry["machine"], "identity": "another of its kind"}
        entry["time"] = "2026-01-02T00:00:00+00:00"
        entry["key"] += " there"
    longer = [record(context=512), record("teal", 0.5, context=512)]
    (short, long) = time.settings(rows.group([*longer, *first, *other]))
    assert short.where == "decode, batch 1, context 384" and long.where == "decode, batch 1, context 512"
    assert [row.name for row in short.rows] == ["dense", "lte 0.5", "teal 0.5"]
    assert short.rows[0].record["machine"]["identity"] == "another of its kind"  # the newest dense
    figure = time.over_bytes([short])
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    plt.close(figure)
    assert points["lte"] == points["teal"] == ([0.5], [0.5]) and points["dense"] == ([1.0], [1.0])
    first[1]["latency"]["step"] = {"bytes": 4e6, "bytes_dense": 1e7, "density": 0.4}
    figure = time.over_bytes(time.settings(rows.group(first)))
    (teal,) = (line for line in figure.axes[0].lines if line.get_label() == "teal")
    plt.close(figure)
    assert list(teal.get_xdata()) == [0.4]  # what the timed steps read
    cpu = [{**entry, "cell": {**entry["cell"], "device": "cpu"}} for entry in first]
    assert not time.settings(rows.group(cpu)) and not time.settings(rows.group([record()]))


def test_dense_fine_tuned_on_the_same_text_stands_beside_every_curve() -> None:
    found = [record(), record("dense-finetuned", density=None, options={"lr": 0.001})]
    for entry in found:
        entry["density"] = None
    found[1]["items"] = {**found[1]["items"], "nll": [x + 0.1 for x in found[1]["items"]["nll"]]}
    found += [record(method, density) for method in ("teal", "lte") for density in (0.8, 0.6, 0.4)]
    figure = plots.quality.curves(plots.quality.with_curves(rows.group(found)))
    assert len(figure.axes) >= 2
    for axis in figure.axes[:2]:
        level = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in level] == [pytest.approx([math.exp(0.1)] * 2)]
        assert "dense-finetuned" in axis.get_legend_handles_labels()[1]
