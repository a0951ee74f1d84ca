"""Names, architectures and weights: exact parameter counts offline, and failures that say what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import models
from methods.errors import UsageError

WITH_ARCHITECTURE = [name for name in models.aliases() if models.resolve(name).architecture]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as save_pretrained leaves it."""
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    vocabulary = {f"t{i}": i for i in range(64)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(place)
    return place


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", WITH_ARCHITECTURE)
def test_architecture_has_the_published_parameter_count(name: str) -> None:
    spec = models.resolve(name)
    configuration = models.config(spec)
    found = models.count_parameters(configuration)
    assert spec.parameters in (None, found)
    assert found > 1e8 and configuration.get_text_config().max_position_embeddings >= 2048


def test_activations_and_layouts_of_the_table_match_the_architectures() -> None:
    from methods.families import activation_of

    for name in WITH_ARCHITECTURE:
        spec = models.resolve(name)
        configuration = models.config(spec)
        assert spec.layout == configuration.model_type
        assert activation_of(configuration) == spec.activation


def test_aliases_are_sane() -> None:
    for name in models.aliases():
        spec = models.resolve(name)
        assert spec.name == name and (spec.path is None) == bool(spec.hub_id or spec.architecture)
        assert spec.revision is None or len(spec.revision) == 40
        assert spec.gated or spec.mirror is None


def test_an_architecture_without_weights_can_be_drawn_only() -> None:
    spec = models.resolve("spark-2b")
    assert spec.layout == "spark_llama"
    models.check(spec, "synthetic")
    with pytest.raises(UsageError, match="nobody has published weights of spark-2b: use --weights synthetic"):
        models.check(spec)


def test_resolve(folder: Path) -> None:
    assert models.resolve("reference").kind == "reference"
    assert models.resolve(str(folder)).layout == "llama"
    spec = models.resolve("org/name@abc")
    assert (spec.hub_id, spec.revision) == ("org/name", "abc")


@pytest.mark.parametrize(
    ("name", "words"),
    [("llama2_7b", "did you mean llama2-7b"), ("./none", "no model folder"), ("a/b/c", "no model folder")],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        models.resolve(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(UsageError, match="cannot be read"):
        models.resolve(str(tmp_path))


def test_load_real(folder: Path) -> None:
    loaded = models.load(models.resolve(str(folder)), "real", "cpu", "bf16")
    assert loaded.weights_kind == "real" and loaded.tokenizer is not None
    assert not loaded.model.training and loaded.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.config._attn_implementation == "sdpa"


def test_load_synthetic_is_seeded_and_leaves_the_generator_alone(folder: Path) -> None:
    spec = models.resolve(str(folder))
    state = torch.get_rng_state()
    first, again, other = (models.load(spec, "synthetic", "cpu", "fp32", seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [loaded.model.model.layers[0].mlp.up_proj.weight for loaded in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.015 < float(weights[0].std()) < 0.025
    assert torch.equal(first.model.model.norm.weight, torch.ones(32))
    assert first.weights_kind == "synthetic"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.unlink(), "no model.safetensors"),
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "instead of"),
        (lambda f: f.write_bytes(f.read_bytes()[:6]), "cut off"),
        (lambda f: f.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"x" * 500), "damaged header"),
    ],
)
def test_damaged_weights_are_found_before_loading(broken: Path, damage: Any, words: str) -> None:
    damage(broken / "model.safetensors")
    spec = models.resolve(str(broken))
    with pytest.raises(UsageError, match=words):
        models.check(spec)
    with pytest.raises(UsageError, match=words):
        models.load(spec, "real", "cpu")
    models.check(spec, "synthetic")


def test_parameters_that_the_checkpoint_does_not_fill_are_not_drawn(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec, file, config = models.resolve(str(broken)), broken / "model.safetensors", broken / "config.json"
    weights = load_file(file)
    lost = sorted(name for name in weights if "layers.1.mlp" in name)
    save_file({name: weight for name, weight in weights.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"lack 3 of the .* \({lost[0]} and 2 more\): restore"):
        models.load(spec, "real", "cpu")
    save_file(weights, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(UsageError, match=r"have other shapes for 6 of the .*layers.0.mlp.down_proj.weight and 5 more"):
        models.load(spec, "real", "cpu")


def test_tied_weights_are_not_missing(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec, file, config = models.resolve(str(broken)), broken / "model.safetensors", broken / "config.json"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 of the .* \(lm_head.weight\)"):
        models.load(spec, "real", "cpu")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    loaded = models.load(spec, "real", "cpu").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_missing_shard(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="model-00001-of-00002.safetensors is missing"):
        models.check(models.resolve(str(broken)))


def test_missing_tokenizer(broken: Path) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError):
        models.load(models.resolve(str(broken)), "real", "cpu")


def test_offline_hub_fails_at_once_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = models.resolve("llama2-7b")
    with pytest.raises(UsageError, match=r"--model NousResearch/Llama-2-7b-hf.*--weights synthetic"):
        models.check(spec)
    models.check(spec, "synthetic")
    with pytest.raises(UsageError, match="not in the local cache"):
        models.check(models.resolve("org/name"), "synthetic")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "no public model"),
        ("RevisionNotFoundError", "no revision"),
        ("LocalEntryNotFoundError", "out of reach"),
        ("SafetensorError", "damaged"),
        ("OSError", "cannot be loaded"),
    ],
)
def test_errors_of_the_libraries_are_explained_through_their_causes(kind: str, words: str) -> None:
    outer = OSError("something went wrong")
    outer.__cause__ = OSError("x") if kind == "OSError" else type(kind, (Exception,), {})("details")
    explained = models._explain(outer, models.resolve("llama2-7b"))
    assert isinstance(explained, UsageError) and words in str(explained) and "\n" not in str(explained)


def test_bugs_are_not_disguised() -> None:
    bug = AttributeError("a bug of ours")
    assert models._explain(bug, models.resolve("llama2-7b")) is bug


@pytest.mark.parametrize("weights", ["real", "synthetic"])
def test_too_large_for_this_machine(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, loaded = models.resolve(str(folder)), []
    monkeypatch.setattr(models, "_read", lambda *a: loaded.append(a))
    monkeypatch.setattr(models, "_draw", lambda *a: loaded.append(a))
    monkeypatch.setattr(models.os, "sysconf", lambda name: 10)
    with pytest.raises(UsageError, match="in float32 and cpu has 0.0 GiB: choose --dtype bf16, a smaller model or"):
        models.load(spec, weights, "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**20 if device == "cuda" else 0, 2**40))
    models.require_memory(spec, "cuda", "auto")
    with pytest.raises(UsageError, match="0.2 GiB in bfloat16 and cuda has 0.0 GiB free: choose a smaller model or"):
        models.require_memory(models.resolve("opt-125m"), "cuda", "auto")
    assert not loaded


def test_a_launchers_processes_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert models.resolve_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert models.resolve_device() == models.resolve_device("cuda") == "cuda:3"
    assert models.resolve_device("cuda:1") == "cuda:1"


def test_devices_and_dtypes() -> None:
    assert models.resolve_dtype("auto", "cpu") == "float32" and models.resolve_dtype("auto", "cuda") == "bfloat16"
    assert models.resolve_dtype("half") == "float16" and models.resolve_device("cpu") == "cpu"
    for bad in ("gpu", "cuda:x", ""):
        with pytest.raises(UsageError):
            models.resolve_device(bad)
