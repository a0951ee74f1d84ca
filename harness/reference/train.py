"""The recipe of the reference models: small language models of Python code, trained from scratch in minutes.

    python -m harness.reference.train --model reference --minutes 7 --out DIR [--data-cache DIR]
    python -m harness.reference.train --model reference-spark --out DIR [--data-cache DIR]

`reference-spark` is the Spark Transformer (arXiv 2506.06644) of `reference`'s size: same shape, weights, text, recipe
and, unless told otherwise, the number of tokens that `reference` was trained on.

Hidden matrices are trained with Muon (Jordan et al., 2024) at the update size of AdamW (Liu et al., 2025,
arXiv:2502.16982), all else with AdamW. The learning rate decays with the time used, so a run takes the minutes it is
given, or with the tokens used where their number is given. The held-out numbers in the card are those of the saved
weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.corpus import token_windows
from harness.reference.card import model_card
from harness.reference.text import VOCABULARY, prepare
from methods.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch

CONTEXT = 512
WARM_UP_STEPS = 200
FINAL_RATE = 0.05
WEIGHT_DECAY = 0.1
EVALUATIONS = 20
EVALUATION_WINDOWS = 512
REPORT_SECONDS = 10.0
TWIN = Path(__file__).parent / "reference"  # the dense model that `reference-spark` is compared with


@dataclass(frozen=True)
class Recipe:
    """Peak learning rates: `matrix_rate` of Muon for hidden matrices, `rate` of AdamW for all other parameters."""

    rate: float
    matrix_rate: float


SPARK = "reference-spark"
RECIPES = {"reference": Recipe(3e-3, 4e-3), "reference-relu": Recipe(2e-3, 4e-3)}
RECIPES[SPARK] = RECIPES["reference"]


def build_model(name: str, tokenizer: Any) -> Any:
    """The untrained model, float32: `reference` (Llama, 6.95 M parameters), `reference-relu` (OPT, 4.80 M), or
    `reference-spark`, as large as `reference`: two matrices for each 3 of its FFN make room for 1.5 times the neurons.

    The feed-forward width is a multiple of 32, the size of an expert: 22 of them in `reference`, 28 in
    `reference-relu`, whose size keeps its weights under 10 MB in bfloat16. Raises `UsageError` for another name.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "reference":
        return LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=8, intermediate_size=704, num_key_value_heads=4, **shared)
        )
    if name == "reference-relu":
        return OPTForCausalLM(
            OPTConfig(
                num_hidden_layers=5,
                ffn_dim=896,
                word_embed_proj_dim=256,
                activation_function="relu",
                do_layer_norm_before=True,
                dropout=0.0,
                **shared,
            )
        )
    if name == SPARK:
        from methods.shared.spark_llama import SparkLlamaConfig, SparkLlamaForCausalLM, register

        register()  # the saved model is read back by its name
        # The paper keeps 8 % of the neurons and 256 of 8192 tokens, 3 %; of the 512 here 64, lest a head see nothing.
        sizes: dict[str, Any] = {"num_hidden_layers": 8, "intermediate_size": 1056, "num_key_value_heads": 4}
        return SparkLlamaForCausalLM(SparkLlamaConfig(**sizes, ffn_density=0.08, attended=64, **shared))
    raise unknown("reference model", name, RECIPES)


def build_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and AdamW for embeddings, norms and biases; all AdamW without Muon."""
    import torch

    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    adam: dict[str, Any] = {"betas": (0.9, 0.95), "fused": True}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=recipe.rate, weight_decay=0.0, **adam)]
    if hasattr(torch.optim, "Muon"):
        optimizers.append(
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        )
    else:
        optimizers.append(torch.optim.AdamW(matrices, lr=recipe.rate, weight_decay=WEIGHT_DECAY, **adam))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_factor(step: int, used: float) -> float:
    """The learning rate over its peak: linear over the first steps, then a cosine of the fraction of time used."""
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, used))))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def batches(tokens: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless [batch, CONTEXT + 1] int64: in each epoch every window once, in a new order and at a new offset."""
    import torch

    span = torch.arange(CONTEXT + 1, device=tokens.device)
    count = (len(tokens) - CONTEXT - 1) // CONTEXT
    if count < batch:
        raise UsageError(f"the text fills {count} windows, less than one batch of {batch}: raise --text-limit.")
    while True:
        offset = torch.randint(CONTEXT, (1,), generator=generator)
        starts = (torch.randperm(count, generator=generator) * CONTEXT + offset).to(tokens.device)
        for begin in range(0, count - batch + 1, batch):
            yield tokens[starts[begin : begin + batch, None] + span].long()


def held_out_loss(model: Any, windows: torch.Tensor, batch: int = 32) -> float:
    """Mean negative log-likelihood in nats per token over windows [n, CONTEXT], under the model's own precision."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with torch.no_grad():
        for part in windows.split(batch):
            part = part.to(model.device)
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            total += losses.double()
    return float(total) / (windows.shape[0] * (windows.shape[1] - 1))


def train(
    model: Any,
    recipe: Recipe,
    tokens: torch.Tensor,
    windows: torch.Tensor,
    *,
    minutes: float,
    steps: int | None = None,
    batch: int,
    seed: int,
    save: Callable[[], None],
) -> dict[str, Any]:
    """Train in place for the given minutes, compilation included, or for a number of steps where that is given;
    returns steps, tokens, seconds and the loss curve.

    tokens [n] int32, windows [m, CONTEXT] int64 held out; `save()` is called at each evaluation, so that a run that
    is killed leaves a model behind. SIGTERM ends the run in order. Raises `FloatingPointError` when the loss is not
    finite.
    """
    import torch

    device = model.device
    cuda = device.type == "cuda"
    began = time.monotonic()
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    tokens = tokens.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizers = build_optimizers(model, recipe)
    model.eval()  # no layer has dropout, and OPT's layer drop would read the device at every layer

    def loss_of(block: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = model(input_ids=block[:, :-1], position_ids=positions, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())

    positions = torch.arange(CONTEXT, device=device)[None]
    compiled = torch.compile(loss_of) if cuda else loss_of
    limit = minutes * 60
    step, first, reported, evaluated, reported_step = 0, 0.0, 0.0, 0, 0
    curve: list[dict[str, float]] = []
    for block in batches(tokens, batch, generator):
        if steps is not None:
            used = step / steps
        else:
            used = (time.monotonic() - began - first) / max(1e-9, limit - first) if step else 0.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(step, used)
        loss = compiled(block)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step == 1:
            loss.item()
            first = time.monotonic() - began  # the schedule starts when compilation is done
        elapsed = time.monotonic() - began
        if elapsed - reported >= REPORT_SECONDS or step == 1:
            value, rate = loss.item(), (step - reported_step) * batch * CONTEXT / (elapsed - reported)
            reported, reported_step = elapsed, step
            print(f"{elapsed:6.0f} s  step {step:6d}  loss {value:.4f}  {rate / 1e6:.3f} M tokens/s", flush=True)
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}")
        if stop or (elapsed >= limit if steps is None else step >= steps):
            break
        if used * EVALUATIONS >= evaluated + 1:
            evaluated = int(used * EVALUATIONS)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                held_out = held_out_loss(model, windows)
            curve.append({"seconds": round(elapsed, 1), "step": step, "train": loss.item(), "held_out": held_out})
            print(f"{elapsed:6.0f} s  step {step:6d}  held-out loss {held_out:.4f}", flush=True)
            save()
    save()
    signal.signal(signal.SIGTERM, previous)
    return {
        "steps": step,
        "tokens_seen": step * batch * CONTEXT,
        "epochs": round(step * batch * CONTEXT / len(tokens), 2),
        "seconds": round(time.monotonic() - began, 1),
        "compile_seconds": round(first, 1),
        "stopped_early": bool(stop),
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "curve": curve,
    }


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the weights rounded to bfloat16 (those of `reference-spark` to 8 bits), the configuration and tokenizer."""
    import torch

    if hasattr(model, "save_eight_bit"):
        model.save_eight_bit(out)
    else:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(out: Path, windows: torch.Tensor, device: str) -> dict[str, Any]:
    """Held-out perplexity and bits per byte of the saved model, computed in bfloat16, in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    model = model.to(device).eval()
    loss = held_out_loss(model, windows)
    scored = sum(len(text.encode("utf-8", "replace")) for text in tokenizer.batch_decode(windows[:, 1:].tolist()))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * tokens / math.log(2) / scored,
        "tokens": tokens,
        "window": windows.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harness.reference.train", description="Train a reference model.")
    parser.add_argument("--model", required=True, help=" or ".join(RECIPES))
    parser.add_argument("--minutes", type=float, help="time to train, compilation included (default: 7)")
    parser.add_argument("--tokens", type=float, help="tokens to train on, instead of a time")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--batch", type=int, help="windows a step; default 256, on the CPU 8")
    parser.add_argument("--text-limit", type=float, default=200e6, help="bytes of training text")
    parser.add_argument("--data-cache", type=Path, help="folder that keeps the tokenised text for the next call")
    parser.add_argument("--tokenizer", type=Path, help="folder of a saved tokenizer to use")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.model not in RECIPES:
            raise unknown("reference model", options.model, RECIPES)
        if options.minutes is not None and options.tokens is not None:
            raise UsageError("--minutes and --tokens both say how long to train: give one of them.")
        run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the text, train, save, measure and write `training.json` and the model card; returns the record."""
    start = time.monotonic()
    data = prepare(int(options.text_limit), options.seed, options.data_cache, options.tokenizer)
    prepared = time.monotonic() - start
    print(
        f"{prepared:6.0f} s  {data.facts['bytes'] / 1e6:.1f} MB of text, {data.facts['tokens'] / 1e6:.2f} M tokens, "
        f"{data.facts['bytes_per_token']} bytes a token, {len(data.facts['packages'])} packages",
        flush=True,
    )
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = options.batch or (256 if device == "cuda" else 8)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(options.model, data.tokenizer).to(device)
    use_causal_attention(model)
    budget = options.tokens
    if budget is None and options.minutes is None and options.model == SPARK:
        budget = json.loads((TWIN / "training.json").read_text())["training"]["tokens_seen"]
    steps = None if budget is None else max(1, round(budget / (batch * CONTEXT)))
    minutes = 7.0 if options.minutes is None else options.minutes
    every_window = token_windows(data.evaluation, data.tokenizer, CONTEXT)
    shuffled = torch.randperm(len(every_window), generator=torch.Generator().manual_seed(0))
    some_windows = every_window[shuffled[: EVALUATION_WINDOWS if device == "cuda" else 32]]
    recipe = RECIPES[options.model]
    trained = train(
        model,
        recipe,
        torch.from_numpy(data.tokens.astype("int32")),
        some_windows,
        minutes=minutes,
        steps=steps,
        batch=batch,
        seed=options.seed,
        save=lambda: save_model(model, data.tokenizer, options.out),
    )
    record = {
        "model": options.model,
        "held_out": measure(options.out, every_window if device == "cuda" else some_windows, device),
        "recipe": {
            **asdict(recipe),
            "batch": batch,
            "context": CONTEXT,
            "warm_up_steps": WARM_UP_STEPS,
            "weight_decay": WEIGHT_DECAY,
            **({"minutes": minutes} if steps is None else {"tokens": steps * batch * CONTEXT}),
            "seed": options.seed,
        },
        "training": {**trained, "prepare_seconds": round(prepared, 1)},
        "text": data.facts,
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores",
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "README.md").write_text(model_card(record))
    held_out = record["held_out"]
    print(
        f"{time.monotonic() - start:6.0f} s  saved {options.out}: {held_out['weight_bytes'] / 1e6:.2f} MB, "
        f"held-out perplexity {held_out['perplexity']:.3f}, {held_out['bits_per_byte']:.4f} bits/byte",
        flush=True,
    )
    return record


def use_causal_attention(model: Any) -> None:
    """Scaled dot-product attention with its own causal mask, never a materialised one that would exclude flash."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal", sdpa_attention_forward)  # no mask function: transformers makes no mask
    model.set_attn_implementation("causal")


if __name__ == "__main__":
    sys.exit(main())
