"""Work of decode attention and of the cache write; density is the kept share of the KV groups."""


def attention_flops(batch: int, heads: int, positions: int, dim: int, density: float = 1.0) -> float:
    """Multiplications and additions of the scores and of the weighted values of `heads` query heads."""
    return 4 * batch * heads * positions * dim * density


def attention_bytes(
    batch: int, groups: int, positions: int, dim: int, itemsize: int = 2, density: float = 1.0
) -> float:
    """Bytes of the cache that must be read: K and V of the valid positions of the kept groups."""
    return 2 * batch * groups * positions * dim * itemsize * density


def rotary_bytes(batch: int, dim: int, itemsize: int = 2) -> int:
    """Bytes of the frequencies, and of both tables written."""
    return 4 * dim // 2 + 2 * batch * dim * itemsize


def rope_bytes(batch: int, heads: int, groups: int, dim: int, itemsize: int = 2) -> int:
    """Bytes of q, k and v of one token per sequence, read once."""
    return batch * (heads + 2 * groups) * dim * itemsize
