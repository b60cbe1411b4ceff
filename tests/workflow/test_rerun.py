"""A finished project that is run again: what repeats, and which artifacts are rejected."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import (
    MAX_LR,
    OUTPUT,
    STAGES,
    STEPS,
    TWO_RANKS,
    drop,
    make_recipe_file,
    names,
    read_metrics,
    refused,
)

SMALLER = "target.ffn_hidden_size=64"


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
        ("parallel.pp=2", "parallel.layers=[2, 1]", "parallel.teacher_layers=[1, 3]"),
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
    refused(on_rank("prune", copied.recipe), "plan.json cannot be read")
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
