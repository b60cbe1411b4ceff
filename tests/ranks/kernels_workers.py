"""Worker functions for the kernel tests: with TRITON_INTERPRET=1 on CPU tensors, else compile only.

Triton reads that variable at import. So these functions run in a separate process, and the test
session does not import triton. The interpreter works on numpy arrays, bf16 included (triton 3.9,
numpy 2.4). It does not support & between a scalar and a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_mp.losses import fused, torch_rows
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.parameters import PARAMETERS, complete_parameters
from minitron_mp.losses.rows import LogitRows, RowValues


def row_functions(calls: list[dict[str, Any]]) -> list[dict[str, dict[str, Tensor]]]:
    return [both(**call) for call in calls]


def both(
    z_s: Tensor, z_t: Tensor | None, labels: Tensor, weights: tuple[Tensor, Tensor], valid: int, **how: Any
) -> dict[str, dict[str, Tensor]]:
    """Return {"rows", "kernels"} -> results of both from the same row values."""
    from minitron_mp.losses import kernel_calls

    found, values = {}, row_values(z_s, z_t, labels, weights, valid, how["t"], how["divergence"])
    for name, module in (("rows", torch_rows), ("kernels", kernel_calls)):
        found[name] = run(
            module, _apart(z_s), None if z_t is None else _apart(z_t), labels, values, valid, **how
        )
    return found


def run(
    module: Any,
    z_s: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    values: RowValues,
    valid: int,
    t: float,
    divergence: str,
    ce: bool,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """dtype: of the gradient; None: it takes the place of z_s."""
    logits = LogitRows(z_s, z_t, labels, valid, t, complete_parameters(divergence, {}))
    statistics, exponentials = module.statistics(logits, divergence)
    found = {"statistics": torch.stack(statistics, 1)}
    if DIVERGENCES[divergence].second_sums is not None:
        lse = (values.student_lse, values.teacher_lse)
        found["second_sums"] = module.second_sums(logits, divergence, *lse)
    out = z_s if dtype is None else _apart(torch.full_like(z_s, torch.nan, dtype=dtype))
    module.gradient(logits, statistics, exponentials, values, divergence, ce, out)
    return found | {"gradient": out.clone()}


def row_values(
    z_s: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    weights: tuple[Tensor, Tensor],
    valid: int,
    t: float,
    divergence: str,
) -> RowValues:
    """Return what the gradient takes, for one rank with the whole vocabulary.

    Without valid columns the numbers are arbitrary.
    """
    n, known = len(z_s), valid > 0
    lse_s = (z_s[:, :valid].float() / t).logsumexp(1) if known else z_s.new_ones(n, dtype=torch.float32)
    lse_t = (
        (z_t[:, :valid].float() / t).logsumexp(1)
        if known and z_t is not None
        else z_s.new_ones(n, dtype=torch.float32)
    )
    lse_1 = z_s[:, :valid].float().logsumexp(1) if known else z_s.new_ones(n, dtype=torch.float32)
    gradient_constant = torch.full_like(lse_s, 0.25)
    kl_weight, ce_weight = (w.to(lse_s) for w in weights)
    return RowValues(lse_s, lse_t, lse_1, kl_weight, ce_weight, gradient_constant)


def _apart(z: Tensor) -> Tensor:
    """The same values, with room between the rows."""
    wide = z.new_full((z.shape[0], z.shape[1] + 16), torch.nan)
    wide[:, : z.shape[1]] = z
    return wide[:, : z.shape[1]]


def fused_all(calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """losses_workers.fused_all with the kernels in it."""
    import losses_workers

    from minitron_mp.losses import kernel_calls

    usual = fused._row_functions
    fused._row_functions = lambda _: kernel_calls
    try:
        return losses_workers.fused_all(calls)
    finally:
        fused._row_functions = usual


def cosine_distances(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    from minitron_mp.pruning.cosine_kernel import cosine_distance

    return [cosine_distance(a, b) for a, b in pairs]


def argument_types(logits: str) -> dict[str, str]:
    """Return name -> type of the kernels' arguments. logits: type of the pointers to logits."""
    floats = {"t", "inverse_t"} | {name for declared in PARAMETERS.values() for name in declared}
    return {
        **dict.fromkeys(("z_s", "z_t", "a", "b"), logits),
        **dict.fromkeys(("stats", "rows", "lse_s", "lse_t", "sums"), "*fp32"),
        **{"labels": "*i64", "out": "*bf16"},
        **dict.fromkeys(("stride_s", "stride_t", "stride_out", "stride_a", "stride_b"), "i32"),
        **dict.fromkeys(("columns_s", "columns_t", "valid", "columns"), "i32"),
        **dict.fromkeys(floats, "fp32"),
    }


def compile_for(architecture: int) -> dict[str, int]:
    """{kernel and options: bytes of machine code} for CUDA, without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minitron_mp.losses import kernel_calls, kernels
    from minitron_mp.pruning import cosine_kernel

    found = {}

    def build(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> int:
        unknown = set(kernel.arg_names) - types.keys() - constants.keys()
        assert not unknown, f"add the type of {', '.join(sorted(unknown))} to argument_types()"
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        return len(
            triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": kernel_calls.WARPS}
            ).asm["cubin"]
        )

    for logits in ("*fp32", "*bf16"):
        found[f"_cosine_distance {logits}"] = build(
            cosine_kernel._cosine_distance,
            argument_types(logits) | {"out": "*fp32"},
            {"BLOCK": kernel_calls.BLOCK},
        )
        for number, divergence in enumerate(DIVERGENCES):
            hot = number % 2 == 0
            options = {
                "HOT": hot,
                "TEACHER": True,
                "CE": True,
                "DIVERGENCE": divergence,
                "BLOCK": kernel_calls.BLOCK,
            }
            for kernel in (kernels._statistics, kernels._second_sums, kernels._gradient):
                constants = {name: options[name] for name in kernel.arg_names if name in options}
                name = f"{kernel.fn.__name__} {logits} {hot} {divergence}"
                found[name] = build(kernel, argument_types(logits), constants)
    return found
