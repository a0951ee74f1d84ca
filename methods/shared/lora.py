"""Low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685): what a large model can be fine-tuned with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SCALE = 2.0  # alpha / rank
RATE = 10.0  # of the rate at which all weights would be trained; the usual ratio


class LowRank(nn.Module):
    """weight [n, d] -> weight + SCALE * b a, with a [rank, d] drawn as a linear layer's weights, and b [n, rank] 0."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n, d = weight.shape
        if not 0 < rank <= min(n, d):
            raise ValueError(f"a [{n}, {d}] weight has no update of rank {rank}")
        a = (torch.rand(rank, d, generator=generator) * 2 - 1) * d**-0.5
        self.a, self.b = nn.Parameter(a.to(weight)), nn.Parameter(torch.zeros(n, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * (self.b @ self.a)


def adapt(linears: Iterable[nn.Linear], rank: int, seed: int) -> None:
    """Gives each a trainable update of its weight, which is frozen; `linear.weight` is the sum from here on."""
    generator = torch.Generator().manual_seed(seed)
    for linear in linears:
        update = LowRank(linear.weight, rank, generator)
        parametrize.register_parametrization(linear, "weight", update)
        linear.parametrizations["weight"].original.requires_grad_(False)  # type: ignore[union-attr, operator, index]
