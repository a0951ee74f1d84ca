"""The recipe of the reference models: the text it may use, the tokenizer, the models, a run from start to card."""

from __future__ import annotations

import json
import os
import signal
from email.message import Message
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.corpus import Corpus, Document, near_duplicates
from harness.reference import text as text_module
from harness.reference import train as recipe
from harness.reference.text import permissive_license, train_tokenizer, training_documents

CODE = "def f(x):\n    if x > 10:\n        return self.items.append(x)\n\n\nclass A(B):\n    pass\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CODE, CODE.replace("x", "value")])


def distribution(**fields: str | list[str]) -> Any:
    metadata = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            metadata[name.replace("_", "-")] = value
    return SimpleNamespace(metadata=metadata)


@pytest.mark.parametrize(
    ("fields", "license_name"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License_Expression": "BSD-3-Clause AND 0BSD AND Zlib"}, "BSD-3-Clause AND 0BSD AND Zlib"),
        ({"Classifier": "License :: OSI Approved :: Apache Software License"}, "Apache Software License"),
        ({"License": "MIT License\n\nPermission is hereby granted"}, "MIT License"),
        ({"License_Expression": "MPL-2.0 AND MIT"}, None),
        ({"License_Expression": "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1"}, None),
        ({"License": "MIT", "Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}, None),
        ({"License": "NVIDIA Proprietary Software"}, None),
        ({"License_Expression": "LicenseRef-NVIDIA-SOFTWARE-LICENSE"}, None),
        ({"License": "SUBMITTED"}, None),  # not a licence, though it has MIT in it
        ({"License": "UNKNOWN"}, None),
        ({}, None),
    ],
)
def test_only_permissive_licences(fields, license_name) -> None:
    assert permissive_license(distribution(**fields)) == license_name


def test_training_text_leaves_out_copies_and_what_is_held_out(tmp_path, monkeypatch) -> None:
    held_out = "\n".join(f"value_{i} = compute_something(argument_{i}, 'a string')" for i in range(30))
    files = {
        "a/good.py": "\n".join(f"good_{i} = {i * i}  # {hash(str(i))}" for i in range(30)),
        "a/copy.py": "",
        "a/vendored.py": "import os\n" + held_out,
        "dataclasses.py": "\n".join(f"backport_{i} = {i * i * i}" for i in range(30)),
        "a/table.py": "0, 0, 0, 0, 0, 0, 0\n" * 500,
        "a/tiny.py": "x = 1",
    }
    files["a/copy.py"] = files["a/good.py"]
    found = []
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        found.append((f"pkg/{name}", path))
    found.append(("pkg/gone.py", tmp_path / "gone.py"))
    package = text_module.Package("pkg", "1.0", "MIT")
    monkeypatch.setattr(text_module, "package_files", lambda: (found, {"pkg": package}))
    corpus = Corpus("c", (Document("t", "train text " * 9),), (), (Document("e", held_out),))
    documents, packages = training_documents(corpus, 1_000_000)
    assert len(documents) == 2 and documents[0].name == "t"
    assert documents[1].name in ("pkg/a/good.py", "pkg/a/copy.py")
    assert near_duplicates(documents, corpus.evaluation) == []
    assert packages == [package]
    assert training_documents(corpus, 120)[1] == []


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_round_trips_any_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_a_line_end_takes_the_indentation_along(tokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer("return f(x)\n        return f")["input_ids"]]
    assert "\n        " in pieces
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("reference", 6_951_168), ("reference-relu", 4_801_152), ("reference-spark", 6_951_168)],
)
def test_the_models_have_their_sizes(tokenizer, name: str, parameters: int) -> None:
    model = recipe.build_model(name, tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    names = {
        id(parameter)
        for optimizer in recipe.build_optimizers(model, recipe.RECIPES[name])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert names == {id(parameter) for parameter in model.parameters()}
    block = torch.randint(4096, (2, 16))
    with torch.no_grad():
        usual = model.eval()(input_ids=block).logits
        recipe.use_causal_attention(model)
        torch.testing.assert_close(model(input_ids=block).logits, usual)


def test_every_window_comes_once_in_an_epoch() -> None:
    tokens = torch.arange(recipe.CONTEXT * 9 + 5)
    stream = recipe.batches(tokens, 4, torch.Generator().manual_seed(0))
    for _ in range(2):
        epoch = torch.cat([next(stream), next(stream)])
        assert epoch.shape == (8, recipe.CONTEXT + 1)
        assert torch.equal(epoch[:, 1:], epoch[:, :-1] + 1)
        assert len(set((epoch[:, 0] // recipe.CONTEXT).tolist())) == 8
    with pytest.raises(recipe.UsageError, match="--text-limit"):
        next(recipe.batches(tokens, 64, torch.Generator()))


def test_the_rate_warms_up_and_decays_with_time() -> None:
    assert recipe.rate_factor(0, 0.0) == pytest.approx(1 / recipe.WARM_UP_STEPS)
    assert recipe.rate_factor(recipe.WARM_UP_STEPS, 0.0) == pytest.approx(1.0)
    assert recipe.rate_factor(10_000, 1.0) == recipe.rate_factor(10_000, 1.2) == pytest.approx(recipe.FINAL_RATE)


@pytest.fixture
def tiny(monkeypatch):
    """The same recipe with a model and windows small enough to learn something in two seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(name, tokenizer):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=True,
            )
        )

    monkeypatch.setattr(recipe, "build_model", build)
    monkeypatch.setattr(recipe, "CONTEXT", 32)
    monkeypatch.setattr(recipe, "WARM_UP_STEPS", 10)
    monkeypatch.setattr(recipe, "EVALUATIONS", 2)


def test_a_run_from_text_to_card(tiny, tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, cache = tmp_path / "model", tmp_path / "cache"
    common = ["--model", "reference", "--device", "cpu", "--text-limit", "2e5", "--data-cache", str(cache)]
    assert recipe.main([*common, "--minutes", "0.05", "--out", str(out)]) == 0
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["seconds"] == pytest.approx(3, abs=2)
    assert record["held_out"]["loss"] < record["training"]["curve"][0]["held_out"] + 0.05
    assert record["held_out"]["loss"] < 8.2  # an untrained model has ln 4096 = 8.3; a busy machine trains few steps
    assert record["text"]["corpus_hash"] and record["recipe"]["seed"] == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0") and f"{record['held_out']['perplexity']:.3f}" in card
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert (
        AutoTokenizer.from_pretrained(out)("x")["input_ids"] == AutoTokenizer.from_pretrained(cache)("x")["input_ids"]
    )
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]

    stamp = (cache / "facts.json").stat().st_mtime_ns
    capsys.readouterr()
    assert recipe.main([*common, "--minutes", "0.01", "--out", str(tmp_path / "second")]) == 0
    assert (cache / "facts.json").stat().st_mtime_ns == stamp  # the second model reuses the tokenised text
    assert "held-out perplexity" in capsys.readouterr().out


def test_the_spark_model_is_trained_on_as_many_tokens_as_its_twin(tmp_path, monkeypatch, tokenizer) -> None:
    """The whole command, on a smaller model and text; what it wrote is a model of 8 bits that transformers can load."""
    from transformers import AutoModelForCausalLM

    build, twin, out = recipe.build_model, tmp_path / "twin", tmp_path / "model"

    def smaller(name, tokenizer):
        model = build(name, tokenizer)
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        return model

    twin.mkdir()
    (twin / "training.json").write_text(json.dumps({"training": {"tokens_seen": 3 * 2 * 64}}))
    monkeypatch.setattr(recipe, "build_model", smaller)
    monkeypatch.setattr(recipe, "TWIN", twin)
    monkeypatch.setattr(recipe, "CONTEXT", 64)
    common = ["--model", "reference-spark", "--device", "cpu", "--text-limit", "2e5", "--batch", "2"]
    assert recipe.main([*common, "--out", str(out)]) == 0
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["steps"] == 3 and record["recipe"]["tokens"] == record["training"]["tokens_seen"] == 384
    assert record["held_out"]["weight_bytes"] < 1.1 * record["held_out"]["parameters"]
    assert "8 bits" in (card := (out / "README.md").read_text()) and "--tokens 384 --out DIR" in card
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == "SparkLlamaForCausalLM" and model.config.attended == 64
    assert recipe.main([*common, "--minutes", "1", "--tokens", "9", "--out", str(out)]) == 2


def test_sigterm_saves_and_ends(tiny, tokenizer) -> None:
    model = recipe.build_model("reference", tokenizer)
    saved = []

    def save() -> None:
        saved.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    tokens, windows = torch.arange(2000, dtype=torch.int32) % 90, torch.arange(64).view(2, 32)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        facts = recipe.train(
            model, recipe.RECIPES["reference"], tokens, windows, minutes=0.02, batch=4, seed=0, save=save
        )
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert facts["stopped_early"] and len(saved) == 2  # the evaluation that was killed, and the end


def test_a_wrong_model_gets_a_suggestion(tmp_path, capsys) -> None:
    assert recipe.main(["--model", "referense", "--out", str(tmp_path)]) == 2
    assert "did you mean reference" in capsys.readouterr().err
