"""How the selection kernels are launched, per GPU architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scan:
    """How a kernel that writes index lists is launched.

    block: elements a program takes per step, all rows of its channels counted.
    warps: warps per program; fewer where it has less than PER_WARP elements for each.
    """

    block: int
    warps: int

    def warps_for(self, elements: int) -> int:
        return max(1, min(self.warps, elements // PER_WARP))


@dataclass(frozen=True)
class Score:
    """How a layer of a router or predictor is launched.

    elements: weights a program takes per step.
    columns: input channels it takes per step, at most; one row of input takes all of them at once where they fit.
    warps, stages: warps per program and depth of the software pipeline.
    """

    elements: int
    columns: int
    warps: int
    stages: int


PER_WARP = 256

# "list": lists of rows; "mark": what is active in any of several; the others: a program per row, which "top" keeps in
# registers if it has at most `block` channels.
LAUNCH = {
    90: {
        "list": Scan(block=256, warps=8),
        "mark": Scan(block=2048, warps=4),
        "mask": Scan(block=4096, warps=16),
        "top": Scan(block=16384, warps=8),
        "statistics": Scan(block=16384, warps=16),
        "near best": Scan(block=4096, warps=8),
    }
}

# Keyed by the batch padded to what the matrix units take (`padded_batch`; 1, and 2 for few rows, without them) and by
# whether experts are many: few do not fill the GPU, so that a program is better off with more columns of fewer experts.
SCORE = {
    90: {
        (1, False): Score(elements=16384, columns=16384, warps=8, stages=1),
        (1, True): Score(elements=16384, columns=16384, warps=8, stages=1),
        (2, False): Score(elements=2048, columns=512, warps=4, stages=3),
        (16, False): Score(elements=8192, columns=512, warps=4, stages=3),
        (16, True): Score(elements=4096, columns=128, warps=4, stages=3),
        (32, False): Score(elements=8192, columns=512, warps=4, stages=3),
        (32, True): Score(elements=4096, columns=128, warps=4, stages=3),
        (64, False): Score(elements=4096, columns=256, warps=4, stages=4),
        (64, True): Score(elements=4096, columns=128, warps=4, stages=3),
    }
}
MANY = 2048  # experts
# Rows up to which scores of not so many experts are multiplied without matrix units: 344 experts of width 4096, 2, 4
# and 8 rows 3.8, 4.3 and 4.5 us, 7.2 with them; 1024 experts 4.8, 5.4, 6.3 and 7.0; 16 rows of 344 11.4 and 7.1; two
# rows of 11008 experts of width 1024 10.3 and 7.7.
FEW = 8
LISTED_AT_ONCE = 8192  # channels up to which one program lists the largest faster than many do by a mask
BATCH_BLOCK = 128  # units whose scores a program adds over a batch
