"""The distillation loss matches dense float64 autograd: value, both gradients and their scale.

Sizes are odd, and the vocabulary is split in several ways. torch.autograd.gradcheck does not apply,
because the row functions always compute in float32. Instead there is a finite difference of the
loss itself along random directions. It shares no code with the dense reference.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minitron_mp.errors import InputError
from minitron_mp.losses import torch_rows
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.fused import distillation_loss, float32_logits
from minitron_mp.losses.objective import Objective, TeacherHidden, TeacherLogits, TeacherTopK
from minitron_mp.losses.parameters import PARAMETERS
from minitron_mp.losses.rows import LogitRows
from minitron_mp.losses.top_k import top_k_of

VOCAB, HIDDEN, TEACHER_HIDDEN, TOP = 37, 11, 13, 5
# (tensor parallel ranks, padded vocabulary). 40 and 48: the last rank has some padding. 56: at tp 4
# the last rank has only padding.
SPLITS = [(1, 37), (1, 40), (2, 40), (2, 48), (4, 40), (4, 48), (4, 56)]
splits = pytest.mark.parametrize(("tp", "padded"), SPLITS, ids=[f"tp{tp}-v{padded}" for tp, padded in SPLITS])
widths = pytest.mark.parametrize("tp", [1, 2, 4])
OBJECTIVES = {
    name + ("-hot" if temperature > 1 else "") + ("-ce" if ce else ""): Objective(
        name, temperature, 1.0 - ce, ce
    )
    for name in DIVERGENCES
    for temperature in (1.0, 2.0)
    for ce in (0.0, 0.3)
}


def other_value(parameter):
    """Return the value at 70 % of the allowed range, or at 40 % if the default is near it."""
    width = parameter.at_most - parameter.above
    value = parameter.above + 0.7 * width
    return value if abs(value - parameter.default) > 0.1 * width else parameter.above + 0.4 * width


PARAMETER_VARIANTS = {
    f"{name}-{'-'.join(f'{other_value(parameter):g}' for parameter in declared.values())}-hot-ce": Objective(
        name, 2.0, 0.7, 0.3, parameters={key: other_value(value) for key, value in declared.items()}
    )
    for name, declared in PARAMETERS.items()
}
"""Each divergence that has parameters, with other values than the defaults."""
OBJECTIVES |= PARAMETER_VARIANTS
ONE_PER_DIVERGENCE = [
    *(name + ending for name, ending in zip(DIVERGENCES, itertools.cycle(("-ce", "-hot", "-hot-ce", "")))),
    *PARAMETER_VARIANTS,
]
"""Names of OBJECTIVES: one for each divergence, and one more if it has parameters."""
ONE_PER_KIND = {*ONE_PER_DIVERGENCE, "top_k-hot-ce", "ce"}
"""Names of variants(): these, one with a top-k teacher, and one without a teacher."""
CROSS_ENTROPY = Objective(temperature=2.0, kl_weight=0.0, ce_weight=1.0)

# Relative to the norm. float32 sums of about ten products of order one. Logits, their exponentials
# and the sums are rounded by 6e-8 each. A logit of size z has an error of z 6e-8 before the
# exponential makes it relative: z is 5 here, 300 below.
LOSS, GRADIENT = 1e-5, 2e-5
SCALE = 1e-4
"""Of <g, ref> / <ref, ref>: detects a factor of tp or of the temperature, but not rounding."""
VANISHING, ZERO = 1e-12, 5e-6
"""A gradient of this norm is far below the rounding of float32. Then that of a logit must be below
ZERO: the difference of two numbers of order one, each from logits of size 300."""


def make_case(padded, *, scale=3.0, tokens=(3, 3), dtype=torch.float32, seed=0):
    """Logits of size `scale`, odd rows, labels at both vocabulary ends, garbage in padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    case = {
        "hidden": normal(*tokens, HIDDEN),
        "weight": normal(padded, HIDDEN) * scale / HIDDEN**0.5,
        "labels": torch.randint(0, VOCAB, tokens, generator=generator),
        "token_weights": torch.rand(tokens, generator=generator) + 0.5,
        "teacher": TeacherHidden(
            normal(*tokens, TEACHER_HIDDEN).to(dtype),
            (normal(VOCAB, TEACHER_HIDDEN) * scale / TEACHER_HIDDEN**0.5).to(dtype),
        ),
    }
    case["labels"][0, 0], case["labels"][-1, -1] = 0, VOCAB - 1
    case["weight"][VOCAB:] = 1e4
    return case | {name: case[name].to(dtype) for name in ("hidden", "weight")}


def teacher_logits(case):
    return case["teacher"].hidden.double() @ case["teacher"].weight.double().T


def by_logits(case):
    """Use identity output layers: hidden states are exact logits, and dx is the logit gradient."""
    logits = case["hidden"] @ case["weight"].T
    logits[..., VOCAB:] = 1e4
    return case | {
        "hidden": logits,
        "weight": torch.eye(logits.shape[-1]),
        "teacher": TeacherHidden(teacher_logits(case).float(), torch.eye(VOCAB)),
    }


def as_logits(case):
    return case | {"teacher": TeacherLogits(teacher_logits(case).to(case["hidden"].dtype))}


def as_top_k(case, objective, k=TOP):
    log_p = F.log_softmax(teacher_logits(case) / objective.temperature, -1)
    top = log_p.topk(k)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return case | {"teacher": TeacherTopK(top.indices, top.values.float(), rest.float())}


def run_all(ranks, tp, calls):
    """Run {name: (case, objective, options of losses_workers.fused)} in one call; return by name.

    A result has the parts of all ranks concatenated: loss, per_token, dx, and over the full
    vocabulary dw and main_grad.
    """
    calls = {
        name: {"vocab_size": VOCAB, "objective": objective, **case, **how}
        for name, (case, objective, how) in calls.items()
    }
    by_rank = ranks(tp, "losses_workers.fused_all", calls=calls)
    return {name: _together(name, calls[name], [rank[name] for rank in by_rank]) for name in calls}


def _together(name, call, by_rank):
    found = dict(by_rank[0])
    shared = ("loss", "per_token", "without_gradient", *(() if call.get("sequence_parallel") else ("dx",)))
    for key in shared:
        assert all(_same(rank[key], found[key]) for rank in by_rank), f"{name}: ranks disagree about {key}"
    assert found["loss"].equal(found["without_gradient"]), f"{name}: another loss without gradients"
    for key in {"dx", "dw", "main_grad"} - set(shared):
        found[key] = None if found[key] is None else torch.cat([rank[key] for rank in by_rank])
    return found


def _same(a, b):
    return a is b is None or torch.equal(a, b)


def run(ranks, tp, case, objective, **how):
    return run_all(ranks, tp, {"": (case, objective, how)})[""]


def check_all(ranks, tp, calls, **tolerances):
    for name, got in run_all(ranks, tp, calls).items():
        case, objective, _ = calls[name]
        check(got, dense(case, objective), name, **tolerances)


def dense(case, objective, vocab_size=VOCAB):
    """The same in float64 by autograd on whole logits; dw without the padding."""
    x, w = case["hidden"].double().requires_grad_(), case["weight"][:vocab_size].double().requires_grad_()
    z, t, teacher = x @ w.T, objective.temperature, case["teacher"]
    log_q = F.log_softmax(z / t, -1)
    if isinstance(teacher, TeacherTopK):
        ghost_q = log_q.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
        log_q, log_p = (
            torch.cat([log_q.gather(-1, teacher.indices), ghost_q], -1),
            torch.cat([teacher.log_probs, teacher.log_ghost], -1).double(),
        )
        divergence = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    elif teacher is None:
        divergence = torch.zeros_like(case["labels"], dtype=torch.float64)
    else:
        whole = (
            teacher.logits[..., :vocab_size].double()
            if isinstance(teacher, TeacherLogits)
            else teacher_logits(case)
        )
        log_p = F.log_softmax(whole / t, -1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
        js = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
        values = {}
        values["forward_kl"] = forward
        values["reverse_kl"] = reverse
        values["js"] = js
        if "skew" in objective.parameters:
            skew = objective.parameters["skew"]
            mixture = torch.logaddexp(log_p + math.log(skew), log_q + math.log(1 - skew))
            values["skewed_forward_kl"] = (log_p.exp() * (log_p - mixture)).sum(-1)
        divergence = values[objective.divergence]
    ce = F.cross_entropy(z.flatten(0, 1), case["labels"].flatten(), reduction="none").view(divergence.shape)
    total = objective.kl_weight * t**2 * divergence + objective.ce_weight * ce
    loss = (total * case["token_weights"]).sum()
    loss.backward()
    return {
        "loss": loss.detach(),
        "per_token": torch.stack([total, divergence, ce]).detach(),
        "dx": x.grad,
        "dw": w.grad,
    }


def check(got, want, name="", *, vocab_size=VOCAB, loss=LOSS, gradient=GRADIENT, scale=SCALE):
    """Compare with a dense result."""
    for key in ("loss", "per_token"):
        error = ((got[key].double() - want[key]).abs() / want[key].abs().clamp_min(1)).max()
        assert error <= loss, f"{name}: {key} is off by {error:.1e}"
    if want["dx"].norm() < VANISHING:
        assert got["dx"].abs().max() <= ZERO, f"{name}: dx is not zero"
        return
    for key in ("dx", "dw"):
        mine, ref = got[key].double(), want[key]
        assert key == "dx" or not mine[vocab_size:].any(), f"{name}: padding has a gradient"
        mine = mine[: len(ref)]
        factor = (mine * ref).sum() / ref.square().sum()
        assert abs(factor - 1) <= scale, f"{name}: the scale of {key} is {factor:.6f}"
        error = (mine - ref).norm() / ref.norm()
        assert error <= gradient, f"{name}: {key} is off by {error:.1e}"


def variants(case):
    """Return {name: (case, objective, {})}.

    All divergences and temperatures, with and without CE; a top-k teacher; no teacher.
    """
    calls = {name: (case, objective, {}) for name, objective in OBJECTIVES.items()}
    calls |= {
        name.replace("forward_kl", "top_k"): (as_top_k(case, objective), objective, {})
        for name, objective in OBJECTIVES.items()
        if objective.divergence == "forward_kl"
    }
    return calls | {"ce": (case | {"teacher": None}, CROSS_ENTROPY, {})}


@splits
def test_loss_matches_dense_float64(ranks, tp, padded):
    """The teacher as hidden states, logits, top k, and none; its padding columns hold NaN."""
    case = make_case(padded)
    calls = variants(case)
    for name in ONE_PER_DIVERGENCE:
        calls[name + ", logits"] = (as_logits(case), OBJECTIVES[name], {"teacher_padding": 2})
    calls |= {name: (case, objective, {"teacher_padding": 3}) for name, objective in OBJECTIVES.items()}
    check_all(ranks, tp, calls)


@widths
def test_large_logits(ranks, tp):
    """Logits of size 300 give finite results.

    "far": both distributions are sharp, on different tokens. "shifted": ordinary logits, plus or
    minus 300 for a full row. No exponential overflows, and no small one is lost. In "far", a
    bounded divergence reaches its maximum (ln 2 for Jensen-Shannon), so its gradient is 0.
    """
    calls = {f"{name}, far": call for name, call in variants(by_logits(make_case(40, scale=300.0))).items()}
    shifted = by_logits(make_case(40))
    for x, sign in ((shifted["hidden"], 300), (shifted["teacher"].hidden, -300)):
        x[..., :VOCAB] += torch.tensor([sign, -sign, sign])[:, None, None]
    calls |= {f"{name}, shifted": call for name, call in variants(shifted).items()}
    # Differences of 600 between the models' logits are rounded by 3e-5, and reverse KL multiplies
    # them with probabilities.
    check_all(ranks, tp, calls, loss=1e-4, gradient=1e-4)


@widths
def test_ghost_token_with_zero_student_probability(ranks, tp):
    """The teacher is uniform; the student puts all mass on the k tokens.

    The other tokens have a float32 probability of zero, but a gradient.
    """
    case = make_case(40)
    case["hidden"] = torch.where(torch.arange(40) < TOP, 300.0, -300.0 + torch.rand(3, 3, 40))
    case |= {"weight": torch.eye(40), "teacher": TeacherHidden(torch.zeros(3, 3, 40), torch.eye(VOCAB, 40))}
    for name, (top, objective, _) in variants(case).items():
        if "top_k" in name:
            places = torch.arange(TOP).expand(3, 3, TOP)
            top["teacher"] = replace(top["teacher"], indices=places)
            check(run(ranks, tp, top, objective), dense(top, objective), name)


@widths
def test_gradient_matches_finite_differences(ranks, tp):
    step = 1e-2
    calls = {name: call for name, call in variants(make_case(40, scale=1.0)).items() if name in ONE_PER_KIND}
    slopes, moved = run_all(ranks, tp, calls), {}
    for name, (case, objective, _) in calls.items():
        for key, gradient in (("hidden", "dx"), ("weight", "dw")):
            slope = slopes[name][gradient]
            for sign in (1, -1):
                moved[name, key, sign] = (
                    case | {key: case[key] + sign * step * slope / slope.norm()},
                    objective,
                    {},
                )
    moved = run_all(ranks, tp, moved)
    for name, slope in slopes.items():
        for key, gradient in (("hidden", "dx"), ("weight", "dw")):
            measured = (moved[name, key, 1]["loss"] - moved[name, key, -1]["loss"]) / (2 * step)
            # The loss, of order 10, is rounded by 1e-6 and divided by 2e-2; the third derivative
            # adds step^2.
            assert measured == pytest.approx(slope[gradient].norm().item(), rel=1e-3), (name, key)


@widths
def test_equal_distributions_have_zero_loss_and_gradient(ranks, tp):
    case = make_case(40)
    case["teacher"] = TeacherHidden(case["hidden"], case["weight"][:VOCAB])
    calls = {
        name: (case, objective, {"teacher_padding": 2})
        for name, objective in OBJECTIVES.items()
        if not objective.ce_weight
    }
    for name, got in run_all(ranks, tp, calls).items():
        # The teacher's product has another number of columns, so its logits of size 10 may differ
        # by rounding, 1e-6.
        assert got["per_token"][1].abs().max() < 1e-6, name
        assert got["dx"].abs().max() < 3e-6, name
        assert got["dw"].abs().max() < 3e-6, name


@widths
def test_divergences_are_nonnegative(ranks, tp):
    """Also if both distributions are nearly equal, and rounding exceeds their difference."""
    case = by_logits(make_case(40))
    case["hidden"][..., :VOCAB] += 100.0
    noise = torch.randn((3, 3, VOCAB), generator=torch.Generator().manual_seed(1))
    case["teacher"] = TeacherHidden(case["hidden"][..., :VOCAB] + 1e-4 * noise, torch.eye(VOCAB))
    for name, got in run_all(ranks, tp, variants(case)).items():
        # Top k is summed from the logits themselves, not from differences.
        assert got["per_token"][1].min() > (-4e-5 if "top_k" in name else -1e-6), name


@widths
def test_logit_gradients_sum_to_zero_per_row(ranks, tp):
    """A shift of a row's logits changes no probability.

    Identity output layers make dX that gradient.
    """
    for name, got in run_all(ranks, tp, variants(by_logits(make_case(40)))).items():
        assert not got["dx"][..., VOCAB:].any(), name
        # 37 entries, each a probability or (reverse KL) one times a larger number, rounded by 6e-8
        assert got["dx"].sum(-1).abs().max() < 2e-6 * got["dx"].abs().max().clamp_min(1), name


@splits
def test_rows_with_zero_weight_contribute_nothing(ranks, tp, padded):
    """Also with NaN in the hidden states of both models, and labels outside of the vocabulary."""
    case, masked = (
        make_case(padded),
        torch.tensor([[False, True, False], [True, False, False], [False, False, True]]),
    )
    case["token_weights"][masked] = 0
    hidden, teacher = case["hidden"].clone(), case["teacher"].hidden.clone()
    hidden[masked] = teacher[masked] = torch.nan
    spoilt = case | {
        "hidden": hidden,
        "labels": torch.where(masked, -100, case["labels"]),
        "teacher": replace(case["teacher"], hidden=teacher),
    }
    clean = variants(case)
    for name, got in run_all(ranks, tp, variants(spoilt)).items():
        want = dense(clean[name][0], clean[name][1])
        want["per_token"][:, masked] = 0
        assert not got["dx"][masked].any(), name
        assert not got["per_token"][:, masked].any(), name
        check(got, want, name)


@pytest.mark.parametrize("value", [1.0, torch.nan])
@widths
def test_microbatch_with_zero_weight(ranks, tp, value):
    case = make_case(40)
    case |= {"hidden": case["hidden"] * value, "token_weights": torch.zeros(3, 3)}
    for name, got in run_all(ranks, tp, variants(case)).items():
        assert all(not got[key].any() for key in ("loss", "per_token", "dx", "dw")), (
            name
        )  # not-a-number is not zero, so any() sees it


@widths
def test_loss_is_independent_of_chunk_size(ranks, tp):
    """Chunk sizes of the row functions, of one product and of the gradients.

    The last chunk may be shorter.
    """
    chunks = [None, (1, 1, 1), (1, 2, 4), (2, 4, 7), (2, 3, 100), (100, 4, 5)]
    chosen = {name: call for name, call in variants(make_case(48)).items() if name in ONE_PER_KIND}
    found = run_all(
        ranks,
        tp,
        {(name, sizes): (*call[:2], {"chunks": sizes}) for name, call in chosen.items() for sizes in chunks},
    )
    for (name, sizes), got in found.items():
        for key in ("loss", "per_token", "dx", "dw"):
            # Matrix products of other sizes, and sums over ranks whose order depends on the offset
            # in the message. 3e-6 seen for js, whose gradient is a small difference of logarithms;
            # 4e-7 for the others.
            assert (found[name, None][key] - got[key]).norm() <= 1e-5 * got[key].norm(), (name, sizes, key)


@widths
def test_top_k_of_full_vocabulary_equals_full_loss(ranks, tp):
    case = make_case(40)
    full = {name: objective for name, objective in OBJECTIVES.items() if objective.divergence == "forward_kl"}
    found = run_all(
        ranks,
        tp,
        {
            (name, k): (as_top_k(case, objective, k) if k else case, objective, {})
            for name, objective in full.items()
            for k in (0, VOCAB)
        },
    )
    for name in full:
        # The same sums in float32, in another order and with log p given: see LOSS.
        for key in ("per_token", "dx", "dw"):
            assert torch.allclose(found[name, 0][key], found[name, VOCAB][key], rtol=1e-6, atol=5e-6), (
                name,
                key,
            )


@widths
def test_ghost_token_loss_is_a_lower_bound(ranks, tp):
    """Merging tokens loses information (data processing inequality), less with more tokens kept."""
    case, objective, sizes = make_case(40), OBJECTIVES["forward_kl"], [1, TOP, 20, VOCAB - 1]
    found = run_all(
        ranks,
        tp,
        {"full": (case, objective, {})} | {k: (as_top_k(case, objective, k), objective, {}) for k in sizes},
    )
    for smaller, larger in zip(sizes, [*sizes[1:], "full"]):
        assert (found[smaller]["per_token"][1] <= found[larger]["per_token"][1] + 2e-6).all(), (
            smaller,
            larger,
        )
    assert (found[1]["per_token"][1] > 0).all()


@widths
def test_sequence_parallel_hidden_states(ranks, tp):
    """Each rank has a part of the sequence, and gets the gradient of that part."""
    calls = variants(make_case(40, tokens=(4, 3)))
    whole = run_all(ranks, tp, calls)
    for name, split in run_all(
        ranks, tp, {name: (*call[:2], {"sequence_parallel": True}) for name, call in calls.items()}
    ).items():
        check(split, dense(calls[name][0], calls[name][1]), name)
        for key in ("loss", "per_token", "dw"):
            assert whole[name][key].equal(split[key]), (name, key)  # the same rows reach the same products
        assert torch.allclose(whole[name]["dx"], split["dx"], atol=5e-6), (
            name
        )  # a sum over ranks in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@widths
def test_main_grad_accumulates_the_weight_gradient(ranks, tp, dtype):
    case, objective = make_case(40, dtype=dtype), OBJECTIVES["forward_kl-ce"]
    plain, added = run_all(
        ranks, tp, {flag: (case, objective, {"main_grad": flag}) for flag in (False, True)}
    ).values()
    assert added["dw"] is None
    assert added["main_grad"].dtype is torch.float32
    assert plain["dx"].equal(added["dx"])
    # Added to 1, which rounds by 6e-8; the other is rounded to the dtype of the weight.
    assert torch.allclose(
        added["main_grad"] - 1, plain["dw"].float(), rtol=1e-5 if dtype is torch.float32 else 2**-8, atol=1e-6
    )


def test_main_grad_rejects_a_scaled_gradient(ranks):
    got = run(ranks, 2, make_case(40), OBJECTIVES["forward_kl"], main_grad=True, incoming=2.0)
    assert "put scales into token_weights" in got["refused"]


@widths
def test_incoming_gradient_without_main_grad(ranks, tp):
    case, objective = make_case(40), OBJECTIVES["forward_kl-ce"]
    want = dense(case, objective)
    check(run(ranks, tp, case, objective, incoming=3.0), want | {key: 3 * want[key] for key in ("dx", "dw")})


@widths
def test_microbatch_losses_add_up(ranks, tp):
    """With weights of the full batch, microbatches of 1, 2 and 3 tokens add up to its gradient."""
    case, mask = make_case(40), torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    case["token_weights"] = mask / mask.sum()
    calls = variants(case)
    found = run_all(
        ranks,
        tp,
        {
            (name, i): (_sample(whole, i), objective, {})
            for name, (whole, objective, _) in calls.items()
            for i in range(3)
        },
    )
    for name, (whole, objective, _) in calls.items():
        parts = [found[name, i] for i in range(3)]
        got = {key: sum(part[key] for part in parts) for key in ("loss", "dw")}
        got |= {
            key: torch.cat([part[key] for part in parts], dim) for key, dim in (("dx", 1), ("per_token", 2))
        }
        want = dense(whole, objective)
        want["per_token"] *= mask
        check(got, want, name)


def _sample(case, i):
    part, teacher = (
        {key: case[key][:, i : i + 1] for key in ("hidden", "labels", "token_weights")},
        case["teacher"],
    )
    if isinstance(teacher, TeacherHidden):
        teacher = replace(teacher, hidden=teacher.hidden[:, i : i + 1])
    elif teacher is not None:
        teacher = TeacherTopK(*(x[:, i : i + 1] for x in vars(teacher).values()))
    return case | part | {"teacher": teacher}


@splits
def test_bf16_with_float32_logits(ranks, tp, padded):
    """Inputs are exact in float64; logit gradients and both results are rounded to 8 bits, 2^-9."""
    check_all(ranks, tp, variants(make_case(padded, dtype=torch.bfloat16)), gradient=8e-3, scale=8e-3)


@widths
def test_bf16_with_bf16_logits(ranks, tp):
    """A logit of 8 to 16 is rounded by up to 2^-5, the relative error of its probability.

    Half of it is typical.
    """
    calls = variants(make_case(40, dtype=torch.bfloat16))
    calls = {
        name: (case, replace(objective, logits_dtype=torch.bfloat16), {})
        for name, (case, objective, _) in calls.items()
    }
    check_all(ranks, tp, calls, loss=6e-2, gradient=6e-2, scale=2e-2)


@pytest.mark.parametrize("defect", ["logits", "hidden"])
@pytest.mark.parametrize("tp", [2, 4])
def test_gradient_scaled_by_tp_is_detected(ranks, tp, defect):
    """As two libraries have it, whose loss is right: the comparison above must not pass it."""
    case, objective = make_case(40), OBJECTIVES["forward_kl"]
    with pytest.raises(AssertionError, match=rf"the scale of dx is {tp}\.0000"):
        check(run(ranks, tp, case, objective, defect=defect), dense(case, objective))


def test_invalid_objectives_are_rejected():
    case, sizes = make_case(40), {"vocab_size": VOCAB, "group": None}
    with pytest.raises(ValueError, match="but target is None"):
        distillation_loss(*(case | {"teacher": None}).values(), OBJECTIVES["forward_kl"], **sizes)
    with pytest.raises(ValueError, match="js has no parameter skew; it has no parameters; drop skew"):
        Objective("js", parameters={"skew": 0.5})
    with pytest.raises(ValueError, match="skew of skewed_forward_kl is 0; give a number above 0 and at most"):
        Objective("skewed_forward_kl", parameters={"skew": 0.0})
    Objective("skewed_forward_kl", parameters={"skew": 0.99})
    with pytest.raises(ValueError, match=r"skew of skewed_forward_kl is 0\.995; .* at most 0\.99"):
        Objective("skewed_forward_kl", parameters={"skew": 0.995})
    with pytest.raises(InputError) as raised:
        Objective("kl", temperature=0.0, kl_weight=math.nan, ce_weight=-0.5)
    assert str(raised.value).splitlines()[1:] == [
        "  - temperature is 0; give a number above 0",
        "  - kl_weight is nan; give a number of at least 0",
        "  - ce_weight is -0.5; give a number of at least 0",
        f"  - divergence is 'kl'; give one of {', '.join(DIVERGENCES)}",
    ]
    with pytest.raises(ValueError, match="divergence js is not defined for a top-k target; use forward_kl"):
        distillation_loss(*as_top_k(case, OBJECTIVES["js"]).values(), OBJECTIVES["js"], **sizes)


@pytest.mark.parametrize("skew", [0.1, 0.99])
def test_skewed_gradient_of_equal_models_is_zero(skew):
    """The rounding errors of log m must not leave a gradient of (1 - skew) q."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn((4, 997), generator=generator)
    objective = Objective("skewed_forward_kl", parameters={"skew": skew})
    rows = LogitRows(logits, logits.clone(), torch.full((4,), -1), torch.ones(4), 997, objective)
    own = torch_rows.statistics(rows)
    sums = torch_rows.second_sums(rows, own.table[None])
    gradient = torch.empty_like(logits)
    torch_rows.finish(rows, own, own.table[None], sums[None], torch.empty(3, 4), gradient)
    assert gradient.abs().max() == 0  # log p and log q are bitwise equal


@pytest.mark.parametrize("tp", [1, 2])
def test_teacher_and_student_precisions_are_independent(ranks, tp):
    """All eight pairs with the logits' dtype run; bf16 anywhere leaves an error of bf16's size."""
    calls = {}
    for student, teacher, inside in itertools.product((torch.float32, torch.bfloat16), repeat=3):
        case = make_case(40, dtype=student)
        t = case["teacher"]
        case["teacher"] = TeacherHidden(t.hidden.to(teacher), t.weight.to(teacher))
        calls[f"student {student}, teacher {teacher}, logits {inside}"] = (
            case,
            Objective(ce_weight=0.3, logits_dtype=inside),
            {},
        )
    for name, got in run_all(ranks, tp, calls).items():
        coarse = "bfloat16" in name
        case, objective, _ = calls[name]
        check(
            got,
            dense(case, objective),
            name,
            **({"loss": 2e-2, "gradient": 3e-2, "scale": 2e-2} if coarse else {}),
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@widths
def test_top_k_sent_by_the_teacher(ranks, tp, temperature):
    """Unpacked top-k probabilities, remaining mass and indices are exact with padding."""
    case, k = make_case(56 if tp > 1 else 40), 5
    found = ranks(
        tp,
        "losses_workers.top_k",
        hidden=case["hidden"],
        weight=case["weight"],
        k=k,
        vocab_size=VOCAB,
        temperature=temperature,
    )
    z = case["hidden"].double() @ case["weight"][:VOCAB].double().T
    log_p = F.log_softmax(z / temperature, -1)
    want = log_p.topk(k)
    rest = log_p.scatter(-1, want.indices, -torch.inf).logsumexp(-1, keepdim=True)
    for indices, log_probs, log_ghost in found:
        assert torch.equal(indices, want.indices)
        # float32 logits of size 10
        assert torch.allclose(log_probs.double(), want.values, rtol=0, atol=1e-5)
        assert torch.allclose(log_ghost.double(), rest, rtol=0, atol=1e-5)


def test_top_k_of_bf16_operands_is_exact():
    """A logit rounded to bf16 would put 1e-2 into a probability."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((16, 1, 64), (4096, 64))
    )
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    (z,) = float32_logits(hidden, weight, 16, group)
    top = top_k_of(z, 64, 4096, group, 1.0)
    want = F.log_softmax(hidden.double() @ weight.double().T, -1).view(16, -1).gather(-1, top.indices)
    assert (top.log_probs.double() - want).abs().max() < 1e-4
