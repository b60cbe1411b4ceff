"""The Triton kernels match losses/torch_rows.py in Triton's interpreter and compile for CUDA.

The GPU tests are in tests/gpu.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import kd_loss_parts
import pytest
import torch
from pool import Pool
from test_losses import ONE_PER_KIND, VOCAB, check, dense, make_case, variants

from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.objective import Objective
from minitron_mp.losses.rows import TopK
from minitron_mp.losses.tile_sizes import TILE_SIZES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; torch for CUDA brings it, elsewhere: pip install triton",
)

TABLE_TRITON = "3.7.1"
PAGE = Path(__file__).parents[2] / "docs/loss_on_a_gpu.md"

# (columns, valid, ranks that share the columns, bits of a logit): one block and its end; only valid
# ones; more than one block of 1024 with a short last one; a last rank with some padding, or only
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


def options_of(columns):
    """The interpreter is slow: one set of options for many columns."""
    return OPTIONS if columns < 1000 else OPTIONS[2:]


# One divergence of each kind (with and without second sums) at many columns: the interpreter is slow.
KERNEL_CASES = [
    (*size, divergence)
    for size in SIZES
    for divergence in DIVERGENCES
    if size[0] < 1000 or divergence in ("forward_kl", "js")
]


@pytest.mark.parametrize(("columns", "valid", "split", "bits", "divergence"), KERNEL_CASES)
def test_kernels_match_plain_torch(interpreted, columns, valid, split, bits, divergence):
    dtype = DTYPES[bits]
    case = make_rows(columns, valid, dtype) | {"ranks": split}
    calls = [
        case | {"objective": objective(divergence, t, ce), "dtype": out} for t, ce, out in options_of(columns)
    ]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), options_of(columns)):
        compare(found, gradient_dtype=out or dtype)


# k is also the full vocabulary, and more than one block of 1024
TOP_SIZES = [(*size, k) for size in SIZES for k in (5, 33) if k <= size[1]] + [(4200, 4133, 1, 16, 2100)]


@pytest.mark.parametrize(("columns", "valid", "split", "bits", "k"), TOP_SIZES)
def test_top_k_kernels_match_plain_torch(interpreted, columns, valid, split, bits, k):
    dtype = DTYPES[bits]
    rows = make_rows(columns, valid, dtype) | {"ranks": split}
    calls = [
        make_top_k(rows, k, t) | {"objective": objective("forward_kl", t, ce), "dtype": out}
        for t, ce, out in options_of(columns)
    ]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), options_of(columns)):
        compare(found, gradient_dtype=out or dtype)


@sizes
def test_cross_entropy_without_teacher(interpreted, columns, valid, split, dtype):
    case = make_rows(columns, valid, dtype, teacher=False) | {"ranks": split}
    calls = [
        case | {"objective": Objective("forward_kl", t, 0.0, 1.0), "dtype": out}
        for t, _, out in options_of(columns)
    ]
    for found, (_, _, out) in zip(interpreted("row_functions", calls=calls), options_of(columns)):
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


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
@dtypes
def test_bytes_per_logit_match_the_estimate(interpreted, dtype, divergence):
    """Each kernel reads each logit once and writes each gradient once."""
    size = dtype.itemsize
    want = {"statistics": (2 * size, 0), "second_sums": (2 * size, 0), "gradient": (2 * size, 2)}
    if divergence == "forward_kl":
        del want["second_sums"]
    assert interpreted("count_bytes", columns=3000, logits=dtype, divergence=divergence) == want


def test_kernels_compile_for_hopper(ranks):
    """docs/loss_on_a_gpu.md has the registers; no kernel spills, and a tile of 512 rows is one wave."""
    found = ranks(1, "kernels_workers.compile_for", architecture=90)[0]
    assert all(each.code and not each.spills for each in found)
    of_rows = [each for each in found if each.kernel in ("statistics", "second_sums")]
    assert all(each.wide for each in of_rows if each.logits == "fp32")
    assert all(132 * each.programs >= 512 for each in of_rows)
    table = kd_loss_parts.kernel_table([each for each in found if each.divergence])
    if version("triton") != TABLE_TRITON:
        pytest.skip(f"the table is that of triton {TABLE_TRITON}")
    assert table in PAGE.read_text(), f"write into {PAGE.name}:\n{table}"


@pytest.mark.slow
def test_kernels_compile_for_ampere(ranks):
    """The compiler finds what the interpreter ignores: types that change in a loop, unknown ops."""
    assert all(each.code for each in ranks(1, "kernels_workers.compile_for", architecture=80)[0])


def test_estimate_in_the_docs():
    page = PAGE.read_text()
    assert kd_loss_parts.estimate_table(kd_loss_parts.Case()) in page
    for case, name in (
        (kd_loss_parts.Case(logits="bf16"), "bf16 logits"),
        (kd_loss_parts.Case(vocab=256000), "float32 logits, 256,000 columns"),
        (kd_loss_parts.Case(tp=8), "one of 8 tensor parallel ranks, with communication over NVLink"),
    ):
        total = sum(seconds for _, seconds in kd_loss_parts.parts(case))
        assert f"| {name} | {total * 1e3:.1f} | {case.floor_s / total:.1%} |" in page


@pytest.mark.parametrize("vocab", [131072, 128256, 151936, 256000, 49152, 201088])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_rows_of_products(vocab, tp):
    """All products have a multiple of 128 rows, and the weight's gradient at least 4096."""
    for num_rows in (8192, 16384, 4096):
        rows = TILE_SIZES["cuda"].rows(num_rows, vocab // tp)
        assert rows.logits_gemm % 128 == rows.weight_gradient_gemm % 128 == 0
        assert num_rows % rows.weight_gradient_gemm % 128 == 0
        assert rows.weight_gradient_gemm % rows.logits_gemm % 128 == 0
        assert rows.weight_gradient_gemm >= 4096
        assert rows.logits_gemm * vocab // tp <= 1 << 26
