"""Runs of several rounds: a cascade (prune, distil, prune again, distil), then longer samples."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from interrupt import start_and_kill
from tiny import REMOTE, Run, make_recipe_file, names, read_metrics

from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.recipe import load_recipe
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.workflow.graph import StageGraph

STEPS = 4
NARROW, STRETCH = "rounds/narrow", "rounds/stretch"


def make_run(folder: Path, inputs: Path) -> Run:
    """Return a recipe with two further rounds. In the second one samples are twice as long."""
    distill = {"steps": STEPS, "micro_batch_size": 4, "warmup_steps": 1, "checkpoint_interval": 2}
    recipe = make_recipe_file(
        folder / "recipe.yaml",
        inputs / "model",
        inputs / "text",
        folder / "out",
        distill=distill,
        score={"num_samples": 4},
        evaluate={"num_samples": 4},
        rounds={
            "narrow": {"target": {"ffn_hidden_size": 64, "num_attention_heads": 4}},
            "stretch": {
                "data": {"sequence_length": 64},
                "distill": {"global_batch_size": 2, "micro_batch_size": 2},
            },
        },
    )
    return Run(recipe, folder / "out")


@pytest.fixture(scope="module")
def finished(inputs, ranks, tmp_path_factory) -> Run:
    """A finished run that tests read and do not change."""
    run = make_run(tmp_path_factory.mktemp("rounds"), inputs)
    (done,) = ranks(1, "project_workers.minitron", arguments=["compress", str(run.recipe)])
    assert done.code == 0, done
    return Run(run.recipe, run.output, done)


@pytest.fixture
def copy(finished, inputs, tmp_path) -> Run:
    run = make_run(tmp_path, inputs)
    shutil.copytree(finished.output, run.output)
    return run


@pytest.fixture
def tensors(ranks):
    """tensors(folder) returns the weights of a sharded model."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return ranks(1, "model_workers.read_tensors", folder=folder, prefix="")[0]

    return read


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def to_repeat(run: Run, *overrides: str) -> list[str]:
    """Return the stages of all rounds that are not done."""
    rounds = StageGraph(load_recipe(run.recipe, overrides)).rounds()
    return [
        name for each in rounds for name in each.stages_of_compress() if each.why_not_done(name) is not None
    ]


def test_each_round_prunes_the_student_of_the_round_before(finished, tensors):
    before = tensors(finished.output / "student_distilled")
    pruned = tensors(finished.output / NARROW / "student")
    plan = PrunePlan.load(finished.output / NARROW / "plan.json")
    assert plan.teacher.ffn_hidden_size == 96
    for layer in range(3):
        name = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        kept = torch.tensor(plan.keep["ffn"][layer])
        assert torch.equal(pruned[name], before[name][:, kept])
        norm = f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"
        assert torch.equal(pruned[norm], before[norm])
    word = "embedding.word_embeddings.weight"
    assert torch.equal(pruned[word], before[word])
    assert not torch.equal(tensors(finished.output / NARROW / "student_distilled")[word], before[word])


def test_rounds_share_teacher_and_text(finished):
    """Each training run has the same teacher, and no round has a copy of it or of the text."""
    manifests = {
        name: find_manifest(finished.output / name / "student_distilled") for name in (".", NARROW, STRETCH)
    }
    teacher = find_manifest(finished.output / "teacher").fingerprint
    assert [manifest.inputs["import"] for manifest in manifests.values()] == [teacher] * 3
    assert len({manifest.inputs["data"] for manifest in manifests.values()}) == 1
    assert manifests[STRETCH].inputs["distill --round narrow"] == manifests[NARROW].fingerprint
    assert manifests[STRETCH].settings["sequence_length"] == 64
    trained = {"metrics.jsonl", "student_distilled", "tensorboard"}
    assert set(names(finished.output / STRETCH)) == {"evaluation.json", "student_hf", *trained}
    assert set(names(finished.output / NARROW)) == {
        "importance.safetensors",
        "plan.json",
        "student",
        *trained,
    }
    assert not (finished.output / "evaluation.json").exists()
    assert not (finished.output / "student_hf").exists()
    assert (finished.output / "finished").exists()


def test_report_compares_the_rounds(finished):
    """The losses are those of one evaluation. The exported model is that of the last round."""
    from transformers import AutoModelForCausalLM

    text = (finished.output / "report.md").read_text()
    evaluation = json.loads((finished.output / STRETCH / "evaluation.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in text.split("## Rounds")[1].splitlines()[6:9]]
    models = ("distilled (first)", "distilled (narrow)", "distilled")
    for row, model, size in zip(rows, models, ("74,640", "56,208", "56,208")):
        loss, kl = evaluation[model]["loss"], evaluation[model]["kl"]
        assert row[2] == size
        assert row[-2:] == [f"{loss:.4f}", f"{kl:.4f}"]
    assert [row[:2] for row in rows] == [["first", "yes"], ["narrow", "yes"], ["stretch", "no"]]
    assert [row[5] for row in rows] == ["32", "32", "64"]
    assert "## What was pruned, round narrow" in text
    assert "## Distillation, round stretch" in text
    assert "minitron-mp distill --round narrow " in text
    card = (finished.output / STRETCH / "student_hf" / "README.md").read_text()
    assert "with 56,208 parameters, pruned from model (159,040 parameters)" in card
    student = AutoModelForCausalLM.from_pretrained(finished.output / STRETCH / "student_hf")
    assert student.num_parameters() == 56_208
    assert student.config.max_position_embeddings == 128


def test_finished_rounds_are_not_repeated(finished, copy, on_rank):
    before = {path: path.stat().st_mtime_ns for path in copy.output.rglob("[!.]*.json")}
    done = on_rank("compress", copy.recipe)
    assert done.code == 0, done
    assert done.out.count(": done, ") == len(re.findall(r"^[a-z-]+: \S+ in ", finished.done.out, re.M)) == 13
    assert {path: path.stat().st_mtime_ns for path in copy.output.rglob("[!.]*.json")} == before


def test_a_changed_round_repeats_only_what_depends_on_it(finished, copy, on_rank):
    last = ["distill", "evaluate", "export"]
    assert to_repeat(finished, "rounds.narrow.distill.lr=4e-3") == ["distill", *last]
    assert to_repeat(finished, "rounds.stretch.data.sequence_length=32") == last
    assert to_repeat(finished, "rounds.more.distill.lr=4e-3") == last  # a further round
    assert to_repeat(finished, "rounds.narrow.parallel.tp=2", "rounds.stretch.parallel.cp=2") == []
    done = on_rank("prune", copy.recipe, "--round", "narrow", "rounds.narrow.target.ffn_hidden_size=32")
    assert done.code == 2
    assert "plan.json was made from other inputs or settings" in done.err
    assert "run `minitron-mp plan --round narrow` again" in done.err


def test_single_stage_of_a_round_starts_from_the_round_before(copy, on_rank, tensors):
    """With a learning rate that rounds to no change the weights stay those of the round before."""
    settings = ("lr=1e-30", "min_lr=0", "steps=2")
    words = [f"rounds.stretch.distill.{setting}" for setting in settings]
    done = on_rank("distill", copy.recipe, "--round", "stretch", *words)
    assert done.code == 0, done
    first, second = (tensors(copy.output / name / "student_distilled") for name in (NARROW, STRETCH))
    assert equal(first, second)
    assert len(losses(copy, STRETCH)) == 2


def losses(run: Run, folder: str) -> list[float]:
    return [row["loss"] for row in read_metrics(run.output / folder)]


def unfinished(run: Run) -> None:
    """Delete the training of the second round and all that follows."""
    shutil.rmtree(run.output / STRETCH)
    for name in ("student_distilled", "tensorboard"):
        shutil.rmtree(run.output / NARROW / name)
    (run.output / NARROW / "metrics.jsonl").unlink()
    (run.output / "finished").unlink()


def test_stop_in_the_second_round_resumes_bitwise(finished, copy, on_rank, tensors):
    unfinished(copy)
    done = on_rank("compress", copy.recipe, stop_at=1)
    assert done.code == 0, done
    assert "stopped after step 2" in done.out
    assert not (copy.output / STRETCH).exists()
    done = on_rank("compress", copy.recipe)
    assert done.code == 0, done
    assert "distill: resuming from step 2" in done.out
    for name in (NARROW, STRETCH):
        assert read_metrics(copy.output / name) == read_metrics(finished.output / name)
        folders = [run.output / name / "student_distilled" for run in (finished, copy)]
        assert equal(*map(tensors, folders))


def test_round_in_another_layout(copy, in_job, finished):
    """Two tensor parallel ranks, then two data parallel ranks, which compute the losses of one rank."""
    unfinished(copy)
    batches = ("distill.micro_batch_size=2", "score.micro_batch_size=2")
    layout = ("rounds.narrow.parallel.tp=2", "rounds.narrow.parallel.sequence_parallel=true")
    words = (*batches, *layout, "rounds.stretch.distill.micro_batch_size=1")
    (done, other) = in_job(2, "compress", copy.recipe, *words)
    assert (done.code, other.code) == (0, 0), done
    for name in (NARROW, STRETCH):  # sums of float32 in another order
        assert losses(copy, name) == pytest.approx(losses(finished, name), abs=1e-4)


@pytest.mark.slow
def test_killed_in_the_second_round(copy, on_rank, tensors, tmp_path):
    words = ("--round", "narrow", "rounds.narrow.distill.steps=40")
    assert on_rank("distill", copy.recipe, *words).code == 0
    folder = copy.output / NARROW
    metrics = read_metrics(folder)
    (folder / "student_distilled").rename(tmp_path / "whole")
    start_and_kill(Run(copy.recipe, folder), *words)
    done = on_rank("distill", copy.recipe, *words)
    assert "distill: resuming from step" in done.out
    assert read_metrics(folder) == metrics
    assert equal(tensors(folder / "student_distilled"), tensors(tmp_path / "whole"))


@pytest.mark.slow
def test_rounds_with_a_remote_teacher(copy, ranks, finished):
    """The ranks of the teacher serve each round. When the student stops, they do not start the next."""
    unfinished(copy)
    job = {"arguments": ["compress", str(copy.recipe), *REMOTE], "own_job": True}
    stopped = ranks(2, "project_workers.minitron", **job, stop_at=1)
    assert [done.code for done in stopped] == [0, 0], stopped
    assert "the same command resumes from there" in stopped[0].out
    assert not (copy.output / STRETCH).exists()
    resumed = ranks(2, "project_workers.minitron", **job)
    assert [done.code for done in resumed] == [0, 0], resumed
    for name in (NARROW, STRETCH):
        assert losses(copy, name) == pytest.approx(losses(finished, name), abs=1e-5)
