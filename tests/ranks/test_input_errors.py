"""Invalid input raises InputError on every rank with a helpful message, and no rank hangs."""

from __future__ import annotations

import pytest
from cases import ARCHS, BY_NAME, Layout


def refusals(ranks, layout, name, **case):
    """The message on each rank; every rank must have one."""
    messages = ranks(layout.ranks, f"input_errors_workers.{name}", layout=layout, **case)
    assert all(messages), (
        f"not refused on ranks {[number for number, text in enumerate(messages) if not text]}: {messages}"
    )
    return messages


def test_layout_must_divide_the_world_size(ranks):
    layout = Layout("tp4-on-2", 2, {"tp": 2, "pp": 2})
    for message in refusals(ranks, layout, "model", arch=ARCHS["qwen3"]):
        assert "tp 2 x pp 2 x cp 1 needs a multiple of 4 ranks, this job has 2" in message


def test_all_sizes_that_tp_does_not_divide_are_listed(ranks):
    odd = ARCHS["llama"].resized(ffn_hidden_size=111, num_layers=1)
    for message in refusals(ranks, BY_NAME["tp2-pp2-sp"], "model", arch=odd):
        for problem in (
            "num_attention_heads 9",
            "num_query_groups 3",
            "ffn_hidden_size 111",
            "2 pipeline stages",
        ):
            assert problem in message


@pytest.mark.parametrize(
    ("key", "layer", "where"),
    [
        ("mlp.linear_fc1.weight", 4, "layer 4 (MLP)"),
        ("self_attention.linear_qkv.weight", 1, "layer 1 (attention)"),
    ],
)
@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "cp2-dp2"])
def test_nonfinite_activations_are_named_by_layer(ranks, results, layout, key, layer, where):
    """Under pp 2 only one stage sees it."""
    case = {"arch": ARCHS["qwen3"], "teacher": results.teacher("qwen3"), "key": key, "layer": layer}
    for message in refusals(ranks, BY_NAME[layout], "scores", **case):
        assert where in message


def test_checkpoint_of_another_architecture(ranks, results):
    other = ARCHS["qwen3"].resized(hidden_size=48)
    for message in refusals(
        ranks, BY_NAME["tp2-pp2-sp"], "checkpoint", arch=other, folder=results.teacher("qwen3")
    ):
        assert f"{results.teacher('qwen3')} is damaged or not a checkpoint of this model" in message
        assert "linear_qkv.layer_norm_weight" in message


def test_checkpoint_with_missing_weights(ranks, results):
    """The model has biases and an untied output layer; the checkpoint has neither."""
    other = ARCHS["qwen2"].model_copy(update={"tied": False})
    for message in refusals(
        ranks, BY_NAME["tp2-pp2-sp"], "checkpoint", arch=other, folder=results.teacher("qwen3")
    ):
        assert f"{results.teacher('qwen3')} is damaged or not a checkpoint of this model" in message
        assert "linear_qkv.bias" in message


def test_folder_that_is_not_a_checkpoint(ranks, tmp_path):
    for message in refusals(
        ranks, BY_NAME["tp2"], "checkpoint", arch=ARCHS["qwen3"], folder=tmp_path / "nothing"
    ):
        assert "nothing is damaged or not a checkpoint of this model" in message


def test_too_few_microbatches_for_interleaved_schedule(ranks, results):
    for message in refusals(
        ranks,
        BY_NAME["pp2-vpp2"],
        "too_few_microbatches",
        arch=ARCHS["qwen3"],
        teacher=results.teacher("qwen3"),
    ):
        assert "multiple of pp 2 microbatches" in message
        assert "given 3" in message


def test_parameter_without_a_known_axis(ranks, results):
    for message in refusals(
        ranks, BY_NAME["tp2"], "parameter", arch=ARCHS["qwen3"], teacher=results.teacher("qwen3")
    ):
        assert "decoder.layers.0.mlp.unheard_of.weight" in message


def test_pruning_a_ddp_wrapped_model(ranks, results):
    for message in refusals(
        ranks, BY_NAME["dp2"], "wrapped", arch=ARCHS["qwen3"], teacher=results.teacher("qwen3")
    ):
        assert "prune it before it is wrapped" in message


def test_checkpoints_of_another_run(ranks, results, tmp_path):
    """Found by rank 0 alone, and refused by all."""
    case = {
        "arch": ARCHS["qwen3"],
        "teacher": results.teacher("qwen3"),
        "checkpoints": tmp_path / "checkpoints",
    }
    for message in refusals(ranks, BY_NAME["tp2"], "resume", **case):
        assert "settings.lr: 1, here 2" in message


def test_nonfinite_loss(ranks, results, tmp_path):
    case = {
        "arch": ARCHS["qwen3"],
        "teacher": results.teacher("qwen3"),
        "checkpoints": tmp_path / "checkpoints",
    }
    for message in refusals(ranks, BY_NAME["pp2-dp2"], "loss", **case):
        assert "1 steps in a row have a gradient or loss that is not finite, max_skipped allows 0" in message
        assert "step 1 has gradient norm nan; the divergence of the student is nan on rank" in message


def test_full_disk_on_one_rank(ranks, tmp_path):
    """everyone(): the rank that failed says why, the others that another failed."""
    messages = refusals(ranks, BY_NAME["dp2"], "by_one")
    assert messages == ["another rank failed: rank 1: the disk is full", "the disk is full"]


def test_ranks_wait_for_slow_rank_0_beyond_the_collective_timeout(ranks):
    assert ranks(2, "model_workers.wait_for_slow_main", seconds=3.0, patience_s=1.0) == [[0, 1], [0, 1]]
