"""What test_optimizer_precision.py runs on ranks: training with bf16 gradients and bf16 moments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from cases import Layout, settings
from megatron.core import optimizer, utils
from model_workers import joined
from packaging.version import Version
from torch import Tensor
from training_workers import Runner, copy_once

from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.distributed.cpu_backend import FusedAdam
from minitron_mp.models import build
from minitron_mp.models.arch import Arch
from minitron_mp.training import run


class EngineAdam(FusedAdam):
    """Transformer Engine's Adam with the interface that Megatron-Core uses, computed by torch.

    It has float32 master weights beside the bf16 weights, and moments of any precision.
    """

    def __init__(
        self,
        params: Any,
        *,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        master_weight_dtype: torch.dtype,
        use_decoupled_grad: bool,
        store_param_remainders: bool,
        master_weights: bool,
        adam_w_mode: bool,
        **more: Any,
    ):
        super().__init__(params, **more)
        assert use_decoupled_grad
        assert master_weights
        assert not store_param_remainders
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        for name, dtype in self.dtypes.items():
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        self.state[param]["master_param"].copy_(param)

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        return self.state[param][name].float()

    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        assert value.dtype == torch.float32
        self.state[param][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            pieces = [piece for piece in group["params"] if piece.decoupled_grad is not None]
            group["step"] = int(group.get("step") or 0) + 1
            for piece in pieces:
                if not self.state[piece]:
                    self.initialize_state(piece, False)
                state = self.state[piece]
                master = state["master_param"].clone().requires_grad_()
                master.grad = piece.decoupled_grad.float()
                adam = FusedAdam([master], group["lr"], group["betas"], group["eps"], group["weight_decay"])
                adam.param_groups[0]["step"] = group["step"] - 1
                adam.state[master] = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
                adam.step()
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].copy_(adam.state[master][name])
                state["master_param"].copy_(master)
                piece.copy_(master)


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Let Megatron-Core find EngineAdam as the Adam of Transformer Engine, on a CPU."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    modules[names[0]].__version__ = "2.16.1"
    modules[names[2]].FusedAdam = EngineAdam
    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, modules))
        stack.enter_context(patch.object(optimizer, "Adam", EngineAdam))
        stack.enter_context(patch.object(utils, "_te_version", Version("2.16.1")))
        stack.enter_context(patch.object(build, "optimizer_problems", lambda *arguments: []))
        yield


def train_in(
    layout: Layout,
    arch: Arch,
    student: Path,
    output: Path,
    changes: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Train by cross-entropy in bf16 with each of these changes of the settings: stopped and resumed.

    Returns (losses without interruption, those of the resumed run, whether the final weights agree
    bitwise, dtypes of gradient buffers and moments) by name.
    """
    found = {}
    with joined(layout) as world:
        for name, change in changes.items():
            shared = settings(layout).model_dump(include=set(TrainingConfig.model_fields))
            chosen = CorrectionConfig(**{**shared, **change})
            runner = Runner(world, None, chosen, precision="bf16")
            seen: set[torch.dtype] = set()
            make = run.TrainableModel

            def noted(*arguments: Any, make: Any = make, seen: set[torch.dtype] = seen) -> Any:
                trainable = make(*arguments)
                seen |= {
                    parameter.main_grad.dtype
                    for chunk in trainable.model.chunks
                    for parameter in chunk.parameters()
                }
                return trainable

            double = transformer_engine() if chosen.moment_precision == "bf16" else nullcontext()
            with double, patch.object(run, "TrainableModel", noted):
                whole = runner(arch, student, output / name / "whole")
                copy_once(output / name / "whole", output / name / "parts")
                resumed = runner(arch, None, output / name / "parts")
            bitwise = all(map(torch.equal, whole.weights, resumed.weights))
            found[name] = (
                [(m.loss, m.grad_norm) for m in whole.metrics],
                [(m.loss, m.grad_norm) for m in resumed.metrics],
                bitwise,
                seen,
            )
    return found
