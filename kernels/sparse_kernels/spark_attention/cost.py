"""Work of Spark attention; density is the share of the visible tokens that are attended to."""

from typing import Any


def spark_attention_flops(batch: int, heads: int, positions: int, dim: int, density: float = 1.0) -> float:
    """Multiplications and additions: half of every key, and of the attended tokens the other half and the value."""
    return 4 * batch * heads * positions * dim * share(density)


def spark_attention_bytes(
    batch: int, groups: int, positions: int, dim: int, itemsize: int = 2, density: float = 1.0
) -> float:
    """Bytes of the cache that must be read; density is then that of a KV group, the union of its heads'."""
    return 2 * batch * groups * positions * dim * itemsize * share(density)


def share(density: Any) -> Any:
    """The part of all keys and values that is read, of a number or a tensor."""
    return 0.25 + 0.75 * density
