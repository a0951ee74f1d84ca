"""The interactive page: what it embeds, and what a browser makes of it."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import board, report, webpage
from harness.plots import style
from tests.harness.browser import Browser, find
from tests.harness.fabricated import GPU, record, synthetic, write

needs_browser = pytest.mark.skipif(find() is None, reason="no Chromium on the path")


def records() -> list[dict[str, Any]]:
    """Two methods at two batches on one GPU, one cell on another, and random weights."""
    found = []
    for batch in (1, 8):
        found += [record(batch=batch), record("null", 1.0, batch=batch)]
        for method, density in (("teal", 0.9), ("teal", 0.5), ("lte", 0.7)):
            cell = record(method, density, batch=batch)
            cell["density"]["sites"] = {"ffn": {"mean": density, "p99": 0.9, "layers": [density, 0.5, 0.4]}}
            if method == "teal":
                more = {"spread": [[0.2, 0.5, 0.9]] * 3, "unions": {"1": 0.5, "2": 0.7}, "histogram": [1, 2, 1]}
                cell["density"]["sites"]["ffn"] |= more
            cell["latency"]["step"] = {"bytes": 0.9 * density, "bytes_dense": 1.0}
            cell["latency"]["breakdown"] = {"ms": {"linears": 1.0, "idle": 0.2}}
            found.append(cell)
    found.append(record("moefication", 0.5, options={"selector": "oracle"}, batch=8))
    other = record("teal", 0.9, options={"note": "</script><b>"})
    other["machine"] = {**other["machine"], "identity": "o", "gpu": {**GPU, "name": "Other GPU"}}
    return [*found, other, synthetic("dense"), synthetic("teal", 0.5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results")
    write(place / "one", records())
    report.write_html(place)
    return place


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_page_holds_every_row_with_the_numbers_of_the_leaderboard(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert text == webpage.page(board.sets(folder))
    data = embedded(text)
    assert len(data["rows"]) == len(records())
    teal = next(r for r in data["rows"] if (r["label"], r["batch"], r["place"]) == ("teal 0.9", 1, "Test GPU"))
    assert teal["link"] == "one/records.jsonl" and teal["key"] == "teal-0.9"
    assert teal["sites"]["ffn"] == {
        "layers": [0.9, 0.5, 0.4],
        "spread": [[0.2, 0.9]] * 3,
        "tokens": [0.25, 0.5, 0.25],
        "unions": {"1": 0.5, "2": 0.7},
    }
    lte = next(r for r in data["rows"] if r["label"] == "lte 0.7")  # an older record
    assert lte["sites"]["ffn"]["spread"] is lte["sites"]["ffn"]["tokens"] is None
    assert teal["read"] == pytest.approx(0.81)  # by the timed steps
    assert teal["mb"] == pytest.approx(12.6) and teal["speedup"] == pytest.approx([1 / 0.9, 0.98 / 0.9, 1.02 / 0.9])
    assert teal["ranks"][0] == {"place": 1, "text": "1"} and teal["time"] == {"linears": 1.0, "idle": 0.2}
    random_weights = [r for r in data["rows"] if "synthetic" in r["model"]]
    assert all(r["loss"] is None and r["perplexity"] is None for r in random_weights)
    assert data["methods"] == style.registered()  # whose places are their colours, also of those without a row
    assert len(data["claims"]) >= 13 and all(data["machines"][r["machine"]] for r in data["rows"])


def test_page_loads_nothing(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert "</script><b>" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text.replace("https://arxiv.org", "#")) and "import(" not in text
    assert "default-src 'none'" in text


def test_report_writes_the_page_of_a_single_set_too(tmp_path: Path) -> None:
    out = write(tmp_path / "set", records()[:3])
    assert report.main(argparse.Namespace(out=out, readme=None, check=False, html=True)) == 0
    row = embedded((tmp_path / "set" / "index.html").read_text())["rows"][0]
    assert row["link"] == "records.jsonl"


@needs_browser
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_page_draws_and_fits(folder: Path, browser: Browser, width: int, mobile: bool) -> None:
    browser.open(folder / "index.html", width, mobile=mobile, fragment="#place=Test+GPU")
    assert browser.problems() == []
    charts = {name: browser.run(f"document.querySelectorAll('#{name} svg[role=img]').length") for name in SECTIONS}
    assert charts == {"pareto": 3, "grid": 1, "layers": 3, "time": 3}
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("[...document.querySelectorAll('svg[role=img]')].every((s) => s.getAttribute('aria-label'))")
    assert browser.run(
        "[...document.querySelectorAll('#pareto svg path')].every((p) => !/NaN|undefined/.test(p.outerHTML))"
    )
    scales = "[...document.querySelectorAll('main svg[role=img]')].map((s) => s.clientWidth / s.viewBox.baseVal.width)"
    smallest = f"Math.min(...{scales})"
    assert browser.run(smallest) > 0.9  # text in charts is not scaled down


SECTIONS = ("pareto", "grid", "layers", "time")
CELLS = "[...document.querySelectorAll('#table tbody th')].map((cell) => cell.textContent)"


def choose(browser: Browser, name: str, value: str) -> None:
    field = f"document.querySelector('select[name={name}]')"
    browser.run(f"({field}.value = {json.dumps(value)}, {field}.dispatchEvent(new Event('change')), 0)")


@needs_browser
def test_filters_by_model_and_gpu_and_links_keep_the_choice(folder: Path, browser: Browser) -> None:
    browser.open(folder / "index.html", 1280)
    choose(browser, "place", "Test GPU")
    assert browser.run(CELLS) == ["dense", "null", "teal 0.9", "lte 0.7", "teal 0.5"]
    choose(browser, "place", "Other GPU")
    assert browser.run(CELLS) == ["teal 0.9"]
    assert "Other GPU" in browser.run("document.getElementById('machines').textContent")
    choose(browser, "place", "Test GPU")
    choose(browser, "model", "reference (synthetic weights)")
    assert browser.run(CELLS) == ["dense", "teal 0.5"]
    assert "no accuracy" in browser.run("document.getElementById('pareto').textContent")
    address = browser.run("location.hash")
    browser.open(folder / "index.html", 1280, fragment=address)
    assert browser.run(CELLS) == ["dense", "teal 0.5"]


@needs_browser
def test_a_control_is_drawn_with_its_method_alone_and_off_the_front(folder: Path, browser: Browser) -> None:
    legend = "[...document.querySelectorAll('#pareto figure:first-child .legend li')].map((item) => item.textContent)"
    browser.open(folder / "index.html", 1280, fragment="#place=Test+GPU&batch=8")
    assert browser.run(legend) == ["dense", "lte", "teal"]
    front = browser.run("document.querySelector('#pareto .front').getAttribute('d').split('H').length")
    choose(browser, "method", "moefication")
    assert browser.run(legend) == ["dense", "moefication (selector=oracle)"]
    assert front > browser.run("document.querySelector('#pareto .front').getAttribute('d').split('H').length") == 2
    choose(browser, "batch", "1")  # where this method has no cell
    assert browser.run("document.querySelector('select[name=method]').value") == "all"


@needs_browser
def test_many_variants_share_the_line_of_their_method(tmp_path: Path, browser: Browser) -> None:
    variants = [record("moefication", 0.5, options={"seed": i}, key=f"m{i}") for i in range(12)]
    write(tmp_path / "one", [record(), record("lte", 0.7), *variants])
    report.write_html(tmp_path)
    browser.open(tmp_path / "index.html", 1280)
    legend = "[...document.querySelectorAll('#pareto figure:first-child .legend li')].map((item) => item.textContent)"
    assert browser.run(legend) == ["dense", "lte", "moefication"]
    choose(browser, "method", "moefication")
    assert len(browser.run(legend)) == 13 and browser.problems() == []


@needs_browser
def test_tables_sort_by_keyboard(folder: Path, browser: Browser) -> None:
    browser.open(folder / "index.html", 1280, fragment="#place=Test+GPU")
    browser.run(
        "([...document.querySelectorAll('#table th button')].find((b) => b.textContent.startsWith('MB')).focus(), 0)"
    )
    browser.key("Enter", "\r")
    up = browser.run(CELLS)
    assert up == ["teal 0.5", "lte 0.7", "teal 0.9", "dense", "null"]
    browser.key("Enter", "\r")  # the focus stays on the title
    assert browser.run(CELLS) == ["dense", "null", "teal 0.9", "lte 0.7", "teal 0.5"]
    assert browser.run("document.querySelector('#table th[aria-sort=descending]').textContent").startswith("MB")
    browser.run(
        "([...document.querySelectorAll('#table th button')].find((b) => b.textContent.startsWith('rank')).focus(), 0)"
    )
    browser.key("Enter", "\r")
    assert browser.run(CELLS) == ["teal 0.9", "dense", "null", "lte 0.7", "teal 0.5"]  # without a rank: at the end
    browser.open(folder / "index.html", 1280)
    browser.key("Tab")
    assert browser.run("document.activeElement.className") == "skip"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(folder: Path, browser: Browser, scheme: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(folder / "index.html", 1280)
    lowest = browser.run(CONTRAST)
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert lowest >= 4.5


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const text = parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const [a, b] = [light(text), light(ground(element.closest("body *")))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return Math.min(...[...document.querySelectorAll("p, li, td, th, label, select, a, button, svg text")].map(contrast));
})()"""


@needs_browser
def test_print_has_everything_on_a_few_pages(folder: Path, browser: Browser) -> None:
    browser.open(folder / "index.html", 1280)
    pdf = browser.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 2 <= pages <= 8
    browser.call("Emulation.setEmulatedMedia", media="print")
    clipped = browser.run(
        "[...document.querySelectorAll('.scroll')].filter((s) => s.scrollWidth > s.clientWidth + 1).length"
    )
    browser.call("Emulation.setEmulatedMedia", media="")
    assert clipped == 0
