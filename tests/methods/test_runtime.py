"""The decode runtime against transformers' own blocks, on the operators' definitions."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from models import MODELS, data, gemma2, llama, windows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import methods.runtime
from methods import sparsify
from methods.errors import UsageError
from methods.families import cached
from methods.registry import create
from methods.runtime import FastBlock, runtime, why_not
from sparse_kernels import add_parts
from sparse_kernels.layers import ExpertFFN

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=300, max_position_embeddings=256, initializer_range=0.1)


def built(kind, **changes):
    if kind in MODELS:
        return MODELS[kind](**changes)
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)).eval()
    if kind == "gemma2":
        return gemma2(**changes)
    if kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=32))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, -0.5, 0.5)
        return model.eval()
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL | changes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def decode(model, prompt, steps, handle=None):
    """Logits of greedy steps over a static cache, and how many blocks ran through the runtime."""
    served = 0
    forward = FastBlock.serves

    def counting(self, hidden, cache):
        nonlocal served
        found = forward(self, hidden, cache)
        served += found and hidden.dim() == 3  # not the decoder, which asks with its tokens
        return found

    FastBlock.serves = counting
    try:
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
            extra = {"attention_mask": torch.ones(len(prompt), prompt.shape[1] + steps)}
            extra = extra if model.config.model_type == "opt" else {}
            positions = torch.arange(prompt.shape[1])[None]
            out = model(input_ids=prompt, position_ids=positions, **cached(model, cache), use_cache=True, **extra)
            logits = [out.logits[:, -1]]
            for step in range(steps - 1):
                token = logits[-1].argmax(-1, keepdim=True)
                position = torch.full((1, 1), prompt.shape[1] + step)
                out = model(input_ids=token, position_ids=position, **cached(model, cache), use_cache=True, **extra)
                logits.append(out.logits[:, -1])
            assert all(int(layer.cumulative_length) == prompt.shape[1] + steps - 1 for layer in cache.layers)
        return torch.stack(logits, 1), served
    finally:
        FastBlock.serves = forward


@pytest.mark.parametrize("kind", ["llama", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_steps_are_those_of_transformers(kind, batch):
    model, prompt = built(kind), windows(batch, 9)
    wanted, _ = decode(model, prompt, 8)
    with runtime(model):
        found, served = decode(model, prompt, 8)
    assert served == 7 * 2
    assert torch.allclose(found, wanted, atol=2e-4) and torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert not any("forward" in module.__dict__ for module in model.modules())
    again, served = decode(model, prompt, 8)
    assert served == 0 and torch.equal(again, wanted)


class Operators(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma2"])
def test_around_its_blocks_a_step_makes_no_masks_and_no_angles(kind):
    model, prompt = built(kind), windows(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    extra = {"attention_mask": torch.ones(1, 12)} if kind == "opt" else {}
    arguments = dict(cached(model, cache), use_cache=True, **extra)
    step = dict(input_ids=prompt[:, :1], position_ids=torch.full((1, 1), 9))
    with torch.no_grad(), runtime(model):
        model(input_ids=prompt, position_ids=torch.arange(9)[None], **arguments)
        with Operators() as seen:
            model(**step, **arguments)
        spared = ("arange", "le", "cos", "sin", "cat", "rsqrt", "native_layer_norm")
        own = Counter(name for name in seen.calls.elements() if name in spared)
        assert not own and seen.calls["rotary_table"] == (kind != "opt")
        with Operators() as seen:  # a prompt still has both
            model(input_ids=prompt, position_ids=torch.arange(9)[None], use_cache=False)
        assert seen.calls["cos"] == (kind != "opt") and not seen.calls["rotary_table"]


def test_an_opt_that_counts_its_positions_in_the_mask_keeps_it():
    model, prompt = built("opt"), windows(2, 9)
    step = dict(input_ids=prompt[:, :1], attention_mask=torch.ones(2, 10))
    logits = []
    for steps in (nullcontext(), runtime(model)):
        cache = StaticCache(config=model.config, max_cache_len=10)
        with torch.no_grad(), steps:
            model(input_ids=prompt, **cached(model, cache), use_cache=True)
            logits.append(model(**step, **cached(model, cache), use_cache=True).logits)
    assert torch.allclose(*logits, atol=2e-4)


def test_frequencies_that_change_with_the_sequence_stay_with_transformers():
    scaling = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    model, prompt = MODELS["llama"](rope_parameters=scaling, max_position_embeddings=12), windows(1, 9)
    wanted, _ = decode(model, prompt, 8)  # beyond 12 positions
    with runtime(model), Operators() as seen:
        found, served = decode(model, prompt, 8)
    assert served == 7 * 2 and torch.allclose(found, wanted, atol=2e-4) and not seen.calls["rotary_table"]


def test_an_opt_without_a_last_norm():
    model, prompt = MODELS["opt"](_remove_final_layer_norm=True), windows(1, 9)
    assert model.model.decoder.final_layer_norm is None
    wanted, _ = decode(model, prompt, 8)
    with runtime(model):
        found, served = decode(model, prompt, 8)
    assert served == 7 * 2 and torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", [*MODELS, "qwen2", "gemma2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_steps_by_the_kernels_are_those_of_transformers(kind, batch, device):
    if device != "cpu":
        pytest.skip("with a GPU every run checks its blocks.")
    # Few neurons: the interpreter takes them one by one.
    model, prompt = built(kind, **{"ffn_dim" if kind == "opt" else "intermediate_size": 40}), windows(batch, 9)
    wanted, _ = decode(model, prompt, 3)
    with runtime(model):
        found, served = decode(model, prompt, 3)
    assert served == 2 * 2 and torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["teal", "null"])
def test_selections_are_those_of_the_method(kind, name):
    model, prompt = MODELS[kind](), windows(1, 9)
    method = create(name, {})
    artifact = next(iter(method.prepare(model, data(), [0.5 if name == "teal" else None])))
    with sparsify(model, artifact) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
        assert served == 5 * 2
        assert torch.allclose(found, wanted, atol=2e-4)
        read = [int(layer.count.sum()) for layer in handle.layers()]
        units = [layer.units for layer in handle.layers()]
    assert read == units if name == "null" else 0 < sum(read) < sum(units)
    assert name == "null" or not torch.allclose(found, decode(model, prompt, 6)[0], atol=1e-2)


def test_layers_of_one_threshold_select_once():
    """q, k and v of null; where one of them differs, each has a selection of its own. All count what they read."""
    model, prompt = llama(), windows(1, 9)
    artifact = next(iter(create("null", {}).prepare(model, data(), [None])))
    with sparsify(model, artifact) as handle:
        together, apart = [], []
        for found in (together, apart):
            with runtime(model, handle) as blocks:
                found.append([len(blocks[0].qkv.segments), len(blocks[0].up.segments)])
                found.append(decode(model, prompt, 6, handle)[0])
                found.append([int(layer.count.sum()) for layer in handle.layers()])
            handle.layers()[0].threshold.fill_(1e-30)
        assert together[0] == [1, 1] and apart[0] == [3, 1]
        units = [layer.units for layer in handle.layers()]
        assert torch.equal(together[1], apart[1]) and together[2] == apart[2] == units
        handle.layers()[1].threshold.fill_(torch.inf)
        with runtime(model, handle):
            decode(model, prompt, 6, handle)
            assert [int(layer.count.sum()) for layer in handle.layers()] == [units[0], 0, *units[2:]]


@pytest.mark.parametrize("name", ["teal", "lte", "null"])
def test_selections_in_blocks_of_four_norms(name):
    model, prompt = gemma2(), windows(2, 9)
    artifact = create(name, {}).synthesize(model, 0.5, windows(2, 32))
    with sparsify(model, artifact) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
    assert served == 5 * 2 and torch.allclose(found, wanted, atol=2e-4)
    assert name == "null" or not torch.allclose(found, decode(model, prompt, 6)[0], atol=1e-2)


def test_capped_scores_are_capped():
    model, prompt = gemma2(), windows(1, 9)
    wanted, _ = decode(model, prompt, 6)
    with runtime(model) as blocks:
        for block in blocks:
            block.softcap = None
        found, _ = decode(model, prompt, 6)
    assert not torch.allclose(found, wanted, atol=2e-3)


def test_a_cache_that_slides_goes_the_slow_way_and_says_why():
    model, prompt = gemma2(sliding_window=12), windows(1, 9)
    assert why_not(model) is None and why_not(model, 11) is None
    assert "window is 12, the cache holds 12 positions" in why_not(model, 12)
    wanted, _ = decode(model, prompt, 3)  # a cache of 12 positions
    with runtime(model):
        found, served = decode(model, prompt, 3)
        assert served == 0 and torch.equal(found, wanted)
        assert decode(model, prompt, 2)[1] == 2  # one step, two blocks


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["lte", "spark"])
def test_ffn_layers_keep_their_own_path(kind, name):
    model, prompt = MODELS[kind](), windows(2, 9)
    artifact = create(name, {}).synthesize(model, 0.5, windows(2, 32))
    with sparsify(model, artifact) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        with runtime(model, handle):
            found, served = decode(model, prompt, 6, handle)
    assert served == 5 * 2 and torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["lte", "moefication", "dejavu"])
def test_the_neurons_of_one_sequence_reach_the_residual_in_parts(kind, name, monkeypatch):
    model, prompt = MODELS[kind](), windows(1, 9)
    artifact = create(name, {}).synthesize(model, 0.5, windows(2, 32))
    with sparsify(model, artifact) as handle:
        wanted, _ = decode(model, prompt, 6, handle)
        added = []
        monkeypatch.setattr(ExpertFFN, "fast", lambda self, x: self.selector is not None and self.phase.active is True)
        monkeypatch.setattr(methods.runtime, "add_parts", lambda *args: added.append(args) or add_parts(*args))
        with runtime(model, handle):
            found, _ = decode(model, prompt, 6, handle)
        assert any(layer.selector is not None for layer in handle.layers() if layer.site == "ffn")
    assert len(added) == 5 * 2  # of blocks that stay dense too
    assert torch.allclose(found, wanted, atol=2e-4)


def test_dense_positions_and_counting_passes_go_the_slow_way():
    model, prompt = llama(), windows(1, 9)
    artifact = next(iter(create("teal", {}).prepare(model, data(), [0.5])))
    with sparsify(model, artifact) as handle, runtime(model, handle):
        with handle.dense():
            assert decode(model, prompt, 4)[1] == 0
        with handle.meter.on():
            assert decode(model, prompt, 4)[1] == 0
        assert decode(model, prompt, 4)[1] > 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["teal", "lte", "spark", "dejavu", None])
def test_one_copy_of_the_weights_serves_prompts_and_steps(kind, name):
    model, prompt = MODELS[kind](), windows(2, 9)
    before = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    artifact = None if name is None else create(name, {}).synthesize(model, 0.5, windows(2, 32))
    with sparsify(model, artifact) if artifact else nullcontext() as handle:
        with runtime(model, handle):
            wanted, _ = decode(model, prompt, 6)
        with runtime(model, handle, share=True) as blocks:
            found, served = decode(model, prompt, 6)
            for block in blocks:
                assert len(block.qkv.shared) == 3
                for weight in block.qkv.shared:
                    assert weight.untyped_storage().data_ptr() == block.qkv.weight_t.untyped_storage().data_ptr()
            for layer in handle.layers() if handle else ():
                if layer.site == "ffn" and layer.down_t.numel():
                    assert layer.down.weight.untyped_storage().data_ptr() == layer.down_t.untyped_storage().data_ptr()
        assert served == 5 * 2 and torch.allclose(found, wanted, atol=1e-4)
    for key, parameter in model.named_parameters():
        assert before[key][0] == id(parameter) and parameter.is_contiguous()
        assert torch.equal(parameter, before[key][1])
    assert not any(p.untyped_storage().nbytes() > p.nbytes for p in model.parameters())


def test_generate_is_the_same_text():
    model, prompt = llama(), windows(1, 9)
    options = dict(max_new_tokens=24, do_sample=False, cache_implementation="static", disable_compile=True)
    wanted = model.generate(prompt, **options)
    with runtime(model):
        assert torch.equal(model.generate(prompt, **options), wanted)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["teal", "lte"])
def test_generate_in_half_precision(kind, name):
    """The sums of one part are float32 then, and not the finished projection; grouped heads among them."""
    model, prompt = MODELS[kind]().bfloat16(), windows(1, 9)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True)
    with sparsify(model, create(name, {}).synthesize(model, 0.5, windows(2, 32))) as handle:
        wanted = model.generate(prompt, **options)
        with runtime(model, handle, share=True):
            assert torch.equal(model.generate(prompt, **options)[:, :11], wanted[:, :11])


def test_unknown_blocks_are_refused():
    model = llama()
    model.config.model_type = "gemma3_text"
    assert "gemma3_text" in why_not(model)
    with pytest.raises(UsageError, match="no block for architecture"), runtime(model):
        pass
