"""Predictors of the neurons and heads that a token needs, learned from a frozen model's own activations.

Activations are made block after block and forgotten again: what is held is the hidden states of all text between two
blocks, and one block's taps and labels, a byte for each neuron of each token; docs/architecture.md has the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparse_kernels.selection.naive import batch_score
from sparse_kernels.selectors import Router

from ..base import Data, Progress, silent
from ..families import Block, blocks, heads_of, place_path
from .calibration import later, walk
from .heads import head_norms
from .routers import enough, uniform
from .training import train

HELD_OUT = 0.05  # of the tokens, the last ones: they judge a predictor and do not teach it
CHUNK = 4096  # tokens that are scored at a time


@dataclass
class Activations:
    """Of one block, dense: taps [tokens, d] by place, norms of its heads [tokens, heads], marks of its neurons."""

    block: Block
    taps: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    marks: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.taps.values(), self.norms, self.marks))


def activations(
    model: PreTrainedModel,
    windows: Tensor,
    places: Collection[str],
    mark: Callable[[Block, Tensor], Tensor] | None,
    label: str,
    progress: Progress = silent,
) -> Iterator[Activations]:
    """The activations of every block over text, without the first position of a window.

    A block's norms and marks are gone when the next one comes; its taps are there as long as the caller keeps them.
    mark: what to keep of a block's neurons' values [tokens, neurons]; None keeps nothing.
    """
    found, length = list(blocks(model)), windows.shape[1]
    heads, _ = heads_of(model.config)
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, made: Callable[[Tensor], Tensor]) -> Any:
        parts[name] = []

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            parts[name].append(made(later(x.detach(), length)))

        return hook

    def listen(index: int) -> list[Any]:
        block = found[index]
        hooks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]
        hooks = {"norms": (block.linears["o"], lambda x: head_norms(x, heads))}
        for place in places:
            path = place_path(block.layout, place)
            hooks[place] = block.module.get_submodule(path), lambda x: x
        if mark is not None:
            hooks["marks"] = block.linears["down"], lambda h: mark(block, h)
        return [
            module.register_forward_pre_hook(keep(name, made), with_kwargs=True)
            for name, (module, made) in hooks.items()
        ]

    for index in walk(model, windows, listen, label, progress):
        whole = {name: torch.cat(parts.pop(name)) for name in list(parts)}  # one after another: one is there twice
        norms, marks = whole.pop("norms"), whole.pop("marks", torch.empty(0))
        one = Activations(found[index], whole, norms, marks)
        del whole, norms, marks
        yield one
        one.norms = one.marks = torch.empty(0)


def neuron_importance(down: Tensor) -> Callable[[Tensor], Tensor]:
    """Of neurons, from their values [..., neurons] (or [..., neurons, 1]): the norm of what each adds to the output.

    down: weight [d, neurons].
    """
    norms = down.detach().float().norm(dim=0)
    return lambda h: h.squeeze(-1).float().abs() * norms


@dataclass(frozen=True)
class PredictorRecipe:
    """Weighted cross-entropy by AdamW at a constant rate. floor: added to the weight of the negatives.

    The epoch with the best held-out recall is kept; `patience` epochs without a better one, or `goal`, end training.
    """

    learning_rate: float
    epochs: int
    batch: int
    floor: float = 0.0
    patience: int = 5
    goal: float = 0.99
    weight_decay: float = 0.01


def weighted_loss(score: Tensor, active: Tensor, floor: float) -> Tensor:
    """Binary cross-entropy of logits, in which a positive weighs 1 and a negative w: the share of positives + floor.

    Source: Deja Vu and Polar Sparsity, released code.
    """
    y = active.float()
    w = y.mean() + floor
    return F.binary_cross_entropy_with_logits(score, y, y * (1 - w) + w)


def linear_start(shapes: list[tuple[int, int]], bias: bool, seed: int) -> Router:
    """A router of one or two linear layers, as torch initialises them."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(uniform(rows, columns, generator) for rows, columns in shapes)
    return Router(layers, "top-k", k=1, bias=torch.zeros(shapes[-1][0]) if bias else None)


def split(tokens: int) -> int:
    """How many tokens teach; the rest, at least one, judges."""
    return tokens - max(1, round(HELD_OUT * tokens))


@dataclass(frozen=True)
class Judgement:
    """How well scores tell what is active, on held-out tokens (or groups of tokens that share a selection).

    recall: float32 [units], the share of the active units that are among the 1, 2, ... best-scored, mean over tokens
    that have any; hits: [units], how many those are; active, predicted: units a token with label and with a positive
    logit.
    """

    recall: Tensor
    hits: Tensor
    active: float
    predicted: float

    def at(self, k: int) -> dict[str, float]:
        """For the manifest, with k units running; `predicted` and `true` as shares of all."""
        units = len(self.recall)
        found = {"k": k, "recall": float(self.recall[k - 1]), "precision": float(self.hits[k - 1]) / k}
        found |= {"predicted": self.predicted / units, "true": self.active / units}
        return {name: round(value, 4) for name, value in found.items()}

    def needed(self, recall: float) -> int:
        """The fewest units that reach this recall."""
        return min(len(self.recall), int((self.recall < recall - 1e-6).sum()) + 1)


@torch.no_grad()
def judge(router: Router, x: Tensor, active: Tensor, batch: int = 1, oracle: bool = False) -> Judgement:
    """On the held-out tokens of x [tokens, d], active [tokens, units].

    batch: tokens that share a selection, by `batch_score`; active is then what any of them needs (Polar Sparsity,
    algorithm 2). They are as far apart as the tokens allow: a decode batch holds different sequences, whose needs
    overlap less than those of neighbours in one text. oracle: ranked by the labels themselves.
    """
    x, active = x[split(len(x)) :], active[split(len(x)) :]
    size = min(batch, len(x))
    groups = len(x) // size
    recall, hits = torch.zeros(2, active.shape[1], device=x.device)
    total = predicted = some = 0.0
    for rows in torch.arange(groups * size, device=x.device).view(size, groups).T.split(max(1, CHUNK // size)):
        true = active[rows]
        score = true.float() if oracle else router.score(x[rows].float())
        predicted += float((score > 0).any(1).sum())
        rank = batch_score(score).argsort(dim=1, descending=True, stable=True)
        found = true.any(1).gather(1, rank).float().cumsum(1)
        any_active = found[:, -1:] > 0
        recall += torch.where(any_active, found / found[:, -1:].clamp(min=1), 0).sum(0)
        hits, some = hits + found.sum(0), some + float(any_active.sum())
        total += float(found[:, -1].sum())
    return Judgement((recall / max(some, 1)).cpu(), (hits / groups).cpu(), total / groups, predicted / groups)


def equal_recall(known: dict[int, Judgement], k: int) -> dict[int, int]:
    """How many units every block runs for the highest recall, the same in all, that takes k of them on average."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        spent = sum(found.needed(middle) for found in known.values())
        low, high = (middle, high) if spent <= k * len(known) else (low, middle)
    return {block: found.needed(low) for block, found in known.items()}


@torch.no_grad()
def recall_at(router: Router, x: Tensor, active: Tensor, k: int) -> float:
    """Of all active units of x [tokens, d], the share among the k best-scored of their token."""
    hits = 0.0
    for rows in torch.arange(len(x), device=x.device).split(CHUNK):
        best = router.score(x[rows].float()).topk(k, dim=1).indices
        hits += float(active[rows].gather(1, best).sum())
    return hits / max(float(active.sum()), 1.0)


def fit(
    router: Router,
    x: Tensor,
    active: Tensor,
    k: int,
    recipe: PredictorRecipe | None,
    seed: int,
    label: str,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> None:
    """Trains a router on x [tokens, d] to tell active [tokens, units]; held-out tokens pick the epoch, by recall at k.

    recipe: None leaves it as it is. float32 throughout.
    """
    router.to(x.device)
    if recipe is None:
        return
    learn, floor = split(len(x)), recipe.floor

    def batch_loss(rows: Tensor, done: float) -> Tensor:
        rows = rows.flatten()
        return weighted_loss(router.score(x[rows].float()), active[rows], floor)

    router.requires_grad_(True)
    batch = min(recipe.batch, learn)
    epoch = max(1, learn // batch)
    train(
        router,
        torch.arange(learn)[:, None],
        batch_loss,
        steps=recipe.epochs * epoch,
        batch=batch,
        learning_rate=recipe.learning_rate,
        schedule="constant",
        warmup=0.0,
        mixed=False,
        validate=lambda: -recall_at(router, x[learn:], active[learn:], k),
        every=epoch,
        patience=recipe.patience,
        goal=-recipe.goal,
        weight_decay=recipe.weight_decay,
        seed=seed,
        label=label,
        progress=progress,
        checkpoint=checkpoint,
    )
    router.requires_grad_(False)


def folded(router: Router) -> Router:
    """The same scores from one matrix instead of two, where that is smaller: nothing lies between the two."""
    if len(router.layers) == 1:
        return router
    a, b = (layer.detach() for layer in router.layers)
    one = (b @ a,) if b.shape[0] * a.shape[1] < a.numel() + b.numel() else (a, b)
    return Router(one, router.rule, k=router.k)


def stored(name: str, router: Router) -> dict[str, Tensor]:
    """`<name>.a`, `.b` and `.bias`, as far as it has them, in bfloat16."""
    tensors = {f"{name}.{key}": layer for key, layer in zip("ab", router.layers, strict=False)}
    tensors |= {} if router.bias is None else {f"{name}.bias": router.bias}
    return {key: tensor.detach().bfloat16().cpu() for key, tensor in tensors.items()}


def restored(tensors: dict[str, Tensor], name: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What `stored` left: the layers, of which there is one at least, and the bias or None."""
    second = tensors.get(f"{name}.b")
    layers = (tensors[f"{name}.a"], *(() if second is None else (second,)))
    return layers, tensors.get(f"{name}.bias")


def manifest_of(model: PreTrainedModel, windows: Tensor, wanted: int, data: Data) -> dict[str, Any]:
    """What manifests of predictors have in common. Raises UsageError where there is too little text to learn from.

    activation_bytes: of the hidden states between two blocks; what else is alive at once is to be added.
    """
    tokens = windows.numel()
    held = tokens * model.config.hidden_size * model.dtype.itemsize  # type: ignore[operator]
    told = {"corpus": data.corpus, "seed": data.seed, "tokens": tokens, "held_out": tokens - split(tokens)}
    told |= {"activation_bytes": held, "device": next(model.parameters()).device.type}
    told |= {"notes": enough(tokens, wanted * windows.shape[1])}
    return told
