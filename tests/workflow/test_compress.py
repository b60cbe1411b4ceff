"""All stages from a Hugging Face folder to another: the results, on one rank and on two."""

from __future__ import annotations

import json
import math
import re
from subprocess import CompletedProcess

import pytest
import torch
from cases import BY_NAME, make_samples
from forked_job import Job
from tiny import (
    MAX_LR,
    OUTPUT,
    STAGES,
    STEPS,
    TWO_RANKS,
    Run,
    loss_curve,
    make_recipe_file,
    names,
    read_metrics,
)

from minitron_mp import load_recipe
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.pruning.plan import PrunePlan


@pytest.fixture(scope="module")
def two_ranks(inputs) -> Run:
    """The same project on two ranks with tensor and sequence parallelism.

    They are forked, with torchrun's environment. tests/run.sh --rehearse uses torchrun itself.
    """
    recipe = make_recipe_file(inputs / "two.yaml", inputs / "model", inputs / "text", inputs / "two")
    words = ["compress", str(recipe), *TWO_RANKS]
    job = Job(words, inputs / "two.log")
    code = job.end()
    text = job.log.read_text()
    return Run(recipe, inputs / "two", CompletedProcess(words, code, text, text))


def test_compress_writes_every_artifact(whole):
    assert whole.done.returncode == 0, whole.done.stderr
    assert "Traceback" not in whole.done.stderr
    assert names(whole.output) == OUTPUT  # and nothing written aside, no checkpoints
    assert whole.to_repeat() == {}
    assert load_recipe(whole.output / "resolved_recipe.yaml") == load_recipe(whole.recipe)
    for name in STAGES:
        assert f"{name}: {whole.output / STAGES[name].artifact} in " in whole.done.stdout


def test_model_logits_match_transformers(whole, inputs, ranks):
    """Float32 on both sides, so only the order of sums may differ.

    No difference seen on one machine.
    """
    from transformers import AutoModelForCausalLM

    models = {}
    for name, stage, folder in (
        ("teacher", "import", inputs / "model"),
        ("student", "distill", whole.output / "student_hf"),
    ):
        checkpoint = whole.output / STAGES[stage].artifact
        models[name] = (
            require_artifact(checkpoint, stage).arch,
            checkpoint,
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        )
    found = ranks(
        1,
        "model_workers.load_and_run",
        layout=BY_NAME["one"],
        models={name: pair[:2] for name, pair in models.items()},
    )[0]
    for name, (arch, _, model) in models.items():
        with torch.no_grad():
            want = model(make_samples(arch, 0, 8)["tokens"]).logits
        torch.testing.assert_close(
            found[name][..., : arch.vocab_size],
            want,
            atol=2e-4,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert want.abs().max() > 1


def test_export_is_a_model_with_its_tokenizer(whole, inputs):
    from transformers import AutoTokenizer

    config = json.loads((whole.output / "student_hf" / "config.json").read_text())
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    # Heads keep their width, which is no longer hidden_size / num_attention_heads. Without head_dim
    # the model could not be loaded.
    assert {name: config[name] for name in sizes} == sizes
    assert config["head_dim"] == 8
    assert config["dtype"] == "float32"
    assert {path.name for path in (inputs / "model").iterdir()} <= set(names(whole.output / "student_hf"))
    ids = [
        AutoTokenizer.from_pretrained(folder)("prune a layer")["input_ids"]
        for folder in (inputs / "model", whole.output / "student_hf")
    ]
    assert ids[0] == ids[1]


def test_distillation_lowers_kl_to_the_teacher(whole):
    found = json.loads((whole.output / "evaluation.json").read_text())
    assert found["teacher"]["kl"] is None
    assert found["distilled"]["kl"] < found["pruned"]["kl"]
    assert {found[name]["num_tokens"] for name in ("teacher", "pruned", "distilled")} == {16 * 32}
    assert all(
        math.isclose(found[name]["perplexity"], math.exp(found[name]["loss"]), rel_tol=1e-6)
        for name in ("teacher", "pruned", "distilled")
    )


def test_metrics_have_one_line_per_step(whole):
    metrics = read_metrics(whole.output)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert all(
        m["loss"] == m["forward_kl"] and m["num_tokens"] == 4 * 32 for m in metrics
    )  # no cross-entropy, nothing masked
    assert max(m["lr"] for m in metrics) == pytest.approx(MAX_LR, rel=0.01)
    assert loss_curve(whole) == pytest.approx({m["step"]: m["loss"] for m in metrics}, rel=1e-6)


def test_report_shows_sizes_and_losses(whole):
    report = (whole.output / "report.md").read_text()
    found, plan = (
        json.loads((whole.output / "evaluation.json").read_text()),
        PrunePlan.load(whole.output / "plan.json"),
    )
    for name, arch in (("teacher", plan.teacher), ("pruned", plan.student), ("distilled", plan.student)):
        quality, kl = found[name], "" if found[name]["kl"] is None else f"{found[name]['kl']:.4f}"
        share = f"{arch.num_parameters() / plan.teacher.num_parameters():.1%}"
        assert (
            f"| {name} | {arch.num_parameters():,} | {share} "
            f"| {quality['loss']:.4f} | {quality['perplexity']:.2f} | {kl} |" in report
        )
    for row in plan.summary():
        assert "| " + " | ".join(row) + " |" in report
    assert f"Layers dropped (counted from 0): {({*range(4)} - {*plan.layers}).pop()}." in report
    assert f"{STEPS} steps, {STEPS * 4 * 32:,} tokens" in report
    assert all(f"`{stage.artifact}`" in report for stage in STAGES.values())


def test_two_ranks_make_the_same_student(whole, two_ranks, on_rank):
    assert two_ranks.done.returncode == 0, two_ranks.done.stderr
    assert names(two_ranks.output) == OUTPUT
    one, two = (PrunePlan.load(run.output / "plan.json") for run in (whole, two_ranks))
    assert (one.layers, one.keep) == (two.layers, two.keep)
    assert two_ranks.to_repeat() == {}, "a run on one rank would repeat something"
    # Rounding of sums over two ranks, which 30 steps at a large learning rate may amplify: 3e-7
    # seen.
    found = [json.loads((run.output / "evaluation.json").read_text()) for run in (whole, two_ranks)]
    assert found[1]["pruned"]["kl"] == pytest.approx(found[0]["pruned"]["kl"], rel=1e-5)
    assert found[1]["distilled"]["kl"] == pytest.approx(found[0]["distilled"]["kl"], rel=1e-4)
    assert [m["loss"] for m in read_metrics(two_ranks.output)] == pytest.approx(
        [m["loss"] for m in read_metrics(whole.output)], rel=1e-4
    )

    done = on_rank("evaluate", two_ranks.recipe, "--force")
    assert done.code == 0, done
    assert "evaluate: done" not in done.out
    again = json.loads((two_ranks.output / "evaluation.json").read_text())
    assert again["manifest"] == found[1]["manifest"]
    for name in ("teacher", "pruned", "distilled"):
        assert again[name]["loss"] == pytest.approx(found[1][name]["loss"], rel=1e-6)

    assert on_rank("report", two_ranks.recipe).code == 0
    commands, own = (
        (two_ranks.output / "report.md").read_text(),
        two_ranks.output / "resolved_recipe.yaml",
    )  # which the last command wrote
    assert f"torchrun --nproc-per-node 2 -m minitron_mp distill {own} {' '.join(TWO_RANKS)}\n" in commands
    assert f"\nminitron-mp evaluate {own}\n" in commands


def test_only_rank_0_logs(two_ranks):
    assert two_ranks.done.stdout.count("import: ") == 2  # progress and artifact
    assert two_ranks.done.stdout.count("report: ") == 1


def test_fp8_teacher_kl_is_logged(ranks, whole):
    """Compare a teacher with itself, then with another; an FP8 one takes a GPU (tests/gpu)."""
    same, other = ranks(1, "project_workers.drift", recipe=str(whole.recipe))[0]
    assert re.fullmatch(
        r"teacher in FP8 \(tensorwise\): KL\(bf16 \|\| FP8\) -?0\.0000\d on \d+ tokens, "
        r"loss (\S+), in bf16 \1",
        same,
    )
    assert float(re.search(r"FP8\) (\S+)", other)[1]) > 0.001
