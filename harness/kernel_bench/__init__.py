"""The kernel benchmark: what is timed (one module per family of operators), how, and how it is shown.

This file names the operators without importing torch.
"""

# Operator -> the module here that lists its cases, in the order of the table.
OPERATORS = {
    "input_linear": "input_linear",
    "threshold_linear": "input_linear",
    "neuron_ffn": "ffn",
    "gate_first_ffn": "ffn",
    "gated_ffn": "ffn",
    "expert_ffn": "ffn",
    "attention_decode": "attention",
    "spark_attention_decode": "attention",
    "compact": "selection",
    "top_k": "selection",
    "statistical_top_k": "selection",
    "linear_router": "selection",
    "low_rank_predictor": "selection",
    "residual_norm": "glue",
    "glu": "glue",
    "rotary_table": "attention",
    "rope_cache_write": "attention",
    "token_attention": "attention",
    "chain": "chain",
}
