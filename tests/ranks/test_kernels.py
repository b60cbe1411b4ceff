"""The Triton kernels match losses/torch_rows.py in Triton's interpreter and compile for CUDA.

The GPU tests are in tests/gpu.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pool import Pool
from test_losses import ONE_PER_KIND, VOCAB, check, dense, make_case, variants

from minitron_mp.losses.divergences import DIVERGENCES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; torch for CUDA brings it, elsewhere: pip install triton",
)

# (columns, valid): one block and its end; only valid ones; more than one block of 2048 with a short
# last one; none valid.
SIZES = [(37, 33), (64, 64), (4200, 4133), (40, 0)]
sizes = pytest.mark.parametrize(("columns", "valid"), SIZES, ids=[f"v{c}-{v}" for c, v in SIZES])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function in a process whose Triton interprets."""
    pool = Pool(1, environment={"TRITON_INTERPRET": "1"})
    yield lambda function, **kwargs: pool.run(f"kernels_workers.{function}", **kwargs)[0]
    pool.close()


def make_rows(columns, valid, dtype, *, teacher=True, scale=5.0):
    """Five rows. The third has no weight and NaN, as the padding has.

    Some labels belong to other ranks.
    """
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = ((scale * torch.randn((5, columns), generator=generator)).to(dtype) for _ in range(2))
    for z in (z_s, z_t):
        z[:, valid:] = torch.nan
        z[2] = torch.nan
    kl, ce = torch.rand((2, 5), generator=generator) + 0.5
    kl[2] = ce[2] = 0
    labels = torch.tensor([0, max(valid - 1, 0), 3, -7, valid])
    return {
        "z_s": z_s,
        "z_t": z_t if teacher else None,
        "labels": labels,
        "weights": (kl if teacher else 0 * kl, ce),
        "valid": valid,
    }


def compare(found, *, gradient_dtype):
    assert not found["kernels"]["gradient"][2].any()  # the row without weight; its statistics are unspecified
    rest = [0, 1, 3, 4]
    for key, want in found["rows"].items():
        got = found["kernels"][key]
        assert got.dtype is want.dtype
        # The same float32 operations in another order, up to 4133 terms in a sum; a bf16 result may
        # round to the other side.
        rtol = 2**-7 if key == "gradient" and gradient_dtype is torch.bfloat16 else 1e-5
        assert torch.allclose(got[rest].float(), want[rest].float(), rtol=rtol, atol=2e-6), (
            key,
            (got[rest].float() - want[rest].float()).abs().max(),
        )


# (temperature, with cross-entropy, dtype of the gradient; None: it takes the place of z_s)
OPTIONS = [(1.0, True, None), (2.0, False, torch.bfloat16), (0.7, True, torch.float32)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@dtypes
@sizes
def test_kernels_match_plain_torch(interpreted, columns, valid, dtype, divergence):
    case = make_rows(columns, valid, dtype)
    calls = [{**case, "t": t, "divergence": divergence, "ce": ce, "dtype": out} for t, ce, out in OPTIONS]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), OPTIONS):
        compare(found, gradient_dtype=out or dtype)


@sizes
def test_cross_entropy_without_teacher(interpreted, columns, valid):
    case = make_rows(columns, valid, torch.float32, teacher=False)
    calls = [{**case, "t": t, "divergence": "forward_kl", "ce": True, "dtype": out} for t, _, out in OPTIONS]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), OPTIONS):
        compare(found, gradient_dtype=out)


def test_large_logits(interpreted):
    """Of 300: the maximum of a lane grows by hundreds on the way."""
    case = make_rows(4200, 4133, torch.float32, scale=300.0)
    calls = [
        {**case, "t": 1.0, "divergence": divergence, "ce": True, "dtype": torch.float32}
        for divergence in DIVERGENCES
    ]
    for found in interpreted("row_functions", calls=calls):
        compare(found, gradient_dtype=torch.float32)


@dtypes
def test_loss_with_kernels_matches_dense_float64(interpreted, dtype):
    """The whole path that a GPU takes, but for the matrix products."""
    calls = {
        name: call for name, call in variants(make_case(40, dtype=dtype)).items() if name in ONE_PER_KIND
    }
    keywords = {
        name: {"vocab_size": VOCAB, "objective": objective, **case}
        for name, (case, objective, _) in calls.items()
    }
    for name, got in interpreted("fused_all", calls=keywords).items():
        rounded = {} if dtype is torch.float32 else {"gradient": 8e-3, "scale": 8e-3}  # as in test_losses.py
        check(got, dense(*calls[name][:2]), name, **rounded)


def test_cosine_distance_matches_torch(interpreted):
    """One block and several, strided rows, nearly equal states, and a row of zeros."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for width, dtype in (
        (37, torch.float32),
        (64, torch.bfloat16),
        (4200, torch.float32),
        (4200, torch.bfloat16),
    ):
        a = torch.randn((5, 2 * width), generator=generator).to(dtype)[:, :width]
        b = (a.float() + 0.02 * torch.randn((5, width), generator=generator)).to(dtype)
        b[1], b[3] = -b[1], 0
        pairs.append((a, b))
    for found, (a, b) in zip(interpreted("cosine_distances", pairs=pairs), pairs):
        want = 1 - torch.cosine_similarity(a.double(), b.double(), dim=-1)
        assert (
            found.double() - want
        ).abs().max() < 5e-7  # float32 sums, and 1 - cosine of 2e-4 has lost three digits


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_cuda(ranks, architecture):
    """The compiler finds what the interpreter ignores: types that change in a loop, unknown ops."""
    assert all(ranks(1, "kernels_workers.compile_for", architecture=architecture)[0].values())
