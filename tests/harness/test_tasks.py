"""The built-in tasks: every item is true to its document, solvable, and always the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import tasks
from harness.corpus import Corpus, Document, load_corpus
from harness.tasks import build
from methods.errors import UsageError

NAMES = sorted(tasks.TASKS)


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    chosen = ("json/decoder.py", "statistics.py", "glob.py")
    return {d.name: d for d in load_corpus("stdlib").evaluation if d.name in chosen}


def test_table_needs_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from harness.tasks import TASKS, check; check(TASKS);"
        "assert len(TASKS) >= 3 and not {'torch', 'lm_eval', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_task_has_a_builder() -> None:
    assert set(build.BUILDERS) == set(tasks.TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_enough_items_from_many_modules(name: str) -> None:
    made = build.items(name, load_corpus("stdlib").evaluation, count=2000)
    assert len(made) == 2000
    first = [item["source"].split("/")[0] for item in made[:200]]
    assert len(set(first)) >= 10
    assert max(first.count(source) for source in set(first)) < 60


@pytest.mark.parametrize("name", NAMES)
def test_items_continue_their_document(name: str, documents: dict[str, Document]) -> None:
    made = build.items(name, list(documents.values()), seed=1, count=150)
    assert len(made) == 150
    for item in made:
        context, text = item["context"], "\n" + documents[item["source"]].text
        answer = item["target"] if name == "stdlib_complete_line" else item["choices"][item["gold"]]
        assert "\n" + context + answer in text
        assert build.LEAST_CONTEXT / 2 < len(context) and len(context.encode()) <= build.CONTEXT
        assert context == context.rstrip()


def test_choices_are_distinct_and_balanced(documents: dict[str, Document]) -> None:
    for name in ("stdlib_next_line", "stdlib_identifier"):
        made = build.items(name, list(documents.values()), count=200)
        assert all(len(set(item["choices"])) == 4 for item in made)
        gold = [item["gold"] for item in made]
        assert all(gold.count(i) > 25 for i in range(4))


def test_next_line_options_are_alike(documents: dict[str, Document]) -> None:
    for item in build.items("stdlib_next_line", list(documents.values()), count=100):
        lines = [choice.removeprefix("\n") for choice in item["choices"]]
        assert len({len(line) - len(line.lstrip()) for line in lines}) == 1
        assert not set(lines) & set(item["context"].split("\n"))


def test_identifiers_occur_in_the_context(documents: dict[str, Document]) -> None:
    for item in build.items("stdlib_identifier", list(documents.values()), count=100):
        common = len(shared_tail(item["choices"]))
        for choice in item["choices"]:
            assert choice[: len(choice) - common].strip() in item["context"]


def shared_tail(texts: list[str]) -> str:
    tail = ""
    for letters in zip(*(text[::-1] for text in texts), strict=False):
        if len(set(letters)) > 1:
            break
        tail = letters[0] + tail
    return tail


def test_completions_are_short_and_one_line(documents: dict[str, Document]) -> None:
    for item in build.items("stdlib_complete_line", list(documents.values()), count=100):
        assert 3 <= len(item["target"].strip()) <= 16
        assert "\n" not in item["target"] and item["target"] == item["target"].rstrip()


@pytest.mark.parametrize("name", NAMES)
def test_items_depend_on_the_seed_alone(name: str, documents: dict[str, Document]) -> None:
    texts = list(documents.values())
    assert build.items(name, texts, seed=5, count=30) == build.items(name, texts, seed=5, count=30)
    assert build.items(name, texts, seed=5, count=30) != build.items(name, texts, seed=6, count=30)


def test_a_document_that_does_not_tokenise_is_harmless() -> None:
    broken = Document("broken.py", "def f(:\n    '''never closed\n" + "    x = 1\n" * 60)
    for name in NAMES:
        build.items(name, [broken], count=5)


def test_items_are_written_once(documents: dict[str, Document], tmp_path: Path) -> None:
    corpus = Corpus("stdlib", (), (), tuple(documents.values()))
    first = build.config("stdlib_identifier", corpus, "acc", folder=tmp_path)
    path = Path(first["dataset_kwargs"]["data_files"]["test"])
    stamp = path.stat().st_mtime_ns
    assert build.config("stdlib_identifier", corpus, "acc", folder=tmp_path) == first
    assert path.stat().st_mtime_ns == stamp and list(tmp_path.iterdir()) == [path]
    assert {"context", "choices", "gold", "source"} == set(json.loads(path.read_text().split("\n")[0]))
    other = build.config("stdlib_identifier", corpus, "acc", seed=1, folder=tmp_path)
    assert other["dataset_kwargs"] != first["dataset_kwargs"]


def test_unknown_tasks_are_named_with_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    index = type("Index", (), {"all_tasks": ["hellaswag", "piqa"]})()
    monkeypatch.setattr(tasks, "manager", lambda: index)
    tasks.check([*NAMES, "piqa"])
    with pytest.raises(UsageError, match="hellaswag"):
        tasks.check(["helaswag"])
    with pytest.raises(UsageError, match="stdlib_next_line"):
        tasks.check(["stdlib_nextline"])
    with pytest.raises(UsageError, match="stdlib_identifier"):
        tasks.check(["zzz"])
    with pytest.raises(UsageError, match="no such task file"):
        tasks.check(["missing.yaml"])
