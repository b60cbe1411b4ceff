"""The teacher on other ranks, or cached on disk: the same loss curve as beside the student."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import REMOTE, STEPS, TWO_RANKS, make_recipe_file, read_metrics, refused

from minitron_mp import load_recipe
from minitron_mp.artifacts.manifest import writing_artifact
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.join import co_student_recipes

TOP_K = ("teacher.payload=topk", "teacher.top_k=300")
"""All tokens are among the top k."""


@pytest.mark.parametrize(
    ("size", "overrides", "tolerance"),
    [
        (2, (), 0.0),  # the same kernels on the same numbers
        (2, TOP_K, 1e-4),
        pytest.param(4, ("parallel.tp=2", "teacher.parallel.tp=2", *TOP_K), 1e-4, marks=pytest.mark.slow),
        (
            4,
            ("parallel.tp=2", "parallel.sequence_parallel=true", "teacher.ranks=2"),
            1e-4,
        ),  # and two of the teacher
    ],
    ids=["hidden", "topk", "topk-tp2-to-tp2", "dp2-to-tp2"],
)
def test_remote_teacher_gives_the_same_loss_curve(
    whole, inputs, tmp_path, in_job, size, overrides, tolerance
):
    """All stages run on the student's ranks; distill has the teacher on the rest of the job."""
    shutil.copytree(whole.output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "student_distilled")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out")
    for done in in_job(size, "distill", recipe, *REMOTE, *overrides):
        assert done.code == 0, done.err
    here, there = read_metrics(tmp_path / "out"), read_metrics(whole.output)
    assert [m["step"] for m in here] == list(range(1, STEPS + 1))
    for key in ("loss", "forward_kl", "ce", "grad_norm"):
        assert [m[key] for m in here] == pytest.approx([m[key] for m in there], rel=tolerance, abs=0), key
    if not overrides:  # 30 steps of 4 x 32 tokens with 64 channels of 4 bytes
        steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert sum(m["transport_gb_per_s"] * m["step_time_s"] for m in steps) == pytest.approx(
            STEPS * 4 * 32 * 64 * 4 / 1e9
        )
        assert all(0 <= m["teacher_wait_s"] <= m["step_time_s"] for m in steps)
        assert all(m["tokens_per_s_per_gpu"] == pytest.approx(m["tokens_per_s"] / 2) for m in steps)
        assert {"student_tflops", "teacher_tflops", "peak_memory_gib", "eta_s"} <= steps[0].keys()
        assert steps[-1]["eta_s"] == 0


def test_remote_hidden_states_reach_every_stage(whole, inputs, tmp_path, on_rank, in_job):
    """One student runs beside its teacher on a rank.

    The other has pp 2 and a teacher on a third rank.
    """
    words, curves = ("distill.steps=5", "distill.states.layers={0: 0, 1: 3, 3: 4}"), []
    for name, run in (
        ("here", lambda *words: [on_rank(*words)]),
        ("there", lambda *words: in_job(3, *words, *REMOTE, "parallel.pp=2")),
    ):
        shutil.copytree(whole.output, tmp_path / name)
        shutil.rmtree(tmp_path / name / "student_distilled")
        recipe = make_recipe_file(
            tmp_path / f"{name}.yaml", inputs / "model", inputs / "text", tmp_path / name
        )
        for done in run("distill", recipe, *words):
            assert done.code == 0, done.err
        curves.append(read_metrics(tmp_path / name))
    assert [m["alpha"] for m in curves[0]] == pytest.approx(
        [1.0, *(m["forward_kl"] / m["states"] for m in curves[0][:-1])]
    )
    for mine, other in zip(*curves, strict=True):
        assert mine["states"] > 0
        assert {**mine, "step": 0} == pytest.approx({**other, "step": 0}, rel=1e-4)
    refused(
        on_rank("compress", recipe, "distill.states.layers={0: 0, 4: 4}"),
        "has state 4 of the student, whose states are 0 (embeddings) to 3 (after the final norm)",
    )


def test_job_too_small_for_its_roles_is_rejected(whole, in_job):
    """One rank, which would be the teacher's. Stages without a model do not need the roles."""
    assert in_job(1, "import", whole.recipe, *REMOTE)[0].code == 0
    for stage in ("distill", "compress"):
        refused(
            in_job(1, stage, whole.recipe, *REMOTE)[0],
            "this job has 1 ranks, but its roles need 0 (student) + 1 (teacher); change",
        )


def test_cached_teacher_gives_the_same_loss_curve(whole, inputs, tmp_path, on_rank, in_job):
    """Written by two tensor parallel ranks, read by one.

    The cache is an artifact like any other.
    """
    shutil.copytree(whole.output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "student_distilled")
    recipe = make_recipe_file(tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out")

    def run(stage, *words):
        return on_rank(stage, recipe, *words)

    cached = "teacher.placement=cached"
    refused(run("distill", cached), "teacher_signals is missing; run `minitron-mp cache` first")
    refused(run("cache"), "teacher.placement: cached")
    assert [done.code for done in in_job(2, "cache", recipe, cached, *TWO_RANKS)] == [0, 0]
    code, out, err = run("compress", cached)
    assert code == 0, err
    assert "cache: done" in out
    here, there = read_metrics(tmp_path / "out"), read_metrics(whole.output)
    for key in (
        "loss",
        "forward_kl",
        "ce",
        "grad_norm",
    ):  # two ranks round the teacher's sums in another order
        assert [m[key] for m in here] == pytest.approx([m[key] for m in there], rel=1e-4, abs=0), key
    refused(
        run("distill", cached, "distill.micro_batch_size=4", "--force"),
        "teacher_signals was made from other inputs or settings",
        "micro_batch_size: 2, here 4",
    )
    (shard, *_) = sorted((tmp_path / "out" / "teacher_signals").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(run("distill", cached, "--force"), f"{shard} is damaged", "run `minitron-mp cache` again")


@pytest.mark.slow
def test_siblings_share_one_teacher_stream(inputs, whole, tmp_path, on_rank, in_job):
    """Two students of different sizes and layouts share one teacher.

    Each has the loss curve of a separate run.
    """
    sizes = {"target": {"num_layers": 4, "ffn_hidden_size": 64}}
    alone = make_recipe_file(
        tmp_path / "alone.yaml", inputs / "model", inputs / "text", tmp_path / "alone", **sizes
    )
    assert on_rank("compress", alone).code == 0
    for name, source in (("first", whole.output), ("second", tmp_path / "alone")):
        shutil.copytree(source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "student_distilled")
    sibling = make_recipe_file(
        tmp_path / "second.yaml",
        inputs / "model",
        inputs / "text",
        tmp_path / "second",
        **sizes,
        parallel={"tp": 2},
    )
    recipe = make_recipe_file(
        tmp_path / "first.yaml",
        inputs / "model",
        inputs / "text",
        tmp_path / "first",
        teacher={"placement": "remote", "window": 2, "siblings": {str(sibling): 2}},
    )
    # Checkpoints that cannot be read, of both students.
    for student in co_student_recipes(load_recipe(recipe)).values():
        with writing_artifact(
            student.root / "checkpoints" / "distill" / "step_00000006",
            StageGraph(student).manifest("distill"),
        ):
            pass
    for done in in_job(4, "distill", recipe, "--from-step", "0"):
        assert done.code == 0, done.err
    for name, expected, tolerance in (("first", whole.output, 0.0), ("second", tmp_path / "alone", 1e-4)):
        here, there = read_metrics(tmp_path / name), read_metrics(expected)
        assert [m["loss"] for m in here] == pytest.approx([m["loss"] for m in there], rel=tolerance, abs=0), (
            name
        )
