"""A hundred mistakes of users: what is wrong, and how to make it.

test_mistakes.py makes each in a small project and compares the answer with docs/errors.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mistake_changes import (
    Mistake,
    copy_recipe,
    edit_json,
    edit_recipe,
    edit_weights,
    evaluated_student,
    in_order,
    move_into,
    overrides,
    remove,
    truncate,
    write,
    write_null,
)


def _item(**values: Any) -> str:
    return json.dumps({"query": "The cat", "choices": [" sat", " ran"], "gold": 0} | values) + "\n"


def _chat(*messages: dict[str, str]) -> str:
    return json.dumps({"messages": messages}) + "\n"


USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
CHATS = ("data.source=chats.jsonl", "data.chat_field=messages")
MARKED = """\
{% for message in messages %}{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}{% endfor %}
"""
UP = "model.layers.1.mlp.up_proj.weight"
TASK = ("evaluate.tasks={animals: animals.jsonl}",)
REMOTE = ("teacher.placement=remote",)

MISTAKES: dict[str, list[Mistake]] = {
    "Command line": [
        Mistake("The recipe does not exist", recipe="nowhere.yaml"),
        Mistake("The recipe is a folder", recipe="model"),
        Mistake("An override without a value", ("distill.steps",)),
        Mistake("An override with a space before the equals sign", ("distill.steps", "=50")),
        Mistake("An override with a quotation mark that is not closed", ('output="runs',)),
        Mistake("An override with text after its value", ('output="runs" #2',)),
        Mistake("An override of an element that the list does not have", ("data.train[7]=text",)),
        Mistake("--world without --dry-run", ("--world", "8"), dry_run=False),
        Mistake("A stage that this recipe does not have", command="correct"),
        Mistake("A setting that may not change during a run", ("--accept", "precision")),
        Mistake("A checkpoint that does not exist", ("distill", "100"), command="rewind", dry_run=False),
        Mistake("A stage whose inputs do not exist yet", command="prune", dry_run=False),
    ],
    "Recipe": [
        Mistake("The file is empty", change=write("recipe.yaml", "")),
        Mistake("The file contains a list", change=write("recipe.yaml", "- model\n- output\n")),
        Mistake(
            "A tab in the indentation", change=write("recipe.yaml", "model: model\ndata:\n\tsource: text\n")
        ),
        Mistake("A key that occurs twice", change=write("recipe.yaml", "model: a\nmodel: b\noutput: out\n")),
        Mistake("Latin-1 text", change=write("recipe.yaml", b"model: caf\xe9\noutput: out\n")),
        Mistake("A control character", change=write("recipe.yaml", "model: model\noutput: out\x07\n")),
        Mistake("Only a number", change=write("recipe.yaml", "2024\n")),
        Mistake("A placeholder instead of a value", ("output=???",)),
        Mistake("A variable that is not defined", ("output=${runs}/one",)),
        Mistake("Without model and output", change=write("recipe.yaml", "seed: 1\n")),
        overrides("A key with a typing error", "distill.stepz=50"),
        overrides("A section with a typing error", "destill.steps=50"),
        overrides("A key in the wrong section", "distill.sequence_length=64"),
        overrides("A text instead of a number", "distill.steps=many"),
        overrides("A boolean instead of a number", "distill.steps=yes"),
        overrides("A list instead of a path", "output=[runs, one]"),
        overrides("A fraction of a step", "distill.steps=10.5"),
        overrides("A negative seed", "seed=-1"),
        overrides("A precision that does not exist", "precision=fp16"),
        overrides("A divergence that does not exist", "distill.divergence=kl"),
        overrides("A section that contains a number", "distill=100"),
        overrides("A learning rate of 0", "distill.lr=0"),
        overrides("More warm-up steps than steps", "distill.warmup_steps=60"),
        overrides("A WSD schedule without decay steps", "distill.schedule=wsd"),
        overrides("Decay steps of another schedule", "distill.decay_steps=5"),
        overrides("Gradients in bf16 of a float32 model", "distill.gradient_precision=bf16"),
        overrides("Ranges of skipped batches that overlap", "distill.skip_batches=[[3, 5], [5, 9]]"),
        overrides("An experiment tracker whose package is not installed", "log.mlflow=minitron"),
        overrides("An empty output", "output=''"),
    ],
    "Rounds": [
        Mistake("A round that the recipe does not have", ("--round", "wide"), command="distill"),
        Mistake(
            "A stage that a round does not have, because it does not prune",
            ("--round", "more", "rounds.more.distill.steps=50"),
            command="prune",
        ),
        overrides("A round with a typing error in a section", "rounds.more.distil.steps=50"),
        overrides("A round with a typing error in a key", "rounds.more.distill.stepz=50"),
        overrides("A round with the name of the first one", "rounds.first.distill.steps=50"),
        overrides("A round whose name is no folder name", "rounds={a/b: {}}"),
        overrides("A round with another teacher", "rounds.more.teacher.model=model"),
        overrides(
            "A round with two kinds of sizes",
            "rounds.more={target: {keep: 0.5}, search: {parameters: 60000}}",
        ),
        overrides("A round that enlarges the student", "rounds.more.target.hidden_size=64"),
        overrides(
            "A round with longer samples than the model has positions", "rounds.more.data.sequence_length=256"
        ),
        overrides(
            "Hidden states in a second round", "distill.states.layers={0: 0}", "rounds.more.distill.steps=50"
        ),
        overrides(
            "Rounds with a teacher that is trained during distillation",
            "correct={steps: 10, warmup_steps: 2, when: during, global_batch_size: 4, micro_batch_size: 2}",
            "rounds.more.distill.steps=50",
        ),
    ],
    "Model folder": [
        overrides("The folder does not exist", "model=nowhere"),
        overrides("A name on the hub instead of a folder", "model=meta-llama/Llama-3.1-8B"),
        overrides("A file instead of a folder", "model=model/config.json"),
        overrides("A folder without a model", "model=text"),
        Mistake("A cache of the hub", ("model=hub",), move_into("hub/snapshots/0123")),
        Mistake("config.json is cut off", change=truncate("model/config.json", 100)),
        Mistake("config.json is a list", change=write("model/config.json", "[]")),
        Mistake("config.json without model_type", change=edit_json("model/config.json", model_type=None)),
        Mistake(
            "A family that is not supported",
            change=edit_json("model/config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ),
        Mistake("config.json without a size", change=edit_json("model/config.json", hidden_size=None)),
        Mistake("A text instead of an id", change=edit_json("model/config.json", eos_token_id="2")),
        Mistake(
            "A null that transformers does not read", change=write_null("model/config.json", "use_cache")
        ),
        Mistake("Sizes of another model", change=edit_json("model/config.json", hidden_size=72)),
        Mistake("More layers than weights", change=edit_json("model/config.json", num_hidden_layers=5)),
        Mistake("Fewer layers than weights", change=edit_json("model/config.json", num_hidden_layers=3)),
        Mistake(
            "An activation that is not supported", change=edit_json("model/config.json", hidden_act="relu6")
        ),
        Mistake(
            "Biases that the weights do not have", change=edit_json("model/config.json", attention_bias=True)
        ),
        Mistake(
            "An untied output layer without weights",
            change=edit_json("model/config.json", tie_word_embeddings=False),
        ),
        Mistake(
            "Rotary scaling that is not supported",
            change=edit_json("model/config.json", rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        ),
        Mistake(
            "Quantized weights",
            change=edit_json("model/config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ),
        Mistake("Without weights", change=remove("model/model.safetensors"), dry_run=False),
        Mistake(
            "A shard without its index",
            change=lambda project: (project / "model/model.safetensors").rename(
                project / "model/model-00001-of-00002.safetensors"
            ),
        ),
        Mistake("The weights are cut off", change=truncate("model/model.safetensors", 100_000)),
        Mistake(
            "The weights are a Git LFS pointer",
            change=write(
                "model/model.safetensors",
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            ),
        ),
        Mistake("A tensor is missing", change=edit_weights(lambda tensors: tensors.pop(UP))),
        Mistake(
            "A tensor is transposed",
            change=edit_weights(lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()})),
        ),
        Mistake(
            "A tensor of integers",
            change=edit_weights(lambda tensors: tensors.update({UP: tensors[UP].char()})),
        ),
        Mistake(
            "A weight is NaN",
            command="import",
            dry_run=False,
            change=edit_weights(lambda t: t[UP][0].fill_(float("nan"))),
        ),
        Mistake(
            "The index names a file that is missing",
            change=in_order(
                remove("model/model.safetensors"),
                write(
                    "model/model.safetensors.index.json",
                    json.dumps({"weight_map": {UP: "model-00001-of-00002.safetensors"}}),
                ),
            ),
        ),
    ],
    "Tokenizer": [
        Mistake("Without a tokenizer", change=remove("model/tokenizer.json")),
        Mistake("tokenizer.json is cut off", change=truncate("model/tokenizer.json", 500)),
        Mistake(
            "A class in a Python file",
            change=in_order(
                edit_json(
                    "model/tokenizer_config.json",
                    tokenizer_class="MyTok",
                    auto_map={"AutoTokenizer": ["tokenization_my.MyTok", None]},
                ),
                remove("model/tokenizer.json"),
            ),
        ),
        Mistake(
            "A chat template in UTF-16",
            change=write("model/chat_template.jinja", "{{ messages }}".encode("utf-16")),
        ),
        overrides("The folder does not exist", "data.tokenizer=nowhere"),
        overrides("A folder without a tokenizer", "data.tokenizer=text"),
        Mistake(
            "A file that is no sentencepiece model",
            ("data.tokenizer=own.model",),
            write("own.model", "no model"),
        ),
    ],
    "Text": [
        overrides("The folder does not exist", "data.source=nowhere"),
        Mistake("An empty folder", ("data.source=empty",), lambda project: (project / "empty").mkdir()),
        Mistake("A folder without text", ("data.source=images",), write("images/a.png", b"\x89PNG\r\n")),
        Mistake("A file of another kind", ("data.source=text.csv",), write("text.csv", "a,b\n")),
        Mistake("A share that does not exist", ("--shard", "0/16"), command="data", dry_run=False),
        Mistake("A share before the model is imported", ("--shard", "1/16"), command="data", dry_run=False),
        Mistake("No worker", ("data.workers=0",)),
        Mistake("An empty file", ("data.source=empty.txt",), write("empty.txt", "")),
        Mistake(
            "Chats instead of text",
            ("data.source=chats.jsonl",),
            write("chats.jsonl", '{"messages": [{"role": "user", "content": "Hello"}]}\n'),
        ),
        Mistake(
            "A field of chats that no record has",
            ("data.chat_field=messages", "data.chat_template=chat.jinja"),
            write("chat.jinja", MARKED),
        ),
        Mistake(
            "Chats for a tokenizer without a chat template", CHATS, write("chats.jsonl", _chat(USER, ANSWER))
        ),
        Mistake(
            "A chat template that does not mark the text of the assistant",
            CHATS,
            in_order(
                write("chats.jsonl", _chat(USER, ANSWER)),
                write("model/chat_template.jinja", "{{ messages }}"),
            ),
        ),
        Mistake(
            "A chat without an answer",
            (*CHATS, "data.chat_template=chat.jinja"),
            in_order(write("chats.jsonl", _chat(USER)), write("chat.jinja", MARKED)),
        ),
        Mistake(
            "A chat with other names for role and content",
            (*CHATS, "data.chat_template=chat.jinja"),
            in_order(
                write("chats.jsonl", _chat({"from": "human", "value": "Hello"})), write("chat.jinja", MARKED)
            ),
        ),
        Mistake(
            "A chat template that does not exist",
            (*CHATS, "data.chat_template=nowhere.jinja"),
            write("chats.jsonl", _chat(USER, ANSWER)),
        ),
        overrides("A chat template without a field of chats", "data.chat_template=chat.jinja"),
        Mistake("Lines that are strings", ("data.source=a.jsonl",), write("a.jsonl", '"The cat sat."\n')),
        Mistake("A .bin file without its .idx file", ("data.source=tokens",), write("tokens.bin", b"\0" * 8)),
        Mistake(
            "An .idx file that is none",
            ("data.source=tokens",),
            in_order(write("tokens.bin", b"\0" * 8), write("tokens.idx", b"nothing")),
        ),
        Mistake(
            "data.train without data.valid", ("data.train=[text]",), edit_recipe(data={"sequence_length": 32})
        ),
        overrides("data.source together with data.train", "data.train=[text]", "data.valid=[text]"),
        Mistake(
            "A blend with a share that is not a number",
            ("data.calibration=[text]", "data.train={text: most}", "data.valid=[text]"),
            edit_recipe(data={"sequence_length": 32}),
        ),
        Mistake(
            "A blend that lists a text twice",
            ("data.calibration=[text]", "data.train={text: 3, ./text: 1}", "data.valid=[text]"),
            edit_recipe(data={"sequence_length": 32}),
        ),
        overrides("A document mask without the local layers", "data.document_mask=true"),
        overrides("The standard library with other text", "data.source=[python-stdlib, text]"),
        Mistake(
            "A text too small for three parts",
            ("data.source=a.txt",),
            write("a.txt", "The cat sat on the mat.\n" * 250),
        ),
        overrides("Held-out text that does not exist", "data.held_out={news: [nowhere]}"),
        overrides("Samples longer than the model's positions", "data.sequence_length=256"),
        overrides("A held-out part of more than half", "data.valid_fraction=0.7"),
    ],
    "Tasks": [
        Mistake("The file does not exist", ("evaluate.tasks={animals: nowhere.jsonl}",)),
        Mistake("An empty file", TASK, write("animals.jsonl", "")),
        Mistake("A line that is no JSON", TASK, write("animals.jsonl", _item() + "{'query': 1}\n")),
        Mistake(
            "An item without an answer",
            TASK,
            write("animals.jsonl", '{"query": "a", "choices": ["b", "c"]}\n'),
        ),
        Mistake("An answer beyond the choices", TASK, write("animals.jsonl", _item(gold=2))),
        Mistake(
            "Choices that are no list",
            TASK,
            write("animals.jsonl", _item(choices={"text": [" sat", " ran"], "label": ["A", "B"]})),
        ),
        Mistake("A single choice", TASK, write("animals.jsonl", _item(choices=[" sat"]))),
        overrides("Choice of layers by a task without a task", "depth.method=drop", "depth.metric=task"),
    ],
    "Layout": [
        overrides("Tensor parallel size that does not divide the heads", "parallel.tp=3"),
        overrides("More pipeline stages than layers", "parallel.pp=8"),
        overrides("Layers that the pipeline stages do not divide", "parallel.pp=2", "parallel.vpp=4"),
        overrides("Stages with more layers than the student", "parallel.pp=2", "parallel.layers=[2, 3]"),
        overrides("Layers of another number of stages", "parallel.pp=2", "parallel.layers=[1, 1, 1]"),
        overrides("Sequence parallelism without tensor parallelism", "parallel.sequence_parallel=true"),
        overrides("Context parallelism of an odd sequence", "parallel.cp=2", "data.sequence_length=30"),
        Mistake("A number of ranks that is no multiple", ("parallel.tp=2", "--world", "3")),
        overrides("A global batch that is no multiple", "distill.micro_batch_size=3"),
        Mistake("A global batch that is too small for the ranks", ("--world", "8")),
        overrides("Calibration samples that are no multiple", "score.num_samples=7"),
    ],
    "Target": [
        overrides("A student larger than the teacher", "target.hidden_size=128"),
        overrides("More layers than the teacher", "target.num_layers=9"),
        overrides("A width that is not aligned", "target.hidden_size=40"),
        overrides("Heads that the query groups do not divide", "target.num_attention_heads=5"),
        overrides("Query groups that tp does not divide", "target.num_query_groups=1", "parallel.tp=2"),
        overrides(
            "A layer to drop that does not exist", "target.num_layers=null", "target.drop_layers=[1, 9]"
        ),
        overrides("Number of layers and layers to drop", "target.drop_layers=[1]"),
        overrides("Sizes and a budget", "target.keep=0.5"),
        Mistake("A budget that is too small", change=edit_recipe(target={"keep": 0.01})),
        Mistake("A budget that is no number", change=edit_recipe(target={"max_parameters": "8 billion"})),
        Mistake("An axis that does not exist", change=edit_recipe(target={"keep": 0.5, "axes": ["heads"]})),
        overrides("All layers are protected", "depth.protect_first=2", "depth.protect_last=2"),
        Mistake(
            "Merged heads without fewer heads",
            change=edit_recipe(target={"hidden_size": 48, "merge_heads": True}),
        ),
        overrides("Search with sizes in target", "search.parameters=100000"),
        Mistake("Search without a budget", ("search.finalists=2",), edit_recipe(target={})),
        Mistake(
            "A budget of search that no candidate meets", ("search.parameters=1000",), edit_recipe(target={})
        ),
        overrides("An export family that computes another function", "export.family=qwen3"),
    ],
    "Distillation": [
        overrides("Top-k logits of a colocated teacher", "teacher.payload=topk"),
        overrides(
            "More top-k tokens than the vocabulary", *REMOTE, "teacher.payload=topk", "teacher.top_k=4000"
        ),
        overrides("The teacher is the pruned model", "teacher.model=model"),
        overrides("The teacher does not exist", "teacher.model=nowhere"),
        overrides("Ranks of a colocated teacher", "teacher.ranks=2"),
        overrides("Both ranks and student_ranks", *REMOTE, "teacher.ranks=2", "teacher.student_ranks=2"),
        overrides("A recipe of a sibling that does not exist", *REMOTE, "teacher.siblings={nowhere.yaml: 1}"),
        Mistake(
            "A sibling with the same output",
            (*REMOTE, "teacher.siblings={other.yaml: 1}"),
            lambda project: (project / "other.yaml").write_text((project / "recipe.yaml").read_text()),
        ),
        overrides("No loss at all", "distill.kl_weight=0"),
        overrides("A hidden state that does not exist", "distill.states.layers={0: 0, 9: 3}"),
        overrides("FP8 in an fp32 run", "distill.fp8=tensorwise"),
        overrides(
            "FP8 sizes that are no multiple of 16",
            "precision=bf16",
            "distill.fp8=tensorwise",
            "target.ffn_hidden_size=88",
            "target.align=8",
        ),
        overrides("A trace of steps in the wrong order", "distill.profile.steps=[9, 3]"),
        overrides("Validations between the checkpoints", "distill.valid_interval=4"),
        overrides("Patience without validations", "distill.patience=3"),
        overrides(
            "Early stop with a remote teacher", *REMOTE, "distill.valid_interval=6", "distill.patience=3"
        ),
        overrides("Kept steps that have no checkpoint", "distill.keep_every=10"),
        Mistake("A step that was not saved", ("--step", "12"), command="export", dry_run=False),
        Mistake("The best step without validations", ("--step", "best"), command="evaluate", dry_run=False),
        overrides(
            "More steps of correction than of distillation",
            "correct={when: during, steps: 90, warmup_steps: 1}",
        ),
    ],
    "Output": [
        Mistake("The output is a file", ("output=recipe.yaml",), dry_run=False),
        Mistake("The output is read-only", ("output=/proc/run",), dry_run=False),
        Mistake(
            "A folder of the user where an artifact belongs",
            change=write("out/student/thesis.txt", "mine"),
            dry_run=False,
        ),
        Mistake("A file of the user where an artifact belongs", change=write("out/plan.json", '{"mine": 1}')),
        Mistake("Files of the user in an artifact", change=evaluated_student),
        Mistake(
            "The recipe lies where an artifact belongs",
            recipe="out/data/recipe.yaml",
            change=copy_recipe("out/data/recipe.yaml"),
        ),
        Mistake("A damaged artifact", change=write("out/teacher/manifest.json", "{"), dry_run=False),
        Mistake(
            "An artifact of an old version",
            change=write("out/teacher/manifest.json", '{"format": 1, "stage": "import"}'),
            dry_run=False,
        ),
        Mistake(
            "The model lies where an artifact belongs",
            ("model=out/student_hf",),
            lambda project: (
                (project / "out").mkdir() or (project / "model").rename(project / "out" / "student_hf")
            ),
        ),
    ],
}


def all_mistakes() -> Iterator[tuple[str, Mistake]]:
    """(area, mistake) in the order of the page."""
    for area, mistakes in MISTAKES.items():
        for mistake in mistakes:
            yield area, mistake
