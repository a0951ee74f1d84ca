"""Operators that skip what a selection leaves out, for a few token rows at a time.

Each operator is a folder: `naive.py` is its definition in a few lines of torch, `kernel.py` the Triton kernel and
`op.py` the checked, registered operator. CUDA tensors run the kernels; CPU tensors run the definitions.
"""

from sparse_kernels.bandwidth import read_bandwidth
from sparse_kernels.expert_ffn.op import ACTIVATIONS, expert_ffn, expert_hidden
from sparse_kernels.input_linear.op import input_linear
from sparse_kernels.selection.op import compact

__all__ = ["ACTIVATIONS", "compact", "expert_ffn", "expert_hidden", "input_linear", "read_bandwidth"]
