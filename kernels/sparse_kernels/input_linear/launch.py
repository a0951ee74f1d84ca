"""How the input-sparse linear layers are launched. Does not import triton."""

from typing import NamedTuple

import torch

from sparse_kernels.launch import Launch, interpreting, multiprocessors, padded_batch, pick, power_of_2

NARROW = 8192  # outputs below which the grid needs narrow tiles to fill the GPU without many splits
STATS_TILE = 64  # columns of a tile of statistics, and of the kernel that adds partials


# By architecture (90: Hopper), then batch padded to a tile and whether the output is narrow.
LAUNCH: dict[int, dict[tuple[int, bool], Launch]] = {
    90: {
        (1, True): Launch(rows=32, columns=128, warps=4, stages=5, programs=2),
        (1, False): Launch(rows=4, columns=1024, warps=4, stages=5, programs=2),
        (16, True): Launch(rows=32, columns=256, warps=4, stages=6, programs=2),
        (16, False): Launch(rows=32, columns=256, warps=4, stages=6, programs=2),
        (32, True): Launch(rows=32, columns=128, warps=4, stages=6, programs=3),
        (32, False): Launch(rows=32, columns=128, warps=4, stages=6, programs=3),
        (64, True): Launch(rows=32, columns=128, warps=4, stages=4, programs=2),
        (64, False): Launch(rows=32, columns=128, warps=4, stages=4, programs=2),
    }
}


class Grid(NamedTuple):
    """config: the launch; columns: of a tile; tiles: of all segments together; splits: shares of the channels."""

    config: Launch
    columns: int
    tiles: int
    splits: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def grid_for(batch: int, channels: int, widths: list[int], device: torch.device, config: Launch | None = None) -> Grid:
    """The grid of one call; on a CPU, where the definition runs, one tile and one split."""
    padded = padded_batch(batch)
    config = config or pick(LAUNCH, device)[padded, sum(widths) < NARROW]
    if device.type == "cpu" and not interpreting():
        return Grid(config, power_of_2(sum(widths)), 1, 1)
    columns = max(16, min(config.columns, power_of_2(max(widths))))
    tiles = sum(cdiv(w, columns) for w in widths)
    splits = max(1, min(config.programs * multiprocessors(device) // tiles, cdiv(channels, config.rows)))
    return Grid(config, columns, tiles, splits)


# Above this share of the channels a batch streams weights no faster than cuBLAS (measured at batch 2 to 16).
CROSSOVER = 0.6


def union(density: float, batch: int) -> float:
    """The expected share of channels that any of `batch` independent rows keeps."""
    return 1 - (1 - density) ** batch
