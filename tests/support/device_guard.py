"""A check on CPU ranks that no tensor in host memory is communicated over a group of NCCL.

GPU memory is emulated: the device of a rank is "cpu:0", which torch treats as "cpu". A storage that
is made on that device, or computed from one that is, counts as GPU memory. All other storages are
host memory. All groups but the host group count as groups of NCCL, and refuse host memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_mp.distributed import cpu_backend, process_groups, roles, world

GPU = torch.device("cpu", 0)

MOVES = (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.to)


class HostTensorOnGPU(AssertionError):
    """A collective of NCCL would refuse this tensor."""


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "is_gpu_memory", False)


def put_on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().is_gpu_memory = True  # type: ignore[attr-defined]
    return tensor


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Moves(TorchFunctionMode):
    """Emulates copies between host and GPU, which torch leaves out if both are "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:  # cpu_backend looks at its caller, which is here
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return result.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else result
        device = kwargs.get("device")
        if func in MOVES:
            devices = [each for each in (*args[1:], device) if isinstance(each, (str, torch.device))]
            if func is not torch.Tensor.to:
                devices = ["cuda" if func is torch.Tensor.cuda else "cpu"]
            if not devices or is_on_gpu(result) == _is_gpu(devices[0]):
                return result
            result = result.detach().clone() if not result.requires_grad else result.clone()
            result.untyped_storage().is_gpu_memory = _is_gpu(devices[0])
        elif isinstance(result, torch.Tensor) and self._makes_gpu_memory(func, args, device):
            put_on_gpu(result)
        return result

    @staticmethod
    def _makes_gpu_memory(func: Any, args: Any, device: Any) -> bool:
        if device is None:
            return func is torch.Tensor.new_tensor and is_on_gpu(args[0])
        return _is_gpu(device)


def _is_gpu(device: Any) -> bool:
    return str(device).startswith("cuda") or device == GPU


class Memory(TorchDispatchMode):
    """Follows GPU memory through all operations, also of a backward pass, and checks collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        if func.namespace == "c10d":
            self._check(func, args, inputs)
            return func(*args, **kwargs)
        results = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        device = kwargs.get("device")
        if _is_gpu(device) or (device is None and any(map(is_on_gpu, inputs))):
            for tensor in tensors_in(results):
                if tensor.untyped_storage()._cdata not in known:
                    put_on_gpu(tensor)
        return results

    def _check(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        groups = [value for value in args if isinstance(value, torch.ScriptObject)]
        group = next(filter(None, map(_as_group, groups)), None)
        if group is None or _is_host_group(group):
            return
        self.collectives[func.__name__.split(".")[0]] += 1
        if func.__name__.startswith("barrier"):
            return
        for tensor in tensors:
            if not is_on_gpu(tensor):
                raise HostTensorOnGPU(
                    f"{func}: a tensor in host memory {tuple(tensor.shape)} on group {group.group_name}"
                )


def _as_group(value: Any) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(value)
    except Exception:  # another object, such as the operation of a reduction
        return None


def _is_host_group(group: dist.ProcessGroup) -> bool:
    return any(group.group_name == host.group_name for _, host in process_groups._host_groups)


@contextmanager
def emulated_gpu() -> Iterator[Counter[str]]:
    """Emulate GPU memory and NCCL on this rank; yield the number of collectives of NCCL by name."""
    object_device = dist.distributed_c10d._get_object_coll_device

    def device_of_objects(group: dist.ProcessGroup | None = None) -> str:
        group = group or dist.group.WORLD
        return object_device(group) if _is_host_group(group) else "cuda"

    cpu_backend.install()  # its mode must be below the modes of this file
    memory = Memory()
    with (
        patch.object(cpu_backend, "CPU", GPU),
        patch.object(world, "local_device", lambda: GPU),
        patch.object(roles, "local_device", lambda: GPU),
        patch.object(process_groups, "CPU", torch.device("xla")),  # which the default group does not have
        patch.object(dist.distributed_c10d, "_get_object_coll_device", device_of_objects),
        Moves(),
        memory,
    ):
        yield memory.collectives
