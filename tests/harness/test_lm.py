"""lm-eval on a model in memory: the numbers are lm-eval's own, and the sparse positions are those of decoding."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from harness import accuracy
from harness.corpus import Corpus, load_corpus
from harness.lm import SparseLM
from methods.artifact import fingerprint
from methods.base import Attachment, Method, SparseModel
from methods.errors import UsageError
from methods.families import blocks, cached
from methods.registry import create
from sparse_kernels.layers import SparseLinear

WORDS = "the cat sat on a mat while one old dog ran to two men who had not seen it before in that town".split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="</s>", pad_token="<pad>")


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "opt":
        made: nn.Module = OPTForCausalLM(OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3))
    elif family == "mistral":
        made = MistralForCausalLM(
            MistralConfig(**shape, intermediate_size=64, num_key_value_heads=2, sliding_window=8, initializer_range=0.3)
        )
    else:
        made = LlamaForCausalLM(
            LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=2, initializer_range=0.3)
        )
    return made.eval()


@pytest.fixture(scope="module", params=["llama", "opt", "mistral"])
def any_model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    return build_model(request.param, tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    return build_model("llama", tokenizer)


class Halved(Method):
    """Drops every input of magnitude below 0.5: enough to change every logit."""

    name = "halved"

    def attach(self, attachment: Attachment) -> None:
        for block in blocks(attachment.model):
            for site, linear in block.linears.items():
                layer = SparseLinear(linear, torch.tensor([0.5]), site, block.index, attachment.phase, attachment.meter)
                attachment.replace(f"{block.path}.{block.layout.linears[site]}", layer)


@pytest.fixture(params=["decode", "all", "last-50%"])
def handle(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[SparseModel]:
    method = Halved()
    attached = SparseModel(model, method.artifact(model, 0.5, {}, {}), method, request.param)
    yield attached
    attached.remove()


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, args, i, (kind, i, 1)) for i, args in enumerate(arguments)]


def choice_requests(items: int, seed: int = 0) -> list[Instance]:
    """Four choices to an item, contexts of very different length, one empty and one longer than the model allows."""
    rng = random.Random(seed)
    contexts = ["", text(rng, 150, 150), *(text(rng, 1, 25) for _ in range(items - 2))]
    return requests("loglikelihood", [(c, " " + text(rng, 1, 6)) for c in contexts for _ in range(4)])


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_loglikelihoods_are_those_of_lm_eval(
    any_model: nn.Module, tokenizer: PreTrainedTokenizerFast, batch: int
) -> None:
    plain = HFLM(any_model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    asked = choice_requests(9)
    ours = SparseLM(any_model, tokenizer=tokenizer, batch_size=batch).loglikelihood(asked)
    theirs = plain.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5, abs=1e-4)


def test_a_continuation_that_merges_into_the_context_is_still_scored(model: nn.Module) -> None:
    merging = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>", pad_token="</s>")
    lm = SparseLM(model, tokenizer=tokenizer)
    assert lm._encode_pair("aa", "b") == ([1, 1], [2])
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", [("aa", "b")]))
    assert value < 0


def test_rolling_loglikelihoods_are_those_of_lm_eval(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(3)
    asked = requests("loglikelihood_rolling", [(text(rng, 5, 200),) for _ in range(4)])
    ours = SparseLM(model, tokenizer=tokenizer, batch_size=3).loglikelihood_rolling(asked, disable_tqdm=True)
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3, logits_cache=False).loglikelihood_rolling(
        asked, disable_tqdm=True
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_generation_is_greedy_as_in_transformers(
    any_model: nn.Module, tokenizer: PreTrainedTokenizerFast, batch: int
) -> None:
    rng = random.Random(4)
    prompts = [text(rng, 1, 20) for _ in range(7)]
    stops = [{"until": ["\n", "e "], "max_gen_toks": 12, "do_sample": False} for _ in prompts]
    lm = SparseLM(any_model, tokenizer=tokenizer, batch_size=batch)
    ours = lm.generate_until(requests("generate_until", list(zip(prompts, stops, strict=True))))
    for prompt, mine in zip(prompts, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = any_model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in ("\n", "e "):
            expected = expected.split(stop)[0]
        assert mine == expected


def test_lambada_prompt_scores_as_in_lm_eval(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The packaged LAMBADA task on local data, through a YAML file, against plain simple_evaluate."""
    import lm_eval

    rng = random.Random(5)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text(rng, 3, 30)}) for _ in range(24)))
    packaged = Path(lm_eval.__file__).parent / "tasks/lambada/lambada_openai.yaml"
    yaml = tmp_path / "lambada_local.yaml"
    yaml.write_text(
        f"include: {packaged}\ntask: lambada_local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    test: {rows}\n"
    )
    plain = HFLM(model, tokenizer=tokenizer, batch_size=4, logits_cache=False)
    expected = lm_eval.evaluate(plain, accuracy._load(str(yaml), None, 0), limit=20, bootstrap_iters=0)["results"][
        "lambada_local"
    ]

    scores, items = accuracy.evaluate(model, tokenizer, None, "decode", [str(yaml)], 20, 4)
    score = scores[str(yaml)]
    assert (score["metric"], score["n"], score["chance"], score["higher_is_better"]) == ("acc", 20, 0.0, True)
    assert score["value"] == expected["acc,none"]
    assert len(items[str(yaml)]) == 20

    ours = lm_eval.evaluate(
        SparseLM(model, tokenizer=tokenizer, batch_size=4),
        accuracy._load(str(yaml), None, 0),
        limit=20,
        bootstrap_iters=0,
    )["results"]["lambada_local"]
    assert ours["perplexity,none"] == pytest.approx(expected["perplexity,none"], rel=1e-5)


@torch.inference_mode()
def decode_score(handle: SparseModel, lm: SparseLM, context: str, continuation: str) -> float:
    """The definition: prefill all but the last context token, then feed one token at a time."""
    from transformers import DynamicCache

    left, right = lm._encode_pair(context, continuation)
    prompt, steps = left[:-1], [left[-1], *right[:-1]]
    cache = DynamicCache()
    if prompt:
        sparse = round(len(prompt) * handle.fraction)
        with handle.positions(torch.arange(len(prompt))[None] >= len(prompt) - sparse):
            handle.model(input_ids=torch.tensor([prompt]), **cached(handle.model, cache))
    total = 0.0
    for step, target in zip(steps, right, strict=True):
        logits = handle.model(input_ids=torch.tensor([[step]]), **cached(handle.model, cache)).logits[0, -1]
        total += float(logits.log_softmax(-1)[target])
    return total


def test_continuations_are_scored_as_they_are_decoded(
    handle: SparseModel, model: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(6)
    pairs = [(c, " " + text(rng, 1, 5)) for c in (text(rng, 1, 14) for _ in range(5)) for _ in range(3)]
    lm = SparseLM(model, mode=handle.mode, handle=handle, tokenizer=tokenizer, batch_size=6)
    ours = [value for value, _ in lm.loglikelihood(requests("loglikelihood", pairs))]
    assert ours == pytest.approx([decode_score(handle, lm, *pair) for pair in pairs], rel=1e-4)
    with handle.dense():
        dense = [decode_score(handle, lm, *pair) for pair in pairs]
    assert max(abs(a - b) for a, b in zip(ours, dense, strict=True)) > 0.1


def test_generation_is_sparse_as_in_decoding(
    handle: SparseModel, model: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(7)
    prompts = [text(rng, 2, 12) for _ in range(4)]
    asked = requests("generate_until", [(p, {"until": ["\n"], "max_gen_toks": 8}) for p in prompts])
    together = SparseLM(model, mode=handle.mode, handle=handle, tokenizer=tokenizer, batch_size=4)
    alone = SparseLM(model, mode=handle.mode, handle=handle, tokenizer=tokenizer, batch_size=1)
    assert together.generate_until(asked) == alone.generate_until(asked)


def test_what_chooses_for_a_batch_is_scored_for_each_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of one-token steps too: Polar's neurons, of which a batch that decodes together would run more."""
    rng, opt = random.Random(8), build_model("opt", tokenizer)
    method = create("polar", {})
    artifact = method.synthesize(opt, 0.5, torch.randint(len(tokenizer), (2, 32)))
    attached = SparseModel(opt, artifact, method)
    try:
        pairs = [(text(rng, 2, 12), " cat") for _ in range(8)]
        prompts = [(text(rng, 4, 8), {"until": ["\n"], "max_gen_toks": 8}) for _ in range(8)]
        answers = []
        for size in (1, 8):
            lm = SparseLM(opt, handle=attached, tokenizer=tokenizer, batch_size=size)
            assert all(len(lm._encode_pair(*pair)[1]) == 1 for pair in pairs)
            scores = [value for value, _ in lm.loglikelihood(requests("loglikelihood", pairs))]
            answers.append((scores, lm.generate_until(requests("generate_until", prompts))))
        assert answers[0][0] == pytest.approx(answers[1][0], rel=1e-4) and answers[0][1] == answers[1][1]
        steps, seen = torch.tensor([[5], [6], [7], [8]]), []
        for apart in (False, True):
            with attached.positions(True, apart=apart), attached.meter.apart() as meter, meter.on():
                opt(input_ids=steps, use_cache=False)
                seen.append(float(meter.counts["ffn", 1][0].double().mean()))
        assert seen[0] > seen[1]
    finally:
        attached.remove()


def test_padding_and_context_are_not_counted(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    method = Halved()
    attached = SparseModel(model, method.artifact(model, 0.5, {}, {}), method)
    try:
        lm = SparseLM(model, handle=attached, tokenizer=tokenizer, batch_size=7)
        asked = choice_requests(6, seed=8)[4:]
        with attached.meter.on():
            lm.loglikelihood(asked)
        scored = sum(len(lm._encode_pair(*r.args)[1]) for r in asked)
        assert sum(map(len, attached.meter.counts[("q", 0)])) == scored
    finally:
        attached.remove()


def test_an_artifact_folder_is_attached_in_place(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_model("llama", tokenizer)
    null = create("null", {})
    null.artifact(model, None, {}, {}).save_pretrained(tmp_path)
    asked = choice_requests(4)
    dense = SparseLM(model, tokenizer=tokenizer, batch_size=4).loglikelihood(asked)
    before = fingerprint(model)
    lm = get_model("sparse")(pretrained=model, sparsity=str(tmp_path), tokenizer=tokenizer, batch_size=4)
    assert lm.handle is not None and lm.handle.layers()
    assert lm.loglikelihood(asked) == dense
    lm.handle.remove()
    assert fingerprint(model) == before and not any(isinstance(m, SparseLinear) for m in model.modules())


def test_builtin_tasks_run_end_to_end(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIVATION_SPARSITY_CACHE", str(tmp_path))
    chosen = tuple(d for d in load_corpus("stdlib").evaluation if d.name in ("json/decoder.py", "glob.py"))
    corpus = Corpus("stdlib", (), (), chosen)
    long = build_model("llama", tokenizer)
    long.config.max_position_embeddings = 1024
    names = ["stdlib_next_line", "stdlib_identifier", "stdlib_complete_line"]
    scores, items = accuracy.evaluate(long, tokenizer, None, "decode", names, 12, 8, 0, corpus)
    assert list(scores) == names
    for name in names:
        assert scores[name]["n"] == len(items[name]) == 12
        assert scores[name]["value"] == pytest.approx(sum(items[name]) / 12)
        assert scores[name]["chance"] == (0.0 if name == "stdlib_complete_line" else 0.25)
    assert accuracy.evaluate(long, tokenizer, None, "decode", names, 12, 8, 0, corpus) == (scores, items)


def test_groups_are_one_entry(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"q": w, "choices": [" a", " cat"], "gold": 1}) for w in WORDS))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**task, "task": name}))
    (tmp_path / "pair.yaml").write_text(json.dumps({"group": "pair", "task": ["one", "two"]}))
    local = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(accuracy, "manager", lambda defaults: local)
    scores, items = accuracy.evaluate(model, tokenizer, None, "decode", ["pair"], 5, 4)
    assert scores["pair"]["n"] == len(items["pair"]) == 10
    assert scores["pair"]["chance"] == 0.5
    assert scores["pair"]["value"] == sum(items["pair"]) / 10
    assert items["pair"][:5] == items["pair"][5:]


def test_bad_requests_are_usage_errors(model: nn.Module, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mode"):
        SparseLM(model, mode="sometimes", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="batch size"):
        SparseLM(model, tokenizer=tokenizer, batch_size="auto")
    sampled = requests(
        "generate_until", [("the", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 4})]
    )
    with pytest.raises(UsageError, match="sampl"):
        SparseLM(model, tokenizer=tokenizer).generate_until(sampled)
    with pytest.raises(UsageError, match="shorter answers"):
        SparseLM(model, tokenizer=tokenizer).loglikelihood(requests("loglikelihood", [("a", " the" * 200)]))
    yaml = tmp_path / "absent.yaml"
    yaml.write_text("task: absent\ndataset_path: json\ndataset_kwargs:\n  data_files: nowhere.jsonl\n")
    with pytest.raises(UsageError, match="cannot load the data"):
        accuracy.evaluate(model, tokenizer, None, "decode", [str(yaml)], 5, 4)
