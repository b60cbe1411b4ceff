"""Where the time of the distillation loss goes, without a GPU: registers, bytes, and an estimate.

    python benchmarks/kd_loss_parts.py                   H100, 12B -> 8B, 8192 tokens, one rank
    python benchmarks/kd_loss_parts.py --tp 8 --vocab 128256 --logits bf16 --tflops 740 --tb-s 4.3

Registers and spills are those of the kernels compiled for the architecture (sm_90: Hopper), with the
assembler that comes with triton. The estimate is FLOPs over the rate of large matrix products, and
bytes over the rate of copies. Both default to measured rates of one H100 (docs/planning.md). Nothing
overlaps in it. benchmarks/kd_loss.py measures the loss.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mp.losses.parameters import PARAMETERS, SECOND_PASS
from minitron_mp.losses.tile_sizes import TILE_SIZES

BYTES = {"fp32": 4, "bf16": 2}
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
"""Of a multiprocessor of sm_80 and sm_90: registers, threads, and programs at a time."""
LAUNCH_S = 2.5e-6
"""Time of a kernel that does next to nothing. Quoted, H100."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. spills: bytes of stack. wide: loads of 16 bytes in the loop."""

    kernel: str
    divergence: str
    logits: str
    registers: int
    spills: int
    warps: int
    wide: bool
    code: int

    @property
    def programs(self) -> int:
        """Return the programs that one multiprocessor runs at a time. Registers come in eights."""
        threads = 32 * self.warps
        return min(PROGRAMS, THREADS // threads, REGISTERS // (-(-self.registers // 8) * 8 * threads))


def compile_kernels(architecture: int) -> list[Resources]:
    """Compile the kernels of each divergence and dtype at temperature 1 with cross-entropy, no GPU.

    The arguments are as aligned as those of real vocabularies.
    """
    from minitron_mp.losses import kernel_calls, kernels, row_kernels
    from minitron_mp.losses.divergences import DIVERGENCES

    found = []
    for logits in BYTES:
        for name in [*DIVERGENCES, "top_k"]:
            is_top = name == "top_k"
            divergence = "forward_kl" if is_top else name
            options = {"HOT": False, "TEACHER": not is_top, "TOP": is_top, "CE": True, "RANKS": 8}
            wide = options | {"DIVERGENCE": divergence, "BLOCK": kernel_calls.BLOCK}
            narrow = wide | {"BLOCK": 64}
            of_row = [
                (kernels._statistics, wide),
                (kernels._gradient, wide),
                (row_kernels._row_values, narrow),
            ]
            if name in SECOND_PASS:
                of_row.insert(1, (kernels._second_sums, wide))
            if is_top:
                of_row += [(row_kernels._take_top, narrow), (row_kernels._put_top, narrow)]
            for kernel, constants in of_row:
                warps = kernel_calls.WARPS if constants is wide else kernel_calls.SMALL_WARPS
                found.append(_compile(kernel, logits, name, constants, warps, architecture))
    return found


def _compile(
    kernel: Any, logits: str, divergence: str, options: dict[str, Any], warps: int, architecture: int
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: options[name] for name in kernel.arg_names if name in options}
    types = argument_types(f"*{logits}")
    unknown = set(kernel.arg_names) - types.keys() - constants.keys()
    assert not unknown, f"add the type of {', '.join(sorted(unknown))} to argument_types()"
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name not in constants and (types[name].startswith("*") or name.startswith(("stride", "columns")))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    registers, spills = _resource_usage(compiled.asm["cubin"])
    wide = re.search(r"ld\.global[^\n]*\.v[48]", compiled.asm["ptx"]) is not None
    name = kernel.fn.__name__.removeprefix("_")
    return Resources(name, divergence, logits, registers, spills, warps, wide, len(compiled.asm["cubin"]))


def argument_types(logits: str) -> dict[str, str]:
    """Return name -> type of the kernels' arguments. logits: type of the pointers to logits."""
    floats = {
        "t",
        "inverse_t",
        "kl_weight",
        "ce_weight",
        *(n for names in PARAMETERS.values() for n in names),
    }
    return {
        **dict.fromkeys(("z_s", "z_t", "a", "b"), logits),
        **dict.fromkeys(("stats", "rows", "tables", "sums", "second_sums", "values", "losses"), "*fp32"),
        **dict.fromkeys(("token_weights", "top_logits", "top_log_probs", "top_log_ghost"), "*fp32"),
        **{"labels": "*i64", "top_columns": "*i64", "out": "*bf16"},
        **dict.fromkeys(("stride_s", "stride_t", "stride_out", "stride_a", "stride_b"), "i32"),
        **dict.fromkeys(("columns_s", "columns_t", "valid", "columns", "k"), "i32"),
        **dict.fromkeys(("num_rows", "ranks", "losses_stride"), "i32"),
        **dict.fromkeys(floats, "fp32"),
    }


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers of a thread, bytes of its stack)."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2])


def kernel_table(found: list[Resources]) -> str:
    """Return the Markdown table of docs/loss_on_a_gpu.md: registers and programs, fp32 and bf16 logits."""
    rows = [
        "| kernel | divergence | registers | bytes spilt | programs per multiprocessor |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    by_name: dict[tuple[str, str], list[Resources]] = {}
    for each in found:
        by_name.setdefault((each.divergence, each.kernel), []).append(each)
    for (divergence, kernel), pair in by_name.items():
        numbers = [
            ", ".join(str(getattr(each, key)) for each in pair) for key in ("registers", "spills", "programs")
        ]
        rows.append(f"| `{kernel}` | {divergence} | {' | '.join(numbers)} |")
    return "\n".join(rows)


@dataclass(frozen=True)
class Case:
    """Sizes of a call on one rank, rates, and dtype of the logits."""

    tokens: int = 8192
    student: int = 4096
    teacher: int = 5120
    vocab: int = 131072
    tp: int = 1
    logits: str = "fp32"
    tflops: float = 720.0
    tb_s: float = 3.02
    nvlink_gb_s: float = 360.0

    @property
    def columns(self) -> int:
        return self.vocab // self.tp

    def product_s(self, size: int) -> float:
        """Return the seconds of a product of [tokens, columns] with `size`."""
        return 2 * self.tokens * self.columns * size / self.tflops / 1e12

    @property
    def floor_s(self) -> float:
        """Return the seconds of the four products that every implementation needs."""
        return self.product_s(3 * self.student + self.teacher)


def parts(case: Case) -> Iterator[tuple[str, float]]:
    """Yield (part, seconds)."""
    rows = TILE_SIZES["cuda"].rows(case.tokens, case.columns)
    logits = case.tokens * case.columns
    size = BYTES[case.logits]
    chunks, blocks = -(-case.tokens // rows.logits_gemm), -(-case.tokens // rows.weight_gradient_gemm)
    memory = case.tb_s * 1e12
    yield (
        f"logits of both models, {chunks} x {rows.logits_gemm} rows",
        case.product_s(case.student + case.teacher),
    )
    yield f"gradient of the hidden states, {blocks} products", case.product_s(case.student)
    yield f"gradient of the weight, {blocks} products", case.product_s(case.student)
    weight_bytes = 8 * case.columns * case.student * blocks
    yield "the weight's float32 gradient, read and written", weight_bytes / memory
    yield f"statistics: {2 * size} bytes per token and column", 2 * size * logits / memory
    yield f"gradient: {2 * size + 2} bytes per token and column", (2 * size + 2) * logits / memory
    collectives = 0 if case.tp == 1 else 1
    launches = chunks * (2 + 3 + collectives) + 3 * blocks
    yield f"{launches} launches of {LAUNCH_S * 1e6:g} us", launches * LAUNCH_S
    if case.tp > 1:
        sent = 2 * case.tokens * (2 * case.student + case.teacher) * (case.tp - 1) / case.tp
        yield "gather hidden states, scatter their gradient", sent / case.nvlink_gb_s / 1e9


def estimate_table(case: Case) -> str:
    """Return the Markdown table of the estimate."""
    found = list(parts(case))
    total = sum(seconds for _, seconds in found)
    rows = ["| part | ms (estimated) |", "| --- | ---: |"]
    rows += [f"| {name} | {seconds * 1e3:.2f} |" for name, seconds in found]
    rows.append(f"| sum | {total * 1e3:.1f} |")
    rows.append(f"| the four products alone | {case.floor_s * 1e3:.1f} ({case.floor_s / total:.1%}) |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Case()
    for name, value in vars(usual).items():
        choices = list(BYTES) if name == "logits" else None
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, choices=choices, help=f"default {value}")
    parser.add_argument("--architecture", type=int, default=90, help="90 is Hopper, 80 is Ampere")
    args = vars(parser.parse_args())
    print(kernel_table(compile_kernels(args.pop("architecture"))))
    case = Case(**args)
    print(f"\n{case}\n")
    print(estimate_table(case))


if __name__ == "__main__":
    main()
