"""Registered operator `spark_attention_decode`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_kernels.attention.op import require_caches, require_heads
from sparse_kernels.launch import require, use_triton
from sparse_kernels.spark_attention import naive
from sparse_kernels.spark_attention.cost import spark_attention_flops


def spark_attention_multipliers(attended: int, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [positions + 1]: how many deviations above the mean about `attended` of so many scores lie; else -inf.

    Raises ValueError unless attended is at least 1.
    """
    require(attended >= 1, "attended must be at least 1, got {}.", attended)
    return naive.multipliers(attended, torch.arange(positions + 1, device=device))


def spark_attention_decode(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, multiplier: Tensor) -> Tensor:
    """Attend with one new token per sequence to the cached tokens whose score is high for its head.

    query: [B, Hq, D], 1 <= B <= 64, even D <= 256, float32, float16 or bfloat16; key, value: [B, Hkv, N, D], as in
    `attention_decode`. visible: bool [B, N] or [1, N], contiguous rows. multiplier: float32 [N + 1] on the device,
    `spark_attention_multipliers(k, N)`.
    A visible token's score a is that of the first half of the channels, over sqrt(D / 2). Attended to are the tokens
    with a >= mean + multiplier[m] * deviation, statistics in float32 over the m visible ones, and always the best one.
    Returns [B, Hq, D] in query's dtype: sum over these of softmax(a) * softplus(b) * v, b the score of the other half;
    zeros where nothing is visible. Of the other tokens only the first half of the keys is read, of those that are not
    visible nothing. Raises ValueError outside this domain.

    Source: Spark Transformer (arXiv 2506.06644); the scaling of scores is not published.
    """
    require_heads("query", query)
    require_caches(query, key=key, value=value)
    batch, positions = key.shape[0], key.shape[2]
    require(query.shape[2] % 2 == 0, "query must have an even number of channels a head, got {}.", query.shape[2])
    fits = visible.dtype == torch.bool and visible.shape in ((batch, positions), (1, positions))
    require(fits, "visible must be a bool [{}, {}], got {} {}.", batch, positions, visible.dtype, visible.shape)
    rows = positions == 1 or visible.stride(1) == 1
    require(rows and visible.device == query.device, "visible must have contiguous rows on {}.", query.device)
    fits = multiplier.dtype == torch.float32 and multiplier.shape == (positions + 1,) and multiplier.is_contiguous()
    require(fits and multiplier.device == query.device, "multiplier must be a float32 [{}].", positions + 1)
    return torch.ops.sparse_kernels.spark_attention_decode(query, key, value, visible, multiplier)


@torch.library.custom_op("sparse_kernels::spark_attention_decode", mutates_args=())
def _spark_attention_decode(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, multiplier: Tensor) -> Tensor:
    arguments = (query, key, value, visible, multiplier)
    if not use_triton(query):
        return naive.spark_attention_decode(*arguments)
    from sparse_kernels.spark_attention import kernel

    return kernel.spark_attention_decode(*arguments)


@_spark_attention_decode.register_fake
def _(query, key, value, visible, multiplier):
    return query.new_empty(query.shape)


@register_flop_formula(torch.ops.sparse_kernels.spark_attention_decode)
def _flops(query_shape, key_shape, *args, **kwargs) -> int:
    """Those of all positions: what is skipped is not known from shapes."""
    batch, heads, dim = query_shape
    return int(spark_attention_flops(batch, heads, key_shape[2], dim))
