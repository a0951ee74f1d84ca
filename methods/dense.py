"""The dense model itself: the row that every other row is compared with."""

from __future__ import annotations

from .base import Method


class Dense(Method):
    """Nothing is replaced and nothing is skipped."""

    name = "dense"
    summary = "the model as it is"
    densities = (None,)
    fidelity = "the baseline"
