"""FLOPs and bytes: exact counts from shapes and realised densities (docs/protocol.md says what each number means).

Rules: 2 FLOPs per multiply-add; linear layers, lm_head and the two attention matmuls are counted, norms, activations
and comparisons are not. Bytes are what must come from memory for one decoded token: weights, router or predictor,
KV cache. Activations and index lists are made and used within the step and stay on chip.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from methods.families import blocks, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods import SparseModel
    from sparse_kernels.layers import SparseLayer

BINS = 32  # at most, of the histogram of units that single tokens use


@dataclass(frozen=True)
class Decode:
    """Cost of one decoded token with `context` tokens in the cache, at `batch` sequences a step.

    flops_dense: the dense model; flops: executed, overhead included; flops_overhead: routers and predictors.
    bytes: per token, weights shared by the batch; bytes_dense: the same for the dense model.
    """

    context: int
    batch: int
    flops_dense: int
    flops: int
    flops_overhead: int
    bytes_dense: int
    bytes: int
    bytes_weights: int
    bytes_kv: int
    bytes_overhead: int


@dataclass(frozen=True)
class Prefill:
    """FLOPs to process a prompt of `context` tokens, the logits of its last position included."""

    context: int
    flops_dense: int
    flops: int


@dataclass(frozen=True)
class Shape:
    """What counting needs of a model; element counts, and heads for attention."""

    linears: dict[tuple[int, str], int]  # weights of every linear layer in the blocks, by (block, name)
    head: int  # weights of lm_head
    query: dict[int, int]  # query heads x head size, by block
    kv: dict[int, int]  # keys and values of a position that attention reads, by block; borrowed ones as well
    windows: dict[int, int | None]  # how many positions a token sees at most, by block; None: all before it
    itemsize: int  # bytes per weight and per cache element

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        linears: dict[tuple[int, str], int] = {}
        query, kv, windows = {}, {}, {}
        own: dict[int | None, int] = {}  # by window: a block without keys and values takes those of the last one alike
        for block, window in zip(blocks(model), windows_of(model.config), strict=True):
            linears.update({(block.index, name): linear.weight.numel() for name, linear in block.linears.items()})
            query[block.index] = block.linears["q"].out_features
            if "k" in block.linears:
                own[window] = block.linears["k"].out_features + block.linears["v"].out_features
            kv[block.index], windows[block.index] = own[window], window
        head = model.get_output_embeddings().weight
        return cls(linears, head.numel(), query, kv, windows, head.element_size())

    @property
    def dense(self) -> int:
        return sum(self.linears.values())

    def seen(self, context: int) -> dict[int, int]:
        """By block, how many positions the last of `context` tokens sees."""
        return {block: min(context, window or context) for block, window in self.windows.items()}

    def pairs(self, length: int) -> dict[int, int]:
        """By block, how many positions the tokens of a prompt see, summed over them."""
        return {block: n * (n + 1) // 2 + (length - n) * n for block, n in self.seen(length).items()}


def dense_layers(shape: Shape) -> dict[tuple[int, str], float]:
    """Density 1 for every linear layer."""
    return dict.fromkeys(shape.linears, 1.0)


def densities(handle: SparseModel, shape: Shape, unions: bool = False) -> dict[tuple[int, str], float]:
    """Realised density of every linear layer in the blocks, from the handle's meter; 1 where nothing is sparse.

    unions: the share of units that any sequence of the batch used, from one-position passes, instead of the mean
    over tokens. A site that the meter has not seen counts as dense.
    """
    found = dense_layers(shape)
    for layer in handle.layers():
        density = _mean(layer, handle.meter.unions if unions else handle.meter.counts)
        found.update({(layer.layer, name): density for name in layer.linears()})
    return found


def attention(handle: SparseModel, seen: range) -> dict[tuple[int, str], float]:
    """By block where a layer leaves out heads or cached tokens, the share of attention and of the cache that tokens
    use which see so many positions. Always a mean over tokens: every sequence has a cache of its own."""
    layers = [layer for layer in handle.layers() if layer.attends]
    return {(layer.layer, "attention"): layer.attended(_mean(layer, handle.meter.counts), seen) for layer in layers}


def _mean(layer: SparseLayer, counted: dict[tuple[str, int], list[Any]]) -> float:
    import torch

    counts = counted.get((layer.site, layer.layer))
    flat = torch.cat([c.reshape(-1) for c in counts]).double() if counts else None
    return layer.share(1.0 if flat is None else float(flat.mean()) / layer.units)


def overhead(handle: SparseModel, rows: int) -> int:
    """Router parameters that a step of so many sequences reads: none where a layer runs everything unasked."""
    return sum(layer.overhead for layer in handle.layers() if not layer.idle(rows))


def complete(handle: SparseModel, shape: Shape) -> dict[tuple[int, str], float]:
    """Density of every linear layer at dense positions: 1, unless what stands for it has fewer or more weights."""
    found = dense_layers(shape)
    for layer in handle.layers():
        found.update({(layer.layer, name): layer.share(1.0) for name in layer.linears()})
    return found


def site_table(handle: SparseModel) -> dict[str, dict[str, Any]]:
    """Per site: mean density, 99th percentile and histogram over tokens and layers; of every layer units, mean, and
    10th, 50th and 90th percentile over tokens; and the mean union of 1, 2, 4, ... sequences at one position, where it
    was counted."""
    import torch

    def percentile(shares: Any, q: float) -> float:
        ordered = shares.sort().values
        return round(float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]), 5)

    sites: dict[str, dict[str, Any]] = {}
    for site in dict.fromkeys(layer.site for layer in handle.layers()):
        shares, units, unions = [], [], []
        for layer in handle.layers():
            counts = handle.meter.counts.get((layer.site, layer.layer))
            if layer.site == site and counts:
                shares.append(torch.cat(counts).double() / layer.units)
                units.append(layer.units)
                if (layer.site, layer.layer) in handle.meter.together:
                    means = handle.meter.together[layer.site, layer.layer].means
                    unions.append({n: float(torch.stack(found).mean()) / layer.units for n, found in means.items()})
        if shares:
            pooled = torch.cat(shares)
            sites[site] = {
                "mean": round(float(pooled.mean()), 5),
                "p99": percentile(pooled, 0.99),
                "layers": [round(float(share.mean()), 5) for share in shares],
                "spread": [[percentile(share, q) for q in (0.1, 0.5, 0.9)] for share in shares],
                "units": units,
                "histogram": _histogram(pooled, min(BINS, *units)),
            }
        if shares and unions:
            numbers = sorted(set.intersection(*(set(found) for found in unions)))
            sites[site]["unions"] = {str(n): round(sum(u[n] for u in unions) / len(unions), 5) for n in numbers}
    return sites


def _histogram(shares: Any, bins: int) -> list[int]:
    """How many shares are 0, and how many above 0, 1/bins, 2/bins, ... and at most 1/bins more: with as many bins as
    units, how many tokens use 0, 1, 2, ... of them."""
    import torch

    return torch.bincount((shares * bins - 1e-6).ceil().long(), minlength=bins + 1).tolist()


def model_density(shape: Shape, found: dict[tuple[int, str], float]) -> float:
    """Parameter-weighted density over the linear layers of the blocks; embeddings and lm_head are not in it."""
    return _active(shape, found) / shape.dense


def _active(shape: Shape, found: dict[tuple[int, str], float]) -> float:
    return _weighted(shape.linears, found)


def _attended(elements: dict[int, int], times: dict[int, int], found: dict[tuple[int, str], float]) -> float:
    """These elements of every block, so many times, as far as attention reads them."""
    return _weighted({(block, "attention"): n * times[block] for block, n in elements.items()}, found)


def _weighted(sizes: dict[tuple[int, str], int], found: dict[tuple[int, str], float]) -> float:
    # Sums of integers when every density is 1, so that the null method's count is exactly the dense one.
    densities = ((n, found.get(key, 1.0)) for key, n in sizes.items())
    return sum(n if density == 1.0 else n * density for n, density in densities)


def decode_cost(
    shape: Shape,
    tokens: dict[tuple[int, str], float],
    union: dict[tuple[int, str], float],
    overhead: int,
    context: int,
    batch: int,
) -> Decode:
    """tokens: density per token (FLOPs follow it); union: density over the batch (bytes follow it); overhead: router
    parameters, read and multiplied in full."""
    seen = shape.seen(context)
    attention = 4 * _attended(shape.query, seen, tokens)  # scores and values, 2 FLOPs per multiply-add each
    kv = round(_attended(shape.kv, seen, tokens) * shape.itemsize)
    dense_flops = round(2 * (shape.dense + shape.head) + 4 * _attended(shape.query, seen, {}))
    weights = (_active(shape, union) + shape.head) * shape.itemsize / batch
    extra = overhead * shape.itemsize / batch
    return Decode(
        context=context,
        batch=batch,
        flops_dense=dense_flops,
        flops=round(2 * (_active(shape, tokens) + shape.head) + attention + 2 * overhead),
        flops_overhead=2 * overhead,
        bytes_dense=round((shape.dense + shape.head) * shape.itemsize / batch)
        + round(_attended(shape.kv, seen, {}) * shape.itemsize),
        bytes=round(weights + extra) + kv,
        bytes_weights=round(weights),
        bytes_kv=kv,
        bytes_overhead=round(extra),
    )


def prefill_cost(
    shape: Shape,
    tokens: dict[tuple[int, str], float],
    overhead: int,
    context: int,
    share: float,
    full: dict[tuple[int, str], float] | None = None,
) -> Prefill:
    """share: how many of the prompt's positions are sparse (0 in mode decode, 1 in mode all); full: densities at the
    others, if they are not 1."""
    sparse = round(share * context)
    prefix = context - sparse
    causal, before = shape.pairs(context), shape.pairs(prefix)
    after = {block: pairs - before[block] for block, pairs in causal.items()}
    dense = round(2 * (shape.dense * context + shape.head) + 4 * _attended(shape.query, causal, {}))
    executed = _active(shape, full or {}) * prefix + (_active(shape, tokens) + overhead) * sparse
    attention = 4 * (_attended(shape.query, before, {}) + _attended(shape.query, after, tokens))
    return Prefill(context, dense, round(2 * (executed + shape.head) + attention))


def record(handle: SparseModel, shape: Shape, context: int, batch: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record's `cost` and `density` blocks, from what the meter has seen.

    batch: above 1, its decode steps were run, so that what the meter has no union of was read whole.
    """
    tokens = densities(handle, shape)
    layers = handle.layers()
    union = densities(handle, shape, unions=True) if batch > 1 else tokens
    shared = {(layer.layer, name) for layer in layers if layer.shared for name in layer.linears()}
    ran = {key: union[key] if key in shared else density for key, density in tokens.items()}
    ran |= attention(handle, range(context, context + 1))
    prefix = context - round(handle.fraction * context)
    prompt = tokens | attention(handle, range(prefix + 1, context + 1))
    alone = overhead(handle, 1)
    cost = {
        "decode": asdict(decode_cost(shape, ran, union, overhead(handle, batch), context, batch)),
        "prefill": asdict(prefill_cost(shape, prompt, alone, context, handle.fraction, complete(handle, shape))),
    }
    if not layers:
        return cost, None
    density = {
        "model": round(model_density(shape, ran), 5),
        "sites": site_table(handle),
        "union": round(model_density(shape, union), 5) if batch > 1 else None,
    }
    return cost, density
