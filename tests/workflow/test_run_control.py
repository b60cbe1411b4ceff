"""An unfinished training run continues with other settings, or from an older checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from fake_trackers import read_calls
from tiny import CHECKPOINT_INTERVAL, MAX_LR, OUTPUT, REMOTE, STEPS, drop, names, read_metrics, refused

from minitron_mp.artifacts.manifest import Change, find_manifest, writing_artifact
from minitron_mp.errors import InputError
from minitron_mp.workflow.teacher_stream import StreamStart, compare_settings

STOP = 2 * CHECKPOINT_INTERVAL


@pytest.fixture
def kept(copied):
    """A finished run that has kept the checkpoint after step 24. It cannot be read."""
    checkpoint = copied.output / "checkpoints" / "distill" / "step_00000024"
    with writing_artifact(checkpoint, copied.project().manifest("distill")):
        pass
    return copied


@pytest.fixture
def stopped(copied, on_rank):
    """A run that stopped after STOP steps."""
    drop(copied.output, "distill", "evaluate", "export")
    (copied.output / "metrics.jsonl").unlink()
    done = on_rank("distill", copied.recipe, stop_at=STOP - 1)
    assert f"distill: stopped after step {STOP}" in done.out
    return copied


def checkpoints(run) -> list[str]:
    return names(run.output / "checkpoints" / "distill")


def test_changed_settings_are_refused_with_the_option_that_accepts_them(stopped, on_rank):
    before = checkpoints(stopped)
    done = on_rank("compress", stopped.recipe, "distill.lr=1e-3", "distill.clip_grad=0.5")
    refused(
        done,
        f"distill clip_grad: 1.0, here 0.5; distill lr: {MAX_LR}, here 0.001",
        "Restore the settings, change them from here on with --accept clip_grad,lr, set another output",
    )
    # A setting that defines the run cannot change, and the option is not offered.
    done = on_rank("distill", stopped.recipe, "distill.lr=1e-3", "distill.temperature=2")
    refused(done, "Restore the settings, set another output")
    done = on_rank("distill", stopped.recipe, "distill.lr=1e-3", "--accept", "temperature")
    refused(done, "--accept temperature: not a setting that may change during a run; give some of lr,")
    # One name of two.
    done = on_rank("distill", stopped.recipe, "distill.lr=1e-3", "distill.clip_grad=0.5", "--accept", "lr")
    refused(done, "cannot resume: distill clip_grad: 1.0, here 0.5. Restore")
    assert checkpoints(stopped) == before


def test_accepted_settings_hold_from_the_next_step_on(stopped, whole, on_rank):
    """The curve until the stop and the next loss are those of the unchanged run.

    The manifest of the student has the history. The run is then complete: no stage runs again.
    """
    changed = ("distill.lr=1e-3", "distill.min_lr=0", "distill.schedule=linear", "distill.steps=20")
    accept = ("--accept", "lr,min_lr,schedule,steps")
    assert on_rank("compress", stopped.recipe, *changed, *accept, "--dry-run").code == 0
    done = on_rank("distill", stopped.recipe, *changed, *accept, stop_at=STOP + 2)
    assert done.code == 0, done
    assert f"distill: lr changes from {MAX_LR} to 0.001 after step {STOP}" in done.out
    assert f"distill: schedule changes from None to linear after step {STOP}" in done.out
    # The next checkpoint has the new settings, so the option is not needed any more.
    done = on_rank("compress", stopped.recipe, *changed)
    assert done.code == 0, done
    assert "changes from" not in done.out
    metrics, unchanged = read_metrics(stopped.output), read_metrics(whole.output)
    assert len(metrics) == 20
    assert metrics[:STOP] == unchanged[:STOP]
    assert metrics[STOP]["loss"] == unchanged[STOP]["loss"]
    assert metrics[STOP + 1]["loss"] != unchanged[STOP + 1]["loss"]
    for step in range(STOP + 1, 21):
        assert math.isclose(metrics[step - 1]["lr"], 1e-3 * (20 - step) / 16, abs_tol=1e-12)
    manifest = find_manifest(stopped.output / "student_distilled")
    assert manifest is not None
    assert manifest.changes == [
        Change(step=STOP, name="lr", old=MAX_LR, new=1e-3),
        Change(step=STOP, name="min_lr", old=MAX_LR / 10, new=0.0),
        Change(step=STOP, name="schedule", old=None, new="linear"),
        Change(step=STOP, name="steps", old=STEPS, new=20),
    ]
    assert stopped.to_repeat(*changed) == {}
    assert names(stopped.output) == OUTPUT


def test_saved_steps_of_a_changed_run_are_evaluated(stopped, on_rank):
    """Also those from before the change, whose manifests have the old settings."""
    changed = ("distill.lr=1e-3", f"distill.keep_every={CHECKPOINT_INTERVAL}")
    done = on_rank("distill", stopped.recipe, *changed, "--accept", "lr")
    assert done.code == 0, done
    for step in (CHECKPOINT_INTERVAL, STOP, STOP + CHECKPOINT_INTERVAL, STEPS):
        done = on_rank("evaluate", stopped.recipe, *changed, "--step", str(step))
        assert done.code == 0, done
        assert (stopped.output / f"evaluation_step_{step}.json").is_file()


def test_batch_size_and_skipped_batches_change_with_any_teacher(stopped, whole, on_rank, in_job):
    """The position in the text is counted in samples, on the student's and the teacher's ranks."""
    words = ("distill.global_batch_size=8", f"distill.skip_batches=[[{STOP + 2},{STOP + 3}]]")
    words += ("distill.steps=16", "--accept", "global_batch_size,skip_batches,steps")
    early = ("distill.skip_batches=[[2,3]]", "--accept", "skip_batches")
    refused(
        on_rank("distill", stopped.recipe, *early),
        f"skip_batches [[2, 3]] changes the batches [2, 3], and the run has read {STOP} batches",
    )
    refused(
        on_rank("distill", stopped.recipe, f"distill.steps={STOP}", "--accept", "steps"),
        f"steps {STOP} must be above the step {STOP} from which the run resumes",
    )
    done = on_rank("distill", stopped.recipe, *words, stop_at=STOP + 2)
    assert done.code == 0, done
    metrics = read_metrics(stopped.output)
    assert metrics[STOP]["num_tokens"] == 2 * metrics[0]["num_tokens"]
    # The remote teacher counts the samples before the change, too.
    assert on_rank("rewind", stopped.recipe, "distill", STOP).code == 0
    for done in in_job(2, "distill", stopped.recipe, *words, *REMOTE):
        assert done.code == 0, done.err
    remote = read_metrics(stopped.output)
    assert len(remote) == 16
    assert remote[: len(metrics)] == metrics


def test_resumed_run_continues_in_the_experiment_tracker(copied, ranks, whole, tmp_path):
    """One process of two sends each step, to one run, also after accepted changes."""
    drop(copied.output, "distill")
    calls, words = tmp_path / "calls", ["distill", str(copied.recipe), "log.wandb=p", "log.name=small"]
    for more, stop_at in (([], STOP - 1), (["distill.clip_grad=0.5", "--accept", "clip_grad"], None)):
        case = {"arguments": words + more, "stop_at": stop_at}
        for done in ranks(2, "project_workers.tracked", calls=calls, **case):
            assert done.code == 0, done.err
    rows = read_calls(calls)
    starts = [row for row in rows if row["call"] == "init"]
    assert len(starts) == 2
    assert len({row["id"] for row in starts}) == 1
    assert {(row["name"], row["project"], row["job_type"]) for row in starts} == {
        ("small distill", "p", "distill")
    }
    assert starts[1]["config"]["distill"]["clip_grad"] == 0.5
    assert len({row["process"] for row in rows}) == 1
    sent = [row["values"]["loss"] for row in rows if row["call"] == "log"]
    assert sent == [row["loss"] for row in read_metrics(copied.output)]
    assert len(sent) == STEPS
    assert [row["exit_code"] for row in rows if row["call"] == "finish"] == [0, 0]


def test_run_goes_back_to_an_older_checkpoint(stopped, whole, on_rank):
    """Later checkpoints and the metrics are moved, and the curve is that of the whole run."""
    newest, older = f"step_{STOP:08d}", f"step_{CHECKPOINT_INTERVAL:08d}"
    assert checkpoints(stopped) == [older, newest]
    step = str(CHECKPOINT_INTERVAL)
    refused(
        on_rank("distill", stopped.recipe, "--from-step", "7"),
        f"has no checkpoint after step 7; give one of the steps {step}, {STOP}",
    )
    refused(on_rank("rewind", stopped.recipe, "prune", "7"), "the stage prune has no checkpoints; give a")
    done = on_rank("distill", stopped.recipe, "--from-step", step, stop_at=CHECKPOINT_INTERVAL + 1)
    aside = stopped.output / "checkpoints" / "distill" / "set_aside_1"
    assert f"the checkpoints after the steps {STOP} and the metrics are now in {aside}" in done.out
    assert f"distill: resuming from step {step}" in done.out
    assert names(aside) == ["metrics.jsonl", newest]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == STOP
    # From the beginning, in a second folder. The first one stays.
    done = on_rank("rewind", stopped.recipe, "distill", "0")
    assert "set_aside_2" in done.out
    assert names(aside.with_name("set_aside_2"))[1:] == [older, f"step_{CHECKPOINT_INTERVAL + 2:08d}"]
    assert on_rank("distill", stopped.recipe).code == 0
    assert read_metrics(stopped.output) == read_metrics(whole.output)
    assert checkpoints(stopped) == ["set_aside_1", "set_aside_2"]
    refused(on_rank("distill", stopped.recipe, "--from-step", step), "distill is finished; add --force to")
    manifest = json.loads((stopped.output / "student_distilled" / "manifest.json").read_text())
    assert manifest["changes"] == []


def test_rewind_moves_the_checkpoints_of_all_students(stopped, on_rank, tmp_path):
    shutil.copytree(stopped.output, tmp_path / "second")
    sibling = tmp_path / "second.yaml"
    sibling.write_text(stopped.recipe.read_text().replace(str(stopped.output), str(tmp_path / "second")))
    words = (*REMOTE, f"teacher.siblings={{{sibling}: 1}}")
    folder = tmp_path / "second" / "checkpoints" / "distill"
    older, newest = sorted(folder.iterdir())
    hidden = older.rename(tmp_path / "older")
    done = on_rank("rewind", stopped.recipe, "distill", CHECKPOINT_INTERVAL, *words)
    refused(done, f"{folder} has no checkpoint after step {CHECKPOINT_INTERVAL}")
    assert checkpoints(stopped) == [older.name, newest.name]
    hidden.rename(older)
    assert on_rank("rewind", stopped.recipe, "distill", CHECKPOINT_INTERVAL, *words).code == 0
    assert checkpoints(stopped) == names(folder) == ["set_aside_1", older.name]


def test_students_that_resume_from_different_steps_are_refused():
    """The advice loses no data."""
    starts = {"student": 12, "sibling a.yaml": 6}
    received = {role: {"settings": {}, "step": step, "changes": []} for role, step in starts.items()}
    channel: Any = SimpleNamespace(exchange=lambda *_, **__: {"teacher": {"settings": {}}, **received})
    with pytest.raises(InputError, match=r"go back to .* `minitron-mp rewind RECIPE distill 6`"):
        compare_settings(channel, list(starts), {}, StreamStart(0, []))
    change = Change(step=9, name="global_batch_size", old=4, new=8).model_dump()
    for role, changes in (("student", []), ("sibling a.yaml", [change])):
        received[role] = {"settings": {}, "step": 12, "changes": changes}
    with pytest.raises(InputError, match=r"go back to .* `minitron-mp rewind RECIPE distill 9`"):
        compare_settings(channel, list(starts), {}, StreamStart(0, []))


def test_forced_stage_is_trained_again_from_its_first_step(kept, whole, on_rank):
    """Its checkpoints are set aside once, so the same command resumes after a stop."""
    done = on_rank("distill", kept.recipe, "--force", stop_at=STOP - 1)
    assert f"distill: stopped after step {STOP}" in done.out
    assert names(kept.output / "checkpoints" / "distill" / "set_aside_1")[-1] == "step_00000024"
    done = on_rank("distill", kept.recipe, "--force")
    assert done.code == 0, done
    assert f"distill: resuming from step {STOP}" in done.out
    assert read_metrics(kept.output) == read_metrics(whole.output)
    assert checkpoints(kept) == ["set_aside_1"]


def test_finished_run_is_not_changed(kept, on_rank):
    """Its model would be replaced. --force allows it."""
    words = ("distill.lr=1e-3", "--accept", "lr")
    refused(
        on_rank("compress", kept.recipe, "distill.lr=1e-3"),
        "change them from here on with `minitron-mp distill --accept lr --force`",
    )
    for command in ("distill", "compress"):
        refused(
            on_rank(command, kept.recipe, *words),
            f"student_distilled is finished with other settings (lr: {MAX_LR}, here 0.001), and a run from "
            "its checkpoint step_00000024 would replace it",
            "or run `minitron-mp distill` with --force",
        )
    refused(on_rank("distill", kept.recipe, *words, "--force"), "step_00000024 cannot be read")
