"""How the kernels of feed-forward networks are launched, per GPU architecture."""

import torch

from sparse_kernels.launch import Launch, Rows, pick, row_bytes

MAX_ROW_BYTES = 16384  # of a neuron's row that a program takes whole: what it keeps of x and of the sum are registers


# By what is computed and how many rows of a neuron that reads. "all": every neuron; "list": the listed ones; "first":
# the activations of all neurons; "survivors": the rest of the FFN for those above the threshold. With one stage a
# neuron's rows are loaded into registers before those of the one before are computed.
LAUNCH: dict[int, dict[tuple[str, int], Rows]] = {
    90: {
        ("all", 3): Rows(rows=1, warps=4, stages=4, programs=1),
        ("all", 2): Rows(rows=2, warps=8, stages=1, programs=2),
        ("list", 3): Rows(rows=2, warps=8, stages=1, programs=1),
        ("list", 2): Rows(rows=1, warps=8, stages=4, programs=2),
        ("first", 1): Rows(rows=2, warps=4, stages=4, programs=2),
        ("survivors", 2): Rows(rows=1, warps=4, stages=4, programs=2),
        ("survivors", 1): Rows(rows=2, warps=8, stages=4, programs=2),
    }
}
# Keyed by the batch padded to what the matrix units take, and by the neurons from which on the launch serves: a program
# takes as long for one neuron as for `rows` of them, so that all that a batch is likely to list should be with some
# program at once.
HIDDEN: dict[int, dict[int, dict[int, Launch]]] = {
    90: {
        1: {0: Launch(rows=4, columns=1024, warps=4, stages=2, programs=4)},
        16: {
            12288: Launch(rows=64, columns=128, warps=4, stages=3, programs=2),
            0: Launch(rows=32, columns=256, warps=4, stages=3, programs=2),
        },
        32: {0: Launch(rows=32, columns=128, warps=4, stages=4, programs=2)},
        64: {
            12288: Launch(rows=64, columns=128, warps=4, stages=3, programs=2),
            0: Launch(rows=32, columns=128, warps=4, stages=4, programs=2),
        },
    }
}


def hidden_launch(batch: int, neurons: int, device: torch.device) -> Launch:
    """How the hidden layer of so many neurons is launched for a padded batch."""
    table = pick(HIDDEN, device)[batch]
    return next(launch for least, launch in table.items() if neurons >= least)


def takes_rows(x: torch.Tensor, down_t: torch.Tensor) -> bool:
    """Whether the kernels that take whole rows serve this call: one row of x, rows short enough for registers."""
    return x.shape[0] == 1 and row_bytes(max(x.shape[1], down_t.shape[1]), x.element_size()) <= MAX_ROW_BYTES


def fused_launch(gated: bool, listed: bool, device: torch.device) -> Rows:
    """How `neuron_ffn` is launched for one row of x."""
    return pick(LAUNCH, device)["list" if listed else "all", 2 + gated]
