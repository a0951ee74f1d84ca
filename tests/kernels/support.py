"""What the kernel tests share: inputs, index lists and a tolerance that can fail."""

import torch
from torch import Tensor

EPSILON = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}


# Norm of the error over that of the output. Half precision rounds the weights too, on a GPU; Triton's interpreter
# truncates to bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ROUNDED = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether a kernel's output is the float64 definition's, rounded once from a float32 sum."""
    rounding = EPSILON[actual.dtype] * expected.abs()
    summing = 2e-6 * expected.square().mean().sqrt()
    return bool(((actual.double() - expected).abs() <= rounding + summing + 1e-30).all())


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def index_list(active: Tensor) -> tuple[Tensor, Tensor]:
    """The compacted list of a boolean mask [K]; the unused slots would fault if they were read."""
    index = torch.full((active.numel(),), -1, dtype=torch.int32, device=active.device)
    chosen = active.nonzero().flatten().int()
    index[: chosen.numel()] = chosen
    return index, torch.tensor([chosen.numel()], dtype=torch.int32, device=active.device)


def choose(n: int, density: float, device: str) -> Tensor:
    """A boolean mask of n with round(density * n) active entries; density "one" leaves a single one."""
    count = 1 if density == "one" else round(density * n)
    return torch.randperm(n, device=device) < count


def limits(kind: str | None, channels: int, device: str) -> Tensor | None:
    """Thresholds: None, one for all channels, or one per channel."""
    if kind is None:
        return None
    return torch.full((1,), 0.5, device=device) if kind == "one" else torch.rand(channels, device=device)


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two lists, or lists per row, have the same length and entries."""
    lengths = expected[1].tolist()
    rows = [t.reshape(len(lengths), -1) for t in (actual[0], expected[0])]
    listed = all(torch.equal(a[:n], e[:n]) for a, e, n in zip(*rows, lengths, strict=True))
    return actual[0].dtype == actual[1].dtype == torch.int32 and torch.equal(actual[1], expected[1]) and listed


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether the error is that of rounding, and exact zeros are exact."""
    error = (actual.double() - expected).norm()
    return bool(error <= TOLERANCE[actual.dtype] * expected.norm()) and bool((actual[expected == 0] == 0).all())


def far(*shape, apart=None):
    """A tensor of this shape whose entries along dimension `apart` are 2^30 from each other; nobody may read it."""
    strides = list(torch.empty(shape, device="meta").stride())
    if apart is not None:
        strides[apart] = 2**30
    return torch.empty_strided(shape, strides, device="meta")
