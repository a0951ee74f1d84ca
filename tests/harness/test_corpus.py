"""The corpora: fixed splits, no leak from one to another, errors that say what to do."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from harness import corpus
from harness.corpus import Corpus, Document, load_corpus, near_duplicates, token_windows
from methods.errors import UsageError

SPLITS = ("train", "calibration", "evaluation")


def size(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text.encode("utf-8", "replace")) for document in documents)


def test_the_standard_library_is_enough_everywhere() -> None:
    stdlib = load_corpus("stdlib")
    assert size(stdlib.evaluation) >= 1_000_000
    assert size(stdlib.calibration) >= 400_000
    assert size(stdlib.train) >= 4_000_000


def test_no_module_is_in_two_splits() -> None:
    assert not corpus.EVALUATION_MODULES & corpus.CALIBRATION_MODULES
    assert not (corpus.EVALUATION_MODULES | corpus.CALIBRATION_MODULES) & corpus.OPTIONAL_MODULES
    stdlib = load_corpus("stdlib")
    modules = {split: {d.name.split("/")[0].removesuffix(".py") for d in getattr(stdlib, split)} for split in SPLITS}
    assert modules["evaluation"] <= corpus.EVALUATION_MODULES
    assert modules["calibration"] <= corpus.CALIBRATION_MODULES
    assert not modules["train"] & (corpus.EVALUATION_MODULES | corpus.CALIBRATION_MODULES | {"test", "idlelib"})


def test_no_near_duplicate_crosses_the_splits() -> None:
    stdlib = load_corpus("stdlib")
    assert near_duplicates(stdlib.train, stdlib.evaluation + stdlib.calibration) == []
    assert near_duplicates(stdlib.calibration, stdlib.evaluation) == []


def test_a_vendored_copy_is_a_near_duplicate() -> None:
    original = next(d for d in load_corpus("stdlib").evaluation if d.name == "argparse.py")
    lines = original.text.splitlines()
    copied = "\n".join(["import six"] * 20 + ["    " + line + "  " for line in lines[400:430]] + ["x = 1"] * 20)
    assert near_duplicates([Document("vendored", copied)], [original]) == ["vendored"]
    assert near_duplicates([Document("other", "\n".join(lines[400:403]))], [original]) == []


def test_the_names_cover_modules_that_moved() -> None:
    for names in ("datetime _pydatetime", "decimal _pydecimal", "inspect annotationlib", "pathlib glob"):
        assert {corpus.stdlib_split(name) for name in names.split()} == {"evaluation"}
    assert corpus.stdlib_split("_sysconfigdata__linux_x86_64-linux-gnu") is None
    assert corpus.stdlib_split("a_module_of_a_later_python") == "train"


def test_the_hash_names_the_text_and_its_split() -> None:
    a, b = Document("a", "x"), Document("b", "y")
    hashes = {
        Corpus("c", (a,), (b,), ()).hash,
        Corpus("c", (a, b), (), ()).hash,
        Corpus("c", (b, a), (), ()).hash,
        Corpus("c", (a, Document("b", "z")), (), ()).hash,
    }
    assert len(hashes) == 4 and all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)
    assert Corpus("c", (a,), (b,), ()).hash == Corpus("other name", (a,), (b,), ()).hash
    corpus._stdlib.cache_clear()
    assert load_corpus().hash == load_corpus("stdlib").hash


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(f"Story {i}.\n\nThe end of {i}." for i in range(200)))
    return path


def test_local_text_is_split_by_document(stories) -> None:
    local = load_corpus(str(stories))
    counts = [len(getattr(local, split)) for split in SPLITS]
    assert sum(counts) == 200 and 140 <= counts[0] <= 180 and min(counts) >= 8
    texts = [{d.text for d in getattr(local, split)} for split in SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert all("Story" in text and "The end" in text for text in set().union(*texts))
    assert load_corpus(str(stories)).hash == local.hash


def test_a_document_keeps_its_split_when_others_come(stories, tmp_path) -> None:
    before = {d.text for d in load_corpus(str(stories)).evaluation}
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"text": f"Another {i}"}) for i in range(50)))
    both = load_corpus(f"{stories}, {more}")
    assert before <= {d.text for d in both.evaluation}
    assert load_corpus(str(tmp_path)).hash == load_corpus(f"{more},{stories}").hash  # a folder, in order of names


def test_paragraphs_jsonl_copies_and_broken_bytes(tmp_path) -> None:
    paragraphs = tmp_path / "p.txt"
    paragraphs.write_bytes(b"\n \n".join(b"Paragraph %d \xff" % (i % 60) for i in range(120)))
    local = load_corpus(str(paragraphs))
    assert sum(len(getattr(local, split)) for split in SPLITS) == 60
    assert "\ufffd" in local.train[0].text
    rows = [
        "",
        " = Title A = \n",
        " Text one . \n",
        " = = Part = = \n",
        " Text two . \n",
        " = Title B = \n",
        " Text . \n",
    ]
    assert [text.count("Text") for text in corpus._articles(rows)] == [2, 1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("wikitext", "did you mean wikitext2"),
        ("missing/file.txt", "no such corpus file"),
        ("missing.jsonl", "no such corpus file"),
        ("", "no corpus given"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_corpus(spec)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "one document", "too few"),
        ("a.txt", "", "too few"),
        ("a.jsonl", '{"body": "x"}\n', 'no.*"text" field|not JSON lines'),
        ("a.jsonl", "not json\n", "not JSON lines"),
        ("a.csv", "x,y", "a .txt or .jsonl file"),
    ],
)
def test_an_unusable_file_gets_a_suggestion(tmp_path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=says):
        load_corpus(str(tmp_path / name))


def test_a_folder_may_have_the_name_of_a_file(stories) -> None:
    before = load_corpus(str(stories)).hash
    (stories.parent / "more.txt").mkdir()
    assert load_corpus(str(stories.parent)).hash == before


def test_a_folder_without_text_gets_a_suggestion(tmp_path) -> None:
    with pytest.raises(UsageError, match="no .txt or .jsonl"):
        load_corpus(str(tmp_path))


def test_an_unreachable_hub_gets_a_suggestion(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore detail")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("wikitext2", "c4"):
        with pytest.raises(UsageError, match=f"cannot load '{name}' .*use --corpus stdlib"):
            load_corpus(name)


def test_the_hub_corpora_keep_the_published_splits(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    class Rows(list):
        def take(self, count):
            return self[: min(count, 30)]

    def fake(path, config, split, streaming):
        asked.append((path, config, split, streaming))
        return Rows({"text": f"{split} {i}"} for i in range(40))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(corpus, "C4_DOCUMENTS", {"train": 20, "calibration": 10, "evaluation": 5})
    wikitext, c4 = load_corpus("wikitext2"), load_corpus("c4")
    assert wikitext.calibration[0].text == "validation 0" and wikitext.evaluation[0].text == "test 0"
    assert [len(getattr(c4, split)) for split in SPLITS] == [20, 10, 5]
    assert c4.calibration[0].text == "train 0" and c4.evaluation[0].text == "validation 0"
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False) in asked
    assert ("allenai/c4", "en", "train", True) in asked


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def test_token_windows() -> None:
    documents = [Document("a", "abc"), Document("b", "de")]
    windows = token_windows(documents, Letters(), 3)
    assert windows.tolist() == [[1, 97, 98], [99, 2, 1], [100, 101, 2]]
    assert token_windows(documents, Letters(), 3, limit=1).tolist() == [[1, 97, 98]]
    many = [Document("m", "".join(map(chr, range(100, 400))))]
    shuffled = token_windows(many, Letters(), 4, limit=20, seed=3)
    assert shuffled.shape == (20, 4)
    assert shuffled.tolist() == token_windows(many, Letters(), 4, seed=3)[:20].tolist()
    assert shuffled.tolist() != token_windows(many, Letters(), 4, seed=4)[:20].tolist()
    assert sorted(token_windows(many, Letters(), 4, seed=3).tolist()) == token_windows(many, Letters(), 4).tolist()
    with pytest.raises(UsageError, match="less than one window"):
        token_windows(documents, Letters(), 100)


def test_a_document_is_framed_by_what_the_tokenizer_has() -> None:
    frame = corpus.document_frame
    assert frame(SimpleNamespace(bos_token_id=1, eos_token_id=2)) == ([1], [2])
    assert frame(SimpleNamespace(bos_token_id=2, eos_token_id=2)) == ([], [2])
    assert frame(SimpleNamespace(bos_token_id=None, eos_token_id=None)) == ([], [])
