"""The section rounds: recipes that are derived from one recipe, and their stages."""

from __future__ import annotations

import pytest
from tiny import ROOT

from minitron_mp.config.recipe import Recipe, load_recipe, make_recipe, recipe_yaml
from minitron_mp.errors import InputError
from minitron_mp.planning.command import read_models
from minitron_mp.planning.hardware import read_hardware
from minitron_mp.planning.rounds import ROUNDS_HEADER, estimate_rounds, round_rows
from minitron_mp.planning.times import read_times
from minitron_mp.workflow.graph import StageGraph

VALUES = {
    "model": "model",
    "output": "out",
    "data": {"source": "text", "sequence_length": 512, "valid_fraction": 0.1},
    "parallel": {"tp": 2, "sequence_parallel": True},
    "target": {"num_layers": 3, "align": 32},
    "distill": {"steps": 100, "lr": 1e-3, "divergence": "skewed_forward_kl"},
    "rounds": {
        "narrow": {"target": {"keep": 0.5}, "distill": {"divergence": "forward_kl"}},
        "long": {
            "data": {"sequence_length": "2_048"},
            "parallel": {"cp": 2},
            "distill": {"steps": "5_0"},
        },
    },
}


def recipe(**sections: object) -> Recipe:
    return make_recipe({**VALUES, **sections})


def with_round(**sections: object) -> Recipe:
    return recipe(rounds={"more": sections})


def test_keys_of_a_round_replace_those_of_the_recipe():
    """Keys that are not given have the recipe's values, not those of the round before."""
    first, narrow, long = recipe().all_rounds
    assert first == recipe()
    assert (narrow.target.keep, narrow.target.num_layers, narrow.target.align) == (0.5, None, 16)
    assert (narrow.distill.divergence, narrow.distill.steps, narrow.distill.lr) == ("forward_kl", 100, 1e-3)
    assert narrow.distill.divergence_parameters is None
    assert narrow.data == first.data
    assert (long.data.sequence_length, long.data.source, long.data.valid_fraction) == (2048, "text", 0.1)
    assert (long.parallel.tp, long.parallel.cp, long.parallel.sequence_parallel) == (2, 2, True)
    assert (long.distill.steps, long.distill.divergence) == (50, "skewed_forward_kl")
    assert [each.output for each in (first, narrow, long)] == ["out", "out/rounds/narrow", "out/rounds/long"]


def test_places_of_the_rounds():
    first, narrow, long = recipe().all_rounds
    assert [each.prunes for each in (first, narrow, long)] == [True, True, False]
    assert [each.round_name for each in long.earlier] == ["first", "narrow"]
    assert [each.pruning_base for each in (first, narrow, long)] == [
        "import",
        "distill --round first",
        "distill --round narrow",
    ]
    assert narrow.initial_student == "prune"
    assert long.initial_student == "distill --round narrow"
    assert {each.distillation_teacher for each in (first, narrow, long)} == {"import"}
    assert list(long.evaluated_models) == ["distilled (first)", "distilled (narrow)", "distilled"]
    assert long.run == first
    assert long.command("distill") == "distill --round long"
    assert first.command("distill") == "distill"


def test_round_by_name():
    assert recipe().of_round("") == recipe()
    assert recipe().of_round("long").round_name == "long"
    with pytest.raises(InputError, match="--round wide: the recipe has no such round; give one of first, "):
        recipe().of_round("wide")


def test_stages_of_a_round():
    """A round has stages of its own for what depends on its student. It uses the rest as it is."""
    first, narrow, long = StageGraph(recipe()).rounds()
    assert first.stages_of_compress() == ["import", "data", "score", "plan", "prune", "distill"]
    assert narrow.stages_of_compress() == ["score", "plan", "prune", "distill"]
    assert long.stages_of_compress() == ["distill", "evaluate", "export"]
    assert [str(long.paths[name]) for name in ("import", "data", "distill")] == [
        "out/teacher",
        "out/data",
        "out/rounds/long/student_distilled",
    ]
    assert str(long.paths["plan --round narrow"]) == "out/rounds/narrow/plan.json"
    assert long.inputs("distill") == ["import", "data", "distill --round narrow"]
    assert long.inputs("evaluate") == [
        "distill --round narrow",
        "import",
        "data",
        "distill",
        "distill --round first",
    ]
    with pytest.raises(InputError, match="the round long has no stage prune; add a section target or search"):
        long.require_stage("prune")


@pytest.mark.parametrize(
    ("data", "is_shared"),
    [
        ({"sequence_length": 1024}, True),
        ({"document_mask": "false"}, True),
        ({"workers": 3}, True),
        ({"source": "books"}, False),
        ({"text_field": "body"}, False),
        ({"valid_fraction": 0.2}, False),
        ({"calibration": "a", "train": "b", "valid": "c"}, False),
    ],
)
def test_text_is_tokenized_again_only_if_it_differs(data, is_shared):
    _, more = StageGraph(with_round(data=data)).rounds()
    assert ("data" in more.own_stages) is not is_shared


def test_texts_of_other_parts_are_other_text():
    """The same files in other parts, and the same files with other shares."""
    parts = {"calibration": ["a"], "train": {"b": 1, "c": 2}, "valid": ["d"]}
    values = {**VALUES, "data": parts}
    for changes, is_shared in (
        ({"train": {"b": 3, "c": 1}}, True),
        ({"train": ["c"], "calibration": ["a", "b"]}, False),
    ):
        _, more = StageGraph(make_recipe({**values, "rounds": {"more": {"data": changes}}})).rounds()
        assert ("data" in more.own_stages) is not is_shared


def test_corrected_teacher_is_that_of_the_run():
    """Although a correction with longer samples would be another one."""
    corrected = recipe(correct={"steps": 500})
    first, _, long = StageGraph(corrected).rounds()
    assert long.place("correct") == (first, "correct")
    assert long.recipe.distillation_teacher == "correct"
    assert next(iter(long.recipe.evaluated_models)) == "uncorrected"


def test_signals_of_equal_batches_are_shared():
    values = {**VALUES, "teacher": {"placement": "cached"}}
    _, narrow, long = StageGraph(make_recipe(values)).rounds()
    assert "cache" not in narrow.own_stages
    assert "cache" in long.own_stages


def test_resolved_recipe_has_the_keys_that_the_rounds_give(tmp_path):
    text = recipe_yaml(recipe())
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert [each.model_dump() for each in again.all_rounds[1:]] == [
        each.model_dump() for each in recipe().all_rounds[1:]
    ]
    assert "    data:\n      sequence_length: 2048\n" in text
    assert "rounds" not in recipe_yaml(make_recipe({**VALUES, "rounds": {}}))


def test_overrides_name_a_round(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe()))
    changed = load_recipe(tmp_path / "recipe.yaml", ["rounds.long.distill.steps=77", "seed=3"])
    assert changed.of_round("long").distill.steps == 77
    assert changed.of_round("long").seed == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": {"first": {}}}, "rounds: the name first is that of the recipe itself; use a different"),
        (
            {"rounds": {"a/b": {}}},
            "rounds: the name 'a/b' becomes a folder name; use letters, digits, _ and -",
        ),
        ({"rounds": {"more": {"distil": {}}}}, "unknown key rounds.more.distil; did you mean distill?"),
        ({"rounds": {"more": {"model": "x"}}}, "unknown key rounds.more.model"),
        ({"rounds": {"more": {"distill": {"stepz": 1}}}}, "rounds.more: unknown key distill.stepz; did you"),
        ({"rounds": {"more": {"parallel": {"pp": "two"}}}}, "rounds.more: parallel.pp: must be an integer"),
        ({"rounds": {"more": {"parallel": {"vpp": 2}}}}, "rounds.more: parallel: vpp 2 needs pp of at least"),
        ({"rounds": {"more": {"teacher": {"model": "x"}}}}, "rounds.more.teacher.model: every round has the"),
        (
            {"rounds": {"more": {"target": {"keep": 0.5}, "search": {"parameters": "1M"}}}},
            "rounds.more: target and search exclude each other",
        ),
        (
            {"rounds": {"more": {}}, "correct": {"steps": 500, "when": "during"}},
            "rounds need a teacher that no round trains, and correct.when is during; set",
        ),
        (
            {"rounds": {"more": {}}, "distill": {"states": {"layers": [[0, 0]]}}},
            "rounds.more: distill.states needs a student that is pruned from the teacher itself; set states",
        ),
    ],
)
def test_mistakes_in_rounds(values, message):
    with pytest.raises(InputError) as error:
        recipe(**values)
    assert message in str(error.value)


def test_states_can_be_left_out_in_a_round():
    states = {"states": {"layers": [[0, 0]]}}
    values = recipe(distill=states, rounds={"more": {"distill": {"states": None}}})
    assert values.all_rounds[1].distill.states is None


def test_estimate_follows_the_sizes_from_round_to_round(monkeypatch):
    """The 8B student of the first round is the model that the second one prunes to 4B."""
    monkeypatch.chdir(ROOT)
    cascade = load_recipe("examples/minitron_cascade.yaml")
    times = read_times("h100", read_hardware("h100"))
    rounds = estimate_rounds(cascade, read_models(cascade), 128, times)
    assert [f"{each.student.num_parameters() / 1e9:.2f}" for each in rounds] == ["8.27", "4.19"]
    models = read_models(cascade.of_round("4b"))
    assert (models.base, models.student) == tuple(each.student for each in rounds)
    assert models.teacher == read_models(cascade).base
    rows = round_rows(rounds, price=2.0)
    hours = [float(row[ROUNDS_HEADER.index("GPU-hours")].replace(",", "")) for row in rows]
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=1)
    assert float(rows[-1][-1].replace(",", "")) == pytest.approx(2 * hours[-1], abs=2)


def test_estimate_of_a_long_context_phase(monkeypatch):
    """The layout and the samples are those of the round."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("examples/llama_3_1_minitron_4b_long.yaml")
    times = read_times("h100", read_hardware("h100"))
    first, long = estimate_rounds(recipe, read_models(recipe), 256, times)
    assert long.student == first.student
    assert long.estimate.recipe.parallel.cp == 4
    assert long.estimate.tokens == 256 * 32768
    assert (first.own_layout, long.own_layout) == (True, True)
