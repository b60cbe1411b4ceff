"""Inside a Megatron-Bridge recipe: our pruned student, teacher and loss in Bridge's pretrain(), scores of a model that Bridge built, and export.

The only file that imports megatron.bridge, and only when a function that needs it is called. Bridge has two ways to say what a model
is, and both end in chunks of megatron-core's GPTModel; a hook on these chunks, before they are wrapped, is all that we add:

    provider   0.6: AutoBridge.to_megatron_provider(), hooks by register_pre_wrap_hook()
    config     main: AutoBridge.get_model_config(), hooks in the list pre_wrap_hooks; Bridge 0.6 trains such a config, too

    cfg.model = bridge.student("out/student", sequence_length=4096)
    step = bridge.KDForwardStep(bridge.BesideStudent("out/teacher"), vocab_size=...)
    bridge.check(cfg, step)
    pretrain(cfg, step, callbacks=[step])

s sequence  b microbatch  h hidden  v padded vocabulary; s' is s/cp, under sequence parallelism s/cp/tp
"""

from __future__ import annotations

from typing import Any

import torch

from minitron_mp.errors import refuse
from minitron_mp.integrations.megatron_bridge.forward_step import KDForwardStep
from minitron_mp.integrations.megatron_bridge.teacher import ColocatedTeacher
from minitron_mp.models.arch import Arch, layout_problems


def check_config(cfg: Any, step: KDForwardStep) -> None:
    """InputError with everything in a ConfigContainer that does not fit distillation by this step; call it when all overrides are in.

    What Bridge checks by itself (its own divisibility, its own files) is left to Bridge. No rank communicates.
    """
    m, teacher = cfg.model, step.teacher.arch
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    own = isinstance(step.teacher, ColocatedTeacher)
    found = [
        (
            m.vocab_size != teacher.padded_vocab_size,
            f"model.vocab_size is {m.vocab_size}, the teacher's, padded, is {teacher.padded_vocab_size}; take cfg.model from student()",
        ),
        (
            m.should_pad_vocab,
            "model.should_pad_vocab is true: the columns of student and teacher would differ; set it to False",
        ),
        (
            step.vocab_size != teacher.vocab_size,
            f"vocab_size of the step is {step.vocab_size}, the teacher's {teacher.vocab_size}; student and teacher need one tokenizer",
        ),
        (
            getattr(cfg.tokenizer, "use_tokenizer_vocab_size", False),
            "tokenizer.use_tokenizer_vocab_size would replace the student's vocabulary; set it to False",
        ),
        (
            not m.calculate_per_token_loss,
            "model.calculate_per_token_loss is False; the loss is a mean over tokens: set it to True",
        ),
        (
            cfg.ddp.average_in_collective,
            "ddp.average_in_collective averages over ranks, not over tokens; set it to False",
        ),
        (m.fp16, "model.fp16: the loss takes no loss scale; use bf16 or float32"),
        (
            m.bf16 != (m.params_dtype is torch.bfloat16),
            f"model.bf16 is {m.bf16} with params_dtype {m.params_dtype}; let cfg.mixed_precision say the same as student(precision=...)",
        ),
        (
            bool(m.virtual_pipeline_model_parallel_size) and own,
            "virtual pipeline stages are for a teacher on ranks of its own; unset virtual_pipeline_model_parallel_size",
        ),
        (
            bool(getattr(m, "mtp_num_layers", None)),
            "model.mtp_num_layers: the loss has no multi-token prediction; set it to None",
        ),
        (bool(getattr(m, "num_moe_experts", None)), "model.num_moe_experts: only dense decoders"),
        (
            cfg.dist.use_megatron_fsdp or cfg.dist.use_torch_fsdp2,
            "FSDP: use the distributed optimizer (ddp.use_distributed_optimizer)",
        ),
        (
            cfg.dist.use_gloo_process_groups and not own,
            "dist.use_gloo_process_groups: the world of a role has none; set it to False",
        ),
        (cfg.peft is not None, "cfg.peft: adapters are no target of distillation here; set it to None"),
        (
            getattr(m, "cuda_graph_impl", "none") != "none",
            "model.cuda_graph_impl: the loss and the teacher run between the student's kernels; set it to 'none'",
        ),
        (
            m.num_layers % pp != 0 and not getattr(m, "pipeline_model_parallel_layout", None),
            f"pp {pp} does not divide the student's {m.num_layers} layers; set pipeline_model_parallel_layout",
        ),
        (
            own and teacher.num_layers < pp,
            f"the teacher has {teacher.num_layers} layers for pp {pp}; lower pp",
        ),
        (
            m.seq_length % (2 * cp if cp > 1 else 1) != 0,
            f"model.seq_length {m.seq_length} is no multiple of 2 x context_parallel_size {cp}",
        ),
        (
            m.seq_length > teacher.max_position_embeddings,
            f"model.seq_length {m.seq_length} is beyond the teacher's {teacher.max_position_embeddings} positions",
        ),
        *(
            (length != m.seq_length, f"dataset.seq_length {length} is not model.seq_length {m.seq_length}")
            for length in [_dataset_length(cfg)]
            if length
        ),
        (
            cfg.train.global_batch_size % cfg.train.micro_batch_size != 0,
            f"train.global_batch_size {cfg.train.global_batch_size} is no multiple of micro_batch_size {cfg.train.micro_batch_size}",
        ),
    ]
    problems = [text for wrong, text in found if wrong]
    problems += [f"student: {text}" for text in layout_problems(_sizes(m, teacher), tp)]
    problems += [f"teacher: {text}" for text in layout_problems(teacher, tp)] if own else []
    refuse("this Megatron-Bridge configuration does not fit:", problems)


def _sizes(m: Any, like: Arch) -> Arch:
    """The student's sizes, as far as tensor parallelism cuts them."""
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size")
    return like.resized(**{name: getattr(m, name) or m.num_attention_heads for name in names})


def _dataset_length(cfg: Any) -> int | None:
    return getattr(cfg.dataset, "seq_length", None) or getattr(cfg.dataset, "sequence_length", None)
