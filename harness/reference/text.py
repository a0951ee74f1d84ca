"""Training text of the reference models: the standard library and the permissively licensed packages beside it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.corpus import (
    CALIBRATION_MODULES,
    EVALUATION_MODULES,
    Corpus,
    Document,
    document_frame,
    is_near_duplicate,
    load_corpus,
    ngram_set,
)

VOCABULARY = 4096
TOKENIZER_BYTES = 40_000_000  # enough for 4096 merges, and fast
LARGEST_FILE = 1_000_000  # larger ones are generated tables
SLICE = 2048  # files handed to the reading processes at once
SMALLEST_RATIO = 0.1  # so are files that compress better than ten to one

# Line ends take the next line's indentation along; words take one space, or the mark before them (".append").
PATTERN = r"\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PERMISSIVE = re.compile(
    r"\b(MIT(-0|-CMU)?|0?BSD|Apache|ISC|ISCL|PSF|Python Software Foundation|Python-2\.0|Unlicense|Zlib|HPND|CC0"
    r"|Expat|public domain)\b",
    re.IGNORECASE,
)
RESTRICTIVE = re.compile(
    r"GPL|GNU|General Public|Mozilla|MPL|EPL|Eclipse|CDDL|Propriet|NVIDIA|Commercial|EULA|LicenseRef"
    r"|-NC|NonCommercial|Other/",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    license: str


@dataclass(frozen=True)
class Prepared:
    """The tokenised training text: `tokens` uint16 [n], the corpus held out, the tokenizer and where all came from."""

    tokens: Any
    tokenizer: Any
    evaluation: tuple[Document, ...]
    facts: dict[str, Any]


def permissive_license(distribution: metadata.Distribution) -> str | None:
    """The licence that the package's metadata states, or None unless it is permissive and nothing contradicts it."""
    fields: Any = distribution.metadata
    stated = [fields.get("License-Expression") or ""]
    stated += [c.split("::")[-1].strip() for c in fields.get_all("Classifier") or [] if c.startswith("License")]
    free_text = (fields.get("License") or "").strip()
    if free_text:  # some put the whole licence here: its first line is the name
        stated.append(free_text.splitlines()[0][:100])
    stated = [name for name in stated if name and name not in ("OSI Approved", "UNKNOWN")]
    if any(RESTRICTIVE.search(name) for name in stated):
        return None
    return next((name for name in stated if PERMISSIVE.search(name)), None)


def package_files() -> tuple[list[tuple[str, Path]], dict[str, Package]]:
    """(name, path) of every `.py` file of every permissively licensed package, and those packages by name."""
    files: dict[str, Path] = {}
    packages: dict[str, Package] = {}
    for distribution in metadata.distributions():
        name, license_name = distribution.metadata["Name"], permissive_license(distribution)
        if not name or license_name is None or name in packages:
            continue
        listed = [file for file in distribution.files or [] if file.suffix == ".py" and ".." not in file.parts]
        if listed:
            packages[name] = Package(name, distribution.version, license_name)
            files |= {f"{name}/{file}": Path(str(distribution.locate_file(file))) for file in listed}
    return sorted(files.items()), packages


_held_out: set[str] = set()  # set in each worker process


def _start_worker(held_out: set[str]) -> None:
    global _held_out
    _held_out = held_out


def _read(file: tuple[str, Path]) -> Document | None:
    name, path = file
    if name.split("/")[1].removesuffix(".py") in EVALUATION_MODULES | CALIBRATION_MODULES:  # a backport
        return None
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if not 64 <= len(raw) <= LARGEST_FILE or len(zlib.compress(raw, 1)) < SMALLEST_RATIO * len(raw):
        return None
    text = raw.decode("utf-8", "replace")
    return None if is_near_duplicate(text, _held_out) else Document(name, text)


def training_documents(corpus: Corpus, limit: int, seed: int = 0) -> tuple[list[Document], list[Package]]:
    """Up to `limit` bytes: the corpus' train split, then package files in a fixed random order, and their packages.

    Files that share a run of lines with the corpus' evaluation or calibration split, and copies, are left out.
    """
    files, packages = package_files()
    random.Random(seed).shuffle(files)
    held_out = ngram_set([*corpus.evaluation, *corpus.calibration])
    documents: list[Document] = []
    used: dict[str, Package] = {}
    seen: set[bytes] = set()
    size = 0

    def add(document: Document) -> None:
        nonlocal size
        raw = document.text.encode("utf-8", "replace")
        digest = hashlib.sha256(raw).digest()
        if digest not in seen and size + len(raw) <= limit:
            seen.add(digest)
            documents.append(document)
            size += len(raw)

    for document in corpus.train:
        add(document)
    # Slices, each read to its end: leaving a pool while its queues are full can hang it for good.
    workers = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"), _start_worker, (held_out,))
    with workers:
        for start in range(0, len(files), SLICE):
            if size > 0.995 * limit:
                break
            for found in workers.map(_read, files[start : start + SLICE], chunksize=32):
                if found is not None:
                    before = len(documents)
                    add(found)
                    if len(documents) > before:
                        package = packages[found.name.split("/", 1)[0]]
                        used[package.name] = package
    return documents, sorted(used.values(), key=lambda package: package.name.lower())


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE of VOCABULARY tokens that round-trips any text; bos `<s>`, eos `</s>`, padding `<pad>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _sample(documents: Sequence[Document], size: int, seed: int) -> Iterator[str]:
    order = list(documents)
    random.Random(seed).shuffle(order)
    for document in order:
        size -= len(document.text)
        if size < 0:
            return
        yield document.text


def _encode(documents: Sequence[Document], tokenizer: Any) -> Any:
    import numpy as np

    before, after = (np.array(ids, dtype=np.uint16) for ids in document_frame(tokenizer))
    pieces = []
    for start in range(0, len(documents), 2048):  # bounds the memory that the encodings take
        texts = [document.text for document in documents[start : start + 2048]]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces += [before, np.array(encoding.ids, dtype=np.uint16), after]
    return np.concatenate(pieces)


def prepare(limit: int, seed: int, cache: Path | None = None, tokenizer_from: Path | None = None) -> Prepared:
    """Collect, tokenise and, with a `cache` folder, keep the training text: a second call there only loads it.

    `limit` in bytes of text; `tokenizer_from` reuses a saved tokenizer instead of training one.
    """
    import numpy as np
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    corpus = load_corpus("stdlib")
    request = {
        "limit": limit,
        "seed": seed,
        "corpus": corpus.hash,
        "tokenizer_from": str(tokenizer_from) if tokenizer_from else None,
    }
    if cache is not None and (cache / "facts.json").exists():
        facts = json.loads((cache / "facts.json").read_text())
        if facts.pop("request") == request:
            tokens = np.load(cache / "tokens.npy", allow_pickle=False)
            return Prepared(tokens, AutoTokenizer.from_pretrained(cache), corpus.evaluation, facts)

    documents, packages = training_documents(corpus, limit, seed)
    if tokenizer_from is None:
        tokenizer = train_tokenizer(list(_sample(documents, TOKENIZER_BYTES, seed)))
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokens = _encode(documents, tokenizer)
    text_bytes = sum(len(document.text.encode("utf-8", "replace")) for document in documents)
    facts = {
        "corpus_hash": corpus.hash,
        "training_text_hash": Corpus("training", tuple(documents), (), ()).hash,
        "documents": len(documents),
        "bytes": text_bytes,
        "tokens": len(tokens),
        "bytes_per_token": round(text_bytes / len(tokens), 3),
        "packages": [[package.name, package.version, package.license] for package in packages],
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cache / "tokens.npy", tokens, allow_pickle=False)
        tokenizer.save_pretrained(cache)
        (cache / "facts.json").write_text(json.dumps({**facts, "request": request}))  # last: marks it complete
    return Prepared(tokens, tokenizer, corpus.evaluation, facts)
