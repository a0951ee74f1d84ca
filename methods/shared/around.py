"""What takes the place of a decoder's forwards around its blocks while the decode runtime is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels import rotary_table

if TYPE_CHECKING:
    from ..runtime import Step

FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the sequence


def last_norm(module: Any, norm: Callable[[Tensor], Tensor], step: Step) -> Callable[[Tensor], Tensor]:
    """The forward of a norm that takes what the last block of a step left, in one launch: `norm` of [B, d]."""
    slow = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        return norm(hidden_states[:, 0])[:, None] if hidden_states is step.hidden else slow(hidden_states)

    return forward


def rotation(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a rotary embedding that makes the tables of one token per sequence in one launch."""
    slow = module.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 1:
            return slow(x, position_ids)
        cos, sin = rotary_table(position_ids[:, 0], module.inv_freq.float(), module.attention_scaling, x.dtype)
        return cos[:, None], sin[:, None]

    return forward


def unmasked(decoder: Any, serves: Callable[[Any, Any], bool], step: Step) -> Callable[..., Any]:
    """The forward of a decoder that builds no mask for a step whose blocks see from the cache what they attend to."""
    slow = decoder.forward
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=decoder.device)  # four dimensions: taken as it is

    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        # Without its positions an OPT counts them in the mask.
        told = tokens is not None and kwargs.get("position_ids") is not None
        if not step.mask and told and not args and serves(tokens, kwargs.get("cache", kwargs.get("past_key_values"))):
            kwargs["attention_mask"] = visible
        return slow(*args, **kwargs)

    return forward
