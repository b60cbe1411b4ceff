"""The command line: errors, dry runs, and documented commands."""

from __future__ import annotations

import ast
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cases import ARCHS, BY_NAME
from safetensors.torch import load_file, save_file
from tiny import (
    REQUIREMENTS,
    ROOT,
    STAGES,
    STEPS,
    environment,
    make_model,
    make_recipe_file,
    make_text,
    make_tokenizer,
    minitron,
    refused,
)

import minitron_mp
from minitron_mp import load_recipe
from minitron_mp.cli import app, main
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.planning.memory import rank_parameters

UP_PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    make_model(root / "model")
    make_text(root / "text")
    return root


@pytest.fixture(scope="module")
def recipe(inputs) -> Path:
    return make_recipe_file(inputs / "recipe.yaml", inputs / "model", inputs / "text", inputs / "out")


@pytest.fixture
def model(inputs, tmp_path) -> Path:
    """A copy of the model to damage."""
    return shutil.copytree(inputs / "model", tmp_path / "model")


@pytest.fixture
def on_ranks(ranks):
    """on_ranks(count, words...) runs the command line on pool ranks."""
    return lambda count, *words: ranks(
        count, "project_workers.minitron", arguments=[str(word) for word in words]
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """here(words...) runs the command line in this process; exit code, output, error output."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minitron-mp", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def stage_states(out: str) -> dict[str, str]:
    """Stage -> its state and what differs, from the last table of a dry run."""
    lines = [re.sub(r"[^\x00-\x7f]", " ", line).split() for line in out.splitlines()]
    return {words[0]: " ".join(words[2:]) for words in lines if words and words[0] in STAGES}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distill.stepz=3"], ["unknown key distill.stepz; did you mean steps?"]),
        (["distill"], ["an override must be a dotted key and a value", "- distill"]),
        (["seed=-1"], ["seed: must be 0 or more, given -1"]),
        (["output=''"], ["output: must not be empty"]),
        (["model=nowhere"], ["nowhere is not a folder; give a Hugging Face model folder"]),
        (
            ["parallel.tp=5"],
            [
                f"tensor parallel size 5 does not divide {what}"
                for what in ("num_attention_heads 8", "num_query_groups 2")
            ],
        ),
        (
            ["parallel.tp=5"],
            [
                f"tensor parallel size 5 does not divide {what}"
                for what in ("ffn_hidden_size 128", "padded vocabulary 384")
            ],
        ),
        (["target.hidden_size=128"], ["hidden_size 128 is larger than the teacher's 64"]),
        (
            ["target.hidden_size=40"],
            [
                "hidden_size 40 is not a multiple of 16 (target.align); use 48 (also a multiple of num_att",
            ],
        ),
        (
            ["target.ffn_hidden_size=80", "parallel.tp=2"],
            ["ffn_hidden_size 80 is not a multiple of 32 (target.align 16 x parallel.tp 2); use 64 or 96"],
        ),
        (
            ["target.num_attention_heads=5"],
            ["num_attention_heads 5 is not a multiple of 2 (num_query_groups); use 4 or 6"],
        ),
        (
            ["target.hidden_size=32"],
            [
                "hidden_size 32 is not a multiple of num_attention_heads 6",
                "Llama; use 48, or set export.family: mistral",
            ],
        ),
        (["target={keep: 0.01}"], ["parameters"]),
        (["parallel.pp=4"], ["4 pipeline stages (pp x vpp) for a student of 3 layers"]),
        (
            ["distill.micro_batch_size=3"],
            ["distill.global_batch_size 4 must be a multiple of 3", "nearest 3"],
        ),
        (["export.family=qwen3"], ["qwen3"]),
        (
            ["depth.num_samples=8", "depth.micro_batch_size=4"],
            ["depth.num_samples, depth.micro_batch_size: no effect with depth.method cosine"],
        ),
        (
            [
                "target.num_layers=null",
                "target.drop_layers=[0, 2]",
                "depth.protect_first=1",
                "depth.protect_last=1",
            ],
            [
                "target.drop_layers names 0, which depth.protect_first 1 and protect_last 1 keep; "
                "name other layers, or protect fewer"
            ],
        ),
        (
            ["data.sequence_length=256"],
            ["data.sequence_length 256 is above the model's max_position_embeddings 128"],
        ),
        (
            ["data.source=nowhere", "data.tokenizer=elsewhere"],
            ["data.source: nowhere does not exist", "data.tokenizer: elsewhere does not exist"],
        ),
        (
            ["model=nowhere", "data.source=nowhere2", "distill.micro_batch_size=3"],
            ["nowhere is not a folder", "nowhere2 does not exist", "batch_size 4"],
        ),
        (
            [
                "teacher.placement=cached",
                "teacher.payload=topk",
                "teacher.top_k=4000",
                "distill.divergence=js",
            ],
            ["4000 is above", "divergence js is not defined for teacher.payload topk"],
        ),
        # Mistakes of different kinds are told together, so that there is one round of corrections.
        (
            [
                "parallel.tp=3",
                "parallel.pp=8",
                "distill.micro_batch_size=3",
                "score.num_samples=7",
                "target.hidden_size=40",
                "data.source=nowhere",
            ],
            [
                "size 3 does not divide num_query_groups 2",
                "8 pipeline",
                "global_batch_size 4",
                "num_samples 7",
                "(target.align); use 48",
                "nowhere does not exist",
            ],
        ),
    ],
)
def test_invalid_recipe_is_rejected_before_anything_runs(here, recipe, inputs, overrides, said):
    for flags in ([], ["--dry-run"]):
        refused(here("compress", recipe, *overrides, *flags), *said)
    assert not (inputs / "out").exists()
    assert not torch.distributed.is_initialized()


def test_model_is_never_overwritten(here, recipe, inputs, tmp_path):
    """A student as the next teacher, in the same output."""
    shutil.copytree(inputs / "model", tmp_path / "out" / "student_hf")
    words = [f"model={tmp_path / 'out' / 'student_hf'}", f"output={tmp_path / 'out'}"]
    refused(
        here("compress", recipe, *words),
        "student_hf, which the stage export replaces; copy it out of the output folder",
    )


def test_incompatible_teachers_are_rejected(here, recipe, inputs, model):
    """Another model to distil from than the one that is cut."""
    words = ["--dry-run", f"teacher.model={model}"]
    assert here("compress", recipe, *words)[0] == 0
    refused(
        here("compress", recipe, "--dry-run", f"teacher.model={inputs}/text/../model"),
        "is the folder of model, so it has no effect; remove it",
    )
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    vocab[7], vocab[8] = vocab[8], vocab[7]
    content = {
        **tokenizer,
        "model": {**tokenizer["model"], "vocab": {token: id for id, token in vocab.items()}},
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(
        here("compress", recipe, *words),
        f"the tokenizers of teacher.model and model differ in 2 ids (7 is {vocab[8]!r} in ",
        "give a teacher with the same tokenizer",
    )
    unigram = [[vocab[id], 0.0] for id in sorted(vocab)]
    (model / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": unigram}, "added_tokens": None})
    )
    refused(here("compress", recipe, *words), "differ in 2 ids (7 is ")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    refused(
        here("compress", recipe, *words),
        "data.sequence_length 32 is above max_position_embeddings 16 of teacher.model",
    )
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    refused(
        here("compress", recipe, *words, "parallel.pp=3"),
        "teacher.model: 3 pipeline stages (pp x vpp) for 2 layers",
    )


def test_text_is_checked_before_anything_runs(here, recipe, model, inputs, tmp_path):
    from transformers import AutoTokenizer

    data = shutil.copytree(inputs / "text", tmp_path / "data")
    (data / "README.md").write_text("not text")
    (data / "out").mkdir()
    words = [
        "compress",
        recipe,
        "--dry-run",
        f"data.source={data}",
        f"output={data / 'out'}",
        f"model={model}",
    ]
    code, out, err = here(*words)
    assert (code, err) == (0, "")
    assert f"text that is not used: files of other kinds: 1 ({data}/README.md); output folders of " in out
    (data / "more.jsonl").write_text('{"body": "a <pad> token"}\n')
    refused(
        here(*words), f'{data}/more.jsonl line 1 has no field "text" (its fields: body); set data.text_field'
    )
    words.append("data.text_field=body")
    assert here(*words)[0] == 0

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    unknown = "has the token '<pad>' with id 300, but the model's embedding has 300 rows; remove the token"
    refused(here(*words), f"{data}/more.jsonl line 1 {unknown}")
    (data / "more.jsonl").unlink()
    assert here(*words)[0] == 0
    task = tmp_path / "task.jsonl"
    task.write_text('{"query": "a <pad> b", "choices": ["a", "b"], "gold": 0}\n')
    refused(here(*words, f"evaluate.tasks.mine={task}"), f"evaluate.tasks.mine: {task} line 1 {unknown}")
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(model)
    refused(
        here(*words), "the tokenizer's end-of-document token '<pad>' has id 300, but the model's embedding"
    )
    (model / "tokenizer.json").write_text("{")
    refused(here(*words), f"{model / 'tokenizer.json'} is damaged")
    assert list((data / "out").iterdir()) == []


SEARCH = (
    "search={parameters: 100K, tolerance: 0.2, num_layers: [3, 4], hidden_size: [64, 48], "
    "num_attention_heads: [7, 8]}"
)
FREE = [
    "target={align: 16}",
    "target.num_layers=null",
    "target.hidden_size=null",
    "target.ffn_hidden_size=null",
    "target.num_attention_heads=null",
]


def test_dry_run_of_a_search(here, recipe, inputs):
    code, out, err = here("search", recipe, "--dry-run", *FREE, SEARCH)
    assert (code, err) == (0, "")
    assert (
        "4 of 8 combinations left out: num_attention_heads 7 is not a multiple of num_query_groups 2 (4)"
        in out
    )
    text = sorted((inputs / "text").iterdir())
    parts = [
        "data={source: python-stdlib, valid_fraction: 0.03}",
        f"data.calibration={text[1]}",
        f"data.train={inputs / 'text'}",
        f"data.valid={text[0]}",
    ]
    assert here("compress", recipe, "--dry-run", *parts)[0] == 0
    refused(
        here("search", recipe, "--dry-run", *FREE, SEARCH, *parts),
        f"data.calibration and data.train share {text[1]}: search ranks students on calib",
    )


@pytest.mark.parametrize("stage", REQUIREMENTS)
def test_stage_missing_from_the_recipe(here, recipe, stage):
    """A dry run says what the run says."""
    for flags in ([], ["--dry-run"]):
        refused(here(stage, recipe, *flags), f"the recipe has no stage {stage}; add {REQUIREMENTS[stage]}")


def test_invalid_commands(here, recipe):
    refused(
        here("compress", recipe.parent / "nowhere.yaml"),
        "no recipe at",
        "nowhere.yaml; give a YAML file such as examples/quickstart.yaml",
    )
    refused(here("compress", recipe, "--world", "8"), "--world is for --dry-run", "torchrun")
    for words in (
        ["prun", recipe],
        ["compress"],
        ["compress", recipe, "--fast"],
        ["compress", recipe, "--dry-run", "--world", "0"],
    ):
        code, _, err = here(*words)
        assert code == 2, words
        assert "Error" in err
        assert "Traceback" not in err


def test_input_error_exits_with_2_and_one_message(recipe):
    done = minitron("score", recipe, "score.num_sampels=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"error: {recipe} cannot be used:\n  - unknown key score.num_sampels; did you mean num_samples?\n"
    )


def test_folder_that_is_not_a_model(here, recipe, inputs, model):
    refused(here("compress", recipe, f"model={inputs / 'text'}"), "no config.json", "no model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    refused(
        here("compress", recipe, f"model={model}"),
        "model_type 'gpt2'",
        "GPT2LMHeadModel",
        "give a model of one of these families: llama (LlamaForCausalLM)",
    )
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 72}))
    refused(
        here("compress", recipe, f"model={model}"),
        "do not fit its config.json",
        "model.layers.0.mlp.up_proj.weight has shape (128, 64), config.json requires (128, 72)",
    )


def test_nan_weight_is_named_on_every_rank(recipe, model, on_ranks, tmp_path):
    """Layer 1 is read by rank 1 of two, and rank 0 is the one that the user hears."""
    weights = load_file(model / "model.safetensors")
    weights[UP_PROJECTION][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for done in on_ranks(2, "import", recipe, f"model={model}", f"output={tmp_path / 'out'}"):
        refused(done, f"{UP_PROJECTION} has 1 values of 8,192 that are NaN or infinity")
    assert not (tmp_path / "out" / "teacher").exists()


def test_text_and_tokenizer_are_checked_before_the_model_runs(recipe, on_ranks, tmp_path):
    output = f"output={tmp_path / 'out'}"
    make_tokenizer(tmp_path / "tokenizer", 340)
    done = on_ranks(1, "compress", recipe, output, f"data.tokenizer={tmp_path / 'tokenizer'}")[0]
    refused(
        done,
        "00.txt line 2 has the token 'token' with id 326, but the model's embedding has 300 rows; remove",
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "old.txt").write_text("An old text. " * 30)
    too_many = ["score.num_samples=4096", "evaluate.num_samples=4096"]
    held_out = f"data.held_out.old=[{tmp_path / 'old.txt'}]"
    done = on_ranks(1, "compress", recipe, output, held_out, *too_many)[0]
    refused(  # the problems of the stages data and texts, in one list
        done,
        "4096 are needed: lower num_samples of score, depth and search to at most",
        "valid text has",
        "lower evaluate.num_samples to at most",
        "old text has",
    )
    samples = int(re.search(r"calibration text has (\d+) samples of 32 tokens", done.err)[1])
    assert not (tmp_path / "out" / "importance.safetensors").exists()
    done = on_ranks(1, "score", recipe, output, f"score.num_samples={samples}", "score.micro_batch_size=1")[0]
    assert done.code == 0, done


def test_fewer_ranks_than_the_layout_needs(recipe, on_ranks):
    done = on_ranks(1, "compress", recipe, "parallel.tp=2", "parallel.sequence_parallel=true")[0]
    refused(
        done,
        "tp 2 x pp 1 x cp 1 needs a multiple of 2 ranks, this job has 1; "
        "start 2 or a multiple (torchrun --nproc-per-node)",
    )


def test_output_that_cannot_be_a_folder(recipe, on_ranks):
    refused(
        on_ranks(1, "compress", recipe, f"output={recipe}")[0],
        f"output: {recipe} is a file, not a folder; move it, or set another output",
    )
    assert recipe.is_file()


def test_indivisible_batch_sizes_are_rejected_first(recipe, on_ranks, inputs):
    """On two data parallel ranks; distill would find out after hours of other stages."""
    for done in on_ranks(2, "compress", recipe, "distill.global_batch_size=2"):
        refused(
            done,
            "distill.global_batch_size 2 must be a multiple of 4 (micro_batch_size 2 x data parallel size 2",
        )
    assert not (inputs / "out").exists()


def test_dry_run_of_a_cluster(here, inputs, tmp_path, capsys):
    """32 ranks for one copy of the model, planned in a process that never joins a job."""
    make_model(
        tmp_path / "model",
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=4,
        num_hidden_layers=9,
        intermediate_size=256,
    )
    capsys.readouterr()
    sections = {
        "parallel": {"tp": 8, "pp": 4, "sequence_parallel": True},
        "target": {"num_layers": 8, "ffn_hidden_size": 128, "num_attention_heads": 8},
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", tmp_path / "model", inputs / "text", tmp_path / "out", **sections
    )
    code, out, err = here("compress", recipe, "--dry-run", "--world", "64")
    assert (code, err) == (0, "")
    for words in (
        "warmup_steps: 4",
        "64 = tp 8 x pp 4 x cp 1 x dp 2, sequence parallel",
        "[3, 2, 2, 2]",
        "[2, 2, 2, 2]",
        "teacher parameters",
        f"{STEPS} steps x 4 samples x 32 tokens = {STEPS * 128:,} tokens",
        "memory: optimizer state",
        "memory: sum on the fullest rank",
    ):
        assert words in out, out
    assert stage_states(out) == dict.fromkeys(STAGES, "to do")
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "out").exists()
    refused(
        here("compress", recipe, "--dry-run", "--world", "48"),
        "48 ranks for the student must be a multiple of tp x pp x cp = 32",
    )
    refused(
        here("compress", recipe, "--dry-run", "--world", "256"),
        "distill.global_batch_size 4 must be a multiple of 16",
    )


PUBLISHED = {  # billions of parameters, and without embeddings: 2407.14679 and 2408.11796
    "mn_minitron_8b": (8.4, 7.3),
    "llama_3_1_minitron_4b_width": (4.5, 3.7),
    "llama_3_1_minitron_4b_depth": (4.5, 3.5),
    "minitron_8b": (8.27, 6.2),
    "minitron_4b": (4.19, 2.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_sizes(here, monkeypatch, name):
    """On a laptop, from a config.json alone."""
    monkeypatch.chdir(ROOT)
    code, out, err = here("compress", f"examples/{name}.yaml", "--dry-run", "--world", "128")
    assert (code, err) == (0, "")
    assert "the model folder has config.json but no weights" in out
    student = next(line for line in out.splitlines() if "student parameters" in line)
    found = [int(number.replace(",", "")) / 1e9 for number in re.findall(r"\d+(?:,\d{3})+", student)[:2]]
    for ours, published in zip(found, PUBLISHED[name]):
        assert round(ours, len(str(published).split(".")[1])) == published


def test_dry_run_lists_finished_stages(here, recipe, on_ranks, tmp_path):
    output = f"output={tmp_path / 'out'}"
    assert on_ranks(1, "import", recipe, output)[0].code == 0
    assert on_ranks(1, "data", recipe, output)[0].code == 0
    code, out, _ = here("compress", recipe, output, "--dry-run", "data.valid_fraction=0.2")
    assert code == 0
    states = stage_states(out)
    assert states == {
        **dict.fromkeys(STAGES, "to do"),
        "import": "done",
        "data": "again settings.valid_fraction: 0.15, here 0.2",
    }


@pytest.mark.parametrize("arch", ["qwen3", "qwen2"])
@pytest.mark.parametrize("layout", ["one", "pp2-vpp2", "tp2-pp2-sp", "pp4", "tp4-sp"])
def test_dry_run_parameter_counts_match_the_models(ranks, arch, layout):
    """qwen3 is tied, qwen2 not; six layers do not divide over four stages."""
    chosen = BY_NAME[layout]
    want = rank_parameters(ARCHS[arch], ParallelConfig(**chosen.parallel))
    for stage, count in ranks(
        chosen.ranks, "project_workers.count_parameters", arch=ARCHS[arch], layout=chosen
    ):
        assert count == want[stage]


def test_help_lists_every_stage():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = minitron("--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5  # s of a processor; 0.3 seen
    assert done.returncode == 0
    for name in (*STAGES, "compress", "report"):
        assert re.search(rf"\b{name}\b", done.stdout), name


def documented() -> list[tuple[str, str]]:
    """Return (where, line) of each command in README.md and at the top of the examples."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        if language not in ("python", "yaml", "json"):
            found += [
                ("README.md", line)
                for line in block.replace("\\\n", " ").splitlines()
                if line.strip() and not line.startswith("#")
            ]
    for path in sorted(
        [path for folder in ("examples", "experiments") for path in (ROOT / folder).rglob("*.yaml")]
    ):
        found.append((path.name, path.read_text().splitlines()[0].lstrip("# ")))
    for path in sorted(
        [path for folder in ("examples", "experiments") for path in (ROOT / folder).rglob("*.py")]
    ):
        found += [
            (path.name, line)
            for line in ast.get_docstring(ast.parse(path.read_text())).splitlines()
            if line.startswith(("torchrun ", "python "))
        ]
    return found


@pytest.mark.parametrize(("where", "line"), documented())
def test_documented_commands_exist(where, line):
    """Scripts, stages, options and override keys exist; recipe.yaml is the user's file."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables for the command
        words.pop(0)
    program = words.pop(0)
    if "minitron_mp" in words:
        assert words[words.index("minitron_mp") - 1] == "-m"
        words = words[words.index("minitron_mp") + 1 :]
    elif program in ("bash", "sbatch", "python", "torchrun"):
        script = next(word for word in words if re.search(r"\.(sh|py|sbatch)$", word))
        assert (ROOT / script).is_file()
        words = words[words.index(script) + 1 :] if script.endswith(".sbatch") else []
    elif program != "minitron-mp":
        words = []
    if not words:
        return
    group = typer.main.get_command(app)
    context = group.make_context("minitron-mp", list(words))
    name, stage, rest = group.resolve_command(context, list(words))
    options = stage.make_context(name, rest, parent=context).params
    named = Path(options["recipe"])
    load_recipe(
        ROOT / named if (ROOT / named).is_file() else ROOT / "examples" / "quickstart.yaml",
        options["overrides"] or [],
    )
    assert named.name == "recipe.yaml" or (ROOT / named).is_file(), f"{where}: {named}"


def test_documented_imports_exist():
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "minitron_mp":
                assert {alias.name for alias in node.names} <= set(minitron_mp.__all__)


def test_readme_names_each_stage_and_its_artifact():
    text = (ROOT / "README.md").read_text()
    for name, stage in STAGES.items():
        assert f"`{name}`" in text
        assert stage.artifact in text


@pytest.mark.parametrize("words", [["--data"], ["--data", ""], ["--fast"], ["my_text/"]])
def test_quickstart_rejects_unknown_arguments(words):
    done = subprocess.run(
        ["bash", ROOT / "launch" / "quickstart.sh", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 2
    assert words[0] in done.stderr
    assert "--data" in done.stderr
    assert done.stdout == ""


def test_quickstart_help():
    options = {
        "env": environment(),
        "capture_output": True,
        "text": True,
        "timeout": 10,
        "cwd": ROOT / "tests",
    }
    done = subprocess.run(["bash", "../launch/quickstart.sh", "--help"], **options)
    assert done.returncode == 0
    assert "--data FILE_OR_FOLDER" in done.stdout


def test_dry_run_with_a_remote_teacher(here, recipe):
    """6 ranks: a student of tp 2 x dp 2, a teacher of tp 2.

    64 float32 channels are 256 bytes a token.
    """
    words = ["parallel.tp=2", "teacher.placement=remote", "teacher.parallel.tp=2"]
    code, out, err = here("compress", recipe, "--dry-run", "--world", "6", *words)
    assert (code, err) == (0, "")
    for text in (
        "4 = tp 2 x pp 1 x cp 1 x dp 2",
        "2 = tp 2 x pp 1 x cp 1 x dp 1",
        "hidden: 256 bytes per token",
        "teacher's output layer (a copy)",
    ):
        assert text in out, out
    assert "memory: teacher weights" not in out
    states = "distill.states.layers={0: 0, 2: 3}"
    code, out, err = here("compress", recipe, "--dry-run", "--world", "6", *words, states)
    assert (code, err) == (0, "")
    for text in (
        "hidden and states: 768 bytes per token",
        "memory: gradients of states",
        "memory: up-projection of states",
    ):
        assert text in out, out
    refused(
        here("compress", recipe, "--dry-run", "distill.states.layers={0: 0, 9: 3}"),
        "has state 9 of the student, whose states are 0",
    )
    less = "3 ranks (5 minus 2 for other roles) for the student must be a multiple of tp x pp x cp = 2"
    refused(here("compress", recipe, "--dry-run", "--world", "5", *words), less)
    refused(
        here("compress", recipe, "--dry-run", *words, "teacher.parallel.tp=3"),
        "teacher: ",
        "num_attention_heads 8",
    )
    refused(
        here("compress", recipe, "--dry-run", "teacher.payload=topk"),
        "payload topk needs placement remote or cached, given colocated",
    )
    refused(
        here("compress", recipe, "--dry-run", *words, "teacher.payload=topk", "teacher.top_k=4000"),
        "teacher.top_k 4000 is above the vocabulary of",
    )
    code, out, err = here(
        "compress", recipe, "--dry-run", "--world", "6", *words, "teacher.student_ranks=2"
    )  # the teacher has the rest
    assert (code, err) == (0, "")
    for text in ("2 = tp 2 x pp 1 x cp 1 x dp 1", "4 = tp 2 x pp 1 x cp 1 x dp 2"):
        assert text in out, out
    rest = "0 ranks (2 minus 2 for other roles) for the teacher must be a multiple of tp x pp x cp = 2"
    refused(here("compress", recipe, "--dry-run", "--world", "2", *words, "teacher.student_ranks=2"), rest)
    refused(
        here("compress", recipe, "--dry-run", *words, "teacher.student_ranks=2", "teacher.ranks=2"),
        "exclude each other; drop one of them",
    )
    refused(
        here("compress", recipe, "--dry-run", "teacher.student_ranks=2"),
        "ranks and student_ranks need placement remote, given colocated",
    )
    refused(
        here("compress", recipe, "--dry-run", *words, "teacher.ranks=3"),
        "ranks 3 must be a multiple of the teacher's tp x pp x cp = 2",
    )


def test_reference_is_printed_and_written(here, tmp_path):
    code, out, err = here("reference")
    assert (code, err) == (0, "")
    assert out == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert here("reference", "--output", tmp_path / "reference.md")[0] == 0
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == out
