"""Operators that skip what a selection leaves out, for a few token rows at a time.

Each operator is a folder: `naive.py` is its definition in a few lines of torch, `kernel.py` the Triton kernel and
`op.py` the checked, registered operator. CUDA tensors run the kernels; CPU tensors run the definitions.
"""

from sparse_kernels.activations import ACTIVATIONS
from sparse_kernels.attention.op import attention_decode, rope_cache_write, rotary_table, token_attention
from sparse_kernels.bandwidth import read_bandwidth
from sparse_kernels.expert_ffn.op import expert_ffn, expert_ffn_prefill, expert_hidden
from sparse_kernels.glue.op import glu, residual_norm
from sparse_kernels.input_linear.op import add_parts, input_linear, row_stats, threshold_linear
from sparse_kernels.neuron_ffn.op import gate_first_ffn, gated_ffn, neuron_ffn
from sparse_kernels.selection.op import (
    compact,
    gaussian_multiplier,
    statistical_top_k,
    to_index,
    to_mask,
    top_k,
    top_mask,
    union,
    union_lists,
)
from sparse_kernels.selection.router import batch_score, linear_router, low_rank_predictor, router_scores
from sparse_kernels.spark_attention.op import spark_attention_decode, spark_attention_multipliers

__all__ = [
    "ACTIVATIONS",
    "add_parts",
    "attention_decode",
    "batch_score",
    "compact",
    "expert_ffn",
    "expert_ffn_prefill",
    "expert_hidden",
    "gate_first_ffn",
    "gated_ffn",
    "gaussian_multiplier",
    "glu",
    "input_linear",
    "linear_router",
    "low_rank_predictor",
    "neuron_ffn",
    "read_bandwidth",
    "residual_norm",
    "rope_cache_write",
    "rotary_table",
    "router_scores",
    "row_stats",
    "spark_attention_decode",
    "spark_attention_multipliers",
    "statistical_top_k",
    "threshold_linear",
    "to_index",
    "to_mask",
    "token_attention",
    "top_k",
    "top_mask",
    "union",
    "union_lists",
]
