"""How the kernels of Spark attention are launched, per GPU architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attend:
    """keys: positions a program takes per step; tile: scores that the statistics take per step; warps: per program;
    programs: per multiprocessor that the splits of the cache aim at."""

    keys: int
    tile: int
    warps: int
    programs: int


LAUNCH: dict[int, Attend] = {90: Attend(keys=64, tile=4096, warps=4, programs=4)}
MAX_SPLITS = 64


def splits(pairs: int, positions: int, keys: int, programs: int) -> int:
    """Parts that the cache of each of so many pairs of a sequence and a query head is split in."""
    return max(1, min(MAX_SPLITS, -(-positions // keys), programs // pairs))
