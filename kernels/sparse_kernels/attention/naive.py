"""Definitions of `attention_decode`, `rotary_table`, `rope_cache_write` and `token_attention`."""

import torch
from torch import Tensor


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of query [B, Hq, D] to the valid positions of key, value [B, Hkv, N, D]; zero for groups not listed."""
    batch, heads, dim = query.shape
    groups = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(batch, groups, heads // groups, dim)
    for b, length in enumerate(lengths.expand(batch).tolist()):
        kept = slice(None) if index is None or count is None else index[b, : int(count[b])].long()
        first = max(length - window, 0) if window else 0
        q = query[b].unflatten(0, (groups, -1))[kept].to(dtype)
        k, v = (cache[b, kept, first:length].to(dtype) for cache in (key, value))
        score = q @ k.mT * (dim**-0.5 if scale is None else scale)
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        out[b, kept] = (score.softmax(-1) @ v).to(query.dtype)
    return out.flatten(1, 2)


def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, rounded to x's dtype before the product with weight unless that is float32."""
    if weight is None:
        return x
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (weight * (y.to(x.dtype) if weight.dtype == x.dtype else y)).to(x.dtype)


def rotary_table(position: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequencies, twice beside each other, times scale: [B, D] each."""
    angle = (position[:, None].float() * frequencies).repeat(1, 2)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x cos + rotate_half(x) sin for x [B, H, D] and cos, sin [B or 1, D], each term rounded to x's dtype."""
    if cos is None or sin is None:
        return x
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def rope_cache_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Write the normalised, rotated key and the value into the caches; the normalised, rotated query [B, Hq, D].

    query, key and value [parts, B, H, D] are the sums over their parts.
    """
    if query.dim() == 4:
        query, key, value = (x.sum(0).to(key_cache.dtype) for x in (query, key, value))
    batch = torch.arange(len(query), device=query.device)
    place = position.long().expand(len(query))
    key_cache[batch, :, place] = rotate(normalise(key, key_norm, eps), cos, sin)
    value_cache[batch, :, place] = value
    return rotate(normalise(query, query_norm, eps), cos, sin).clone(memory_format=torch.contiguous_format)


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    scale: float,
    scaled_query: bool,
    softcap: float,
) -> Tensor:
    """`rope_cache_write`, then `attention_decode` to all positions up to the new one."""
    arguments = (query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps)
    query = rope_cache_write(*arguments)
    query, scale = (query * scale, 1.0) if scaled_query else (query, scale)
    return attention_decode(query, key_cache, value_cache, position + 1, None, None, scale, 0, softcap)
