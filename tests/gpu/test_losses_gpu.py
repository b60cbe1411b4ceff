"""The distillation loss on a GPU with a real vocabulary size.

    pytest tests/gpu

The tests cover kernels, precision, memory and synchronization. Small sizes are tested without a
GPU, kernels included (tests/ranks/test_kernels.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import kernels_workers
import pytest
import torch
from test_losses import CROSS_ENTROPY, OBJECTIVES, ONE_PER_DIVERGENCE, as_top_k, check, dense

from minitron_mp.losses import torch_rows
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherHidden
from minitron_mp.losses.top_k import top_k_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE, COLUMNS, VOCAB = "cuda", 131072, 131069
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@pytest.fixture(autouse=True)
def whole_float32():
    """float32 products without tf32, so that they can be compared with float64."""
    usual = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = usual


def make_case(tokens, hidden, teacher_hidden, dtype, *, scale=4.0):
    """Logits of deviation 4 (entropy of about 4 nats); teacher and student differ by 0.75.

    The last row of each sample has no weight.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    x, w = normal(tokens, 2, hidden), normal(COLUMNS, hidden) * scale / hidden**0.5
    more = teacher_hidden - hidden
    teacher_w = torch.cat([w, normal(COLUMNS, more) * 0.75 / more**0.5], 1)[:VOCAB]
    teacher = TeacherHidden(torch.cat([x, normal(tokens, 2, more)], -1).to(dtype), teacher_w.to(dtype))
    weights = torch.full((tokens, 2), 0.5 / tokens, device=DEVICE)
    weights[-1] = 0
    labels = torch.randint(0, VOCAB, (tokens, 2), generator=generator, device=DEVICE)
    return {
        "hidden": x.to(dtype),
        "weight": w.to(dtype),
        "labels": labels,
        "token_weights": weights,
        "teacher": teacher,
    }


def run(case, objective, *, main_grad=False):
    x, w = (case[name].detach().requires_grad_() for name in ("hidden", "weight"))
    if main_grad:
        w.main_grad = torch.zeros(w.shape, device=DEVICE)
    loss, per_token = distillation_loss(
        x, w, case["labels"], case["token_weights"], case["teacher"], objective, vocab_size=VOCAB, group=ALONE
    )
    loss.backward()
    return {
        "loss": loss.detach(),
        "per_token": per_token,
        "dx": x.grad,
        "dw": w.main_grad if main_grad else w.grad,
    }


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_plain_torch(dtype, t, divergence):
    from minitron_mp.losses import kernel_calls

    generator = torch.Generator(DEVICE).manual_seed(0)
    z_s, z_t = (
        (4 * torch.randn((64, COLUMNS), generator=generator, device=DEVICE)).to(dtype) for _ in range(2)
    )
    z_s[3] = z_t[3] = z_s[:, VOCAB:] = z_t[:, VOCAB:] = torch.nan
    weights = torch.rand(64, generator=generator, device=DEVICE)
    weights[3] = 0
    labels = torch.randint(0, VOCAB, (64,), generator=generator, device=DEVICE)
    for ce in (0.3, 0.0):
        objective = Objective(divergence, t, 0.8, ce)
        for out in (torch.float32, torch.bfloat16, None):
            for split in (1, 4):
                got, want = (
                    kernels_workers.run(
                        module, z_s, z_t, labels, weights, VOCAB, objective, ranks=split, dtype=out
                    )
                    for module in (kernel_calls, torch_rows)
                )
                assert not got["gradient"][3].any()
                counts = (torch.arange(64, device=DEVICE) != 3).nonzero()[:, 0]
                for key in want:
                    dim = 0 if key == "gradient" else 1
                    # float32 sums of 131072 terms in another order; a bf16 gradient may round
                    # differently.
                    rtol = 2**-7 if key == "gradient" and (out or dtype) is torch.bfloat16 else 2e-5
                    torch.testing.assert_close(
                        got[key].index_select(dim, counts),
                        want[key].index_select(dim, counts),
                        rtol=rtol,
                        atol=1e-6 if key == "gradient" else 5e-5,
                        msg=lambda text, key=key: f"{key}: {text}",
                    )


@pytest.mark.parametrize("name", [*OBJECTIVES, "top_k", "ce"])
def test_float32_matches_dense_float64(name):
    objective = CROSS_ENTROPY if name == "ce" else OBJECTIVES[name.replace("top_k", "forward_kl-hot-ce")]
    case = make_case(32, 256, 320, torch.float32)
    case = (
        case | {"teacher": None}
        if name == "ce"
        else as_top_k(case, objective, 64)
        if name == "top_k"
        else case
    )
    want = dense(case, objective, VOCAB)
    want["per_token"][:, -1] = 0
    # Sums of 131072 float32 terms; a logit of 16 is rounded by 1e-6.
    check(run(case, objective), want, name, vocab_size=VOCAB, loss=2e-5, gradient=5e-5)


# bf16 inputs are exact in float64. With float32 logits, the logit gradients and both results are
# rounded by 2^-9. bf16 logits of 16 to 32, as the likeliest tokens have, are rounded by up to 2^-4,
# which is the relative error of a probability.
@pytest.mark.parametrize(
    ("logits_dtype", "gradient", "loss"),
    [(torch.float32, 3e-3, 2e-5), (torch.bfloat16, 1e-1, 6e-2)],
    ids=["fp32", "bf16"],
)
def test_bf16_inputs(logits_dtype, gradient, loss):
    objective = Objective(logits_dtype=logits_dtype)
    case = make_case(128, 1024, 1280, torch.bfloat16)
    want = dense(case, objective, VOCAB)
    want["per_token"][:, -1] = 0
    check(
        run(case, objective, main_grad=True),
        want,
        vocab_size=VOCAB,
        loss=loss,
        gradient=gradient,
        scale=gradient,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_of_matches_float64(dtype):
    """On a GPU the teacher's top k is taken from the logits themselves, and the rest by the kernels."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    z = (4 * torch.randn((64, COLUMNS), generator=generator, device=DEVICE)).to(dtype)
    want = (z[:, :VOCAB].double() / 2).log_softmax(-1)
    top = top_k_of(z.clone(), 64, VOCAB, ALONE, 2.0)
    # Equal logits may be taken in another order. float32 sums of 131072 terms.
    torch.testing.assert_close(top.log_probs.double(), want.gather(1, top.indices), rtol=0, atol=2e-5)
    torch.testing.assert_close(top.log_probs[:, -1].double(), want.topk(64).values[:, -1], rtol=0, atol=2e-5)
    rest = want.scatter(1, top.indices, -torch.inf).logsumexp(1)
    torch.testing.assert_close(top.log_ghost[:, 0].double(), rest, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [*ONE_PER_DIVERGENCE, "top_k"])
@pytest.mark.parametrize("main_grad", [True, False])
def test_loss_never_synchronizes_with_the_device(name, main_grad):
    objective = OBJECTIVES[name.replace("top_k", "forward_kl-hot")]
    case = make_case(512, 256, 320, torch.bfloat16)
    case = as_top_k(case, objective, 64) if name == "top_k" else case
    run(case, objective, main_grad=main_grad)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, objective, main_grad=main_grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory():
    """8192 tokens, 12B teacher, 8B student.

    Beyond the gradients only the logits of some rows are live.
    """
    case = make_case(4096, 4096, 5120, torch.bfloat16)
    run(make_case(512, 256, 320, torch.bfloat16), Objective(), main_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(case, Objective(), main_grad=True)
    gradients = case["weight"].numel() * 4 + case["hidden"].numel() * 2
    # float32 logits of 512 rows, of both models, and bf16 gradients of 4096 rows: 1.61 GB
    assert torch.cuda.max_memory_allocated() - before - gradients < 2.0e9
