"""check_config: settings of a Megatron-Bridge recipe that KDForwardStep does not support."""

from __future__ import annotations

from typing import Any

import torch

from minitron_mp.errors import refuse
from minitron_mp.integrations.megatron_bridge.forward_step import KDForwardStep
from minitron_mp.integrations.megatron_bridge.teacher import ColocatedTeacher
from minitron_mp.models.arch import Arch, layout_problems

Checks = list[tuple[bool, str]]
"""(whether the setting is invalid, the error text)."""


def check_config(cfg: Any, step: KDForwardStep) -> None:
    """Raise InputError with all problems of a ConfigContainer; call it after all overrides.

    The divisibility rules and files that Bridge checks are not checked here. Ranks do not
    communicate.
    """
    teacher = step.teacher.arch
    is_colocated = isinstance(step.teacher, ColocatedTeacher)
    tp = cfg.model.tensor_model_parallel_size
    checks = [
        *_vocabulary_checks(cfg, step),
        *_loss_checks(cfg),
        *_feature_checks(cfg),
        *_layout_checks(cfg, teacher, is_colocated),
        *_length_checks(cfg, teacher),
    ]
    problems = [text for is_wrong, text in checks if is_wrong]
    problems += [f"student: {text}" for text in layout_problems(_student_sizes(cfg.model, teacher), tp)]
    if is_colocated:
        problems += [f"teacher: {text}" for text in layout_problems(teacher, tp)]
    refuse("this Megatron-Bridge configuration does not fit:", problems)


def _vocabulary_checks(cfg: Any, step: KDForwardStep) -> Checks:
    model, teacher = cfg.model, step.teacher.arch
    return [
        (
            model.vocab_size != teacher.padded_vocab_size,
            f"model.vocab_size is {model.vocab_size}, but the teacher's padded vocabulary has "
            f"{teacher.padded_vocab_size} tokens; create cfg.model with student_provider()",
        ),
        (
            model.should_pad_vocab,
            "model.should_pad_vocab is true, so student and teacher would have different columns; "
            "set it to False",
        ),
        (
            step.vocab_size != teacher.vocab_size,
            f"vocab_size of KDForwardStep is {step.vocab_size}, but the teacher's is {teacher.vocab_size}; "
            "give both the same tokenizer",
        ),
        (
            getattr(cfg.tokenizer, "use_tokenizer_vocab_size", False),
            "tokenizer.use_tokenizer_vocab_size would replace the student's vocabulary; set it to False",
        ),
    ]


def _loss_checks(cfg: Any) -> Checks:
    model = cfg.model
    return [
        (
            not model.calculate_per_token_loss,
            "model.calculate_per_token_loss is False, but the loss is a mean over tokens; set it to True",
        ),
        (
            cfg.ddp.average_in_collective,
            "ddp.average_in_collective averages over ranks, not over tokens; set it to False",
        ),
        (model.fp16, "model.fp16: the loss supports no loss scale; use bf16 or float32"),
        (
            model.bf16 != (model.params_dtype is torch.bfloat16),
            f"model.bf16 is {model.bf16} with params_dtype {model.params_dtype}; "
            "set cfg.mixed_precision and student_provider(precision=...) to the same precision",
        ),
    ]


def _feature_checks(cfg: Any) -> Checks:
    model = cfg.model
    return [
        (
            bool(getattr(model, "mtp_num_layers", None)),
            "model.mtp_num_layers: multi-token prediction is not supported; set it to None",
        ),
        (
            bool(getattr(model, "num_moe_experts", None)),
            "model.num_moe_experts: only dense decoders are supported; give another student",
        ),
        (
            cfg.dist.use_megatron_fsdp or cfg.dist.use_torch_fsdp2,
            "FSDP is not supported; use the distributed optimizer (ddp.use_distributed_optimizer)",
        ),
        (cfg.peft is not None, "cfg.peft: adapters are not supported; set it to None"),
        (
            getattr(model, "cuda_graph_impl", "none") != "none",
            "model.cuda_graph_impl: loss and teacher run between the student's kernels; set it to 'none'",
        ),
    ]


def _layout_checks(cfg: Any, teacher: Arch, is_colocated: bool) -> Checks:
    model = cfg.model
    pp = model.pipeline_model_parallel_size
    return [
        (
            bool(model.virtual_pipeline_model_parallel_size) and is_colocated,
            "virtual pipeline stages need a teacher on separate ranks; "
            "unset virtual_pipeline_model_parallel_size",
        ),
        (
            cfg.dist.use_gloo_process_groups and not is_colocated,
            "dist.use_gloo_process_groups: the world of a role has no gloo groups; set it to False",
        ),
        (
            model.num_layers % pp != 0 and not getattr(model, "pipeline_model_parallel_layout", None),
            f"pp {pp} does not divide the student's {model.num_layers} layers; "
            "set pipeline_model_parallel_layout",
        ),
        (
            is_colocated and teacher.num_layers < pp,
            f"the teacher has {teacher.num_layers} layers for pp {pp}; lower pp",
        ),
    ]


def _length_checks(cfg: Any, teacher: Arch) -> Checks:
    model, train = cfg.model, cfg.train
    cp = model.context_parallel_size
    data_length = getattr(cfg.dataset, "seq_length", None) or getattr(cfg.dataset, "sequence_length", None)
    return [
        (
            model.seq_length % (2 * cp if cp > 1 else 1) != 0,
            f"model.seq_length {model.seq_length} must be a multiple of 2 x context_parallel_size {cp}; "
            "change one of them",
        ),
        (
            model.seq_length > teacher.max_position_embeddings,
            f"model.seq_length {model.seq_length} is above the teacher's max_position_embeddings "
            f"{teacher.max_position_embeddings}; lower it",
        ),
        (
            bool(data_length) and data_length != model.seq_length,
            f"dataset.seq_length {data_length} must equal model.seq_length {model.seq_length}; set "
            "both to the same number",
        ),
        (
            train.global_batch_size % train.micro_batch_size != 0,
            f"train.global_batch_size {train.global_batch_size} must be a multiple of "
            f"micro_batch_size {train.micro_batch_size}; change one of them",
        ),
    ]


def _student_sizes(model: Any, teacher: Arch) -> Arch:
    """Return the teacher with the student's sizes that tensor parallelism splits."""
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size")
    return teacher.resized(**{name: getattr(model, name) or model.num_attention_heads for name in names})
