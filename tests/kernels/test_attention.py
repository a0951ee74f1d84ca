from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from support import close, double
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import attention_decode, rope_cache_write, token_attention
from sparse_kernels.attention import cost, naive
from sparse_kernels.attention.launch import LAUNCH, Decode, regime

# Norm of the error over that of the output. Half precision rounds the weights too, on a GPU; Triton's interpreter
# truncates to bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ROUNDED = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
SPLIT = Decode(keys=64, warps=4, stages=3, programs=64)


def agree(actual, expected):
    """Whether the error is that of rounding, and exact zeros are exact."""
    error = (actual.double() - expected).norm()
    return bool(error <= TOLERANCE[actual.dtype] * expected.norm()) and bool((actual[expected == 0] == 0).all())


def lists(kept, slots, device):
    """(index, count) of lists of groups, one per sequence; what lies behind a count would fault if it were followed."""
    index = torch.full((len(kept), slots), 2**30, dtype=torch.int32)
    for row, groups in zip(index, kept, strict=True):
        row[: len(groups)] = torch.tensor(groups, dtype=torch.int32)
    return index.to(device), torch.tensor([len(groups) for groups in kept], dtype=torch.int32, device=device)


def make(heads, groups, positions, dim, lengths, device, kept=None, dtype=torch.float32):
    """query, key, value, lengths; NaN where a cache must not be read."""
    torch.manual_seed(0)
    batch = len(lengths)
    query = torch.randn(batch, heads, dim, device=device).to(dtype)
    key, value = (torch.randn(batch, groups, positions, dim, device=device).to(dtype) for _ in range(2))
    for b, length in enumerate(lengths):
        skipped = [g for g in range(groups) if kept is not None and g not in kept[b]]
        for cache in (key, value):
            cache[b, :, length:] = float("nan")
            cache[b, skipped] = float("nan")
    return query, key, value, torch.tensor(lengths, dtype=torch.int32, device=device)


def expected(query, key, value, lengths, heads=None, **options):
    return naive.attention_decode(*double(query, key, value), lengths, *(heads or (None, None)), **options)


@pytest.fixture(params=[True, False], ids=["fused", "second kernel"])
def split(request, monkeypatch, device):
    """Many splits, whatever the table says, merged in the same or in a second kernel."""
    from sparse_kernels.attention import kernel

    monkeypatch.setattr(kernel, "pick", lambda tables, device: defaultdict(lambda: SPLIT))
    monkeypatch.setattr(kernel, "FUSED_SPLITS", 1000 if request.param else 1)
    return device


@pytest.mark.parametrize("heads, groups", [(3, 3), (4, 2), (7, 1), (20, 1)])
def test_equals_naive_whatever_the_split(split, heads, groups):
    arguments = make(heads, groups, 300, 32, [300, 0, 129], split)
    assert agree(attention_decode(*arguments), expected(*arguments))


@pytest.mark.parametrize("heads, groups", [(5, 5), (10, 5)])
def test_lists_of_groups(split, heads, groups):
    kept = [[3, 0], [], [4], [1, 2]]
    chosen = lists(kept, 3, split)
    arguments = make(heads, groups, 300, 64, [257, 300, 1, 0], split, kept)
    out = attention_decode(*arguments, chosen)
    assert agree(out, expected(*arguments, chosen))
    assert (out[1] == 0).all() and out[0].unflatten(0, (groups, -1))[3].abs().min() > 0


@pytest.mark.parametrize("positions", [1, 63, 133, 1000])
@pytest.mark.parametrize("dim", [80, 128])
def test_positions(device, positions, dim):
    for heads, groups in ((2, 2), (4, 2)):
        arguments = make(heads, groups, positions, dim, [positions], device)
        assert agree(attention_decode(*arguments), expected(*arguments))


@pytest.mark.parametrize("dim", [1, 40, 96, 256])
@pytest.mark.parametrize("heads", [2, 4])
def test_dims(device, heads, dim):
    arguments = make(heads, 2, 50, dim, [50, 49], device)
    assert agree(attention_decode(*arguments), expected(*arguments))


@pytest.mark.parametrize("batch", [2, 7, 16])
def test_batches(device, batch):
    arguments = make(4, 2, 70, 32, [70 - 4 * b for b in range(batch)], device)
    assert agree(attention_decode(*arguments), expected(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [3, 6])
def test_half_precision(device, heads, dtype):
    chosen = lists([[0], [2, 1]], 2, device)
    arguments = make(heads, 3, 150, 64, [150, 77], device, [[0], [2, 1]], dtype)
    out = attention_decode(*arguments, chosen)
    assert out.dtype == dtype and agree(out, expected(*arguments, chosen))


@pytest.mark.parametrize("options", [dict(window=70), dict(softcap=2.0), dict(scale=0.3), dict(window=1, softcap=5.0)])
def test_window_softcap_and_scale(split, options):
    for heads, groups in ((2, 2), (4, 2)):
        query, key, value, lengths = make(heads, groups, 200, 32, [200, 60], split)
        if "window" in options:
            key[0, :, : 200 - options["window"]] = float("nan")
        assert agree(
            attention_decode(query, key, value, lengths, **options),
            expected(query, key, value, lengths, **options),
        )


@pytest.mark.parametrize("heads", [2, 6])
def test_cache_views_and_shared_length(device, heads):
    """A part of a longer cache, the other order of its dimensions, a query within a projection, lengths of any kind."""
    query, key, value, _ = make(heads, 2, 90, 32, [90, 90, 90], device)
    whole = torch.full((3, 2, 200, 32), float("nan"), device=device)
    whole[:, :, 10:100] = key
    wide = torch.randn(3, heads + 4, 32, device=device)
    wide[:, :heads] = query
    for dtype in (torch.int32, torch.int64):
        length = torch.tensor([88], dtype=dtype, device=device)
        turned = value.transpose(1, 2).contiguous().transpose(1, 2)
        out = attention_decode(wide[:, :heads], whole[:, :, 10:100], turned, length)
        assert agree(out, expected(query, key, value, length))


def test_a_list_of_all_groups_is_dense_and_order_does_not_matter(split):
    arguments = make(3, 3, 200, 32, [200], split)
    dense = attention_decode(*arguments)
    for kept in ([0, 1, 2], [2, 0, 1]):
        assert torch.equal(attention_decode(*arguments, lists([kept], 3, split)), dense)


def test_twice_is_the_same_to_the_bit(split):
    chosen = lists([[1], [0]], 1, split)
    arguments = make(6, 2, 400, 32, [400, 333], split, [[1], [0]])
    assert torch.equal(attention_decode(*arguments, chosen), attention_decode(*arguments, chosen))


def test_semaphores_are_left_at_zero(split):
    from sparse_kernels.launch import semaphores

    attention_decode(*make(2, 2, 300, 32, [300, 65], split))
    assert not semaphores(torch.device(split, 0) if split == "cuda" else torch.device(split)).any()


@pytest.mark.parametrize(
    "pairs, group, expected",
    [
        (1024, 1, ("heads", "whole")),
        (133, 4, ("groups", "whole")),
        (132, 4, ("groups", "quarters")),
        (32, 1, ("heads", "quarters")),
        (16, 1, ("heads", "sixteenths")),
        (8, 4, ("groups", "sixteenths")),
        (4, 4, ("groups", "slivers")),
        (1, 8, ("groups", "slivers")),
    ],
)
def test_regimes(pairs, group, expected):
    assert regime(pairs, group, 132) == expected and all(expected in table for table in LAUNCH.values())


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 1)])
def test_naive_is_torch_attention(heads, groups):
    query, key, value, lengths = make(heads, groups, 40, 16, [40, 23], "cpu")
    mask = torch.arange(40) < lengths[:, None]
    caches = (cache.nan_to_num() for cache in (key, value))
    dense = F.scaled_dot_product_attention(query[:, :, None], *caches, mask[:, None, None], enable_gqa=True)[:, :, 0]
    assert torch.allclose(attention_decode(query, key, value, lengths), dense, atol=1e-6)
    chosen = lists([[0], []], 1, "cpu")
    masked = dense.unflatten(1, (groups, -1)).clone()
    masked[1], masked[0, 1:] = 0, 0
    assert torch.allclose(attention_decode(query, key, value, lengths, chosen), masked.flatten(1, 2), atol=1e-6)


def test_naive_is_differentiable():
    query, key, value = (torch.randn(s).double().requires_grad_() for s in ((2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3)))
    lengths, chosen = torch.tensor([5, 2]), lists([[1], [0, 1]], 2, "cpu")
    assert torch.autograd.gradcheck(lambda *x: naive.attention_decode(*x, lengths, *chosen), (query, key, value))


def domain(**changes):
    query, key, value, lengths = make(4, 2, 8, 16, [8, 8], "cpu")
    return dict(query=query, key=key, value=value, lengths=lengths) | changes


INT = dict(dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(query=torch.zeros(2, 16)), "query must have shape"),
        (dict(query=torch.zeros(65, 4, 16)), "1 to 64 rows"),
        (dict(query=torch.zeros(2, 4, 16, dtype=torch.int32)), "query must be float32, float16 or bfloat16"),
        (dict(query=torch.zeros(2, 4, 300)), "at most 256 channels"),
        (dict(query=torch.zeros(2, 4, 32)[..., ::2]), "query must have contiguous rows"),
        (dict(query=torch.zeros(2, 3, 16)), "groups dividing 3 heads"),
        (dict(query=torch.zeros(2, 130, 16)), "at most 32 query heads"),
        (dict(key=torch.zeros(2, 2, 8, 16).half()), "key must be torch.float32"),
        (dict(value=torch.zeros(2, 2, 9, 16)), "value must have shape"),
        (dict(key=torch.zeros(2, 2, 16, 8).mT), "key must have contiguous rows"),
        (dict(lengths=torch.zeros(2)), "lengths must be contiguous torch.int32"),
        (dict(lengths=torch.zeros(3, **INT)), "lengths must be contiguous"),
        (dict(heads=(torch.zeros(2, 3, **INT), torch.zeros(2, **INT))), "lists KV groups, each kept with all"),
        (dict(heads=(torch.zeros(2, **INT), torch.zeros(2, **INT))), "1 to 2 slots per sequence"),
        (dict(heads=(torch.zeros(2, 1), torch.zeros(2, **INT))), "index must be contiguous torch.int32"),
        (dict(heads=(torch.zeros(2, 2, **INT).T, torch.zeros(2, **INT))), "index must be contiguous torch.int32"),
        (dict(heads=(torch.zeros(2, 1, **INT), torch.zeros(1, **INT))), "count must be contiguous torch.int32"),
        (dict(window=0), "window must be at least 1"),
        (dict(softcap=-1.0), "softcap must be positive"),
    ],
)
def test_attention_outside_its_domain(changes, message):
    with pytest.raises(ValueError, match=message):
        attention_decode(**domain(**changes))


def test_attention_as_torch_sees_it():
    query, key, value, lengths = make(4, 2, 8, 16, [8, 3], "cpu")
    index, count = torch.tensor([[1], [0]], **INT), torch.ones(2, **INT)
    key, value = key.nan_to_num(), value.nan_to_num()
    opcheck(torch.ops.sparse_kernels.attention_decode, (query, key, value, lengths, index, count, 0.25, 3, 2.0))
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    arguments = (query, key, value, lengths, (index, count))
    assert torch.equal(compiled(*arguments), attention_decode(*arguments))
    with FlopCounterMode(display=False) as counter:
        attention_decode(*arguments)
    assert counter.get_total_flops() == cost.attention_flops(2, 4, 8, 16)
    assert cost.attention_bytes(2, 2, 8, 16, 4, 0.5) == (key.nbytes + value.nbytes) / 2
    with FakeTensorMode():
        fake = [torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in ((2, 4, 16), (2, 2, 8, 16))]
        out = attention_decode(*fake, fake[1], torch.empty(1, device="cuda", **INT))
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 16), torch.bfloat16, "cuda")


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


def same(a, b):
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
    assert same(keys, wanted[0]) and same(values, wanted[1])
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
    assert same(arguments[6], reference[6]) and same(arguments[7], reference[7])


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
    assert close(caches[0][written], key64[written]) and same(caches[1], value64.float())


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
        assert same(ours, theirs)


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
