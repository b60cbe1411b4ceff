"""Validation in a recipe, and --step of evaluate and export."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from tiny import REMOTE, drop, names, read_metrics, refused

from minitron_mp.artifacts.manifest import Validation, find_manifest, write_manifest, writing_artifact
from minitron_mp.artifacts.output_lock import locked
from minitron_mp.report.tables import harness_table
from minitron_mp.workflow.saved_steps import at_saved_step

VALIDATION = (
    "distill.valid_interval=6",
    "distill.valid_batches=4",  # 16 samples, as in evaluate
    "distill.keep_every=12",
    "distill.keep_checkpoints=1",
)


def test_saved_steps_are_validated_evaluated_and_exported(copied, whole, on_rank):
    drop(copied.output, "distill")
    refused(on_rank("evaluate", copied.recipe, *VALIDATION, "--step", "best"), "no saved step in")
    done = on_rank("distill", copied.recipe, *VALIDATION)
    assert done.code == 0, done
    assert "distill: held-out loss " in done.out
    metrics = read_metrics(copied.output)
    unvalidated = [{key: row[key] for key in row if not key.startswith("valid_")} for row in metrics]
    assert unvalidated == read_metrics(whole.output)
    held_out = {row["step"]: (row["valid_loss"], row["valid_kl"]) for row in metrics if "valid_loss" in row}
    assert list(held_out) == [6, 12, 18, 24, 30]
    checkpoints = copied.output / "checkpoints" / "distill"
    assert {"step_00000012", "step_00000024"} <= set(names(checkpoints))
    assert find_manifest(checkpoints / "step_00000012").lasts  # also without keep_every

    # Also beside a run, whose stop file and resolved recipe stay.
    resolved = (copied.output / "resolved_recipe.yaml").read_text()
    (copied.output / "stop").touch()
    with locked(copied.output):
        refused(on_rank("evaluate", copied.recipe, *VALIDATION, "--force"), "is in use")
        done = on_rank("evaluate", copied.recipe, "--step", "12")
        assert done.code == 0, done
    (copied.output / "stop").unlink()
    assert (copied.output / "resolved_recipe.yaml").read_text() == resolved
    assert not [name for name in names(copied.output) if name.endswith(".lock")]
    student = json.loads((copied.output / "evaluation_step_12.json").read_text())["distilled"]
    assert math.isclose(student["loss"], held_out[12][0], rel_tol=1e-5)
    assert math.isclose(student["kl"], held_out[12][1], rel_tol=1e-4)
    best = min(held_out, key=lambda step: held_out[step][0])
    for _ in range(2):  # the second time it is done
        done = on_rank("export", copied.recipe, *VALIDATION, "--step", "best")
        assert done.code == 0, done
    assert "export: done, " in done.out
    folder = copied.output / f"student_hf_step_{best}"
    assert json.loads((folder / "manifest.json").read_text())["settings"]["step"] == best
    assert f"Distillation: {best} steps of" in (folder / "README.md").read_text()
    refused(
        on_rank("export", copied.recipe, *VALIDATION, "--step", "13"),
        "--step 13: this is not a saved step of distill; give best or a saved step: 12, 24, 30",
    )
    assert copied.to_repeat(*VALIDATION).keys() <= {"evaluate", "export"}


def test_best_step_is_one_of_this_run(copied):
    """Not the better final model of a finished run with other settings."""
    final = copied.output / "student_distilled"
    update = {"validation": Validation(step=30, loss=1.0)}
    write_manifest(final, find_manifest(final).model_copy(update=update))
    again = copied.project("distill.lr=1e-3")
    checkpoint = copied.output / "checkpoints" / "distill" / "step_00000006"
    update = {"validation": Validation(step=6, loss=2.0)}
    with writing_artifact(checkpoint, again.manifest("distill").model_copy(update=update)):
        pass
    assert at_saved_step(again, "best").paths["distill"] == checkpoint
    assert at_saved_step(copied.project(), "best").paths["distill"] == final


def test_harness_reads_a_saved_step(copied, on_rank, tmp_path):
    """The table of the report shows the step beside the model."""
    pytest.importorskip("lm_eval")
    drop(copied.output, "distill")
    kept = ("distill.steps=12", "distill.keep_every=6")
    assert on_rank("distill", copied.recipe, *kept).code == 0
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_text(json.dumps({"query": "the teacher and the student"}) + "\n")
    task = {
        "task": "local_texts",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "items.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (tmp_path / "tasks" / "local_texts.yaml").write_text(yaml.safe_dump(task))
    words = ("--tasks", "local_texts", "--include-path", tmp_path / "tasks", "--step", "6")
    done = on_rank("harness", copied.recipe, *kept, *words)
    assert done.code == 0, done
    rows = harness_table(copied.output, copied.project(*kept).paths).rows
    assert {row[0] for row in rows} == {"distilled, step 6"}


def test_too_little_held_out_text_for_the_validations_is_found_before_training(copied, on_rank):
    drop(copied.output, "distill")
    done = on_rank("compress", copied.recipe, "distill.valid_interval=6", "distill.valid_batches=1000")
    refused(done, "valid text has", "lower distill.valid_batches x global_batch_size to at most")


def test_remote_teacher_gives_the_same_held_out_losses(copied, on_rank, in_job):
    """The signals of the held-out text arrive once, also after a resume."""
    validation = ("distill.steps=12", "distill.valid_interval=6", "distill.valid_batches=2")
    curves = []
    for placement in ((), REMOTE, (*REMOTE, "teacher.payload=logits")):
        drop(copied.output, "distill")
        if placement:
            done = in_job(2, "distill", copied.recipe, *validation, *placement)[0]
        else:
            done = on_rank("distill", copied.recipe, *validation)
        assert done.code == 0, done
        rows = [row for row in read_metrics(copied.output) if "valid_loss" in row]
        curves.append([(row["step"], row["valid_loss"], row["valid_kl"]) for row in rows])
    for curve in curves[1:]:
        assert [row[0] for row in curve] == [6, 12]
        for row, expected in zip(curve, curves[0]):
            assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(row, expected)), (row, expected)
