"""Spark Transformer: what is trained in, what is put in afterwards, and that either is what it says it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from methods import UsageError, sparsify
from methods.registry import create, parse
from methods.shared.calibration import multipliers
from methods.shared.spark_llama import SparkMLP
from methods.spark import built_in
from sparse_kernels import gaussian_multiplier, spark_attention_decode, spark_attention_multipliers
from sparse_kernels.spark_attention.naive import spark_attention
from tests.methods.models import data, gemma3n, llama, opt, spark_llama, windows


def prepare(model, spec="spark", density=0.5):
    return next(iter(parse(spec).prepare(model, data(), [density])))


def realised(model, artifact) -> float:
    with sparsify(model, artifact, "all") as handle, handle.meter.on():
        model(input_ids=windows(8, seed=1))
        counts = torch.cat([torch.cat(v) for (site, _), v in handle.meter.counts.items() if site == "ffn"]).double()
        return float(counts.mean()) / next(layer.units for layer in handle.layers() if layer.site == "ffn")


# Put in afterwards


@pytest.mark.parametrize("variant", ["mask", "output", "soft"])
@pytest.mark.parametrize(
    ("build", "density"),  # half of a random ReLU's activations are zero: no threshold lies between them
    [(llama, 0.5), (llama, 0.3), (llama, 0.08), (opt, 0.3), (opt, 0.08)],
)
def test_calibrated_multipliers_meet_the_density(build, variant, density):
    model = build()
    artifact = prepare(model, f"spark:variant={variant}", density)
    assert realised(model, artifact) == pytest.approx(density, abs=0.03)
    assert artifact.manifest["density"] == pytest.approx(density, abs=0.03)
    assert artifact.manifest["variant"] == variant and len(artifact.tensors) == 2


def test_gaussian_multipliers_are_the_quantile():
    artifact = prepare(llama(), "spark:variant=soft:multiplier=gaussian", 0.08)
    assert [float(t) for t in artifact.tensors.values()] == pytest.approx([1.40507] * 2, abs=1e-5)


@pytest.mark.parametrize("build", [llama, opt])
def test_the_mask_at_density_1_is_the_dense_model_bit_for_bit(build):
    model, ids = build(), windows(2)
    dense = model(input_ids=ids).logits
    for variant in ("mask", "output", "soft"):
        with sparsify(model, prepare(model, f"spark:variant={variant}:multiplier=gaussian", 1.0), "all"):
            assert torch.equal(model(input_ids=ids).logits, dense)


def test_a_density_that_is_missed_is_told(monkeypatch):
    def off(handle, windows, densities, progress, **options):
        return multipliers(handle, windows, [density - 0.05 for density in densities], progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr("methods.shared.calibration.multipliers", off)
        manifest = prepare(llama(), "spark", 0.5).manifest
    assert manifest["density"] == pytest.approx(0.45, abs=0.01)
    assert manifest["notes"][0].startswith(f"density {manifest['density']:.3f} instead of 0.5: multipliers are calibr")
    for build, spec, density in ((llama, "spark", 0.5), (spark_llama, "spark", None), (gemma3n, "spark", None)):
        assert prepare(build(), spec, density).manifest["notes"] == []
    assert "those of normal scores" in prepare(llama(), "spark:multiplier=gaussian", 0.5).manifest["notes"][0]


@pytest.mark.parametrize("variant", ["mask", "output"])
def test_what_a_relu_leaves_at_zero_is_never_read(variant):
    """Where more is asked for than is not zero, what is left is the dense model for less."""
    model, ids = opt(), windows(2)
    artifact = prepare(model, f"spark:variant={variant}", 0.9)
    (note,) = artifact.manifest["notes"]
    assert note.endswith("what ReLU leaves at zero is not read") and 0.3 < artifact.manifest["density"] < 0.7
    dense = model(input_ids=ids).logits
    with sparsify(model, artifact, "all"):
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_less_density_strays_further():
    model, ids = llama(), windows(4)
    dense = model(input_ids=ids).logits
    strays = []
    for density in (0.8, 0.5, 0.2):
        with sparsify(model, prepare(model, "spark", density), "all"):
            strays.append(float((model(input_ids=ids).logits - dense).norm()))
    assert 0 < strays[0] < strays[1] < strays[2]


def test_the_soft_form_is_gemmas_operator_on_the_gate():
    model = llama()
    with sparsify(model, prepare(model, "spark:variant=soft", 0.3)) as handle, handle.sparse():
        layer, x = handle.layers()[0], torch.randn(3, 5, 64)
        u = layer.gate(x)
        limit = u.mean(-1, keepdim=True) + layer.multiplier * u.std(-1, keepdim=True, unbiased=False)
        assert torch.allclose(layer(x), layer.down(F.silu(F.relu(u - limit)) * layer.up(x)), atol=1e-6)


# Trained in


@pytest.mark.parametrize("build", [spark_llama, gemma3n])
def test_a_native_model_gives_the_same_output_for_less_work(build):
    model, ids = build(), windows(4)
    dense = model(input_ids=ids).logits
    artifact = prepare(model, "spark", None)
    for mode in ("all", "decode", "last-50%"):
        with sparsify(model, artifact, mode) as handle:
            assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-5)
            assert len([layer for layer in handle.layers() if layer.site == "ffn"]) == 2
    share = built_in(model.config)[0]
    assert artifact.manifest["trained_density"] == share
    assert realised(model, artifact) == pytest.approx(share, abs=0.02)
    assert torch.equal(model(input_ids=ids).logits, dense)


@pytest.mark.parametrize("build", [spark_llama, gemma3n])
def test_a_native_model_can_be_asked_for_another_density(build):
    model = build()
    artifact = prepare(model, "spark", 0.3)
    assert realised(model, artifact) == pytest.approx(0.3, abs=0.05)
    assert "trained to keep" in artifact.manifest["notes"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_own_module_is_reproduced(dtype):
    model = gemma3n().to(dtype)
    x = torch.randn(2, 7, 64, dtype=dtype)
    own = [layer.mlp(x) for layer in model.model.layers[:2]]
    with sparsify(model, prepare(model, "spark:variant=native", 0.05)) as handle, handle.sparse():
        ours = [layer(x) for layer in handle.layers()]
    for a, b in zip(ours, own, strict=True):
        # Gemma takes its statistics in bfloat16, we in float32
        assert (a - b).abs().max() < (1e-6 if dtype == torch.float32 else 0.05) * b.abs().max()


def test_spark_ffn_by_hand():
    model = spark_llama()
    mlp, x = model.model.layers[0].mlp, torch.randn(64)
    u = mlp.gate_proj.weight @ x[:32]
    mean = u.mean()
    limit = mean + (u - mean).square().mean().sqrt() * gaussian_multiplier(0.08)
    g = F.gelu(torch.where(u > limit, u - limit, 0), approximate="tanh")
    expected = mlp.down_proj.weight @ (g * (mlp.up_proj.weight @ x[32:]))
    assert isinstance(mlp, SparkMLP) and torch.allclose(mlp(x), expected, atol=1e-5)
    assert sum(p.numel() for p in mlp.parameters()) == 2 * 64 * 192  # that of two matrices: nothing for the predictor


def test_gradients_flow_through_the_statistics_and_stay_finite():
    mlp = spark_llama().double().model.layers[0].mlp
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,))
    nothing = torch.zeros(1, 64, dtype=torch.float64, requires_grad=True)  # as a padding token's embedding
    mlp(nothing).sum().backward()
    assert torch.isfinite(nothing.grad).all()


def test_training_computes_attention_twice_to_the_same_gradients(monkeypatch):
    from methods.shared import spark_llama as module

    model, calls = spark_llama().requires_grad_(True), []

    def gradients():
        model.zero_grad()
        model(input_ids=windows(1, 20)).logits.logsumexp(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    twice = gradients()
    monkeypatch.setattr(module, "checkpoint", lambda function, *a, **k: calls.append(1) or function(*a))
    once = gradients()
    assert len(calls) == 2 and all(torch.isfinite(grad).all() and grad.any() for grad in twice.values())
    for name, grad in once.items():
        assert torch.allclose(twice[name], grad, rtol=1e-4, atol=1e-5), name


# Attention


def test_a_query_attends_by_its_own_statistics_whatever_the_length():
    """One causal pass is the decode step of every position, which tests/kernels holds to the paper's equations."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, heads, 12, 16) for heads in (4, 2, 2))
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    found = spark_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), visible, 4)
    for t in range(12):
        step = spark_attention_decode(q[:, :, t], k, v, visible[t : t + 1], spark_attention_multipliers(4, 12))
        assert torch.allclose(found[:, :, t], step, atol=1e-6)


def test_decode_steps_by_the_kernels_are_the_models_own():
    model, ids = spark_llama(), windows(2, 40)
    expected = model(input_ids=ids).logits
    with sparsify(model, prepare(model, "spark", None)) as handle:
        layers = [layer for layer in handle.layers() if layer.attends]
        assert len(layers) == 2
        for layer in layers:
            layer.fast = lambda x: x.shape[1] == 1
        out = model(input_ids=ids[:, :30], use_cache=True)
        for at in range(30, 40):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            assert torch.allclose(out.logits[:, 0], expected[:, at], atol=1e-5)
        assert all(list(layer.multipliers) == list(range(31, 41)) for layer in layers)


def test_the_meter_knows_what_attention_reads():
    from harness import cost

    model = spark_llama()
    shape = cost.Shape.of(model)
    with sparsify(model, prepare(model, "spark", None)) as handle:
        mask = (torch.arange(64) >= 48).expand(2, -1)
        with handle.meter.on(), handle.positions(mask):
            model(input_ids=windows(2))
        (share,) = handle.meter.counts["attention", 0]
        assert share.shape == (32,) and 0.25 + 0.75 * 8 / 64 < float(share.mean()) < 0.25 + 0.75 * 2.2 * 8 / 48
        costs, density = cost.record(handle, shape, 56, 1)
    spent = costs["decode"]
    assert spent["bytes_kv"] == pytest.approx(float(share.mean()) * sum(shape.kv.values()) * 56 * 4, rel=0.1)
    assert spent["flops"] < spent["flops_dense"] and density["sites"]["attention"]["mean"] < 0.6


def test_attention_is_charged_by_its_tokens_whatever_the_text_was():
    """Half of every key, and of min(k, n) tokens the rest; where heads share keys, of those they chose together."""
    from harness import cost

    def charged(model, length):
        with sparsify(model, prepare(model, "spark", None), "all") as handle, handle.meter.on():
            model(input_ids=windows(4, length))
            return {n: cost.record(handle, shape, n, 1)[0] for n in (4, 8, 20, 4096)}

    model = spark_llama(num_key_value_heads=4, max_position_embeddings=8192)
    shape = cost.Shape.of(model)
    short, long = charged(model, 6), charged(model, 64)
    d, blocks = 64, 2
    for n, found in short.items():  # texts of fewer tokens than a query may attend to
        spent, most = found["decode"], min(8, n)
        assert spent["bytes_kv"] == pytest.approx(4 * blocks * (n * d // 2 + most * (d // 2 + d)), abs=1)
        skipped = blocks * 4 * d * 0.75 * (n - most)
        linears = [f["decode"]["flops_dense"] - f["decode"]["flops"] for f in (found, short[8])]
        assert linears[0] - linears[1] == pytest.approx(skipped, abs=2)
        pairs, kept = sum(range(n + 1)), sum(min(8, t) for t in range(n + 1))
        prompt = [f["prefill"]["flops_dense"] - f["prefill"]["flops"] for f in (found, short[8])]
        assert prompt[0] - prompt[1] * n / 8 == pytest.approx(blocks * 4 * d * 0.75 * (pairs - kept), abs=2)
    for n, found in long.items():  # how many survive is about k
        assert found["decode"]["bytes_kv"] == pytest.approx(short[n]["decode"]["bytes_kv"], rel=0.05)
    assert all(found[n]["decode"]["bytes_kv"] == 4 * 2 * d * blocks * n for found in (short, long) for n in (4, 8))

    grouped = spark_llama(num_key_value_heads=2, max_position_embeddings=8192)
    shape = cost.Shape.of(grouped)
    shared = charged(grouped, 64)[4096]["decode"]["bytes_kv"] - 4 * blocks * 4096 * d // 4
    assert 1.2 < shared / (4 * blocks * 8 * (d // 4 + d // 2)) < 2  # of tokens that two heads chose


def test_ffn_costs_what_its_survivors_do():
    """2 r f + 2 (d - r) k + 2 d k FLOPs a token and layer, k counted, as the paper has it."""
    from harness import cost

    model = spark_llama(attended=0)
    shape, (d, r, f) = cost.Shape.of(model), (64, 32, 192)
    with sparsify(model, prepare(model, "spark", None), "all") as handle, handle.meter.on():
        model(input_ids=windows(2))
        kept = [float(torch.cat(handle.meter.counts["ffn", layer]).double().mean()) for layer in range(2)]
        spent = cost.record(handle, shape, 100, 1)[0]["decode"]
    ffns = sum(2 * r * f + 2 * (d - r) * k + 2 * d * k for k in kept)
    assert all(0 < k < 0.2 * f for k in kept) and spent["flops_overhead"] == 0
    assert spent["flops"] == pytest.approx(spent["flops_dense"] - 2 * 4 * d * f + ffns, abs=2)


def test_the_future_and_padding_change_nothing():
    model, ids = spark_llama(), windows(1, 40)
    other = ids.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 300
    assert torch.equal(model(input_ids=ids).logits[:, :30], model(input_ids=other).logits[:, :30])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = torch.arange(45)[None] >= 5
    places = (torch.arange(45)[None] - 5).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask.long(), position_ids=places).logits[:, 5:]
    assert torch.allclose(found, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("attended", [0, 8])
def test_cached_steps_are_the_batched_pass(attended):
    from transformers import StaticCache

    from methods.families import cached

    model, ids = spark_llama(attended=attended), windows(2, 40)
    expected = model(input_ids=ids).logits
    for static in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=64) if static else None
        out = model(input_ids=ids[:, :30], use_cache=True, **(cached(model, cache) if static else {}))
        cache = cache or out.past_key_values
        for at in range(30, 40):
            out = model(input_ids=ids[:, at : at + 1], use_cache=True, **cached(model, cache))
            assert torch.allclose(out.logits[:, 0], expected[:, at], atol=1e-5)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_a_checkpoint_is_read_back_by_transformers(eight_bit, tmp_path):
    from harness import models

    model, ids = spark_llama(), windows(1)
    model.save_eight_bit(tmp_path) if eight_bit else model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / sum(p.numel() for p in model.parameters())
    assert (1 < size < 1.5) if eight_bit else size > 4
    spec = models.resolve(str(tmp_path))
    loaded = models._read(spec, models.config(spec), "cpu", torch.float32).eval()
    assert type(loaded) is type(model) and loaded.config.attended == 8
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert (a - b).abs().max() <= (b.abs().max() / 250 if eight_bit else 0), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.isfinite(loaded(input_ids=ids).logits).all()


# Bad input


def test_what_cannot_be_is_said_in_one_sentence():
    with pytest.raises(UsageError, match="did you mean mask"):
        parse("spark:variant=masc")
    with pytest.raises(UsageError, match="did you mean gaussian"):
        parse("spark:multiplier=gausian")
    with pytest.raises(UsageError, match="windows=16"):
        parse("spark:windows=0")
    with pytest.raises(UsageError, match="add --density"):
        prepare(llama(), "spark", None)
    assert "variant=mask" in create("spark", {"variant": "native"}).why_not(llama().config)
    assert "variant=native" in create("spark", {"variant": "soft"}).why_not(gemma3n().config)
    with pytest.raises(UsageError, match="choose variant=native"):
        prepare(spark_llama(), "spark:variant=mask")
    lost = gemma3n().config
    lost.activation_sparsity_pattern = [0.0] * 4  # as when a checkpoint comes without it
    assert "no statistical top-k in any layer" in create("spark", {}).why_not(lost)
    assert "choose variant=mask" in create("spark", {"variant": "native"}).why_not(lost)
    assert create("spark", {"variant": "mask"}).why_not(lost) is None
    for name in ("lte", "moefication", "d2dmoe"):
        assert "select their neurons themselves" in create(name, {}).why_not(spark_llama().config)


def test_other_methods_serve_a_spark_model():
    model, ids = spark_llama(), windows(2)
    dense = model(input_ids=ids).logits
    for spec, same in (("null", True), ("teal:allocation=uniform", False)):
        with sparsify(model, prepare(model, spec, None if same else 0.5), "all"):
            assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-5) == same
