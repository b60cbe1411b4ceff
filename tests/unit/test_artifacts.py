"""Artifacts are complete or absent, and errors explain mismatches with the recipe."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron_mp.artifacts.files import aside_path, fingerprint_files, write_text
from minitron_mp.artifacts.manifest import (
    Manifest,
    commit_artifact,
    find_manifest,
    prepare_artifact,
    require_artifact,
    user_files,
    writing_artifact,
)
from minitron_mp.artifacts.run_folder import discard_checkpoints
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch

ARCH = Arch(
    family="llama",
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=10,
    max_position_embeddings=8,
    tied=True,
)


def make_manifest(**settings) -> Manifest:
    return Manifest(
        stage="score",
        settings={"num_samples": 4, "target": {"keep": None}} | settings,
        inputs={"data": "abc"},
        arch=ARCH,
    )


@pytest.fixture
def folder(tmp_path):
    with writing_artifact(tmp_path / "teacher", make_manifest()) as aside:
        (aside / "weights").write_text("first")
    return tmp_path / "teacher"


def found(folder: Path) -> Manifest | None:
    """The manifest of an artifact, without its list of files."""
    manifest = find_manifest(folder)
    return manifest and manifest.model_copy(update={"files": {}})


def names(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_folder_appears_with_its_manifest(folder, tmp_path):
    assert names(tmp_path) == ["teacher"]
    assert find_manifest(folder) == require_artifact(folder, "score", make_manifest())
    assert found(folder) == make_manifest()
    with writing_artifact(folder, make_manifest(num_samples=5)) as aside:
        (aside / "other").write_text("second")
        assert found(folder) == make_manifest()  # the old one until the end
    assert names(folder) == ["manifest.json", "other"]
    assert names(tmp_path) == ["teacher"]
    assert found(folder) == make_manifest(num_samples=5)


def fail_in_the_middle(folder):
    with writing_artifact(folder, make_manifest(num_samples=5)) as aside:
        (aside / "weights").write_text("half")
        raise RuntimeError("disk full")


def test_failed_write_keeps_the_old_artifact(folder):
    with pytest.raises(RuntimeError, match="disk full"):
        fail_in_the_middle(folder)
    assert found(folder) == make_manifest()
    assert (folder / "weights").read_text() == "first"
    with writing_artifact(folder, make_manifest()) as aside:
        assert names(aside) == []  # what was left aside does not get into the next one


@pytest.mark.parametrize("killed_at", ["first rename", "second rename", "delete"])
def test_kill_during_replacement(folder, monkeypatch, killed_at):
    """Stop commit() before each of its steps.

    Then find() returns a complete artifact, and a new run works.
    """

    def kill(*_, **__):
        raise KeyboardInterrupt

    steps = {
        "first rename": ("pathlib.Path.rename", 0),
        "second rename": ("pathlib.Path.rename", 1),
        "delete": ("shutil.rmtree", 1),
    }
    target, survived = steps[killed_at]
    real, calls = (os.rename if "rename" in target else shutil.rmtree), []

    def counted(*args, **kwargs):
        calls.append(args)
        return kill() if len(calls) > survived else real(*args, **kwargs)

    prepare_artifact(folder)
    (aside_path(folder) / "weights").write_text("second")
    with monkeypatch.context() as patch:
        patch.setattr(target, counted)
        with pytest.raises(KeyboardInterrupt):
            commit_artifact(folder, make_manifest(num_samples=5))
    assert found(folder) == make_manifest(num_samples=5 if killed_at == "delete" else 4)
    assert (folder / "weights").read_text() == ("second" if killed_at == "delete" else "first")
    with writing_artifact(folder, make_manifest(num_samples=6)) as aside:
        (aside / "weights").write_text("third")
    assert found(folder) == make_manifest(num_samples=6)
    assert names(folder.parent) == ["teacher"]


def user_link(folder: Path) -> None:
    (folder / "linked").symlink_to(folder.parent)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "results.json").write_text("mine"), "results.json"),
        (lambda folder: (folder / "assets" / "eval.csv").write_text("mine"), "assets/eval.csv"),
        (lambda folder: os.close(os.open(os.fsencode(folder) + b"/caf\xe9", os.O_CREAT)), "caf\\xe9"),
        (lambda folder: (folder / "README.md").write_text("# my card"), "README.md"),
        (lambda folder: (folder / "assets" / "config.json").write_text("{}"), "assets/config.json"),
        (user_link, "linked"),
    ],
)
def test_artifact_with_files_of_the_user_is_not_replaced(tmp_path, change, name):
    """Nor is a folder that is no artifact. A file system's own files and deleted files do not matter."""
    folder = tmp_path / "student"
    with writing_artifact(folder, make_manifest()) as aside:
        (aside / "assets").mkdir()
        for path in ("weights", "README.md", "assets/config.json"):
            (aside / path).write_text('{"a": 1}')
    assert user_files(folder) == []
    (folder / "weights").unlink()
    (folder / ".nfs0001").touch()
    assert user_files(folder) == []
    change(folder)
    assert user_files(folder) == [name]
    for artifact in (folder, folder / "assets"):
        before = names(artifact)
        with pytest.raises(InputError, match=r"be lost that|did not write it"):
            prepare_artifact(artifact)
        assert names(artifact) == before
        assert not aside_path(artifact).exists()


def test_checkpoint_with_files_of_the_user_is_kept(tmp_path):
    for step in ("step_00000001", "step_00000002"):
        with writing_artifact(tmp_path / step, make_manifest()) as aside:
            (aside / "weights").touch()
    (tmp_path / "step_00000001" / "notes.md").touch()
    discard_checkpoints(tmp_path, make_manifest())
    assert names(tmp_path) == ["step_00000001"]


def test_missing_damaged_and_foreign_artifacts_are_rejected(folder, tmp_path):
    assert find_manifest(tmp_path / "nothing") is None
    assert find_manifest(tmp_path / "nothing.json") is None
    assert find_manifest(tmp_path / "nothing.safetensors") is None
    with pytest.raises(InputError, match=r"nothing is missing; run `minitron-mp score` first"):
        require_artifact(tmp_path / "nothing", "score")

    for content in ("", "{", "{}", '{"stage": "score", "settings": {}, "inputs": {}, "more": 1}'):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"(?s)teacher is damaged .*delete it and run its stage again"):
            find_manifest(folder)
    (tmp_path / "plan.json").write_text('{"layers": []}')
    (tmp_path / "scores.safetensors").write_bytes(b"junk")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "foreign.safetensors")
    (tmp_path / "notes.json").write_text("my notes")
    (tmp_path / "list.json").write_text("[]")
    for name in ("plan.json", "list.json", "foreign.safetensors"):
        with pytest.raises(InputError, match=f"{name} has no manifest: minitron-mp did not write it .* move"):
            find_manifest(tmp_path / name)
    for name in ("notes.json", "scores.safetensors"):
        with pytest.raises(InputError, match=f"{name} cannot be read .* did not write it, or .*; move it"):
            find_manifest(tmp_path / name)

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "novel.txt").write_text("mine")
    with pytest.raises(
        InputError,
        match=r"data has no manifest\.json: .*will not replace it; move it, or set another output",
    ):
        find_manifest(tmp_path / "data")


@pytest.mark.parametrize(
    ("other", "row"),
    [
        (make_manifest(num_samples=5), "settings.num_samples: 4, here 5"),
        (make_manifest(target={"keep": 0.5}), "settings.target.keep: None, here 0.5"),
        (
            make_manifest(extra=None),
            "settings.extra: None, here None",
        ),  # absent is not the same as none: the fingerprints differ
        (make_manifest().model_copy(update={"inputs": {"data": "xyz"}}), "input data: 'abc', here 'xyz'"),
        (make_manifest().model_copy(update={"inputs": {}}), "input data: 'abc', here None"),
        (make_manifest().model_copy(update={"stage": "plan"}), "stage: 'score', here 'plan'"),
        (make_manifest().model_copy(update={"format": 3}), "format: 2, here 3"),
    ],
)
def test_stale_artifact_lists_differences(folder, other, row):
    assert other.fingerprint != make_manifest().fingerprint
    assert make_manifest().differences(other) == [row]
    with pytest.raises(InputError) as caught:
        require_artifact(folder, "score", other)
    assert str(caught.value).splitlines()[1:] == [f"  - {row}"]
    assert "run `minitron-mp score` again" in str(caught.value)


def test_artifact_of_an_older_format_is_rejected_in_one_line(tmp_path):
    with writing_artifact(tmp_path / "scores", make_manifest().model_copy(update={"format": 1})):
        pass
    with pytest.raises(InputError) as caught:
        require_artifact(tmp_path / "scores", "score")
    assert str(caught.value) == (
        f"{tmp_path / 'scores'} has format 1, this version reads format 2; "
        "delete it and run `minitron-mp score` again"
    )


def test_only_checkpoints_of_the_finished_run_are_deleted(tmp_path):
    """And what a kill left of a save; not another run's, nor somebody else's files."""
    mine, other = (Manifest(stage="distill", settings={"steps": steps}, inputs={}) for steps in (1, 2))
    folder = tmp_path / "checkpoints" / "distill"
    for name, manifest in (("step_00000001", mine), ("step_00000002", other)):
        with writing_artifact(folder / name, manifest):
            pass
    (folder / ".step_00000003.tmp").mkdir()
    (folder / "step_00000004").mkdir()
    (folder / "my_step_notes").mkdir()
    discard_checkpoints(folder, mine)
    assert sorted(path.name for path in folder.iterdir()) == ["my_step_notes", "step_00000002"]
    (folder / "my_step_notes").rmdir()
    discard_checkpoints(folder, other)
    discard_checkpoints(folder, other)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_covers_settings_but_not_sizes():
    assert (
        make_manifest().fingerprint
        == Manifest.model_validate_json(make_manifest().model_dump_json()).fingerprint
    )
    assert make_manifest().fingerprint == make_manifest().model_copy(update={"arch": None}).fingerprint
    assert make_manifest().differences(make_manifest()) == []


def test_small_files_are_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / "new" / "plan.json"
    write_text(path, json.dumps({"manifest": make_manifest().model_dump(mode="json")}))
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "half")
    assert path.read_text() == before
    assert find_manifest(path) == make_manifest()
    write_text(path, "whole")
    assert names(path.parent) == ["plan.json"]


def test_file_fingerprint_covers_name_size_and_samples(tmp_path):
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(bytes(5 << 20))
    second.write_bytes(b"")
    found = fingerprint_files([first, second])
    assert found == fingerprint_files([second, first])
    seen = {found}
    for change in (0, 5 << 19, (5 << 20) - 1):
        content = bytearray(5 << 20)
        content[change] = 1
        first.write_bytes(content)
        seen.add(fingerprint_files([first, second]))
    first.write_bytes(bytes((5 << 20) + 1))
    seen.add(fingerprint_files([first, second]))
    seen.add(fingerprint_files([second]))
    assert len(seen) == 6
