"""Scores a model on tasks through lm-eval, and keeps the result of every item so that methods can be paired."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from functools import cache
from typing import Any
from unittest.mock import patch

from methods.errors import UsageError

from .corpus import Corpus, load_corpus
from .tasks import TASKS, is_yaml, manager

PREFERRED = ("exact_match", "acc_norm", "acc")

Scores = dict[str, dict[str, Any]]
Items = dict[str, list[float]]


def evaluate(
    model: Any,
    tokenizer: Any,
    handle: Any,
    mode: str,
    tasks: list[str],
    limit: int | None,
    batch: int,
    seed: int = 0,
    corpus: Corpus | None = None,
) -> tuple[Scores, Items]:
    """({task: metric, value, n, chance, higher_is_better, metrics}, {task: score of each item}) of a model in memory.

    `value` is the metric that tables show and methods are paired on; `metrics` are all that lm-eval computed.

    Built-in tasks are zero-shot and made from the standard library, whatever `corpus` is; others are as lm-eval defines
    them. A group of tasks is one entry, the mean over all its items. Items are the first `limit` of each task, in a
    fixed order. An item's score is 0 or 1 for accuracies, and the negative log-likelihood per unit for perplexities;
    tasks whose metric has no score per item have no items. Raises UsageError when a task or its data cannot be loaded.
    """
    from .lm import SparseLM

    ready = load(tasks, seed, corpus)
    # Log-probabilities in float32: in bfloat16, a sum over a line is coarser than the difference between two choices.
    lm = SparseLM(model, mode=mode, handle=handle, tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")
    scores: Scores = {}
    items: Items = {}
    for name, loaded in ready.items():
        scores[name], answers = _evaluate(lm, name, loaded, limit)
        if answers:
            items[name] = answers
    return scores, items


def load(tasks: Iterable[str], seed: int = 0, corpus: Corpus | None = None) -> dict[str, Any]:
    """lm-eval's objects of each task, with their data. Raises UsageError when these cannot be loaded."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stdlib = corpus if corpus is not None and corpus.name == "stdlib" else None
    return {name: _load(name, stdlib, seed) for name in tasks}


def _evaluate(lm: Any, name: str, loaded: Any, limit: int | None) -> tuple[dict[str, Any], list[float]]:
    from lm_eval import evaluator

    try:
        with patch("lm_eval.api.task.tqdm", lambda docs, **_: docs):  # a bar that nothing else switches off
            found = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=0)
    except ValueError as error:
        raise UsageError(f"lm-eval cannot run task '{name}' here: {_first_line(error)}") from error
    parts = [_leaf(task, found["results"][leaf], found["samples"][leaf]) for leaf, task in loaded["tasks"].items()]
    if len(parts) == 1:
        return parts[0]
    answers = [score for _, part in parts for score in part]
    metrics = {score["metric"] for score, _ in parts}
    if len(metrics) > 1 or len(answers) < sum(score["n"] for score, _ in parts):
        raise UsageError(f"the tasks of group '{name}' have no common score: give their names instead of the group's.")
    chances = [score["chance"] for score, part in parts for _ in part]
    chance = None if None in chances else sum(chances) / len(chances)
    value = sum(answers) / len(answers)
    return {**parts[0][0], "value": value, "n": len(answers), "chance": chance, "metrics": {}}, answers


def _leaf(task: Any, results: dict[str, Any], samples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[float]]:
    name = next(iter(samples[0]["metrics"])) if samples[0]["metrics"] else ""
    metric = next((m for m in PREFERRED if m in samples[0]["metrics"]), name)
    kept = [s for s in samples if s["filter"] == samples[0]["filter"]]  # the first of the task's answer filters
    answers = [_item(s[metric]) for s in kept]
    score = {
        "metric": metric,
        "value": float(results[f"{metric},{kept[0]['filter']}"]),
        "n": len(kept),
        "chance": _chance(task, metric, kept),
        "higher_is_better": bool(task.higher_is_better()[metric]),
        "metrics": {
            m: float(results[f"{m},{kept[0]['filter']}"]) for m in kept[0]["metrics"] if _plain(results, m, kept)
        },
    }
    return score, [] if None in answers else [a for a in answers if a is not None]


def _plain(results: dict[str, Any], metric: str, kept: list[dict[str, Any]]) -> bool:
    return isinstance(results.get(f"{metric},{kept[0]['filter']}"), int | float)


def _item(value: Any) -> float | None:
    """lm-eval keeps (log-likelihood, weight) for weighted perplexities, and strings or lists for corpus metrics."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
        return -value[0] / value[1]
    return float(value) if isinstance(value, int | float) or hasattr(value, "item") else None


def _chance(task: Any, metric: str, samples: list[dict[str, Any]]) -> float | None:
    if metric not in PREFERRED:
        return None
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    calls = 2 if "acc_mutual_info" in samples[0]["metrics"] else 1  # that metric asks for every choice twice
    return sum(calls / len(s["resps"]) for s in samples) / len(samples)


@cache
def _load(name: str, corpus: Corpus | None, seed: int) -> Any:
    """lm-eval's task objects; kept, because reading their data takes longer than scoring a small model on them."""
    import datasets

    from .tasks.build import config

    datasets.disable_progress_bars()
    random.seed(seed)  # some tasks shuffle with the global generator while they load
    builtin = name in TASKS
    spec = config(name, corpus or load_corpus("stdlib"), TASKS[name].metric, seed) if builtin else name
    try:
        loaded = manager(not builtin and not is_yaml(name)).load([spec])
    except Exception as error:  # the hub's client raises many unrelated types when it is out of reach
        raise UsageError(
            f"cannot load the data of task '{name}' ({_first_line(error)}): check the network, or use the built-in "
            f"tasks ({', '.join(TASKS)}) or an lm-eval YAML file over local data."
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
