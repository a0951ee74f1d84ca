"""The model card of a reference model, written from its training record."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "reference": "Llama: 8 layers, hidden size 256, SwiGLU with 704 neurons, 8 heads, 4 key-value heads",
    "reference-relu": "OPT: 5 layers, hidden size 256, ReLU with 896 neurons, 8 heads, learned positions",
    "reference-spark": "Spark Transformer (arXiv 2506.06644) as large as `reference`: 8 layers, hidden size 256, 1056 "
    "FFN neurons of which the first 128 channels choose 8 %, 8 heads, 4 key-value heads, 64 attended tokens",
}


def model_card(record: dict[str, Any]) -> str:
    """The card in Markdown with YAML front matter; `record` is what `training.json` holds."""
    name, held_out, text = record["model"], record["held_out"], record["text"]
    training, recipe, machine = record["training"], record["recipe"], record["machine"]
    length = f"--minutes {recipe['minutes']:g}" if "minutes" in recipe else f"--tokens {recipe['tokens']}"
    stored = "bfloat16" if held_out["weight_bytes"] > 1.5 * held_out["parameters"] else "8 bits"
    packages = "\n".join(f"| {package} | {version} | {license} |" for package, version, license in text["packages"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [code, en]
tags: [python, activation-sparsity, benchmark]
---

# {name}

A small language model of Python code, for comparing activation-sparsity methods where no other weights can be had.
It is an instrument, not an assistant: it completes Python code and documentation, poorly.

{ARCHITECTURES[name]}; tied embeddings, byte-level BPE of 4096 tokens, context {recipe["context"]};
{held_out["parameters"]:,} parameters, {held_out["weight_bytes"] / 1e6:.1f} MB in {stored}.

| held-out text | |
| --- | --- |
| perplexity | {held_out["perplexity"]:.3f} per token |
| bits per byte | {held_out["bits_per_byte"]:.4f} |
| tokens scored | {held_out["tokens"]:,} in windows of {held_out["window"]}, no overlap, {held_out["dtype"]} |

The held-out text is the evaluation split of `harness/corpus.py`: whole modules of the standard library. Training text
that shares eight consecutive lines with the evaluation or calibration split was left out.

## Training

{training["steps"]:,} steps of {recipe["batch"]} x {recipe["context"]} tokens
({training["tokens_seen"] / 1e6:.1f} M tokens, {training["epochs"]} epochs) in {training["seconds"]:.0f} s
on {machine["device"]}.
{" and ".join(training["optimizers"])}, peak rates {recipe["rate"]} and {recipe["matrix_rate"]}, seed {recipe["seed"]},
weight decay {recipe["weight_decay"]} on matrices.
Python {machine["python"]}, torch {machine["torch"]}, transformers {machine["transformers"]}.
`training.json` has the loss curve. To train it again:

    python -m harness.reference.train --model {name} {length} --out DIR

The result depends on the Python packages of the machine and on its speed.

## Text

{text["bytes"] / 1e6:.1f} MB in {text["documents"]:,} files, {text["tokens"] / 1e6:.2f} M tokens,
hash `{text["training_text_hash"]}`: Python's standard library ({machine["python"]}, PSF-2.0) and the Python sources of
these packages, each under a permissive licence:

| package | version | licence |
| --- | --- | --- |
{packages}
"""
