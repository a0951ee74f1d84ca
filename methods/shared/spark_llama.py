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
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb, repeat_kv

from sparse_kernels import gaussian_multiplier, spark_attention_decode, spark_attention_multipliers
from sparse_kernels.layers import SparseLayer
from sparse_kernels.meter import Meter, Phase
from sparse_kernels.selection.naive import wide
from sparse_kernels.spark_attention.cost import share as read_share
from sparse_kernels.spark_attention.naive import attended_to, multipliers, scores, spark_attention

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
        q, k, v = self.project(hidden_states, position_embeddings, cache, kwargs)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        arguments = q, k, v, visible_tokens(q, k, attention_mask), self.attended
        if (
            q.requires_grad
        ):  # scores of every pair of tokens are computed again rather than kept: 40 GB in a batch of 256
            mixed: Any = checkpoint(spark_attention, *arguments, use_reentrant=False)
        else:
            mixed = spark_attention(*arguments)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def project(
        self, hidden: Tensor, embeddings: tuple[Tensor, Tensor], cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query [B, Hq, T, d], and keys and values [B, Hkv, S, d], those of the cache before this pass's."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (m(hidden).view(shape).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (halved(t) for t in embeddings)
        rotated = [apply_rotary_pos_emb(a, b, cos, sin) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)]
        q, k = (torch.cat(parts, -1) for parts in zip(*rotated, strict=True))
        cache = kwargs.get("past_key_values") if cache is None else cache  # as older versions of transformers call it
        return (q, *cache.update(k, v, self.layer_idx, kwargs=kwargs)) if cache is not None else (q, k, v)


def halved(embedding: Tensor) -> Tensor:
    """The cosines or sines [..., d] of rotation over d channels, for d / 2 channels: every other frequency."""
    half = embedding[..., : embedding.shape[-1] // 2 : 2]
    return torch.cat((half, half), -1)


def visible_tokens(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """bool [..., T, S] from transformers' mask, which says so or adds to scores. It leaves it out for a prompt, which
    sees itself up to the present, and for a single token that sees everything."""
    if mask is None:
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return ones if q.shape[2] == 1 else ones.tril()
    return (mask if mask.dtype == torch.bool else mask >= 0)[..., : k.shape[2]]


class SparkAttentionLayer(SparseLayer):
    """A model's `SparkAttention`, same output: decode steps read of the cache only what they attend to.

    The meter gets the share of the cache that a token reads: half of the keys, and of the tokens that any query head of
    a KV group attends to the rest, mean over the groups. Of tokens that see more than they may attend to it also gets
    how many these are, as "attended".
    """

    attends = True

    def __init__(self, module: SparkAttention, layer: int, phase: Phase, meter: Meter) -> None:
        super().__init__("attention", layer, phase, meter)
        self.module = module
        self.multipliers: dict[int, Tensor] = {}  # by length of the cache; a captured step keeps reading its own

    @property
    def units(self) -> int:
        return 1

    def linears(self) -> dict[str, nn.Linear]:
        return {}

    def materialize(self) -> None:
        pass

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        module = self.module
        q, k, v = module.project(hidden_states, position_embeddings, cache, kwargs)
        visible = visible_tokens(q, k, attention_mask)
        if hidden_states.shape[1] == 1 and self.fast(hidden_states):
            mixed = self.step(q, k, v, visible)
        else:
            self.count_share(q, k, visible)
            every = [repeat_kv(t, module.num_key_value_groups) for t in (k, v)]
            mixed = spark_attention(q, every[0], every[1], visible, module.attended)
        return module.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def step(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """[B, Hq, 1, d] of one token per sequence, by the kernels."""
        shown, positions = visible.reshape(-1, visible.shape[-1]), k.shape[2]
        if positions not in self.multipliers:
            self.multipliers[positions] = spark_attention_multipliers(self.module.attended, positions, k.device)
        return spark_attention_decode(q[:, :, 0], k, v, shown, self.multipliers[positions]).unsqueeze(2)

    def attended(self, density: float, seen: range) -> float:
        """By tokens, whose number does not grow with the context as a share would have it: as many as the heads of a
        group were counted to attend to together where they had to choose, else as many as one head may."""
        most, counted = self.module.attended, self.meter.counts.get(("attended", self.layer))
        beyond = torch.cat(counted).double() if counted else torch.empty(0)
        tokens = float(beyond.mean()) if beyond.numel() else most
        return read_share(sum(n if n <= most else min(n, tokens) for n in seen) / max(1, sum(seen)))

    def count_share(self, q: Tensor, k: Tensor, visible: Tensor) -> None:
        active = self.phase.active
        if not self.meter.enabled or active is False:
            return
        half, groups, shown = self.module.head_dim // 2, k.shape[1], visible.expand(len(q), 1, -1, -1)
        a = scores(q[..., :half], repeat_kv(k, self.module.num_key_value_groups)[..., :half])
        seen = shown.sum(-1, keepdim=True)
        keep = attended_to(a, shown, multipliers(self.module.attended, seen)).unflatten(1, (groups, -1)).any(2)
        tokens, seen = keep.sum(-1).float().mean(1), seen[:, 0, :, 0]  # [B, T]
        counted = active if isinstance(active, Tensor) else torch.ones_like(tokens, dtype=torch.bool)
        self.meter.counts[self.site, self.layer].append(read_share(tokens / seen)[counted].cpu())
        self.meter.counts["attended", self.layer].append(tokens[counted & (seen > self.module.attended)].cpu())


class SparkLlamaForCausalLM(LlamaForCausalLM):
    """A folder may hold its matrices in 8 bits (`save_eight_bit`); `from_pretrained` reads either kind."""

    config: SparkLlamaConfig
    config_class = SparkLlamaConfig
    # Its own attention takes the masks made for SDPA; those for flash and flex attention are of other kinds.
    _supports_flash_attn = _supports_flex_attn = False
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
