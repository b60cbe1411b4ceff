"""The lm-evaluation-harness adapter matches a dense model; its command runs local tasks."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
import reference
import torch
import yaml
from cases import ARCHS, BY_NAME
from tiny import make_model, make_recipe_file, make_text, refused
from tiny import make_tokenizer as make_tiny_tokenizer

from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.errors import InputError
from minitron_mp.report.tables import harness_table

pytest.importorskip("lm_eval")
ARCH, MAX_LENGTH = ARCHS["qwen3"], 22
"""max_length is no multiple of the padded length under context and sequence parallelism."""
PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat ", "ran away"),  # the space moves to the continuation
    ("ca", "tch the cat"),  # a token across the border, "at", is the continuation's no more
    ("", "the end"),
    ("<s>begin", " here"),  # starts with the token that the tokenizer would put before it
    ("a context that is longer than the model is given", " tokens"),
    ("x", "a continuation behind it"[:20]),
    ("the c", "a"),
]
TEXTS = [
    "short",
    "a text that is as long as three windows of the model and a little more, to be sure",
    "the cat sat on the mat in",
]
ENOUGH = {"until": [], "max_gen_toks": 6}
CONTEXTS = ["the cat", "a context that is much longer than what is left of the model's sequence", "", "on"]


def make_tokenizer(folder):
    """A tokenizer of characters and three pairs; each text starts with <s> unless disabled."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    characters, pairs = sorted(set("abcdefghijklmnopqrstuvwxyz ,.'")), [("a", "t"), ("h", "e"), ("o", "n")]
    names = [
        "<s>",
        "</s>",
        *characters,
        *map("".join, pairs),
        *(chr(0x100 + i) for i in range(ARCH.vocab_size - 5 - len(characters))),
    ]
    fast = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, pairs))
    fast.decoder = decoders.Fuse()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dense(results):
    """dense(tokens) -> [s, v] log p of what follows each token."""
    weights = results.weights("qwen3")
    return lambda tokens: torch.log_softmax(
        reference.logits(ARCH, weights, torch.tensor([tokens]))[0, :, : ARCH.vocab_size], -1
    )


def answer(dense, before, asked):
    """Return (sum of log p of the target tokens, whether each is the argmax).

    Long texts are cut on the left.
    """
    log_p = dense((before + asked)[-MAX_LENGTH - 1 :][:-1])[-len(asked) :]
    return log_p.gather(1, torch.tensor(asked)[:, None]).sum().item(), log_p.argmax(1).tolist() == asked


def split(tokenizer, context, continuation):
    if not context:
        return [0], tokenizer.encode(continuation, add_special_tokens=False)
    stripped = context.rstrip()
    special = not context.startswith("<s>")
    whole, head = (
        tokenizer.encode(text, add_special_tokens=special) for text in (context + continuation, stripped)
    )
    return head, whole[len(head) :]


def windows(tokens):
    """Return (context, target) windows: each token is a target once, with maximal context."""
    yield [0], tokens[:MAX_LENGTH]
    for start in range(MAX_LENGTH, len(tokens), MAX_LENGTH):
        yield tokens[:start], tokens[start : start + MAX_LENGTH]


def write(dense, tokenizer, context, stop, eos, count=ENOUGH["max_gen_toks"]):
    """(greedy text behind a context, its tokens)."""
    tokens, made = tokenizer.encode(context)[count - MAX_LENGTH :], []
    while len(made) < count:
        made.append(dense(tokens + made)[-1].argmax().item())
        if made[-1] == eos or (stop and stop in tokenizer.decode(made, skip_special_tokens=True)):
            break
    text = tokenizer.decode([token for token in made if token != eos], skip_special_tokens=True)
    return text.split(stop)[0] if stop else text, made


@pytest.fixture(scope="module")
def asked(dense, tokenizer):
    """Return (requests, answers of the dense model).

    The stop string and the second end of text are what the model generates third.
    """
    free, (*_, third, _, _, _) = write(dense, tokenizer, CONTEXTS[0], None, 1)
    stop, pairs = tokenizer.decode([third]), [*PAIRS, (CONTEXTS[0], free[:2])]
    prompts = [(context, ENOUGH) for context in CONTEXTS] + [
        (CONTEXTS[0], {**ENOUGH, "until": ["never", stop]})
    ]
    stops = [None] * len(CONTEXTS) + [stop]
    want = {
        "pairs": [answer(dense, *split(tokenizer, *pair)) for pair in pairs],
        "texts": [
            sum(answer(dense, *window)[0] for window in windows(tokenizer.encode(text))) for text in TEXTS
        ],
    }
    prompts.append((CONTEXTS[0], {**ENOUGH, "max_gen_toks": 0}))
    want["prompts"] = [
        write(dense, tokenizer, context, stop, 1)[0] for (context, _), stop in zip(prompts, stops)
    ] + [""]
    want["prompt until eos"] = [write(dense, tokenizer, CONTEXTS[0], None, third)[0]]
    assert want["pairs"][-1][1]
    return {"pairs": pairs, "texts": TEXTS, "prompts": prompts, "eos": stop}, want, free


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2-vpp2", "tp2-cp2-sp", "dp2"])
def test_answers_match_dense_model(results, ranks, tokenizer, asked, layout):
    requests, want, free = asked
    case = {
        "arch": ARCH,
        "teacher": results.teacher("qwen3"),
        "folder": tokenizer.name_or_path,
        "max_length": MAX_LENGTH,
    }
    for found in ranks(
        BY_NAME[layout].ranks, "lm_eval_workers.ask", layout=BY_NAME[layout], **case, **requests
    ):
        assert [log_p for log_p, _ in found["pairs"]] == pytest.approx(
            [log_p for log_p, _ in want["pairs"]], rel=1e-5
        )
        assert [greedy for _, greedy in found["pairs"]] == [greedy for _, greedy in want["pairs"]]
        assert found["texts"] == pytest.approx(want["texts"], rel=1e-5)
        assert found["prompts"] == want["prompts"]
        assert found["prompt until eos"] == want["prompt until eos"]
        assert found["cut"] == 2  # a pair and a prompt; windows of a long text are no cuts
    assert want["prompts"][-2] == want["prompt until eos"][0] == free[: free.index(requests["eos"])]


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def test_command_matches_choice_tasks_on_local_files(ranks, tmp_path):
    """On two tensor parallel ranks, of which the first one speaks."""
    make_model(tmp_path / "model")
    make_text(tmp_path / "text", 20)
    items = [
        {"query": f"the {word} and the", "choices": ["student", "loss", "rank"], "gold": i % 3}
        for i, word in enumerate(["prune", "score", "layer", "head", "cut"])
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    files = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.5}}
    files["dataset_kwargs"] = {
        "data_files": {"test": str(tmp_path / "items.jsonl")},
        "cache_dir": str(tmp_path / "cache"),
    }
    for name, about in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": f"local_{name}", **files, **about})
        )
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", tmp_path / "model", tmp_path / "text", tmp_path / "out", parallel={"tp": 2}
    )
    words = [
        "harness",
        str(recipe),
        "--model",
        "teacher",
        "--tasks",
        "local_choices,local_texts",
        "--include-path",
        str(tmp_path / "tasks"),
    ]
    case = {"task": tmp_path / "items.jsonl", "layout": BY_NAME["tp2"], "micro_batch_size": 4}
    ranks(2, "project_workers.minitron", arguments=["import", str(recipe)])
    (done, accuracy, normalised), (silent, *_) = ranks(2, "lm_eval_workers.command", arguments=words, **case)
    assert done.code == silent.code == 0, done
    assert silent.out == silent.err == ""
    (written,) = (tmp_path / "out").glob("harness_teacher_*.json")
    found = json.loads(written.read_text())
    told = harness_table(tmp_path / "out", {"import": tmp_path / "out" / "teacher"})
    error = found["results"]["local_choices"]["acc_stderr,none"]
    assert (
        "teacher",
        "32",
        "",
        "local_choices",
        "1.5",
        "0",
        "5",
        "acc",
        f"{accuracy:.4f}",
        f"{error:.4f}",
    ) in told.rows
    assert harness_table(tmp_path / "out", {}) is None  # of a model that this recipe does not have
    manifest = json.loads((tmp_path / "out" / "teacher" / "manifest.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(
        json.dumps({**manifest, "inputs": {"model": "another"}})
    )
    assert harness_table(tmp_path / "out", {"import": tmp_path / "other"}) is None  # of what was there before
    assert found["results"]["local_choices"]["acc,none"] == accuracy
    assert found["results"]["local_choices"]["acc_norm,none"] == normalised
    assert found["results"]["local_choices"]["acc_stderr,none"] == pytest.approx(
        (accuracy * (1 - accuracy) / 4) ** 0.5
    )
    assert found["results"]["local_texts"]["word_perplexity,none"] > 1
    assert (found["versions"]["local_choices"], found["n-samples"]["local_choices"]["effective"]) == (1.5, 5)
    assert found["configs"]["local_choices"]["doc_to_choice"] == "choices"
    assert found["manifest"]["settings"]["tasks"] == ["local_choices", "local_texts"]
    assert re.search(rf"\bacc . +{accuracy:.4f}", done.out)
    said = [
        (
            ["--model", "best"],
            "--model best: this recipe has no such model; give one of teacher, pruned, distilled",
        ),
        (["--model", "distilled"], "student_distilled is missing; run `minitron-mp distill` first"),
        (["--max-length", "256"], "--max-length 256 is above the model's max_position_embeddings 128"),
        (["--include-path", "nowhere"], "--include-path: there is no folder nowhere"),
        (["--apply-chat-template"], "the tokenizer has no chat template"),
        (["--tasks", ","], "harness needs --tasks"),
    ]
    for more, text in said:
        refused(ranks(2, "project_workers.minitron", arguments=[*words, *more])[0], text)
    (tmp_path / "items.jsonl").unlink()
    refused(
        ranks(2, "project_workers.minitron", arguments=words)[0],
        "the tasks local_choices, local_texts cannot be loaded (FileNotFoundError",
    )


def test_choice_tasks_add_bos_as_lm_eval_does(tokenizer, tmp_path):
    assert load_tokenizer(tokenizer.name_or_path).bos == tokenizer.bos_token_id == 0
    make_tiny_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).bos is None


def test_unsupported_requests_are_rejected(ranks, tokenizer):
    settings = [
        {"do_sample": True},
        {"temperature": 0.7},
        {"num_beams": 4},
        {"repetition_penalty": 1.2},
        {"max_gen_toks": 8},
    ]
    said = ranks(1, "lm_eval_workers.refusals", arch=ARCH, folder=tokenizer.name_or_path, settings=settings)[
        0
    ]
    words = ["needs sampling or beams"] * 3 + [
        "sets repetition_penalty for its generation",
        "8 new tokens leave no room for a context in 8; raise --max-length",
    ]
    for text, word in zip(
        said,
        [
            *words,
            "has a continuation of 23 tokens; the model accepts 8",
            "has a continuation that adds no token",
        ],
    ):
        assert word in text


def test_ranks_with_different_requests_raise(ranks, tokenizer):
    for said in ranks(
        2, "lm_eval_workers.disagree", layout=BY_NAME["dp2"], arch=ARCH, folder=tokenizer.name_or_path
    ):
        assert "the requests of the harness differ between this rank and rank 0" in said


def test_command_without_lm_eval_names_the_package_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "minitron_mp.integrations.lm_eval.sharded_lm", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(InputError, match=r"run `pip install minitron-mp\[eval\]`"):
        importlib.import_module("minitron_mp.integrations.lm_eval.sharded_lm")
