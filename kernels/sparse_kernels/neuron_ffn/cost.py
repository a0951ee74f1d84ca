"""Work of feed-forward networks that skip neurons; density is the share of the neurons that are computed."""


def ffn_flops(batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0) -> float:
    """Multiplications and additions of the matrices; density is that of the list, which every row computes."""
    return 2 * batch * density * neurons * ((1 + gated) * width + out)


def ffn_bytes(
    batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0, itemsize: int = 2
) -> float:
    """Bytes that must be read: the listed neurons' weights and x, once."""
    return (density * neurons * ((1 + gated) * width + out) + batch * width) * itemsize


def gate_first_flops(batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0) -> float:
    """Those of the first matrix for all neurons and of the others for the survivors."""
    return 2 * batch * neurons * (width + density * (gated * width + out))


def gate_first_bytes(
    batch: int, width: int, out: int, neurons: int, gated: bool = True, density: float = 1.0, itemsize: int = 2
) -> float:
    """Bytes that must be read: the first matrix, the others' rows of the survivors, and x, once."""
    return (neurons * (width + density * (gated * width + out)) + batch * width) * itemsize
