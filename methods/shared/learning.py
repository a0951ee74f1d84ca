"""Trains the routers of a frozen model, one FFN after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_kernels.layers import ExpertFFN
from sparse_kernels.selectors import Router

from ..base import Data, Method, Progress, silent, sparsify
from .calibration import ffn_inputs
from .routers import held_out, quality, targets
from .student import checkpoint_file
from .training import train

Importance = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a router is trained: loss(scores, target(importance)), passes over the tokens, rate, tokens a step.

    patience: passes that bring no better router before training stops early.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    target: Callable[[Tensor], Tensor]
    epochs: int
    learning_rate: float
    schedule: str
    batch: int = 512
    patience: int = 3


def fit(
    router: Router,
    x: Tensor,
    importance: Tensor,
    recipe: Recipe,
    seed: int,
    label: str,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> None:
    """Trains a router on x [tokens, d] and importance [tokens, experts]; the last tenth of the tokens is held out.

    The epoch is kept whose 20 % best-scored experts hold most of the held-out importance (MoEfication's criterion).
    float32 throughout.
    """
    target = recipe.target(importance)
    learn = len(x) - held_out(len(x))
    epoch = max(1, learn // recipe.batch)

    def batch_loss(rows: Tensor, done: float) -> Tensor:
        rows = rows.flatten()
        return recipe.loss(router.score(x[rows].float()), target[rows])

    router.to(x.device).requires_grad_(True)
    train(
        router,
        torch.arange(learn)[:, None],
        batch_loss,
        steps=recipe.epochs * epoch,
        batch=min(recipe.batch, learn),
        learning_rate=recipe.learning_rate,
        schedule=recipe.schedule,
        warmup=0.0,
        mixed=False,
        validate=lambda: -quality(router, x, importance)["captured"],
        every=epoch,
        patience=recipe.patience,
        seed=seed,
        label=label,
        progress=progress,
        checkpoint=checkpoint,
    )
    router.requires_grad_(False)


def learn(
    method: Method,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    windows: Tensor,
    data: Data,
    start: Callable[[ExpertFFN], Router | None],
    importance: Callable[[ExpertFFN, Tensor], Importance],
    recipe: Recipe | None,
    free: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Router tensors `router.<block>.<a, b or bias>`, and by layer what `quality` says of them.

    tensors: weights and order of the model that the routers are for; start: the router of a layer, None for none;
    importance: from a layer and its inputs [tokens, d], the function of hidden values that routers should predict;
    recipe: None leaves them as they start; free: options that make no difference to routers.
    """
    found: dict[str, Tensor] = {}
    caught: dict[str, list[float]] = {"captured": [], "possible": []}
    with sparsify(model, method.artifact(model, None, tensors, {})) as handle:
        for layer, x in ffn_inputs(handle, windows, method.name, progress):
            measure, router, index = importance(layer, x), start(layer), layer.name
            if router is None:
                continue
            router.to(x.device)
            true = targets(layer, x, measure)
            if recipe is not None:
                place = checkpoint_file(data, method, model, f"router{index}", free)
                fit(router, x, true, recipe, data.seed, f"{method.name} router {index}", progress, place)
            for name, share in quality(router, x, true).items():
                caught[name].append(round(share, 4))
            for name, weight in zip("ab", router.layers, strict=False):
                found[f"router.{index}.{name}"] = weight.detach().bfloat16().cpu()
            if router.bias is not None:
                found[f"router.{index}.bias"] = router.bias.detach().cpu()
    return found, caught if found else {}
