"""Builds the items of the built-in tasks from Python source that no model here was trained on.

Every context starts at a line boundary and is short enough (`CONTEXT` bytes, some seventy tokens) that thousands
of items run on a laptop, and every item can be solved from its context by a model that knows Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import keyword
import os
import random
import tokenize
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.artifacts import cache_dir
from harness.corpus import Corpus, Document

ITEMS = 2500
CONTEXT = 240
LEAST_CONTEXT = 100
REST = 24

Item = dict[str, Any]


@dataclass(frozen=True)
class Name:
    """An identifier in the code: its place, and whether it follows a dot."""

    row: int
    column: int
    text: str
    attribute: bool


class Source:
    """One document: its lines, the tokens of its code by row (none if it does not tokenise), and its identifiers."""

    def __init__(self, document: Document) -> None:
        self.name = document.name
        self.lines = document.text.split("\n")
        self.rows: dict[int, list[tokenize.TokenInfo]] = {}
        self.names: list[Name] = []
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(document.text).readline))
        except (tokenize.TokenError, SyntaxError):
            tokens = []
        previous = ""
        for token in tokens:
            row, column = token.start[0] - 1, token.start[1]
            self.rows.setdefault(row, []).append(token)
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                self.names.append(Name(row, column, token.string, previous == "."))
            previous = token.string

    def is_code(self, row: int) -> bool:
        """Whether the line starts with code, rather than with a comment or in a string."""
        first = next((t for t in self.rows.get(row, ()) if t.string.strip()), None)
        return first is not None and first.type in (tokenize.NAME, tokenize.OP)

    def context(self, row: int, column: int = 0) -> str:
        """The text up to (row, column), at most CONTEXT bytes, from a line boundary; empty if too little."""
        text = self.lines[row][:column]
        for line in reversed(self.lines[:row]):
            if len(text.encode()) + len(line.encode()) + 1 > CONTEXT:
                break
            text = f"{line}\n{text}"
        return text.lstrip("\n") if len(text.strip()) >= LEAST_CONTEXT else ""

    def seen(self, context: str, row: int, column: int) -> dict[str, bool]:
        """The identifiers of a context that ends at (row, column), the latest first: is it an attribute?"""
        first = row - context.count("\n")
        known: dict[str, bool] = {}
        for index in range(bisect_left(self.names, (row, column), key=lambda n: (n.row, n.column)) - 1, -1, -1):
            name = self.names[index]
            if name.row < first:
                break
            known.setdefault(name.text, name.attribute)
        return known


def next_line(source: Source, rng: random.Random) -> Iterator[Callable[[], Item | None]]:
    """Choose among the line that follows and three others of the file, alike in indentation and length."""
    rows = [row for row, line in enumerate(source.lines) if 10 <= len(line.strip()) <= 60 and source.is_code(row)]
    by_indent: dict[int, list[str]] = {}
    for line in dict.fromkeys(source.lines[row] for row in rows):
        by_indent.setdefault(_indent(line), []).append(line)

    def item(row: int) -> Item | None:
        line, context = source.lines[row], source.context(row).rstrip()
        seen = set(context.split("\n"))
        alike = [
            other
            for other in by_indent[_indent(line)]
            if other != line and other not in seen and abs(len(other) - len(line)) <= 3 + len(line.strip()) // 4
        ]
        if not context or line in seen or len(alike) < 3:
            return None
        return _choice(context, "\n" + line, ["\n" + other for other in rng.sample(alike, 3)], rng)

    for row in rows:
        if row and source.lines[row - 1].strip():
            yield partial(item, row)


def identifier(source: Source, rng: random.Random) -> Iterator[Callable[[], Item | None]]:
    """Choose which of four identifiers from the context stands at its end; the text after it follows each."""

    def item(name: Name) -> Item | None:
        context = source.context(name.row, name.column)
        seen = source.seen(context, name.row, name.column)
        if not context or name.text not in seen:
            return None
        # An attribute among plain names would be told by grammar alone: take others of its kind where there are any.
        others = sorted((o for o in seen if o != name.text), key=lambda o: seen[o] != seen[name.text])[:6]
        if len(others) < 3:
            return None
        head = context.rstrip(" ")
        space, rest = context[len(head) :], source.lines[name.row][name.column + len(name.text) :]
        return _choice(head, space + name.text + rest, [space + o + rest for o in rng.sample(others, 3)], rng)

    for name in source.names:
        line, end = source.lines[name.row], name.column + len(name.text)
        if name.text not in ("self", "cls", "_") and line[: name.column].strip() and len(line) - end <= REST:
            yield partial(item, name)


def complete_line(source: Source, rng: random.Random) -> Iterator[Callable[[], Item | None]]:
    """Write the 3 to 16 characters that end a line, of keywords, punctuation and names from the context."""

    def item(row: int, cuts: Sequence[int]) -> Item | None:
        column = rng.choice(cuts)
        context = source.context(row, column)
        prompt = context.rstrip(" ")
        words = {t.string for t in source.rows[row] if t.type == tokenize.NAME and t.start[1] >= column}
        unseen = words - source.seen(context, row, column).keys() - set(keyword.kwlist)
        if not context or unseen:
            return None
        return {"context": prompt, "target": context[len(prompt) :] + source.lines[row][column:].rstrip()}

    for row, tokens in source.rows.items():
        if cuts := _cuts(source.lines[row] if row < len(source.lines) else "", tokens):
            yield partial(item, row, cuts)


def _cuts(line: str, tokens: Sequence[tokenize.TokenInfo]) -> list[int]:
    """Where the line can be cut, so that 3 to 16 characters of names and punctuation are left to write."""
    end = len(line.rstrip())
    cuts = []
    for token in reversed(tokens):
        column = token.start[1]
        plain = token.type in (tokenize.NAME, tokenize.OP, tokenize.NEWLINE, tokenize.NL)
        if not plain or token.start[0] != token.end[0] or end - column > 16:
            break
        # Not inside a run of punctuation, which tokenizers keep whole (an underscore is punctuation to them).
        whole = token.type == tokenize.NAME and (token.string[0].isalpha() or line[:column].endswith(" "))
        if whole and end - column >= 3 and line[:column].strip():
            cuts.append(column)
    return cuts


BUILDERS = {"stdlib_next_line": next_line, "stdlib_identifier": identifier, "stdlib_complete_line": complete_line}


def items(task: str, documents: Sequence[Document], seed: int = 0, count: int = ITEMS) -> list[Item]:
    """Up to `count` items of a built-in task, in random order over all documents, always the same for a seed."""
    rng = random.Random(f"{task} {seed}")
    sources = [Source(document) for document in documents]
    candidates = [(source.name, make) for source in sources for make in BUILDERS[task](source, rng)]
    rng.shuffle(candidates)
    made: list[Item] = []
    for name, make in candidates:
        if len(made) == count:
            break
        if item := make():
            made.append({**item, "source": name})
    return made


def config(task: str, corpus: Corpus, metric: str, seed: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's configuration of a built-in task, whose items are written as JSON lines on first use.

    The file is named by the hash of all that determines it, this module included. `folder`: default in the user's
    cache.
    """
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{corpus.hash} {task} {seed}".encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"{task}-{key}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        lines = [json.dumps(item) for item in items(task, corpus.evaluation, seed)]
        draft.write_text("\n".join(lines) + "\n")
        draft.replace(path)
    generation = BUILDERS[task] is complete_line
    answer = (
        {
            "output_type": "generate_until",
            "doc_to_target": "target",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        }
        if generation
        else {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    )
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **answer,
    }


def cache_folder() -> Path:
    return cache_dir() / "tasks"


def _choice(context: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "gold": choices.index(right)}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
