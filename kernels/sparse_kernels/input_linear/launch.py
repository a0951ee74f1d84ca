"""How the input-sparse linear layers are launched. Does not import triton."""

from typing import Generic, NamedTuple, TypeVar

import torch

from sparse_kernels.launch import (
    Launch,
    Rows,
    crowded,
    interpreting,
    multiprocessors,
    padded_batch,
    pick,
    power_of_2,
    row_bytes,
)

NARROW = 8192  # outputs below which the grid needs narrow tiles to fill the GPU without many splits
STATS_TILE = 64  # columns of a tile of statistics, and of the kernel that adds partials


# By architecture (90: Hopper), then batch padded to a tile and whether the output is narrow.
LAUNCH: dict[int, dict[tuple[int, bool], Launch]] = {
    90: {
        (1, True): Launch(rows=4, columns=1024, warps=4, stages=4, programs=2),
        (1, False): Launch(rows=4, columns=1024, warps=4, stages=4, programs=2),
        (16, True): Launch(rows=32, columns=256, warps=4, stages=6, programs=2),
        (16, False): Launch(rows=32, columns=256, warps=4, stages=6, programs=2),
        (32, True): Launch(rows=32, columns=128, warps=4, stages=6, programs=3),
        (32, False): Launch(rows=32, columns=128, warps=4, stages=6, programs=3),
        (64, True): Launch(rows=32, columns=128, warps=4, stages=4, programs=2),
        (64, False): Launch(rows=32, columns=128, warps=4, stages=4, programs=2),
    }
}


REGISTERS = 65536  # of a multiprocessor


def beside(config: Launch) -> int:
    """Registers of a thread, so that all programs of a kernel fit on the multiprocessors beside those of the kernel
    before: of a kernel that starts early, the rest would crowd where the first of them finish."""
    return min(255, REGISTERS // (2 * config.programs * 32 * config.warps))


class Masked(NamedTuple):
    """How the kernel without a list is launched, and where.

    channels: of a program; rows: of them, asked for at once; columns, warps: of a program.
    fewest, most: weights of the layers it serves: fewer do not pay for its long code, more for its idle loads.
    """

    channels: int
    rows: int
    columns: int
    warps: int
    fewest: int
    most: int


# Measured for one row at half of the channels, with the sum of the parts: 512 x 1536 6.3 us against 5.7 with a list,
# 1024 x 1024 6.4 against 7.1, 4096 x 1024 7.4 against 9.0, 2048 x 2048 7.2 against 7.6, 4096 x 4096 10.7 against 9.7.
MASKED: dict[int, Masked] = {90: Masked(channels=64, rows=16, columns=1024, warps=4, fewest=2**20, most=2**22)}

# For one row of x and weights that are stored by output.
ROWS: dict[int, Rows] = {90: Rows(rows=4, warps=4, stages=4, programs=2)}
MAX_ROW_BYTES = 32768  # of a row of weights, padded to a power of two: the vector it meets is kept in registers

C = TypeVar("C")


class Grid(NamedTuple, Generic[C]):
    """config: the launch; columns: of a tile; tiles: of all segments together; splits: shares of the channels."""

    config: C
    columns: int
    tiles: int
    splits: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def grid_for(
    batch: int, channels: int, widths: list[int], device: torch.device, config: Launch | None = None
) -> Grid[Launch]:
    """The grid of one call; on a CPU, where the definition runs, one tile and one split."""
    padded = padded_batch(batch)
    config = config or pick(LAUNCH, device)[padded, sum(widths) < NARROW]
    if device.type == "cpu" and not interpreting():
        return Grid(config, power_of_2(sum(widths)), 1, 1)
    columns = max(16, min(config.columns, power_of_2(max(widths))))
    tiles = sum(cdiv(w, columns) for w in widths)
    splits = max(1, min(config.programs * multiprocessors(device) // tiles, cdiv(channels, config.rows)))
    return Grid(config, columns, tiles, splits)


def share(channels: int, splits: int) -> int:
    """Slots of a split's list: its share of the channels, dealt in blocks of 8, to a power of two."""
    return power_of_2(8 * cdiv(cdiv(channels, 8), splits))


def masked_grid(channels: int, widths: list[int], device: torch.device, config: Masked | None = None) -> Grid[Masked]:
    """The grid of one call without a list; on a CPU as `grid_for`."""
    config = config or pick(MASKED, device)
    if device.type == "cpu" and not interpreting():
        return Grid(config, power_of_2(sum(widths)), 1, 1)
    columns = max(16, min(config.columns, power_of_2(max(widths))))
    return Grid(config, columns, sum(cdiv(w, columns) for w in widths), cdiv(channels, config.channels))


# Above this share of the channels a batch streams weights no faster than cuBLAS (measured at batch 2 to 16).
CROSSOVER = 0.6


def by_output(weight_t: torch.Tensor) -> bool:
    """Whether weight_t [K, N] is a transposed view of weights that are stored one row per output."""
    return weight_t.shape[1] > 1 and weight_t.stride(1) != 1


def path_for(
    select: str, x: torch.Tensor, weight_t: torch.Tensor, limited: bool, density: float | None, side: bool
) -> str:
    """Which kernels serve a call of `threshold_linear`: "dense", "rows", "masked", "threshold" (a list) or "all".

    limited: it has a threshold. side: it has a low-rank path, which the kernels without a list do not know.
    """
    batch, channels = x.shape[-2], weight_t.shape[0]
    if by_output(weight_t):
        fits = row_bytes(channels, weight_t.element_size()) <= MAX_ROW_BYTES
        whole = x.dim() == 2 or len(x) == 1  # every program would add up all parts
        return "rows" if batch == 1 and not side and fits and whole else "dense"
    if batch > 1 and (not limited or crowded(density, batch, CROSSOVER)):
        return "dense"
    table = pick(MASKED, weight_t.device)
    suits = table.fewest <= weight_t.numel() <= table.most
    if batch == 1 and not side and (select == "mask" or (select == "auto" and suits)):
        return "masked"
    return "threshold" if limited else "all"
