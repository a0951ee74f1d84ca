"""How the kernels of Spark attention are launched, per GPU architecture."""

from dataclasses import dataclass

from sparse_kernels.launch import power_of_2


@dataclass(frozen=True)
class Pass:
    """How one pass over the cache is launched.

    keys: positions a program takes per step if a head has 128 channels, else in proportion; a quarter in float32.
    warps, stages: warps per program and depth of the software pipeline.
    programs: programs per multiprocessor that the splits of the cache aim at.
    """

    keys: int
    warps: int
    stages: int
    programs: int

    def fit(self, dim: int, itemsize: int) -> int:
        """Positions per step, for heads of so many channels."""
        keys = self.keys * 128 // power_of_2(dim) // (4 if itemsize == 4 else 1)
        return max(16, min(keys, self.keys))

    def splits(self, pairs: int, positions: int, least: int, multiprocessors: int) -> int:
        """Parts, of `least` positions at the least, that the cache of each of so many KV groups is split in."""
        return max(1, min(MAX_SPLITS, -(-positions // least), self.programs * multiprocessors // pairs))


@dataclass(frozen=True)
class Attend:
    """score: scores and their statistics; rest: the attended tokens."""

    score: Pass
    rest: Pass


LAUNCH: dict[int, Attend] = {90: Attend(score=Pass(128, 4, 3, 4), rest=Pass(16, 2, 4, 8))}
MAX_SPLITS = 64
FUSED_SPLITS = 32  # the last program of a group to finish adds so many splits; more take a second, wider kernel
LISTED = 4096  # scores that a program compares per step
