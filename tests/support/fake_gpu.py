"""One rank on a GPU that computes nothing, for machines without a GPU.

    with fake_gpu(ParallelConfig(tp=2), rank=1) as (world, waits): ...

torch's FakeTensorMode runs the real code with tensors that have a shape, a dtype and the device
cuda:0, and no values. An operation on tensors of different devices or unfitting shapes or dtypes
fails as on a GPU. Process groups have torch's "fake" backend. Triton kernels are replaced by a check
of their arguments. `waits` counts where the host would wait for the GPU, as
torch.cuda.set_sync_debug_mode() does on a GPU.

It replaces parts of torch for the rest of the process, so use it in a process of its own, before
any other world.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed import world as world_module
from minitron_mp.distributed.cpu_backend import NullEvent, NullStream

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
COALESCED = {
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
}


def build(folder: Path) -> Path | None:
    """Compile fake_gpu.cpp for this torch, once. Return the library, or None without a compiler."""
    torch_folder, library = Path(torch.__file__).parent, folder / "fake_gpu.so"
    if library.exists():
        return library
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(SOURCE)]
    command += ["-o", str(library), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return library


class HostWaits(TorchDispatchMode):
    """Counts operations that make the host wait for the GPU, by the project's line that calls them.

    They are copies to the host (also item(), tolist(), bool() and nonzero()), copies to the GPU from
    memory that is not pinned, and torch.cuda's synchronize(). A tensor has no values here, so a read
    number is `number`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 1
        """The number that is read from any tensor on the GPU."""
        self.places: Counter[str] = Counter()
        self.pinned: set[int] = set()
        """Addresses of the storages of pinned tensors."""

    def add(self, kind: str) -> None:
        """Count a wait at the innermost line of the package, or of Megatron if there is none."""
        for part in ("/minitron_mp/", "/megatron/core/"):
            for frame in reversed(traceback.extract_stack()):
                if part in frame.filename:
                    name = frame.filename.rpartition(part)[2]
                    self.places[f"{part.strip('/')}/{name} {frame.name}: {kind}"] += 1
                    return
        self.places[f"elsewhere: {kind}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COALESCED:  # FakeTensorMode does not have them
            return FakeWork().boxed()
        if func is aten._pin_memory.default or func is aten.pin_memory.default:
            copy = args[0].clone()
            self.pinned.add(copy.untyped_storage()._cdata)
            return copy
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self.pinned
        if func is aten._local_scalar_dense.default:
            number = 1
            if args[0].is_cuda:
                self.add("a number is read")
                number = self.number
            return bool(number) if args[0].dtype is torch.bool else number
        if func is aten.nonzero.default and args[0].is_cuda:
            self.add("a number of elements is read")
            return torch.ones((1, args[0].dim()), dtype=torch.int64, device=args[0].device)
        if func is aten._to_copy.default:
            self._copy(args[0], torch.device(kwargs.get("device") or args[0].device), kwargs)
        if func is aten.copy_.default and isinstance(args[1], Tensor):
            is_asynchronous = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self._copy(args[1], args[0].device, {"non_blocking": is_asynchronous})
        return func(*args, **kwargs)

    def _copy(self, source: Tensor, target: torch.device, kwargs: dict[str, Any]) -> None:
        if source.device.type == target.type:
            return
        source.constant = None  # FakeTensorMode would really copy a small constant
        if target.type == "cuda":
            is_pinned = source.untyped_storage()._cdata in self.pinned
            if not (is_pinned and kwargs.get("non_blocking")):
                self.add("copy to the GPU from pageable memory")
        elif source.is_cuda:
            self.add("copy to the host")


@contextlib.contextmanager
def fake_gpu(
    parallel: ParallelConfig, library: Path, *, rank: int = 0, dp: int = 1
) -> Iterator[tuple[world_module.World, HostWaits]]:
    """Yield the world of one rank of a layout on the fake GPU, and the counter of waits.

    library: result of build().
    """
    ctypes.CDLL(str(library))
    waits = HostWaits()
    with contextlib.ExitStack() as stack:
        for owner, name, value in _patches(waits):
            stack.enter_context(patch.object(owner, name, value))
        torch.compiler.set_stance("force_eager")
        dist.init_process_group("fake", rank=rank, world_size=parallel.model_ranks * dp, store=FakeStore())
        # torch.tensor(1.0, device="cuda") makes a tensor on the CPU and copies it. With this setting
        # the copy is an operation that the modes see.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(waits)
        try:
            yield world_module.build_groups(parallel, DEVICE, 1), waits
        finally:
            world_module.leave_job(DEVICE)


class _Generator:
    def __init__(self, state: Tensor):
        self.state = state

    def get_state(self) -> Tensor:
        return self.state

    def set_state(self, state: Tensor) -> None: ...


def _patches(waits: HostWaits) -> list[tuple[Any, str, Any]]:
    """Return the parts of torch.cuda that need a driver, and their replacements."""
    import triton.runtime.jit

    stream = NullStream()
    state = torch.zeros(16, dtype=torch.uint8)

    class Stream(NullStream):
        device = DEVICE

    def synchronize(*_: Any) -> None:
        waits.add("synchronize")

    stream.synchronize = synchronize  # type: ignore[method-assign]
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake GPU",
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "set_stream": lambda *_: None,
        "Stream": Stream,
        "Event": NullEvent,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "default_generators": [_Generator(state)],
        "get_rng_state": lambda *_, **__: state,
        "set_rng_state": lambda *_, **__: None,
        "memory_allocated": lambda *_, **__: 0,
        "max_memory_allocated": lambda *_, **__: 0,
        "max_memory_reserved": lambda *_, **__: 0,
        "mem_get_info": lambda *_, **__: (1 << 36, 1 << 36),
    }

    def values(tensor: Tensor) -> np.ndarray:
        if tensor.is_cuda:
            waits.add("values are read")
        return np.ones(tuple(tensor.shape), np.float32 if tensor.is_floating_point() else np.int64)

    patches = [(torch.cuda, name, value) for name, value in replaced.items()]
    patches += [(torch.cuda.random, name, replaced[name]) for name in ("get_rng_state", "set_rng_state")]
    patches += [(torch.cuda.nvtx, name, lambda *_: None) for name in ("range_push", "range_pop")]
    make_tensor = torch.tensor

    def tensor(data: Any, *, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = make_tensor(data, **kwargs)
        return made.pin_memory() if pin_memory else made

    patches += [(torch, "tensor", tensor)]
    patches += [(dist, "all_gather_object", _gather_objects)]
    patches += [(Tensor, "numpy", values), (FakeTensor, "tolist", lambda tensor: values(tensor).tolist())]
    patches += [(triton.runtime.jit.JITFunction, "run", _launch), (torch.nn.Module, "to", _move)]
    return patches


def _gather_objects(objects: list[Any], value: Any, group: Any = None) -> None:
    objects[:] = [value] * len(objects)


def _move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Module.to(), which cannot replace the data of a fake parameter: it makes new parameters."""
    new: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.device.type != device.type:
                moved = new.setdefault(old, torch.nn.Parameter(old.detach().to(device), old.requires_grad))
                moved.__dict__.update({k: v for k, v in vars(old).items() if k not in vars(moved)})
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


launched: Counter[str] = Counter()
"""Names of the Triton kernels that were launched."""


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Check the arguments of a Triton kernel: every name has a value, and tensors are on the GPU."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    assert len(args) <= len(names), kernel.fn.__name__
    missing = [p.name for p in kernel.params if p.name not in given and not p.has_default]
    assert not missing, f"{kernel.fn.__name__} lacks {missing}"
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert value.is_cuda, f"{name} of {kernel.fn.__name__} is on {value.device}"
    assert all(isinstance(size, int) and size >= 0 for size in grid), grid
    launched[kernel.fn.__name__] += 1
