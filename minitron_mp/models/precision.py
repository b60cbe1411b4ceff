"""Whose layers compute, and in which number format: Megatron-Core's own or Transformer Engine's, in bf16 or FP8.

The checks say before a model is built what would fail, or be silently wrong, in the middle of a run. Nothing here is needed, or
imports Transformer Engine, where the local layers compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version

from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.number_formats import FP8_SUPPORT

RECOMPILE_LIMIT = 64


def uses_engine(wanted: str, dtype: torch.dtype, device: torch.device, fp8: str | None = None) -> bool:
    """Whether Transformer Engine's layers compute. wanted: Recipe.transformer_impl; auto: in bf16 on a GPU where it is installed.

    InputError when what is wanted is not there.
    """
    has_engine = device.type == "cuda" and find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" or (fp8 and wanted == "auto"):
        what = f"fp8 {fp8}" if fp8 else "transformer_impl transformer_engine"
        problems = []
        if device.type != "cuda":
            problems.append(f"{what} needs a GPU, this rank is on {device.type}: drop it here")
        if find_spec("transformer_engine") is None:
            problems.append(
                f"{what} needs Transformer Engine, which is not installed: pip install -e .[te], or use NVIDIA's PyTorch container"
            )
        refuse("these layers cannot compute here:", problems)
    if fp8 and wanted == "local":
        raise InputError(
            f"fp8 {fp8} is Transformer Engine's, transformer_impl is local: set transformer_engine or auto"
        )
    return wanted == "transformer_engine" or (wanted == "auto" and has_engine and dtype is torch.bfloat16)


def hardware_problems(
    fp8: str, capability: tuple[int, int], cuda: str | None, engine: str | None
) -> list[str]:
    """What keeps a machine from this kind of FP8, one sentence each.

    capability: of the GPU, (9, 0) for Hopper; cuda: that torch was built with; engine: version of Transformer Engine. None: not there.
    """
    problems, ((major, minor), needs_engine, toolkit) = [], FP8_SUPPORT[fp8]
    needs_cuda = ".".join(map(str, toolkit))
    if capability < (major, minor):
        kinds = "Hopper or Blackwell" if major == 9 else "Ada, Hopper or Blackwell"
        problems.append(
            f"fp8 {fp8} needs a GPU of compute capability {major}.{minor} or above ({kinds}), this one has {capability[0]}.{capability[1]}"
        )
    if cuda is None or Version(cuda) < Version(needs_cuda):
        problems.append(
            f"fp8 {fp8} needs a torch built with CUDA {needs_cuda} or later, this one has {cuda or 'none'}"
        )
    if engine is None or Version(engine) < Version(needs_engine):
        problems.append(
            f"fp8 {fp8} needs Transformer Engine {needs_engine} or later, here is {engine or 'none'}"
        )
    return problems


def check_hardware(fp8: str, device: torch.device) -> None:
    """InputError unless this rank's machine computes this kind of FP8."""
    refuse(
        "FP8 cannot compute here:",
        hardware_problems(
            fp8, torch.cuda.get_device_capability(device), torch.version.cuda, engine_version()
        ),
    )


def check_cuda_graphs() -> None:
    """InputError unless Megatron-Core records layers together with gradients that Transformer Engine adds to main_grad itself.

    Before 0.19 it looks at TransformerConfig.gradient_accumulation_fusion for it, which is off here (fuse_gradient_accumulation), and such
    gradients would be counted twice.
    """
    if Version(version("megatron-core")) < Version("0.19"):
        raise InputError(
            f"cuda_graphs needs Megatron-Core 0.19 or later, here is {version('megatron-core')}: drop it"
        )


def forget_cuda_graphs(chunks: list[Any]) -> None:
    """Give up what has been recorded of a model in training, with the memory that its activations have there; layers compute without it then.

    Whatever came of the training: the next model of this process could not be recorded, and all would go on in Megatron's stream.
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
    """Of Transformer Engine; None where it is not installed."""
    for name in ("transformer_engine", "transformer-engine"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def fp8_options(fp8: str | None, *, trains: bool) -> dict[str, Any]:
    """Of a TransformerConfig. A model that is not trained keeps its weights in FP8; one that is keeps them in bf16 beside FP8 copies."""
    if fp8 is None:
        return {}
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if fp8 == "delayed" else {}
    return {"fp8": "hybrid", "fp8_recipe": fp8, "fp8_param": not trains, **history}


def silently_wrong(config: Any, ddp: Any) -> list[str]:
    """What Megatron-Core trains without an error and wrongly, one sentence each. config: of the model; ddp: DistributedDataParallelConfig."""
    problems = []
    if getattr(config, "fp8_param", False) and not ddp.fp8_param_gather:
        problems.append(
            "fp8_param without fp8_param_gather in the data parallel wrapper: weights would be rounded to FP8 twice a step, and learn far more slowly"
        )
    if config.virtual_pipeline_model_parallel_size and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        problems.append(
            "virtual pipeline stages without overlap_p2p_comm=True, batch_p2p_comm=False: gradients would be wrong"
        )
    return problems


def fuse_gradient_accumulation(model: Any) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to main_grad in the product itself.

    Not by TransformerConfig.gradient_accumulation_fusion: with it Megatron's output layer refuses to be built without an extension of
    Apex, and that layer's gradient is ours (losses.py), which adds it to main_grad as well.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def fixed_shapes() -> None:
    """Compile Megatron's small functions for each shape anew, at most RECOMPILE_LIMIT times.

    Teacher and student have two widths: after the second torch.compile would make one kernel for any width, and a slower one.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


@contextmanager
def communication_buffers(training: TrainingConfig, recipe: Recipe, hidden_size: int) -> Iterator[None]:
    """Inside, the buffers that tp_comm_overlap sends a microbatch of a model of this width through. Reached by all ranks."""
    if not training.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    tokens = recipe.data.sequence_length * training.micro_batch_size // recipe.parallel.cp
    mode = base.UserBufferQuantizationMode.FP8 if training.fp8 else base.UserBufferQuantizationMode.NONE
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=recipe.parallel.tp,
        quantization_modes=[mode],
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
