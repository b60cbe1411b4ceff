"""The output folder: user files in it are kept, and inputs that a run would replace are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import environment, make_model, make_recipe_file, make_text, make_tokenizer, refused

from minitron_mp import load_recipe
from minitron_mp.artifacts.manifest import Manifest, write_manifest
from minitron_mp.config.recipe import RESOLVED_RECIPE, make_recipe
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.output_folder import output_problems, write_resolved_recipe


def problems(output: Path, *, report: bool = True, **keys) -> list[str]:
    recipe = make_recipe({"model": str(output.parent / "m"), "output": str(output), **keys})
    return output_problems(recipe, StageGraph(recipe).paths, report=report)


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with artifacts, beside the text `t` and the model `m`."""
    for name in ("teacher", "data", "student_hf", "checkpoints/distill/step_00000003", ".data.old"):
        (tmp_path / "out" / name).mkdir(parents=True)
    for name in (
        "data/train.bin",
        "data/train.idx",
        "data/a.txt",
        "metrics.jsonl",
        "student_hf/tokenizer.json",
    ):
        (tmp_path / "out" / name).touch()
    for name in ("teacher", "data", "student_hf"):
        write_manifest(tmp_path / "out" / name, Manifest(stage=name, settings={}, inputs={}))
    for name in ("t", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "t/a.txt").touch()
    return tmp_path / "out"


def links(output: Path) -> dict[str, Path]:
    """Make paths outside of the output that lead to its data."""
    folder = output.parent
    (folder / "link").symlink_to(output / "data")
    (folder / "chain").symlink_to("link")
    (folder / "train.bin").symlink_to(output / "data/train.bin")
    (folder / "train.idx").symlink_to(output / "data/train.idx")
    (folder / "t/linked").symlink_to("../out/data")
    (folder / "u").mkdir()
    (folder / "u/a.txt").symlink_to(output / "data/a.txt")
    return {
        "plain": output / "data/train",
        "with suffix": output / "data/train.bin",
        "folder": output / "data",
        "dots": folder / "t/../out/./data/train",
        "relative": Path(os.path.relpath(output / "data/train")),
        "link": folder / "link/train",
        "chain of links": folder / "chain/train",
        "linked files of a prefix": folder / "train",
        "link in a folder": folder / "t",
        "linked file in a folder": folder / "u",
        "old artifact": output / ".data.old",
        "half artifact": output / ".data.tmp/train",
        "log": output / "metrics.jsonl",
        "checkpoint": output / "checkpoints/distill/step_00000003",
    }


@pytest.mark.parametrize("name", [
    "plain", "with suffix", "folder", "dots", "relative", "link", "chain of links",
    "linked files of a prefix", "link in a folder", "linked file in a folder", "old artifact",
    "half artifact", "log", "checkpoint",
])  # fmt: skip
def test_text_that_a_run_would_replace_is_refused(output, name):
    path = str(links(output)[name])
    for data, key in (
        ({"source": path}, "data.source"),
        ({"calibration": ["a"], "train": ["b", path], "valid": ["c"]}, "data.train"),
        ({"held_out": {"old": [path]}}, "data.held_out.old"),
    ):
        (row,) = problems(output, data=data)
        assert row.startswith(f"{key}: ")
        assert "would be lost, because it lies in " in row
        assert "copy it out of the output folder and give the copy, or set another output" in row


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"model": "{out}/student_hf"}, "model"),
        ({"model": "{out}/student_hf/../student_hf"}, "model"),
        ({"teacher": {"model": "{out}/teacher/assets"}}, "teacher.model"),
        ({"data": {"tokenizer": "{out}/student_hf/tokenizer.json"}}, "data.tokenizer"),
        ({"evaluate": {"tasks": {"x": "{out}/data/items.jsonl"}}}, "evaluate.tasks.x"),
        (
            {"depth": {"method": "drop", "metric": "task", "task": "{out}/teacher/x.jsonl"}},
            "depth.task",
        ),
    ],
)
def test_other_inputs_that_a_run_would_replace_are_refused(output, keys, key):
    filled = yaml.safe_load(yaml.safe_dump(keys).replace("{out}", str(output)))
    (row,) = problems(output, **filled)
    assert row.startswith(f"{key}: ")


def test_inputs_beside_the_artifacts_are_allowed(output):
    (output / "texts").mkdir()
    (output / "texts/a.txt").touch()
    assert problems(output, data={"source": [str(output / "texts"), str(output.parent / "t")]}) == []
    assert problems(output, model=str(output), data={"source": str(output.parent)}) == []


def test_bind_mount_is_recognised(output, tmp_path):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    command = ["mount", "--bind", str(output / "data"), str(mounted)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        (row,) = problems(output, data={"source": str(mounted)})
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert row.startswith("data.source: ")


@pytest.mark.parametrize(
    "name",
    ["report.md", "report.html", "metrics.jsonl", "stages.jsonl", "finished", "stop", RESOLVED_RECIPE],
)
def test_user_file_of_the_same_name_is_not_replaced(output, name):
    (output / name).write_text("# my own notes\n")
    (row,) = problems(output)
    change = "deleted" if name == "stop" else "replaced"
    assert row == (
        f"output: {output / name} would be {change}, but minitron-mp did not write it, or it was edited; "
        "rename it, or set another output"
    )
    assert bool(problems(output, report=False)) == (not name.startswith("report."))
    (output / name).unlink()
    (output / name).mkdir()
    assert len(problems(output)) == 1


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "importance.safetensors", "student"])
def test_user_file_in_the_place_of_an_artifact_is_found_before_the_first_stage(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    if path.suffix:
        path.write_text('{"mine": 1}')
    else:
        path.mkdir()
    (row,) = problems(tmp_path / "out")
    assert str(path) in row
    assert "minitron-mp did not write it" in row
    assert problems(tmp_path / "out", report=False) == []  # another stage may run


def test_recipe_that_a_run_would_replace_is_refused(tmp_path):
    """The recipe may lie in the output, and it may be the resolved one."""
    output = tmp_path / "out"
    for place in ("student_hf", "data", ".data.tmp", "checkpoints/distill"):
        (output / place).mkdir(parents=True)
    recipe = make_recipe({"model": str(tmp_path / "m"), "output": str(output)})
    (tmp_path / "recipe.yaml").write_text(f"model: {tmp_path}/m\noutput: {output}\n")
    (tmp_path / "link").symlink_to(output / "data")

    def rows(path: Path) -> list[str]:
        path.write_text((tmp_path / "recipe.yaml").read_text())
        loaded = load_recipe(path)
        assert loaded == recipe
        return output_problems(loaded, StageGraph(loaded).paths, report=False)

    for place in (
        output / "student_hf",
        output / "data",
        tmp_path / "link",
        output / ".data.tmp",
        output / "checkpoints/distill",
    ):
        (row,) = rows(place / "recipe.yaml")
        assert row.startswith(f"recipe: {place}/recipe.yaml would be lost, because it lies in ")
    assert rows(output / "stages.jsonl")[0].startswith("recipe: ")
    (output / "stages.jsonl").unlink()
    assert rows(output / "recipe.yaml") == rows(tmp_path / "recipe.yaml") == []
    write_resolved_recipe(recipe)
    loaded = load_recipe(output / RESOLVED_RECIPE)
    assert output_problems(loaded, StageGraph(loaded).paths, report=False) == []


def test_resolved_recipe_is_replaced_unless_it_was_edited(output):
    recipe = make_recipe({"model": "m", "output": str(output)})
    write_resolved_recipe(recipe)
    assert problems(output) == []
    assert load_recipe(output / RESOLVED_RECIPE) == recipe
    with (output / RESOLVED_RECIPE).open("a") as file:
        file.write("# a note\n")
    assert "or it was edited" in problems(output)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.touch(), "out is a file, not a folder; move it"),
        (lambda path: path.symlink_to("nowhere"), "out is a link to nowhere, which does not exist; create"),
        (
            lambda path: (path.symlink_to("file"), (path.parent / "file").touch()),
            "out is a file, not a folder",
        ),
    ],
)
def test_output_that_cannot_be_a_folder(tmp_path, make, message):
    make(tmp_path / "out")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper" / "still"):
        (row,) = problems(output)
        assert message in row


def test_output_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    (row,) = problems(tmp_path / "out")
    assert row.startswith(f"output: {tmp_path} cannot be written by this user; change its permissions")


def test_too_long_name_is_refused(tmp_path):
    (row,) = problems(tmp_path / ("x" * 300))
    assert row.endswith("has 300 bytes; the file system allows 255; set a shorter name")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A finished project in a folder with an odd name, made from another working folder."""
    root = tmp_path_factory.mktemp("odd") / 'it\'s "a" new\nfolder, größer & 文 $5 ~'
    root.mkdir()
    make_model(root / "model")
    make_text(root / "text")
    make_tokenizer(root / "tokenizer")
    recipe = make_recipe_file(
        root / "recipe.yaml",
        Path("../model"),
        Path("../text"),
        Path("."),
        distill={"steps": 6},
        data={"tokenizer": "../tokenizer"},
    )
    (root / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "minitron_mp", "compress", str(recipe)],
        cwd=root / "out",
        env={**environment(), "LC_ALL": "POSIX", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    return root


@pytest.fixture
def run(project, ranks):
    """run(words...) runs the command line in the output folder; exit code, output, error output."""

    def run(command: str, *words: str) -> tuple[int, str, str]:
        arguments = [command, str(project / "recipe.yaml"), *words]
        return ranks(1, "output_workers.minitron_in", folder=str(project / "out"), arguments=arguments)[0]

    return run


def test_files_of_the_user_in_an_artifact_are_kept(project, run):
    """They are refused before a stage replaces the artifact. A finished artifact may have them."""
    student = project / "out" / "student_hf"
    card = (student / "README.md").read_text()
    (student / "results.json").write_text("eval")
    (student / "README.md").write_text("my card")
    lost = ("student_hf would be replaced, and files in it would be lost", "README.md, results.json; move")
    refused(run("export", "--force"), *lost)
    refused(run("export", "export.dtype=bf16"), *lost)
    refused(run("compress", "export.dtype=bf16", "--dry-run"), *lost)
    refused(run("compress", "seed=7"), *lost)
    code, out, err = run("report")
    assert code == 0, err
    assert "README.md was edited, so the new evaluation is not written to it" in out
    assert (student / "results.json").read_text() == "eval"
    assert (student / "README.md").read_text() == "my card"
    (student / "results.json").unlink()
    (student / "README.md").write_text(card)
    code, out, err = run("export", "--force")
    assert code == 0, err


def test_odd_paths_and_locales(project, run):
    """Quotes, a line break, other scripts; output `.`; relative inputs; an ASCII locale."""
    assert (project / "out/student_hf/model.safetensors").exists()
    assert (project / "out/report.md").exists()
    assert not (project / "out/.minitron_mp.lock").exists()
    code, out, err = run("compress")
    assert code == 0, err
    assert out.count(": done, ") == 8


def test_finished_artifacts_replace_deleted_inputs(project, run):
    """Text, tokenizer and model are deleted; the run continues with the artifacts, and says so."""
    inputs = ("text", "tokenizer", "model")
    for name in inputs:
        (project / name).rename(project / f"{name} elsewhere")
    try:
        code, out, err = run("distill", "distill.steps=8")
        assert code == 0, err
        assert (
            "data: ../text, ../tokenizer does not exist; the run continues with data, which was made" in out
        )
        assert "import: ../model does not exist; the run continues with teacher" in out
        assert out.count("does not exist") == 2
        code, out, err = run("compress", "distill.steps=8", "--dry-run")
        assert code == 0, err
        assert "import: ../model does not exist" in out
        code, out, err = run("compress", "distill.steps=8")
        assert code == 0, err
        refused(run("compress", "data.valid_fraction=0.2"), "data.source: ../text does not exist")
        refused(run("compress", "data.source=../typo"), "data.source: ../typo does not exist")
        refused(run("distill", "data.source=../typo"), "data.source: ../typo does not exist")
        refused(run("compress", "model=../other"), "../other is not a folder")
        refused(run("import", "--force"), "../model is not a folder")
    finally:
        for name in inputs:
            (project / f"{name} elsewhere").rename(project / name)
    with (project / "text/00.txt").open("a") as file:
        file.write("One sentence more.\n")
    refused(
        run("distill", "distill.steps=8"),
        "data was made from other inputs or settings",
        f"({os.path.abspath(project / 'text')} has changed since)",
    )
