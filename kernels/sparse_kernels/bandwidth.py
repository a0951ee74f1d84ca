"""The read bandwidth this GPU reaches, the limit that decode kernels are compared with."""

import torch

from sparse_kernels.launch import require, run

ELEMENTS = 8192  # float32 values a program reads per step
STEPS = 8


def read_bandwidth(device: torch.device | str = "cuda", gib: float = 4, repeats: int = 20) -> float:
    """Best bandwidth of a plain streaming read, in bytes per second.

    device: a CUDA device. gib: GiB read per repeat (far more than the L2 cache holds). Waits for the device.
    Raises ValueError on any other device or where gib is less than one program reads.
    """
    device = torch.device(device)
    require(device.type == "cuda", "Read bandwidth is measured on a CUDA device, got {}.", device)
    programs = int(gib * 2**30) // (4 * ELEMENTS * STEPS)
    require(programs >= 1, "gib must be at least {}, got {}.", 4 * ELEMENTS * STEPS / 2**30, gib)
    with torch.cuda.device(device):
        data = torch.ones(programs * ELEMENTS * STEPS, dtype=torch.float32, device=device)
        sums = torch.empty(programs, dtype=torch.float32, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(repeats + 2):  # the first calls compile and warm up; they cannot be the best
            begin.record()
            stream_read(data, sums)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
    return data.numel() * data.element_size() / (best * 1e-3)


def stream_read(data: torch.Tensor, sums: torch.Tensor) -> None:
    """Write the sum of each run of ELEMENTS * STEPS float32 values of `data` into `sums`."""
    from sparse_kernels.stream import read_kernel

    run(read_kernel, (sums.numel(),), data, sums, ELEMENTS=ELEMENTS, STEPS=STEPS, num_warps=8)
