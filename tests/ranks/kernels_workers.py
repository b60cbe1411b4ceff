"""Worker functions for the kernel tests: with TRITON_INTERPRET=1 on CPU tensors, else compile only.

Triton reads that variable at import. So these functions run in a separate process, and the test
session does not import triton. The interpreter works on numpy arrays, bf16 included (triton 3.9,
numpy 2.4). It does not support & between a scalar and a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from losses_workers import chunked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minitron_mp.losses import fused, torch_rows
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherHidden, TeacherTarget, TeacherTopK
from minitron_mp.losses.rows import LogitRows, TopK


def row_functions(calls: list[dict[str, Any]]) -> list[dict[str, dict[str, Tensor]]]:
    """Return {"rows", "kernels"} -> results of run() with plain torch and with the kernels."""
    from minitron_mp.losses import kernel_calls

    return [{"rows": run(torch_rows, **call), "kernels": run(kernel_calls, **call)} for call in calls]


def run(
    module: Any,
    z_s: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    valid: int,
    objective: Objective,
    *,
    ranks: int = 1,
    top_k: TopK | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return statistics [ranks, n, 7], losses [3, n] and gradient of rows split over `ranks` ranks.

    z_s, z_t, labels, valid, top_k: of the full vocabulary. dtype: of the gradient; None: it takes the
    place of z_s.
    """
    columns = z_s.shape[1] // ranks
    rows = []
    for rank in range(ranks):
        first = rank * columns
        rows.append(
            LogitRows(
                _apart(z_s[:, first : first + columns]),
                None if z_t is None else _apart(z_t[:, first : first + columns]),
                labels - first,
                token_weights,
                max(0, min(columns, valid - first)),
                objective,
                None if top_k is None else replace(top_k, columns=top_k.columns - first),
            )
        )
    own = [module.statistics(each) for each in rows]
    tables = torch.stack([each.table for each in own])
    found = {"statistics": tables}
    second_sums = None
    if z_t is not None and DIVERGENCES[objective.divergence].second_sums is not None:
        second_sums = torch.stack([module.second_sums(each, tables) for each in rows])
        found["second_sums"] = second_sums
    losses = torch.full((ranks, 3, len(labels) + 1), torch.nan, device=z_s.device)[:, :, 1:]
    gradients = []
    for rank, each in enumerate(rows):
        out = each.student
        if dtype is not None:
            out = _apart(torch.full_like(each.student, torch.nan, dtype=dtype))
        module.finish(each, own[rank], tables, second_sums, losses[rank], out)
        gradients.append(out.clone())
    assert torch.equal(losses.nan_to_num(), losses[:1].nan_to_num().expand_as(losses)), "ranks disagree"
    return found | {"losses": losses[0], "gradient": torch.cat(gradients, 1)}


def _apart(z: Tensor) -> Tensor:
    """Return the same values in new memory, with room between the rows."""
    wide = z.new_full((z.shape[0], z.shape[1] + 16), torch.nan)
    wide[:, : z.shape[1]] = z
    return wide[:, : z.shape[1]]


def fused_all(calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """losses_workers.fused_all with the kernels in it."""
    import losses_workers

    with with_kernels():
        return losses_workers.fused_all(calls)


@contextmanager
def with_kernels() -> Iterator[None]:
    """Make the loss use the kernels on CPU tensors."""
    from minitron_mp.losses import kernel_calls

    usual = fused._row_functions
    fused._row_functions = lambda _: kernel_calls
    try:
        yield
    finally:
        fused._row_functions = usual


def lse_without(logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
    from minitron_mp.losses import kernel_calls

    return kernel_calls.lse_without(logits, columns, temperature)


def count_launches(tiles: int, kind: str) -> Counter[str]:
    """Return name -> number of the kernels and of torch's operations that start work on a device.

    All tiles of two rows share one product of the weight gradient.
    """
    from minitron_mp.losses import kernels, row_kernels

    torch.manual_seed(0)
    rows = 2 * tiles
    hidden, weight = torch.randn(rows, 1, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    target: TeacherTarget | None = TeacherHidden(torch.randn(rows, 1, 12), torch.randn(64, 12))
    if kind == "top_k":
        top = torch.randn(rows, 1, 64).log_softmax(-1).topk(4)
        target = TeacherTopK(top.indices, top.values, torch.full((rows, 1, 1), -1.0))
    if kind == "ce":
        target = None
    divergence = kind if kind in DIVERGENCES else "forward_kl"
    objective = Objective(divergence, 2.0, 0.0 if target is None else 1.0, 0.5)
    labels, weights = torch.randint(0, 60, (rows, 1)), torch.ones(rows, 1)
    weight.main_grad = torch.zeros(64, 8)
    counts: Counter[str] = Counter()
    launchers = [
        (module, name, kernel)
        for module in (kernels, row_kernels)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "fn")
    ]
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    try:
        for module, name, kernel in launchers:
            setattr(module, name, _CountedKernel(name, kernel, counts))
        with with_kernels(), chunked((2, 2, rows), 64), _CountedOperations(counts):
            distillation_loss(hidden, weight, labels, weights, target, objective, vocab_size=60, group=group)
    finally:
        for module, name, kernel in launchers:
            setattr(module, name, kernel)
    return counts


class _CountedKernel:
    def __init__(self, name: str, kernel: Any, counts: Counter[str]):
        self.name, self.kernel, self.counts = name, kernel, counts

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.counts[self.name] += 1
            with _disable_current_modes():  # the interpreter copies tensors
                self.kernel[grid](*args, **kwargs)

        return launch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernel(*args, **kwargs)  # from another kernel


class _CountedOperations(TorchDispatchMode):
    """Counts operations whose result is neither new empty memory nor a view."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"aten.{function._overloadpacket.__name__}"
        if not function.is_view and "empty" not in name and "new_empty" not in name:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def cosine_distances(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    from minitron_mp.pruning.cosine_kernel import cosine_distance

    return [cosine_distance(a, b) for a, b in pairs]


def compile_for(architecture: int) -> list[Any]:
    """Compile all kernels for CUDA, without a device; return benchmarks/kd_loss_parts.Resources."""
    from kd_loss_parts import _compile, compile_kernels

    from minitron_mp.losses import kernel_calls
    from minitron_mp.pruning import cosine_kernel

    found = compile_kernels(architecture)
    options, warps = {"BLOCK": kernel_calls.BLOCK}, kernel_calls.WARPS
    for logits in ("fp32", "bf16"):
        found.append(_compile(cosine_kernel._cosine_distance, logits, "", options, warps, architecture))
    return found


def count_bytes(columns: int, logits: torch.dtype, divergence: str) -> dict[str, tuple[float, float]]:
    """Return kernel -> (bytes read, bytes written) per token and column, beside numbers per row."""
    from triton.runtime.interpreter import InterpreterBuilder

    from minitron_mp.losses import kernel_calls

    moved = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if mask.data.size > 64:
            moved["read"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if mask.data.size > 64:
            moved["written"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    num_rows = 2
    z_s, z_t = (torch.randn(num_rows, columns).to(logits) for _ in range(2))
    labels, weights = torch.zeros(num_rows, dtype=torch.long), torch.ones(num_rows)
    rows = LogitRows(z_s, z_t, labels, weights, columns, Objective(divergence, ce_weight=0.5))
    out, losses = torch.empty((num_rows, columns), dtype=torch.bfloat16), torch.empty(3, num_rows)
    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    found = {}

    def record(name: str) -> None:
        size = num_rows * columns
        found[name] = moved["read"] / size, moved["written"] / size
        moved.update(read=0, written=0)

    try:
        own = kernel_calls.statistics(rows)
        record("statistics")
        sums = None
        if DIVERGENCES[divergence].second_sums is not None:
            sums = kernel_calls.second_sums(rows, own.table[None])[None]
            record("second_sums")
        kernel_calls.finish(rows, own, own.table[None], sums, losses, out)
        record("gradient")
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
    return found
