"""How the attention kernels are launched, per GPU architecture."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decode:
    """How one regime of decode attention is launched.

    keys: positions a program takes per step if a head has 128 channels, else in proportion; a quarter in float32.
    warps, stages: warps per program and depth of the software pipeline.
    programs: programs per multiprocessor that the splits of the cache aim at.
    """

    keys: int
    warps: int
    stages: int
    programs: int


# Keyed by `regime`. "heads": groups of a single query head (multi-head attention); "groups": of several.
LAUNCH: dict[int, dict[tuple[str, str], Decode]] = {
    90: {
        ("heads", "whole"): Decode(keys=128, warps=4, stages=2, programs=1),
        ("heads", "quarters"): Decode(keys=128, warps=4, stages=2, programs=2),
        ("heads", "sixteenths"): Decode(keys=128, warps=4, stages=2, programs=3),
        ("heads", "slivers"): Decode(keys=128, warps=4, stages=2, programs=3),
        ("groups", "whole"): Decode(keys=64, warps=4, stages=4, programs=1),
        ("groups", "quarters"): Decode(keys=64, warps=4, stages=4, programs=1),
        ("groups", "sixteenths"): Decode(keys=64, warps=4, stages=4, programs=1),
        ("groups", "slivers"): Decode(keys=64, warps=4, stages=4, programs=2),
    }
}
MAX_SPLITS = 128
FUSED_SPLITS = 32  # the last program of a group to finish merges so many splits; more take a second, wider kernel
ROPE_HEADS = 4  # heads per program of the rotation, one warp each
ROPE_PARTS = 64  # parts of a head that a program adds at once


def regime(pairs: int, group: int, multiprocessors: int) -> tuple[str, str]:
    """The regime of so many pairs of a sequence and a kept group of `group` query heads.

    Named after the part of a pair's cache that a multiprocessor takes, if each runs one program.
    """
    splits = multiprocessors // pairs
    part = "whole" if splits == 0 else "quarters" if splits <= 4 else "sixteenths" if splits <= 16 else "slivers"
    return "heads" if group == 1 else "groups", part


def one_launch(query: Tensor, key: Tensor) -> bool:
    """Whether `token_attention` serves these projections: one row, finished or of single heads.

    Every split adds the parts of its group's query and key, too many where a group has several heads.
    """
    finished = query.dim() == 3 or len(query) == 1
    return query.shape[-3] == 1 and (finished or query.shape[-2] == key.shape[-2])
