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
from minitron_mp.losses.objective import Objective
from minitron_mp.losses.rows import TopK

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; torch for CUDA brings it, elsewhere: pip install triton",
)

# (columns, valid, ranks that share the columns, bits of a logit): one block and its end; only valid
# ones; more than one block of 2048 with a short last one; a last rank with some padding, or only
# padding; one column; a power of two and its neighbours; three ranks.
SIZES = [
    (37, 33, 1, 32),
    (37, 33, 1, 16),
    (64, 64, 1, 16),
    (4200, 4133, 1, 16),
    (48, 37, 2, 32),
    (64, 31, 4, 16),
    (1, 1, 1, 32),
    (2047, 2047, 1, 16),
    (2049, 2048, 1, 32),
    (6153, 6150, 3, 32),
]
DTYPES = {16: torch.bfloat16, 32: torch.float32}
sizes = pytest.mark.parametrize(
    ("columns", "valid", "split", "dtype"),
    [(columns, valid, split, DTYPES[bits]) for columns, valid, split, bits in SIZES],
    ids=[f"v{columns}-{valid}-tp{split}-{bits}bits" for columns, valid, split, bits in SIZES],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function in a process whose Triton interprets."""
    pool = Pool(1, environment={"TRITON_INTERPRET": "1"})
    yield lambda function, **kwargs: pool.run(f"kernels_workers.{function}", **kwargs)[0]
    pool.close()


def make_rows(columns, valid, dtype, *, teacher=True, scale=5.0):
    """Five rows. The third has no weight and NaN, as the padding has.

    Some labels belong to no rank.
    """
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = ((scale * torch.randn((5, columns), generator=generator)).to(dtype) for _ in range(2))
    for z in (z_s, z_t):
        z[:, valid:] = torch.nan
        z[2] = torch.nan
    token_weights = torch.rand(5, generator=generator) + 0.5
    token_weights[2] = 0
    return {
        "z_s": z_s,
        "z_t": z_t if teacher else None,
        "labels": torch.tensor([0, max(valid - 1, 0), 3, -7, valid]),
        "token_weights": token_weights,
        "valid": valid,
    }


def make_top_k(rows, k, temperature):
    """The teacher's k most likely tokens; the fourth row has no remaining mass."""
    log_p = (rows["z_t"][:, : rows["valid"]].float() / temperature).nan_to_num().log_softmax(-1)
    top = log_p.topk(min(k, log_p.shape[1]))
    ghost = log_p.scatter(1, top.indices, -torch.inf).logsumexp(1)
    ghost[3] = -torch.inf
    return rows | {"z_t": None, "top_k": TopK(top.indices, top.values, ghost)}


def compare(found, *, gradient_dtype, atol=2e-6):
    assert not found["kernels"]["gradient"][2].any()  # the row without weight; its statistics are unspecified
    rest = [0, 1, 3, 4]
    for key, want in found["rows"].items():
        got = found["kernels"][key]
        assert got.dtype is want.dtype
        dim = 0 if key == "gradient" else 1
        got, want = (x.index_select(dim, torch.tensor(rest)).float() for x in (got, want))
        # Both -inf and the lowest float32 stand for the maximum over no column.
        got, want = (x.clamp_min(torch.finfo(torch.float32).min) for x in (got, want))
        # The same float32 operations in another order, up to 4133 terms in a sum; a bf16 result may
        # round to the other side.
        rtol = 2**-7 if key == "gradient" and gradient_dtype is torch.bfloat16 else 1e-5
        close = torch.isclose(got, want, rtol=rtol, atol=atol)
        assert close.all(), (key, (got - want).abs().max())


def objective(divergence, temperature, has_ce):
    return Objective(divergence, temperature, kl_weight=0.8, ce_weight=0.3 if has_ce else 0.0)


# (temperature, with cross-entropy, dtype of the gradient; None: it takes the place of z_s)
OPTIONS = [(1.0, True, None), (2.0, False, torch.bfloat16), (0.7, True, torch.float32)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@sizes
def test_kernels_match_plain_torch(interpreted, columns, valid, split, dtype, divergence):
    case = make_rows(columns, valid, dtype) | {"ranks": split}
    calls = [case | {"objective": objective(divergence, t, ce), "dtype": out} for t, ce, out in OPTIONS]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), OPTIONS):
        compare(found, gradient_dtype=out or dtype)


@pytest.mark.parametrize("k", [5, 33, 2100])
@sizes
def test_top_k_kernels_match_plain_torch(interpreted, columns, valid, split, dtype, k):
    """k is also the full vocabulary, and more than one block."""
    if k > valid or (k == 2100 and valid > 5000):
        pytest.skip("the teacher has fewer tokens, or another size tests this k")
    rows = make_rows(columns, valid, dtype) | {"ranks": split}
    calls = [
        make_top_k(rows, k, t) | {"objective": objective("forward_kl", t, ce), "dtype": out}
        for t, ce, out in OPTIONS
    ]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), OPTIONS):
        compare(found, gradient_dtype=out or dtype)


@sizes
def test_cross_entropy_without_teacher(interpreted, columns, valid, split, dtype):
    case = make_rows(columns, valid, dtype, teacher=False) | {"ranks": split}
    calls = [
        case | {"objective": Objective("forward_kl", t, 0.0, 1.0), "dtype": out} for t, _, out in OPTIONS
    ]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), OPTIONS):
        compare(found, gradient_dtype=out or dtype)


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16], ids=["student-fp32", "student-bf16"])
def test_teacher_of_another_dtype_and_width(interpreted, student):
    """The teacher's padding is wider, and its rows lie apart differently."""
    case = make_rows(70, 66, student)
    other = torch.bfloat16 if student is torch.float32 else torch.float32
    case["z_t"] = torch.nn.functional.pad(case["z_t"].to(other), (0, 9), value=torch.nan)
    calls = [case | {"objective": objective(name, 2.0, True), "dtype": torch.float32} for name in DIVERGENCES]
    for found in interpreted("row_functions", calls=calls):
        compare(found, gradient_dtype=torch.float32)


def test_large_logits(interpreted):
    """Of 300: the maximum of a lane grows by hundreds on the way."""
    case = make_rows(4200, 4133, torch.float32, scale=300.0)
    calls = [
        case | {"objective": objective(divergence, 1.0, True), "dtype": torch.float32}
        for divergence in DIVERGENCES
    ]
    for found in interpreted("row_functions", calls=calls):
        # The log-sum-exp, of size 1000, is rounded by 6e-5, a relative error of all probabilities.
        compare(found, gradient_dtype=torch.float32, atol=1e-4)


@dtypes
def test_lse_without_some_columns(interpreted, dtype):
    """As a teacher computes the mass that its top k leaves; columns of other ranks are ignored."""
    z = (5 * torch.randn((4, 4133), generator=torch.Generator().manual_seed(0))).to(dtype)
    columns = torch.stack([torch.tensor([0, 4132, -3, 4133, 77, 5000])] * 4)
    rest = (z.double() / 2).index_fill(1, torch.tensor([0, 4132, 77]), -torch.inf).logsumexp(1)
    got = interpreted("lse_without", logits=z, columns=columns, temperature=2.0)
    # float32 sums of 4133 terms
    assert torch.allclose(got[:, 0].double(), rest, rtol=0, atol=2e-6)


LAUNCHES = {"forward_kl": 3, "js": 4, "top_k": 5, "ce": 3}
"""Kernels for a tile of rows. With tp ranks a collective for each table comes on top."""


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_of_a_tile(interpreted, kind):
    """A tile of rows starts only the kernels beside its matrix products: no small torch kernels."""
    two, five = (interpreted("count_launches", tiles=tiles, kind=kind) for tiles in (2, 5))
    one_more = {name: (five[name] - two[name]) / 3 for name in five}
    kernels = {name: count for name, count in one_more.items() if name.startswith("_")}
    products = 1 if kind in ("top_k", "ce") else 2
    assert one_more.pop("aten.mm") == products  # logits of student and teacher
    assert sum(kernels.values()) == LAUNCHES[kind] <= 6 - (2 if kind == "js" else 1)
    assert sum(one_more.values()) == LAUNCHES[kind], f"also started: {one_more}"


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
