"""The recipe: what is read, what is refused, and whether the message helps."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.recipe import Recipe, load_recipe, make_recipe, recipe_yaml
from minitron_mp.config.reference import recipe_reference
from minitron_mp.errors import InputError
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.parameters import PARAMETERS, SECOND_PASS

ROOT = Path(__file__).parents[2]
NEEDED = {"model": "m", "output": "o"}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\noutput: o\ndistill: {steps: 50, lr: 1e-3}\n")
    return path


def test_defaults_are_valid_and_frozen():
    recipe = make_recipe(NEEDED)
    assert recipe == Recipe(model="m", output="o")
    assert recipe.root == Path("o")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2


def test_yaml_and_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "distill.steps=60",
            "data.train=[a.txt, b.txt]",
            "data.calibration=[c]",
            "data.valid=[d]",
            "parallel.tp=2",
        ],
    )
    assert (recipe.distill.steps, recipe.distill.lr, recipe.parallel.tp) == (60, 1e-3, 2)
    assert recipe.data.train == ["a.txt", "b.txt"]
    assert load_recipe(recipe_file, ["data.tokenizer=null"]).data.tokenizer is None
    data = load_recipe(
        recipe_file, ["data.held_out.old=old.txt", "data.train=a.txt", "data.calibration=c", "data.valid=[d]"]
    ).data
    assert (data.held_out, data.train, data.calibration) == ({"old": ["old.txt"]}, ["a.txt"], ["c"])


def test_divergence_parameters_are_completed_and_checked(recipe_file, tmp_path):
    """A recipe without parameters stays without them, so its fingerprint does not change."""
    assert load_recipe(recipe_file).distill.divergence_parameters is None
    skewed = "distill.divergence=skewed_forward_kl"
    assert load_recipe(recipe_file, [skewed]).distill.divergence_parameters == {"skew": 0.1}
    recipe = load_recipe(recipe_file, [skewed, "distill.divergence_parameters.skew=0.3"])
    assert recipe.distill.divergence_parameters == {"skew": 0.3}
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    for overrides, message in (
        (
            [skewed, "distill.divergence_parameters={skew: 1, beta: 2}"],
            "above 0 and at most 0.99\n.*no parameter beta",
        ),
        (
            ["distill.divergence_parameters.skew=0.3"],
            "forward_kl has no parameter skew; it has no parameters",
        ),
        (["distill.divergence=kl", "distill.divergence_parameters.skew=0.3"], "given 'kl'"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe(recipe_file, overrides)


def test_recipe_has_every_divergence():
    choices = get_args(DistillConfig.model_fields["divergence"].annotation)
    assert set(choices) == set(DIVERGENCES)
    assert set(PARAMETERS) <= set(DIVERGENCES)
    assert {name for name, row in DIVERGENCES.items() if row.second_sums} == SECOND_PASS
    assert PARAMETERS["skewed_forward_kl"]["skew"].default == 0.1  # the value in the docs


def test_resolved_recipe_round_trips_through_yaml(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["target.max_parameters=8.4B", "export.family=mistral"])
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert (
        yaml.safe_load((tmp_path / "resolved.yaml").read_text())["score"]["num_samples"] == 1024
    )  # defaults are written, too


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("experiments/**/*.yaml")]),
    ids=lambda path: path.name,
)
def test_shipped_recipes_load(path):
    assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize(
    ("text", "number"),
    [("8.4B", 8.4e9), ("102M", 102e6), ("5k", 5e3), ("0.5 b", 5e8), ("8.4e9", 8.4e9), (123, 123)],
)
def test_parameter_count_suffixes(text, number):
    assert make_recipe({**NEEDED, "target": {"max_parameters": text}}).target.max_parameters == pytest.approx(
        number, rel=1e-15
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target": {"max_parameters": "eightB"}},
            r"target\.max_parameters: 'eightB' is not a number of parameters; write 8\.4e9, 8\.4B or 102M",
        ),
        ({"target": {"max_parameters": "8.4T"}}, r"target\.max_parameters: .*given '8\.4T'"),
        ({"target": {"max_parameters": "-1B"}}, r"target\.max_parameters: must be above 0"),
        ({"target": {"keep": 1.5}}, r"target\.keep: must be 1.* or less, given 1\.5"),
        (
            {"target": {"keep": 0.5, "hidden_size": 16}},
            r"target: sizes, max_parameters and keep exclude each other",
        ),
        ({"target": {"keep": 0.5, "axes": []}}, r"target\.axes: must have 1 or more"),
        (
            {"target": {"axes": ["ffn"]}},
            r"target: axes \['ffn'\] has no effect without max_parameters or keep",
        ),
        ({"precision": "fp16"}, r"precision: .*'bf16' or 'fp32', given 'fp16'"),
        ({"parallel": {"tp": 0}}, r"parallel\.tp: must be 1 or more, given 0"),
        ({"parallel": {"vpp": 2}}, r"parallel: vpp 2 needs pp of at least 2, given 1"),
        ({"parallel": {"sequence_parallel": True}}, r"parallel: sequence_parallel .*raise tp"),
        (
            {"parallel": {"cp": 2, "tp": 2, "sequence_parallel": True}, "data": {"sequence_length": 100}},
            r"100 must be a multiple of 8 .*nearest 96",
        ),
        ({"parallel": {"cp": 2}, "data": {"sequence_length": 2}}, r"2 must be a multiple of 4 .*nearest 4"),
        (
            {"data": {"train": ["a"]}},
            r"data: train given without calibration, valid; give all three, or only source",
        ),
        (
            {"data": {"train": ["a"], "valid": ["b"], "calibration": ["c"], "valid_fraction": 0.1}},
            r"data: calibration, train and valid replace source, valid_fraction and valid_tokens, and both",
        ),
        (
            {"teacher": {"window": 5}},
            r"teacher: window: no effect with placement colocated and payload hidden; drop it",
        ),
        (
            {"teacher": {"placement": "cached", "parallel": {"tp": 2}, "top_k": 7}},
            r"parallel, top_k: no effect with placement cached",
        ),
        ({"model": None}, r"model: must be text, given nothing \(an empty value and ~ are null in YAML\)"),
        ({"data": {"held_out": {"old": 5}}}, r"data\.held_out\.old: must be a list, given 5"),
        ({"distill": {"min_lr": 1}}, r"distill: min_lr 1\.0 is above lr 0\.0001"),
        ({"seed": {"x": 5}}, r"seed: .*given \{'x': 5\}"),
        ({"modle": "x"}, r"unknown key modle; did you mean model\?"),
        ({"distill": {"stepz": 3}}, r"unknown key distill\.stepz; did you mean steps\?"),
        (
            {"score": {"zzz": 3}},
            r"unknown key score\.zzz; use one of num_samples, micro_batch_size, batch_aggregation, "
            r"sequence_aggregation",
        ),
    ],
)
def test_errors_state_given_and_allowed_values(values, message):
    with pytest.raises(InputError, match=message):
        make_recipe({**NEEDED, **values})


def test_section_without_keys_has_its_defaults():
    assert make_recipe({**NEEDED, "data": None, "teacher": {"parallel": None}}) == make_recipe(NEEDED)
    assert make_recipe({**NEEDED, "correct": None}).correct is None


def test_errors_are_reported_together():
    values = {
        "modle": "m",
        "output": "o",
        "parallel": {"vpp": 2, "sequence_parallel": True},
        "distill": {"warmup_steps": 200, "kl_weight": 0},
    }
    with pytest.raises(InputError) as caught:
        make_recipe({**values, "score": {"num_sampels": 4}})
    text = str(caught.value)
    assert text.startswith("recipe cannot be used:\n")
    for part in (
        "model is missing",
        "did you mean model",
        "vpp 2",
        "sequence_parallel",
        "warmup_steps 200",
        "both 0",
        "did you mean num_samples",
    ):
        assert part in text
    rows = text.splitlines()[1:]
    assert len(rows) == 7, "a row for each mistake, also where a section has two"
    assert (
        sum(row.startswith("  - parallel: ") for row in rows)
        == sum(row.startswith("  - distill: ") for row in rows)
        == 2
    )


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (b"- a\n", [], "contains a list, not keys and values"),
        (b"model: [a\n", [], "cannot be read"),
        (b"model: a\nmodel: b\n", [], "duplicate key model"),
        (b"\xff\xfe\x00", [], "is not UTF-8 text"),
        (b"model: m\noutput: caf\xe9\n", [], "is not UTF-8 text: line 2, byte 0xe9 at offset 20; convert"),
        (b"model: m\noutput: o\x07\n", [], r"contains the control character U\+0007 in line 2, column 10"),
        (b"model: m\0\n", [], r"contains the control character U\+0000 in line 1, column 9"),
        (b"5\n", [], "recipe.yaml contains only '5', not keys and values"),
        (b"~\n", [], "(?s)model is missing.*output is missing"),
        (b"model: ???\noutput: o\n", [], r"model: \?\?\? stands for a value that is missing"),
        (b"model: &a [*a]\n", [], r"recipe.yaml cannot be read: line 1, column 8: a value contains itself"),
        (b"model: !!python/name:os.system\n", [], "line 1, column 8: unknown tag"),
        (b"a: " + b"[" * 5000, [], "too many brackets inside each other"),
        (b"a: 1\n---\nb: 2\n", [], "expected a single document in the stream, but found another document"),
        (b"? [a]\n: b\n", [], "line 1, column 3: a key must be text"),
        (b"model: ${nowhere}\noutput: o\n", [], "nowhere"),
        (b"", [], r"(?s)model is missing.*output is missing"),
        (
            b"model: m\noutput: o\n",
            ["distill.steps", "seed=1", "--fast"],
            r"(?s)like distill\.steps=10; these are not:.*- distill\.steps\n.*- --fast",
        ),
        (b"model: m\noutput: o\n", ["distill.step=10"], r"unknown key distill\.step; did you mean steps\?"),
    ],
)
def test_invalid_files_and_overrides(tmp_path, content, overrides, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml", overrides)


def test_missing_file_and_non_mapping(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(InputError, match="no recipe at"):
            load_recipe(path)
    with pytest.raises(InputError, match="recipe contains a list, not keys and values"):
        make_recipe(["model"])


def test_reference_of_recipe_keys_is_current():
    """Run `minitron-mp reference --output docs/reference.md` after a change of a schema or a docstring."""
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == recipe_reference()


def test_every_recipe_key_has_a_description():
    rows = [row for row in recipe_reference().splitlines() if row.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_marked_fields_are_not_in_the_fingerprint():
    settings = make_recipe({**NEEDED, "distill": {"log_interval": 3, "lr": 1e-3}}).distill.result_settings()
    assert settings["lr"] == 1e-3
    assert not {"log_interval", "micro_batch_size", "profile", "async_save"} & settings.keys()
