"""A run with a blend: printed shares, a remote teacher, and a resume."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import REMOTE, STEPS, drop, make_recipe_file, read_metrics


@pytest.mark.slow
def test_blended_run_with_remote_teacher_resumes_bitwise(whole, inputs, tmp_path, on_rank, in_job, ranks):
    """Three texts: two of Megatron data, and a file. Beside its teacher the run has the same curve.

    Other shares leave the tokens as they are, and need a new student.
    """
    tokens = shutil.copytree(whole.output / "data", tmp_path / "tokens")
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "one more text of a few words. " * 80}) + "\n")
    train = {f"{tokens}/train": 3, f"{tokens}/calibration": "2 epochs", str(tmp_path / "more.jsonl"): 1}
    data = {"calibration": [f"{tokens}/calibration"], "train": train, "valid": {f"{tokens}/valid": 1}}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", data=data
    )
    recipe.write_text("".join(line for line in recipe.open() if "source:" not in line and "frac" not in line))
    done = on_rank("compress", recipe)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if line.startswith("distill: ") and " epochs" in line]
    assert [row.split(": ")[1] for row in rows] == sorted(train)
    assert rows[1].endswith(" tokens, 2 epochs")
    beside = read_metrics(tmp_path / "out")
    assert len(beside) == STEPS

    drop(tmp_path / "out", "distill", "evaluate", "export")
    words = [str(word) for word in ("distill", recipe, *REMOTE)]
    first = ranks(2, "project_workers.minitron", arguments=words, own_job=True, stop_at=8)
    assert [done.code for done in first] == [0, 0], first
    assert not (tmp_path / "out" / "student_distilled").exists()
    second = in_job(2, *words)
    assert [done.code for done in second] == [0, 0], second
    assert "distill: resuming from step" in second[0].out
    assert read_metrics(tmp_path / "out") == beside

    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("train: 3", "train: 2"))
    assert other.read_text() != recipe.read_text()
    assert "data: done, " in on_rank("data", other).out
    again = on_rank("distill", other)
    assert again.code == 0, again.err
    assert "train shares" in again.out
    assert read_metrics(tmp_path / "out") != beside
