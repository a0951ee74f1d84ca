"""Definitions of Spark attention (arXiv 2506.06644): for any queries, differentiable, and for a decode step."""

import torch
import torch.nn.functional as F
from torch import Tensor


def multipliers(attended: int, seen: Tensor) -> Tensor:
    """float32, of seen's shape: Q(1 - attended / seen), -inf where so many tokens or fewer are seen."""
    share = (1 - attended / seen.clamp(min=1)).float()
    return torch.where(seen <= attended, -torch.inf, torch.special.ndtri(share.clamp(min=1e-6)))


@torch.no_grad()
def attended_to(a: Tensor, visible: Tensor, multiplier: Tensor) -> Tensor:
    """The visible tokens with a >= mean + multiplier * deviation, statistics of the visible ones; always the best one.

    a [..., S], visible bool [..., S], multiplier [..., 1]; returns bool [..., S].
    """
    seen = visible.sum(-1, keepdim=True)
    mean = a.masked_fill(~visible, 0).sum(-1, keepdim=True) / seen
    deviation = ((a - mean).square().masked_fill(~visible, 0).sum(-1, keepdim=True) / seen).sqrt()
    best = a.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    limit = torch.where(multiplier.isinf(), -torch.inf, torch.minimum(mean + deviation * multiplier, best))
    return visible & (a >= limit)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k / sqrt(width) in float32: [B, H, T, S] of q [B, H, T, width] and k [B, H, S, width]."""
    product = q @ k.transpose(2, 3)
    return (product if product.dtype == torch.float64 else product.float()) * q.shape[-1] ** -0.5


def weights(a: Tensor, keep: Tensor) -> Tensor:
    """Softmax of the kept scores, 0 for the others; all 0 where none is kept."""
    return a.masked_fill(~keep, torch.finfo(a.dtype).min).softmax(-1).masked_fill(~keep, 0)


def spark_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, attended: int) -> Tensor:
    """sum_i softmax(top(a))_i softplus(b_i) v_i, a the scores of the first half of the channels, b of the second.

    q [B, H, T, D], k and v [B, H, S, D], visible bool [..., T, S] of at least one token each; returns [B, H, T, D].
    """
    half = q.shape[-1] // 2
    a = scores(q[..., :half], k[..., :half])
    gate = F.softplus(scores(q[..., half:], k[..., half:]))
    keep = attended_to(a, visible, multipliers(attended, visible.sum(-1, keepdim=True)))
    return (weights(a, keep) * gate).to(v.dtype) @ v


def spark_attention_decode(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, multiplier: Tensor) -> Tensor:
    """`spark_attention` of one query per sequence: query [B, Hq, D], key and value [B, Hkv, N, D], visible [B, N].

    multiplier [N + 1]: that of each number of visible tokens.
    """
    batch, heads, dim = query.shape
    half, rows = dim // 2, query.unsqueeze(2)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    a = scores(rows[..., :half], k[..., :half])
    gate = F.softplus(scores(rows[..., half:], k[..., half:]))
    shown = visible.expand(batch, -1)[:, None, None]
    keep = attended_to(a, shown, multiplier[shown.sum(-1, keepdim=True)])
    hidden = ~visible.expand(batch, -1)[:, None, :, None]  # whatever is there
    gate, v = gate.masked_fill(~shown, 0), v.masked_fill(hidden, 0)
    return ((weights(a, keep) * gate).to(v.dtype) @ v)[:, :, 0]
