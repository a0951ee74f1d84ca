"""What the kernel benchmark times: the shapes of a model, and a case: how to draw its inputs and what must be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from methods.errors import UsageError

from .. import models
from . import OPERATORS

DENSITIES = (1.0, 0.5, 0.2)
BATCHES = (2, 4, 8, 16)
SHAPES = ("llama2-7b", "llama3.1-8b", "opt-6.7b")
EXPERT = 32  # neurons
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}  # relative, Frobenius; the rest is exact

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of one decoder layer. `biased` also means LayerNorm and an ungated FFN, as in OPT."""

    name: str
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    biased: bool

    def linears(self) -> dict[str, tuple[int, list[int]]]:
        """Input channels of the layer's linears, and the outputs of those that share them."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up, down = ("fc1", "fc2") if self.biased else ("gate+up", "down")
        return {
            "qkv": (self.hidden, [query, kv, kv]),
            "o": (query, [self.hidden]),
            up: (self.hidden, [self.neurons] if self.biased else 2 * [self.neurons]),
            down: (self.neurons, [self.hidden]),
        }


def shape(name: str) -> Shape:
    """The shape of an alias of models.toml. Raises UsageError for one whose architecture is not written there."""
    if name not in models.aliases() or not (found := models.resolve(name)).architecture:
        raise UsageError(f"'{name}' has no shapes: choose aliases with an architecture, like {', '.join(SHAPES)}.")
    fields, heads = found.architecture, found.architecture["num_attention_heads"]
    return Shape(
        name=name,
        hidden=fields["hidden_size"],
        neurons=fields.get("intermediate_size") or fields["ffn_dim"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        activation=found.activation or "silu",
        biased=found.layout == "opt",
    )


@dataclass(frozen=True)
class Copy:
    """One copy of the weights, caches and inputs of a case.

    run: the operator under test; returns only tensors that it wrote, every element of them.
    result: made of those tensors, what of them is specified; compared with reference, the same in float64.
    bytes: what must be read from memory.
    density: as drawn, of the union over the batch.
    baseline: the same work done densely.
    tolerance: that of the result's dtype, unless something on the way was rounded to fewer bits.
    """

    run: Callable[[], Output]
    reference: Callable[[], Tensor]
    bytes: int
    density: float
    baseline: Callable[[], object] | None = None
    result: Callable[..., Tensor] = lambda y: y
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """A row of the table. `build(draw)` makes one copy; `baseline` names the dense work it is compared with."""

    op: str
    case: str
    batch: int
    density: float
    build: Callable[[Draw], Copy]
    baseline: str | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.case}, batch {self.batch}, density {self.density:g}"


@dataclass
class Draw:
    """Random inputs of one copy, the same for the same seed; never zeros."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *size: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device).normal_(
            0, std, generator=self.generator
        )

    def weight(self, outputs: int, channels: int) -> Tensor:
        """[outputs, channels], of a size that keeps the variance of the input."""
        return self.normal(outputs, channels, std=channels**-0.5)

    def mask(self, rows: int, units: int, density: float) -> Tensor:
        """Bool [rows, units] with round(density * units), at least one, active units in every row."""
        order = torch.rand(rows, units, device=self.device, generator=self.generator).argsort(1)
        return order < max(1, round(density * units))

    def values(self, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values of random sign whose magnitude is above 1 (the threshold) exactly where the mask is set."""
        size = self.normal(*mask.shape, dtype=torch.float32)
        value = torch.where(mask, size + size.sign() * 1.0625, size.clamp(-0.95, 0.95))
        return value.to(dtype or self.dtype)

    def lists(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The active units of each row of a mask in ascending order, int32 [rows, units], and how many, int32 [rows].

        Slots behind a list are -1, which no operator may read.
        """
        count = mask.sum(1).int()
        order = (~mask).to(torch.int8).sort(dim=1, stable=True).indices.int()
        behind = torch.arange(mask.shape[1], device=self.device) >= count[:, None]
        return order.masked_fill(behind, -1), count

    def union(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The units that are active in any row of a mask: one list, int32 [units], and its length, int32 [1]."""
        index, count = self.lists(mask.any(0, keepdim=True))
        return index[0], count

    def one(self) -> Tensor:
        """The threshold that belongs to `values`."""
        return torch.ones(1, device=self.device)


def gap(values: Tensor, density: float) -> Tensor:
    """A threshold, float32 [1], that about this share of values [K] exceeds, all of them if density is 1.

    It lies in the widest gap near there, so that sums in another precision exceed it alike.
    """
    order, near = values.double().sort(descending=True).values, max(2, len(values) // 200)
    if density == 1:
        return (order[-1:] - 1).float()
    start = max(0, round(density * len(order)) - near)
    place = start + int((order[start:-1] - order[start + 1 :])[: 2 * near].argmax())
    return order[place : place + 2].mean().float()[None]


def listed(index: Tensor, count: Tensor, units: int) -> Tensor:
    """An index list as how often it names each unit, int32 [units]; what is no unit counts for the last one."""
    behind = torch.arange(len(index), device=index.device) >= count
    times = torch.zeros(units, dtype=torch.int32, device=index.device)
    return times.index_add(0, index.long().clamp(0, units - 1), (~behind).int())


def agreeing(score: Tensor, keep: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The scores [units], NaN where the list made from them names a unit that it should not, or leaves one out."""
    return torch.where(listed(index, count, len(keep)) == keep, score, float("nan"))


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def cases(operators: Iterable[str], shapes: Iterable[str]) -> list[Case]:
    """The cases of these operators on these shapes, in the order of the table. Raises UsageError for a bad shape."""
    chosen, known = set(operators), [shape(name) for name in shapes]

    def all_of(operator: str) -> Iterator[Case]:
        module = import_module(f".{OPERATORS[operator]}", __package__)
        for found in known:
            yield from (case for case in module.cases(found) if case.op == operator)

    return [case for operator in OPERATORS if operator in chosen for case in all_of(operator)]
