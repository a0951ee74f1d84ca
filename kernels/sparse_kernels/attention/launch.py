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


# Keyed by `regime`; "token": `token_attention`, "token, parts": of projections that are left in several parts.
LAUNCH: dict[int, dict[str, Decode]] = {
    90: {
        "heads": Decode(keys=128, warps=4, stages=2, programs=1),
        "all": Decode(keys=64, warps=4, stages=4, programs=1),
        "kept": Decode(keys=64, warps=4, stages=5, programs=1),
        "kept, halves": Decode(keys=64, warps=4, stages=2, programs=4),
        "token": Decode(keys=128, warps=4, stages=2, programs=2),
        "token, parts": Decode(keys=64, warps=4, stages=3, programs=2),
    }
}
MAX_SPLITS = 128
FUSED_SPLITS = 32  # the last program of a group to finish merges so many splits; more take a second, wider kernel
ROPE_HEADS = 4  # heads per program of the rotation, one warp each
ROPE_PARTS = 64  # parts of a head that a program adds at once


def regime(pairs: int, group: int, listed: bool, multiprocessors: int) -> str:
    """The regime of so many pairs of a sequence and a KV group of `group` query heads, all groups or those in its list.

    "heads": more single heads than multiprocessors; "halves": where a multiprocessor that runs one program takes about
    half of a pair's cache.
    """
    splits = multiprocessors // pairs
    if splits == 0 and group == 1:
        return "heads"
    if not listed or splits == 0:
        return "all"
    return "kept, halves" if splits in (2, 3) else "kept"


def one_launch(query: Tensor, key: Tensor) -> bool:
    """Whether `token_attention` serves these projections: one row, finished or of single heads.

    Every split adds the parts of its group's query and key, too many where a group has several heads.
    """
    finished = query.dim() == 3 or len(query) == 1
    return query.shape[-3] == 1 and (finished or query.shape[-2] == key.shape[-2])
