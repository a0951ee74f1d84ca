"""Dense baselines with weights in 8 bits: they read as few bytes as a bfloat16 model at half density.

The linear layers of the decoder blocks are quantised per output channel by torchao, an optional library; embeddings and
lm_head stay as they are, as they do for every method. Beside a speed-up, never its denominator: accuracy is not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from methods.families import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARY = "torchao"
CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def library() -> str | None:
    """Name and version of what quantises, None where it is not installed."""
    try:
        return f"{LIBRARY} {version(LIBRARY)}"
    except PackageNotFoundError:
        return None


@contextmanager
def in_8_bits(model: PreTrainedModel, kind: str) -> Iterator[list[Any]]:
    """Within: the blocks' linear layers have weights of 8 bits; yields those, which captured graphs go on reading.

    kind: int8 or fp8. Afterwards the model has its own parameters again.
    """
    from torchao import quantization

    linears: list[Any] = [linear for block in blocks(model) for linear in block.linears.values()]
    own, chosen = [linear.weight for linear in linears], set(linears)
    # Without the global settings of Inductor: they would change the other baselines too.
    config = getattr(quantization, CONFIGS[kind])(set_inductor_config=False)
    try:
        quantization.quantize_(model, config, filter_fn=lambda module, name: module in chosen)
        with torch.no_grad():
            yield [linear.weight for linear in linears]
    finally:
        for linear, weight in zip(linears, own, strict=True):
            linear.weight = weight
