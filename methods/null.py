"""The null method: every input channel of every linear layer, through the sparse path.

Its FLOPs, bytes and accuracy must be the dense ones; what its latency adds is the framework's own overhead.
"""

from __future__ import annotations

from .base import Attachment, Method


class Null(Method):
    """Input sparsity with a threshold that every value exceeds."""

    name = "null"
    summary = "100 % density through the sparse path: shows the framework's overhead"
    sites = ("q", "k", "v", "o", "gate", "up", "down")
    densities = (None,)
    fidelity = "a control, not a method"

    def attach(self, attachment: Attachment) -> None:
        import torch

        from sparse_kernels.layers import SparseLinear

        from .families import blocks

        below_all = torch.tensor([-1.0])  # |x| > -1 always holds
        for block in blocks(attachment.model):
            for site, linear in block.linears.items():
                layer = SparseLinear(linear, below_all, site, block.index, attachment.phase, attachment.meter)
                attachment.replace(f"{block.path}.{block.layout.linears[site]}", layer)
