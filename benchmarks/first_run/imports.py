"""Import every module of the package and what the GPU path needs; print versions and the device."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time

import torch  # before Transformer Engine
from machine import versions

import minitron_mp


def import_all() -> tuple[list[str], list[str]]:
    """Return (what could not be imported, modules that need a GPU build of Transformer Engine)."""
    failed, need_gpu = [], []
    for module in pkgutil.walk_packages(minitron_mp.__path__, "minitron_mp."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            is_engine = (error.name or "").startswith("transformer_engine")
            if is_engine and not torch.cuda.is_available():
                need_gpu.append(module.name)
            else:
                failed.append(f"{module.name}: {error}")
        except Exception as error:
            failed.append(f"{module.name}: {type(error).__name__}: {error}")
    return failed, need_gpu


def main() -> None:
    start = time.perf_counter()
    print(versions())
    failed, need_gpu = import_all()
    if torch.cuda.is_available():
        import transformer_engine.pytorch  # noqa: F401

        print(torch.cuda.get_device_name(), "NCCL", torch.cuda.nccl.version())
    print("\n".join(failed))
    if need_gpu:
        print(f"need a GPU build of Transformer Engine: {', '.join(need_gpu)}")
    print(f"imported in {time.perf_counter() - start:.1f} s, {len(failed)} modules failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
