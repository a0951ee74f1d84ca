"""Attention heads that are left out: how many, which mattered, and their layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparse_kernels.heads import SelectiveHeads
from sparse_kernels.selectors import Selector

from ..base import Attachment
from ..families import blocks, heads_of


def head_norms(outputs: Tensor, heads: int) -> Tensor:
    """float32 [..., heads]: Euclidean norms of what every head puts out, outputs [..., heads * size]."""
    return outputs.unflatten(-1, (heads, -1)).float().norm(dim=-1)


def group_norms(norms: Tensor, groups: int) -> Tensor:
    """[..., groups] from [..., heads]: a group counts as its largest head."""
    return norms.unflatten(-1, (groups, -1)).amax(-1)


def group_importance(heads: int, groups: int) -> Callable[[Tensor], Tensor]:
    """For an oracle: `group_norms` of attention outputs [..., groups, channels of a group]."""
    return lambda outputs: head_norms(outputs, heads // groups).amax(-1)


def largest(values: Tensor, n: int) -> Tensor:
    """bool [..., units]: the n largest values of each row."""
    return values.new_zeros(values.shape).bool().scatter_(-1, values.topk(n, dim=-1).indices, True)


def attach_heads(attachment: Attachment, selector: Callable[[int], Selector | None]) -> None:
    """Every output projection as `SelectiveHeads`; selector: of a block, None where all its heads stay."""
    _, groups = heads_of(attachment.model.config)
    for block in blocks(attachment.model):
        shared = block.index, attachment.phase, attachment.meter
        layer = SelectiveHeads(block.linears["o"], groups, selector(block.index), *shared)
        attachment.replace(f"{block.path}.{block.layout.linears['o']}", layer)
