"""Routed FFN layers for training: experts weighted by their scores instead of switched."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Router


class SoftExpertFFN(ExpertFFN):
    """`ExpertFFN` that, while `soft`, computes all experts and multiplies each by sigmoid(score) (LTE, eq. 3).

    `scores` holds the last forward's sigmoid scores, float32 [..., experts], for the penalties on them.
    """

    soft = False
    scores: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.soft:
            return super().forward(x)
        assert isinstance(self.selector, Router)
        with torch.autocast(x.device.type, enabled=False):  # for the selector's reasons
            self.scores = torch.sigmoid(self.selector.score(x.float()))
        return self.down((self.hidden(x) * self.scores.unsqueeze(-1).to(x.dtype)).flatten(-2))
