"""Definition of `compact`."""

import torch
from torch import Tensor


def compact(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    """The channels in which any row of x [B, K] is above its threshold: (index int32 [K], count int32 [1])."""
    value = x.float().abs() if magnitude else x.float()
    active = (value > threshold).any(0).nonzero().flatten().int()
    index = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    index[: active.numel()] = active
    return index, torch.full((1,), active.numel(), dtype=torch.int32, device=x.device)
