"""Penalties that make a model's FFN activations sparser while it is fine-tuned (D2DMoE, arXiv 2310.04361)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .student import Student

FLOOR = -10.0  # the released code's displacement: where the activation is kept, inputs below it count as off
RAMPS: dict[str, Callable[[float], float]] = {
    "linear_warmup": lambda done: min(1.0, 2 * done),
    "linear": lambda done: done,
    "constant": lambda done: 1.0,
}


def penalty(a: Tensor, kind: str) -> Tensor:
    """[...] of activations a [..., neurons], a >= 0: their sum (l1), or the square Hoyer (sum a)^2 / sum a^2.

    The square Hoyer is the number of neurons that are on, were all equally large: 1 to neurons, whatever the scale.
    """
    total = a.sum(-1)
    return total if kind == "l1" else total.square() / (a.square().sum(-1) + 1e-15)


def sparse_loss(student: Student, kind: str, weight: float, ramp: str, relu: bool) -> Callable[[Tensor, float], Tensor]:
    """task + weight * ramp * penalty / neurons, mean over tokens and FFNs, of what the gate (else up) activates.

    With relu that is the activation itself; else how far its input is above the floor. Projections, where the student
    has them, are averaged apart and count as much as the FFNs.
    """
    found: dict[bool, list[Tensor]] = {}

    def listen(is_ffn: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, z: Tensor) -> None:
            a = z.float().relu() if relu else z.float().clamp(min=FLOOR) - FLOOR
            found[is_ffn].append(penalty(a, kind).mean() / a.shape[-1])

        return hook

    for layer in student.layers():
        (layer.up if layer.gate is None else layer.gate).register_forward_hook(listen(layer.site == "ffn"))
        found[layer.site == "ffn"] = []

    def loss(windows: Tensor, done: float) -> Tensor:
        for kept in found.values():
            kept.clear()
        task = student.task_loss(windows)
        total = sum(torch.stack(kept).mean() for kept in found.values())
        return task + weight * RAMPS[ramp](done) * total

    return loss
