"""Runs that are killed or stopped resume, with and without a remote teacher."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from interrupt import kill_tree, start_and_kill, wait_past_a_checkpoint
from tiny import (
    CHECKPOINT_INTERVAL,
    MAX_LR,
    OUTPUT,
    REMOTE,
    STEPS,
    drop,
    environment,
    loss_curve,
    make_recipe_file,
    names,
    read_metrics,
    refused,
)

from minitron_mp.artifacts.manifest import writing_artifact


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
    assert loss_curve(copied) == loss_curve(whole)
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
    dry = on_rank("compress", copied.recipe, "--dry-run")
    assert f"{copied.output / 'stop'} exists: a run stops before its next stage and deletes" in dry.out
    done = on_rank("compress", copied.recipe)
    assert f"{copied.output / 'stop'} was deleted" in done.out
    assert done.code == 0, done
    reason = f"stop file {copied.output / 'stop'} exists"
    assert f"stopped before export ({reason}); the same command resumes from there" in done.out
    assert names(copied.output) == [name for name in OUTPUT if name not in ("finished", "student_hf")]
    assert on_rank("compress", copied.recipe).code == 0
    assert names(copied.output) == OUTPUT


def test_stop_before_a_stage_without_the_teacher_ends_every_rank(copied, in_job):
    """The teacher takes part in `distill` alone, so it does not wait for the student in another stage."""
    drop(copied.output, "score")
    (copied.output / "stop").touch()
    student, teacher = in_job(2, "score", copied.recipe, *REMOTE)
    assert (student.code, teacher.code) == (0, 0), student.err + teacher.err
    assert "stopped before score" in student.out
    assert not (copied.output / "stop").exists()


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
        "distill has checkpoints of another run, so it cannot resume",
        f"distill lr: 0.01, here {MAX_LR}. Restore the settings",
    )
    assert names(copied.output / "checkpoints" / "distill") == [f"step_{CHECKPOINT_INTERVAL:08d}"]


def test_checkpoints_of_another_correction_are_rejected(copied, on_rank):
    section = "correct={steps: 20, global_batch_size: 4, warmup_steps: 2}"
    folder = copied.output / "checkpoints" / "correct"
    with writing_artifact(folder / "step_00000005", copied.project(section).manifest("correct")):
        pass
    assert on_rank("compress", copied.recipe, section, "--dry-run").code == 0
    for words in (("correct",), ("compress", "--dry-run"), ("compress",)):
        refused(
            on_rank(words[0], copied.recipe, section, "correct.lr=0.5", *words[1:]),
            f"correct: {folder} has checkpoints of another run, so it cannot resume: correct lr: ",
            "here 0.5. Restore the settings, change them from here on with --accept lr, "
            f"set another output, or delete {folder} to start correct again",
        )
    assert names(folder) == ["step_00000005"]


def test_progress_of_another_search_is_rejected(copied, on_rank):
    recipe = yaml.safe_load(copied.recipe.read_text()) | {"target": {}}
    copied.recipe.write_text(yaml.safe_dump(recipe))
    section = "search={parameters: 100000, steps: 8}"
    file = copied.output / "search" / "progress.json"
    file.parent.mkdir()
    manifest = copied.project(section).manifest("search").model_dump()
    file.write_text(json.dumps({"manifest": manifest, "candidates": []}))
    assert on_rank("compress", copied.recipe, section, "--dry-run").code == 0
    for words in (("search",), ("compress", "--dry-run"), ("compress",)):
        refused(
            on_rank(words[0], copied.recipe, section, "search.steps=9", *words[1:]),
            f"search: {file.parent} has progress of another run, so it cannot resume: search ",
            f"Restore the settings, set another output, or delete {file.parent} to start search again",
        )
    assert file.is_file()


def test_run_that_would_orphan_its_checkpoints_is_refused_before_the_first_stage(copied, inputs, on_rank):
    """The artifacts that the checkpoints were made from stay, in a run and in one stage."""
    drop(copied.output, "distill")
    folder = copied.output / "checkpoints" / "distill"
    with writing_artifact(folder / f"step_{CHECKPOINT_INTERVAL:08d}", copied.project().manifest("distill")):
        pass
    before = copied.state()
    advice = f"set another output, or delete {folder} to start distill again"
    assert on_rank("compress", copied.recipe, "--dry-run").code == 0
    text = inputs / "text" / "00.txt"
    text.rename(copied.output.parent / "gone.txt")
    try:
        for words in (("compress", "--dry-run"), ("compress",), ("data",)):
            refused(
                on_rank(words[0], copied.recipe, *words[1:]),
                f"cannot resume: {text.parent} has changed since. Put the files back, {advice}",
            )
    finally:
        (copied.output.parent / "gone.txt").rename(text)
    for words in (("compress", "--dry-run"), ("compress",), ("score",)):
        refused(
            on_rank(words[0], copied.recipe, *words[1:], "score.num_samples=8"),
            f"cannot resume: score num_samples: 16, here 8. Restore the settings, {advice}",
        )
    assert copied.state() == before
    assert names(folder) == [f"step_{CHECKPOINT_INTERVAL:08d}"]
    assert on_rank("score", copied.recipe, "--force").code == 0
    assert on_rank("compress", copied.recipe, "--dry-run").code == 0


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


def test_killed_run_with_remote_teacher_resumes(whole, copied, in_job):
    """The stream starts where the student's checkpoint is."""
    drop(copied.output, "distill", "evaluate", "export")
    logged = start_and_kill(copied, *REMOTE, ranks=2)
    assert CHECKPOINT_INTERVAL < logged < STEPS
    student, teacher = in_job(2, "distill", copied.recipe, *REMOTE)
    assert (student.code, teacher.code) == (0, 0), student.err + teacher.err
    assert "distill: resuming from step" in student.out
    assert read_metrics(copied.output) == read_metrics(whole.output)


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
        logged = wait_past_a_checkpoint(copied, lambda: agents[0].poll() is None)
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
