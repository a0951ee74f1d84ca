"""Small random models of both layouts, for tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from methods.base import Data

VOCABULARY = 300


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,  # large enough that skipping work shows in the logits
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        init_std=0.1,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a dropped or doubled bias
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


MODELS = {"llama": llama, "opt": opt}


def windows(n: int, length: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def data() -> Data:
    return Data(windows(8, seed=1), lambda n: windows(n, seed=2), {"name": "random", "hash": "0"})
