"""Definition of `input_linear`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def input_linear(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """x [B, K] times the rows of weight_t [K, N] that belong to the listed groups of channels: y [B, N]."""
    groups = index[: int(count)].long()
    rows = (groups[:, None] * group + torch.arange(group, device=x.device)).flatten()
    value = x[:, rows]
    if threshold is not None:
        limit = threshold if threshold.numel() == 1 else threshold[rows]
        value = torch.where(value.float().abs() > limit, value, 0)
    return F.linear(value, weight_t[rows].t(), bias)
