"""Training is independent of layout, microbatches and interruptions, and matches plain autograd."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import reference
import torch
from cases import (
    ARCHS,
    BY_NAME,
    CORRECT,
    DISTILL,
    MEANWHILE_LAYOUTS,
    OVERLAP_LAYOUTS,
    RECOMPUTE_LAYOUTS,
    RESUME_AT,
    RESUMED_LAYOUTS,
    SPLIT_LAYOUTS,
    SPLITS,
    STEPS,
    TRAINED,
    TRAINED_IDS,
    make_samples,
)

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.training.loss import TrainingLoss

ROUNDING = 1e-5
"""Relative, of float32 losses and gradient norms: reordered sums of thousands; 2e-6 seen."""
AXES = ("loss", "divergence", "ce", "grad_norm")


trained = pytest.mark.parametrize(("arch", "layout"), TRAINED, ids=TRAINED_IDS)
meanwhile = pytest.mark.parametrize(
    "layout",
    [name if name in MEANWHILE_LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in BY_NAME],
)


def one_rank(results, arch="qwen3"):
    return results.trained(arch, BY_NAME["one"])[0]["unbroken"]


def assert_close(ours, want, tolerance=ROUNDING):
    """Two lists of steps: same numbers and learning rates, same count of tokens."""
    assert [m.step for m in ours] == [m.step for m in want]
    for mine, other in zip(ours, want):
        assert (mine.num_tokens, mine.lr) == (other.num_tokens, other.lr)
        for name in AXES:
            value, expected = getattr(mine, name), getattr(other, name)
            assert value is expected or math.isclose(value, expected, rel_tol=tolerance), (
                f"step {mine.step}: {name} {value:.9g}, expected {expected:.9g}"
            )


@trained
def test_steps_match_plain_autograd(results, arch, layout):
    """Loss, its parts and the gradient norm of every step, float64 dense weights and AdamW."""
    history, _ = results.plain_training(arch)
    metrics = results.trained(arch, layout)[0]["unbroken"]
    for mine, want in zip(metrics, history, strict=True):
        for name, expected in zip(AXES, want):
            assert math.isclose(getattr(mine, name), expected, rel_tol=ROUNDING), (
                f"step {mine.step}: {name} {getattr(mine, name):.9g}, expected {expected:.9g}"
            )


@trained
def test_steps_match_one_rank(results, arch, layout):
    assert_close(results.trained(arch, layout)[0]["unbroken"], one_rank(results, arch))


@trained
def test_resumed_run_is_bitwise_identical(results, arch, layout):
    by_rank = results.trained(arch, layout)
    unbroken, resumed = (
        [(m.step, m.loss, m.divergence, m.ce, m.grad_norm, m.lr) for m in by_rank[0][name]]
        for name in ("unbroken", "resumed")
    )
    assert len(unbroken) == STEPS
    assert unbroken[RESUME_AT:] == resumed
    assert all(rank["bitwise"] for rank in by_rank), "the final weights"


@pytest.mark.parametrize(
    ("arch", "layout"), [("qwen3", BY_NAME[name]) for name in RESUMED_LAYOUTS], ids=RESUMED_LAYOUTS
)
def test_run_resumes_at_another_layout(results, arch, layout):
    """From the checkpoint that the layout before this one in the table wrote."""
    assert_close(results.resumed(arch, layout), one_rank(results, arch)[RESUME_AT:])


@trained
def test_saved_optimizer_state_matches_plain_adam(results, ranks, arch, layout):
    """Float32 weights and both moments of every parameter, put together from all ranks."""
    folder = results.stopped(arch, layout) / f"step_{RESUME_AT:08d}"
    saved = ranks(1, "model_workers.read_tensors", folder=folder, prefix="optimizer.")[0]
    _, want = results.plain_training(arch)
    assert saved.keys() == want.keys()
    for key, expected in want.items():
        # If a gradient is near zero, the sign of the weight's step is rounding. So weights are
        # compared relative to the learning rate, and the second step's gradients inherit this. 9e-3
        # and 1.1e-5 seen.
        tolerance = 0.05 * DISTILL.lr if ".param." in key else 5e-5 * expected.abs().max()
        difference = (saved[key] - expected).abs().max()
        assert difference <= tolerance, f"{key} differs by {difference:.2e}, allowed {tolerance:.2e}"


@trained
def test_all_ranks_write_the_checkpoint(results, arch, layout):
    """Each data-parallel rank owns a part of the optimizer state, and writes a part of the weights."""
    num_bytes = Counter()
    for path in (results.stopped(arch, layout) / f"step_{RESUME_AT:08d}").glob("*.distcp"):
        num_bytes[int(path.name.split("_")[2])] += path.stat().st_size
    assert set(num_bytes) == set(range(layout.ranks))
    if "pp" not in layout.parallel:  # embeddings are on the first and last stage only
        assert max(num_bytes.values()) < 2 * min(num_bytes.values())


@trained
def test_student_equal_to_teacher_has_zero_loss_and_gradient(results, arch, layout):
    """Up to rounding: the weights have other offsets in the gradient buffers, and kernels may add
    in an order that depends on them."""
    same = results.trained(arch, layout)[0]["same"][0]
    assert abs(same.divergence) < 1e-6
    assert same.grad_norm < ROUNDING * one_rank(results, arch)[0].grad_norm


def dense_evaluation(results, arch):
    """Sums of KL, cross-entropy and tokens that count, of two steps of samples."""
    plan, teacher = results.plan(arch, "all"), results.weights(arch)
    weights, sums = reference.sliced(ARCHS[arch], teacher, plan), torch.zeros(3, dtype=torch.float64)
    for step in range(2):
        samples = make_samples(ARCHS[arch], step, 4)
        z_s, z_t = (
            reference.logits(plan.student, weights, samples["tokens"]),
            reference.logits(ARCHS[arch], teacher, samples["tokens"]),
        )
        mask = samples["loss_mask"]
        sums += torch.stack(
            [
                (x * mask).sum()
                for x in (*reference.losses(plan.student, z_s, z_t, samples["labels"], 1.0), mask.double())
            ]
        )
    return sums


@trained
def test_evaluation_matches_plain_torch(results, arch, layout):
    """Means over the tokens that count, the same on every rank."""
    sums = results.once(("evaluation", arch), lambda: dense_evaluation(results, arch))
    kl, ce = (sums[:2] / sums[2]).tolist()
    for rank in results.trained(arch, layout):
        quality, own = rank["quality"]["student"], rank["quality"]["teacher again"]
        assert quality.num_tokens == sums[2]
        assert math.isclose(quality.loss, ce, rel_tol=ROUNDING)
        assert math.isclose(quality.kl, kl, rel_tol=ROUNDING)
        assert math.isclose(quality.perplexity, math.exp(ce), rel_tol=10 * ROUNDING)
        assert abs(own.kl) < 1e-6
        assert own.loss == rank["quality"]["teacher"].loss


def variant(results, layout, name):
    """Return the metrics of a run with other settings; assert equal weights on all dp ranks."""
    by_rank = results.variants(BY_NAME[layout])
    assert all(rank[name][1] for rank in by_rank), "ranks end with other weights"
    return by_rank[0][name][0]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_step_is_independent_of_microbatch_size(results, layout, split):
    """The samples count unequally many tokens, some none: a mean of means would show."""
    assert_close(variant(results, layout, split), variant(results, "one", "micro1"))


@pytest.mark.parametrize("layout", OVERLAP_LAYOUTS)
def test_overlapped_communication_matches_one_rank(results, layout):
    """With a resume in between. Gradients and moments lie in several padded buckets."""
    assert_close(variant(results, layout, "overlap"), one_rank(results))


@pytest.mark.parametrize("name", ["recompute", "recompute one"])
@pytest.mark.parametrize("layout", RECOMPUTE_LAYOUTS)
def test_recomputation_matches_one_rank(results, layout, name):
    """All layers, and the first layer of each model chunk."""
    assert_close(variant(results, layout, name), one_rank(results))


@pytest.mark.parametrize("layout", BY_NAME)
def test_teacher_correction_matches_plain_autograd(results, layout):
    """Cross-entropy alone, no teacher: the same numbers at every layout."""
    metrics, plan = variant(results, layout, "correct"), results.plan("qwen3", "all")
    weights = reference.sliced(ARCHS["qwen3"], results.weights("qwen3"), plan)
    run = reference.PlainTraining(plan.student, weights, plan.student, weights, CORRECT)
    assert [m.step for m in metrics] == [1, 2]
    for mine in metrics:
        run.step(make_samples(ARCHS["qwen3"], mine.step - 1, CORRECT.global_batch_size), mine.lr)
        loss, _, ce, norm = run.history[-1]
        assert (mine.divergence, mine.loss) == (None, mine.ce)
        assert [mine.loss, mine.ce, mine.grad_norm] == pytest.approx([loss, ce, norm], rel=ROUNDING)


def test_learning_rate_has_warmup_and_cosine_decay(results):
    decay = [(step - DISTILL.warmup_steps) / (STEPS - DISTILL.warmup_steps) for step in range(1, STEPS + 1)]
    want = [DISTILL.min_lr + (DISTILL.lr - DISTILL.min_lr) * (1 + math.cos(math.pi * x)) / 2 for x in decay]
    assert [m.lr for m in one_rank(results)] == pytest.approx(want)


def test_bf16_trains(results, ranks):
    """The loss on one batch, repeated, falls; its first value is float32's to bf16 rounding."""
    layout = BY_NAME["tp2-sp"]
    student_arch, student = results.student("qwen3", "all")
    models = {
        "arch": ARCHS["qwen3"],
        "teacher": results.teacher("qwen3"),
        "student_arch": student_arch,
        "student": student,
    }
    losses = ranks(
        layout.ranks,
        "training_workers.train_in_bf16",
        layout=layout,
        output=results.root / "bf16",
        steps=6,
        **models,
    )[0]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]
    # 8 bits of mantissa in 5 layers of teacher and student; 3e-3 seen.
    assert math.isclose(losses[0], one_rank(results)[0].loss, rel_tol=0.02)


@meanwhile
def test_stopped_correction_resumes_bitwise(results, layout):
    """A teacher alone; the loss curve from its last checkpoint on, and the final weights."""
    by_rank = results.corrected_meanwhile(BY_NAME[layout])
    whole, rest = by_rank[0]["alone"], by_rank[0]["alone resumed"]
    assert [m.step for m in rest] == [whole[-1].step]
    assert_close(rest, whole[-1:], tolerance=0)
    assert all(rank["alone bitwise"] for rank in by_rank), "the final weights"


@meanwhile
def test_concurrent_correction_matches_separate_correction(results, layout):
    """Bitwise, also after a resume. In a step the teacher has the weights before its update."""
    first = results.corrected_meanwhile(BY_NAME[layout])[0]
    assert [m.step for m in first["unbroken"]["teacher"]] == [1, 2, 3]
    for run in ("unbroken", "resumed"):
        for name in ("loss", "ce", "grad_norm", "lr", "num_tokens"):
            assert [getattr(m, name) for m in first[run]["teacher"]] == [
                getattr(m, name) for m in first["alone"]
            ], name
    student, again = (first[run]["student"] for run in ("unbroken", "resumed"))
    assert len(student) == STEPS
    assert_close(again, student, tolerance=0)
    assert all(rank["bitwise"] for rank in results.corrected_meanwhile(BY_NAME[layout]))
    assert math.isclose(student[1].divergence, first["kl to the second"], rel_tol=ROUNDING)
    assert not math.isclose(student[1].divergence, first["kl to the first"], rel_tol=1e-3)
    assert_close(student, results.corrected_meanwhile(BY_NAME["one"])[0]["unbroken"]["student"])


def test_bf16_teacher_is_saved_with_its_last_parameters(results):
    """With overlap the ranks gather parameters at the next forward pass.

    In float32 the optimizer updates the weights themselves, so only bf16 can be late.
    """
    ranks = results.corrected_meanwhile(BY_NAME["dp2"], "bf16")
    assert all(rank["bitwise"] for rank in ranks)
    for name in ("loss", "grad_norm"):
        curves = [[getattr(m, name) for m in ranks[0][run]["teacher"]] for run in ("unbroken", "resumed")]
        assert curves[0] == curves[1]


def numbers(metrics):
    return [(m.step, m.loss, m.divergence, m.ce, m.grad_norm, m.lr) for m in metrics]


def on_two_ranks(results, ranks, function):
    """The layout dp2, by rank."""
    case = {"output": results.root / function, **results._training("qwen3", BY_NAME["dp2"])}
    return results.once(function, lambda: ranks(2, f"training_workers.{function}", **case))


def test_stopped_run_resumes_bitwise(results, ranks):
    """Stop by a file on the first rank, by SIGTERM on the last rank, by a deadline.

    One run writes background checkpoints.
    """
    unbroken = numbers(results.trained("qwen3", BY_NAME["dp2"])[0]["unbroken"])
    found = on_two_ranks(results, ranks, "leave")[0]
    after = {"stop file": 2, "SIGTERM": 2, "far deadline": 3, "deadline": 1}
    for name, steps in after.items():
        (first, rest), checkpoints = found[name]
        assert numbers(first) + numbers(rest) == unbroken, name
        assert (len(first), checkpoints[-1]) == (steps, f"step_{steps:08d}"), name
    assert found["SIGTERM"][1] == ["step_00000001", "step_00000002"]
    assert found["far deadline"][1] == ["step_00000003"], "the first save was only to time it"
    assert [m.measured.save_s is not None for m in found["far deadline"][0][0]] == [False, True, False]


def test_run_resumes_after_kill_during_checkpoint(results, ranks):
    """The older checkpoint is whole, the run goes on from it bitwise, and the last k are kept."""
    by_rank = on_two_ranks(results, ranks, "killed_writer")
    first = by_rank[0]
    assert first["left"] == ["step_00000001"]
    assert all("step_00000002 could not be written: " in rank["said"] for rank in by_rank)
    assert [rank["writing"] for rank in by_rank] == [[True], [True]], "both write, beside the training"
    assert numbers(first["rest"]) == numbers(results.trained("qwen3", BY_NAME["dp2"])[0]["unbroken"])[1:]
    assert first["at the end"] == ["step_00000002", "step_00000003"]


def test_profile_covers_the_chosen_steps_and_ranks(results, ranks):
    beyond, nsys = on_two_ranks(results, ranks, "profiled")[0]
    assert "profile.ranks has rank 2, the run has 2 ranks; give ranks from 0 to 1" in beyond
    assert "profile.kind nsys traces CUDA, this run is on a CPU; set profile.kind: torch" in nsys
    (trace,) = results.root.joinpath("profiled").glob("*.json.gz")
    assert trace.name == "distill_steps2-3_rank1.json.gz"
    with gzip.open(trace) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert "aten::mm" in names or "aten::addmm" in names
    assert sum("Optimizer.step" in str(name) for name in names) == 2


def test_distill_function_equals_the_recipe_run(results, ranks):
    """Two data-parallel ranks, public functions alone: equal metrics, a saved model, no checkpoints.

    train() gives the same metrics, and writes nothing.
    """
    first = on_two_ranks(results, ranks, "distill_from_python")[0]
    expected = numbers(results.trained("qwen3", BY_NAME["dp2"])[0]["unbroken"])
    assert numbers(first["metrics"]) == expected
    assert numbers(first["metrics without artifact"]) == expected
    assert first["saved"]
    assert first["arch"] == results.student("qwen3", "all")[0]
    assert first["quality"].kl > 0
    assert first["checkpoints"] == []


def test_settings_of_train_and_distill_are_checked_or_used(results, ranks):
    found = on_two_ranks(results, ranks, "wrong_arguments_from_python")
    errors = found[0]["errors"]
    assert found[1]["errors"] == errors
    assert "kl_weight is 1 without a teacher; give a teacher, or" in errors["no teacher"]
    assert "checkpoints is None; give a folder, or drop profile" in errors["profile"]
    assert "data-parallel ranks have 2 samples, global_batch_size is 8 over 2 ranks" in errors["global"]
    assert "microbatches have 1 samples, micro_batch_size is 3" in errors["micro"]
    assert found[0]["buffers"] == 1
    assert found[0]["traces"] == ["distill_steps1-1_rank0.json.gz"]


def test_divergence_parameters_of_the_recipe_reach_the_loss():
    model = SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu")))
    settings = DistillConfig(divergence="skewed_forward_kl", divergence_parameters={"skew": 0.3})
    objective = TrainingLoss(model, None, settings).objective
    assert (objective.divergence, objective.parameters) == ("skewed_forward_kl", {"skew": 0.3})
    assert TrainingLoss(model, None, CorrectionConfig()).objective.parameters == {}
