"""Paths in a recipe: `~`, environment variables, and characters that few paths have."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mp.config.paths import expand_path
from minitron_mp.config.recipe import load_recipe, make_recipe, recipe_yaml
from minitron_mp.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/runs/one", "{home}/runs/one"),
        ("~", "{home}"),
        ("$SCRATCH/x", "/scratch/a b/x"),
        ("${SCRATCH}_2", "/scratch/a b_2"),
        ("~/$SCRATCH", "{home}//scratch/a b"),
        ("./~", "./~"),
        ("a/~/b", "a/~/b"),
        ("costs $5", "costs $5"),
        ("100%", "100%"),
        ("with 'quotes\" and\nlines", "with 'quotes\" and\nlines"),
        ("data/größe/文", "data/größe/文"),
        (".", "."),
    ],
)
def test_paths_are_expanded(environment, given, expanded):
    assert expand_path(given) == expanded.format(home=environment / "home")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("$NOWHERE/x", "the environment variable NOWHERE is not set, given '$NOWHERE/x'; set and export it"),
        ("a/${NOWHERE}/$ALSO", "the environment variable NOWHERE, ALSO is not set"),
        ("~nobody-of-this-name/x", "there is no home folder for ~nobody-of-this-name"),
        ("$EMPTY", "'$EMPTY' is empty, because the variable is empty"),
        ("a\0b", "contains a null character, which no path may contain"),
    ],
)
def test_paths_that_cannot_be_expanded_are_rejected(given, message):
    with pytest.raises(ValueError, match=r".") as error:
        expand_path(given)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["$NOWHERE", "~nobody-of-this-name", "${NOWHERE}"])
def test_existing_file_with_such_a_name_is_used(environment, name):
    (environment / name).touch()
    assert expand_path(name) == name
    recipe = make_recipe({"model": name, "output": "out"})
    (environment / "again.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(environment / "again.yaml") == recipe


PATH_KEYS = {
    "model": lambda path: {"model": path},
    "output": lambda path: {"output": path},
    "data.source": lambda path: {"data": {"source": path}},
    "data.source list": lambda path: {"data": {"source": ["a", path]}},
    "data.calibration": lambda path: {"data": {"calibration": path, "train": ["a"], "valid": ["b"]}},
    "data.train": lambda path: {"data": {"calibration": ["a"], "train": [path], "valid": ["b"]}},
    "data.valid": lambda path: {"data": {"calibration": ["a"], "train": ["b"], "valid": path}},
    "data.tokenizer": lambda path: {"data": {"tokenizer": path}},
    "data.held_out": lambda path: {"data": {"held_out": {"x": [path]}}},
    "evaluate.tasks": lambda path: {"evaluate": {"tasks": {"x": path}}},
    "depth.task": lambda path: {"depth": {"method": "drop", "metric": "task", "task": path}},
    "correct.baseline": lambda path: {"correct": {"baseline": path}},
    "teacher.model": lambda path: {"teacher": {"model": path}},
    "teacher.siblings": lambda path: {"teacher": {"placement": "remote", "siblings": {path: 1}}},
}


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_key_that_names_a_path_is_expanded(environment, key):
    def make(path):
        return make_recipe({"model": "m", "output": "o", **PATH_KEYS[key](path)}).model_dump_json()

    home = environment / "home"
    assert make("~/p") == make(f"{home}/p")
    assert make("$HOME/p") == make("${HOME}/p") == make(f"{home}/p")
    with pytest.raises(InputError, match=r"the environment variable NOWHERE is not set"):
        make("$NOWHERE/p")


def test_braces_in_yaml_are_a_variable_or_a_key(environment):
    file = environment / "recipe.yaml"
    file.write_text('model: ${SCRATCH}/m\noutput: "${model}/out"\ndata: {source: ["${HOME}/t"]}\n')
    recipe = load_recipe(file, ["data.tokenizer=~/tok"])
    assert (recipe.model, recipe.output) == ("/scratch/a b/m", "/scratch/a b/m/out")
    assert recipe.data.source == [f"{environment}/home/t"]
    assert recipe.data.tokenizer == f"{environment}/home/tok"
    file.write_text("model: ${NOWHERE}/m\noutput: out\n")
    with pytest.raises(
        InputError, match=r"model: \$\{NOWHERE\} is neither an environment variable nor a key of the recipe"
    ):
        load_recipe(file)
