"""Tokenization in shares and shards, and the stages that need no GPU, on one rank in any layout."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chats import TEMPLATE, make_chats
from interrupt import kill_tree
from tiny import Run, drop, environment, make_recipe_file, refused

SMALL_SHARDS = """
from minitron_mp.data import shards
shards.SHARD_BYTES = 8000
from minitron_mp.cli import main
main()
"""
"""A program that is minitron-mp with small shards."""

NUM_SHARDS = 7
"""Shards of the project's text."""

LARGE_LAYOUT = ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2"]
REMOTE_TEACHER = ["teacher.placement=remote", "teacher.ranks=16", "teacher.parallel.tp=2"]


@pytest.fixture
def imported(whole, inputs, tmp_path) -> Run:
    """A project whose model is imported, and nothing else."""
    assert whole.done.returncode == 0, whole.done.stderr
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole.output / "teacher", output / "teacher")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", output)
    return Run(recipe, output)


@pytest.fixture
def tokenize(ranks):
    """tokenize(words...) runs the command line on one rank, with small shards."""
    return lambda *words, **options: ranks(
        1, "project_workers.tokenize", arguments=[str(word) for word in words], **options
    )[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }


def shard_times(output: Path) -> dict[str, int]:
    """Finished shard -> time at which it was finished."""
    files = (output / "shards" / "data").glob("[0-9]*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def test_shares_are_put_together(imported, whole, tokenize):
    for share in ("2/3", "1/3"):
        done = tokenize("data", imported.recipe, "--shard", share, *LARGE_LAYOUT)
        assert done.code == 0, done
        assert f"share {share} is done" in done.out
    made = shard_times(imported.output)
    assert not (imported.output / "data").exists()
    done = tokenize("data", imported.recipe, "data.workers=2", *LARGE_LAYOUT)
    assert done.code == 0, done
    assert f"data: {len(made)} of {NUM_SHARDS} shards are done" in done.out
    assert "workers: 2, threads of each: " in done.out
    assert contents(imported.output / "data") == contents(whole.output / "data")
    assert not (imported.output / "shards").exists()
    assert imported.to_repeat().keys().isdisjoint({"import", "data"})

    late = tokenize("data", imported.recipe, "--shard", "3/3")
    assert f"data: done, {imported.output / 'data'}" in late.out
    assert not (imported.output / "shards").exists()


def test_share_of_a_small_text_may_be_empty(imported, whole, on_rank):
    assert "share 2/2 has 0 of 1 shards" in on_rank("data", imported.recipe, "--shard", "2/2").out
    assert (
        "share 1/2 has 1 of 1 shards, of which 0 are done"
        in on_rank("data", imported.recipe, "--shard", "1/2").out
    )
    assert "1 of 1 shards are done" in on_rank("data", imported.recipe).out
    assert contents(imported.output / "data") == contents(whole.output / "data")


def test_share_needs_the_imported_model_and_a_valid_number(imported, tokenize):
    refused(tokenize("data", imported.recipe, "--shard", "0/2"), "--shard is '0/2'; give NUMBER/COUNT")
    shutil.rmtree(imported.output / "teacher")
    refused(tokenize("data", imported.recipe, "--shard", "1/2"), "run `minitron-mp import` first")


def test_killed_tokenization_resumes_with_its_finished_shards(imported, whole, tokenize):
    arguments = ["data", str(imported.recipe), "data.workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *arguments],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not shard_times(imported.output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    kill_tree(process)
    finished = shard_times(imported.output)
    assert 1 <= len(finished) < NUM_SHARDS
    done = tokenize("data", imported.recipe, "--shard", "1/1")
    assert f"share 1/1 has {NUM_SHARDS} of {NUM_SHARDS} shards, of which {len(finished)} are done" in done.out
    assert finished.items() <= shard_times(imported.output).items()
    assert tokenize("data", imported.recipe).code == 0
    assert contents(imported.output / "data") == contents(whole.output / "data")


def test_shards_that_another_job_replaces_are_not_used(imported, whole, tokenize):
    """A job of a job array that was submitted with other settings starts late."""
    late = [sys.executable, "-c", SMALL_SHARDS, "data", str(imported.recipe), "seed=7", "--shard", "1/2"]
    refused(
        tokenize("data", imported.recipe, meanwhile=late),
        "another process has replaced shards of",
        "(00000, 00002, 00004, 00006); end jobs with --shard and other settings, then run `minitron-mp data`",
    )
    assert not (imported.output / "data").exists()
    assert tokenize("data", imported.recipe).code == 0
    assert contents(imported.output / "data") == contents(whole.output / "data")


def test_text_that_changes_during_the_stage_is_not_used(imported, inputs, tmp_path, tokenize):
    text = tmp_path / "text"
    shutil.copytree(inputs / "text", text)
    more = [sys.executable, "-c", f"open({str(text / 'late.txt')!r}, 'w').write('It came late.')"]
    recipe = make_recipe_file(tmp_path / "changing.yaml", inputs / "model", text, imported.output)
    refused(
        tokenize("data", recipe, meanwhile=more),
        "files of the text were changed, added or removed while it was tokenized; run `minitron-mp data`",
    )
    assert not (imported.output / "data").exists()
    assert tokenize("data", recipe).code == 0


def test_run_stops_early_between_shards(imported, whole, tokenize):
    done = tokenize("compress", imported.recipe, "data.workers=1", stop_after=3)
    assert done.code == 0, done
    assert "stopped in data (stop file" in done.out
    assert "the same command resumes" in done.out
    assert len(shard_times(imported.output)) == 3
    done = tokenize("data", imported.recipe)
    assert f"3 of {NUM_SHARDS} shards are done" in done.out
    assert contents(imported.output / "data") == contents(whole.output / "data")


CHANGING = {".metadata", "manifest.json", "README.md"}
"""Files with the time or the version at which they were written."""


def artifact_contents(path: Path) -> dict[str, bytes]:
    """Return the content of each file of an artifact, without Megatron's index of the samples."""
    files = [file for file in [path, *path.rglob("*")] if file.is_file() and "index" not in file.parts]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("teacher", [[], REMOTE_TEACHER], ids=["colocated", "remote"])
def test_stages_without_gpu_run_on_one_rank_in_any_layout(copied, in_job, teacher):
    """Their artifacts are those of the layout of one rank."""
    layout = [*LARGE_LAYOUT, *teacher]
    for stage in ("import", "data", "plan", "export"):
        path = copied.project().paths[stage]
        before = artifact_contents(path)
        drop(copied.output, stage)
        (done,) = in_job(1, stage, copied.recipe, *layout)
        assert done.code == 0, (stage, done)
        after = artifact_contents(path)
        assert after.keys() == before.keys(), stage
        assert {name for name in before if after[name] != before[name]} <= CHANGING, stage
    (copied.output / "report.md").unlink()
    (done,) = in_job(1, "report", copied.recipe, *layout)
    assert done.code == 0, done
    assert (copied.output / "report.md").is_file()
    assert copied.to_repeat() == {}


@pytest.mark.parametrize("stage", ["import", "export"])
def test_stages_without_gpu_run_on_a_number_of_ranks_that_no_layout_has(copied, in_job, stage):
    drop(copied.output, stage)
    for done in in_job(3, stage, copied.recipe, *LARGE_LAYOUT):
        assert done.code == 0, done
    assert copied.to_repeat() == {}


def test_chats_of_a_recipe(imported, tokenize, tmp_path):
    """Shares have the same masks. The template belongs to the text."""
    folder = tmp_path / "chats"
    folder.mkdir()
    for number in range(4):
        chats = [{"messages": chat} for chat in make_chats(60, 60 * number)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    words = [f"data.source={folder}", "data.chat_field=messages", f"data.chat_template={template}"]
    words.append("data.workers=1")
    share = tokenize("data", imported.recipe, "--shard", "1/2", *words)
    assert share.code == 0, share
    assert len(shard_times(imported.output)) == 2
    done = tokenize("data", imported.recipe, *words)
    assert done.code == 0, done
    assert "data: 2 of 4 shards are done" in done.out
    counted = re.search(r"data: tokens that count in the loss: .*train ([\d,]+) \((\d+)%\)", done.out)
    assert counted
    assert 5 < int(counted[2]) < 95

    again = tmp_path / "again"
    shutil.copytree(imported.output / "teacher", again / "teacher")
    whole = tokenize("data", imported.recipe, *words, f"output={again}")
    assert whole.code == 0, whole
    names = contents(again / "data")
    assert {"train.loss_mask.bin", "valid.loss_mask.idx"} <= names.keys()
    assert names == contents(imported.output / "data")
    assert "data" not in imported.to_repeat(*words)
    template.write_text(TEMPLATE + " ")
    assert "chat template" in str(imported.to_repeat(*words)["data"])
