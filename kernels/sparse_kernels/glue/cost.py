"""Bytes that the glue of a decode step must read; its operations are not counted."""


def norm_bytes(batch: int, width: int, itemsize: int = 2, residual: bool = True, parts: int = 0) -> int:
    """x (or `parts` float32 parts of it), the residual stream and the weights of the norm."""
    x = batch * width * (4 * parts or itemsize)
    return x + (batch * residual + 1) * width * itemsize


def glu_bytes(batch: int, neurons: int, gated: bool = True, itemsize: int = 2) -> int:
    """The gate, and up if there is one."""
    return batch * neurons * itemsize * (2 if gated else 1)
