"""Build a sharded Megatron-Core GPTModel from an architecture.

The output layer is deferred: the last stage returns the hidden states after the final norm, and the
loss applies the output layer with logits(). So a teacher stores 2h bytes per token between its
forward pass and the loss instead of 4v bytes, and the loss can process tokens in chunks.

    s sequence  b microbatch  h hidden  v padded vocabulary
    under sequence parallelism s is s/tp, under context parallelism s/cp
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.world import World, seed_all
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.models.layer_spec import block_spec
from minitron_mp.models.layers import DeferredHead
from minitron_mp.models.precision import (
    check_cuda_graphs,
    check_hardware,
    compile_for_fixed_shapes,
    engine_version,
    fuse_gradient_accumulation,
    optimizer_problems,
    uses_engine,
)
from minitron_mp.models.sharded_model import DTYPES, ShardedModel
from minitron_mp.models.transformer_config import transformer_config


@dataclass(frozen=True)
class ModelOptions:
    """Options of build_model().

    sequence_length: tokens of one sample. training: settings of a run that computes gradients, None
    for forward passes only. random_weights: initialise the weights. Without it they are
    uninitialised memory, which a checkpoint fills. transformer_impl: see Recipe. fp8: kind of FP8
    scaling of a model that is not trained.
    """

    precision: str
    sequence_length: int
    training: TrainingConfig | None = None
    random_weights: bool = False
    transformer_impl: str = "auto"
    fp8: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def fp8_kind(self) -> str | None:
        """Kind of FP8 scaling of this model, trained or not."""
        return self.fp8 if self.training is None else self.training.fp8


def build_model(arch: Arch, world: World, options: ModelOptions) -> ShardedModel:
    """Build this rank's part of a model on its device, and return the sharded model.

    InputError when the layout does not divide the sizes, or this machine cannot run the model.
    """
    _check_layout(arch, world.parallel, options)
    engine = uses_engine(options.transformer_impl, options.dtype, world.device, options.fp8_kind)
    _check_machine(world, options, engine)
    if options.training is not None and options.training.cuda_graphs:
        _prepare_cuda_graphs()
    config = transformer_config(arch, world, options, engine)
    if engine:
        compile_for_fixed_shapes()
    chunks = [_build_chunk(chunk, arch, world, options, config, engine) for chunk in range(_chunks(world))]
    return ShardedModel(chunks, arch, world, options.sequence_length, options.precision)


def _chunks(world: World) -> int:
    return world.parallel.vpp or 1


def _check_layout(arch: Arch, p: ParallelConfig, options: ModelOptions) -> None:
    """Raise InputError unless the layout and the number format fit the sizes."""
    problems = layout_problems(arch, p.tp)
    fp8 = options.fp8_kind
    if fp8:
        if options.dtype is not torch.bfloat16:
            problems.append(f"fp8 {fp8} needs precision bf16, given {options.precision}; set precision: bf16")
        problems += fp8_problems(arch, p.tp, p.tokens_of_sample(options.sequence_length))
    stages = p.pp * (p.vpp or 1)
    if stages > arch.num_layers:
        problems.append(
            f"{stages} pipeline stages (pp {p.pp} x vpp {p.vpp or 1}) for {arch.num_layers} layers; "
            f"use at most {arch.num_layers}"
        )
    refuse("this layout does not fit the model:", problems)


def _check_machine(world: World, options: ModelOptions, engine: bool) -> None:
    """Raise InputError unless this machine supports the settings of the run."""
    if options.fp8_kind:
        check_hardware(options.fp8_kind, world.device)
    training = options.training
    if training is None:
        return
    refuse(
        "these precisions of the optimizer are not available here:",
        optimizer_problems(training, options.dtype, world.device, engine_version()),
    )
    if not engine:
        for key, is_set in (
            ("tp_comm_overlap", training.tp_comm_overlap),
            ("cuda_graphs", training.cuda_graphs),
        ):
            if is_set:
                raise InputError(
                    f"{key} needs Transformer Engine's layers, and this model has local layers; drop {key}"
                )
    if training.cuda_graphs:
        check_cuda_graphs()


def _prepare_cuda_graphs() -> None:
    # Megatron uses a separate CUDA stream until the end of the first step, without waiting for
    # earlier work on the default stream.
    torch.cuda.synchronize()
    # The graph managers read the random streams when they are constructed.
    seed_all(torch.initial_seed(), cuda_graphs=True)


def _build_chunk(
    chunk: int, arch: Arch, world: World, options: ModelOptions, config: TransformerConfig, engine: bool
) -> GPTModel:
    """Return one pipeline chunk of this rank, with embedding or output layer where they belong."""
    vp_stage = chunk if world.parallel.vpp else None
    is_first = world.is_first_stage and chunk == 0
    is_last = world.is_last_stage and chunk == _chunks(world) - 1
    # With gradients enabled each FP8 weight would keep a bf16 copy.
    with torch.no_grad() if config.fp8_param else nullcontext():
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, arch, vp_stage, world.groups.pp.rank(), engine),
            vocab_size=arch.padded_vocab_size,
            max_sequence_length=options.sequence_length,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_base=arch.rotary_base,
            rotary_percent=arch.rotary_percent,
            rope_scaling=arch.rope_scaling_factor is not None,
            rope_scaling_factor=arch.rope_scaling_factor or 8.0,
            pg_collection=world.groups,
            vp_stage=vp_stage,
        )
    if is_last:
        model.output_layer = DeferredHead.replacing(model.output_layer, config, world.groups.tp)
    if engine and options.training is not None:
        fuse_gradient_accumulation(model)
    return model.to(world.device)
