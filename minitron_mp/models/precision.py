"""Choice between Megatron-Core's local layers and Transformer Engine's, and of the number format.

The checks run before a model is built. They reject settings that would fail or silently give wrong
numbers in the middle of a run. The local layers do not use this module and never import Transformer
Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version

from minitron_mp.config.training import TrainingConfig
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.number_formats import FP8_SUPPORT, MOMENTS_ENGINE
from minitron_mp.models.sharded_model import ShardedModel

RECOMPILE_LIMIT = 64


def uses_engine(
    transformer_impl: str, dtype: torch.dtype, device: torch.device, fp8: str | None = None
) -> bool:
    """Return whether the model uses Transformer Engine's layers.

    transformer_impl: see Recipe. "auto" uses them in bf16 on a GPU if the package is installed.
    InputError when the requested layers are not available.
    """
    if fp8 and transformer_impl == "local":
        raise InputError(
            f"fp8 {fp8} needs Transformer Engine's layers, transformer_impl is local; "
            "set transformer_impl to transformer_engine or auto"
        )
    is_installed = find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" or fp8:
        setting = f"fp8 {fp8}" if fp8 else "transformer_impl transformer_engine"
        problems = []
        if device.type != "cuda":
            problems.append(f"{setting} needs a GPU, this rank is on {device.type}; drop the setting here")
        if not is_installed:
            problems.append(
                f"{setting} needs Transformer Engine, which is not installed; "
                "pip install -e .[te], or use NVIDIA's PyTorch container"
            )
        refuse("these layers are not available here:", problems)
    if transformer_impl == "transformer_engine":
        return True
    has_engine = device.type == "cuda" and is_installed
    return transformer_impl == "auto" and has_engine and dtype is torch.bfloat16


def hardware_problems(
    fp8: str, capability: tuple[int, int], cuda: str | None, engine: str | None
) -> list[str]:
    """Return the reasons why a machine cannot run this kind of FP8, one sentence each.

    capability: compute capability of the GPU, (9, 0) for Hopper. cuda: CUDA version that torch was
    built with, None without CUDA. engine: version of Transformer Engine, None if not installed.
    """
    required = FP8_SUPPORT[fp8]
    needed_capability = ".".join(map(str, required.capability))
    needed_cuda = ".".join(map(str, required.cuda))
    problems = []
    if capability < required.capability:
        gpus = "Hopper or Blackwell" if required.capability[0] == 9 else "Ada, Hopper or Blackwell"
        problems.append(
            f"fp8 {fp8} needs a GPU of compute capability {needed_capability} or above ({gpus}), "
            f"this one has {capability[0]}.{capability[1]}"
        )
    if cuda is None or Version(cuda) < Version(needed_cuda):
        problems.append(
            f"fp8 {fp8} needs a torch built with CUDA {needed_cuda} or later, this one has {cuda or 'none'}"
        )
    if engine is None or Version(engine) < Version(required.engine):
        problems.append(
            f"fp8 {fp8} needs Transformer Engine {required.engine} or later, "
            f"this environment has {engine or 'none'}"
        )
    return problems


def check_hardware(fp8: str, device: torch.device) -> None:
    """Raise InputError unless this rank's machine can run this kind of FP8."""
    capability = torch.cuda.get_device_capability(device)
    problems = hardware_problems(fp8, capability, torch.version.cuda, engine_version())
    refuse("FP8 is not available here; drop fp8, or change the environment:", problems)


def optimizer_problems(
    training: TrainingConfig, dtype: torch.dtype, device: torch.device, engine: str | None
) -> list[str]:
    """Return the reasons why a machine cannot train with these precisions of gradients and moments.

    dtype: of the model's weights. engine: version of Transformer Engine, None if not installed.
    """
    problems = [
        f"{key} bf16 needs a bf16 model, given {dtype}; set precision: bf16, or drop {key}"
        for key in ("gradient_precision", "moment_precision")
        if getattr(training, key) == "bf16" and dtype is not torch.bfloat16
    ]
    if training.moment_precision == "fp32":
        return problems
    if device.type != "cuda":
        problems.append(
            f"moment_precision bf16 needs a GPU, this rank is on {device.type}; drop moment_precision here"
        )
    if engine is None or Version(engine) < Version(MOMENTS_ENGINE):
        problems.append(
            f"moment_precision bf16 needs the Adam of Transformer Engine {MOMENTS_ENGINE} or later, this "
            f"environment has {engine or 'none'}; pip install -e .[te], use NVIDIA's PyTorch container, or "
            "drop moment_precision"
        )
    return problems


def check_cuda_graphs() -> None:
    """Raise InputError unless Megatron-Core supports CUDA graphs with fused gradient accumulation.

    Versions before 0.19 read TransformerConfig.gradient_accumulation_fusion. This library turns it
    off (see fuse_gradient_accumulation), so gradients that Transformer Engine adds to main_grad
    would count twice.
    """
    installed = version("megatron-core")
    if Version(installed) < Version("0.19"):
        raise InputError(
            f"cuda_graphs needs Megatron-Core 0.19 or later, this environment has {installed}; "
            "drop cuda_graphs"
        )


def release_cuda_graphs(chunks: list[Any]) -> None:
    """Delete the CUDA graphs of a trained model and free their memory.

    Call it even after a failure. Otherwise the graphs of the next model of this process could not
    be recorded, and Megatron's stream would remain the current stream.
    """
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "cudagraph_manager"):
                module.cudagraph_manager.cudagraph_runners.clear()
    delete_cuda_graphs()
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())


def engine_version() -> str | None:
    """Return the version of Transformer Engine, or None if it is not installed."""
    for name in ("transformer_engine", "transformer-engine"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def fp8_options(fp8: str | None, *, trains: bool) -> dict[str, Any]:
    """Return the settings of a TransformerConfig for a kind of FP8, {} without FP8.

    A trained model stores bf16 weights and FP8 copies. A model that is not trained stores FP8
    weights only.
    """
    if fp8 is None:
        return {}
    settings: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": fp8, "fp8_param": not trains}
    if fp8 == "delayed":
        settings["fp8_amax_history_len"] = 1024
        settings["fp8_amax_compute_algo"] = "max"
    return settings


def silently_wrong(config: Any, ddp: Any) -> list[str]:
    """Return the settings with which Megatron-Core trains without an error but with wrong numbers.

    The result has one sentence per setting. config: TransformerConfig. ddp:
    DistributedDataParallelConfig.
    """
    problems = []
    if getattr(config, "fp8_param", False) and not ddp.fp8_param_gather:
        problems.append(
            "fp8_param needs fp8_param_gather in the data-parallel wrapper; "
            "without it weights are rounded to FP8 twice a step and train far more slowly"
        )
    if config.virtual_pipeline_model_parallel_size and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        problems.append(
            "virtual pipeline stages need overlap_p2p_comm=True and batch_p2p_comm=False; "
            "otherwise gradients are wrong"
        )
    return problems


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Make Transformer Engine's linear layers add weight gradients to main_grad in the product.

    TransformerConfig.gradient_accumulation_fusion is not used, because with it Megatron's output
    layer needs an extension of Apex. The loss computes the gradient of the output layer and adds it
    to main_grad, too (losses/fused.py).
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def compile_for_fixed_shapes() -> None:
    """Compile Megatron's small functions for each shape separately, at most RECOMPILE_LIMIT times.

    Teacher and student have different widths. For the second width torch.compile would make one
    slower kernel for any width.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


@contextmanager
def communication_buffers(training: TrainingConfig, model: ShardedModel) -> Iterator[None]:
    """Provide the buffers of tp_comm_overlap while the model is trained.

    Reached by all ranks.
    """
    if not training.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    parallel = model.world.parallel
    tokens = model.sequence_length * training.micro_batch_size // parallel.cp
    mode = base.UserBufferQuantizationMode.FP8 if training.fp8 else base.UserBufferQuantizationMode.NONE
    base.initialize_ub(
        shape=[tokens, model.arch.hidden_size],
        tp_size=parallel.tp,
        quantization_modes=[mode],
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
