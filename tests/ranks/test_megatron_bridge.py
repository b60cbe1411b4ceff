"""Megatron-Bridge: converters, distillation with its pretrain(), pruning of its models.

docs/megatron_bridge.md has the installation. Bridge 0.6 imports Transformer Engine and CUDA where it does
not need them; bridge_shims.py replaces them. The tests are slow and outside the default
environment: the ranks import Bridge first, which takes a minute on a busy machine.
"""

import importlib.util

import pytest

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("Megatron-Bridge is not installed (docs/megatron_bridge.md)", allow_module_level=True)

import numpy as np
import torch
from pool import Pool
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen3": {}, "nemotron": {}, "gemma": {}}
CONSTANT = [
    "train.train_iters=3",
    "scheduler.lr_warmup_iters=0",
    "scheduler.lr_decay_style=constant",
    "optimizer.min_lr=1e-4",
]


@pytest.fixture(scope="module")
def four():
    """Ranks with Bridge and the shims. They are spawned, because forked ones lack the shims."""
    pool = Pool(4, {})
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    root, made = tmp_path_factory.mktemp("bridge"), {}
    for family, own in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **own))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(1, 0.3)
        made[family] = root / family
        model.save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def project(four, folders, tmp_path_factory):
    """teacher/ and student/."""
    root = tmp_path_factory.mktemp("project")
    assert four.run("megatron_bridge_workers.prepare", source=folders["llama"], folder=root)[0] == (4, 4)
    return root


@pytest.fixture(scope="module")
def by_hand(four, project):
    """Return (microbatches of Bridge's data loader on one replica, our results on them)."""
    _, seen = four.run(
        "megatron_bridge_workers.pretrain", folder=project, tp=2, pp=2, overrides=CONSTANT, spy=True
    )[0]
    rows = four.run("megatron_bridge_workers.train_by_hand", folder=project, batches=seen, steps=3)[0]
    assert rows[2]["forward_kl"] < rows[0]["forward_kl"]
    return seen, rows


def test_converters_agree_in_every_tensor_at_tp2_pp2(four, folders, tmp_path):
    """Bitwise, on each rank; and what Bridge writes of our checkpoint is what was read."""
    sources = {family: folder for family, folder in folders.items() if family != "gemma"}
    for rank in four.run(
        "megatron_bridge_workers.compare_converters", tp=2, pp=2, sources=sources, folder=tmp_path
    ):
        assert {family: differ for family, (_, differ) in rank.items() if differ} == {}
        assert rank.keys() == sources.keys()
        assert min(count for count, _ in rank.values()) >= 12  # two layers, and an end
    for family, source in sources.items():
        before, after = (
            load_file(source / "model.safetensors"),
            load_file(tmp_path / f"{family}_hf" / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), family


def test_scores_of_bridge_model_match_our_model(four, folders, tmp_path):
    assert (
        max(
            four.run(
                "megatron_bridge_workers.compare_scores", tp=2, pp=2, source=folders["llama"], folder=tmp_path
            )
        )
        < 1e-4
    )


@pytest.mark.parametrize(
    ("tp", "pp", "more"),
    [
        (2, 2, {"sequence_parallel": True}),
        (1, 4, {}),
        (1, 1, {"overrides": ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"]}),
        (1, 2, {"api": "config"}),
        (2, 1, {"overrides": ["validation.eval_interval=2", "validation.eval_iters=1"]}),
    ],
    ids=["tp2-pp2-sp", "pp4", "dp4-overlap", "pp2-dp2-model-config", "tp2-dp2-evaluation"],
)
def test_pretrain_matches_our_trainer(four, project, by_hand, tp, pp, more):
    """The example's recipe in Bridge's loop gives the losses and gradient norms of our trainer."""
    options = {**more, "overrides": CONSTANT + more.get("overrides", [])}
    same_as(
        by_hand[1], four.run("megatron_bridge_workers.pretrain", folder=project, tp=tp, pp=pp, **options)[-1]
    )


def test_bf16_pretrain_is_close_to_our_trainer(four, project, by_hand):
    """Float16Module wraps the student, and the hidden states must not be float32.

    The tolerance is that of 8 bits over 4 layers.
    """
    same_as(
        by_hand[1],
        four.run(
            "megatron_bridge_workers.pretrain",
            folder=project,
            tp=1,
            pp=2,
            precision="bf16",
            overrides=CONSTANT,
        )[-1],
        rel=0.03,
    )


def test_pretrain_with_remote_teacher(four, project, by_hand):
    """Bridge sees a world of the student's two ranks (pp 2); the teacher (tp 2) streams to it."""
    seen, rows = by_hand
    same_as(
        rows,
        four.run(
            "megatron_bridge_workers.pretrain_beside_teacher",
            folder=project,
            batches=seen,
            overrides=CONSTANT,
        )[1],
    )


def test_pretrain_with_remote_teacher_resumes(four, project, by_hand, tmp_path):
    """Bridge saves the student after step 2. A new job loads it, and a new teacher serves step 3."""
    seen, rows = by_hand
    options = {"folder": project, "batches": seen}
    saved = [*CONSTANT, f"checkpoint.save={tmp_path}", "checkpoint.save_interval=2"]
    whole = four.run("megatron_bridge_workers.pretrain_beside_teacher", overrides=saved, **options)[1]
    same_as(rows, whole)
    assert len(seen) % 3 == 0
    resumed = four.run(
        "megatron_bridge_workers.pretrain_beside_teacher",
        overrides=[*CONSTANT, f"checkpoint.load={tmp_path}", "checkpoint.ckpt_step=2"],
        first_microbatch=len(seen) // 3 * 2,
        **options,
    )[1]
    assert resumed == whole[2:]


def same_as(rows, found, rel=1e-4):
    """rel: of sums in another order over three steps; 1e-6 seen."""
    assert len(found) == len(rows)
    for a, b in zip(rows, found):
        assert b == pytest.approx({name: a[name] for name in b}, rel=rel)
        assert {"kd loss", "forward_kl", "lm loss", "grad_norm"} == b.keys()


def test_bridge_config_problems_are_collected(four, project):
    text = four.run("megatron_bridge_workers.refusals", folder=project)[0]
    for words in (
        "vocab_size is 64, but the teacher's padded vocabulary has 256",
        "should_pad_vocab",
        "vocab_size of KDForwardStep is 17",
        "use_tokenizer_vocab_size",
        "calculate_per_token_loss",
        "average_in_collective",
        "fp16",
        "params_dtype torch.float32",
        "FSDP",
        "pp 3 does not divide the student's 4 layers",
        "seq_length 100 is above the teacher's max_position_embeddings 64",
        "dataset.seq_length 16",
        "global_batch_size 7",
        "student: tensor parallel size 3",
        "teacher: tensor parallel size 3",
    ):
        assert words in text


def test_unmapped_family_is_pruned_and_exported(four, folders, tmp_path):
    """Gemma with examples/bridge_prune.py at tp 2 x pp 2, via a checkpoint and in memory."""
    from transformers import AutoModelForCausalLM

    source = folders["gemma"]
    cut = four.run("megatron_bridge_workers.prune_unmapped", source=source, folder=tmp_path, tp=2, pp=2)[0]
    loaded, sliced, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "loaded", tmp_path / "sliced", source)
    )
    assert all(torch.equal(loaded[name], sliced[name]) for name in loaded)
    hidden = np.array(cut["keep"]["hidden"][-1])
    for layer, ffn in cut["keep"]["ffn"].items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(loaded[name], before[name][hidden][:, ffn])
    assert torch.equal(loaded["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "loaded", dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == cut["student"] < cut["teacher"]
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 130)
