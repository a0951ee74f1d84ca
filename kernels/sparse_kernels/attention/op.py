"""Registered operators `attention_decode`, `rotary_table`, `rope_cache_write` and `token_attention`."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.attention import naive
from sparse_kernels.launch import DTYPES, MAX_BATCH, require, require_rows, use_triton

MAX_DIM = 256
MAX_GROUP = 32
STEP = 128  # positions of a cache, at most, that a program takes at once: by 32-bit offsets from the first of them


def require_heads(name: str, x: Tensor) -> None:
    """Check that x is [B, H, D] with 1 <= B <= 64, D <= 256, contiguous rows and a dtype the kernels compute in."""
    require(x.dim() == 3 and min(x.shape) >= 1, "{} must have shape [batch, heads, dim], got {}.", name, x.shape)
    require(x.shape[0] <= MAX_BATCH, "{} must have 1 to {} rows, got {}.", name, MAX_BATCH, x.shape[0])
    require(x.shape[2] <= MAX_DIM, "{} must have at most {} channels a head, got {}.", name, MAX_DIM, x.shape[2])
    known = x.dtype in DTYPES or (x.dtype == torch.float64 and not x.is_cuda)
    require(known, "{} must be float32, float16 or bfloat16, got {}.", name, x.dtype)
    require(x.shape[2] == 1 or x.stride(2) == 1, "{} must have contiguous rows, got strides {}.", name, x.stride())
    require_near(name, x)


def require_near(name: str, x: Tensor) -> None:
    """Check that the kernels reach all heads of a sequence of x [..., B, H, D], in all its parts, by 32-bit offsets."""
    heads = (x.shape[-2] - 1) * x.stride(-2) + x.shape[-1]
    sentence = "{} must have heads within 2^31 values, got strides {}: call contiguous() first."
    require(heads <= 2**31, sentence, name, x.stride())
    if x.dim() == 4:
        far = heads + (x.shape[0] - 1) * x.stride(0)
        require(far <= 2**31, "Parts of {} must be within 2^31 values, got strides {}.", name, x.stride())


def require_integers(name: str, tensor: Tensor, like: Tensor, shapes: tuple[tuple[int, ...], ...], *dtypes) -> None:
    """Check that a tensor of integers is contiguous, has one of the shapes and dtypes, and is on like's device."""
    fits = tuple(tensor.shape) in shapes and tensor.dtype in dtypes and tensor.is_contiguous()
    wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    require(fits, "{} must be contiguous {} {}, got {} {}.", name, dtypes[0], wanted, tensor.dtype, tensor.shape)
    require(tensor.device == like.device, "{} must be on {}, got {}.", name, like.device, tensor.device)


def require_caches(query: Tensor, **caches: Tensor) -> None:
    """Check that both caches are [B, Hkv, N, D] for the heads of query."""
    (batch, heads, dim), (name, first) = query.shape, next(iter(caches.items()))
    shape = first.shape
    fits = first.dim() == 4 and min(shape) >= 1 and heads % shape[1] == 0
    sentence = "{} must have shape [batch, groups, positions, dim], groups dividing {} heads, got {}."
    require(fits, sentence, name, heads, shape)
    require(heads <= MAX_GROUP * shape[1], "A KV group must have at most {} query heads.", MAX_GROUP)
    for name, cache in caches.items():
        require_rows(name, cache, query, (batch, *shape[1:3], dim))
        far = (min(shape[2], STEP) - 1) * cache.stride(2) + dim
        sentence = "{} must have {} positions within 2^31 values, got strides {}."
        require(far <= 2**31, sentence, name, STEP, cache.stride())


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    heads: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with one new token per sequence to a static cache, with the listed KV groups only.

    query: [B, Hq, D], 1 <= B <= 64, D <= 256, float32, float16 or bfloat16. key, value: [B, Hkv, N, D] with Hq a
    multiple of Hkv, at most 32 times, such as `layer.keys` and `layer.values` of transformers' StaticCache; any strides
    with contiguous rows. lengths: int32 or int64, [B] or, for all sequences, [1]: how many positions from the first are
    valid, the new token's among them; 0 gives zeros. heads: (index int32 [B, S], count int32 [B]): sequence b keeps the
    KV groups index[b, : count[b]], all different, in any order, each with all its query heads; None keeps all.
    scale: of the scores, D ** -0.5 by default. window: attend to the last `window` valid positions only. softcap:
    limit scaled scores s to softcap * tanh(s / softcap).
    Returns [B, Hq, D] in query's dtype, softmax in float32 and in a fixed order; exact zeros for the other groups,
    whose cache is never read, nor is what lies behind a length. The host does not wait for lengths or lists.
    Raises ValueError outside this domain.

    Per-sequence lists of heads follow Polar Sparsity (Shrestha et al., 2025, arXiv:2505.14884).
    """
    require_heads("query", query)
    require_caches(query, key=key, value=value)
    batch, groups = key.shape[:2]
    require_integers("lengths", lengths, query, ((batch,), (1,)), torch.int32, torch.int64)
    index, count = heads or (None, None)
    require((index is None) == (count is None), "heads are an index and a count, got one of them.")
    if index is not None and count is not None:
        fits = index.dim() == 2 and 1 <= index.shape[1] <= groups
        sentence = "heads lists KV groups, each kept with all its query heads: 1 to {} slots per sequence, got {}."
        require(fits, sentence, groups, index.shape)
        require_integers("index", index, query, ((batch, index.shape[1]),), torch.int32)
        require_integers("count", count, query, ((batch,),), torch.int32)
    require(window is None or window >= 1, "window must be at least 1, got {}.", window)
    require(softcap is None or softcap > 0, "softcap must be positive, got {}.", softcap)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    return torch.ops.sparse_kernels.attention_decode(
        query, key, value, lengths, index, count, scale, window or 0, softcap or 0.0
    )


def rotary_table(position: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine by which one new token per sequence is rotated, in one launch.

    position: int64 or int32 [B], B >= 1, any stride. frequencies: contiguous float32 [D / 2], D <= 256: `inv_freq` of
    transformers' rotary embeddings; scale: their `attention_scaling`. Returns cos and sin, [B, D] in dtype, as those
    embeddings make them: angle, cosine, sine and scale in float32, then rounded. Raises ValueError outside this domain.
    """
    require(position.dim() == 1 and len(position) >= 1, "position must have shape [batch], got {}.", position.shape)
    known = position.dtype in (torch.int64, torch.int32)
    require(known, "position must be int64 or int32, got {}.", position.dtype)
    fits = frequencies.dim() == 1 and 1 <= len(frequencies) <= MAX_DIM // 2 and frequencies.dtype == torch.float32
    sentence = "frequencies must be float32 [1 to {}], got {} {}."
    require(fits, sentence, MAX_DIM // 2, frequencies.dtype, frequencies.shape)
    require(frequencies.is_contiguous(), "frequencies must be contiguous, got strides {}.", frequencies.stride())
    same = frequencies.device == position.device
    require(same, "frequencies must be on {}, got {}.", position.device, frequencies.device)
    require(dtype in (*DTYPES, torch.float64), "dtype must be float32, float16 or bfloat16, got {}.", dtype)
    return torch.ops.sparse_kernels.rotary_table(position, frequencies, scale, dtype)


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
    """Rotate the query and key of one new token per sequence and write key and value into the cache, in one launch.

    query: [B, Hq, D], key, value: [B, Hkv, D], 1 <= B <= 64, even D <= 256, contiguous rows and any other strides, such
    as parts of one projection; or of all three what `threshold_linear(partial=True)` left of them, [parts, B, H, D],
    float32 views of one tensor, whose sums, rounded, they then are. cos, sin: contiguous [B, D] or [1, D] in the
    cache's dtype, as transformers makes them, for x * cos + rotate_half(x) * sin over all of D; None to leave out the
    rotation. position: int64 or int32, [B] or [1], at least 0 and less than N: where to write. key_cache, value_cache:
    [B, Hkv, N, D], written in place, as in `attention_decode`. query_norm, key_norm: [D], weights of an RMSNorm of each
    head before the rotation, in the cache's dtype (rounded before the product, as Qwen3 does) or float32 (rounded after
    it, as Gemma 3 does with 1 + weight); eps is theirs.
    Returns the rotated query [B, Hq, D]. Products and their sum are rounded to the dtype one by one as transformers'
    apply_rotary_pos_emb rounds them: equal to the bit in half precision, where a norm sums in another order to 1 ulp.
    Raises ValueError outside this domain.
    """
    query, key, value = require_token(
        query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm
    )
    return torch.ops.sparse_kernels.rope_cache_write(
        query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps
    )


def token_attention(
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
    scale: float | None = None,
    scaled_query: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """`rope_cache_write`, then `attention_decode` to all positions up to the new one, of one sequence in one launch.

    What both take, with one row; position: [1], the new token's. scaled_query: the query is multiplied by scale and
    rounded before the product with the keys, not the scores after it. Returns [1, Hq, D] in the cache's dtype.
    Positions of the cache before `position`, and `position`, must not be written by the kernel before: they are read
    while it still runs. Raises ValueError outside this domain.
    """
    query, key, value = require_token(
        query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm
    )
    require(query.shape[-3] == 1, "query must have one row, got {}.", query.shape[-3])
    require(softcap is None or softcap > 0, "softcap must be positive, got {}.", softcap)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.sparse_kernels.token_attention(
        query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps, scale, scaled_query,
        softcap or 0.0,
    )  # fmt: skip


def require_token(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Check what `rope_cache_write` takes; query, key and value without the dimension of a single finished part."""
    if query.dim() == 4 and len(query) == 1 and query.dtype == key_cache.dtype:  # of a dense product: a result already
        for name, x in (("key", key), ("value", value)):
            require(x.dim() == 4 and len(x) == 1, "{} must have one part like query, got {}.", name, x.shape)
        query, key, value = query[0], key[0], value[0]
    like = query
    if query.dim() == 4:
        parts, like = len(query), key_cache.new_empty(query.shape[1:])
        for name, x in (("query", query), ("key", key), ("value", value)):
            fits = x.dtype == torch.float32 and x.dim() == 4 and len(x) == parts
            fits &= parts == 1 or x.stride(0) == query.stride(0)
            require(fits, "Parts of {} must be float32 views of one tensor, got {} {}.", name, x.dtype, x.shape)
            require(x.stride(3) == 1, "{} must have contiguous rows, got strides {}.", name, x.stride())
            require_near(name, x)
    require_heads("query", like)
    batch, heads, dim = like.shape
    require(dim % 2 == 0, "query must have an even number of channels a head, got {}.", dim)
    require_caches(like, key_cache=key_cache, value_cache=value_cache)
    groups = key_cache.shape[1]
    for name, x in (("key", key), ("value", value)):
        if query.dim() == 4:
            require(x.shape[1:] == (batch, groups, dim), "{} must have {} groups, got {}.", name, groups, x.shape)
        else:
            require_rows(name, x, query, (batch, groups, dim))
            require_near(name, x)
    require((cos is None) == (sin is None), "cos and sin go together.")
    if cos is not None and sin is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            require(table.dim() == 2, "{} must have shape [batch, dim], got {}.", name, table.shape)
            require_rows(name, table, like, (1 if table.shape[0] == 1 else batch, dim))
            require(table.is_contiguous(), "{} must be contiguous, got strides {}.", name, table.stride())
        require(cos.shape == sin.shape, "cos and sin must have one shape, got {} and {}.", cos.shape, sin.shape)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            fits = norm.shape == (dim,) and norm.dtype in (like.dtype, torch.float32) and norm.is_contiguous()
            got = (norm.dtype, norm.shape)
            require(fits, "{} must be a contiguous {} or float32 [{}], got {} {}.", name, like.dtype, dim, *got)
            require(norm.device == query.device, "{} must be on {}, got {}.", name, query.device, norm.device)
    require_integers("position", position, query, ((batch,), (1,)), torch.int64, torch.int32)
    return query, key, value


@torch.library.custom_op(
    "sparse_kernels::attention_decode",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor? index, Tensor? count, float scale,"
    " int window, float softcap) -> Tensor",
)
def _attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    arguments = (query, key, value, lengths, index, count, scale, window, softcap)
    if not use_triton(query):
        return naive.attention_decode(*arguments)
    from sparse_kernels.attention import kernel

    return kernel.attention_decode(*arguments)


@_attention_decode.register_fake
def _(query, key, value, lengths, index, count, scale, window, softcap):
    return query.new_empty(query.shape)


@register_flop_formula(torch.ops.sparse_kernels.attention_decode)
def _flops(query_shape, key_shape, *args, **kwargs) -> int:
    """Those of attention with all heads to the whole cache: what is skipped is not known from shapes."""
    batch, heads, dim = query_shape
    return 4 * batch * heads * dim * key_shape[2]


@torch.library.custom_op(
    "sparse_kernels::rotary_table",
    mutates_args=(),
    schema="(Tensor position, Tensor frequencies, float scale, ScalarType dtype) -> (Tensor, Tensor)",
)
def _rotary_table(position: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not use_triton(position):
        return naive.rotary_table(position, frequencies, scale, dtype)
    from sparse_kernels.attention import rope

    return rope.rotary_table(position, frequencies, scale, dtype)


@_rotary_table.register_fake
def _(position, frequencies, scale, dtype):
    shape = (len(position), 2 * len(frequencies))
    return frequencies.new_empty(shape, dtype=dtype), frequencies.new_empty(shape, dtype=dtype)


@register_flop_formula(torch.ops.sparse_kernels.rotary_table)
def _table_flops(*args, **kwargs) -> int:
    """None: no matrix product."""
    return 0


@torch.library.custom_op(
    "sparse_kernels::rope_cache_write",
    mutates_args=("key_cache", "value_cache"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor position, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor? query_norm, Tensor? key_norm, float eps) -> Tensor",
)
def _rope_cache_write(
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
) -> Tensor:
    arguments = (query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps)
    if not use_triton(query):
        return naive.rope_cache_write(*arguments)
    from sparse_kernels.attention import rope

    return rope.rope_cache_write(*arguments)


@_rope_cache_write.register_fake
def _(query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps):
    return key_cache.new_empty(query.shape[-3:])


@register_flop_formula(torch.ops.sparse_kernels.rope_cache_write)
def _rope_flops(*args, **kwargs) -> int:
    """None: the rotation is no matrix product."""
    return 0


@torch.library.custom_op(
    "sparse_kernels::token_attention",
    mutates_args=("key_cache", "value_cache"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor position, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor? query_norm, Tensor? key_norm, float eps, float scale, bool scaled_query,"
    " float softcap) -> Tensor",
)
def _token_attention(
    query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps, scale, scaled_query,
    softcap,
):  # fmt: skip
    arguments = (query, key, value, cos, sin, position, key_cache, value_cache, query_norm, key_norm, eps)
    arguments += (scale, scaled_query, softcap)
    if not use_triton(query):
        return naive.token_attention(*arguments)
    from sparse_kernels.attention import row

    return row.token_attention(*arguments)


@_token_attention.register_fake
def _(query, key, value, cos, sin, position, key_cache, value_cache, *args):
    return key_cache.new_empty(query.shape[-3:])


@register_flop_formula(torch.ops.sparse_kernels.token_attention)
def _token_flops(query_shape, key_shape, value_shape, cos, sin, position, cache_shape, *args, **kwargs) -> int:
    """Those of attention to the whole cache, as for `attention_decode`."""
    return 4 * math.prod(query_shape[-2:]) * cache_shape[2]
