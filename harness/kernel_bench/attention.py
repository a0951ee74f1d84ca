"""Decode attention over full caches: with all KV groups, half of them, or few tokens; rotation and cache write."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_kernels import (
    attention_decode,
    rope_cache_write,
    rotary_table,
    spark_attention_decode,
    spark_attention_multipliers,
    token_attention,
)
from sparse_kernels.attention import cost, naive
from sparse_kernels.spark_attention import cost as spark_cost
from sparse_kernels.spark_attention import naive as spark

from .case import Case, Copy, Draw, Shape

# (batch, context), where each query head has its own keys and where heads share them.
CONTEXTS = ((1, 512), (1, 4096), (16, 2048), (64, 3968))
GROUPED_CONTEXTS = ((16, 2048), (64, 8192), (1, 32768))
ROPE_CONTEXT = 1024
ATTENDED = 256  # tokens: Spark Transformer's, arXiv 2506.06644; in short contexts an eighth


def cases(shape: Shape) -> Iterator[Case]:
    if shape.biased:  # OPT: no rotation, and the attention of Llama 2
        return
    heads = f"{shape.name} {shape.heads}/{shape.kv_heads} heads"
    for batch, context in CONTEXTS if shape.heads == shape.kv_heads else GROUPED_CONTEXTS:
        for density in (1.0, 0.5):
            build = partial(_attention, shape, batch, context, density)
            yield Case("attention_decode", f"{heads}, context {context}", batch, density, build, "cuDNN SDPA")
        attended = min(ATTENDED, context // 8)
        build = partial(_spark_attention, shape, batch, context, attended)
        title = f"{heads}, {attended} of {context} tokens"
        yield Case("spark_attention_decode", title, batch, attended / context, build, "cuDNN SDPA")
        if batch == 1:
            build = partial(_token, shape, context)
            yield Case("token_attention", f"{heads}, context {context}", 1, 1.0, build, "cuDNN SDPA")
    yield Case("rotary_table", f"{shape.name} {shape.head_dim} channels", 1, 1.0, partial(_table, shape))
    for batch in (1, 16):
        yield Case("rope_cache_write", heads, batch, 1.0, partial(_rope, shape, batch))


def _attention(shape: Shape, batch: int, context: int, density: float, draw: Draw) -> Copy:
    groups, dim = shape.kv_heads, shape.head_dim
    query = draw.normal(batch, shape.heads, dim)
    key, value = (draw.normal(batch, groups, context, dim) for _ in range(2))
    lengths = torch.full((batch,), context, dtype=torch.int32, device=draw.device)
    mask = draw.mask(batch, groups, density)
    heads = None
    if density < 1:  # as many slots as heads are kept, which a method that keeps k of them knows
        index, count = draw.lists(mask)
        heads = index[:, : int(count.max())].contiguous(), count

    def reference() -> Tensor:
        """One sequence at a time: a whole cache in float64 would not fit beside the copies."""
        parts = []
        for row in (slice(b, b + 1) for b in range(batch)):
            q, k, v = (tensor[row].double() for tensor in (query, key, value))
            index, count = (None, None) if heads is None else (heads[0][row], heads[1][row])
            parts.append(naive.attention_decode(q, k, v, lengths[row], index, count))
        return torch.cat(parts)

    kept = mask.double().mean().item()
    return Copy(
        run=lambda: attention_decode(query, key, value, lengths, heads),
        reference=reference,
        bytes=round(cost.attention_bytes(batch, groups, context, dim, key.element_size(), kept)),
        density=kept,
        baseline=partial(_dense, query, key, value),
    )


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if query.is_cuda else [SDPBackend.MATH]):
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=grouped)[:, :, 0]


def _spark_attention(shape: Shape, batch: int, context: int, attended: int, draw: Draw) -> Copy:
    """Scores are near 1 for the attended tokens of a group and near -1 for the others: no limit is near a score."""
    groups, dim, half = shape.kv_heads, shape.head_dim, shape.head_dim // 2
    query = draw.normal(batch, shape.heads, dim)
    key, value = (draw.normal(batch, groups, context, dim) for _ in range(2))
    mask = draw.mask(batch * groups, context, attended / context).view(batch, groups, context)
    query[..., :half] = 0
    query[..., 0] = half**0.5
    key[..., 0] = torch.where(mask, 1.0, -1.0) + 0.1 * key[..., 0]
    visible = torch.ones(1, context, dtype=torch.bool, device=draw.device)
    multiplier = spark_attention_multipliers(attended, context, draw.device)

    def reference() -> Tensor:
        parts = []
        for row in (slice(b, b + 1) for b in range(batch)):
            q, k, v = (tensor[row].double() for tensor in (query, key, value))
            parts.append(spark.spark_attention_decode(q, k, v, visible, multiplier))
        return torch.cat(parts)

    kept = mask.double().mean().item()
    return Copy(
        run=lambda: spark_attention_decode(query, key, value, visible, multiplier),
        reference=reference,
        bytes=round(spark_cost.spark_attention_bytes(batch, groups, context, dim, key.element_size(), kept)),
        density=kept,
        baseline=partial(_dense, query, key, value),
    )


def _rotated(shape: Shape, batch: int, draw: Draw) -> tuple[Tensor, ...]:
    """q, k, v of a token per sequence, and the cosines and sines of its rotation."""
    heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
    parts = draw.normal(batch, heads + 2 * groups, dim).split([heads, groups, groups], 1)
    angle = draw.normal(batch, dim // 2, std=3.0, dtype=torch.float32).repeat(1, 2)
    return *parts, angle.cos().to(draw.dtype), angle.sin().to(draw.dtype)


def _token(shape: Shape, context: int, draw: Draw) -> Copy:
    """Rotation, cache write and attention of one token; the baseline attends only."""
    groups, dim = shape.kv_heads, shape.head_dim
    query, key, value, cos, sin = _rotated(shape, 1, draw)
    keys, values = (draw.normal(1, groups, context, dim) for _ in range(2))
    position = torch.full((1,), context - 1, device=draw.device)

    def reference() -> Tensor:
        tables = cos.double(), sin.double()
        q, k = (naive.rotate(part.double(), *tables) for part in (query, key))
        k, v = (torch.cat([old[:, :, :-1].double(), new[:, :, None]], 2) for old, new in ((keys, k), (values, value)))
        return naive.attention_decode(q, k, v, position + 1)

    return Copy(
        run=lambda: token_attention(query, key, value, cos, sin, position, keys, values),
        reference=reference,
        bytes=round(cost.attention_bytes(1, groups, context, dim, key.element_size())),
        density=1.0,
        baseline=partial(_dense, query, keys, values),
    )


def _table(shape: Shape, draw: Draw) -> Copy:
    position = torch.full((1,), draw.seed % ROPE_CONTEXT, device=draw.device)
    frequencies = draw.normal(shape.head_dim // 2, dtype=torch.float32).abs()

    def reference() -> Tensor:
        angle = (position.double() * frequencies.double()).repeat(1, 2)
        return torch.cat([angle.cos(), angle.sin()])

    return Copy(
        run=lambda: rotary_table(position, frequencies, 1.0, draw.dtype),
        result=lambda cos, sin: torch.cat([cos, sin]),
        reference=reference,
        bytes=cost.rotary_bytes(1, shape.head_dim, draw.dtype.itemsize),
        density=1.0,
    )


def _rope(shape: Shape, batch: int, draw: Draw) -> Copy:
    heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
    query, key, value, cos, sin = _rotated(shape, batch, draw)
    keys, values = (draw.normal(batch, groups, ROPE_CONTEXT, dim) for _ in range(2))
    place = draw.seed % ROPE_CONTEXT
    position = torch.full((1,), place, device=draw.device)

    def flat(*output: Tensor) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in output])

    def run() -> tuple[Tensor, ...]:
        rotated = rope_cache_write(query, key, value, cos, sin, position, keys, values)
        return rotated, keys[:, :, place], values[:, :, place]

    def reference() -> Tensor:
        tables = cos.double(), sin.double()
        return flat(naive.rotate(query.double(), *tables), naive.rotate(key.double(), *tables), value.double())

    read = cost.rope_bytes(batch, heads, groups, dim, query.element_size())
    return Copy(run=run, reference=reference, bytes=read, density=1.0, result=flat)
