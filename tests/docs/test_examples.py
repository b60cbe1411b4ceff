"""Examples and experiments: every script imports, and each recipe's first line runs as a dry run.

The dry runs use what the repository has: a config.json without weights.
"""

import ast
import shlex
import sys

import pytest
import yaml
from tiny import ROOT

from minitron_mp.artifacts.saved_model import saved_arch
from minitron_mp.cli import main
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.pruning.target import resolve_target

RECIPES = sorted([path for folder in ("examples", "experiments") for path in (ROOT / folder).rglob("*.yaml")])
SCRIPTS = sorted([path for folder in ("examples", "experiments") for path in (ROOT / folder).rglob("*.py")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_line_of_recipe_runs(path, monkeypatch, capsys):
    first = path.read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    assert words[0] == "minitron-mp", f"the first line of {path.name} is to be its dry run: {first}"
    assert str(path.relative_to(ROOT)) in words
    assert "--dry-run" in words
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code or 0, err) == (0, "")
    assert "student parameters" in out
    assert "memory: sum on the fullest rank" in out


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_shows_a_blend(path):
    """In comments, which are valid keys: no published blend is public."""
    values = yaml.safe_load(path.read_text())
    lines = [line.removeprefix("  # ") for line in path.read_text().splitlines()]
    blend = yaml.safe_load(
        "\n".join(line for line in lines if line.startswith(("calib", "valid:", "train:")))
    )
    length = values["data"]["sequence_length"]
    recipe = make_recipe({**values, "data": {**blend, "sequence_length": length}})
    units = [share.unit for share in recipe.data.shares("train")]
    assert units == ["weight", "weight", "epochs", "tokens"]


def test_library_example_runs(inputs, ranks, tmp_path):
    """The whole method by public names alone, on a tiny model; transformers loads the result."""
    from transformers import AutoModelForCausalLM

    words = [str(inputs / "model"), str(tmp_path)]
    (output,) = ranks(1, "project_workers.run_script", path=ROOT / "examples" / "library.py", arguments=words)
    teacher, student = saved_arch(tmp_path / "teacher"), saved_arch(tmp_path / "distilled")
    assert student == resolve_target(teacher, TargetConfig(keep=0.75))
    assert f"{student.num_parameters():,} parameters" in output
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student_hf")
    assert exported.num_parameters() == student.num_parameters()


def test_library_example_is_short_and_public():
    tree = ast.parse((ROOT / "examples" / "library.py").read_text())
    imported = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "minitron_mp" in node.module
    ]
    assert not imported, "use the names of `import minitron_mp as mm`"
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno < 30


def test_scripts_import_without_side_effects(ranks):
    """Importing a script runs nothing, because its work is in main().

    The docstring of a script for users has the command that starts it. The scripts are imported on
    a rank, which has already imported Megatron-Core.
    """
    (has_main,) = ranks(1, "project_workers.load_scripts", paths=SCRIPTS)
    for path in SCRIPTS:
        started = [
            line
            for line in ast.get_docstring(ast.parse(path.read_text())).splitlines()
            if line.startswith(("torchrun ", "python "))
        ]
        assert path.name not in has_main or any(str(path.relative_to(ROOT)) in line for line in started), path
