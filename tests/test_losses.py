"""The vocab-parallel loss against dense float64: value, gradient and its scale, at odd sizes."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import ARCHS

VOCAB = 37
# (tensor parallel ranks, padded vocabulary). 40 and 48: the last rank has some padding; 56: at 4 ranks nothing but padding.
SPLITS = [(1, 37), (1, 40), (2, 40), (2, 48), (4, 40), (4, 48), (4, 56)]
SETTINGS = {
    "kl": {"kl_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0},
    "kl-hot": {"kl_weight": 1.0, "ce_weight": 0.0, "temperature": 2.0},
    "mixed": {"kl_weight": 0.7, "ce_weight": 0.3, "temperature": 1.0},
    "mixed-hot": {"kl_weight": 0.7, "ce_weight": 0.3, "temperature": 2.0},
    "ce": {"kl_weight": 0.0, "ce_weight": 1.0, "temperature": 1.0},
    "ce-hot": {"kl_weight": 0.0, "ce_weight": 1.0, "temperature": 2.0},
}
splits = pytest.mark.parametrize(("ranks_tp", "padded"), SPLITS, ids=[f"tp{tp}-v{padded}" for tp, padded in SPLITS])


def make_case(padded, *, scale=3.0, seed=0):
    """Logits [3, 3, v] (an odd number of rows) with garbage in the padding, labels at both ends of the vocabulary, row weights."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn((3, 3, padded), generator=generator) for _ in range(2))
    for z in (student, teacher):
        z[..., VOCAB:] = 1e4
    labels = torch.randint(0, VOCAB, (3, 3), generator=generator)
    labels[0, 0], labels[2, 2] = 0, VOCAB - 1
    weights = torch.rand((3, 3), generator=generator) + 0.5
    weights[1, 1] = 0
    return {"student": student, "teacher": teacher, "labels": labels, "weights": weights}


def run(ranks, tp, case, *, chunk_elements=1 << 23, **settings):
    """(loss, kl, ce [3, 3], gradient [3, 3, v]) of each rank's call, the gradient put together."""
    by_rank = ranks(tp, "workers.vocab_parallel_loss", vocab_size=VOCAB, chunk_elements=chunk_elements, settings=settings, **case)
    for rank in by_rank[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(rank[:3], by_rank[0][:3])), "ranks disagree"
    return *by_rank[0][:3], torch.cat([rank[3] for rank in by_rank], -1)


def dense(case, *, temperature, kl_weight, ce_weight):
    """The same by autograd in float64; the gradient has no padding columns."""
    arch = ARCHS["llama"].model_copy(update={"vocab_size": VOCAB})
    student = case["student"].double().requires_grad_()
    kl, ce = reference.losses(arch, student, case["teacher"].double(), case["labels"], temperature)
    loss = kl_weight * temperature**2 * kl + ce_weight * ce
    (loss * case["weights"]).sum().backward()
    return loss.detach(), kl.detach(), ce.detach(), student.grad[..., :VOCAB]


def assert_gradient(got, want, tolerance):
    grad, scale = got[..., :VOCAB].double(), want.square().sum()
    assert not got[..., VOCAB:].any(), "padding has a gradient"
    assert abs((grad * want).sum() / scale - 1) < tolerance, "the scale of the gradient"
    assert (grad - want).abs().max() < tolerance * want.abs().max()
    # A shift of all logits of a row changes no probability.
    assert grad.sum(-1).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("settings", SETTINGS)
@splits
def test_value_and_gradient_equal_dense_float64(ranks, ranks_tp, padded, settings):
    case = make_case(padded)
    loss, kl, ce, grad = run(ranks, ranks_tp, case, **SETTINGS[settings])
    want = dense(case, **SETTINGS[settings])
    for got, expected in zip((loss, kl, ce), want):
        # float32 sums over 37 terms of order one.
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert_gradient(grad, want[3], 1e-5)


@pytest.mark.parametrize("chunk_elements", [1, 40])
@splits
def test_chunks_of_rows_change_nothing(ranks, ranks_tp, padded, chunk_elements):
    """Rows do not mix. One row a chunk, and several with a shorter last chunk."""
    case, settings = make_case(padded), SETTINGS["mixed-hot"]
    whole, parts = (run(ranks, ranks_tp, case, chunk_elements=elements, **settings) for elements in (1 << 23, chunk_elements))
    for one, other in zip(whole, parts):
        # Bitwise for one and two ranks; gloo adds those of more in an order that depends on the place in the message.
        assert torch.equal(one, other) if ranks_tp <= 2 else torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@splits
def test_large_logits_stay_finite_and_right(ranks, ranks_tp, padded):
    case, settings = make_case(padded, scale=300.0), SETTINGS["mixed"]
    loss, _, _, grad = run(ranks, ranks_tp, case, **settings)
    want = dense(case, **settings)
    assert torch.allclose(loss.double(), want[0], rtol=1e-5)
    assert_gradient(grad, want[3], 1e-5)


@splits
def test_equal_logits_have_no_kl_and_no_gradient(ranks, ranks_tp, padded):
    case = make_case(padded)
    _, kl, _, grad = run(ranks, ranks_tp, case | {"teacher": case["student"].clone()}, **SETTINGS["kl-hot"])
    assert kl.abs().max() < 1e-6
    # The sums of teacher and student over four ranks may be rounded differently, see above: T (p_s - p_t) to the last bits of p.
    assert grad.abs().max() <= (0 if ranks_tp <= 2 else 1e-6)


@splits
def test_bf16_logits(ranks, ranks_tp, padded):
    """Against float64 on the rounded logits: inside it is float32, only the gradient is rounded to 8 bits (2^-9 each)."""
    case = {name: value.bfloat16() if value.dim() == 3 else value for name, value in make_case(padded).items()}
    loss, _, _, grad = run(ranks, ranks_tp, case, **SETTINGS["mixed-hot"])
    want = dense(case, **SETTINGS["mixed-hot"])
    assert torch.allclose(loss.double(), want[0], rtol=1e-5, atol=1e-5)
    assert grad.dtype is torch.bfloat16
    assert_gradient(grad, want[3], 2**-7)


def test_without_a_teacher_it_is_cross_entropy(ranks):
    case = make_case(40) | {"teacher": None}
    loss, kl, ce, _ = run(ranks, 2, case, temperature=2.0, kl_weight=0.0, ce_weight=1.0)
    want = torch.nn.functional.cross_entropy(case["student"][..., :VOCAB].flatten(0, 1), case["labels"].flatten(), reduction="none").view(3, 3)
    assert torch.allclose(loss, want, rtol=1e-5)
    assert torch.equal(loss, ce)
    assert not kl.any()
