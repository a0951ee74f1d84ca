import pytest
import torch
from support import ROUNDED, agree, close, double, far
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import attention_decode, rope_cache_write, rotary_table, token_attention
from sparse_kernels.attention import naive

INT = dict(dtype=torch.int32)


def step(batch, heads, groups, dim, device, dtype, shared=False):
    """Arguments of rope_cache_write, query, key and value within one projection, and a poisoned cache."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, heads + 2 * groups, dim, device=device).to(dtype)
    angle = torch.rand(1 if shared else batch, dim // 2, device=device).repeat(1, 2) * 6
    place = torch.randint(0, 9, (1 if shared else batch,), device=device)
    caches = [torch.full((batch, groups, 9, dim), float("nan"), device=device).to(dtype) for _ in range(2)]
    return *qkv.split([heads, groups, groups], 1), angle.cos().to(dtype), angle.sin().to(dtype), place, *caches


def copies(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def equal(a, b):
    return torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


@pytest.mark.parametrize("batch, heads, groups", [(1, 4, 4), (3, 6, 2)])
@pytest.mark.parametrize("parts", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
def test_rope_of_parts_is_that_of_their_sum(device, batch, heads, groups, parts, dtype):
    *qkv, cos, sin, place, keys, values = step(batch, heads, groups, 48, device, dtype)
    shares = torch.zeros(parts, device=device)
    shares[[0, -1]] = 0.5 if parts > 1 else 1.0  # the sum is exact in any order, and needs the last part
    projection = torch.cat(qkv, 1).float() * shares[:, None, None, None]
    wanted = copies((keys, values))
    expected = naive.rope_cache_write(*qkv, cos, sin, place, *wanted)
    split = projection.split([heads, groups, groups], 2)
    assert torch.equal(rope_cache_write(*split, cos, sin, place, keys, values), expected)
    assert equal(keys, wanted[0]) and equal(values, wanted[1])
    if parts == 1:  # of a dense product
        whole = [x.to(dtype) for x in split]
        assert torch.equal(rope_cache_write(*whole, cos, sin, place, keys, values), expected)


@pytest.mark.parametrize("batch, heads, groups", [(1, 4, 4), (2, 6, 2), (7, 5, 1)])
@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_rope_equals_naive_to_the_bit(device, batch, heads, groups, dim, dtype):
    """Products and sums are rounded one by one, as torch rounds them."""
    arguments = step(batch, heads, groups, dim, device, dtype)
    reference = copies(arguments)
    assert torch.equal(rope_cache_write(*arguments), naive.rope_cache_write(*reference))
    assert equal(arguments[6], reference[6]) and equal(arguments[7], reference[7])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_rope_options(device, shared, rope, normed):
    query, key, value, cos, sin, place, *caches = step(3, 6, 2, 40, device, torch.float32, shared)
    norms = [torch.randn(40, device=device) if normed else None for _ in range(2)]
    tables = (cos, sin) if rope else (None, None)
    out = rope_cache_write(query, key, value, *tables, place.int(), *caches, *norms, 1e-3)
    key64, value64 = double(*caches)
    inputs = double(query, key, value, *tables)
    assert close(out, naive.rope_cache_write(*inputs, place, key64, value64, *double(*norms), 1e-3))
    written = ~key64.isnan()
    assert torch.equal(~caches[0].isnan(), written) and written.sum() == key.numel()
    assert close(caches[0][written], key64[written]) and equal(caches[1], value64.float())


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
def test_rope_norms_in_half_precision(device, dtype, norm_dtype):
    arguments = step(2, 6, 2, 64, device, dtype)
    norms = [torch.randn(64, device=device).to(norm_dtype or dtype) for _ in range(2)]
    reference = copies(arguments)
    pairs = [(rope_cache_write(*arguments, *norms), naive.rope_cache_write(*reference, *norms))]
    pairs.append((arguments[6].nan_to_num(), reference[6].nan_to_num()))
    for actual, wanted in pairs:  # an ulp of the two terms, where sums of squares differ in their last bit
        ulp = torch.finfo(dtype).eps
        assert torch.allclose(actual, wanted, rtol=2 * ulp, atol=4 * ulp)
        assert (actual != wanted).float().mean() < 0.02


@pytest.mark.parametrize("batch, dim", [(1, 128), (3, 80), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
def test_the_table_is_that_of_transformers(device, batch, dim, dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = dict(rope_type="yarn", factor=4.0, rope_theta=1e4)  # it scales the tables too
    config = LlamaConfig(head_dim=dim, max_position_embeddings=2**17, rope_parameters=scaling)
    rotary = LlamaRotaryEmbedding(config).to(device)
    torch.manual_seed(0)
    position = torch.randint(0, 2**17, (batch, 2), device=device)[:, :1]
    position[0] = 2**17 - 1
    wanted = rotary(torch.empty(1, dtype=dtype, device=device), position)
    found = rotary_table(position[:, 0], rotary.inv_freq, rotary.attention_scaling, dtype)
    assert rotary.attention_scaling != 1
    for table, expected in zip(found, wanted, strict=True):
        assert (table.dtype, table.shape) == (dtype, (batch, dim))
        if device == "cpu":  # interpreted: NumPy's cosines
            assert torch.allclose(table, expected[:, 0], rtol=0, atol=4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(table, expected[:, 0])
    again = rotary_table(position[:, 0].int(), rotary.inv_freq, rotary.attention_scaling, dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(position=torch.zeros(1, 1, dtype=torch.int64)), "position must have shape .batch"),
        (dict(position=torch.zeros(0, dtype=torch.int64)), "position must have shape .batch"),
        (dict(position=torch.zeros(2)), "position must be int64 or int32"),
        (dict(frequencies=torch.zeros(129)), "frequencies must be float32 .1 to 128"),
        (dict(frequencies=torch.zeros(8).half()), "frequencies must be float32"),
        (dict(frequencies=torch.zeros(16)[::2]), "frequencies must be contiguous"),
        (dict(frequencies=torch.zeros(8, device="meta")), "frequencies must be on cpu"),
        (dict(dtype=torch.int32), "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_the_table_outside_its_domain(changes, message):
    good = dict(position=torch.zeros(2, dtype=torch.int64), frequencies=torch.zeros(8), scale=1.0, dtype=torch.float32)
    opcheck(torch.ops.sparse_kernels.rotary_table, tuple(good.values()))
    with pytest.raises(ValueError, match=message):
        rotary_table(**good | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_naive_rope_rounds_as_transformers_does(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    query, key, value, cos, sin, place, *caches = step(3, 4, 2, 16, "cpu", dtype)
    norm = Qwen3RMSNorm(16, 1e-5).to(dtype)
    norm.weight.data = torch.randn(16).to(dtype)
    out = rope_cache_write(query, key, value, cos, sin, place, *caches, norm.weight, norm.weight, 1e-5)
    states = [norm(x)[:, :, None] for x in (query, key)]
    rotated = apply_rotary_pos_emb(*states, cos[:, None], sin[:, None])
    rows = torch.arange(3)
    assert torch.equal(out, rotated[0][:, :, 0]) and torch.equal(caches[0][rows, :, place], rotated[1][:, :, 0])
    assert torch.equal(caches[1][rows, :, place], value)


def test_naive_norm_in_float32_is_that_of_gemma():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(16).to(torch.bfloat16)
    norm.weight.data = torch.randn(16).to(torch.bfloat16)
    x = torch.randn(5, 2, 16).to(torch.bfloat16)
    assert torch.equal(naive.normalise(x, 1 + norm.weight.float(), norm.eps), norm(x))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_together_they_are_the_attention_of_transformers(device, name):
    """Three steps on a static cache, between the projections of the module itself."""
    import transformers
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    module = {"Llama": modeling_llama, "Qwen3": modeling_qwen3}[name]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_hidden_layers=1
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = getattr(module, f"{name}Attention")(config, layer_idx=0).to(device).eval()
    norms = (attention.q_norm, attention.k_norm) if name == "Qwen3" else ()
    weights = [torch.nn.init.normal_(norm.weight).detach() for norm in norms]
    rotary = getattr(module, f"{name}RotaryEmbedding")(config).to(device)
    cache = transformers.StaticCache(config=config, max_cache_len=8)
    key, value = (torch.zeros(2, 2, 8, 16, device=device) for _ in range(2))
    for t in range(3):
        x = torch.randn(2, 1, 48, device=device)
        position = torch.tensor([t], device=device)
        cos, sin = rotary(x, position[None])
        mask = torch.zeros(2, 1, 1, 8, device=device).masked_fill(torch.arange(8, device=device) > t, -torch.inf)
        with torch.no_grad():
            dense, _ = attention(x, (cos, sin), mask, cache)
            qkv = [p(x).view(2, -1, 16) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            query = rope_cache_write(*qkv, cos[0], sin[0], position, key, value, *weights, eps=config.rms_norm_eps)
            ours = attention.o_proj(attention_decode(query, key, value, position + 1).flatten(1))
        assert torch.allclose(ours, dense[:, 0], atol=1e-6)
    assert torch.allclose(key, cache.layers[0].keys, atol=1e-6) and torch.equal(value, cache.layers[0].values)


def token(heads, groups, place, dim, device, dtype, positions=150, parts=0):
    """Arguments of token_attention up to the caches, whose positions from `place` on are poisoned."""
    torch.manual_seed(0)
    shape = (parts, 1) if parts else (1,)
    qkv = torch.randn(*shape, heads + 2 * groups, dim, device=device) / max(parts, 1) ** 0.5
    qkv = qkv if parts else qkv.to(dtype)
    angle = torch.rand(1, dim // 2, device=device).repeat(1, 2) * 6
    caches = [torch.randn(1, groups, positions, dim, device=device).to(dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, place:] = float("nan")
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    return *qkv.split([heads, groups, groups], -2), *tables, torch.tensor([place], device=device), *caches


def check_token(arguments, **options):
    reference = copies(arguments)
    named = dict(query_norm=None, key_norm=None, eps=1e-6, scale=0.3, scaled_query=False, softcap=0.0) | options
    expected = naive.token_attention(*reference, **named)
    y = token_attention(*arguments, **(named | dict(softcap=named["softcap"] or None)))
    assert agree(y, expected)
    for ours, theirs in zip(arguments[6:], reference[6:], strict=True):
        place = int(arguments[5])
        assert torch.allclose(
            ours[:, :, place], theirs[:, :, place], rtol=1e-5 if ours.dtype == torch.float32 else 0.02
        )
        ours[:, :, place] = theirs[:, :, place]
        assert equal(ours, theirs)


@pytest.mark.parametrize("place", [0, 1, 63, 64, 127, 128, 129, 149])
@pytest.mark.parametrize("heads, groups", [(3, 3), (4, 2), (7, 1)])
def test_a_token_at_any_place(device, heads, groups, place):
    check_token(token(heads, groups, place, 32, device, torch.float32))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("parts", [0, 5, 70])
@pytest.mark.parametrize("dim", [32, 80, 128])
def test_a_token_of_half_precision_and_of_parts(device, dim, parts, dtype):
    check_token(token(4, 2, 100, dim, device, dtype, parts=parts))


@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.05), dict(scaled_query=True), dict(scaled_query=True, softcap=5.0)]
)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_options_of_a_token(device, rope, normed, options):
    arguments = list(token(6, 2, 70, 48, device, torch.float32))
    if not rope:
        arguments[3:5] = None, None
    norms = [torch.randn(48, device=device) if normed else None for _ in range(2)]
    check_token(arguments, query_norm=norms[0], key_norm=norms[1], **options)


def test_a_token_twice_is_the_same_to_the_bit_and_needs_one_row(device):
    arguments = token(4, 4, 140, 32, device, torch.float32)
    first = token_attention(*copies(arguments))
    assert torch.equal(first, token_attention(*copies(arguments)))
    composed = copies(arguments)
    query = rope_cache_write(*composed)
    assert agree(first, attention_decode(query, *composed[6:], composed[5] + 1))
    with pytest.raises(ValueError, match="query must have one row, got 2"):
        token_attention(*step(2, 4, 2, 16, device, torch.float32))
    with pytest.raises(ValueError, match="softcap must be positive"):
        token_attention(*copies(arguments), softcap=-1.0)


def test_a_token_as_torch_sees_it():
    arguments = [a.nan_to_num() if a.is_floating_point() else a for a in token(4, 2, 7, 16, "cpu", torch.float32)]
    opcheck(torch.ops.sparse_kernels.token_attention, (*arguments, None, None, 1e-6, 0.25, False, 0.0))
    with FlopCounterMode(display=False) as flops:
        token_attention(*arguments)
    assert flops.get_total_flops() == 4 * 4 * 16 * 150


def rope_domain(**changes):
    names = ("query", "key", "value", "cos", "sin", "position", "key_cache", "value_cache")
    return dict(zip(names, step(2, 4, 2, 16, "cpu", torch.float32), strict=True)) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(query=torch.zeros(2, 4, 15)), "even number of channels"),
        (dict(key=torch.zeros(2, 4, 16)), "key must have shape"),
        (dict(value=torch.zeros(2, 2, 16).half()), "value must be torch.float32"),
        (dict(sin=None), "cos and sin go together"),
        (dict(cos=torch.zeros(2, 8)), "cos must have shape"),
        (dict(cos=torch.tensor(1.0)), "cos must have shape .batch, dim"),
        (
            dict(query=torch.zeros(1, 2, 4, 16), key=torch.zeros(2, 2, 2, 16), value=torch.zeros(2, 2, 2, 16)),
            "key must have one part like query",
        ),
        (dict(cos=torch.zeros(1, 16)), "must have one shape"),
        (dict(sin=torch.zeros(2, 16).double()), "sin must be torch.float32"),
        (dict(position=torch.zeros(2)), "position must be contiguous torch.int64"),
        (dict(position=torch.zeros(3, dtype=torch.int64)), "position must be contiguous"),
        (dict(key_cache=torch.zeros(2, 2, 16)), "key_cache must have shape .batch, groups"),
        (dict(value_cache=torch.zeros(2, 2, 8, 16)), "value_cache must have shape"),
        (dict(query_norm=torch.zeros(8)), "query_norm must be a contiguous"),
        (dict(query=torch.zeros(3, 2, 4, 16)), "Parts of key must be float32 views"),
        ({n: torch.zeros(3, 2, 4, 16) for n in ("query", "key", "value")}, "key must have 2 groups"),
        ({n: torch.zeros(3, 2, 2, 16).half() for n in ("query", "key", "value")}, "Parts of query must be float32"),
        (dict(key_norm=torch.zeros(16).half()), "key_norm must be a contiguous"),
        (dict(query=far(2, 4, 16, apart=1)), "query must have heads within 2.31 values"),
        ({n: far(3, 2, 4, 16, apart=0) for n in ("query", "key", "value")}, "Parts of query must be within 2.31"),
    ],
)
def test_rope_outside_its_domain(changes, message):
    with pytest.raises(ValueError, match=message):
        rope_cache_write(**rope_domain(**changes))


def test_rope_as_torch_sees_it():
    arguments = step(2, 4, 2, 16, "cpu", torch.float32)
    arguments = (*arguments[:6], *(cache.nan_to_num() for cache in arguments[6:]))
    opcheck(torch.ops.sparse_kernels.rope_cache_write, (*arguments, None, None, 1e-6))
    opcheck(torch.ops.sparse_kernels.rope_cache_write, (*arguments[:3], None, None, *arguments[5:], None, None, 1e-6))

    def decode(query, key, value, cos, sin, place, key_cache, value_cache):
        query = rope_cache_write(query, key, value, cos, sin, place, key_cache, value_cache)
        return attention_decode(query, key_cache, value_cache, place + 1)

    eager, compiled = copies(arguments), copies(arguments)
    wanted = decode(*eager)
    assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(*compiled), wanted)
    assert torch.equal(eager[6], compiled[6]) and torch.equal(eager[7], compiled[7])
