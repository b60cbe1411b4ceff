"""Values of recipes in YAML and of overrides: what stays text, and the messages for what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from minitron_mp.config.base import Section
from minitron_mp.config.mistakes import section_type
from minitron_mp.config.recipe import Recipe, load_recipe, make_recipe, recipe_yaml
from minitron_mp.errors import InputError

NEEDED = {"model": "m", "output": "o"}


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Return the dotted keys of a section and of the sections inside it."""
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        yield prefix + name
        yield from all_keys(inner, f"{prefix}{name}.") if inner else ()


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\noutput: o\ndistill: {steps: 50, lr: 1e-3}\n")
    return path


NAMES = ["2024_10_01", "12:30:45", "007", "no", "on", "0x10", "1e3", "true", "0.3", "2024-10-01", "=", "<<"]


def test_names_that_yaml_reads_as_other_things_stay_text(tmp_path):
    """As paths and as keys, in the file and in overrides."""
    path = tmp_path / "recipe.yaml"
    for name in NAMES:
        held_out = "" if name in "=<<12:30:45" else f"held_out: {{{name}: {name}}}, "
        path.write_text(f"model: {name}\noutput: {name}\ndata: {{{held_out}source: [{name}, a]}}\n")
        recipe = load_recipe(path, [f"data.tokenizer={name}", f"evaluate.tasks={{a: {name}}}"])
        assert recipe.model == recipe.output == recipe.data.tokenizer == recipe.evaluate.tasks["a"] == name
        assert recipe.data.source == [name, "a"]
        assert recipe.data.held_out == ({name: [name]} if held_out else {})
        path.write_text(recipe_yaml(recipe))
        assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "name",
    [
        "a #2",
        "&x y",
        "*x",
        "@x",
        "`x`",
        "%x",
        "!x",
        "x: y",
        "- x",
        "? x",
        "a=b",
        "| x",
        "a 'b' \"c\"",
        "a\nb",
    ],
)
def test_value_of_an_override_is_its_text(recipe_file, name):
    assert load_recipe(recipe_file, [f"output={name}"]).output == name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output='x", r"the override \"output='x\" cannot be read: found unexpected end of stream"),
        (
            "output='x' #2",
            r"the override .* cannot be read: '#2' follows the value; put the whole value in quotes",
        ),
        ("data.train=[a, b] #c", r"'#c' follows the value"),
        ("data.train=[a #c]", r"the override .* cannot be read"),
        ("data.train=[*a]", r"the override 'data\.train=\[\*a\]' cannot be read: found undefined alias 'a'"),
        ("output=a${", r"the override 'output=a\$\{' cannot be used"),
        ("data.source[0]=x", r"data\.source: must be a path or a list of paths, given \{'0': 'x'\}"),
        ("distill.lr[0]=x", r"distill\.lr: must be a number, given"),
        ("output=n\udcff", r"the override 'output=n\\udcff' is not UTF-8 text; names of files"),
        ("output=???", r"output: \?\?\? stands for a value that is missing"),
        ("distill..steps=5", r"must be a dotted key and a value"),
    ],
)
def test_errors_name_the_override(recipe_file, override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe_file, ["seed=1", override])


def test_override_of_an_element_of_a_list(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\noutput: o\ndata: {source: [a, b]}\n")
    overrides = ["data.source[0]=x", "data.source.1=y"]
    assert load_recipe(tmp_path / "recipe.yaml", overrides).data.source == ["x", "y"]
    with pytest.raises(
        InputError, match=r"the override 'data.source\[7\]=x' cannot be used \(.*out of range"
    ):
        load_recipe(tmp_path / "recipe.yaml", ["data.source[7]=x"])


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("1e3", 1000), ("1_000", 1000), ("0x10", 16), ("'12'", 12), ("+7", 7)]
)
def test_numbers_are_those_of_yaml_1_2(recipe_file, text, number):
    assert load_recipe(recipe_file, [f"score.num_samples={text}"]).score.num_samples == number


@pytest.mark.parametrize("text", ["yes", "true", "1:40", "2024-10-01", "1__0", "50 # steps", "9" * 5000])
def test_other_values_are_no_numbers(recipe_file, text):
    with pytest.raises(InputError, match=f"distill.steps: .*given '{text}'"):
        load_recipe(recipe_file, [f"distill.steps={text}"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill": {"steps": True}}, "distill.steps: must be an integer, given True"),
        ({"distill": {"lr": False}}, "distill.lr: must be a number, given False"),
        ({"target": {"max_parameters": True}}, "target.max_parameters: must be a number, given True"),
        (
            {"target": {"drop_layers": [1, True]}},
            r"target.drop_layers: must be an integer, given \[1, True\]",
        ),
        ({"data": {"held_out": {2024: "x"}}}, "data.held_out.2024: its key must be text, given 2024"),
        (
            {"distill": {"states": {"layers": [[1, 1]], "weight": "x"}}},
            "distill.states.weight: must be 'dynamic' or a number, given 'x'",
        ),
    ],
)
def test_booleans_are_no_numbers_and_keys_are_those_of_recipes(values, message):
    with pytest.raises(InputError, match=f"cannot be used:\n  - {message}$"):
        make_recipe({**NEEDED, **values})


@pytest.mark.parametrize("wrong", [object(), [object()], [[[object()]]], {0: object()}, {"a": object()}])
def test_errors_of_every_field_have_its_key(wrong):
    """And none of the labels that pydantic adds for the types of a field."""
    for key in all_keys(Recipe):
        values: dict[str, object] = dict(NEEDED)
        inner = values
        *sections, name = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = wrong
        with pytest.raises(InputError) as caught:
            make_recipe(values)
        rows = str(caught.value).splitlines()[1:]
        for row in [row for row in rows if not row.endswith("is missing; add it")]:
            location = row.strip(" -").split(": ")[0].removeprefix("unknown key ").split(";")[0]
            assert key in row
            assert set(location.removeprefix(key).split(".")) <= {"", "0", "1", "a"}, row


def test_merged_keys_anchors_and_aliases_of_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: &m a\noutput: *m\ncorrect: &c {steps: 60, lr: 1e-3, warmup_steps: 4}\n"
        "distill:\n  <<: *c\n  steps: 50\n"
    )
    recipe = load_recipe(path)
    assert (recipe.output, recipe.distill.steps, recipe.distill.lr) == ("a", 50, 1e-3)
    assert recipe.correct.steps == 60


def test_recipe_is_read_from_a_pipe(recipe_file):
    read, write = os.pipe()
    os.write(write, recipe_file.read_bytes())
    os.close(write)
    try:
        assert load_recipe(f"/dev/fd/{read}") == load_recipe(recipe_file)
    finally:
        os.close(read)
