"""Sizes, ranking and targets. Published numbers are from arXiv 2408.11796, tables 1 and 3."""

import dataclasses
import json
import time

import numpy as np
import pytest

from minitron_mp.artifacts.manifest import Manifest, find_manifest
from minitron_mp.config.pruning import SearchConfig, TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch, BlockArch, layout_problems
from minitron_mp.models.axes import AXES, AXIS_OF_DIM, FFN, HEADS, HIDDEN, NO_LAYER
from minitron_mp.models.blocks.dense import ATTENTION, MLP, PARAMETERS
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.export import export_problems, exportable_arch
from minitron_mp.models.parameters import FINAL_NORM_BIAS, MODEL_PARAMETERS, dims_of, layer_key, split_key
from minitron_mp.pruning.candidates import chosen
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.ranking import top_indices
from minitron_mp.pruning.scores import Scores, random_scores
from minitron_mp.pruning.target import resolve_target
from minitron_mp.report.importance_section import pruned_section


def make_arch(**changes) -> Arch:
    sizes = {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 6,
        "vocab_size": 300,
    }
    return Arch(**{"family": "llama", "max_position_embeddings": 64, "tied": False, **sizes, **changes})


def published(**changes) -> Arch:
    return make_arch(**{"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, **changes})


NEMO = published(family="mistral", num_layers=40, hidden_size=5120, ffn_hidden_size=14336, vocab_size=131072)
LLAMA = published(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, vocab_size=128256)
SMALL = make_arch()


def kept_rows(dim: str, keep: list[int], arch: Arch) -> list[int]:
    """Rows of a weight dimension that belong to the kept units, in layer 0, of all copies."""
    axis = AXIS_OF_DIM[dim]
    weight_dim = axis.dims[dim]
    rows = weight_dim.rows(np.array(keep), arch, 0)
    size = len(weight_dim.rows(np.arange(axis.num_units(arch, 0)), arch, 0))
    return [int(row) + copy * size for copy in range(weight_dim.copies(arch)) for row in rows]


def manifest(stage: str) -> Manifest:
    return Manifest(stage=stage, settings={"a": 1}, inputs={}, arch=SMALL)


@pytest.mark.parametrize(
    ("arch", "total", "without_embeddings"),
    [
        (NEMO, 12.2, 10.9),
        (NEMO.resized(hidden_size=4096, ffn_hidden_size=11520), 8.4, 7.3),
        (LLAMA, 8.0, 7.0),
        (LLAMA.resized(hidden_size=3072, ffn_hidden_size=9216), 4.5, 3.7),
        (LLAMA.resized(num_layers=16), 4.5, 3.5),
    ],
    ids=[
        "Mistral-NeMo-12B",
        "MN-Minitron-8B",
        "Llama-3.1-8B",
        "Llama-3.1-Minitron-4B-Width",
        "Llama-3.1-Minitron-4B-Depth",
    ],
)
def test_published_parameter_counts(arch, total, without_embeddings):
    assert round(arch.num_parameters() / 1e9, 1) == total
    assert round(arch.num_parameters(embeddings=False) / 1e9, 1) == without_embeddings


def test_tied_embeddings_count_once_and_padding_never():
    vocabulary = SMALL.vocab_size * SMALL.hidden_size
    tied = make_arch(tied=True)
    assert SMALL.padded_vocab_size == 384
    assert SMALL.num_parameters() - tied.num_parameters() == vocabulary
    assert tied.num_parameters() - tied.num_parameters(embeddings=False) == vocabulary
    assert "output_layer.weight" not in tied.shapes()


def test_shapes_follow_the_arch_switches():
    norm_biases = {ATTENTION + "linear_qkv.layer_norm_bias", MLP + "linear_fc1.layer_norm_bias"}
    switched = {ATTENTION + name for name in ("linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight")}

    def keys(absent: set[str]) -> set[str]:
        names = PARAMETERS.keys() - absent
        outside = set(MODEL_PARAMETERS) - ({FINAL_NORM_BIAS} if norm_biases <= absent else set())
        return outside | {layer_key(layer, name) for layer in range(4) for name in names}

    assert set(SMALL.shapes()) == keys(switched | norm_biases)
    shapes = make_arch(qkv_bias=True, qk_norm=True).shapes()
    assert set(shapes) == keys(norm_biases)
    nemotron = make_arch(norm="layer1p", activation="squared_relu").shapes()
    assert set(nemotron) == keys(switched)
    fc1 = layer_key(1, MLP + "linear_fc1.weight")
    assert nemotron[fc1][0] * 2 == shapes[fc1][0]
    assert shapes[layer_key(0, ATTENTION + "linear_qkv.weight")] == ((8 + 2 * 2) * 6, 48)
    assert shapes[layer_key(3, ATTENTION + "linear_proj.weight")] == (48, 8 * 6)
    assert shapes[layer_key(3, ATTENTION + "q_layernorm.weight")] == (6,)


def test_keys_split_into_layer_and_name():
    assert split_key("decoder.layers.12.mlp.linear_fc2.weight") == (12, "mlp.linear_fc2.weight")
    assert split_key("decoder.final_layernorm.weight") == (None, "decoder.final_layernorm.weight")
    assert split_key("decoder.layers.mlp.linear_fc2.weight")[0] is None
    assert all(len(dims_of(key)) == len(shape) for key, shape in SMALL.shapes().items())
    assert dims_of("decoder.layers.0.mlp.router.weight") is None


def test_query_rows_keep_key_and_value_of_their_group():
    """8 heads in 2 groups are q0 q1 q2 q3 k0 v0 q4 q5 q6 q7 k1 v1."""
    keep = [0, 3, 4, 5]
    one_row_a_head = make_arch(kv_channels=1)
    slots = [0, 3, 4, 5, 6, 7, 10, 11]
    assert kept_rows("qkv", keep, one_row_a_head) == slots
    assert kept_rows("heads", keep, one_row_a_head) == keep
    assert kept_rows("qkv", keep, SMALL) == [row for slot in slots for row in range(6 * slot, 6 * slot + 6)]
    assert kept_rows("heads", keep, SMALL) == [row for head in keep for row in range(6 * head, 6 * head + 6)]
    assert kept_rows("gate_up", [0, 95], SMALL) == [0, 95, 96, 191]
    assert kept_rows("ffn", [0, 95], SMALL) == [0, 95]


def test_key_and_value_of_groups_without_heads_are_dropped():
    one_row_a_head = make_arch(kv_channels=1)
    assert kept_rows("qkv", [4, 5, 7], one_row_a_head) == [6, 7, 9, 10, 11]
    assert kept_rows("qkv", [1], one_row_a_head) == [1, 4, 5]
    assert kept_rows("heads", [4, 5, 7], one_row_a_head) == [4, 5, 7]


@pytest.mark.parametrize("arch", [SMALL, make_arch(activation="squared_relu")], ids=["gated", "plain"])
@pytest.mark.parametrize("dim", AXIS_OF_DIM)
def test_all_units_own_every_row_once(dim, arch):
    units = list(range(AXIS_OF_DIM[dim].num_units(arch, 0)))
    assert kept_rows(dim, units, arch) == list(range(arch.dim_size(dim)))


def test_every_parameter_dimension_is_an_axis_or_stays_whole():
    dims = {dim for table in (PARAMETERS, MODEL_PARAMETERS) for dims in table.values() for dim in dims}
    assert dims - set(AXIS_OF_DIM) == {"vocab", "head_width"}
    assert set(AXIS_OF_DIM) <= dims


def test_target_and_search_have_a_field_for_every_size():
    fields = {size.field for axis in AXES.values() for size in axis.sizes}
    assert fields <= set(TargetConfig.model_fields)
    assert fields <= set(SearchConfig.model_fields)
    assert fields <= set(TargetConfig._sizes)


def test_layout_problems_name_every_size():
    assert layout_problems(SMALL, 2) == []
    text = " ".join(layout_problems(SMALL, 5))
    assert all(
        part in text
        for part in (
            "num_attention_heads 8",
            "num_query_groups 2",
            "ffn_hidden_size 96",
            "padded vocabulary 384",
            "size 5",
        )
    )


def test_top_indices_are_ascending_and_ties_take_the_lower_index():
    assert top_indices(np.array([1, 3, 2, 3, 3], np.float32), 2).tolist() == [1, 3]
    assert top_indices(np.array([5, 5, 5, 5], np.float32), 3).tolist() == [0, 1, 2]
    assert top_indices(np.array([0.0, -0.0, 1.0], np.float32), 2).tolist() == [0, 2]


def test_plan_keeps_the_best_of_every_axis():
    importance = random_scores(SMALL)
    plan = make_plan(
        importance,
        SMALL,
        TargetConfig(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    )
    assert plan.layers == sorted(np.argsort(-importance.layers)[:3])
    assert plan.keep["hidden"] == {NO_LAYER: sorted(np.argsort(-importance["hidden"][NO_LAYER])[:32])}
    assert list(plan.keep["ffn"]) == list(plan.keep["heads"]) == plan.layers
    for layer in plan.layers:
        assert plan.keep["ffn"][layer] == sorted(np.argsort(-importance["ffn"][layer])[:64])
        groups = importance["heads"][layer].reshape(2, 4)
        assert plan.keep["heads"][layer] == sorted(
            g * 4 + h for g in range(2) for h in np.argsort(-groups[g])[:2]
        )  # as many in every group
    assert plan.units(HIDDEN).dtype == plan.units(FFN, plan.layers[0]).dtype == np.int64
    assert plan.units(HIDDEN, plan.layers[0]).tolist() == plan.keep["hidden"][NO_LAYER]
    assert plan.units(HEADS, plan.layers[0]).tolist() == plan.keep["heads"][plan.layers[0]]
    assert plan.notes == []


def test_empty_target_is_the_identity_plan():
    plan = make_plan(random_scores(SMALL), SMALL, TargetConfig())
    assert plan.student == SMALL
    assert plan.layers == list(range(4))
    assert plan.dropped == []
    assert plan.keep == {
        "hidden": {NO_LAYER: list(range(48))},
        "ffn": {layer: list(range(96)) for layer in range(4)},
        "heads": {layer: list(range(8)) for layer in range(4)},
    }


GROUPED = make_arch(num_attention_heads=24, num_query_groups=4)
"""6 heads a group."""


def test_dropping_a_query_group_drops_its_heads():
    importance = random_scores(GROUPED)
    plan = make_plan(importance, GROUPED, TargetConfig(num_query_groups=2))
    assert (plan.student.num_query_groups, plan.student.num_attention_heads) == (2, 12)
    cut = make_plan(importance, GROUPED, TargetConfig(num_query_groups=2, num_attention_heads=6))
    for layer in range(GROUPED.num_layers):
        groups = importance["heads"][layer].reshape(4, 6)
        best = sorted(range(4), key=lambda g: -sum(float(score) ** 2 for score in groups[g]))[:2]
        assert plan.keep["heads"][layer] == [6 * g + h for g in sorted(best) for h in range(6)]
        assert cut.keep["heads"][layer] == [
            6 * g + h for g in sorted(best) for h in sorted(np.argsort(-groups[g])[:3])
        ]
    assert {row[0]: row[1:] for row in plan.summary()}["num_query_groups"] == ("4", "2", "50%")


def test_multi_head_attention_drops_heads_with_key_and_value():
    """Multi-head attention: each head is a group."""
    teacher, importance = make_arch(num_query_groups=8), random_scores(SMALL)
    plan = make_plan(importance, teacher, TargetConfig(num_query_groups=5))
    assert (plan.student.num_query_groups, plan.student.num_attention_heads) == (5, 5)
    want = {layer: top_indices(row, 5).tolist() for layer, row in importance["heads"].items()}
    assert plan.keep["heads"] == want


@pytest.mark.parametrize("keep", [5, 4, 3, 2, 1])
def test_merged_heads_are_mirrored_at_the_cut(keep):
    """head_i += head_i - head_(2K-i+1), 1-based by importance.

    Pruned heads past 2K have no partner.
    """
    importance = random_scores(GROUPED)
    plan = make_plan(importance, GROUPED, TargetConfig(num_attention_heads=4 * keep, merge_heads=True))
    for layer, pairs in plan.merge["heads"].items():
        want = set()
        for group in range(4):
            ranked = {
                i: group * 6 + int(h)
                for i, h in enumerate(np.argsort(-importance["heads"][layer].reshape(4, 6)[group]), 1)
            }
            want |= {
                (ranked[i], ranked[2 * keep - i + 1]) for i in range(max(1, keep - (6 - keep) + 1), keep + 1)
            }
        assert set(pairs) == want
        assert len(pairs) == len(want) == 4 * min(keep, 6 - keep)


def test_heads_merge_only_in_kept_groups():
    importance = random_scores(GROUPED)
    plan = make_plan(
        importance, GROUPED, TargetConfig(num_query_groups=1, num_attention_heads=4, merge_heads=True)
    )
    for layer, heads in plan.keep["heads"].items():
        pairs = plan.merge["heads"][layer]
        assert len(pairs) == 2
        assert {head // 6 for pair in pairs for head in pair} == {heads[0] // 6}
    assert make_plan(importance, GROUPED, TargetConfig(num_attention_heads=16)).merge == {}


def test_summary_has_sizes_and_parameters():
    rows = {
        row[0]: row[1:]
        for row in make_plan(random_scores(SMALL), SMALL, TargetConfig(hidden_size=32)).summary()
    }
    assert rows["hidden_size"] == ("48", "32", "67%")
    assert rows["parameters"][0] == f"{SMALL.num_parameters():,}"


def test_close_cuts_are_reported():
    importance = random_scores(SMALL)
    hidden, heads = importance["hidden"][NO_LAYER], importance["heads"]
    hidden[:] = np.arange(48, 0, -1)
    importance.layers[:] = [4, 2, 3, 1]
    hidden[32] = hidden[31] * (1 - 2e-7)
    importance["ffn"][0][:] = 1.0  # layer 0 stays
    importance["ffn"][3][:] = 1.0  # layer 3 goes: its cut decides nothing
    heads[2][4:] = [1, 0.5, 0.5, 0.1]
    plan = make_plan(
        importance,
        SMALL,
        TargetConfig(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    )
    assert [note.split(":")[0] for note in plan.notes] == ["hidden", "ffn of layer 0", "heads of layer 2"]
    assert "last kept and first cut score are 17 and 16.9999" in plan.notes[0]
    assert plan.keep["ffn"][0] == list(range(64))
    assert make_plan(importance, SMALL, TargetConfig()).notes == []  # nothing is cut
    heads[0][:] = [1, 2, 3, 4, 4, 3, 2, 1]
    notes = make_plan(importance, SMALL, TargetConfig(num_query_groups=1)).notes
    assert len(notes) == 1
    assert notes[0].startswith("query groups of layer 0: the last kept and first cut score are 5.4772")
    heads[0][:] = [3, 2, 1, 0, 4, 4, 2, 1]
    heads[2][:] = heads[1]
    plans = {
        (n, merge): make_plan(
            importance, SMALL, TargetConfig(num_query_groups=1, num_attention_heads=n, merge_heads=merge)
        )
        for n in (2, 3)
        for merge in (0, 1)
    }
    assert (
        plans[2, 0].notes == plans[3, 0].notes == plans[3, 1].notes == []
    )  # both stay; of three kept heads only the third takes a residual
    assert plans[2, 1].notes == [
        "heads of layer 0: two scores that decide which units are merged are 4 and 4, "
        "closer than rounding noise"
    ]


@pytest.mark.parametrize(
    ("target", "tp", "message"),
    [
        (
            {"hidden_size": 40},
            1,
            r"hidden_size 40 is not a multiple of 16 \(target.align\); use 32 or 48$",
        ),
        ({"hidden_size": 64}, 1, r"hidden_size 64 is larger than the teacher's 48"),
        ({"hidden_size": 8}, 1, r"hidden_size 8 .* use 16$"),
        (
            {"ffn_hidden_size": 80},
            2,
            r"ffn_hidden_size 80 is not a multiple of 32 \(target.align 16 x parallel.tp 2\); use 64 or 96",
        ),
        (
            {"num_attention_heads": 5},
            1,
            r"num_attention_heads 5 is not a multiple of 2 \(num_query_groups\); use 4 or 6, or cut num_q",
        ),
        ({"num_query_groups": 3}, 1, r"num_query_groups 3 is larger than the teacher's 2"),
        (
            {"num_query_groups": 1},
            2,
            r"num_query_groups 1 is not a multiple of 2 \(parallel.tp\); use 2",
        ),
        (
            {"num_query_groups": 1, "num_attention_heads": 6},
            1,
            r"num_attention_heads 6 in 1 query groups is more per group than the teacher's 4; at most 4",
        ),
        (
            {"hidden_size": 32, "merge_heads": True},
            1,
            r"merge_heads: each kept query group keeps its 4 heads, .* give fewer num_attention_heads",
        ),
        ({"num_query_groups": 1, "merge_heads": True}, 1, r"nothing to merge; remove merge_heads"),
        ({"keep": 0.75, "merge_heads": True}, 1, r"nothing to merge; remove merge_heads"),
        ({"num_layers": 5}, 1, r"num_layers 5 is larger than the teacher's 4"),
        (
            {"hidden_size": 40, "ffn_hidden_size": 100, "num_layers": 9},
            1,
            r"(?s)num_layers 9 .*hidden_size 40 .*ffn_hidden_size 100 ",
        ),
        (
            {"hidden_size": 32},
            3,
            r"(?s)tensor parallel size 3 does not divide num_attention_heads 8.*num_query_groups 2",
        ),
        ({"keep": 0.01}, 1, r"no student along \['hidden', 'ffn'\] has at most"),
        (
            {"max_parameters": 20_000, "axes": ["ffn"]},
            1,
            r"no student along \['ffn'\] has at most 20,000 parameters; .*reduce all of hidden, ffn",
        ),
        ({"keep": 0.5, "axes": ["ffn", "layer"]}, 1, r"mixes width and depth"),
        ({"keep": 0.5, "axes": ["heads"]}, 1, r"axes heads: unknown; give some of hidden, ffn, or layer"),
    ],
)
def test_impossible_targets_are_rejected(target, tp, message):
    with pytest.raises(InputError, match=message):
        resolve_target(SMALL, TargetConfig(**target), tp)


@pytest.mark.parametrize("axes", [["hidden", "ffn"], ["hidden"], ["ffn"], ["layer"]])
@pytest.mark.parametrize(
    "teacher", [NEMO, LLAMA, make_arch(hidden_size=64, num_attention_heads=4)], ids=["nemo", "llama", "small"]
)
def test_parameter_budget_is_used_but_not_exceeded(teacher, axes):
    budget = 0.75 * teacher.num_parameters()
    start = time.process_time()
    student = resolve_target(teacher, TargetConfig(keep=0.75, axes=axes))
    assert time.process_time() - start < 5  # 0.5 s: a dry run comes here
    assert student == resolve_target(teacher, TargetConfig(max_parameters=budget, axes=axes))
    assert 0.6 * budget < student.num_parameters() <= budget
    unchanged = {"hidden": "hidden_size", "ffn": "ffn_hidden_size", "layer": "num_layers"}.items()
    assert all(
        getattr(student, name) == getattr(teacher, name) for axis, name in unchanged if axis not in axes
    )
    assert exportable_arch(student, None) == student


def test_published_budget_gives_nearly_the_published_student():
    student = resolve_target(NEMO, TargetConfig(max_parameters="8.4B"))
    assert (student.hidden_size, student.ffn_hidden_size) == (
        4096,
        11488,
    )  # published: 4096 and 11520, 8.414e9
    assert resolve_target(LLAMA, TargetConfig(keep=1.0)) == LLAMA


def test_budget_respects_alignment_and_tensor_parallel_size():
    student = resolve_target(NEMO, TargetConfig(keep=0.6, align=32), tp=8)
    assert student.hidden_size % 32 == 0
    assert student.ffn_hidden_size % (32 * 8) == 0


def test_suggested_hidden_sizes_are_valid():
    """Align 16 and the 9 heads of a Llama together: 500 and 496 get the same suggestion, 432 or 576."""
    teacher = make_arch(hidden_size=576, num_attention_heads=9, num_query_groups=3)
    with pytest.raises(InputError, match=r"hidden_size 500 .* use 432 or 576 \(also a multiple of .* 9,"):
        resolve_target(teacher, TargetConfig(hidden_size=500))
    with pytest.raises(InputError, match=r"hidden_size 500 .* use 496 or 512$"):
        resolve_target(teacher, TargetConfig(hidden_size=500), family="mistral")
    student = resolve_target(teacher, TargetConfig(hidden_size=496))
    with pytest.raises(InputError, match=r"hidden_size 496 .* Llama; use 432 or 576, or set export"):
        exportable_arch(student, None, align=16)
    assert exportable_arch(student, "mistral", align=16).family == "mistral"


def test_llama_export_rule_suggests_mistral():
    student = LLAMA.resized(hidden_size=3088)
    assert export_problems(NEMO.resized(hidden_size=3088)) == []
    with pytest.raises(
        InputError,
        match=r"hidden_size 3088 is not a multiple of num_attention_heads 32, as transformers requires for "
        r"Llama; use 3072 or 3104, or set export\.family: mistral",
    ):
        exportable_arch(student, None)
    assert exportable_arch(student, "mistral") == student.model_copy(update={"family": "mistral"})
    with pytest.raises(InputError, match="scales its rotary frequencies"):
        exportable_arch(student.model_copy(update={"rope_scaling_factor": 8.0}), "mistral")
    with pytest.raises(
        InputError,
        match=r"export\.family qwen2: .* family llama can be written only as llama or mistral; set one",
    ):
        exportable_arch(student, "qwen2")
    with pytest.raises(InputError, match=r"export\.family gpt: .* can be written only as llama or mistral"):
        exportable_arch(student, "gpt")
    with pytest.raises(InputError, match=r"export\.family llama: .* only as qwen3; drop export\.family$"):
        exportable_arch(student.model_copy(update={"family": "qwen3"}), "llama")


def test_model_whose_layers_differ_cannot_be_exported():
    narrow = BlockArch(ffn_hidden_size=48, num_attention_heads=8, num_query_groups=2)
    mixed = SMALL.model_copy(update={"blocks": (*SMALL.blocks[:3], narrow)})
    for family in FAMILIES:
        with pytest.raises(InputError, match=r"the layers differ in size.*give one size for all layers"):
            exportable_arch(mixed.model_copy(update={"family": family}), None)


def test_scores_round_trip_through_disk(tmp_path):
    importance = random_scores(SMALL)
    importance.save(tmp_path / "new" / "importance.safetensors", manifest("score"))
    loaded = Scores.load(tmp_path / "new" / "importance.safetensors")
    before, after = importance.tensors(), loaded.tensors()
    assert (
        set(after)
        == set(before)
        == {"hidden", "layers"} | {f"{name}.{layer}" for name in ("ffn", "heads") for layer in range(4)}
    )
    for name, row in before.items():
        assert np.array_equal(row, after[name])
        assert row.dtype == np.float32
    assert find_manifest(tmp_path / "new" / "importance.safetensors") == manifest("score")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["importance.safetensors"]


def test_invalid_scores_are_rejected_with_every_reason():
    importance = random_scores(SMALL)
    importance["ffn"][1][2] = np.nan
    importance.layers[0] = np.inf
    with pytest.raises(InputError, match=r"(?s)ffn.1 contains NaN.*layers contains NaN or infinity"):
        make_plan(importance, SMALL, TargetConfig())
    with pytest.raises(
        InputError,
        match=r"(?s)hidden has shape \(48,\), the model needs \(4096,\)"
        r".*ffn has scores of 4 layers, the model needs 32",
    ):
        random_scores(SMALL).check(LLAMA)


def test_plan_round_trips_through_disk(tmp_path):
    plan = make_plan(random_scores(SMALL), SMALL, TargetConfig(num_layers=3, hidden_size=32))
    plan.save(tmp_path / "plan.json", manifest("plan"))
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert find_manifest(tmp_path / "plan.json") == manifest("plan")
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(
        InputError, match=r"plan.json is not a valid plan: extra: .*; correct it, or run "
    ) as bad:
        PrunePlan.load(tmp_path / "plan.json")
    assert "\n" not in str(bad.value)


def test_search_file_of_another_format_is_rejected(tmp_path):
    (tmp_path / "search.json").write_text('{"candidates": [{"name": "l4", "chosen": true}]}')
    with pytest.raises(InputError, match=r"search.json is in another format \(arch: Field required\)") as bad:
        chosen(tmp_path / "search.json")
    assert str(bad.value).endswith("run `minitron-mp search --force` again")


def test_plan_without_merge_field_loads(tmp_path):
    """As a plan may be written by hand."""
    plan = make_plan(
        random_scores(SMALL), SMALL, TargetConfig(num_layers=3, hidden_size=32, num_attention_heads=4)
    )
    plan.save(tmp_path / "plan.json", manifest("plan"))
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content.pop("merge") == {}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert PrunePlan.load(tmp_path / "plan.json") == plan


BY_HAND = {layer: [0, 1, 4, 5] for layer in range(4)}
"""Two heads in each of two query groups."""


@pytest.mark.parametrize(
    ("field", "name", "changes", "message"),
    [
        ("keep", "heads", {0: [0, 1, 2, 4]}, r"heads\[0\] does not keep 2 heads in each of 2 query groups"),
        ("keep", "heads", {3: [0, 1, 2, 3]}, r"heads\[3\] does not keep 2 heads in each of 2 query groups"),
        ("keep", "heads", {3: [0, 1, 4]}, r"keep.heads\[3\] has 3 entries, the student needs 4"),
        ("keep", "heads", {3: [0, 1, 5, 4]}, r"heads\[3\] is not strictly ascending from 0 to 7"),
        ("keep", "heads", {4: [0]}, r"keep.heads has 0, 1, 2, 3, 4, it needs 0, 1, 2, 3"),
        ("keep", "hidden", {NO_LAYER: [1, 0]}, r"keep.hidden has 2 entries, the student needs 48"),
        ("keep", "experts", {0: [0]}, r"keep has hidden, ffn, heads, experts, it needs hidden, ffn, heads"),
        ("merge", "heads", {4: []}, r"merge.heads has 0, 1, 2, 3, 4, it needs 0, 1, 2, 3"),
        (
            "merge",
            "heads",
            {3: [(0, 6)]},
            r"merge.heads\[3\] needs pairs \(kept head, pruned head of the same group",
        ),
        ("merge", "heads", {0: [(2, 3)]}, r"merge.heads\[0\] needs pairs"),
        ("merge", "heads", {0: [(0, 1)]}, r"merge.heads\[0\] needs pairs"),
        ("merge", "heads", {0: [(0, 2), (0, 3)]}, r"each kept head at most once"),
        ("merge", "ffn", {0: []}, r"merge has heads, ffn, it needs heads"),
    ],
)
def test_handwritten_plan_is_validated(field, name, changes, message):
    values = make_plan(random_scores(SMALL), SMALL, TargetConfig(num_attention_heads=4)).model_dump()
    values["keep"]["heads"] = dict(BY_HAND)
    values["merge"] = {"heads": {layer: [(1, 2), (0, 3)] for layer in range(4)}}
    assert PrunePlan.model_validate(values).merge["heads"][0] == [(1, 2), (0, 3)]
    changed = {**values[field].get(name, {}), **changes}
    with pytest.raises(ValueError, match=message):
        PrunePlan.model_validate({**values, field: {**values[field], name: changed}})


def test_new_axis_is_planned_validated_and_reported_by_its_row(monkeypatch):
    """Only the table changes. The new axis has as many units as there are neurons.

    ranks/test_importance.py scores one.
    """
    monkeypatch.setitem(AXES, "twin", dataclasses.replace(FFN, name="twin", dims={}))
    scores = random_scores(SMALL)
    plan = make_plan(scores, SMALL, TargetConfig(ffn_hidden_size=64))
    assert plan.keep["twin"] == {
        layer: top_indices(row, 64).tolist() for layer, row in scores["twin"].items()
    }
    assert PrunePlan.model_validate(plan.model_dump()) == plan
    texts = [part for part in pruned_section(plan, scores).parts if isinstance(part, str)]
    assert any("twin" in text for text in texts)
    keep = {name: kept for name, kept in plan.keep.items() if name != "twin"}
    with pytest.raises(ValueError, match="keep has hidden, ffn, heads, it needs hidden, ffn, heads, twin"):
        PrunePlan.model_validate({**plan.model_dump(), "keep": keep})


def test_layers_may_keep_different_numbers_of_units():
    values = make_plan(random_scores(SMALL), SMALL, TargetConfig(num_attention_heads=4)).model_dump()
    block = SMALL.block.model_copy(update={"num_attention_heads": 4})
    narrow = block.model_copy(update={"ffn_hidden_size": 32, "num_attention_heads": 2})
    values["student"] = SMALL.model_copy(update={"blocks": (narrow, block, block, block)})
    values["keep"]["ffn"][0] = list(range(32))
    values["keep"]["heads"] = {**BY_HAND, 0: [3, 7]}
    plan = PrunePlan.model_validate(values)
    assert [plan.units(FFN, layer).size for layer in range(4)] == [32, 96, 96, 96]
    assert {row[0]: row[2] for row in plan.summary()}["num_attention_heads"] == "3.5"
    values["keep"]["ffn"][1] = list(range(32))
    with pytest.raises(ValueError, match=r"keep.ffn\[1\] has 32 entries, the student needs 96"):
        PrunePlan.model_validate(values)


@pytest.mark.parametrize("num_layers", [0, None, "2"])
def test_num_layers_must_be_a_positive_integer(num_layers):
    fields = {**NEMO.model_dump(), "num_layers": num_layers}
    with pytest.raises(ValueError, match="not a positive integer"):
        Arch(**fields)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_plan_damaged_by_hand_is_rejected_in_one_line(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match=r"plan\.json .*minitron-mp plan --force"):
        PrunePlan.load(tmp_path / "plan.json")
