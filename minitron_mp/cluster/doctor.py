"""The command `doctor`: it checks whether this machine, and the ranks of a job, can run a recipe.

It prints one table with advice for each problem. A single process checks only its machine. It
imports torch, but Megatron-Core and transformers only for a recipe or in a job. Under torchrun all
ranks check their machines and the connections between them (network.py, file_system.py). They send
their results to rank 0 through the job's store, so that ranks that cannot join a process group are
reported, too.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_mp.cluster.checks import CheckResult, failed, merge_results, ok, ranks_text, warning
from minitron_mp.cluster.machine import (
    MAIN_PACKAGES,
    check_extensions,
    check_gpus,
    check_limits,
    check_packages,
)
from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.console import console, launched, say, speaks
from minitron_mp.distributed.job import require_launcher
from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from minitron_mp.cluster.network import RankTable

JOIN_MINUTES = 1.0

RESULTS_TIMEOUT_S = 200.0
"""Timeout for the results of all ranks on rank 0. A broken collective fails earlier."""

MUST_MATCH = {*MAIN_PACKAGES, "python", "Transformer Engine", "Apex", "GPU", "CUDA, NCCL"}
"""Checks that must have the same result on all ranks."""

JOIN_ADVICE = (
    "see the row `ports`, if it failed; set NCCL_DEBUG=INFO; check GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
)


def doctor(
    path: Path | None = None, overrides: Sequence[str] = (), *, clock: Callable[[], float] = time.time
) -> int:
    """Run all checks and print the table; return the exit code: 1 if a check failed, else 0.

    Under torchrun every rank calls this function. Rank 0 prints and returns the code, and all other
    ranks return 0.
    """
    start = time.monotonic()
    results = [*check_packages(), *check_limits()]
    try:
        require_launcher()
    except InputError as error:
        results.append(failed("launcher", str(error)))
    recipe: Recipe | None = None
    if path is None:
        results.append(ok("recipe", "no recipe given; model, tokenizer and folders are not checked"))
    else:
        try:
            recipe = load_recipe(path, overrides)
        except InputError as error:
            results.append(failed("recipe", str(error)))
    problem = _import_problem(recipe)
    if problem:
        return _print_table([*results, problem], start)
    job = _this_job()
    results += _check_this_process(recipe, job)
    results += _check_job(recipe, job, clock)
    table = _gather(job, results)
    return 0 if table is None else _print_table(table, start)


def _import_problem(recipe: Recipe | None) -> CheckResult | None:
    """Import torch, and Megatron-Core if a check needs it; return the problem, if there is one."""
    try:
        import torch  # noqa: F401 (whether it can be imported)

        if launched():
            from minitron_mp.distributed.launcher import local_device

            local_device()
        elif recipe:
            import megatron.core  # noqa: F401 (whether it can be imported)
    except Exception as error:  # a missing library, or a build for another Python
        detail = f"{type(error).__name__}: {error}"
        return failed("import", detail, "install torch and megatron-core for this Python and driver")
    return None


def _this_job() -> RankTable:
    """Return the rank of this process in the job, or in a job of one process without a launcher."""
    import torch.distributed as dist

    from minitron_mp.cluster.network import RankTable

    if not launched():
        return RankTable(dist.HashStore(), host=socket.gethostname())
    from minitron_mp.distributed.launcher import job_rank

    rank = job_rank().with_fresh_keys()
    return RankTable(rank.store, rank.rank, rank.size, socket.gethostname())


def _check_this_process(recipe: Recipe | None, job: RankTable) -> list[CheckResult]:
    """Check this rank's machine and the recipe."""
    import torch

    from minitron_mp.cluster.recipe_checks import check_cuda_graphs, check_recipe, requested_fp8

    gpu: int | None = None
    if launched():
        from minitron_mp.distributed.launcher import local_device

        gpu = local_device().index
    results = check_gpus(requested_fp8(recipe), gpu)
    results += check_extensions(torch.cuda.is_available())
    results += check_cuda_graphs(recipe)
    if recipe:
        results += check_recipe(recipe, job, job.size if launched() else None)
    return results


def _check_job(recipe: Recipe | None, job: RankTable, clock: Callable[[], float]) -> list[CheckResult]:
    """Check the connections and the file system between the ranks of the job."""
    from minitron_mp.cluster.file_system import check_file_system
    from minitron_mp.cluster.network import check_ports

    results = check_ports(job)
    if launched():
        results += _check_process_group(job, clock)
    if recipe:
        results += check_file_system(recipe.root, job)
    return results


def _check_process_group(job: RankTable, clock: Callable[[], float]) -> list[CheckResult]:
    """Run the checks that need a process group.

    They end at the first failure, because other ranks may have left the group.
    """
    import torch
    import torch.distributed as dist

    from minitron_mp.cluster.network import check_clocks, check_collectives
    from minitron_mp.distributed.launcher import local_device
    from minitron_mp.distributed.process_groups import end_default_group
    from minitron_mp.distributed.world import start_job

    results: list[CheckResult] = []
    starts_group = not dist.is_initialized()
    is_failed = False
    say(
        f"{job.size} ranks join a process group; if no output follows within {JOIN_MINUTES:.0f} minute, they "
        f"cannot connect: {JOIN_ADVICE}"
    )
    try:
        device = start_job(JOIN_MINUTES) if starts_group else local_device()
        local_ranks = job.hosts().count(job.host)
        num_gpus = torch.cuda.device_count()
        if device.type == "cuda" and local_ranks > num_gpus:
            detail = f"{local_ranks} ranks on {job.host} share {num_gpus} GPUs"
            advice = "start one rank per GPU; for tests, set a different NCCL_HOSTID for each rank"
            results.append(warning("ranks", detail, advice))
        return [*results, *check_collectives(job, device), check_clocks(job, clock)]
    except Exception as error:  # whatever gloo, NCCL or a failed peer raises
        is_failed = True
        detail = f"on rank {job.rank} ({job.host}): {str(error).splitlines()[0]}"
        return [*results, failed("ranks", detail, JOIN_ADVICE)]
    finally:
        if starts_group:
            end_default_group(local_device(), is_failed=is_failed)


def _gather(job: RankTable, results: Sequence[CheckResult]) -> list[CheckResult] | None:
    """Return the merged results of all ranks on rank 0, and None on all other ranks."""
    job.store.set(f"results/{job.rank}", json.dumps([asdict(result) for result in results]))
    hosts = job.hosts()
    if job.rank > 0:
        return None
    missing = job.missing_ranks("results", RESULTS_TIMEOUT_S)
    by_rank = {}
    for rank in range(job.size):
        if rank not in missing:
            rows = json.loads(job.store.get(f"results/{rank}"))
            by_rank[rank] = [CheckResult(**row) for row in rows]
    table = merge_results(by_rank, hosts, MUST_MATCH)
    if missing:
        detail = f"{ranks_text(missing, hosts)} sent no results within {RESULTS_TIMEOUT_S:.0f} s"
        table.append(failed("ranks", detail, "read the output of these ranks"))
    return table


def _print_table(results: Sequence[CheckResult], start: float) -> int:
    """Print all results; return the exit code."""
    from rich.table import Table
    from rich.text import Text

    num_failed = sum(1 for result in results if result.verdict == "failed")
    num_warnings = sum(1 for result in results if result.verdict == "warning")
    if speaks():
        colour = {"ok": "green", "warning": "yellow", "failed": "bold red"}
        grid = Table("check", "", "result", "what to do")
        for result in results:
            verdict = Text(result.verdict, colour[result.verdict])
            grid.add_row(result.check, verdict, Text(result.detail), Text(result.advice))
        console.print(grid)
        say(
            f"{num_failed} failed, {num_warnings} warnings, {len(results) - num_failed - num_warnings} ok, "
            f"in {time.monotonic() - start:.1f} s on {socket.gethostname()}"
        )
    return 1 if num_failed else 0
