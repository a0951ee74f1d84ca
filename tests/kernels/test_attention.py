from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from support import agree, double, far
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import attention_decode
from sparse_kernels.attention import cost, naive
from sparse_kernels.attention.launch import LAUNCH, Decode, regime

SPLIT = Decode(keys=64, warps=4, stages=3, programs=64)


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
    "pairs, group, listed, expected",
    [
        (4, 4, False, "all"),
        (32, 1, False, "all"),
        (1024, 1, False, "heads"),
        (1024, 1, True, "heads"),
        (1024, 4, True, "all"),
        (132, 1, True, "kept"),
        (66, 4, True, "kept, halves"),
        (34, 1, True, "kept, halves"),
        (33, 4, True, "kept"),
        (1, 4, True, "kept"),
    ],
)
def test_regimes(pairs, group, listed, expected):
    assert regime(pairs, group, listed, 132) == expected and all(expected in table for table in LAUNCH.values())


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
        (dict(heads=(torch.zeros(2, 1, **INT), None)), "an index and a count, got one of them"),
        (dict(heads=(torch.zeros(2, 1), torch.zeros(2, **INT))), "index must be contiguous torch.int32"),
        (dict(heads=(torch.zeros(2, 2, **INT).T, torch.zeros(2, **INT))), "index must be contiguous torch.int32"),
        (dict(heads=(torch.zeros(2, 1, **INT), torch.zeros(1, **INT))), "count must be contiguous torch.int32"),
        (dict(window=0), "window must be at least 1"),
        (dict(softcap=-1.0), "softcap must be positive"),
        (dict(query=far(2, 4, 16, apart=1)), "query must have heads within 2.31 values"),
        (dict(query=far(2, 4, 16), key=far(2, 2, 8, 16, apart=2)), "key must have 128 positions within 2.31 values"),
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
