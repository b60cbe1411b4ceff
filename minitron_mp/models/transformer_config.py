"""Megatron-Core's configuration of a model. Its layers may differ in size."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import TrainingConfig
from minitron_mp.distributed.world import World
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.precision import fp8_options

if TYPE_CHECKING:
    from minitron_mp.models.build import ModelOptions

NORMALIZATION = {"rms": "RMSNorm", "layer1p": "LayerNorm"}
"""Arch.norm -> TransformerConfig.normalization."""


@dataclass
class PerLayerConfig(TransformerConfig):
    """Configuration of a model whose layers differ in size.

    Megatron-Core's TransformerBlock builds each layer from get_config_for_layer() when
    heterogeneous_block_specs is set. Megatron's own subclass (HeterogeneousTransformerConfig) reads
    a JSON file and cannot change the number of heads.
    """

    blocks: tuple[BlockArch, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heterogeneous_block_specs = True

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """Return the configuration of one layer. layer_number: global number, counted from 1."""
        config = copy.copy(self)
        for name, size in self.blocks[layer_number - 1]:
            setattr(config, name, size)
        return config


def transformer_config(arch: Arch, world: World, options: ModelOptions, engine: bool) -> TransformerConfig:
    """Return the configuration of the model. engine: the model has Transformer Engine's layers."""
    settings = {
        **_architecture(arch),
        **_layout(arch, world.parallel),
        **_number_formats(options),
        **_initialisation(world, options),
        **_kernels(arch, engine),
        **_training(options.training),
    }
    if arch.is_uniform:
        return TransformerConfig(**settings)
    return PerLayerConfig(blocks=arch.blocks, **settings)


def _architecture(arch: Arch) -> dict[str, Any]:
    first = arch.blocks[0]  # PerLayerConfig replaces these sizes if layers differ
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": first.ffn_hidden_size,
        "num_attention_heads": first.num_attention_heads,
        "num_query_groups": first.num_query_groups,
        "kv_channels": arch.kv_channels,
        "normalization": NORMALIZATION[arch.norm],
        "layernorm_zero_centered_gamma": arch.norm == "layer1p",
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": arch.gated,
        "activation_func": F.silu if arch.gated else squared_relu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _layout(arch: Arch, p: ParallelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "context_parallel_size": p.cp,
        "sequence_parallel": p.sequence_parallel,
    }
    counts = p.layers_of_chunks(arch.num_layers)
    if len(set(counts)) > 1:
        # Megatron needs equal stages unless a layout lists the layers of each stage.
        stages = [["decoder"] * count for count in counts]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = stages
    if p.vpp:
        settings["virtual_pipeline_model_parallel_size"] = p.vpp
        # Without these two the gradients of Megatron's interleaved schedule are silently wrong.
        settings["overlap_p2p_comm"] = True
        settings["batch_p2p_comm"] = False
    return settings


def _number_formats(options: ModelOptions) -> dict[str, Any]:
    return {
        "params_dtype": options.dtype,
        "pipeline_dtype": options.dtype,
        "bf16": options.dtype is torch.bfloat16,
        **fp8_options(options.fp8_kind, trains=options.training is not None),
    }


def _initialisation(world: World, options: ModelOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "use_cpu_initialization": world.device.type == "cpu",
        # Never skip the initialisation, because it also marks the weights that are split over
        # tensor-parallel ranks. Without the marks the gradient norm counts them on one rank only.
        "perform_initialization": True,
    }
    if not options.random_weights:
        settings["init_method"] = _leave
        settings["output_layer_init_method"] = _leave
        settings["embedding_init_method"] = _leave
    return settings


def _leave(weight: Tensor) -> Tensor:
    """Return the weight without initialisation, because a checkpoint fills it."""
    return weight


def _kernels(arch: Arch, engine: bool) -> dict[str, Any]:
    """Return the settings of fused kernels. The local layers use no fused kernel."""
    return {
        "bias_activation_fusion": engine and arch.gated,
        "bias_dropout_fusion": engine,
        "apply_rope_fusion": engine,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # precision.fuse_gradient_accumulation() sets it on Transformer Engine's layers.
        "gradient_accumulation_fusion": False,
    }


def _training(training: TrainingConfig | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if training is None:
        return settings
    if training.recompute:
        settings["recompute_granularity"] = "full"
        is_partial = not isinstance(training.recompute, bool)
        settings["recompute_method"] = "block" if is_partial else "uniform"
        settings["recompute_num_layers"] = int(training.recompute)
    if training.tp_comm_overlap:
        settings["tp_comm_overlap"] = True
    if training.cuda_graphs:
        settings["cuda_graph_impl"] = "local"
    return settings
