"""Text on every machine, split by document into train, calibration and evaluation.

The default corpus is the running Python's own standard library, split by top-level module name into fixed lists, so
that the same modules are held out on every machine and Python version. Other sources: WikiText-2 and C4 from the
Hugging Face hub, and local `.txt` and `.jsonl` files or folders of them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch

NAMED = ("stdlib", "python", "wikitext2", "c4")

# Modules that every installation of Python 3.11 to 3.14 has. Where code moved between versions (datetime to
# _pydatetime, the globbing of pathlib to glob, annotations of typing and inspect to annotationlib) all names are here.
EVALUATION_MODULES = frozenset(
    "argparse dataclasses datetime _pydatetime _strptime decimal _pydecimal glob importlib inspect annotationlib json"
    " logging pathlib shutil statistics subprocess tarfile typing zipfile".split()
)
CALIBRATION_MODULES = frozenset(
    "calendar configparser csv difflib enum fractions heapq ipaddress mailbox textwrap xmlrpc".split()
)
# Left out: parts that some installations lack, and files that a machine or a build generates.
OPTIONAL_MODULES = frozenset(
    "distutils ensurepip idlelib lib2to3 pydoc_data site-packages dist-packages sitecustomize test tkinter"
    " turtle turtledemo".split()
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "test", "tests"})

NGRAM_LINES = 8
NGRAM_CHARACTERS = 160

PYTHON_BYTES = 200_000_000
C4_DOCUMENTS = {"train": 20_000, "calibration": 1_000, "evaluation": 1_000}


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in three splits that share no document and, for the standard library, no near-duplicate."""

    name: str
    train: tuple[Document, ...]
    calibration: tuple[Document, ...]
    evaluation: tuple[Document, ...]

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over the split, name and text of every document."""
        digest = hashlib.sha256()
        for split in ("train", "calibration", "evaluation"):
            for document in getattr(self, split):
                for part in (split, document.name, document.text):
                    digest.update(part.encode("utf-8", "replace") + b"\0")
        return digest.hexdigest()[:16]


def load_corpus(spec: str = "stdlib") -> Corpus:
    """Load `stdlib`, `python`, `wikitext2`, `c4`, or local paths (comma-separated `.txt`, `.jsonl` files or folders).

    `python` is `stdlib` with more to train on: the permissively licensed packages installed here, as in the recipe of
    the reference models.

    Raises `UsageError` for an unknown name, a missing or unreadable file, text too short to split, or an
    unreachable hub.
    """
    if spec == "stdlib":
        return _stdlib()
    if spec == "python":
        return _python()
    if spec == "wikitext2":
        return _wikitext2()
    if spec == "c4":
        return _c4()
    paths = [Path(part.strip()).expanduser() for part in spec.split(",") if part.strip()]
    if not paths:
        raise UsageError(f"no corpus given: use {', '.join(NAMED)}, or the path of a .txt or .jsonl file.")
    for path in paths:
        if not path.exists():
            if len(paths) == 1 and not path.suffix and "/" not in spec:
                raise unknown("corpus", spec, NAMED, "Or give the path of a .txt or .jsonl file or a folder.")
            raise UsageError(f"no such corpus file '{path}': give an existing .txt or .jsonl file or a folder.")
    return _local(spec, paths)


def token_windows(
    documents: Iterable[Document], tokenizer: Any, window: int, limit: int | None = None, seed: int | None = None
) -> torch.LongTensor:
    """Tokens [n, window] int64: the documents in order, each within the tokenizer's bos and eos, cut into full windows.

    A `seed` shuffles the windows, always in the same way; `limit` caps n, after the shuffle. Raises `UsageError`
    when the documents do not fill one window.
    """
    import torch

    tokens: list[int] = []
    wanted = limit * window if limit is not None and seed is None else None
    for piece in _tokenised(documents, tokenizer):
        tokens += piece
        if wanted is not None and len(tokens) >= wanted:
            break
    count = len(tokens) // window
    if count == 0:
        raise UsageError(f"the corpus has {len(tokens)} tokens, less than one window of {window}: use more text.")
    windows = torch.tensor(tokens[: count * window], dtype=torch.long).view(count, window)
    if seed is not None:
        order = list(range(count))
        random.Random(seed).shuffle(order)
        windows = windows[torch.tensor(order)]
    return windows[:limit]  # type: ignore[return-value]


def document_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that open and close a document: bos and eos, once each, where the tokenizer has them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos] if bos is not None and bos != eos else [], [eos] if eos is not None else []


def _tokenised(documents: Iterable[Document], tokenizer: Any, batch: int = 16) -> Iterator[list[int]]:
    before, after = document_frame(tokenizer)
    texts = [document.text for document in documents]
    for start in range(0, len(texts), batch):
        encoded = tokenizer(texts[start : start + batch], add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            yield [*before, *ids, *after]


# Near-duplicates: copies of a module (vendored, or moved between versions) share runs of lines with it.


def line_ngrams(text: str) -> Iterator[str]:
    """Every run of NGRAM_LINES consecutive non-blank lines, white space normalised, with enough text to be telling."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    for start in range(max(1, len(lines) - NGRAM_LINES + 1)):
        ngram = "\n".join(lines[start : start + NGRAM_LINES])
        if len(ngram) >= NGRAM_CHARACTERS:
            yield ngram


def ngram_set(documents: Iterable[Document]) -> set[str]:
    """The line n-grams of all documents: what near-duplicates are searched against."""
    return {ngram for document in documents for ngram in line_ngrams(document.text)}


def is_near_duplicate(text: str, ngrams: set[str]) -> bool:
    """Whether the text shares a run of NGRAM_LINES lines with the documents that `ngrams` was made of."""
    return any(ngram in ngrams for ngram in line_ngrams(text))


def near_duplicates(documents: Iterable[Document], others: Iterable[Document]) -> list[str]:
    """Names of the documents that share a run of NGRAM_LINES normalised lines with any of `others`."""
    ngrams = ngram_set(others)
    return [document.name for document in documents if is_near_duplicate(document.text, ngrams)]


def _without_near_duplicates(documents: Sequence[Document], others: Sequence[Document]) -> tuple[Document, ...]:
    dropped = set(near_duplicates(documents, others))
    return tuple(document for document in documents if document.name not in dropped)


# The standard library.


def stdlib_split(module: str) -> str | None:
    """The split of a top-level module of the standard library, or None where it is left out of all."""
    if module in EVALUATION_MODULES:
        return "evaluation"
    if module in CALIBRATION_MODULES:
        return "calibration"
    generated = module.startswith(("_sysconfigdata", "_sysconfig_vars", "config-", "lib-dynload"))
    return None if generated or module in OPTIONAL_MODULES else "train"


@cache
def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "evaluation": []}
    for entry in sorted(root.iterdir()):
        split = stdlib_split(entry.name.removesuffix(".py"))
        if split is None:
            continue
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            relative = path.relative_to(root)
            if path.suffix != ".py" or SKIPPED_FOLDERS.intersection(relative.parts):
                continue
            text = path.read_text("utf-8", "replace")
            if text.strip():
                splits[split].append(Document(relative.as_posix(), text))
    if not splits["evaluation"]:
        raise UsageError(f"no standard library sources under '{root}': give a .txt or .jsonl file instead.")
    evaluation = tuple(splits["evaluation"])
    calibration = _without_near_duplicates(splits["calibration"], evaluation)
    train = _without_near_duplicates([*splits["train"], *_topics()], (*evaluation, *calibration))
    return Corpus("stdlib", train, calibration, evaluation)


@cache
def _python() -> Corpus:
    from .reference.text import training_documents

    corpus = _stdlib()
    documents, _ = training_documents(corpus, PYTHON_BYTES)
    return Corpus("python", tuple(documents), corpus.calibration, corpus.evaluation)


def _topics() -> list[Document]:
    """The language reference as `help()` shows it: prose about Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [Document(f"pydoc_data/topics/{name}", topics[name]) for name in sorted(topics)]


# The hub.


def _hub(name: str, path: str, config: str, split: str, limit: int | None = None) -> list[str]:
    try:
        from datasets import load_dataset

        rows = load_dataset(path, config, split=split, streaming=limit is not None)
        return [row["text"] for row in (rows if limit is None else rows.take(limit))]
    except Exception as error:  # the hub's client raises many unrelated types when it is out of reach
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot load '{name}' from the hub ({reason}): check the network and `pip install datasets`, "
            "or use --corpus stdlib or a local .txt or .jsonl file."
        ) from error


def _wikitext2() -> Corpus:
    splits = {
        split: _numbered(split, _articles(_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", part)))
        for split, part in (("train", "train"), ("calibration", "validation"), ("evaluation", "test"))
    }
    return Corpus("wikitext2", **splits)


def _c4() -> Corpus:
    held_in = _hub("c4", "allenai/c4", "en", "train", C4_DOCUMENTS["train"] + C4_DOCUMENTS["calibration"])
    evaluation = _hub("c4", "allenai/c4", "en", "validation", C4_DOCUMENTS["evaluation"])
    cut = C4_DOCUMENTS["calibration"]
    return Corpus(
        "c4",
        _numbered("train", held_in[cut:]),
        _numbered("calibration", held_in[:cut]),
        _numbered("evaluation", evaluation),
    )


def _numbered(prefix: str, texts: Iterable[str]) -> tuple[Document, ...]:
    return tuple(Document(f"{prefix}/{i}", text) for i, text in enumerate(texts))


def _articles(rows: Sequence[str]) -> list[str]:
    """WikiText's rows are paragraphs: join those of one article. Other rows are documents as they are."""
    title = re.compile(r"\s*= [^=]+ =\s*")
    if not any(title.fullmatch(row) for row in rows):
        return [row for row in rows if row.strip()]
    articles: list[list[str]] = [[]]
    for row in rows:
        if title.fullmatch(row):
            articles.append([])
        articles[-1].append(row)
    return [text for text in ("".join(article) for article in articles) if text.strip()]


# Local files.


def _local(spec: str, paths: Sequence[Path]) -> Corpus:
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix in (".txt", ".jsonl") and p.is_file()]
        if not found:
            raise UsageError(f"no .txt or .jsonl file in '{path}': give a folder that holds text.")
        files += found
    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "evaluation": []}
    seen: set[str] = set()
    for file in files:
        for i, text in enumerate(_read(file)):
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            if digest not in seen:  # a copy would hash to the same split, but count twice
                seen.add(digest)
                part = int(digest[:8], 16) % 10
                split = "evaluation" if part == 9 else "calibration" if part == 8 else "train"
                splits[split].append(Document(f"{file.name}/{i}", text))
    empty = [split for split, documents in splits.items() if not documents]
    if empty:
        raise UsageError(
            f"'{spec}' has {len(seen)} documents, too few for a {' and '.join(empty)} split: give at least a few "
            "dozen documents, separated by blank lines or <|endoftext|> in .txt, one per line in .jsonl."
        )
    name = ",".join(path.name for path in paths)
    return Corpus(name, *(tuple(splits[split]) for split in ("train", "calibration", "evaluation")))


def _read(file: Path) -> list[str]:
    if file.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"cannot read '{file}': a corpus is a .txt or .jsonl file, or a folder of them.")
    content = file.read_text("utf-8", "replace")
    if file.suffix == ".txt":
        separator = r"<\|endoftext\|>" if "<|endoftext|>" in content else r"\n\s*\n"
        return [text.strip() for text in re.split(separator, content) if text.strip()]
    try:
        return _articles([json.loads(line)["text"] for line in content.split("\n") if line.strip()])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'\'{file}\' is not JSON lines with a "text" field: write one {{"text": "..."}} per line.'
        ) from error
