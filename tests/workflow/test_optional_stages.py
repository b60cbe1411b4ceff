"""Stages that only some recipes have: teacher correction, a separate teacher, and depth trials."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import MAX_LR, REMOTE, STAGES, STEPS, make_model, make_recipe_file, refused

from minitron_mp import load_recipe
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.report.correction_gain import correction_gain
from minitron_mp.workflow.graph import StageGraph


def test_corrected_teacher_is_pruned_and_distilled_from(whole, inputs, tmp_path, on_rank):
    """The teacher is trained on the text, later stages use it, and a second run skips all."""
    correct = {
        "steps": 20,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "lr": MAX_LR,
        "warmup_steps": 4,
        "checkpoint_interval": 6,
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", correct=correct
    )
    code, out, err = on_rank("compress", recipe)
    assert code == 0, err
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["teacher"]["loss"] < 0.9 * evaluation["uncorrected"]["loss"]
    assert evaluation["uncorrected"]["kl"] > 0  # of the teacher, which is the corrected one
    project = StageGraph(load_recipe(recipe))
    corrected = require_artifact(project.paths["correct"], "correct")
    assert {
        project.manifest(name).inputs["correct"] for name in ("score", "prune", "distill", "evaluate")
    } == {corrected.fingerprint}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Teacher correction" in report
    assert "| uncorrected |" in report
    assert len((project.paths["correct"] / "metrics_correct.jsonl").read_text().splitlines()) == 20
    assert "How much the student gains from correction is unknown" in report
    records = [json.loads(line) for line in (tmp_path / "out" / "stages.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["fingerprint"], row["ranks"]) for row in records] == [
        (name, project.manifest(name).fingerprint, 1) for name in project.stages
    ]
    code, out, err = on_rank("compress", recipe, f"correct.baseline={whole.output}")
    assert code == 0, err
    assert out.count(": done, ") == len(project.stages) == len(STAGES) + 1
    mine, plain = (
        json.loads((folder / "evaluation.json").read_text())["distilled"]["loss"]
        for folder in (tmp_path / "out", whole.output)
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"held-out loss is {mine:.4f}, without correction {plain:.4f}" in report
    assert len((tmp_path / "out" / "stages.jsonl").read_text().splitlines()) == len(
        records
    )  # nothing has run
    for words, why in {
        (
            "distill.steps=40",
            "evaluate.num_samples=8",
        ): f"distill settings.steps: {STEPS}, here 40; evaluate settings.num_samples: 16, here 8.",
        ("data.valid_fraction=0.2",): "data settings.valid_fraction: 0.15, here 0.2.",
    }.items():
        other = StageGraph(load_recipe(recipe, [*words, f"correct.baseline={whole.output}"]))
        assert why in correction_gain(other, evaluation)[-1]
    again = StageGraph(load_recipe(recipe, [f"correct.baseline={tmp_path / 'out'}"]))
    assert "input correct: " in correction_gain(again, evaluation)[-1]  # that one was corrected, too
    # A baseline of other tasks and fewer texts: what both have compares.
    old, new = (
        f"data.held_out.{name}=[{inputs / 'text' / file}]"
        for name, file in (("old", "00.txt"), ("new", "01.txt"))
    )
    texts = StageGraph(load_recipe(whole.recipe, [old])).manifest("texts")
    plain = json.loads((whole.output / "evaluation.json").read_text())
    plain["manifest"]["inputs"]["texts"] = texts.fingerprint
    plain["texts"] = {"old": {"distilled": {"loss": 2.0}}}
    (tmp_path / "plain" / "held_out").mkdir(parents=True)
    (tmp_path / "plain" / "held_out" / "manifest.json").write_text(texts.model_dump_json())
    (tmp_path / "plain" / "evaluation.json").write_text(json.dumps(plain))
    shutil.copy(whole.output / "plan.json", tmp_path / "plain")
    more = StageGraph(
        load_recipe(recipe, [old, new, "evaluate.task_items=5", f"correct.baseline={tmp_path / 'plain'}"])
    )
    losses = {name: {"loss": 1.0} for name in ("uncorrected", "teacher", "distilled")}
    said = correction_gain(more, {**evaluation, "texts": {"old": losses, "new": losses}})
    assert "held-out loss on old is 1.0000, without correction 2.0000 (-50.0%)." in said[-2]
    assert (
        said[-1]
        == "That student was not evaluated on new: run `evaluate` there with the same `data.held_out`."
    )
    refused(
        on_rank("compress", recipe, f"correct.baseline={tmp_path / 'out'}"),
        "is the output of this recipe; give the output of a finished run without",
    )
    refused(
        on_rank("compress", recipe, "correct.baseline=nowhere"),
        "correct.baseline: nowhere has no evaluation.json",
    )
    refused(
        on_rank("correct", inputs / "recipe.yaml"),
        "the recipe has no stage correct; add a section correct",
    )
    refused(on_rank("compress", recipe, "correct.stepz=3"), "unknown key correct.stepz; did you mean steps?")
    refused(
        on_rank("compress", recipe, "correct.warmup_steps=20"),
        "correct: warmup_steps 20 must be smaller than steps 20; lower it",
    )


def test_teacher_is_corrected_during_distillation(inputs, tmp_path, on_rank):
    """The student is cut from the original, and judged by the corrected teacher.

    Also on text that neither model has seen.
    """
    (tmp_path / "old.txt").write_text("An old text of other words, again and again. " * 200)
    sections = {
        "correct": {
            "when": "during",
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "lr": MAX_LR,
            "warmup_steps": 2,
        }
    }
    sections |= {"distill": {"steps": 14}, "data": {"held_out": {"old": [str(tmp_path / "old.txt")]}}}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sections
    )
    code, _, err = on_rank("compress", recipe)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["teacher"]["loss"] < 0.95 * found["uncorrected"]["loss"]
    assert found["texts"]["old"]["teacher"]["loss"] != found["texts"]["old"]["uncorrected"]["loss"]
    project = StageGraph(load_recipe(recipe))
    assert [name for name in project.stages if name != "texts"] == list(STAGES)
    other = StageGraph(load_recipe(recipe, [f"data.held_out.new=[{tmp_path / 'old.txt'}]"]))
    assert [name for name in other.stages if other.why_not_done(name) is not None] == [
        "texts",
        "evaluate",
    ]  # nothing that training hangs on
    assert len((project.paths["distill"] / "metrics_correct.jsonl").read_text().splitlines()) == 12
    report = (tmp_path / "out" / "report.md").read_text()
    assert "is pruned from the original model, and distilled from the teacher during correction" in report
    assert "held-out loss on old changed from" in report
    assert "| old (" in report
    refused(
        on_rank("compress", recipe, "teacher.placement=cached"),
        "correct.when during trains the teacher on the student's ranks",
    )
    refused(on_rank("compress", recipe, "correct.steps=15"), "correct.steps 15 is above distill.steps 14")
    refused(
        on_rank("compress", recipe, "distill.micro_batch_size=4"),
        "correct.micro_batch_size 2 is not distill.micro_batch_size 4",
    )
    refused(
        on_rank("correct", recipe),
        "the recipe has no stage correct; add a section correct whose `when` is before",
    )


def test_iterative_pruning_distills_from_the_first_teacher(whole, inputs, tmp_path, on_rank):
    """Iterative compression: `model` is a student, `teacher.model` its original teacher.

    One query group is dropped, the heads of the other are merged.
    """
    heads = {"num_query_groups": 1, "num_attention_heads": 2, "merge_heads": True}
    sizes = {
        "target": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, **heads},
        "distill": {"steps": 6},
    }
    student, first = whole.output / "student_hf", inputs / "model"
    items = [
        {"query": "the teacher and the", "choices": ["student", "loss"], "gold": 1},
        {"query": "prune", "choices": ["head", "cut it"], "gold": 0},
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    sizes["evaluate"] = {"tasks": {"choices": str(tmp_path / "choices.jsonl")}}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml",
        student,
        inputs / "text",
        tmp_path / "out",
        **sizes,
        teacher={"model": str(first)},
    )
    code, _, err = on_rank("compress", recipe)
    assert code == 0, err
    again, before = (
        json.loads((path / "evaluation.json").read_text()) for path in (tmp_path / "out", whole.output)
    )
    for name, loss in (("teacher", before["teacher"]["loss"]), ("unpruned", before["distilled"]["loss"])):
        assert again[name]["loss"] == pytest.approx(loss, rel=1e-5)
    assert again["unpruned"]["kl"] == pytest.approx(before["distilled"]["kl"], rel=1e-4)
    assert again["distilled"]["kl"] < again["pruned"]["kl"]
    config = json.loads((tmp_path / "out" / "student_hf" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (1, 2)
    merged = json.loads((tmp_path / "out" / "plan.json").read_text())["merge"]["heads"]
    assert [len(pairs) for pairs in merged.values()] == [1, 1]
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.index("| teacher |") < report.index("| unpruned |") < report.index("| pruned |")
    assert set(again["tasks"]["choices"]) == {"teacher", "unpruned", "pruned", "distilled"}
    assert "| choices (2), accuracy normalised by characters |" in report
    refused(
        on_rank("compress", recipe, "evaluate.tasks.choices=nowhere.jsonl"),
        "evaluate.tasks.choices: there is no file nowhere.jsonl",
    )
    refused(
        on_rank("import-teacher", whole.recipe),
        "the recipe has no stage import-teacher; add teacher.model",
    )
    refused(on_rank("compress", recipe, "correct.steps=300"), "correct that model in a separate run")
    other = make_model(tmp_path / "other", vocab_size=400)
    refused(
        on_rank("compress", recipe, f"teacher.model={other}"),
        "teacher.model has a vocabulary of 400, the pruned model",
    )


@pytest.mark.parametrize("method", ["drop", "block", "greedy"])
def test_layers_are_dropped_by_loss(whole, inputs, tmp_path, on_rank, method):
    """The plan follows the trials of `depth`.

    The first layer is protected; `method` sets the trials.
    """
    shutil.copytree(whole.output, tmp_path / "out")
    sizes = {
        "target": {"num_layers": 2},
        "depth": {"method": method, "protect_first": 1, "num_samples": 8, "micro_batch_size": 4},
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sizes
    )
    refused(on_rank("plan", recipe), "depth.json is missing; run `minitron-mp depth` first")
    assert [on_rank(stage, recipe).code for stage in ("depth", "plan")] == [0, 0]
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    tried = [trial["dropped"] for trial in found["trials"]]
    assert tried == {"drop": [[1], [2], [3]], "block": [[1, 2], [2, 3]]}.get(method, tried)
    kept = PrunePlan.load(tmp_path / "out" / "plan.json").layers
    best = sorted(found["trials"], key=lambda trial: trial["loss"])
    dropped = {
        "drop": best[0]["dropped"] + best[1]["dropped"],
        "block": best[0]["dropped"],
        "greedy": found["trials"][-1]["dropped"],
    }[method]
    assert kept == sorted({0, 1, 2, 3} - set(dropped))
    others = [(trial, trial["next_best"]) for trial in found["trials"] if "next_best" in trial]
    assert [(len(other["dropped"]), other["loss"] >= trial["loss"]) for trial, other in others] == (
        [(1, True), (2, True)] if method == "greedy" else []
    )
    refused(
        on_rank("depth", whole.recipe),
        "the recipe has no stage depth; add depth.method: drop, block or greedy",
    )
    refused(
        on_rank("compress", recipe, "depth.protect_last=2"),
        "leave 1 of 4 layers to drop from, the target drops 2",
    )


def test_layers_are_dropped_by_accuracy(whole, inputs, tmp_path, on_rank):
    """Greedily by a task's items; other items are another artifact."""
    shutil.copytree(whole.output, tmp_path / "out")
    items = [
        {"query": "the teacher and the", "choices": ["student", "loss"], "gold": gold} for gold in (0, 1, 1)
    ]
    items.append({"query": "prune the", "choices": ["head", "layer"], "gold": 0})
    lines, task = [json.dumps(item) + "\n" for item in items], tmp_path / "task.jsonl"
    task.write_text("".join(lines))
    sizes = {
        "target": {"num_layers": 2},
        "depth": {"method": "greedy", "metric": "task", "task": str(task), "micro_batch_size": 4},
    }
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", **sizes
    )
    assert [on_rank(stage, recipe).code for stage in ("depth", "plan")] == [0, 0]
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    others = [trial["next_best"] for trial in found["trials"]]
    assert [len(trial["dropped"]) for trial in found["trials"] + others] == [1, 2, 1, 2]
    shares = [trial["accuracy"] for trial in [found["base"], *found["trials"]]]
    assert {share * 4 for share in shares} <= {1, 2, 3}
    assert all("accuracy" in trial for trial in others)
    assert PrunePlan.load(tmp_path / "out" / "plan.json").layers == sorted(
        {0, 1, 2, 3} - set(found["trials"][-1]["dropped"])
    )
    task.write_text("".join(lines[:2]))
    refused(on_rank("plan", recipe), "depth.json was made from other inputs or settings", "input task: ")
    refused(
        on_rank("compress", recipe, "depth.task=nowhere.jsonl"), "depth.task: there is no file nowhere.jsonl"
    )


def test_correction_does_not_wait_for_a_remote_fp8_teacher(whole, inputs, tmp_path, ranks):
    """The ranks of the teacher take part in `distill` only."""
    shutil.copytree(whole.output, tmp_path / "out")
    correct = {"steps": 2, "warmup_steps": 1, "global_batch_size": 4, "micro_batch_size": 2}
    recipe = make_recipe_file(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "text", tmp_path / "out", correct=correct
    )
    words = ["correct", str(recipe), *REMOTE]
    for done in ranks(2, "project_workers.correct_beside_fp8_teacher", arguments=words, timeout_s=90):
        assert done.code == 0, done.err
