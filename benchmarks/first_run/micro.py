"""Facts in half a minute: products at odd row counts, launches, copies and norms on this GPU.

    python benchmarks/first_run/micro.py --out result.json

Without a GPU it runs at tiny sizes, to test the program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HIDDEN = 4096 if ON_GPU else 64
VOCABULARIES = (131072, 128256, 151936, 256000, 49152) if ON_GPU else (512, 500)
CHUNK = 2**26 if ON_GPU else 2**14
"""Logits of a chunk of the loss."""
ROWS = (512, 523, 2048, 2092, 4096) if ON_GPU else (32, 33)
LOOPS = 2000 if ON_GPU else 20


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats * 1e3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def product(kind: str, rows: int, columns: int, ms: float) -> dict[str, Any]:
    tflops = 2 * rows * columns * HIDDEN / ms / 1e9
    return {"product": kind, "vocab": columns, "rows": rows, "ms": ms, "tflops": tflops}


def logits_products() -> Iterator[dict[str, Any]]:
    """Logits of one chunk: rows that fill the chunk, and the multiple of 128 below."""
    for columns in VOCABULARIES:
        weight, rows = normal(columns, HIDDEN), CHUNK // columns
        for count in sorted({rows, max(1, rows // 128) * 128, 4 * rows}):
            x = normal(count, HIDDEN)
            for dtype in (torch.float32, torch.bfloat16):
                options = {"out_dtype": dtype} if ON_GPU else {}
                ms = milliseconds(
                    lambda x=x, weight=weight, options=options: torch.mm(x, weight.t(), **options)
                )
                yield product(f"logits in {str(dtype)[6:]}", count, columns, ms)


def gradient_products() -> Iterator[dict[str, Any]]:
    """Gradients of the hidden states and, into a float32 buffer, of the output layer's weight."""
    columns = VOCABULARIES[0]
    weight, gradient = normal(columns, HIDDEN), torch.zeros(columns, HIDDEN, device=DEVICE)
    for rows in ROWS:
        logits, x = normal(rows, columns), normal(rows, HIDDEN)
        yield product("dX", rows, columns, milliseconds(lambda logits=logits: torch.mm(logits, weight)))
        add = adding(gradient, logits, x)
        yield product("dW", rows, columns, milliseconds(add))


def adding(gradient: Tensor, logits: Tensor, x: Tensor) -> Callable[[], Any]:
    """Return a function that adds logits^T x to the gradient."""
    if ON_GPU:
        return lambda: torch.addmm(gradient, logits.t(), x, out_dtype=gradient.dtype, out=gradient)
    return lambda: gradient.addmm_(logits.t().float(), x.float())


def bytes_of_adding() -> int | None:
    """Memory that the product for the gradient of the weight takes beyond its operands; 0: no copy."""
    if not ON_GPU:
        return None
    columns, rows = VOCABULARIES[0], ROWS[0]
    add = adding(torch.zeros(columns, HIDDEN, device=DEVICE), normal(rows, columns), normal(rows, HIDDEN))
    add()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add()
    return torch.cuda.max_memory_allocated() - before


def launches() -> dict[str, float]:
    """Microseconds of a small kernel: issued by the host, and until the device is done."""
    small = torch.zeros(512, device=DEVICE)
    wait()
    start = time.perf_counter()
    for _ in range(LOOPS):
        small.add_(1)
    host = time.perf_counter() - start
    wait()
    return {"host_us": host / LOOPS * 1e6, "total_us": (time.perf_counter() - start) / LOOPS * 1e6}


def copies() -> dict[str, float]:
    """GB/s within the device, and from pageable and pinned host memory to it."""
    count = 2**28 if ON_GPU else 2**18
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    found = {"device": 2 * count / milliseconds(lambda: target.copy_(source)) / 1e6}
    host = torch.empty(count, dtype=torch.uint8)
    found["pageable"] = count / milliseconds(lambda: target.copy_(host)) / 1e6
    if ON_GPU:
        pinned = host.pin_memory()
        found["pinned"] = count / milliseconds(lambda: target.copy_(pinned, non_blocking=True)) / 1e6
    return found


def norms() -> dict[str, dict[str, float]]:
    """Host microseconds of a norm: forward, and forward with backward."""
    modules: dict[str, torch.nn.Module] = {
        "torch": torch.nn.RMSNorm(HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    }
    if ON_GPU:
        from transformer_engine.pytorch import RMSNorm

        from minitron_mp.models.engine_layers import EngineRMSNorm

        modules["Transformer Engine"] = RMSNorm(HIDDEN, dtype=torch.bfloat16, device="cuda")
        config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
        modules["ours, with Transformer Engine's kernels"] = EngineRMSNorm(config, HIDDEN).cuda()
    x, found = normal(64, 1, HIDDEN).requires_grad_(), {}
    for name, module in modules.items():
        found[name] = {
            "forward_us": host_microseconds(lambda module=module: module(x)),
            "both_us": host_microseconds(lambda module=module: module(x).backward(x.detach())),
        }
    return found


def host_microseconds(work: Callable[[], Any]) -> float:
    count = LOOPS // 10
    for _ in range(20):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(count):
        work()
    host = time.perf_counter() - start
    wait()
    return host / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "products": lambda: [*logits_products(), *gradient_products()],
        "bytes_of_adding": bytes_of_adding,
        "launch": launches,
        "copies_gb_s": copies,
        "norms": norms,
    }
    for name, measure in parts.items():
        found[name] = measure()
        out.write_text(json.dumps(found, indent=1) + "\n")  # what is known if a later part fails
        print(name, json.dumps(found[name])[:400], flush=True)


if __name__ == "__main__":
    main()
