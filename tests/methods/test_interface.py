"""What every method owes the harness: it comes off without a trace, and its modes mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from methods import Artifact, UsageError, load_artifact, sparsify, sparsify_
from methods.artifact import CONFIG_FILE, TENSOR_FILE, fingerprint
from methods.base import parse_mode
from methods.registry import create, info, names, parse
from tests.methods.models import MODELS, data, llama, windows

SPECS = {
    "dense": "dense",
    "null": "null",
    "teal-uniform": "teal:allocation=uniform",
    "teal-greedy": "teal:search_windows=1:base_step=0.5",
    "lte": "lte:stage1_steps=2:stage2_steps=1:trials=1:batch=2:lr=0.01",
    "moefication": "moefication:windows=16:epochs=1",
    "moefication-relufied": "moefication:variant=relufied:relu_steps=1:batch=2:windows=16:epochs=1",
    "moefication-oracle": "moefication:split=random:selector=oracle:windows=16",
    "d2dmoe": "d2dmoe:steps=2:batch=2:windows=16:epochs=1:lr=0.01",
    "d2dmoe-projections": "d2dmoe:steps=1:batch=2:windows=16:epochs=1:projections=true:distill=1:expert_size=8",
    "d2dmoe-top-k": "d2dmoe:steps=0:windows=16:epochs=1:rule=top-k",
    "spark": "spark:windows=4",
    "spark-soft": "spark:variant=soft:multiplier=gaussian",
    "dejavu": "dejavu:windows=16:epochs=1",
    "dejavu-oracle": "dejavu:selector=oracle:windows=16:ffn_ahead=0:heads_ahead=0",
    "polar": "polar:windows=16:epochs=1",
    "polar-groups": "polar:windows=16:epochs=1:outputs=groups:ffn=dense",
    "dense-finetuned": "dense-finetuned:steps=2:batch=2:lr=0.01",
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return MODELS[request.param]()


def prepare(model: torch.nn.Module, spec: str, density: float = 0.5) -> Artifact:
    method = parse(spec)
    given = None if method.densities == (None,) else density
    return next(iter(method.prepare(model, data(), [given])))


def test_every_built_in_method_is_covered_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS.values()} == set(names())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sparsify_is_reversible_bit_for_bit(model: torch.nn.Module, spec: str) -> None:
    ids, artifact = windows(2), prepare(model, spec)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    before, logits = fingerprint(model), model(input_ids=ids).logits
    with sparsify(model, artifact, "all") as handle:
        sparse = model(input_ids=ids).logits
        assert bool(handle.layers()) == (not spec.startswith("dense"))
    assert dict(model.named_modules()) == modules
    assert all(found is parameters[name] for name, found in model.named_parameters())
    assert fingerprint(model) == before
    assert torch.equal(model(input_ids=ids).logits, logits)
    changes = spec not in ("dense", "null")
    assert torch.equal(sparse, logits) != changes


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_training_reads_no_more_than_its_budget(spec: str) -> None:
    method, model = parse(spec), llama()
    budget = method.budget(model.config) * data().calibration.shape[1]
    assert (budget > 0) == (method.training == "trained")
    if budget:
        assert budget / 2 < prepare(model, spec).manifest["tokens"] <= budget


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_artifact_survives_disk(model: torch.nn.Module, spec: str, tmp_path: Path) -> None:
    artifact, ids = prepare(model, spec), windows(2)
    loaded = load_artifact(str(artifact.save_pretrained(tmp_path / "a")))
    assert loaded.hash == artifact.hash and loaded.manifest == json.loads(json.dumps(artifact.manifest))
    with sparsify(model, artifact, "all"):
        expected = model(input_ids=ids).logits
    sparsify_(model, loaded, "all")
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.sparse_model.remove()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_preparing_leaves_the_model_as_it_was(model: torch.nn.Module, spec: str) -> None:
    modules, logits = dict(model.named_modules()), model(input_ids=windows(1)).logits
    prepare(model, spec)
    assert dict(model.named_modules()) == modules and torch.equal(model(input_ids=windows(1)).logits, logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["teal-uniform", "spark", "dejavu", "polar"])
def test_decode_mode_keeps_the_prompt_dense(model: torch.nn.Module, name: str) -> None:
    ids, dense = windows(2), model(input_ids=windows(2)).logits
    with sparsify(model, prepare(model, SPECS[name]), "decode"):
        out = model(input_ids=ids, use_cache=True)
        assert torch.equal(out.logits, dense)
        step = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values).logits
    expected = model(input_ids=torch.cat([ids, ids[:, -1:]], 1)).logits[:, -1:]
    assert not torch.allclose(step, expected, atol=1e-4)


def test_a_masked_pass_equals_token_by_token_decoding(model: torch.nn.Module) -> None:
    """The batched evaluation of `decode` is decoding: dense prefix, then one sparse step per token."""
    ids = windows(2, 24)
    for spec in (
        "teal:allocation=uniform",
        *(SPECS[name] for name in ("lte", "moefication", "d2dmoe", "dejavu", "polar")),
    ):
        with sparsify(model, prepare(model, spec), "decode") as handle:
            mask = (torch.arange(24) >= 16).expand(2, -1)
            with handle.positions(mask):
                batched = model(input_ids=ids).logits[:, 16:]
            out = model(input_ids=ids[:, :16], use_cache=True)
            steps = []
            for at in range(16, 24):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        assert torch.allclose(torch.cat(steps, 1), batched, atol=2e-5)


def test_last_share_of_a_prompt(model: torch.nn.Module) -> None:
    ids = windows(2, 20)
    dense = model(input_ids=ids).logits
    with sparsify(model, prepare(model, "teal:allocation=uniform", 0.3), "last-25%"):
        sparse = model(input_ids=ids).logits
    assert torch.allclose(sparse[:, :15], dense[:, :15], atol=1e-5)
    assert not torch.allclose(sparse[:, 15:], dense[:, 15:], atol=1e-4)


def test_meter_counts_only_sparse_positions() -> None:
    model = llama()
    with sparsify(model, prepare(model, "teal:allocation=uniform"), "decode") as handle:
        mask = torch.zeros(2, 64, dtype=torch.bool)
        mask[0, 60:] = True
        model(input_ids=windows(2))
        assert not handle.meter.counts
        with handle.meter.on(), handle.positions(mask):
            model(input_ids=windows(2))
    assert {len(torch.cat(found)) for found in handle.meter.counts.values()} == {4}
    assert len(handle.meter.counts) == 2 * 7


def test_generate_works_under_the_context_manager() -> None:
    model = llama()
    model.generation_config.pad_token_id = 0
    with sparsify(model, prepare(model, "null")):
        sparse = model.generate(windows(1, 8), max_new_tokens=8, do_sample=False)
    assert torch.equal(sparse, model.generate(windows(1, 8), max_new_tokens=8, do_sample=False))


def test_an_artifact_of_other_weights_is_refused() -> None:
    artifact = prepare(llama(), "teal:allocation=uniform")
    with pytest.raises(UsageError, match="belongs to weights"), sparsify(llama(hidden_size=32), artifact):
        pass


def test_fingerprints_see_every_parameter_of_any_size() -> None:
    model = torch.nn.ParameterDict({"large": torch.nn.Parameter(torch.zeros(2**24 + 3)), "one": torch.zeros(1)})
    before = fingerprint(model)  # type: ignore[arg-type]
    with torch.no_grad():
        model["large"][-1] = 1.0
    assert fingerprint(model) != before  # type: ignore[arg-type]
    assert fingerprint(llama()) == fingerprint(llama().bfloat16().float())


def test_attaching_twice_is_refused() -> None:
    model = llama()
    sparsify_(model, prepare(model, "null"))
    with pytest.raises(UsageError, match="sparse already"):
        sparsify_(model, prepare(model, "null"))


@pytest.mark.parametrize("damage", ["cut", "flip", "json", "missing"])
def test_a_damaged_artifact_is_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = prepare(llama(), "teal:allocation=uniform").save_pretrained(tmp_path / "a")
    tensors = folder / TENSOR_FILE
    raw = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        tensors.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "json":
        (folder / CONFIG_FILE).write_text("{")
    else:
        tensors.unlink()
    with pytest.raises(UsageError, match="harness prepare --force") as error:
        Artifact.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_names_and_options_have_suggestions() -> None:
    with pytest.raises(UsageError, match="did you mean teal"):
        parse("teel")
    with pytest.raises(UsageError, match="did you mean allocation"):
        parse("teal:alocation=uniform")
    with pytest.raises(UsageError, match="not a valid int"):
        parse("lte:expert_size=many")
    with pytest.raises(UsageError, match="option=value"):
        parse("teal:uniform")
    with pytest.raises(UsageError, match="choose greedy or uniform"):
        parse("teal:allocation=fair")


def test_modes_parse() -> None:
    assert [parse_mode(m) for m in ("decode", "all", "last-50%", "last-100%")] == [0.0, 1.0, 0.5, 1.0]
    for wrong in ("prefill", "last-0%", "last-x%", "last-101%"):
        with pytest.raises(UsageError, match="unknown mode"):
            parse_mode(wrong)


def test_third_party_methods_come_through_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "other-1.2.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.2\n")
    (site / "entry_points.txt").write_text("[activation_sparsity.methods]\nmine = other_method:Mine\n")
    (tmp_path / "other_method.py").write_text(
        "from methods.base import Method\nclass Mine(Method):\n    name = 'mine'\n    summary = 'a guest'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" in names() and info("mine").origin == "other 1.2"
    assert parse("mine").name == "mine"


@pytest.mark.parametrize("name", ["lte", "moefication", "d2dmoe", "dejavu", "polar"])
def test_an_oracle_and_chance_are_controls_and_a_learned_selector_is_not(name: str) -> None:
    assert not create(name, {}).control
    assert create(name, {"selector": "oracle"}).control and create(name, {"selector": "random"}).control
