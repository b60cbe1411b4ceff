"""A pruned model matches its masked teacher for every layout; an identity plan changes nothing."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import ARCHS, BY_NAME, CASES, IDS, UNEVEN, masked_axes, saved_axes, targets
from results import previous

ROUNDING = 2e-5
"""Of float32 logits, relative to the largest: 6 layers of sums of about 100 products; 4e-6 seen."""
AXES = ["hidden", "ffn", "heads", "layer", "all", "groups", "merged"]

cases = pytest.mark.parametrize(("arch", "layout"), CASES, ids=IDS)
SLICED = [(arch, layout, axis) for arch, layout in CASES for axis in targets(ARCHS[arch], layout.tp)]
SLICED += [(arch, layout, "uneven") for arch, layout in UNEVEN]
SAVED = [(arch, layout, axis) for arch, layout in CASES for axis in saved_axes(arch)]
MASKED = [(arch, layout, axis) for arch, layout in CASES for axis in masked_axes(arch, layout)]


def assert_close(ours, dense, what):
    """ours: logits by rank, None off the last stage."""
    seen = [z for z in ours if z is not None]
    assert seen, "no rank has logits"
    for z in seen:
        difference = (z - dense).abs().max() / dense.abs().max()
        assert difference < ROUNDING, f"{what}: logits differ by {difference:.2e} of their largest"


@cases
def test_teacher_matches_plain_torch(results, arch, layout):
    assert_close([rank["logits"] for rank in results.pruned(arch, layout)], results.dense(arch), "teacher")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("arch", ARCHS)
def test_masked_reference_equals_sliced_reference(results, arch, axis):
    """The references themselves, in float64: the algebra of the masks is exact but for rounding."""
    plan = results.plan(arch, axis)
    want, got = results.dense(arch, plan, masked=True), results.dense(arch, plan)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    assert (want - results.dense(arch)).abs().max() > 0.01 * want.abs().max(), (
        "this plan cuts nothing that matters"
    )


@pytest.mark.parametrize(
    ("arch", "layout", "axis"), SAVED, ids=[f"{arch}-{layout.name}-{axis}" for arch, layout, axis in SAVED]
)
def test_masked_reference_matches_student_loaded_at_this_layout(results, arch, layout, axis):
    """The student was cut and saved at the layout before this one in the table."""
    want = results.dense(arch, results.plan(arch, axis, previous(CASES, arch, layout)), masked=True)
    assert_close([rank[axis] for rank in results.loaded(arch, layout)], want, axis)


@pytest.mark.parametrize(("arch", "layout"), UNEVEN, ids=[f"{arch}-{layout.name}" for arch, layout in UNEVEN])
def test_student_whose_layers_differ_in_size_loads_at_this_layout(results, arch, layout):
    """It was pruned and saved at another layout."""
    plan = results.plan(arch, "uneven", previous(UNEVEN, arch, layout))
    assert not plan.student.is_uniform
    want = results.dense(arch, plan, masked=True)
    assert_close([rank["uneven"] for rank in results.loaded_uneven(arch, layout)], want, "uneven")


@pytest.mark.parametrize(
    ("arch", "layout", "axis"), MASKED, ids=[f"{arch}-{layout.name}-{axis}" for arch, layout, axis in MASKED]
)
def test_sliced_student_matches_masked_teacher(results, arch, layout, axis):
    """No weight is sliced; the teacher is bitwise unchanged (see test_importance.py)."""
    want = results.dense(arch, results.plan(arch, axis, layout))
    assert_close([rank["masked"][axis] for rank in results.pruned(arch, layout)], want, axis)


@pytest.mark.parametrize(
    ("arch", "layout", "axis"), SLICED, ids=[f"{arch}-{layout.name}-{axis}" for arch, layout, axis in SLICED]
)
def test_slices_equal_plain_indexing_bitwise(results, arch, layout, axis):
    """Every rank holds its shard, and the saved shards cover each weight once.

    Merged queries are rounded once, as in the reference.
    """
    want = reference.sliced(ARCHS[arch], results.weights(arch), results.plan(arch, axis, layout))
    covered = {key: torch.zeros(value.shape, dtype=torch.int) for key, value in want.items()}
    for number, rank in enumerate(results.pruned(arch, layout)):
        for key, offset, data, is_saved in rank["pieces"][axis]:
            window = tuple(slice(start, start + size) for start, size in zip(offset, data.shape))
            assert torch.equal(want[key][window], data), f"rank {number}: {key} at {offset}"
            covered[key][window] += is_saved
    for key, count in covered.items():
        assert (count == 1).all(), f"{key} is saved {count.min()} to {count.max()} times"


@cases
def test_identity_plan_gives_bitwise_equal_student(results, arch, layout):
    """Sliced, saved and loaded at the same layout; the weights are compared above."""
    for rank in results.pruned(arch, layout):
        assert (rank["logits"] is None and rank["identity"] is None) or torch.equal(
            rank["logits"], rank["identity"]
        )


@pytest.mark.parametrize("arch", ARCHS)
def test_kept_neurons_are_uneven_across_ranks(results, arch):
    """The case that the exchange is for: at tp 4 one rank keeps most, another next to none."""
    plan = results.plan(arch, "ffn")
    counts = [
        [sum(i * 4 // ARCHS[arch].ffn_hidden_size == rank for i in row) for rank in range(4)]
        for row in plan.keep["ffn"].values()
    ]
    assert min(map(min, counts)) <= 1
    assert max(map(max, counts)) > 2 * plan.student.ffn_hidden_size / 4
    assert set(targets(ARCHS[arch])) == {*AXES, "identity"}


def test_kept_groups_are_uneven_across_ranks(results):
    """At tp 4 one rank keeps both of its query groups, another none; both merge paths run."""
    arch, plan = ARCHS["qwen2"], results.plan("qwen2", "merged", BY_NAME["tp4-sp"])
    counts = [
        [
            len({h // arch.heads_per_group for h in row if h * 4 // arch.num_attention_heads == rank})
            for rank in range(4)
        ]
        for row in plan.keep["heads"].values()
    ]
    assert (min(map(min, counts)), max(map(max, counts))) == (0, 2)
    merged = plan.merge["heads"].values()
    assert all(len(pairs) == plan.student.num_query_groups for pairs in merged)
    signs = {kept < pruned for pairs in merged for kept, pruned in pairs}
    assert signs == {True, False}


def test_rows_kept_on_their_rank_are_not_sent(ranks):
    """Every second row of each rank; then three of the first rank's and one of the second's."""
    rows, layout = torch.arange(8.0)[:, None].expand(8, 3).contiguous(), BY_NAME["tp2"]
    keeps = [torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1, 3, 7])]
    for number, found in enumerate(ranks(2, "model_workers.exchange", layout=layout, rows=rows, keeps=keeps)):
        assert [sent for _, sent in found] == [0, 1]
        assert all(torch.equal(got, rows[keep].chunk(2)[number]) for (got, _), keep in zip(found, keeps))


def test_merged_queries_are_rounded_once_in_bf16(results, ranks):
    plan = results.plan("qwen2", "merged")
    layer = plan.layers[0]
    rows = results.weights("qwen2")[reference.layer_key(layer, reference.QKV + "weight")].bfloat16()
    pairs = plan.merge["heads"][layer]
    merged, unchanged = (
        ranks(1, "model_workers.merge_queries", plan=plan, rows=rows, pairs=which, layer=layer)[0]
        for which in (pairs, [])
    )
    assert torch.equal(unchanged, rows)
    want = reference.merged(ARCHS["qwen2"], rows, plan, layer)
    assert torch.equal(merged, want)
    assert (want != rows).any(1).sum() == len(pairs) * plan.teacher.kv_channels
