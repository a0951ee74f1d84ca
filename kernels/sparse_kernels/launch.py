"""Where a call runs and how wide it is launched. Does not import triton, so CPU-only machines need not have it."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

MAX_BATCH = 64
MAX_SEMAPHORES = 4096
MAX_CHANNELS = 65536
SHARED_BYTES = 200 * 1024  # of a multiprocessor's shared memory, what a software pipeline may hold
T = TypeVar("T")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """How one regime of a kernel is launched.

    rows: weight rows a program takes per step.
    columns: weight columns it takes per step.
    warps, stages: warps per program and depth of the software pipeline.
    programs: programs per multiprocessor that the fixed grid aims at.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Rows:
    """How a kernel that takes whole rows of weights is launched.

    rows, warps: rows per step (of each matrix) and warps per program where a row has 8 KiB; fewer rows where they are
    longer, and warps in proportion to the row.
    stages: depth of the software pipeline.
    programs: programs per multiprocessor.
    """

    rows: int
    warps: int
    stages: int
    programs: int

    def fit(self, width: int, itemsize: int) -> tuple[int, int]:
        """Rows and warps for rows of `width` elements."""
        size = row_bytes(width, itemsize)
        return max(1, self.rows * 8192 // max(8192, size)), max(1, min(16, self.warps * size // 8192))

    def count(self, rows: int, device: torch.device) -> int:
        """Programs of the fixed grid, for so many rows."""
        return min(self.programs * multiprocessors(device), rows)


def padded_batch(batch: int) -> int:
    """1 stays 1 (multiply and sum); more rows fill 16, 32 or 64 rows of a matrix-unit tile."""
    return 1 if batch == 1 else max(16, power_of_2(batch))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def row_bytes(width: int, itemsize: int) -> int:
    """Bytes of a row that a program takes whole, padded as its registers are."""
    return power_of_2(width) * itemsize


def depth(stages: int, stage_bytes: int) -> int:
    """Of the stages that a pipeline is tuned to, how many fit: wide types and blocks fill shared memory sooner."""
    return max(1, min(stages, SHARED_BYTES // stage_bytes))


def interpreting() -> bool:
    """Whether Triton interprets its kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: torch.Tensor) -> bool:
    return x.is_cuda or interpreting()


@cache
def multiprocessors(device: torch.device) -> int:
    # A handful stands for a GPU in the interpreter, which runs programs one after another.
    if device.type != "cuda":
        return 4
    # Without a GPU only fake tensors ask.
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 132


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for Hopper; a CPU stands for Hopper."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pick(tables: dict[int, T], device: torch.device) -> T:
    """The launch table of this architecture, else of the newest one before it, else the oldest."""
    known = [a for a in sorted(tables) if a <= architecture(device)]
    return tables[known[-1] if known else min(tables)]


@cache
def semaphores(device: torch.device) -> torch.Tensor:
    """Int32 zeros for `last_to_arrive`, shared by all kernels of a device since each launch leaves them at zero.

    So the kernels of one device must run in one stream at a time. Raises ValueError while a graph is being captured,
    whose zeros would not exist outside it.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    require(not capturing, "Run the step once before capturing it: the kernels' semaphores do not exist yet.")
    return torch.zeros(MAX_SEMAPHORES, dtype=torch.int32, device=device)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument, without waiting for it.

    A kernel with a parameter PDL lets the next one start early, where the GPU can; it starts early itself unless
    pdl=False is among the options.
    """
    device = args[0].device
    early = options.pop("pdl", True)
    if "PDL" in kernel.arg_names:
        options["PDL"] = device.type == "cuda" and architecture(device) >= 90
        if options["PDL"] and early:
            options["launch_pdl"] = True
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def union_density(density: float, rows: int) -> float:
    """The share of units that any of some rows needs, where each keeps `density` of them by a choice of its own."""
    return 1 - (1 - density) ** rows


def crowded(density: float | None, rows: int, crossover: float) -> bool:
    """Whether rows that keep `density` of the units each are expected to need more than `crossover` between them, from
    which on dense products are faster; never one row, nor where nothing is expected."""
    return rows > 1 and density is not None and union_density(density, rows) > crossover


def require(condition: bool, sentence: str, *values: Any) -> None:
    """Raise ValueError with the sentence, its {} filled with the values, unless the condition holds."""
    if not condition:  # formatted only here, since every call of an operator passes through
        raise ValueError(sentence.format(*(list(v) if isinstance(v, tuple) else v for v in values)))


def require_rows(name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check a tensor's shape, its dtype and device against `like`, and that its rows are contiguous."""
    require(tensor.shape == shape, "{} must have shape {}, got {}.", name, shape, tensor.shape)
    require(tensor.dtype == like.dtype, "{} must be {}, got {}.", name, like.dtype, tensor.dtype)
    require(tensor.device == like.device, "{} must be on {}, got {}.", name, like.device, tensor.device)
    contiguous = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    require(contiguous, "{} must have contiguous rows, got strides {}.", name, tensor.stride())


def require_input(x: torch.Tensor) -> None:
    """Check that x is [B, K] with 1 <= B <= 64, contiguous rows and a dtype the kernels compute in."""
    require(x.dim() == 2 and x.shape[1] >= 1, "x must have shape [batch, channels], got {}.", x.shape)
    require(1 <= x.shape[0] <= MAX_BATCH, "x must have 1 to {} rows, got {}.", MAX_BATCH, x.shape[0])
    known = x.dtype in DTYPES or (x.dtype == torch.float64 and not x.is_cuda)
    require(known, "x must be float32, float16 or bfloat16, got {}.", x.dtype)
    require(x.shape[1] == 1 or x.stride(1) == 1, "x must have contiguous rows, got strides {}.", x.stride())


def require_threshold(threshold: torch.Tensor, x: torch.Tensor, channels: int) -> None:
    """Check that threshold is a contiguous float32 [1] or [channels] on x's device."""
    require(threshold.dtype == torch.float32, "threshold must be float32, got {}.", threshold.dtype)
    require(threshold.device == x.device, "threshold must be on {}, got {}.", x.device, threshold.device)
    fits = threshold.dim() == 1 and threshold.shape[0] in (1, channels) and threshold.is_contiguous()
    require(fits, "threshold must be a contiguous [1] or [{}], got shape {}.", channels, threshold.shape)


def require_list(index: torch.Tensor, count: torch.Tensor, x: torch.Tensor, length: int) -> None:
    """Check that index and count are a list of at most `length` slots on x's device."""
    for name, tensor, size in (("index", index, length), ("count", count, 1)):
        slots = tensor.shape[0] if tensor.dim() == 1 else 0
        fits = 1 <= slots <= size and tensor.dtype == torch.int32 and tensor.is_contiguous()
        got = (tensor.dtype, tensor.shape)
        require(fits, "{} must be a contiguous int32 [{}] or shorter, got {} {}.", name, size, *got)
        require(tensor.device == x.device, "{} must be on {}, got {}.", name, x.device, tensor.device)
