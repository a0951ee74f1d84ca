"""A small random Llama, methods attached to it, and its decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from harness.decoder import Decoder
from methods import SparseModel, sparsify
from methods.registry import create

DENSITY = {"dense": None, "null": None, "teal": 0.5, "lte": 0.5}
CONTEXT, STEPS = 12, 100


def llama(**changes: int) -> PreTrainedModel:
    """Float32 on the CPU, in evaluation mode."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=300, max_position_embeddings=1024)
    torch.manual_seed(0)
    config: Any = LlamaConfig(**sizes | changes, initializer_range=0.1)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt(model: PreTrainedModel, batch: int = 1, length: int = CONTEXT) -> torch.Tensor:
    """Random tokens, int64 [batch, length]."""
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.device)


@contextmanager
def attached(model: PreTrainedModel, name: str) -> Iterator[SparseModel]:
    """The method of that name, sparse at every position of its sites."""
    artifact = create(name, {}).synthesize(model, DENSITY[name], prompt(model, 2, 32))
    with sparsify(model, artifact) as handle, handle.sparse():
        yield handle


def decoder(model: PreTrainedModel) -> Decoder:
    """After its prompt."""
    return Decoder(model, prompt(model), STEPS)
