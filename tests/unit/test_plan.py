"""Sizes, ranking and targets. Published numbers are from arXiv 2408.11796, tables 1 and 3."""

import json
import time

import numpy as np
import pytest

from minitron_mp.artifacts.manifest import Manifest, find_manifest
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch, BlockArch, expand, layout_problems
from minitron_mp.models.blocks.dense import ATTENTION, MLP, PARAMETERS
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.export import export_problems, exportable_arch
from minitron_mp.models.parameters import FINAL_NORM_BIAS, MODEL_PARAMETERS, dims_of, layer_key, split_key
from minitron_mp.pruning.plan import PrunePlan, make_plan
from minitron_mp.pruning.ranking import top_indices
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.target import resolve_target


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


def random_importance(arch: Arch, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    shapes = (
        (arch.num_layers, arch.ffn_hidden_size),
        (arch.num_layers, arch.num_attention_heads),
        (arch.hidden_size,),
        (arch.num_layers,),
    )
    return Scores(*(random.random(shape).astype(np.float32) for shape in shapes))


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


def test_expand_keeps_every_key_and_value():
    """8 heads in 2 groups are q0 q1 q2 q3 k0 v0 q4 q5 q6 q7 k1 v1."""
    keep = np.array([0, 3, 4, 5])
    one_row_a_head = make_arch(kv_channels=1)
    assert expand("qkv", keep, one_row_a_head).tolist() == [0, 3, 4, 5, 6, 7, 10, 11]
    assert expand("heads", keep, one_row_a_head).tolist() == keep.tolist()
    slots = np.array([0, 3, 4, 5, 6, 7, 10, 11])
    assert expand("qkv", keep, SMALL).tolist() == [
        row for slot in slots for row in range(6 * slot, 6 * slot + 6)
    ]
    assert expand("heads", keep, SMALL).tolist() == [
        row for head in keep for row in range(6 * head, 6 * head + 6)
    ]
    assert expand("gate_up", np.array([0, 95]), SMALL).tolist() == [0, 95, 96, 191]
    assert expand("ffn", np.array([0, 95]), SMALL).tolist() == [0, 95]


def test_expand_drops_key_and_value_of_groups_without_heads():
    one_row_a_head = make_arch(kv_channels=1)
    assert expand("qkv", np.array([4, 5, 7]), one_row_a_head).tolist() == [6, 7, 9, 10, 11]
    assert expand("qkv", np.array([1]), one_row_a_head).tolist() == [1, 4, 5]
    assert expand("heads", np.array([4, 5, 7]), one_row_a_head).tolist() == [4, 5, 7]


@pytest.mark.parametrize("axis", ["qkv", "heads", "gate_up", "ffn", "hidden"])
def test_expanding_all_indices_is_the_identity(axis):
    units = {"qkv": 8, "heads": 8, "gate_up": 96, "ffn": 96, "hidden": 48}[axis]
    assert expand(axis, np.arange(units), SMALL).tolist() == list(range(SMALL.dim_size(axis)))


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
    importance = random_importance(SMALL)
    plan = make_plan(
        importance,
        SMALL,
        TargetConfig(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    )
    assert plan.layers == sorted(np.argsort(-importance.layers)[:3])
    assert plan.hidden == sorted(np.argsort(-importance.hidden)[:32])
    for row, layer in enumerate(plan.layers):
        assert plan.ffn[row] == sorted(np.argsort(-importance.ffn[layer])[:64])
        groups = importance.heads[layer].reshape(2, 4)
        assert plan.heads[row] == sorted(
            g * 4 + h for g in range(2) for h in np.argsort(-groups[g])[:2]
        )  # as many in every group
        assert plan.keep("qkv", layer).tolist() == plan.keep("heads", layer).tolist() == plan.heads[row]
        assert plan.keep("gate_up", layer).tolist() == plan.ffn[row]
    assert plan.keep("vocab").tolist() == list(range(SMALL.padded_vocab_size))
    assert plan.keep("hidden").dtype == plan.keep("ffn", plan.layers[0]).dtype == np.int64
    assert plan.notes == []


def test_empty_target_is_the_identity_plan():
    plan = make_plan(random_importance(SMALL), SMALL, TargetConfig())
    assert plan.student == SMALL
    assert plan.hidden == list(range(48))
    assert plan.layers == list(range(4))
    assert plan.ffn == [list(range(96))] * 4
    assert plan.heads == [list(range(8))] * 4


GROUPED = make_arch(num_attention_heads=24, num_query_groups=4)
"""6 heads a group."""


def test_dropping_a_query_group_drops_its_heads():
    importance = random_importance(GROUPED)
    plan = make_plan(importance, GROUPED, TargetConfig(num_query_groups=2))
    assert (plan.student.num_query_groups, plan.student.num_attention_heads) == (2, 12)
    cut = make_plan(importance, GROUPED, TargetConfig(num_query_groups=2, num_attention_heads=6))
    for layer in range(GROUPED.num_layers):
        groups = importance.heads[layer].reshape(4, 6)
        best = sorted(range(4), key=lambda g: -sum(float(score) ** 2 for score in groups[g]))[:2]
        assert plan.heads[layer] == [6 * g + h for g in sorted(best) for h in range(6)]
        assert cut.heads[layer] == [
            6 * g + h for g in sorted(best) for h in sorted(np.argsort(-groups[g])[:3])
        ]
    assert {row[0]: row[1:] for row in plan.summary()}["num_query_groups"] == ("4", "2", "50%")


def test_multi_head_attention_drops_heads_with_key_and_value():
    """Multi-head attention: each head is a group."""
    teacher, importance = make_arch(num_query_groups=8), random_importance(SMALL)
    plan = make_plan(importance, teacher, TargetConfig(num_query_groups=5))
    assert (plan.student.num_query_groups, plan.student.num_attention_heads) == (5, 5)
    assert plan.heads == [top_indices(row, 5).tolist() for row in importance.heads]


@pytest.mark.parametrize("keep", [5, 4, 3, 2, 1])
def test_merged_heads_are_mirrored_at_the_cut(keep):
    """head_i += head_i - head_(2K-i+1), 1-based by importance.

    Pruned heads past 2K have no partner.
    """
    importance = random_importance(GROUPED)
    plan = make_plan(importance, GROUPED, TargetConfig(num_attention_heads=4 * keep, merge_heads=True))
    for layer, pairs in enumerate(plan.merge):
        want = set()
        for group in range(4):
            ranked = {
                i: group * 6 + int(h)
                for i, h in enumerate(np.argsort(-importance.heads[layer].reshape(4, 6)[group]), 1)
            }
            want |= {
                (ranked[i], ranked[2 * keep - i + 1]) for i in range(max(1, keep - (6 - keep) + 1), keep + 1)
            }
        assert set(pairs) == want
        assert len(pairs) == len(want) == 4 * min(keep, 6 - keep)


def test_heads_merge_only_in_kept_groups():
    importance = random_importance(GROUPED)
    plan = make_plan(
        importance, GROUPED, TargetConfig(num_query_groups=1, num_attention_heads=4, merge_heads=True)
    )
    for heads, pairs in zip(plan.heads, plan.merge):
        assert len(pairs) == 2
        assert {head // 6 for pair in pairs for head in pair} == {heads[0] // 6}
    assert make_plan(importance, GROUPED, TargetConfig(num_attention_heads=16)).merge == []


def test_summary_has_sizes_and_parameters():
    rows = {
        row[0]: row[1:]
        for row in make_plan(random_importance(SMALL), SMALL, TargetConfig(hidden_size=32)).summary()
    }
    assert rows["hidden_size"] == ("48", "32", "67%")
    assert rows["parameters"][0] == f"{SMALL.num_parameters():,}"


def test_close_cuts_are_reported():
    importance = random_importance(SMALL)
    importance.hidden[:] = np.arange(48, 0, -1)
    importance.layers[:] = [4, 2, 3, 1]
    importance.hidden[32] = importance.hidden[31] * (1 - 2e-7)
    importance.ffn[0, :] = 1.0  # layer 0 stays
    importance.ffn[3, :] = 1.0  # layer 3 goes: its cut decides nothing
    importance.heads[2, 4:] = [1, 0.5, 0.5, 0.1]
    plan = make_plan(
        importance,
        SMALL,
        TargetConfig(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    )
    assert [note.split(":")[0] for note in plan.notes] == ["hidden", "ffn of layer 0", "heads of layer 2"]
    assert "last kept and first cut score are 17 and 16.9999" in plan.notes[0]
    assert plan.ffn[0] == list(range(64))
    assert make_plan(importance, SMALL, TargetConfig()).notes == []  # nothing is cut
    importance.heads[0] = [1, 2, 3, 4, 4, 3, 2, 1]
    notes = make_plan(importance, SMALL, TargetConfig(num_query_groups=1)).notes
    assert len(notes) == 1
    assert notes[0].startswith("query groups of layer 0: the last kept and first cut score are 5.4772")
    importance.heads[0], importance.heads[2] = [3, 2, 1, 0, 4, 4, 2, 1], importance.heads[1]
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
        "heads of layer 0: two scores whose order says what is merged are 4 and 4, nearer than rounding"
    ]


@pytest.mark.parametrize(
    ("target", "tp", "message"),
    [
        (
            {"hidden_size": 40},
            1,
            r"hidden_size 40 is no multiple of 16 \(align 16\); nearest that work: 32 or 48",
        ),
        ({"hidden_size": 64}, 1, r"hidden_size 64 is larger than the teacher's 48"),
        ({"hidden_size": 8}, 1, r"hidden_size 8 .* nearest that work: 16"),
        (
            {"ffn_hidden_size": 80},
            2,
            r"ffn_hidden_size 80 is no multiple of 32 \(align 16 x tp 2\); nearest that work: 64 or 96",
        ),
        (
            {"num_attention_heads": 5},
            1,
            r"num_attention_heads 5 is no multiple of 2 \(the query groups\); "
            r"nearest that work: 4 or 6, or cut num_q",
        ),
        ({"num_query_groups": 3}, 1, r"num_query_groups 3 is larger than the teacher's 2"),
        (
            {"num_query_groups": 1},
            2,
            r"num_query_groups 1 is no multiple of 2 \(tp 2\); nearest that work: 2",
        ),
        (
            {"num_query_groups": 1, "num_attention_heads": 6},
            1,
            r"num_attention_heads 6 in 1 query groups are more a group than the teacher's 4; at most 4",
        ),
        (
            {"hidden_size": 32, "merge_heads": True},
            1,
            r"merge_heads: each query group that stays keeps its 4 heads, .* give fewer num_attention_heads",
        ),
        ({"num_query_groups": 1, "merge_heads": True}, 1, r"nothing to merge; drop it"),
        ({"keep": 0.75, "merge_heads": True}, 1, r"nothing to merge; drop it"),
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
            r"no student along \['ffn'\] has at most 20,000 parameters; .*cut hidden too",
        ),
        ({"keep": 0.5, "axes": ["ffn", "layer"]}, 1, r"mixes width and depth"),
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


def test_llama_export_rule_suggests_mistral():
    student = LLAMA.resized(hidden_size=3088)
    assert export_problems(NEMO.resized(hidden_size=3088)) == []
    with pytest.raises(
        InputError,
        match=r"hidden_size 3088 .*num_attention_heads 32; "
        r"nearest hidden_size 3072, or set export\.family: mistral",
    ):
        exportable_arch(student, None)
    assert exportable_arch(student, "mistral") == student.resized(family="mistral")
    with pytest.raises(InputError, match="scales its rotary frequencies"):
        exportable_arch(student.resized(rope_scaling_factor=8.0), "mistral")
    with pytest.raises(
        InputError, match=r"export\.family qwen2: .* family llama is written as llama or mistral only"
    ):
        exportable_arch(student, "qwen2")
    with pytest.raises(InputError, match=r"export\.family gpt: .* is written as llama or mistral only"):
        exportable_arch(student, "gpt")


def test_model_whose_layers_differ_cannot_be_exported():
    narrow = BlockArch(ffn_hidden_size=48, num_attention_heads=8, num_query_groups=2)
    mixed = SMALL.resized(blocks=[*SMALL.blocks[:3], narrow])
    for family in FAMILIES:
        with pytest.raises(InputError, match=r"the layers differ in size.*give one size for all layers"):
            exportable_arch(mixed.resized(family=family), None)


def test_scores_round_trip_through_disk(tmp_path):
    importance = random_importance(SMALL)
    importance.save(tmp_path / "new" / "importance.safetensors", manifest("score"))
    loaded = Scores.load(tmp_path / "new" / "importance.safetensors")
    assert all(
        np.array_equal(value, vars(loaded)[name]) and value.dtype == np.float32
        for name, value in vars(importance).items()
    )
    assert find_manifest(tmp_path / "new" / "importance.safetensors") == manifest("score")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["importance.safetensors"]


def test_invalid_scores_are_rejected_with_every_reason():
    importance = random_importance(SMALL)
    importance.ffn[1, 2] = np.nan
    importance.layers[0] = np.inf
    with pytest.raises(InputError, match=r"(?s)ffn holds a NaN.*layers holds a NaN or an infinity"):
        make_plan(importance, SMALL, TargetConfig())
    with pytest.raises(
        InputError,
        match=r"(?s)ffn has shape \(4, 96\), the model needs \(32, 14336\).*hidden has shape \(48,\)",
    ):
        random_importance(SMALL).check(LLAMA)


def test_plan_round_trips_through_disk(tmp_path):
    plan = make_plan(random_importance(SMALL), SMALL, TargetConfig(num_layers=3, hidden_size=32))
    plan.save(tmp_path / "plan.json", manifest("plan"))
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert find_manifest(tmp_path / "plan.json") == manifest("plan")
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(InputError, match="extra"):
        PrunePlan.load(tmp_path / "plan.json")


def test_plan_without_merge_field_loads(tmp_path):
    """As plans were written before there were merged heads and cut query groups."""
    plan = make_plan(
        random_importance(SMALL), SMALL, TargetConfig(num_layers=3, hidden_size=32, num_attention_heads=4)
    )
    plan.save(tmp_path / "plan.json", manifest("plan"))
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content.pop("merge") == []
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert PrunePlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": [[0, 1, 2, 4]] * 4}, r"heads\[0\] does not keep 2 heads in each of 2 query groups"),
        ({"heads": [[0, 1, 2, 3]] * 4}, r"heads\[3\] does not keep 2 heads in each of 2 query groups"),
        ({"merge": [[(0, 2)]]}, r"merge has 1 rows for 4 layers"),
        (
            {"merge": [[]] * 3 + [[(0, 6)]]},
            r"merge\[3\] is not \(kept head, pruned head of the same query group\)",
        ),
        ({"merge": [[(2, 3)]] * 4}, r"merge\[0\] is not"),
        ({"merge": [[(0, 1)]] * 4}, r"merge\[0\] is not"),
        ({"merge": [[(0, 2), (0, 3)]] * 4}, r"each kept head at most once"),
    ],
)
def test_handwritten_plan_is_validated(changes, message):
    plan = make_plan(random_importance(SMALL), SMALL, TargetConfig(num_attention_heads=4)).model_copy(
        update={"heads": [[0, 1, 4, 5]] * 4}
    )
    values = plan.model_dump()
    assert PrunePlan.model_validate({**values, "merge": [[(1, 2), (0, 3)]] * 4}).merge[0] == [(1, 2), (0, 3)]
    with pytest.raises(ValueError, match=message):
        PrunePlan.model_validate({**values, **changes})
