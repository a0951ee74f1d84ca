"""A Llama with Spark FFNs and Spark attention, to be trained from scratch (arXiv 2506.06644).

Both are built in: the model computes its own statistical top-k, densely, wherever it runs. `register()` makes
transformers' Auto classes know it. Spark-style: the paper's scaling of attention scores and its treatment of grouped
heads are not published; here both halves are scaled by their own width, and every query head has its own statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb, repeat_kv

from sparse_kernels import gaussian_multiplier
from sparse_kernels.selection.naive import wide

from .experts import dequantise, quantise

WEIGHTS = "model.safetensors"


@strict
class SparkLlamaConfig(LlamaConfig):
    """ffn_density: share of the FFN's neurons that go on; ffn_split: input channels that predict them (0: half);
    attended: tokens that a query attends to (0: all of them, by ordinary attention)."""

    model_type = "spark_llama"
    hidden_act: str = "gelu_pytorch_tanh"
    ffn_density: float = 0.08
    ffn_split: int = 0
    attended: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        self.ffn_split = self.ffn_split or self.hidden_size // 2
        super().__post_init__(**kwargs)


class SparkMLP(LlamaMLP):
    """y = down(act(top(gate(x[..., :r]))) * up(x[..., r:])): a gated FFN whose gate reads the first r channels.

    top(u) = max(u - mean - deviation * Q(1 - density), 0), statistics of the token's own u in float32; gradients flow
    through them. As many weights as an ungated FFN of the same width.
    """

    def __init__(self, config: SparkLlamaConfig) -> None:
        super().__init__(config)
        self.split = config.ffn_split
        self.gate_proj = nn.Linear(self.split, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size - self.split, self.intermediate_size, bias=False)
        self.multiplier = gaussian_multiplier(config.ffn_density)

    def forward(self, x: Tensor) -> Tensor:
        u = wide(self.gate_proj(x[..., : self.split]))
        variance, mean = torch.var_mean(u, -1, correction=0, keepdim=True)
        # The added constant is far below any variance, and keeps the gradient finite for a token of zeros (padding).
        value = self.act_fn(F.relu(u - mean - (variance + 1e-12).sqrt() * self.multiplier)).to(x.dtype)
        return self.down_proj(value * self.up_proj(x[..., self.split :]))


class SparkAttention(LlamaAttention):
    """o = sum_i softmax(top_k(a))_i softplus(b_i) v_i, a = q1 k1 / sqrt(r), b = q2 k2 / sqrt(d - r), r = d / 2.

    top_k keeps the visible tokens with a at least mean + deviation * Q(1 - k / m) of the m visible ones, all of them
    while m <= k, and always the best. Both halves are rotated, by their own frequencies.
    """

    attended: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = (halved(t) for t in position_embeddings)
        rotated = [apply_rotary_pos_emb(a, b, cos, sin) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)]
        q, k = (torch.cat(parts, -1) for parts in zip(*rotated, strict=True))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        if attention_mask is None:
            ahead = k.shape[2] - q.shape[2]
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(ahead)
        else:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
            visible = visible[..., : k.shape[2]]
        mixed = spark_attention(q, k, v, visible, self.attended)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


def halved(embedding: Tensor) -> Tensor:
    """The cosines or sines [..., d] of rotation over d channels, for d / 2 channels: every other frequency."""
    half = embedding[..., : embedding.shape[-1] // 2 : 2]
    return torch.cat((half, half), -1)


def spark_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, attended: int) -> Tensor:
    """q [B, H, T, d], k, v [B, H, S, d], visible bool [..., T, S] of at least one token each: [B, H, T, d]."""
    half = q.shape[-1] // 2
    a = (q[..., :half] @ k[..., :half].transpose(2, 3)).float() * half**-0.5
    gate = F.softplus((q[..., half:] @ k[..., half:].transpose(2, 3)).float() * half**-0.5)
    keep = attended_to(a, visible, attended)
    p = a.masked_fill(~keep, torch.finfo(a.dtype).min).softmax(-1)
    return (p * gate).to(v.dtype) @ v


@torch.no_grad()
def attended_to(a: Tensor, visible: Tensor, attended: int) -> Tensor:
    """bool [..., T, S]: the visible tokens that the statistics of the visible scores a [..., T, S] let through."""
    seen = visible.sum(-1, keepdim=True)
    mean = a.masked_fill(~visible, 0).sum(-1, keepdim=True) / seen
    deviation = ((a - mean).square().masked_fill(~visible, 0).sum(-1, keepdim=True) / seen).sqrt()
    multiplier = torch.special.ndtri((1 - attended / seen).clamp(min=1e-6))
    best = a.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    limit = torch.minimum(mean + deviation * multiplier, best)
    return visible & ((a >= limit) | (seen <= attended))


class SparkLlamaForCausalLM(LlamaForCausalLM):
    """A folder may hold its matrices in 8 bits (`save_eight_bit`); `from_pretrained` reads either kind."""

    config: SparkLlamaConfig
    config_class = SparkLlamaConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: SparkLlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SparkMLP(config)
            if config.attended:
                layer.self_attn.__class__ = SparkAttention
                layer.self_attn.attended = config.attended
        self.post_init()

    def save_eight_bit(self, folder: str | Path) -> None:
        """Matrices as int8 with a float32 scale a row, half the size of bfloat16; the rest in bfloat16."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():  # tied weights once
            if parameter.dim() == 2:
                state[f"delta.{name}"], state[f"scale.{name}"] = quantise(parameter)
            else:
                state[name] = parameter.detach().bfloat16()
        self.save_pretrained(folder, state_dict=state)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        stored = Path(str(source)) / WEIGHTS
        try:
            state = load_file(stored) if stored.is_file() else {}
        except SafetensorError:
            state = {}  # transformers says what is wrong with it
        if not any(name.startswith("delta.") for name in state):
            return super().from_pretrained(source, *args, config=config, **kwargs)
        names = [name.removeprefix("delta.") for name in state if not name.startswith("scale.")]
        full = {name: dequantise(state, name) if f"delta.{name}" in state else state[name] for name in names}
        config = config or SparkLlamaConfig.from_pretrained(source)
        return super().from_pretrained(None, *args, config=config, state_dict=full, **kwargs)


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know the architecture."""
    AutoConfig.register(SparkLlamaConfig.model_type, SparkLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SparkLlamaConfig, SparkLlamaForCausalLM, exist_ok=True)
