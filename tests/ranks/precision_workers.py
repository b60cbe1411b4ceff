"""What test_precision.py runs on a rank: real models and wrappers, no GPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import DEFAULT_PAIR, SEQUENCE_LENGTH, Layout, make_samples, microbatches
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.identity_op import IdentityOp
from model_workers import joined, load, manifest, score_samples
from torch import Tensor, nn

from minitron_mp.artifacts import checkpoint as checkpoint
from minitron_mp.artifacts.checkpoint import load_checkpoint, load_weights, scaling_state
from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.precision import silently_wrong
from minitron_mp.training.loop import train_one
from minitron_mp.training.options import RunOptions

ONE = Layout("one", 1)


def built(arch: Arch, cases: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> list[str | list[str]]:
    """Build a model for each (options of build_model, training settings).

    Returns the error message, or the kinds of module in the first layer.
    """
    found: list[str | list[str]] = []
    with joined(ONE) as world:
        for options, training in cases:
            settings = None if training is None else TrainingConfig(**training)
            try:
                (chunk,) = build_model(
                    arch,
                    world,
                    ModelOptions(training=settings, **{"precision": "bf16", "sequence_length": 32} | options),
                ).chunks
            except InputError as error:
                found.append(str(error))
                continue
            assert scaling_state([chunk], world) == {}
            found.append(
                sorted(
                    {
                        f"{type(module).__module__}.{type(module).__name__}"
                        for module in chunk.decoder.layers[0].modules()
                    }
                )
            )
    return found


def wrongs(arch: Arch) -> dict[str, list[str]]:
    """Return silently_wrong() of a model's configuration, and with one change each."""
    with joined(ONE) as world:
        config, ddp = (
            build_model(
                arch, world, ModelOptions(precision="bf16", sequence_length=SEQUENCE_LENGTH)
            ).last_chunk.config,
            DistributedDataParallelConfig(),
        )
        found = {"own": silently_wrong(config, ddp)}
        config.fp8_param = True
        found["fp8_param"] = silently_wrong(config, ddp)
        ddp.fp8_param_gather = True
        found["gathered"] = silently_wrong(config, ddp)
        config.virtual_pipeline_model_parallel_size = 2
        found["vpp"] = silently_wrong(config, ddp)
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        found["overlapped"] = silently_wrong(config, ddp)
        return found


def read_whole(arch: Arch, teacher: Path) -> tuple[bool, bool]:
    """Load a checkpoint into a model whose weights claim to be FP8.

    Returns whether it is read into separate memory, and whether the weights have its values.
    """
    with joined(ONE) as world:
        want = [parameter.clone() for parameter in load(arch, teacher, world).last_chunk.parameters()]
        chunks = build_model(
            arch, world, ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH)
        ).chunks
        chunks[0].config.fp8_param = True
        own, places = {parameter.data_ptr() for parameter in chunks[0].parameters()}, set()
        with patch.object(
            checkpoint,
            "load_checkpoint",
            side_effect=lambda state, folder, read=load_checkpoint: (
                places.update(_places(state)),
                read(state, folder),
            )[1],
        ):
            load_weights(chunks, teacher, world)
        return not own & places, all(map(torch.equal, chunks[0].parameters(), want))


def _places(state: dict[str, Any]) -> set[int]:
    return {entry.data.data_ptr() for entry in nested_values(state)}


class NormLinear(nn.Module):
    """A norm and the linear layer behind it in one module.

    It has the attributes of Transformer Engine's LayerNormLinear, which needs a GPU.
    """

    def __init__(self, norm: Any, linear: Any, normalization: str):
        super().__init__()
        self.linear, self.normalization, self.eps, self.zero_centered_gamma = (
            linear,
            normalization,
            norm.eps,
            hasattr(norm, "bias"),
        )
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, getattr(norm, "bias", None)
        self.apply_norm = norm

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.apply_norm(x))


def scores_of_fused_norms(arch: Arch, teacher: Path) -> list[Any]:
    """Return the importance of a model with separate norms and with norms fused into linears."""
    with joined(ONE) as world:
        model, samples = load(arch, teacher, world), make_samples(arch, 0, 4)
        found = [score_samples(model, samples, DEFAULT_PAIR)]
        name = "RMSNorm" if arch.norm == "rms" else "LayerNorm"
        for block in model.last_chunk.decoder.layers:
            block.self_attention.linear_qkv = NormLinear(
                block.input_layernorm, block.self_attention.linear_qkv, name
            )
            block.mlp.linear_fc1 = NormLinear(block.pre_mlp_layernorm, block.mlp.linear_fc1, name)
            block.input_layernorm, block.pre_mlp_layernorm = IdentityOp(), IdentityOp()
        found.append(score_samples(model, samples, DEFAULT_PAIR))
        return [scores.tensors() for scores in found]


def collected(arch: Arch, checkpoints: Path, interval: int | None) -> tuple[list[float], list[bool], bool]:
    """Run a few steps.

    Returns (losses, whether automatic garbage collection is on after each step, and at the end).
    """
    settings = CorrectionConfig(
        steps=3, warmup_steps=0, global_batch_size=4, lr=1e-3, collect_interval=interval
    )
    losses, by_itself = [], []

    def note(metrics: Any) -> None:
        losses.append(metrics.loss)
        by_itself.append(gc.isenabled())

    with joined(ONE) as world:
        torch.manual_seed(1)
        model = build_model(
            arch,
            world,
            ModelOptions(
                precision="fp32",
                sequence_length=SEQUENCE_LENGTH,
                training=settings,
                random_weights=True,
            ),
        )
        train_one(
            model,
            None,
            lambda step: microbatches(make_samples(arch, step, 4), 1, 0, 1),
            settings,
            RunOptions(checkpoints, manifest("correct"), seed=3, on_step=note),
        )
    return losses, by_itself, gc.isenabled()
