"""What input-sparse linear layers cost, as functions of shapes and of the channels that are read."""


def linear_flops(kept: float, outputs: int, batch: int) -> float:
    """2 per multiply-add of `batch` rows that keep `kept` channels each, at `outputs` outputs."""
    return 2 * batch * kept * outputs


def linear_bytes(read: float, outputs: int, itemsize: int) -> float:
    """Weight bytes that must be read: `read` channels (a batch: those any row keeps) of `outputs` outputs each.

    The vectors and the lists, tens of kilobytes, are made and used within the step and stay on chip.
    """
    return read * outputs * itemsize
