"""Routed FFN layers for training: experts weighted by their scores instead of switched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels.layers import ExpertFFN


class SoftExpertFFN(ExpertFFN):
    """`ExpertFFN` that, while `soft`, computes all experts and multiplies each by sigmoid(score) (LTE, eq. 3).

    `scores` holds the last forward's sigmoid scores, float32 [..., experts], for the penalties on them.
    """

    soft = False
    scores: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.soft:
            return super().forward(x)
        # In float32 whatever autocast does: bfloat16 scores would often equal the threshold exactly.
        with torch.autocast(x.device.type, enabled=False):
            self.scores = torch.sigmoid(F.linear(x.float(), self.router.float()))
        return self.down((self.hidden(x) * self.scores.unsqueeze(-1).to(x.dtype)).flatten(-2))
