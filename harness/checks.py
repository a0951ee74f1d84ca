"""What a method says of itself is checked against what it does: the steps that were timed, and the density reported.

`fidelity.block_check` and `kernel_check` hold the fast path to the reference path before anything is timed. These look
at what is left to a method that behaves only while it is watched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.runtime import fast_steps

from .fidelity import active_positions, kernel_tolerance, teacher_forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StaticCache

    from methods import SparseModel

REGRET = 0.1  # nats per token; a stale or skipped step costs several
UNREPORTED = 1e-3  # share of a layer's weights


@torch.inference_mode()
def timed_text(
    model: PreTrainedModel,
    handle: SparseModel,
    text: Tensor,
    steps: int,
    fidelity: dict[str, Any] | None,
    cache: StaticCache | None = None,
) -> float:
    """Nats per token by which the greedy tokens that timed steps chose fall short of the likeliest ones.

    text: int64 [batch, length], whose last `steps` tokens these steps made. It is run again as the evaluation runs
    text, in one masked pass; a batch, for which some methods choose together, in masked steps; with random weights
    (fidelity: None), which cannot be compared so (docs/protocol.md), in steps of the fast path without a graph. Steps
    use `cache` if given: that of the timed steps. Raises RuntimeError where the timed steps did something else.
    """
    if fidelity is None:
        with fast_steps(model, handle):
            logits = teacher_forced(model, handle, text, steps, cache)
    elif len(text) > 1:
        with handle.meter.apart() as meter, meter.on():  # whoever counts takes the reference path
            logits = teacher_forced(model, handle, text, steps, cache)
    else:
        with handle.positions(active_positions(handle, text, steps)):
            logits = model(input_ids=text[:, :-1], use_cache=False, logits_to_keep=steps).logits
    logprobs = F.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(-1, text[:, -steps:, None]).squeeze(-1)
    found = float((logprobs.amax(-1) - chosen).mean())
    limit = max(REGRET, kernel_tolerance(fidelity))
    if not found <= limit:  # also true for NaN
        raise RuntimeError(
            f"the timed steps chose tokens {found:.2g} nats less likely than the likeliest (limit {limit:.2g}): they "
            "computed something else than what was evaluated"
        )
    return found


def reported_density(model: PreTrainedModel, handle: SparseModel, tokens: Tensor) -> float:
    """The largest share of a layer's weights that took part in steps, beyond what its selection reports.

    A weight that took part has a gradient. tokens: int64 [n, 1], n sequences of one step each; a selection reports the
    union over them. Raises RuntimeError where a layer uses more than it reports.
    """
    layers = [(layer, [linear.weight for linear in layer.linears().values()]) for layer in handle.layers()]
    weights: dict[int, Any] = {id(weight): weight for _, found in layers for weight in found}
    used: dict[int, int] = {}
    if not weights:
        return 0.0

    def count(weight: Tensor) -> None:
        assert weight.grad is not None
        used[id(weight)] = int(weight.grad.count_nonzero())
        weight.grad = None  # one at a time: together they are as large as the model

    wanted = {key: weight.requires_grad for key, weight in weights.items()}
    hooks = []
    try:
        for weight in weights.values():
            hooks.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(count))
        with torch.inference_mode(False), torch.enable_grad(), handle.sparse(), handle.meter.apart() as meter:
            with meter.on():
                logits = model(input_ids=tokens.clone(), use_cache=False).logits.float()
            generator = torch.Generator().manual_seed(0)
            (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum().backward()
            unions = {key: int(found[-1]) for key, found in meter.unions.items()}
    finally:
        for hook in hooks:
            hook.remove()
        for key, weight in weights.items():
            weight.requires_grad_(wanted[key])
    worst = 0.0
    for layer, found in layers:
        reported = unions.get((layer.site, layer.layer), layer.units) / layer.units
        share = sum(used.get(id(weight), 0) for weight in found) / max(1, sum(weight.numel() for weight in found))
        if share > reported + UNREPORTED:
            raise RuntimeError(
                f"layer {layer.layer} reports a density of {reported:.3f} at '{layer.site}' and uses {share:.3f}"
            )
        worst = max(worst, share - reported)
    return worst
