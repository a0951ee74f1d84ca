"""Cells without latency, shared out among processes that append to the same records.

Small models leave a GPU idle between their kernels, so several processes get more done on it than one. Times would then
mean nothing: timed cells have the machine to themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from time import monotonic

from methods.errors import UsageError

from .cells import measure as one_by_one
from .plan import BASELINES, Cell


def shares(cells: Sequence[Cell]) -> list[list[Cell]]:
    """What one process measures: the cells of a model, a seed and a method, which share its preparation. The largest
    first, so that none is left for the end."""
    together: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        method = BASELINES[0] if cell.method in BASELINES else cell.method
        key = cell.model, cell.weights, cell.seed, method, tuple(cell.options.items())
        together.setdefault(key, []).append(cell)
    return sorted(together.values(), key=len, reverse=True)


def measure(cells: Sequence[Cell], out: str, source: str, here: str, workers: int) -> int:
    """Appends a record for every cell to the folder `out`; returns how many failed."""
    work, start, done, failed = shares(cells), monotonic(), 0, 0
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(min(workers, max(1, len(work))), mp_context=spawn) as pool:
        futures = {pool.submit(_work, share, out, source, here, threads): share for share in work}
        try:
            for future in as_completed(futures):
                share, lost = futures[future], future.result()
                done, failed = done + len(share), failed + len(lost)
                left = (monotonic() - start) / done * (len(cells) - done)
                first = f"{share[0].method} on {share[0].model}, seed {share[0].seed}"
                print(f"[{done}/{len(cells)}] {first}: {len(share)} cells, about {left:.0f} s left", file=sys.stderr)
                for text in lost:
                    print(f"  {text}", file=sys.stderr)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # what it has finished is in the records
            if isinstance(error, BrokenProcessPool):
                raise UsageError(
                    "a process ended without an answer, most likely for lack of memory: the same command goes on, with "
                    "fewer --workers."
                ) from error
            raise
    return failed


def _work(cells: list[Cell], out: str, source: str, here: str, threads: int) -> list[str]:
    """In a process of its own: what failed, in words."""
    import torch

    from . import machine, store

    torch.set_num_threads(threads)
    lost = []
    try:
        for cell, record in zip(cells, one_by_one(cells, source, here, quiet=True), strict=True):
            store.append(out, record)
            if record["status"] == "failed":
                lost.append(f"{cell.label} failed: {record['error']}")
    except machine.DeviceLost as ended:
        lost.append(str(ended))
    return lost
