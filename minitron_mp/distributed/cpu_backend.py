"""Patches that let Megatron-Core run on the CPU with gloo.

This is the only file with patches. It does nothing on a GPU. Megatron-Core (0.16 to 0.19) is
written for one CUDA device per process. Three things prevent it from running on a CPU: explicit
"cuda" devices, a dozen unconditional torch.cuda calls, and checkpoints that assume the state layout
of Apex's or Transformer Engine's Adam. A comment at each patch names the code that needs it. Remove
a patch when Megatron-Core accepts the device as an argument there.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@functools.cache
def install() -> bool:
    """Apply the patches once per process, before megatron.core builds groups or models.

    Returns True on a CPU, and False on a GPU, where it applies no patch.
    """
    if torch.cuda.is_available():
        return False
    for owner, name, new in _patches():
        setattr(owner, name, new)
    mode = CudaToCpu()
    engine = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # torch turns a mode off while its handler runs, and Tensor.backward runs inside the
        # handler. Activation recomputation runs Megatron code in the backward pass, so the mode is
        # turned on again here.
        with mode:
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    mode.__enter__()
    # Megatron decorates small functions with torch.compile. On a CPU that costs minutes and gains
    # nothing.
    torch.compiler.set_stance("force_eager")
    return True


class CudaToCpu(TorchFunctionMode):
    """Mode that replaces explicit CUDA devices by the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].device.type == "cpu":
            # Megatron's optimizers sort parameters by 'torch.cuda.FloatTensor'. Other callers get
            # the true name.
            name = func(*args)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.") else name
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class NullStream:
    """A CUDA stream or event on a CPU, where everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any): ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> NullStream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class NullEvent(NullStream):
    pass


def _patches() -> list[tuple[Any, str, Any]]:
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random

    def nothing() -> Callable[..., None]:
        # a new object each time: torch._dynamo rejects one object under two names
        return lambda *args, **kwargs: None

    def get_state() -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: torch.get_rng_state()

    def set_state() -> Callable[..., None]:
        return lambda state, *args, **kwargs: torch.set_rng_state(state)

    stream = NullStream()
    cuda = {
        "current_device": lambda: CPU,  # used as a device= argument all over megatron.core
        "set_device": nothing(),
        "synchronize": nothing(),  # timers
        "empty_cache": nothing(),
        # model_parallel_cuda_manual_seed
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": get_state(),
        "set_rng_state": set_state(),
        # param_and_grad_buffer on every gradient sync (0.19)
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": NullStream,
        "Event": NullEvent,
        "memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
    }
    patches = [(torch.cuda, name, new) for name, new in cuda.items()]
    patches += [(torch.cuda.nvtx, "range_push", nothing()), (torch.cuda.nvtx, "range_pop", nothing())]
    patches += [(random, "_get_cuda_rng_state", get_state()), (random, "_set_cuda_rng_state", set_state())]
    patches += [(random, "CudaRNGStatesTracker", _cpu_tracker(random.CudaRNGStatesTracker))]
    # torch's Adam keeps "step" in the state of each parameter. The distributed optimizer's
    # checkpoint needs it in the group, as Apex and TE have it, and fails on load otherwise.
    # FusedAdam below has their layout, so the same code path runs as on a GPU.
    patches += [(optimizer, "Adam", FusedAdam), (optimizer, "USING_PYTORCH_OPTIMIZER", False)]
    patches += [
        (distrib_optimizer, name, value)
        for name, value in (("Adam", FusedAdam), ("HAVE_APEX_OR_TE", True), ("USING_APEX_OPTIMIZER", True))
    ]
    # Without Apex and TE Megatron clips each gradient by a product and a copy. This patch does it
    # in place.
    patches += [(clip_grads, "multi_tensor_scale_impl", _multi_tensor_scale)]
    return [(owner, name, new) for owner, name, new in patches if hasattr(owner, name)]


def _multi_tensor_scale(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], scale: Any
) -> None:
    sources, targets = lists
    if any(source is not target for source, target in zip(sources, targets)):
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, scale)


def _cpu_tracker(stock: type) -> type:
    class CpuRNGStatesTracker(stock):  # type: ignore[misc]
        """Megatron's named random streams on the CPU generator."""

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Any:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRNGStatesTracker


class FusedAdam(torch.optim.Optimizer):
    """torch's fused CPU AdamW in the state layout of Apex and Transformer Engine.

    "step" is in the parameter group. The state of a parameter is exactly {exp_avg, exp_avg_sq}, in
    its dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = int(group.get("step") or 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # the functional form increments the step before it uses it
                [torch.tensor(group["step"] - 1.0) for _ in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
