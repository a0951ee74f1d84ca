"""Work of feed-forward networks on blocks of neurons; density is the share of the blocks a row computes."""

from sparse_kernels.launch import union_density
from sparse_kernels.neuron_ffn.cost import ffn_bytes, ffn_flops


def expert_flops(batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0) -> float:
    """Multiplications and additions of the rows' own blocks."""
    return ffn_flops(batch, width, out, neurons, gated, density)


def expert_bytes(
    batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0, itemsize: int = 2
) -> float:
    """Bytes that must be read: the union of the rows' blocks, were they chosen independently, and x, once."""
    return ffn_bytes(batch, width, out, neurons, gated, union_density(density, batch), itemsize)
