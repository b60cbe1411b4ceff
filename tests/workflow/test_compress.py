"""All stages from a Hugging Face folder to another: results, reruns and interruptions."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cases import BY_NAME, make_samples
from tiny import (
    CHECKPOINT_INTERVAL,
    MAX_LR,
    STAGES,
    STEPS,
    Run,
    command,
    environment,
    make_model,
    make_recipe_file,
    minitron,
    read_metrics,
    refused,
)

from minitron_mp import load_recipe
from minitron_mp.artifacts.manifest import require_artifact, writing_artifact
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.report.correction_gain import correction_gain
from minitron_mp.workflow.graph import StageGraph

OUTPUT = [
    "data",
    "evaluation.json",
    "finished",
    "importance.safetensors",
    "metrics.jsonl",
    "plan.json",
    "report.html",
    "report.md",
    "resolved_recipe.yaml",
]
OUTPUT += ["stages.jsonl", "student", "student_distilled", "student_hf", "teacher", "tensorboard"]
SMALLER = "target.ffn_hidden_size=64"
TWO_RANKS = ("parallel.tp=2", "parallel.sequence_parallel=true")


@pytest.fixture(scope="module")
def two_ranks(inputs) -> Run:
    """The same project under torchrun with tensor and sequence parallelism."""
    recipe = make_recipe_file(inputs / "two.yaml", inputs / "model", inputs / "text", inputs / "two")
    return Run(recipe, inputs / "two", minitron("compress", recipe, *TWO_RANKS, ranks=2))


@pytest.fixture
def copied(whole, inputs, tmp_path) -> Run:
    """The finished project and its model, to damage."""
    assert whole.done.returncode == 0, whole.done.stderr
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copytree(whole.output, tmp_path / "out")
    # The path of the text is a setting of the data stage, so it stays the same word.
    return Run(
        make_recipe_file(tmp_path / "recipe.yaml", tmp_path / "model", inputs / "text", tmp_path / "out"),
        tmp_path / "out",
    )


@pytest.fixture
def on_rank(ranks):
    """on_rank(words...) runs the command line on one pool rank."""
    return lambda *words, **options: ranks(
        1, "project_workers.minitron", arguments=[str(word) for word in words], **options
    )[0]


def drop(output: Path, *stages: str) -> None:
    """Delete the artifacts of stages."""
    for name in stages:
        path = output / STAGES[name].artifact
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_compress_writes_every_artifact(whole):
    assert whole.done.returncode == 0, whole.done.stderr
    assert "Traceback" not in whole.done.stderr
    assert names(whole.output) == OUTPUT  # and nothing written aside, no checkpoints
    assert whole.to_repeat() == {}
    assert load_recipe(whole.output / "resolved_recipe.yaml") == load_recipe(whole.recipe)
    for name in STAGES:
        assert f"{name}: {whole.output / STAGES[name].artifact} in " in whole.done.stdout


def test_model_logits_match_transformers(whole, inputs, ranks):
    """Float32 on both sides, so only the order of sums may differ.

    No difference seen on one machine.
    """
    from transformers import AutoModelForCausalLM

    models = {}
    for name, stage, folder in (
        ("teacher", "import", inputs / "model"),
        ("student", "distill", whole.output / "student_hf"),
    ):
        checkpoint = whole.output / STAGES[stage].artifact
        models[name] = (
            require_artifact(checkpoint, stage).arch,
            checkpoint,
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        )
    found = ranks(
        1,
        "model_workers.load_and_run",
        layout=BY_NAME["one"],
        models={name: pair[:2] for name, pair in models.items()},
    )[0]
    for name, (arch, _, model) in models.items():
        with torch.no_grad():
            want = model(make_samples(arch, 0, 8)["tokens"]).logits
        torch.testing.assert_close(
            found[name][..., : arch.vocab_size],
            want,
            atol=2e-4,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert want.abs().max() > 1


def test_export_is_a_model_with_its_tokenizer(whole, inputs):
    from transformers import AutoTokenizer

    config = json.loads((whole.output / "student_hf" / "config.json").read_text())
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    # Heads keep their width, which is no longer hidden_size / num_attention_heads. Without head_dim
    # the model could not be loaded.
    assert {name: config[name] for name in sizes} == sizes
    assert config["head_dim"] == 8
    assert config["dtype"] == "float32"
    assert {path.name for path in (inputs / "model").iterdir()} <= set(names(whole.output / "student_hf"))
    ids = [
        AutoTokenizer.from_pretrained(folder)("prune a layer")["input_ids"]
        for folder in (inputs / "model", whole.output / "student_hf")
    ]
    assert ids[0] == ids[1]


def test_distillation_lowers_kl_to_the_teacher(whole):
    found = json.loads((whole.output / "evaluation.json").read_text())
    assert found["teacher"]["kl"] is None
    assert found["distilled"]["kl"] < found["pruned"]["kl"]
    assert {found[name]["num_tokens"] for name in ("teacher", "pruned", "distilled")} == {16 * 32}
    assert all(
        math.isclose(found[name]["perplexity"], math.exp(found[name]["loss"]), rel_tol=1e-6)
        for name in ("teacher", "pruned", "distilled")
    )


def test_metrics_have_one_line_per_step(whole):
    metrics = read_metrics(whole.output)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert all(
        m["loss"] == m["kl"] and m["num_tokens"] == 4 * 32 for m in metrics
    )  # no cross-entropy, nothing masked
    assert max(m["lr"] for m in metrics) == pytest.approx(MAX_LR, rel=0.01)
    assert curve(whole) == pytest.approx({m["step"]: m["loss"] for m in metrics}, rel=1e-6)


def curve(run: Run) -> dict[int, float]:
    """Step -> loss, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.output / "tensorboard" / "distill"))
    board.Reload()
    points = board.Scalars("distill/loss")
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def test_report_shows_sizes_and_losses(whole):
    report = (whole.output / "report.md").read_text()
    found, plan = (
        json.loads((whole.output / "evaluation.json").read_text()),
        PrunePlan.load(whole.output / "plan.json"),
    )
    for name, arch in (("teacher", plan.teacher), ("pruned", plan.student), ("distilled", plan.student)):
        quality, kl = found[name], "" if found[name]["kl"] is None else f"{found[name]['kl']:.4f}"
        share = f"{arch.num_parameters() / plan.teacher.num_parameters():.1%}"
        assert (
            f"| {name} | {arch.num_parameters():,} | {share} "
            f"| {quality['loss']:.4f} | {quality['perplexity']:.2f} | {kl} |" in report
        )
    for row in plan.summary():
        assert "| " + " | ".join(row) + " |" in report
    assert f"Layers dropped (counted from 0): {({*range(4)} - {*plan.layers}).pop()}." in report
    assert f"{STEPS} steps, {STEPS * 4 * 32:,} tokens" in report
    assert all(f"`{stage.artifact}`" in report for stage in STAGES.values())


def test_second_run_skips_every_stage(copied, on_rank):
    before = copied.state()
    done = on_rank("compress", copied.recipe)
    assert done.code == 0, done
    assert [
        f"{name}: done, {path}" in done.out.splitlines() for name, path in copied.project().paths.items()
    ] == [True] * len(STAGES)
    assert copied.state() == before
    assert names(copied.output) == OUTPUT


@pytest.mark.parametrize(
    ("override", "why", "first"),
    [
        ("data.valid_fraction=0.2", "settings.valid_fraction: 0.15, here 0.2", "data"),
        ("score.num_samples=8", "settings.num_samples: 16, here 8", "score"),
        ("score.batch_aggregation=mean", "settings.batch_aggregation: 'l2', here 'mean'", "score"),
        ("data.sequence_length=16", "settings.sequence_length: 32, here 16", "score"),
        ("precision=bf16", "settings.precision: 'fp32', here 'bf16'", "score"),
        (SMALLER, "settings.ffn_hidden_size: 96, here 64", "plan"),
        ("target.num_query_groups=1", "settings.num_query_groups: None, here 1", "plan"),
        ("target.merge_heads=true", "settings.merge_heads: None, here True", "plan"),
        ("distill.lr=0.01", f"settings.lr: {MAX_LR}, here 0.01", "distill"),
        ("distill.global_batch_size=8", "settings.global_batch_size: 4, here 8", "distill"),
        ("evaluate.num_samples=8", "settings.num_samples: 16, here 8", "evaluate"),
        ("export.family=mistral", "settings.family: None, here 'mistral'", "export"),
    ],
)
def test_changed_setting_repeats_dependent_stages(whole, override, why, first):
    """The first stage names the setting.

    Later stages repeat if they use it or read repeated output.
    """
    found = whole.to_repeat(override)
    after = {name for name in STAGES if first in whole.project().before(name)}
    also = {"export"} if override.startswith("precision") else set()
    assert set(found) == {first} | after | also
    assert found[first] == [why]
    for name in set(found) - {first} - also:
        assert any(row.startswith("input ") for row in found[name]), (name, found[name])


@pytest.mark.parametrize(
    "overrides",
    [
        TWO_RANKS,
        ("parallel.pp=3", "parallel.cp=2"),
        ("score.micro_batch_size=2", "distill.micro_batch_size=4", "evaluate.micro_batch_size=1"),
        ("distill.overlap=true", "distill.recompute=true"),
        ("distill.log_interval=7", "distill.checkpoint_interval=3", "distill.keep_checkpoints=1"),
    ],
)
def test_layout_microbatches_and_logging_repeat_no_stage(whole, overrides):
    assert whole.to_repeat(*overrides) == {}


def test_changed_input_files_are_detected(copied, inputs, tmp_path):
    text, model = inputs / "text" / "00.txt", tmp_path / "model" / "model.safetensors"
    text.rename(tmp_path / "gone.txt")
    try:
        found = copied.to_repeat()
    finally:
        (tmp_path / "gone.txt").rename(text)
    assert list(found) == [name for name in STAGES if name != "import"], "a text file was gone"
    assert found["data"][0].startswith("input text: ")
    assert copied.to_repeat() == {}
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    found = copied.to_repeat()
    assert list(found) == list(STAGES), "one bit of the weights has changed"
    assert found["import"][0].startswith("input model: ")
    (tmp_path / "model" / "README.md").write_text("not read")
    assert copied.to_repeat() == found


def test_repeated_stages_keep_the_other_artifacts(copied, on_rank):
    before = copied.state()
    done = on_rank("compress", copied.recipe, SMALLER)
    assert done.code == 0, done
    assert "plan: rerun because of settings.ffn_hidden_size: 96, here 64" in done.out
    assert all(f"{name}: done" in done.out for name in ("import", "data", "score"))
    assert json.loads((copied.output / "student_hf" / "config.json").read_text())["intermediate_size"] == 64
    assert names(copied.output) == OUTPUT
    assert copied.to_repeat(SMALLER) == {}
    after = copied.state()
    kept = {
        name
        for name in before
        if name.startswith(("teacher/", "importance")) or (name.startswith("data/") and "/index/" not in name)
    }
    assert {name for name in before if after.get(name) == before[name]} >= kept
    assert [m["step"] for m in read_metrics(copied.output)] == list(range(1, STEPS + 1)), (
        "lines of the old run are left"
    )


def start_and_kill(run: Run, *overrides: str, ranks: int = 1) -> int:
    """Start distill in a process, or under torchrun, and kill it after its first checkpoint.

    Returns the number of logged steps.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    (run.output / "metrics.jsonl").unlink()
    process = subprocess.Popen(
        command("distill", run.recipe, *overrides, ranks=ranks),
        env=environment(),
        start_new_session=True,
        **quiet,
    )
    try:
        logged = wait_past_a_checkpoint(run, process)
    finally:
        kill_tree(process)
    assert process.returncode == -signal.SIGKILL, "it was done, or had failed, before the kill"
    return logged


def wait_past_a_checkpoint(run: Run, process: subprocess.Popen) -> int:
    """Steps that the run has logged by then."""
    log, deadline, logged = run.output / "metrics.jsonl", time.monotonic() + 120, 0
    while logged < CHECKPOINT_INTERVAL + 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        logged = log.read_bytes().count(b"\n") if log.exists() else 0
    return logged


def kill_tree(process: subprocess.Popen) -> None:
    """Kill all processes.

    torchrun's ranks have their own sessions, and checkpoint writers outlive ranks.
    """
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_killed_run_resumes_bitwise(copied, whole, on_rank, ranks):
    drop(copied.output, "distill", "evaluate", "export")
    shutil.rmtree(copied.output / "tensorboard")
    logged = start_and_kill(copied)
    assert CHECKPOINT_INTERVAL < logged < STEPS
    assert not (copied.output / "student_distilled").exists()
    checkpoints = copied.output / "checkpoints" / "distill"
    saved = max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))
    # Files that a kill during a save leaves, and files of a machine that lost unwritten data.
    (checkpoints / f".step_{saved + CHECKPOINT_INTERVAL:08d}.tmp").mkdir(exist_ok=True)
    (checkpoints / f".step_{saved + CHECKPOINT_INTERVAL:08d}.tmp" / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / f"step_{saved + CHECKPOINT_INTERVAL:08d}").mkdir()
    (checkpoints / f"step_{saved + CHECKPOINT_INTERVAL:08d}" / "__0_0.distcp").write_bytes(b"half")
    (copied.output / ".student_distilled.tmp").mkdir(exist_ok=True)
    with (copied.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')

    done = on_rank("compress", copied.recipe)
    assert done.code == 0, done
    assert f"distill: resuming from step {saved}" in done.out
    assert read_metrics(copied.output) == read_metrics(whole.output)
    assert curve(copied) == curve(whole)
    unbroken, resumed = (
        ranks(1, "model_workers.read_tensors", folder=run.output / "student_distilled", prefix="")[0]
        for run in (whole, copied)
    )
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    assert names(copied.output) == OUTPUT
    measured = {"manifest": None, "speed": None}
    evaluations = [
        {**json.loads((run.output / "evaluation.json").read_text()), **measured} for run in (whole, copied)
    ]
    assert evaluations[0] == evaluations[1]


def test_stop_between_stages_writes_no_finished_marker(copied, on_rank):
    drop(copied.output, "export")
    (copied.output / "stop").touch()
    done = on_rank("compress", copied.recipe)
    assert done.code == 0, done
    reason = f"stop file {copied.output / 'stop'} exists"
    assert f"stopped before export ({reason}); the same command resumes from there" in done.out
    assert names(copied.output) == [name for name in OUTPUT if name not in ("finished", "student_hf")]
    assert on_rank("compress", copied.recipe).code == 0
    assert names(copied.output) == OUTPUT


def test_leftover_checkpoints_beside_the_student_are_deleted(copied, on_rank):
    (copied.output / "checkpoints").mkdir()
    assert on_rank("compress", copied.recipe).code == 0
    assert names(copied.output) == OUTPUT


def test_checkpoints_of_another_run_are_rejected(copied, on_rank):
    drop(copied.output, "distill")
    manifest = copied.project("distill.lr=0.01").manifest("distill")
    with writing_artifact(
        copied.output / "checkpoints" / "distill" / f"step_{CHECKPOINT_INTERVAL:08d}", manifest
    ):
        pass
    refused(
        on_rank("distill", copied.recipe),
        "checkpoints of another run; move or delete it, or restore these settings",
        f"settings.lr: 0.01, here {MAX_LR}",
    )
    assert names(copied.output / "checkpoints" / "distill") == [f"step_{CHECKPOINT_INTERVAL:08d}"]


def test_two_ranks_make_the_same_student(whole, two_ranks, on_rank):
    assert two_ranks.done.returncode == 0, two_ranks.done.stderr
    assert names(two_ranks.output) == OUTPUT
    one, two = (PrunePlan.load(run.output / "plan.json") for run in (whole, two_ranks))
    assert (one.layers, one.keep) == (two.layers, two.keep)
    assert two_ranks.to_repeat() == {}, "a run on one rank would repeat something"
    # Rounding of sums over two ranks, which 30 steps at a large learning rate may amplify: 3e-7
    # seen.
    found = [json.loads((run.output / "evaluation.json").read_text()) for run in (whole, two_ranks)]
    assert found[1]["pruned"]["kl"] == pytest.approx(found[0]["pruned"]["kl"], rel=1e-5)
    assert found[1]["distilled"]["kl"] == pytest.approx(found[0]["distilled"]["kl"], rel=1e-4)
    assert [m["loss"] for m in read_metrics(two_ranks.output)] == pytest.approx(
        [m["loss"] for m in read_metrics(whole.output)], rel=1e-4
    )

    done = on_rank("evaluate", two_ranks.recipe, "--force")
    assert done.code == 0, done
    assert "evaluate: done" not in done.out
    again = json.loads((two_ranks.output / "evaluation.json").read_text())
    assert again["manifest"] == found[1]["manifest"]
    for name in ("teacher", "pruned", "distilled"):
        assert again[name]["loss"] == pytest.approx(found[1][name]["loss"], rel=1e-6)

    assert on_rank("report", two_ranks.recipe).code == 0
    commands, own = (
        (two_ranks.output / "report.md").read_text(),
        two_ranks.output / "resolved_recipe.yaml",
    )  # which the last command wrote
    assert f"torchrun --nproc-per-node 2 -m minitron_mp distill {own} {' '.join(TWO_RANKS)}\n" in commands
    assert f"\nminitron-mp evaluate {own}\n" in commands


def test_only_rank_0_logs(two_ranks):
    assert two_ranks.done.stdout.count("import: ") == 2  # progress and artifact
    assert two_ranks.done.stdout.count("report: ") == 1


def test_missing_input_names_the_stage_to_run_first(copied, on_rank, inputs, tmp_path):
    recipe = make_recipe_file(tmp_path / "new.yaml", inputs / "model", inputs / "text", tmp_path / "new")
    refused(
        on_rank("export", recipe),
        f"{tmp_path / 'new' / 'teacher'} is missing; run `minitron-mp import` first",
    )
    assert not (tmp_path / "new").exists()
    drop(copied.output, "plan", "prune", "distill")
    refused(on_rank("prune", copied.recipe), "plan.json is missing; run `minitron-mp plan` first")
    refused(on_rank("distill", copied.recipe), "plan.json is missing; run `minitron-mp plan` first")
    done = on_rank("plan", copied.recipe)
    assert done.code == 0, done
    assert "hidden_size" in done.out
    assert list(copied.to_repeat()) == ["prune", "distill"]


def test_plan_of_another_model_is_rejected(copied, on_rank):
    drop(copied.output, "prune")
    plan, content = copied.output / "plan.json", json.loads((copied.output / "plan.json").read_text())
    cases = {
        "settings.ffn_hidden_size: 64, here 96": {
            "settings": {**content["manifest"]["settings"], "ffn_hidden_size": 64}
        },
        "input score: 'beef', here ": {"inputs": {"score": "beef"}},
        "stage: 'score', here 'plan'": {"stage": "score"},
    }
    for row, change in cases.items():
        plan.write_text(json.dumps({**content, "manifest": {**content["manifest"], **change}}))
        refused(
            on_rank("prune", copied.recipe),
            "plan.json was made from other inputs or settings; run `minitron-mp plan` again, or restore",
            row,
        )
    assert not (copied.output / "student").exists()


def test_damaged_artifact_is_named(copied, on_rank):
    manifest, plan = copied.output / "student" / "manifest.json", copied.output / "plan.json"
    before = copied.state()
    manifest.write_text(manifest.read_text()[:100])
    refused(
        on_rank("compress", copied.recipe),
        f"{copied.output / 'student'} is damaged",
        "delete it and run its stage again",
    )
    shutil.rmtree(copied.output / "student")
    plan.write_text(plan.read_text()[:100])
    refused(on_rank("prune", copied.recipe), "plan.json is damaged")
    plan.unlink()
    done = on_rank("compress", copied.recipe)
    assert done.code == 0, done
    assert copied.state().keys() == before.keys()


def test_checkpoint_with_a_missing_file_is_named(copied, on_rank):
    for path in (copied.output / "student_distilled").glob("*.distcp"):
        path.unlink()
    refused(
        on_rank("export", copied.recipe, "--force"),
        f"{copied.output / 'student_distilled'} is damaged or not a checkpoint of this model",
        ".distcp",
    )
    assert copied.project().why_not_done("export") is None, "the old export is gone"


@pytest.mark.parametrize("name", ["teacher", "student_hf"])
def test_foreign_folder_is_not_replaced(copied, on_rank, name):
    drop(copied.output, *(stage for stage in STAGES if STAGES[stage].artifact == name))
    (copied.output / name).mkdir()
    (copied.output / name / "thesis.txt").write_text("years of work")
    refused(
        on_rank("compress", copied.recipe),
        f"{copied.output / name} has no manifest.json",
        "will not replace it; move it, or set another output",
    )
    assert names(copied.output / name) == ["thesis.txt"]


def test_full_disk_keeps_the_old_artifact(copied, on_rank, ranks):
    def read():
        return ranks(1, "model_workers.read_tensors", folder=copied.output / "student", prefix="")[0]

    before, tensors = copied.state(), read()
    refused(
        on_rank("prune", copied.recipe, "--force", free_bytes=1000),
        f"{copied.output / 'student'} needs up to 0.00 GB",
        "free some space or set another output",
    )
    assert copied.state() == before
    assert all(torch.equal(value, tensors[key]) for key, value in read().items())
    assert names(copied.output) == OUTPUT
    assert copied.to_repeat() == {}


def test_corrected_teacher_is_pruned_and_distilled_from(whole, inputs, tmp_path, on_rank):
    """The teacher is trained on the text, later stages use it, and a second run skips all."""
    correct = {
        "steps": 20,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "lr": MAX_LR,
        "warmup_steps": 4,
        "checkpoint_interval": 6,
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", correct=correct
    )
    code, out, err = on_rank("compress", recipe)
    assert code == 0, err
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["teacher"]["loss"] < 0.9 * evaluation["uncorrected"]["loss"]
    assert evaluation["uncorrected"]["kl"] > 0  # of the teacher, which is the corrected one
    project = StageGraph(load_recipe(recipe))
    corrected = require_artifact(project.paths["correct"], "correct")
    assert {
        project.manifest(name).inputs["correct"] for name in ("score", "prune", "distill", "evaluate")
    } == {corrected.fingerprint}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Teacher correction" in report
    assert "| uncorrected |" in report
    assert len((project.paths["correct"] / "metrics_correct.jsonl").read_text().splitlines()) == 20
    assert "How much the student gains from correction is unknown" in report
    records = [json.loads(line) for line in (tmp_path / "out" / "stages.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["fingerprint"], row["ranks"]) for row in records] == [
        (name, project.manifest(name).fingerprint, 1) for name in project.stages
    ]
    code, out, err = on_rank("compress", recipe, f"correct.baseline={whole.output}")
    assert code == 0, err
    assert out.count(": done, ") == len(project.stages) == len(STAGES) + 1
    mine, plain = (
        json.loads((folder / "evaluation.json").read_text())["distilled"]["loss"]
        for folder in (tmp_path / "out", whole.output)
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"held-out loss is {mine:.4f}, without correction {plain:.4f}" in report
    assert len((tmp_path / "out" / "stages.jsonl").read_text().splitlines()) == len(
        records
    )  # nothing has run
    for words, why in {
        (
            "distill.steps=40",
            "evaluate.num_samples=8",
        ): f"distill settings.steps: {STEPS}, here 40; evaluate settings.num_samples: 16, here 8.",
        ("data.valid_fraction=0.2",): "data settings.valid_fraction: 0.15, here 0.2.",
    }.items():
        other = StageGraph(load_recipe(recipe, [*words, f"correct.baseline={whole.output}"]))
        assert why in correction_gain(other, evaluation)[-1]
    again = StageGraph(load_recipe(recipe, [f"correct.baseline={tmp_path / 'out'}"]))
    assert "input correct: " in correction_gain(again, evaluation)[-1]  # that one was corrected, too
    # A baseline of other tasks and fewer texts: what both have compares.
    old, new = (
        f"data.held_out.{name}=[{inputs / 'text' / file}]"
        for name, file in (("old", "00.txt"), ("new", "01.txt"))
    )
    texts = StageGraph(load_recipe(whole.recipe, [old])).manifest("texts")
    plain = json.loads((whole.output / "evaluation.json").read_text())
    plain["manifest"]["inputs"]["texts"] = texts.fingerprint
    plain["texts"] = {"old": {"distilled": {"loss": 2.0}}}
    (tmp_path / "plain" / "held_out").mkdir(parents=True)
    (tmp_path / "plain" / "held_out" / "manifest.json").write_text(texts.model_dump_json())
    (tmp_path / "plain" / "evaluation.json").write_text(json.dumps(plain))
    shutil.copy(whole.output / "plan.json", tmp_path / "plain")
    more = StageGraph(
        load_recipe(recipe, [old, new, "evaluate.task_items=5", f"correct.baseline={tmp_path / 'plain'}"])
    )
    losses = {name: {"loss": 1.0} for name in ("uncorrected", "teacher", "distilled")}
    said = correction_gain(more, {**evaluation, "texts": {"old": losses, "new": losses}})
    assert "held-out loss on old is 1.0000, without correction 2.0000 (-50.0%)." in said[-2]
    assert (
        said[-1]
        == "That student was not evaluated on new: run `evaluate` there with the same `data.held_out`."
    )
    refused(
        on_rank("compress", recipe, f"correct.baseline={tmp_path / 'out'}"),
        "is the output of this recipe; give the output of a finished run without",
    )
    refused(
        on_rank("compress", recipe, "correct.baseline=nowhere"),
        "correct.baseline: nowhere has no evaluation.json",
    )
    refused(
        on_rank("correct", inputs / "recipe.yaml"),
        "the recipe has no stage correct; add a section correct",
    )
    refused(on_rank("compress", recipe, "correct.stepz=3"), "unknown key correct.stepz; did you mean steps?")
    refused(
        on_rank("compress", recipe, "correct.warmup_steps=20"),
        "correct: warmup_steps 20 must be smaller than steps 20; lower it",
    )


def test_teacher_is_corrected_during_distillation(inputs, tmp_path, on_rank):
    """The student is cut from the original, and judged by the corrected teacher.

    Also on text that neither model has seen.
    """
    (tmp_path / "old.txt").write_text("An old text of other words, again and again. " * 200)
    sections = {
        "correct": {
            "when": "during",
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "lr": MAX_LR,
            "warmup_steps": 2,
        }
    }
    sections |= {"distill": {"steps": 14}, "data": {"held_out": {"old": [str(tmp_path / "old.txt")]}}}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sections
    )
    code, _, err = on_rank("compress", recipe)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["teacher"]["loss"] < 0.95 * found["uncorrected"]["loss"]
    assert found["texts"]["old"]["teacher"]["loss"] != found["texts"]["old"]["uncorrected"]["loss"]
    project = StageGraph(load_recipe(recipe))
    assert [name for name in project.stages if name != "texts"] == list(STAGES)
    other = StageGraph(load_recipe(recipe, [f"data.held_out.new=[{tmp_path / 'old.txt'}]"]))
    assert [name for name in other.stages if other.why_not_done(name) is not None] == [
        "texts",
        "evaluate",
    ]  # nothing that training hangs on
    assert len((project.paths["distill"] / "metrics_correct.jsonl").read_text().splitlines()) == 12
    report = (tmp_path / "out" / "report.md").read_text()
    assert "is pruned from the original model, and distilled from the teacher during correction" in report
    assert "held-out loss on old changed from" in report
    assert "| old (" in report
    refused(
        on_rank("compress", recipe, "teacher.placement=cached"),
        "correct.when during trains the teacher on the student's ranks",
    )
    refused(on_rank("compress", recipe, "correct.steps=15"), "correct.steps 15 is above distill.steps 14")
    refused(
        on_rank("compress", recipe, "distill.micro_batch_size=4"),
        "correct.micro_batch_size 2 is not distill.micro_batch_size 4",
    )
    refused(
        on_rank("correct", recipe),
        "the recipe has no stage correct; add a section correct whose `when` is before",
    )


def test_iterative_pruning_distills_from_the_first_teacher(whole, inputs, tmp_path, on_rank):
    """Iterative compression: `model` is a student, `teacher.model` its original teacher.

    One query group is dropped, the heads of the other are merged.
    """
    heads = {"num_query_groups": 1, "num_attention_heads": 2, "merge_heads": True}
    sizes = {
        "target": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, **heads},
        "distill": {"steps": 6},
    }
    student, first = whole.output / "student_hf", inputs / "model"
    items = [
        {"query": "the teacher and the", "choices": ["student", "loss"], "gold": 1},
        {"query": "prune", "choices": ["head", "cut it"], "gold": 0},
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    sizes["evaluate"] = {"tasks": {"choices": str(tmp_path / "choices.jsonl")}}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml",
        student,
        inputs / "text",
        tmp_path / "out",
        **sizes,
        teacher={"model": str(first)},
    )
    code, _, err = on_rank("compress", recipe)
    assert code == 0, err
    again, before = (
        json.loads((path / "evaluation.json").read_text()) for path in (tmp_path / "out", whole.output)
    )
    for name, loss in (("teacher", before["teacher"]["loss"]), ("unpruned", before["distilled"]["loss"])):
        assert again[name]["loss"] == pytest.approx(loss, rel=1e-5)
    assert again["unpruned"]["kl"] == pytest.approx(before["distilled"]["kl"], rel=1e-4)
    assert again["distilled"]["kl"] < again["pruned"]["kl"]
    config = json.loads((tmp_path / "out" / "student_hf" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (1, 2)
    merged = json.loads((tmp_path / "out" / "plan.json").read_text())["merge"]["heads"]
    assert [len(pairs) for pairs in merged.values()] == [1, 1]
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.index("| teacher |") < report.index("| unpruned |") < report.index("| pruned |")
    assert set(again["tasks"]["choices"]) == {"teacher", "unpruned", "pruned", "distilled"}
    assert "| choices (2), accuracy normalised by characters |" in report
    refused(
        on_rank("compress", recipe, "evaluate.tasks.choices=nowhere.jsonl"),
        "evaluate.tasks.choices: there is no file nowhere.jsonl",
    )
    refused(
        on_rank("import-teacher", whole.recipe),
        "the recipe has no stage import-teacher; add teacher.model",
    )
    refused(on_rank("compress", recipe, "correct.steps=300"), "correct that model in a separate run")
    other = make_model(tmp_path / "other", vocab_size=400)
    refused(
        on_rank("compress", recipe, f"teacher.model={other}"),
        "teacher.model has a vocabulary of 400, the pruned model",
    )


@pytest.mark.parametrize("method", ["drop", "block", "greedy"])
def test_layers_are_dropped_by_loss(whole, inputs, tmp_path, on_rank, method):
    """The plan follows the trials of `depth`.

    The first layer is protected; `method` sets the trials.
    """
    shutil.copytree(whole.output, tmp_path / "out")
    sizes = {
        "target": {"num_layers": 2},
        "depth": {"method": method, "protect_first": 1, "num_samples": 8, "micro_batch_size": 4},
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sizes
    )
    refused(on_rank("plan", recipe), "depth.json is missing; run `minitron-mp depth` first")
    assert [on_rank(stage, recipe).code for stage in ("depth", "plan")] == [0, 0]
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    tried = [trial["dropped"] for trial in found["trials"]]
    assert tried == {"drop": [[1], [2], [3]], "block": [[1, 2], [2, 3]]}.get(method, tried)
    kept = PrunePlan.load(tmp_path / "out" / "plan.json").layers
    best = sorted(found["trials"], key=lambda trial: trial["loss"])
    dropped = {
        "drop": best[0]["dropped"] + best[1]["dropped"],
        "block": best[0]["dropped"],
        "greedy": found["trials"][-1]["dropped"],
    }[method]
    assert kept == sorted({0, 1, 2, 3} - set(dropped))
    others = [(trial, trial["next_best"]) for trial in found["trials"] if "next_best" in trial]
    assert [(len(other["dropped"]), other["loss"] >= trial["loss"]) for trial, other in others] == (
        [(1, True), (2, True)] if method == "greedy" else []
    )
    refused(
        on_rank("depth", whole.recipe),
        "the recipe has no stage depth; add depth.method: drop, block or greedy",
    )
    refused(
        on_rank("compress", recipe, "depth.protect_last=2"),
        "leave 1 of 4 layers to drop from, the target drops 2",
    )


def test_layers_are_dropped_by_accuracy(whole, inputs, tmp_path, on_rank):
    """Greedily by a task's items; other items are another artifact."""
    shutil.copytree(whole.output, tmp_path / "out")
    items = [
        {"query": "the teacher and the", "choices": ["student", "loss"], "gold": gold} for gold in (0, 1, 1)
    ]
    items.append({"query": "prune the", "choices": ["head", "layer"], "gold": 0})
    lines, task = [json.dumps(item) + "\n" for item in items], tmp_path / "task.jsonl"
    task.write_text("".join(lines))
    sizes = {
        "target": {"num_layers": 2},
        "depth": {"method": "greedy", "metric": "task", "task": str(task), "micro_batch_size": 4},
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sizes
    )
    assert [on_rank(stage, recipe).code for stage in ("depth", "plan")] == [0, 0]
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    others = [trial["next_best"] for trial in found["trials"]]
    assert [len(trial["dropped"]) for trial in found["trials"] + others] == [1, 2, 1, 2]
    shares = [trial["accuracy"] for trial in [found["base"], *found["trials"]]]
    assert {share * 4 for share in shares} <= {1, 2, 3}
    assert all("accuracy" in trial for trial in others)
    assert PrunePlan.load(tmp_path / "out" / "plan.json").layers == sorted(
        {0, 1, 2, 3} - set(found["trials"][-1]["dropped"])
    )
    task.write_text("".join(lines[:2]))
    refused(on_rank("plan", recipe), "depth.json was made from other inputs or settings", "input task: ")
    refused(
        on_rank("compress", recipe, "depth.task=nowhere.jsonl"), "depth.task: there is no file nowhere.jsonl"
    )


REMOTE = ("teacher.placement=remote", "teacher.window=2")


@pytest.fixture
def in_job(ranks):
    """in_job(count, words...) runs the command line on pool ranks, which make their own worlds."""
    return lambda count, *words: ranks(
        count, "project_workers.minitron", arguments=[str(word) for word in words], own_job=True
    )


@pytest.mark.parametrize(
    ("size", "overrides", "tolerance"),
    [
        (2, (), 0.0),  # the same kernels on the same numbers
        (
            4,
            (
                "parallel.tp=2",
                "teacher.parallel.tp=2",
                "teacher.payload=topk",
                "teacher.top_k=300",
            ),  # all tokens are among the top k
            1e-4,
        ),
        (
            4,
            ("parallel.tp=2", "parallel.sequence_parallel=true", "teacher.ranks=2"),
            1e-4,
        ),  # and two of the teacher
    ],
    ids=["hidden", "topk-tp2-to-tp2", "dp2-to-tp2"],
)
def test_remote_teacher_gives_the_same_loss_curve(
    whole, inputs, tmp_path, in_job, size, overrides, tolerance
):
    """All stages run on the student's ranks; distill has the teacher on the rest of the job."""
    shutil.copytree(whole.output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "student_distilled")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out")
    for done in in_job(size, "distill", recipe, *REMOTE, *overrides):
        assert done.code == 0, done.err
    here, there = read_metrics(tmp_path / "out"), read_metrics(whole.output)
    assert [m["step"] for m in here] == list(range(1, STEPS + 1))
    for key in ("loss", "kl", "ce", "grad_norm"):
        assert [m[key] for m in here] == pytest.approx([m[key] for m in there], rel=tolerance, abs=0), key
    if size == 2:  # 30 steps of 4 x 32 tokens with 64 channels of 4 bytes
        steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert sum(m["transport_gb_per_s"] * m["step_time_s"] for m in steps) == pytest.approx(
            STEPS * 4 * 32 * 64 * 4 / 1e9
        )
        assert all(0 <= m["teacher_wait_s"] <= m["step_time_s"] for m in steps)
        assert all(m["tokens_per_s_per_gpu"] == pytest.approx(m["tokens_per_s"] / 2) for m in steps)
        assert {"student_tflops", "teacher_tflops", "peak_memory_gib", "eta_s"} <= steps[0].keys()
        assert steps[-1]["eta_s"] == 0


@pytest.mark.parametrize(
    ("overrides", "size"),
    [((), 2), (("teacher.ranks=2", "distill.log_interval=2", "distill.async_save=true"), 3)],
)
def test_stopped_run_with_remote_teacher_resumes_bitwise(
    whole, inputs, tmp_path, in_job, ranks, overrides, size
):
    """The teacher is ahead when the student stops; both stop at the step that the teacher sends."""
    shutil.copytree(whole.output, tmp_path / "out")
    drop(tmp_path / "out", "distill")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out")
    words = [str(word) for word in ("distill", recipe, *REMOTE, *overrides)]
    first = ranks(size, "project_workers.minitron", arguments=words, own_job=True, stop_at=8)
    for done in first:
        assert done.code == 0, done.err
    left = len(read_metrics(tmp_path / "out"))
    assert 8 < left < 16
    reason = f"stop file {tmp_path / 'out' / 'stop'} exists"
    stopped = f"distill: stopped after step {left} ({reason}); checkpoint saved"
    assert f"{stopped}; the same command resumes from there" in first[0].out
    assert not (tmp_path / "out" / "stop").exists()
    assert not (tmp_path / "out" / "student_distilled").exists()
    second = in_job(size, *words)
    for done in second:
        assert done.code == 0, done.err
    assert f"distill: resuming from step {left}" in second[0].out
    assert read_metrics(tmp_path / "out") == read_metrics(whole.output)


def test_remote_hidden_states_reach_every_stage(whole, inputs, tmp_path, on_rank, in_job):
    """One student runs beside its teacher on a rank.

    The other has pp 2 and a teacher on a third rank.
    """
    words, curves = ("distill.steps=5", "distill.states.layers={0: 0, 1: 3, 3: 4}"), []
    for name, run in (
        ("here", lambda *words: [on_rank(*words)]),
        ("there", lambda *words: in_job(3, *words, *REMOTE, "parallel.pp=2")),
    ):
        shutil.copytree(whole.output, tmp_path / name)
        shutil.rmtree(tmp_path / name / "student_distilled")
        recipe = make_recipe_file(
            tmp_path / f"{name}.yaml", inputs / "model", inputs / "text", tmp_path / name
        )
        for done in run("distill", recipe, *words):
            assert done.code == 0, done.err
        curves.append(read_metrics(tmp_path / name))
    assert [m["alpha"] for m in curves[0]] == pytest.approx(
        [1.0, *(m["kl"] / m["states"] for m in curves[0][:-1])]
    )
    for mine, other in zip(*curves, strict=True):
        assert mine["states"] > 0
        assert {**mine, "step": 0} == pytest.approx({**other, "step": 0}, rel=1e-4)
    refused(
        on_rank("compress", recipe, "distill.states.layers={0: 0, 4: 4}"),
        "has state 4 of the student, whose states are 0 (embeddings) to 3 (after the final norm)",
    )


def test_job_too_small_for_its_roles_is_rejected(whole, in_job):
    """One rank, which would be the teacher's."""
    for stage in ("import", "distill", "compress"):
        refused(
            in_job(1, stage, whole.recipe, *REMOTE)[0],
            "this job has 1 ranks, but its roles need 0 (student) + 1 (teacher); change",
        )


def test_killed_run_with_remote_teacher_resumes(whole, copied):
    """The stream starts where the student's checkpoint is."""
    drop(copied.output, "distill", "evaluate", "export")
    logged = start_and_kill(copied, *REMOTE, ranks=2)
    assert CHECKPOINT_INTERVAL < logged < STEPS
    done = minitron("distill", copied.recipe, *REMOTE, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "distill: resuming from step" in done.stdout
    assert read_metrics(copied.output) == read_metrics(whole.output)


def test_cached_teacher_gives_the_same_loss_curve(whole, inputs, tmp_path, on_rank, in_job):
    """Written by two tensor parallel ranks, read by one.

    The cache is an artifact like any other.
    """
    shutil.copytree(whole.output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "student_distilled")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out")

    def run(stage, *words):
        return on_rank(stage, recipe, *words)

    cached = "teacher.placement=cached"
    refused(run("distill", cached), "teacher_signals is missing; run `minitron-mp cache` first")
    refused(run("cache"), "teacher.placement: cached")
    assert [done.code for done in in_job(2, "cache", recipe, cached, *TWO_RANKS)] == [0, 0]
    code, out, err = run("compress", cached)
    assert code == 0, err
    assert "cache: done" in out
    here, there = read_metrics(tmp_path / "out"), read_metrics(whole.output)
    for key in ("loss", "kl", "ce", "grad_norm"):  # two ranks round the teacher's sums in another order
        assert [m[key] for m in here] == pytest.approx([m[key] for m in there], rel=1e-4, abs=0), key
    refused(
        run("distill", cached, "distill.micro_batch_size=4", "--force"),
        "teacher_signals was made from other inputs or settings",
        "micro_batch_size: 2, here 4",
    )
    (shard, *_) = sorted((tmp_path / "out" / "teacher_signals").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(run("distill", cached, "--force"), f"{shard} is damaged", "run `minitron-mp cache` again")


def test_siblings_share_one_teacher_stream(inputs, whole, tmp_path, on_rank, in_job):
    """Two students of different sizes and layouts share one teacher.

    Each has the loss curve of a separate run.
    """
    sizes = {"target": {"num_layers": 4, "ffn_hidden_size": 64}}
    alone = make_recipe_file(
        tmp_path / "alone.yaml", inputs / "model", inputs / "text", tmp_path / "alone", **sizes
    )
    assert on_rank("compress", alone).code == 0
    for name, source in (("first", whole.output), ("second", tmp_path / "alone")):
        shutil.copytree(source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "student_distilled")
    sibling = make_recipe_file(
        tmp_path / "second.yaml",
        inputs / "model",
        inputs / "text",
        tmp_path / "second",
        **sizes,
        parallel={"tp": 2},
    )
    recipe = make_recipe_file(
        tmp_path / "first.yaml",
        inputs / "model",
        inputs / "text",
        tmp_path / "first",
        teacher={"placement": "remote", "window": 2, "siblings": {str(sibling): 2}},
    )
    for done in in_job(4, "distill", recipe):
        assert done.code == 0, done.err
    for name, expected, tolerance in (("first", whole.output, 0.0), ("second", tmp_path / "alone", 1e-4)):
        here, there = read_metrics(tmp_path / name), read_metrics(expected)
        assert [m["loss"] for m in here] == pytest.approx([m["loss"] for m in there], rel=tolerance, abs=0), (
            name
        )


@pytest.mark.slow
def test_remaining_teacher_replicas_take_over(whole, copied, tmp_path):
    """Two torchrun agents have a teacher replica each, and one agent dies.

    The job restarts without it and gives the same losses.
    """
    drop(copied.output, "distill", "evaluate", "export")
    (copied.output / "metrics.jsonl").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{free.getsockname()[1]}",
            "--rdzv-id",
            "elastic",
        ]
    patience = [
        "--rdzv-conf",
        "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5",
        "--monitor-interval",
        "0.2",
    ]
    distill = [
        "-m",
        "minitron_mp",
        "distill",
        str(copied.recipe),
        *REMOTE,
        "teacher.student_ranks=1",
        "teacher.timeout_s=20",
    ]
    agents, text = [], ""
    try:
        for ranks in (2, 1):  # the student is on the first one, which also has the store
            words = [
                "--nnodes",
                "1:2",
                "--nproc-per-node",
                str(ranks),
                "--max-restarts",
                "3",
                *place,
                *patience,
                *distill,
            ]
            with (tmp_path / f"agent{ranks}.txt").open("w") as log:
                line = [sys.executable, "-m", "torch.distributed.run", *words]
                # A separate store for each start of the ranks: the agents' store still has the
                # addresses of dead ranks.
                own_store = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
                agents.append(
                    subprocess.Popen(
                        line, env=own_store, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            time.sleep(1)
        logged = wait_past_a_checkpoint(copied, agents[0])
        kill_tree(agents[1])
        ended = agents[0].wait(120)
    finally:
        for agent in agents:
            kill_tree(agent)
        text = (tmp_path / "agent2.txt").read_text()
        print(text)
    assert ended == 0, text
    assert CHECKPOINT_INTERVAL < logged < STEPS
    assert "2 copies of the teacher, from job rank 1 on" in text
    assert "1 copy of the teacher" in text
    assert "distill: resuming from step" in text
    assert read_metrics(copied.output) == read_metrics(whole.output)


def test_fp8_teacher_kl_is_logged(ranks, whole):
    """Compare a teacher with itself, then with another; an FP8 one takes a GPU (tests/gpu)."""
    same, other = ranks(1, "project_workers.drift", recipe=str(whole.recipe))[0]
    assert re.fullmatch(
        r"teacher in FP8 \(tensorwise\): KL\(bf16 \|\| FP8\) -?0\.0000\d on \d+ tokens, "
        r"loss (\S+), in bf16 \1",
        same,
    )
    assert float(re.search(r"FP8\) (\S+)", other)[1]) > 0.001
