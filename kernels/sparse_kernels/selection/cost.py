"""Work of the selections."""


def list_bytes(batch: int, channels: int, itemsize: int = 2) -> int:
    """Bytes of the scores or of the mask that a selection without weights must read."""
    return batch * channels * itemsize


def score_flops(batch: int, width: int, experts: int) -> int:
    """Multiplications and additions of one layer of a router."""
    return 2 * batch * width * experts


def score_bytes(batch: int, width: int, experts: int, itemsize: int = 2) -> int:
    """Bytes that one layer of a router must read: its weights and its input, once."""
    return (experts + batch) * width * itemsize


def predictor_flops(batch: int, width: int, rank: int, neurons: int) -> int:
    """Multiplications and additions of both layers of a low-rank predictor."""
    return score_flops(batch, width, rank) + score_flops(batch, rank, neurons)


def predictor_bytes(batch: int, width: int, rank: int, neurons: int, itemsize: int = 2) -> int:
    """Bytes that both layers of a low-rank predictor must read."""
    return score_bytes(batch, width, rank, itemsize) + score_bytes(batch, rank, neurons, itemsize)
