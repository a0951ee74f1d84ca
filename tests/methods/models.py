"""Small random models of both layouts, for tests."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

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


def opt(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = OPTConfig(
        **{
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
            "init_std": 0.1,
            "dropout": 0.0,
            **changes,
        }
    )
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a dropped or doubled bias
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def spark_llama(**changes: object) -> PreTrainedModel:
    from methods.shared.spark_llama import SparkLlamaConfig, SparkLlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, object] = {**llama().config.to_dict(), "intermediate_size": 192, "attended": 8, **changes}
    for name in ("model_type", "architectures", "hidden_act", "transformers_version"):
        fields.pop(name)
    return SparkLlamaForCausalLM(SparkLlamaConfig(**fields)).eval().requires_grad_(False)  # type: ignore[arg-type]


def gemma3n(sliding_window: int = 512) -> PreTrainedModel:
    """Statistical top-k in the first two of four layers; the last two take keys and values from earlier ones."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        num_kv_shared_layers=2,
        sliding_window=sliding_window,
        laurel_rank=8,
        altup_num_inputs=2,
        initializer_range=0.1,
    )
    return Gemma3nForCausalLM(config).eval().requires_grad_(False)


def gemma2(**changes: object) -> PreTrainedModel:
    """Four norms a block, capped attention scores, and a sliding window in every other layer."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
    sizes |= dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.1)
    # The other implementations ignore the caps in older versions of transformers.
    caps = dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=8, attn_implementation="eager")
    model = Gemma2ForCausalLM(Gemma2Config(**sizes | caps | changes))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "norm" in name:  # zero by default: all norms would be alike
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval().requires_grad_(False)


MODELS = {"llama": llama, "opt": opt}


def windows(n: int, length: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def data() -> Data:
    return Data(windows(8, seed=1), lambda n: windows(n, seed=2), {"name": "random", "hash": "0"})
