"""Shims that let Megatron-Bridge 0.6 import and run without a GPU.

Only tests/ranks/test_megatron_bridge.py uses them. Each shim states its reason.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn


def install() -> None:
    """Before anything imports megatron.bridge; once a process."""
    transformer_engine()
    from minitron_mp.distributed.cpu_backend import install

    # Explicit CUDA devices and streams, as for all our tests; Bridge calls
    # torch.cuda.current_device().
    install()


def transformer_engine() -> None:
    """Stub transformer_engine.pytorch.

    Bridge imports it unconditionally (peft/lora_layers.py), for isinstance checks and as base
    classes. Transformer Engine installs without a GPU, but each of its modules raises.
    Megatron-Core looks for it first and must not find it, or it builds its layers from the stub.
    """
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(content, __path__=[])
        sys.modules[name] = made
        return made

    names = (
        "Linear",
        "LayerNormLinear",
        "LayerNormMLP",
        "GroupedLinear",
        "LayerNorm",
        "RMSNorm",
        "TransformerLayer",
        "DotProductAttention",
    )
    ops = module("transformer_engine.pytorch.ops", Sequential=nn.Sequential)
    pytorch = module(
        "transformer_engine.pytorch", ops=ops, **{name: type(name, (nn.Module,), {}) for name in names}
    )
    module("transformer_engine", pytorch=pytorch, __version__="0.0.0")


class Norm(nn.Module):
    """Any norm of the families.

    Megatron-Core supports weights stored less one (Nemotron, Gemma) only with Apex or Transformer
    Engine.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps, self.less, self.rms = (
            eps,
            float(config.layernorm_zero_centered_gamma),
            config.normalization == "RMSNorm",
        )
        self.weight = nn.Parameter(torch.full((hidden_size,), 1 - self.less, dtype=config.params_dtype))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + self.less
        return (
            F.rms_norm(x, weight.shape, weight, self.eps)
            if self.rms
            else F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        )


def layers(config: Any) -> TransformerBlockSubmodules:
    """Return Megatron's local layers with Norm; Bridge's default is Transformer Engine's layers."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = Norm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (config.num_layers // config.pipeline_model_parallel_size), layer_norm=Norm
    )


def pretrain_without_cuda(cfg: Any) -> None:
    """Let setup() run without CUDA.

    setup() asserts CUDA, although initialize_megatron() has a parameter for running without it.
    With that parameter Megatron's random streams are not seeded, so this function seeds them.
    """
    from megatron.bridge.training import initialize, setup
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        groups = initialize.initialize_megatron(*args, allow_no_cuda=True, **kwargs)
        model_parallel_cuda_manual_seed(cfg.rng.seed, force_reset_rng=True)
        return groups

    setup.initialize_megatron = initialize_megatron
    initialize.compile_helpers = lambda: (
        None
    )  # Megatron-Core's wheels have the compiled helpers, and no Makefile
    cfg.dist.distributed_backend = "gloo"


LOCAL = {
    # Every fusion is a CUDA kernel of Apex or Transformer Engine.
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
    "use_cpu_initialization": True,
}


def on_cpu(model: Any, tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A provider or ModelConfig set up for CPU ranks of a layout."""
    from megatron.core.transformer.enums import AttnBackend

    model.transformer_layer_spec = layers
    model.attention_backend = (
        AttnBackend.auto
    )  # Megatron-Core writes it to the environment, where all models of a process must agree
    model.tensor_model_parallel_size, model.pipeline_model_parallel_size = tp, pp
    model.params_dtype = model.pipeline_dtype = dtype
    model.bf16, model.fp16 = dtype is torch.bfloat16, False
    for name, value in LOCAL.items():
        setattr(model, name, value)
    return model
