"""The documentation names what exists."""

import re
from pathlib import Path

import pytest

from harness.cli import VERBS
from methods.registry import BUILT_IN

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("results/")]  # results are generated
    assert not [link for link in local if not (page.parent / link).exists()]


def test_readme_lists_every_method_and_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in BUILT_IN if f"| `{name}` |" not in text]
    assert not [verb for verb in VERBS if f"python -m harness {verb}" not in text]


def test_architecture_names_every_module_of_the_harness() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = " ".join(re.findall(r"^\| `.*?\|", text, re.MULTILINE))
    modules = {path.stem for path in (ROOT / "harness").glob("*.py")} - {"__init__", "__main__"}
    assert not [name for name in sorted(modules) if not re.search(rf"\b{name}\b", places)]


def test_the_first_example_in_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None and "runtime(model, handle, share=True)" in example[1]
    monkeypatch.chdir(ROOT)
    exec(example[1], {})
