"""The table of stages: order, inputs, and what adds a stage to a recipe."""

import pytest

from minitron_mp.config.recipe import Recipe, make_recipe
from minitron_mp.errors import InputError
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.run import run_stage
from minitron_mp.workflow.stages import STAGES

NEEDED = {"model": "m", "output": "o", "target": {"drop_layers": [1]}}
ADDED_BY = {
    "import-teacher": {"teacher": {"model": "t"}},
    "texts": {"data": {"held_out": {"old": "old.txt"}}},
    "correct": {"correct": {"steps": 1000}},
    "search": {"search": {"parameters": "1B"}, "target": {}},
    "cache": {"teacher": {"placement": "cached"}},
    "depth": {"depth": {"method": "drop"}, "target": {"num_layers": 2}},
}
"""Stage -> values that add it to a recipe."""


def stage_names(values: dict) -> list[str]:
    return list(StageGraph(make_recipe({**NEEDED, **values})).stages)


def test_stage_names_and_artifacts_are_unique():
    for values in ([stage.name for stage in STAGES], [stage.artifact for stage in STAGES]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("values", [{}, *ADDED_BY.values()], ids=["default", *ADDED_BY])
def test_inputs_run_before_the_stage(values):
    graph = StageGraph(make_recipe({**NEEDED, **values}))
    names = list(graph.stages)
    for name in names:
        for other in [*graph.inputs(name), *graph.before(name)]:
            assert names.index(other) < names.index(name)


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES if stage.requirement])
def test_optional_stage_is_added_by_its_section(stage):
    assert stage not in stage_names({})
    assert stage in stage_names(ADDED_BY[stage])


def test_stages_of_every_recipe_have_no_requirement():
    assert stage_names({}) == [stage.name for stage in STAGES if not stage.requirement]


@pytest.mark.parametrize(
    "values",
    [{}, {"correct": {"steps": 1000}}, {"correct": {"steps": 50, "warmup_steps": 5, "when": "during"}}],
)
def test_last_curve_of_a_training_stage_is_its_own(values):
    recipe = make_recipe({**NEEDED, **values})
    curves = {name: stage.curves(recipe) for name, stage in StageGraph(recipe).stages.items()}
    trained = {name: [curve.name for curve in of_stage] for name, of_stage in curves.items() if of_stage}
    assert all(names[-1] == stage for stage, names in trained.items())
    assert sum(map(len, trained.values())) == (2 if values else 1)  # one for each section


def test_unknown_stage_is_rejected():
    with pytest.raises(InputError, match=r"there is no stage prun; the stages are import, .*export"):
        run_stage("prun", Recipe(model="m", output="o"))
