"""Scores and plans are independent of the layout and match a plain implementation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from cases import (
    ALL_PAIRS,
    ARCHS,
    BY_NAME,
    CASES,
    DEFAULT_PAIR,
    IDS,
    LAYOUTS_OF_ALL_PAIRS,
    make_samples,
    targets,
)

from minitron_mp.config.pruning import TargetConfig
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.ranking import top_indices
from minitron_mp.pruning.scores import Scores

ROUNDING = 1e-5
"""Relative error of reordered float32 sums over differently rounded activations; 9e-7 seen."""

cases = pytest.mark.parametrize(("arch", "layout"), CASES, ids=IDS)


def assert_close(ours, want, tolerance, pair=DEFAULT_PAIR, *, of_row=False):
    """Assert that each score is within a relative tolerance.

    A variance is a small difference of large numbers, so its tolerance is relative to the largest
    in its row.
    of_row: use that for all scores, where a squared ReLU leaves neurons near zero.
    """
    assert set(ours) == set(want)
    for kind in want:
        scale = np.abs(want[kind]).max(-1, keepdims=True) if "var" in pair or of_row else np.abs(want[kind])
        difference = (np.abs(ours[kind] - want[kind]) / scale).max()
        assert difference < tolerance, f"{kind}: differs by {difference:.2e}"


@cases
def test_scores_match_one_rank(results, arch, layout):
    want = results.pruned(arch, BY_NAME["one"])[0]["scores"][DEFAULT_PAIR]
    for rank in results.pruned(arch, layout):
        assert_close(rank["scores"][DEFAULT_PAIR], want, ROUNDING, of_row=not ARCHS[arch].gated)


@pytest.mark.parametrize("layout", LAYOUTS_OF_ALL_PAIRS)
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-".join)
def test_scores_match_one_rank_for_every_aggregation(results, pair, layout):
    want = results.pruned("qwen3", BY_NAME["one"])[0]["scores"][pair]
    for rank in results.pruned("qwen3", BY_NAME[layout]):
        assert_close(rank["scores"][pair], want, ROUNDING, pair)


@cases
def test_all_ranks_have_identical_scores_and_plan(results, arch, layout):
    want, by_rank = results.pruned(arch, BY_NAME["one"])[0]["plans"], results.pruned(arch, layout)
    for rank in by_rank:
        for pair, scores in rank["scores"].items():
            for kind in scores:
                assert np.array_equal(scores[kind], by_rank[0]["scores"][pair][kind]), (pair, kind)
        names = targets(ARCHS[arch], layout.tp)
        assert {name: rank["plans"][name] for name in names} == {name: want[name] for name in names}
    # Otherwise equal plans would be luck: a cut between two scores that rounding may order the
    # other way.
    assert not [note for plan in want.values() for note in plan.notes]


@cases
def test_scoring_leaves_the_model_unchanged(results, arch, layout):
    """No hook stays, and the same input gives bitwise the same logits."""
    assert all(rank["unchanged"] for rank in results.pruned(arch, layout))


@pytest.mark.parametrize("layout", ["one", "tp2-pp2-vpp2-sp"])
def test_failed_scoring_removes_its_hooks(results, ranks, layout):
    """vpp: the model is in two chunks."""
    case = BY_NAME[layout]
    for text, left in ranks(
        case.ranks,
        "model_workers.fail_while_scoring",
        layout=case,
        arch=ARCHS["qwen3"],
        teacher=results.teacher("qwen3"),
    ):
        assert (text, left) == ("stopped by the test", 0)


@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_new_axis_is_scored_by_its_row(results, ranks, layout):
    """Only the table changes. The scores of the other axes stay bitwise."""
    case = BY_NAME[layout]
    by_rank = ranks(
        case.ranks,
        "importance_workers.score_with_a_new_axis",
        layout=case,
        arch=ARCHS["qwen3"],
        teacher=results.teacher("qwen3"),
    )
    before = results.pruned("qwen3", case)[0]["scores"][DEFAULT_PAIR]
    for scores in by_rank:
        twin = {name: scores.pop(name) for name in list(scores) if name.startswith("twin.")}
        assert len(twin) == ARCHS["qwen3"].num_layers
        assert all(np.array_equal(row, scores[name.replace("twin", "ffn")]) for name, row in twin.items())
        assert scores.keys() == before.keys()
        assert all(np.array_equal(scores[name], before[name]) for name in before)


@pytest.mark.parametrize("layout", ["cp2", "tp2-sp"])
def test_maximum_over_a_split_sequence(results, ranks, layout):
    """A row whose ranks are combined by the maximum has the same scores for every layout."""
    one, split = (
        ranks(
            BY_NAME[name].ranks,
            "importance_workers.score_by_maximum",
            layout=BY_NAME[name],
            arch=ARCHS["qwen3"],
            teacher=results.teacher("qwen3"),
        )
        for name in ("one", layout)
    )
    for scores in split:
        assert_close(scores, one[0], ROUNDING)


def test_bf16_scores_are_close_to_float32(results, ranks):
    layout = BY_NAME["tp2-sp"]
    want = results.pruned("qwen3", BY_NAME["one"])[0]["scores"][DEFAULT_PAIR]
    by_rank = ranks(
        layout.ranks,
        "model_workers.score_in_bf16",
        layout=layout,
        arch=ARCHS["qwen3"],
        teacher=results.teacher("qwen3"),
    )
    for scores in by_rank:
        # bf16 has 8 bits: each of the 2 x 6 sublayers adds a relative error of about 2^-9, and
        # means over tokens cancel a part of it.
        assert_close(scores, want, 0.03)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, ranks):
    """A small transformers Llama, its scores by plain float64 hooks, and our scores on one rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 36,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=131,
            max_position_embeddings=256,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.3)
    model.save_pretrained(folder / "hf")
    arch = ranks(1, "model_workers.write_hugging_face", folder=folder / "teacher", source=folder / "hf")[0]
    samples = make_samples(arch, 0, 8)
    ours = ranks(
        1,
        "model_workers.score_checkpoint",
        arch=arch,
        folder=folder / "teacher",
        samples=samples,
        pairs=ALL_PAIRS,
    )[0]
    return arch, reference.PlainImportance(model.double(), samples["tokens"]), ours


@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-".join)
def test_scores_match_plain_implementation_on_transformers(plain, pair):
    """2407.14679 section 2.2, and the same kept indices. pair: (batch, sequence)."""
    arch, reference_scores, ours = plain
    want = reference_scores.scores(*pair)
    assert_close(ours[pair], want, 1e-4, pair)  # ours ran in float32, the reference in float64
    assert_same_plans(arch, ours[pair], want)


def assert_same_plans(arch, ours, want):
    sizes = {"num_layers": arch.num_layers - 1, "num_query_groups": arch.num_query_groups - 1}
    sizes |= {"num_attention_heads": 2 * sizes["num_query_groups"], "merge_heads": True}
    sizes |= {name: getattr(arch, name) // 8 * 5 for name in ("hidden_size", "ffn_hidden_size")}
    mine, plain = (
        make_plan(Scores.from_tensors(scores), arch, TargetConfig(align=1, **sizes))
        for scores in (ours, want)
    )
    assert not plain.notes, "a cut within rounding would make this luck"
    assert mine == plain


@pytest.mark.slow
@pytest.mark.skipif(
    "MINITRON_SMOLLM2" not in os.environ,
    reason="set MINITRON_SMOLLM2 to a Hugging Face folder of SmolLM2-135M",
)
def test_real_model_logits_match_transformers(tmp_path, ranks):
    """Float32 on both sides; logits up to 34."""
    from transformers import AutoModelForCausalLM

    source = Path(os.environ["MINITRON_SMOLLM2"])
    arch = ranks(1, "model_workers.write_hugging_face", folder=tmp_path / "teacher", source=source)[0]
    ours = ranks(
        1, "model_workers.load_and_run", layout=BY_NAME["one"], models={"it": (arch, tmp_path / "teacher")}
    )[0]["it"]
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(
            make_samples(arch, 0, 8)["tokens"]
        ).logits
    difference = (ours[..., : arch.vocab_size] - want).abs().max()
    print("largest difference of a logit", difference, "largest logit", want.abs().max())
    assert difference < 2e-4


@pytest.mark.slow
@pytest.mark.skipif(
    "MINITRON_SMOLLM2" not in os.environ,
    reason="set MINITRON_SMOLLM2 to a Hugging Face folder of SmolLM2-135M",
)
def test_real_model_scores_match_plain_implementation(tmp_path, ranks):
    """On text: the source of this file, in float32 on both sides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(os.environ["MINITRON_SMOLLM2"])
    text = AutoTokenizer.from_pretrained(source)(Path(__file__).read_text(), return_tensors="pt")[
        "input_ids"
    ][0]
    samples = text[: 8 * 128].view(8, 128)
    want = reference.PlainImportance(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), samples
    ).scores(*DEFAULT_PAIR)
    arch = ranks(1, "model_workers.write_hugging_face", folder=tmp_path / "teacher", source=source)[0]
    positions = torch.arange(128).expand(8, 128).contiguous()
    batch = {"tokens": samples, "labels": samples, "position_ids": positions, "loss_mask": torch.ones(8, 128)}
    ours = ranks(
        1,
        "model_workers.score_checkpoint",
        arch=arch,
        folder=tmp_path / "teacher",
        samples=batch,
        pairs=[DEFAULT_PAIR],
    )[0][DEFAULT_PAIR]
    for kind in ours:
        print(kind, np.abs(ours[kind] / want[kind] - 1).max())
    assert_close(ours, want, 1e-4)  # both float32, by other kernels over 30 layers
    keep = {"hidden": 384, "layers": 24} | {f"ffn.{layer}": 1024 for layer in range(arch.num_layers)}
    for kind, count in keep.items():
        assert np.array_equal(top_indices(ours[kind], count), top_indices(want[kind], count)), kind
