"""A sharded Megatron-Core GPTModel from an Arch.

The head is deferred: the model's last stage returns the hidden states after the final norm, and the loss applies the output
layer (logits()). So a teacher keeps 2h bytes a token between its forward pass and the loss instead of 4v, and the loss
can work in chunks.

    s sequence  b microbatch  h hidden  v padded vocabulary; under sequence parallelism s/tp, under context parallelism s/cp
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec_for_backend
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.world import World, seed_all
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.models.layers import Attention, DeferredHead, LayerNorm1p, RMSNorm, engine_modules
from minitron_mp.models.precision import (
    check_cuda_graphs,
    check_hardware,
    fixed_shapes,
    fp8_options,
    fuse_gradient_accumulation,
    uses_engine,
)
from minitron_mp.models.sharded_model import ShardedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    arch: Arch,
    world: World,
    *,
    precision: str,
    sequence_length: int,
    training: TrainingConfig | None = None,
    random_weights: bool = False,
    transformer_impl: str = "auto",
    fp8: str | None = None,
) -> ShardedModel:
    """Build this rank's part of a model, on its device.

    Weights are uninitialised memory unless random_weights: every user loads a checkpoint. training: the settings of a run that
    takes gradients. transformer_impl: as in Recipe. fp8: of a model that is not trained, for its forward passes. InputError when the layout does
    not divide the sizes, or the machine cannot compute so.
    """
    p, dtype = world.parallel, DTYPES[precision]
    stages = p.pp * (p.vpp or 1)
    problems = layout_problems(arch, p.tp)
    fp8 = fp8 if training is None else training.fp8
    if fp8:
        if dtype is not torch.bfloat16:
            problems.append(f"fp8 {fp8} quantises what bf16 holds, the precision is {precision}")
        problems += fp8_problems(arch, p.tp, p.tokens_of_sample(sequence_length))
    if stages > arch.num_layers:
        problems.append(
            f"{stages} pipeline stages (pp {p.pp} x vpp {p.vpp or 1}) for {arch.num_layers} layers; use at most {arch.num_layers}"
        )
    refuse("this layout does not fit the model:", problems)

    engine = uses_engine(transformer_impl, dtype, world.device, fp8)
    if fp8:
        check_hardware(fp8, world.device)
    for key in ("tp_comm_overlap", "cuda_graphs") if training is not None and not engine else ():
        if getattr(training, key):
            raise InputError(
                f"{key} is for Transformer Engine's layers, and the local ones compute here; drop it"
            )
    if training is not None and training.cuda_graphs:
        check_cuda_graphs()
        torch.cuda.synchronize()  # Megatron goes on in a stream of its own, up to the end of the first step, and waits for none
        seed_all(
            torch.initial_seed(), cuda_graphs=True
        )  # the managers of the graphs look at the random streams when they are made
    config = _config(arch, world, dtype, training, random_weights, fp8, engine)
    if engine:
        fixed_shapes()
    chunks = []
    for chunk in range(p.vpp or 1):
        first = world.is_first_stage and chunk == 0
        last = world.is_last_stage and chunk == (p.vpp or 1) - 1
        with (
            torch.no_grad() if config.fp8_param else nullcontext()
        ):  # with gradients each FP8 weight would keep its bf16 origin
            model = GPTModel(
                config=config,
                transformer_layer_spec=_block_spec(
                    config, arch, chunk if p.vpp else None, world.groups.pp.rank(), engine
                ),
                vocab_size=arch.padded_vocab_size,
                max_sequence_length=sequence_length,
                pre_process=first,
                post_process=last,
                parallel_output=True,
                share_embeddings_and_output_weights=arch.tied,
                position_embedding_type="rope",
                rotary_base=arch.rotary_base,
                rotary_percent=arch.rotary_percent,
                rope_scaling=arch.rope_scaling_factor is not None,
                rope_scaling_factor=arch.rope_scaling_factor or 8.0,
                pg_collection=world.groups,
                vp_stage=chunk if p.vpp else None,
            )
        if last:
            model.output_layer = DeferredHead.taking_over(model.output_layer, config, world.groups.tp)
        if engine and training is not None:
            fuse_gradient_accumulation(model)
        chunks.append(model.to(world.device))
    return ShardedModel(chunks, arch, world, sequence_length, precision)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """[s, b, h] after the final norm (s/tp under sequence parallelism) -> [s, b, v/tp], on the last stage. Differentiable."""
    return model.output_layer.logits(hidden, output_weight(model))


def output_weight(model: Any) -> Tensor:
    """The output layer's weight [v/tp, h] on the last stage, which is the embedding's when they are tied."""
    return (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )


def unwrap(model: Any) -> Any:
    """The GPTModel inside DistributedDataParallel."""
    return getattr(model, "module", model)


def _config(
    arch: Arch,
    world: World,
    dtype: torch.dtype,
    training: TrainingConfig | None,
    random_weights: bool,
    fp8: str | None,
    engine: bool,
) -> TransformerConfig:
    p = world.parallel
    stages = p.pp * (p.vpp or 1)
    options: dict[str, Any] = fp8_options(fp8, trains=training is not None)
    if arch.num_layers % stages:
        # Megatron wants even stages unless it is told each one; the last ones, which also hold the head, get fewer layers.
        layout = [["decoder"] * n for n in p.layers_of_chunks(arch.num_layers)]
        options["pipeline_model_parallel_layout"] = [
            ["embedding", *layout[0]],
            *layout[1:-1],
            [*layout[-1], "loss"],
        ]
    if p.vpp:
        # Without these two Megatron's interleaved schedule gives silently wrong gradients.
        options |= {
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
            "virtual_pipeline_model_parallel_size": p.vpp,
        }
    if training is not None and training.recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if training is not None and training.tp_comm_overlap:
        options["tp_comm_overlap"] = True
    if training is not None and training.cuda_graphs:
        options["cuda_graph_impl"] = "local"
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization="RMSNorm" if arch.norm == "rms" else "LayerNorm",
        layernorm_zero_centered_gamma=arch.norm == "layer1p",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=arch.gated,
        activation_func=F.silu if arch.gated else squared_relu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,
        sequence_parallel=p.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=world.device.type == "cpu",
        # Never skip initialisation: that is also where Megatron marks which weights are split over tensor parallel ranks, and
        # without the marks the gradient norm counts them on one rank only.
        perform_initialization=True,
        **(
            {}
            if random_weights
            else {"init_method": _leave, "output_layer_init_method": _leave, "embedding_init_method": _leave}
        ),
        # The fused kernels below come from Apex, Transformer Engine or torch.compile; the local layers do without.
        bias_activation_fusion=engine and arch.gated,
        bias_dropout_fusion=engine,
        masked_softmax_fusion=False,
        apply_rope_fusion=engine,
        gradient_accumulation_fusion=False,  # of Transformer Engine's layers by precision.fuse_gradient_accumulation
        persist_layer_norm=False,
        **options,
    )


def _leave(weight: Tensor) -> Tensor:
    """An initialiser for weights that a checkpoint fills."""
    return weight


def _block_spec(config: Any, arch: Arch, vp_stage: int | None, pp_rank: int, engine: bool) -> Any:
    """Megatron's local layer spec with a norm and an attention that run anywhere and know sequence and context parallelism, or with
    Transformer Engine's modules in the same places, and so with the same checkpoint keys.

    Its norms stay modules of their own, where Megatron's Transformer Engine spec has each inside the linear layer behind it: hooks and masks
    (importance.py, masks.py, states.py) see what they see in the local spec. That writes and reads a norm's output once more, 2 s b h bytes in
    bf16 either way: under a hundredth of a layer's time at hidden size 4096 on an H100 (arithmetic, not measured).
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    parts = layer.submodules
    attention = parts.self_attention.submodules
    norm: Any = RMSNorm if arch.norm == "rms" else LayerNorm1p
    attention.core_attention = Attention
    if engine:
        backend = engine_modules()
        norm, attention.core_attention = backend.layer_norm(), backend.core_attention()
        attention.linear_qkv, attention.linear_proj = (
            backend.column_parallel_linear(),
            backend.row_parallel_linear(),
        )
        parts.mlp = get_mlp_module_spec_for_backend(backend=backend)
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
