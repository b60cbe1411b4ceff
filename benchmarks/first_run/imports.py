"""Import every module of the package and what the GPU path needs; print versions and the device."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time

import torch  # before Transformer Engine
from machine import versions

import minitron_mp


def import_all() -> list[str]:
    """Return what could not be imported."""
    failed = []
    for module in pkgutil.walk_packages(minitron_mp.__path__, "minitron_mp."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed.append(f"{module.name}: {type(error).__name__}: {error}")
    return failed


def main() -> None:
    start = time.perf_counter()
    print(versions())
    failed = import_all()
    if torch.cuda.is_available():
        import transformer_engine.pytorch  # noqa: F401

        print(torch.cuda.get_device_name(), "NCCL", torch.cuda.nccl.version())
    print("\n".join(failed))
    print(f"imported in {time.perf_counter() - start:.1f} s, {len(failed)} modules failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
