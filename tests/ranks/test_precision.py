"""Layer implementations and number formats: rejected settings, and local layers on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import ARCHS

from minitron_mp.config.recipe import load_recipe, make_recipe
from minitron_mp.errors import InputError
from minitron_mp.integrations.megatron_bridge import ColocatedTeacher, KDForwardStep, check_config
from minitron_mp.models.arch import fp8_problems
from minitron_mp.models.precision import fp8_options, hardware_problems
from minitron_mp.workflow.preflight import recipe_problems

NEEDED = {"model": "m", "output": "o"}
ROOT = Path(__file__).parents[2]
EVEN = (
    ARCHS["llama"]
    .resized(hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=4)
    .model_copy(update={"kv_channels": 16})
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"distill": {"fp8": "mxfp8"}},
            r"distill\.fp8: .*'tensorwise', 'delayed' or 'blockwise', given 'mxfp8'",
        ),
        ({"teacher": {"fp8": "delayed"}}, r"teacher\.fp8: .*'tensorwise' or 'blockwise', given 'delayed'"),
        (
            {"transformer_impl": "local", "distill": {"fp8": "tensorwise"}},
            r"distill\.fp8 needs Transformer Engine, transformer_impl is local",
        ),
        (
            {"transformer_impl": "local", "teacher": {"fp8": "blockwise"}},
            r"teacher\.fp8 needs Transformer Engine, transformer_impl is local",
        ),
        (
            {"precision": "fp32", "distill": {"fp8": "delayed"}},
            r"distill\.fp8 needs bf16, the precision is fp32",
        ),
        (
            {"precision": "fp32", "teacher": {"fp8": "tensorwise"}},
            r"teacher\.fp8 needs bf16, .*set teacher\.precision: bf16",
        ),
        (
            {"teacher": {"fp8": "tensorwise"}, "correct": {"when": "during", "steps": 90, "warmup_steps": 9}},
            r"teacher\.fp8 .*set correct\.fp8",
        ),
        (
            {"distill": {"tp_comm_overlap": True}},
            r"distill\.tp_comm_overlap .*parallel\.sequence_parallel: true",
        ),
        (
            {
                "distill": {"tp_comm_overlap": True},
                "parallel": {"tp": 2, "sequence_parallel": True},
                "search": {"parameters": "1B"},
            },
            r"distill\.tp_comm_overlap has buffers for one model, and search trains several",
        ),
        (
            {
                "distill": {"tp_comm_overlap": True, "fp8": "blockwise"},
                "parallel": {"tp": 2, "sequence_parallel": True},
            },
            r"distill\.tp_comm_overlap does not support distill\.fp8 blockwise; set tensorwise",
        ),
        (
            {"transformer_impl": "local", "distill": {"cuda_graphs": True}},
            r"distill\.cuda_graphs needs Transformer Engine, transformer_impl is local",
        ),
        (
            {"distill": {"cuda_graphs": True, "recompute": True}},
            r"cuda_graphs and recompute cannot be combined",
        ),
        (
            {"distill": {"cuda_graphs": True, "states": {"layers": [[0, 0]]}}},
            r"states and cuda_graphs cannot be combined",
        ),
        (
            {"distill": {"cuda_graphs": True}, "teacher": {"placement": "remote"}},
            r"distill\.cuda_graphs does not support a remote teacher.*colocated or cached",
        ),
        (
            {"distill": {"cuda_graphs": True}, "search": {"parameters": "1B"}},
            r"distill\.cuda_graphs records one model, and search trains several",
        ),
        (
            {"distill": {"cuda_graphs": True}, "correct": {"when": "during", "steps": 90, "warmup_steps": 9}},
            r"cuda_graphs records one model, and correct\.when during trains two",
        ),
        (
            {"distill": {"cuda_graphs": True, "fp8": "delayed"}},
            r"distill\.cuda_graphs needs distill\.fp8 tensorwise, given delayed",
        ),
        (
            {"distill": {"cuda_graphs": True, "fp8": "tensorwise"}, "parallel": {"pp": 2}},
            r"would replay the FP8 weights of the second step",
        ),
        (
            {"distill": {"cuda_graphs": True}, "parallel": {"pp": 2, "vpp": 2}},
            r"distill\.cuda_graphs does not support parallel\.vpp 2",
        ),
        (
            {
                "distill": {"cuda_graphs": True, "tp_comm_overlap": True},
                "parallel": {"tp": 2, "sequence_parallel": True},
            },
            r"distill\.tp_comm_overlap and distill\.cuda_graphs",
        ),
        (
            {
                "distill": {"fp8": "delayed"},
                "correct": {"when": "during", "steps": 90, "warmup_steps": 9, "fp8": "tensorwise"},
            },
            r"distill\.fp8 delayed keeps a history that the FP8 layers of the trained teacher",
        ),
    ],
)
def test_invalid_precision_recipes_are_rejected(values, message):
    with pytest.raises(InputError, match=message):
        make_recipe({**NEEDED, **values})


def test_student_and_teacher_fp8_are_independent():
    recipe = make_recipe(
        {**NEEDED, "precision": "fp32", "teacher": {"precision": "bf16", "fp8": "blockwise"}}
    )
    assert (recipe.teacher.fp8, recipe.distill.fp8) == ("blockwise", None)
    assert fp8_options("blockwise", trains=False)["fp8_param"]
    assert not fp8_options("delayed", trains=True)["fp8_param"]


HOPPER, ADA, AMPERE = (9, 0), (8, 9), (8, 0)


@pytest.mark.parametrize(
    ("fp8", "machine", "words"),
    [
        ("tensorwise", (HOPPER, "13.0", "2.16.1"), []),
        ("blockwise", (HOPPER, "12.9", "2.3.0"), []),
        ("blockwise", ((10, 0), "13.0", "2.10"), []),
        ("delayed", (ADA, "12.4", "2.1.0"), []),
        (
            "tensorwise",
            (AMPERE, "13.0", "2.16.1"),
            ["compute capability 8.9 or above (Ada, Hopper or Blackwell), this one has 8.0"],
        ),
        (
            "blockwise",
            (ADA, "12.8", "2.2.0"),
            [
                "9.0 or above (Hopper or Blackwell)",
                "CUDA 12.9 or later, this one has 12.8",
                "2.3 or later, this environment has 2.2.0",
            ],
        ),
        (
            "tensorwise",
            (HOPPER, "13.0", None),
            ["Transformer Engine 2.2 or later, this environment has none"],
        ),
        ("tensorwise", (HOPPER, "12.10", "2.10.0"), []),  # versions, no decimal fractions
    ],
)
def test_missing_hardware_support_is_reported(fp8, machine, words):
    problems = hardware_problems(fp8, *machine)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words):
        assert word in problem


def test_fp8_sizes_are_multiples_of_16_on_each_rank():
    assert fp8_problems(EVEN, 1, 64) == fp8_problems(EVEN, 4, 16) == []
    odd = EVEN.resized(hidden_size=72, ffn_hidden_size=120).model_copy(update={"kv_channels": 12})
    problems = fp8_problems(odd, 2, 24)  # 8 x 12 / 2 = 48 and (8 + 2 x 4) x 12 / 2 = 96 are fine
    for words, problem in zip(
        ("hidden_size is 72; nearest 64", "(120 / 2) is 60; nearest 64", "on a rank is 24; nearest 32"),
        problems,
        strict=True,
    ):
        assert words in problem


def test_preflight_checks_fp8_sizes(monkeypatch):
    """Of the published 12B -> 8B: teacher and student each under the key that asks for FP8."""
    monkeypatch.chdir(ROOT)

    def problems(*overrides):
        return recipe_problems(
            load_recipe(
                "examples/mn_minitron_8b.yaml",
                ["distill.fp8=tensorwise", "teacher.fp8=blockwise", *overrides],
            ),
            {},
            weights=False,
        )

    assert problems() == []
    found = problems(
        "target.ffn_hidden_size=11528",
        "target.align=8",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        "distill.tp_comm_overlap=false",
        "correct.tp_comm_overlap=false",
        "data.sequence_length=8200",
    )
    assert sum("distill.fp8: " in text for text in found) == 2
    assert any("ffn_hidden_size / tp" in text for text in found)
    assert (
        sum(
            text.startswith("teacher.fp8: FP8 needs multiples of 16, the tokens of a sample")
            for text in found
        )
        == 1
    )


def test_local_layers_run_on_cpu(ranks):
    """And what only Transformer Engine does is refused there."""
    local = {"transformer_impl": "local"}
    refused = {
        "transformer_impl transformer_engine needs a GPU, this rank is on cpu": (
            {"transformer_impl": "transformer_engine"},
            None,
        ),
        "fp8 tensorwise needs a GPU, this rank is on cpu": ({}, {"fp8": "tensorwise"}),
        "fp8 blockwise needs a GPU": ({"fp8": "blockwise"}, None),
        "fp8 blockwise needs Transformer Engine's layers, transformer_impl is local": (
            {"fp8": "blockwise", **local},
            None,
        ),
        "tp_comm_overlap needs Transformer Engine's layers, and this model has local layers": (
            {},
            {"tp_comm_overlap": True},
        ),
        "cuda_graphs needs Transformer Engine's layers, and this model has local layers": (
            {},
            {"cuda_graphs": True},
        ),
        "the tokens of a sample on a rank is 24; nearest 32": (
            {"fp8": "tensorwise", "sequence_length": 24},
            None,
        ),
    }
    auto, chosen, *messages = ranks(
        1, "precision_workers.built", arch=EVEN, cases=[({}, None), (local, {}), *refused.values()]
    )[0]
    assert auto == chosen
    assert "minitron_mp.models.layers.RMSNorm" in auto
    assert not any("transformer_engine" in name for name in auto)
    for words, message in zip(refused, messages):
        assert words in message


def test_silently_wrong_megatron_settings_are_detected(ranks):
    found = ranks(1, "precision_workers.wrongs", arch=EVEN)[0]
    assert found["own"] == found["gathered"] == found["overlapped"] == []
    assert "fp8_param needs fp8_param_gather" in found["fp8_param"][0]
    assert "overlap_p2p_comm=True and batch_p2p_comm=False" in found["vpp"][0]


def of_bridge(own: bool) -> tuple[SimpleNamespace, KDForwardStep]:
    """Return a configuration that check() accepts, and the step. own: the teacher is colocated."""
    arch = ARCHS["llama"]
    model = {
        name: getattr(arch, name)
        for name in (
            "num_attention_heads",
            "num_query_groups",
            "ffn_hidden_size",
            "hidden_size",
            "num_layers",
        )
    }
    model |= {f"{name}_model_parallel_size": 1 for name in ("tensor", "pipeline", "virtual_pipeline")} | {
        "context_parallel_size": 1
    }
    model |= {
        "vocab_size": arch.padded_vocab_size,
        "should_pad_vocab": False,
        "calculate_per_token_loss": True,
        "fp16": False,
        "bf16": True,
    }
    model |= {"params_dtype": torch.bfloat16, "seq_length": 16, "virtual_pipeline_model_parallel_size": None}
    teacher = object.__new__(ColocatedTeacher) if own else SimpleNamespace()
    teacher.arch = arch
    parts = {
        "model": SimpleNamespace(**model),
        "tokenizer": SimpleNamespace(use_tokenizer_vocab_size=False),
        "ddp": SimpleNamespace(average_in_collective=False),
        "dist": SimpleNamespace(
            use_megatron_fsdp=False, use_torch_fsdp2=False, use_gloo_process_groups=False
        ),
        "dataset": SimpleNamespace(seq_length=16),
        "train": SimpleNamespace(global_batch_size=4, micro_batch_size=2),
        "peft": None,
    }
    return SimpleNamespace(**parts), KDForwardStep(teacher, vocab_size=arch.vocab_size)


@pytest.mark.parametrize(
    ("own", "place", "value", "said"),
    [
        (False, "model.cuda_graph_impl", "local", r"model\.cuda_graph_impl: .*set it to 'none'"),
        (False, "peft", object(), r"cfg\.peft: adapters"),
        (False, "model.mtp_num_layers", 1, r"model\.mtp_num_layers: .*set it to None"),
        (False, "model.num_moe_experts", 8, r"model\.num_moe_experts: only dense decoders"),
        (
            True,
            "model.virtual_pipeline_model_parallel_size",
            2,
            "virtual pipeline stages need a teacher on separate ranks",
        ),
        (False, "dist.use_gloo_process_groups", True, r"dist\.use_gloo_process_groups: .*set it to False"),
        (False, "dist.use_torch_fsdp2", True, "FSDP is not supported; use the distributed optimizer"),
        (
            False,
            "train.micro_batch_size",
            3,
            r"train\.global_batch_size 4 must be a multiple of micro_batch_size 3",
        ),
        (False, "dataset.seq_length", 8, r"dataset\.seq_length 8 must equal model\.seq_length 16"),
    ],
)
def test_bridge_config_problems(own, place, value, said):
    cfg, step = of_bridge(own)
    check_config(cfg, step)
    *section, name = place.split(".")
    setattr(getattr(cfg, section[0]) if section else cfg, name, value)
    with pytest.raises(InputError, match=said):
        check_config(cfg, step)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp8_param": True}, "fp8_param needs fp8_param_gather"),
        ({"virtual_pipeline_model_parallel_size": 2}, "need overlap_p2p_comm=True"),
    ],
)
def test_wrong_bridge_config_is_rejected_at_start(settings, said):
    usual = {
        "fp8_param": False,
        "virtual_pipeline_model_parallel_size": None,
        "batch_p2p_comm": True,
        "overlap_p2p_comm": False,
    }
    wrapped = SimpleNamespace(
        config=SimpleNamespace(**{**usual, **settings}), ddp_config=SimpleNamespace(fp8_param_gather=False)
    )
    step = KDForwardStep(None, vocab_size=1)
    with pytest.raises(InputError, match=said):
        step.on_train_start(SimpleNamespace(model=[wrapped, wrapped]))


@pytest.mark.parametrize("arch", ["qwen3", "nemotron"])
def test_scores_of_fused_norms_match_separate_norms(ranks, results, arch):
    """Products and sums are the same.

    Nemotron has LayerNorm with a bias and a weight stored less one.
    """
    own, fused = ranks(
        1, "precision_workers.scores_of_fused_norms", arch=ARCHS[arch], teacher=results.teacher(arch)
    )[0]
    for kind, scores in own.items():
        np.testing.assert_array_equal(scores, fused[kind], err_msg=kind)


def test_fp8_weights_are_read_whole(ranks, results):
    """A tensor written in two halves would get the scale of the second; tests/gpu checks values."""
    elsewhere, equal = ranks(
        1, "precision_workers.read_whole", arch=ARCHS["qwen3"], teacher=results.teacher("qwen3")
    )[0]
    assert elsewhere
    assert equal


def test_garbage_is_collected_at_step_intervals(ranks, tmp_path):
    usual, own = (
        ranks(1, "precision_workers.collected", arch=EVEN, checkpoints=tmp_path / str(n), interval=n)[0]
        for n in (None, 2)
    )
    assert usual[0] == own[0]
    assert usual[1:] == ([True] * 3, True)
    assert own[1:] == ([False] * 3, True)
