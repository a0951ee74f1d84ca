"""Where things are in a decoder block, as data: one entry per layout, one line per model type."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Module paths. `ffn` names the modules that together form the FFN: a replacement takes the first one's place,
    the rest become identities (OPT computes its FFN inline from three modules, Llama in one)."""

    layers: str
    linears: dict[str, str]
    ffn: tuple[str, ...]
    activation: str  # the config attribute that names the activation
    norms: tuple[str, str] | None = None  # before attention and before the FFN; None where the runtime has no block
    after: tuple[str, str] | None = None  # norms of what attention and the FFN add to the residual stream
    last_norm: str = "model.norm"  # of what the last block leaves
    gemma_norms: bool = False  # norms multiply by 1 + weight
    scaled_query: bool = False  # the query is scaled, and rounded, before it meets the keys
    decode_mask: bool = False  # a decode step needs an explicit attention mask to stay free of host reads
    own_selection: bool = False  # the FFN selects its neurons itself: no FFN of another form can stand in for it


GATED = Layout(
    layers="model.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    ffn=("mlp",),
    activation="hidden_act",
    norms=("input_layernorm", "post_attention_layernorm"),
)

GEMMA = replace(GATED, gemma_norms=True)
GEMMA2 = replace(
    GEMMA,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)

# Statistical top-k in some or all of its FFNs, of which methods/spark.py knows more.
GEMMA3N = replace(GEMMA, norms=None, activation="hidden_activation", own_selection=True)
SPARK = replace(GATED, norms=None, own_selection=True)

OPT = Layout(
    layers="model.decoder.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    ffn=("fc1", "activation_fn", "fc2"),
    activation="activation_function",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    last_norm="model.decoder.final_layer_norm",
    scaled_query=True,
    decode_mask=True,
)

LAYOUTS: dict[str, Layout] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA, norms=None),
    "gemma3n_text": GEMMA3N,
    "gemma3n": replace(GEMMA3N, layers="model.language_model.layers"),
    "spark_llama": SPARK,
    "opt": OPT,
}

MAX_GROUP = 32  # query heads that share keys and values, in the kernels

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
}


@dataclass(frozen=True)
class Block:
    """One decoder block: its place in the model, its module and its linear layers by name (q, k, v, o, gate, ...)."""

    index: int
    path: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    layout: Layout


def layout_of(config: Any) -> Layout:
    """The layout for a transformers config. Raises UsageError for an architecture nobody has described yet."""
    try:
        return LAYOUTS[config.model_type]
    except KeyError:
        raise UsageError(
            f"no layout for architecture '{config.model_type}': add one line to methods/families.py, "
            f"or choose a model of type {', '.join(LAYOUTS)}."
        ) from None


def activation_of(config: Any) -> str:
    """The FFN activation as the kernels name it. Raises UsageError for an activation they do not have."""
    layout, config = layout_of(config), config.get_text_config()
    name = getattr(config, layout.activation, None) or getattr(config, "hidden_activation", None)
    if name not in ACTIVATION_NAMES:
        raise UsageError(f"activation '{name}' is not supported: choose a model with silu, gelu or relu.")
    return ACTIVATION_NAMES[name]


def is_relu(config: Any) -> bool:
    """Whether FFN neurons are often exactly zero. Raises UsageError for an activation the kernels do not have."""
    return activation_of(config).startswith("relu")


def blocks(model: PreTrainedModel) -> Iterator[Block]:
    """The decoder blocks of a transformers causal language model, first to last.

    A block that takes its keys and values from an earlier one (Gemma 3n) has no k and v.
    """
    layout = layout_of(model.config)
    for index, module in enumerate(model.get_submodule(layout.layers).children()):
        borrowed = ("k", "v") if getattr(module.get_submodule("self_attn"), "is_kv_shared_layer", False) else ()
        linears: Any = {n: module.get_submodule(path) for n, path in layout.linears.items() if n not in borrowed}
        yield Block(index, f"{layout.layers}.{index}", module, linears, layout)


PLACES = ("block_in", "attn_norm", "mlp_in")  # where a block's hidden state can be tapped, in the order of computation


def place_path(layout: Layout, place: str) -> str:
    """The module of a block, "" for itself, whose input is the hidden state at this place.

    block_in: the residual stream before attention; attn_norm: the same after attention's norm, what q, k and v read;
    mlp_in: the residual stream after attention.
    """
    assert layout.norms is not None and place in PLACES
    return {"block_in": "", "attn_norm": layout.linears["q"], "mlp_in": layout.norms[1]}[place]


def heads_of(config: Any) -> tuple[int, int]:
    """How many query heads and KV groups an attention layer has."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def windows_of(config: Any) -> list[int | None]:
    """By block, how many positions a token sees at most, its own included; None where it sees all before it."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def neurons_of(config: Any) -> int:
    """How many neurons an FFN has."""
    return getattr(config, "intermediate_size", None) or config.ffn_dim


def why_no_taps(method: str, config: Any) -> str | None:
    """One sentence when predictors cannot listen at `PLACES` in blocks of a model with this config."""
    layout = layout_of(config)
    if layout.norms is None or layout.after or getattr(config, "do_layer_norm_before", True) is False:
        return (
            f"{method} needs blocks with one norm before attention and one before the FFN, which {config.model_type} "
            "has not: choose a Llama, Mistral, Qwen or OPT model."
        )
    return None


def why_no_heads(method: str, config: Any) -> str | None:
    """One sentence when attention heads of a model with this config cannot be left out one group at a time."""
    heads, groups = heads_of(config)
    if heads % groups or heads > MAX_GROUP * groups:
        return (
            f"{method} keeps or drops KV groups whole, with 1 to {MAX_GROUP} query heads each: "
            f"{heads} heads cannot be grouped by {groups}: choose another model, or neurons alone, as lte does."
        )
    if groups == 1:
        return (
            f"{method} needs more than one KV group to choose from, this model has one for its {heads} heads: "
            "choose another model, or neurons alone, as lte does."
        )
    return None


def why_no_rank(method: str, config: Any, rank: int) -> str | None:
    """One sentence when two layers of this rank are more than the one matrix they stand for, else None."""
    if rank <= config.hidden_size:
        return None
    return (
        f"{method}:rank={rank} is above the {config.hidden_size} channels that a predictor reads: "
        f"choose rank={config.hidden_size} or less, or 0 for the published share."
    )


def groups_for(method: str, density: float, groups: int) -> int:
    """The published int(density x groups). Raises UsageError where that leaves none."""
    if reason := no_groups(method, density, groups):
        raise UsageError(reason)
    return min(_share(density, groups), groups)


def no_groups(method: str, density: float, groups: int) -> str | None:
    """One sentence where this share of the groups is none, else None."""
    if _share(density, groups):
        return None
    return (
        f"{method} cannot reach density {density:g} with {groups} KV groups, of which at least one runs: "
        f"choose --density {math.ceil(100 / groups) / 100:g} or more."
    )


def coarse(density: float, groups: int) -> list[str]:
    """A note where no whole number of groups is within 0.01 of the density."""
    k = _share(density, groups)
    if abs(k / groups - density) <= 0.01:
        return []
    return [
        f"{groups} KV groups allow densities in steps of {1 / groups:.3f}: {k} of them run, density {k / groups:.3f}"
    ]


def _share(density: float, groups: int) -> int:
    return math.floor(density * groups + 1e-9)  # 0.7 x 10 is 6.999...


def why_no_experts(method: str, config: Any, size: int) -> str | None:
    """One sentence when an FFN of this config cannot be split into experts of `size` neurons, else None."""
    try:
        activation_of(config)
    except UsageError as error:
        return str(error)
    if layout_of(config).own_selection:
        return f"{method} cannot replace the FFNs of {config.model_type}, which select their neurons themselves."
    width = neurons_of(config)
    if width % size == 0:
        return None
    fits = max(s for s in range(1, size + 1) if width % s == 0)
    return (
        f"{method} groups FFN neurons into experts of {size}, which does not divide this model's {width}: "
        f"choose --methods {method}:expert_size={fits}."
    )


def cached(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The keyword under which this version of transformers takes a KV cache; an unknown one it would ignore."""
    known = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}
