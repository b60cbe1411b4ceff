"""Whether this machine, and the ranks of this job, can run a recipe: one table, each row with what to do about it.

One process looks at itself and imports torch; Megatron-Core and transformers only for a recipe or a job. Under torchrun all ranks look,
meet (fabric.py), and tell rank 0 through the job's store, so that a rank that cannot join the others has its line, too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron_mp.cluster.findings import Finding, ranks_text, together
from minitron_mp.cluster.machine import NAMED, devices, extensions, limits, packages
from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.console import console, launched, say, speaks
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.memory import payload_bytes_per_token, rank_parameters

JOIN_MINUTES = 1.0

TALK_S = 200.0
"""Rank 0 waits so long for the findings of the others: above what a broken collective takes to end."""

ALIKE = {*NAMED, "python", "Transformer Engine", "Apex", "GPU", "CUDA, NCCL"}

MARGIN = 1.1
"""checkpoint.py keeps the same."""


def doctor(
    path: Path | None = None, overrides: Sequence[str] = (), *, clock: Callable[[], float] = time.time
) -> int:
    """Print the table; the exit code: 1 when something failed, else 0. Under torchrun every rank calls it; rank 0 prints and has the code."""
    start, findings = time.monotonic(), [*packages(), *limits()]
    recipe: Recipe | None = None
    try:
        recipe = load_recipe(path, overrides) if path else None
    except InputError as error:
        findings.append(Finding("recipe", "failed", str(error)))
    if path is None:
        findings.append(Finding("recipe", "ok", "none given, so no model, tokenizer or folder is looked at"))
    own_gpu: int | None = None
    try:
        import torch

        if launched():
            from minitron_mp.distributed.launcher import compute_device

            own_gpu = compute_device().index
        elif recipe:
            import megatron.core  # noqa: F401 (whether it can be)
    except Exception as error:  # a missing library, a build for another Python
        missing = Finding(
            "import",
            "failed",
            f"{type(error).__name__}: {error}",
            "install torch and megatron-core for this Python and driver",
        )
        return _show([*findings, missing], start)
    from minitron_mp.cluster.network import ports, shared

    findings += devices(_fp8_of(recipe), own_gpu) + extensions(torch.cuda.is_available()) + _graphs(recipe)
    job = _job()
    if recipe:
        findings += _of_recipe(recipe, job)
    findings += ports(job)
    if launched():
        findings += _among_ranks(job, clock)
    if recipe:
        findings += shared(recipe.root, job)
    return _show(told, start) if (told := _gather(job, findings)) is not None else 0


def _fp8_of(recipe: Recipe | None) -> dict[str, str]:
    """Key of the recipe -> kind of FP8 that it asks for."""
    sections = recipe.model_dump() if recipe else {}
    return {
        f"{name}.fp8": kind
        for name in ("distill", "correct", "teacher")
        if (kind := (sections.get(name) or {}).get("fp8"))
    }


def _graphs(recipe: Recipe | None) -> list[Finding]:
    """Whether the Megatron-Core that is here records what the recipe wants recorded; nothing where it wants nothing."""
    from minitron_mp.models.precision import check_cuda_graphs

    if not any(
        getattr(section, "cuda_graphs", False)
        for section in (recipe and recipe.distill, recipe and recipe.correct)
    ):
        return []
    try:
        check_cuda_graphs()
    except InputError as error:
        return [Finding("CUDA graphs", "failed", str(error))]
    return [Finding("CUDA graphs", "ok", "Megatron-Core can record them")]


def _job() -> Any:
    """fabric.Job: this process in the launcher's job, or alone."""
    import torch.distributed as dist

    from minitron_mp.cluster.network import RankTable

    if not launched():
        return RankTable(dist.HashStore(), host=socket.gethostname())
    from minitron_mp.distributed.launcher import fresh_job_rank

    here = fresh_job_rank()
    return RankTable(here.store, here.rank, here.size, socket.gethostname())


def _of_recipe(recipe: Recipe, job: Any) -> list[Finding]:
    """Model, text and settings of the recipe on every rank; tokenizer and room on disk on rank 0."""
    from minitron_mp.models.hf_config import has_weights, read_arch
    from minitron_mp.workflow.graph import StageGraph
    from minitron_mp.workflow.preflight import recipe_problems

    models = [Path(folder) for folder in dict.fromkeys([recipe.model, recipe.teacher.model or recipe.model])]
    try:
        project = StageGraph(recipe)
        weights = all(map(has_weights, filter(Path.is_dir, models)))
        problems = recipe_problems(recipe, project.paths, job.size if launched() else None, weights=weights)
    except InputError as error:
        return [Finding("recipe", "failed", str(error))]
    if problems:
        return [Finding("recipe", "failed", problem) for problem in problems]
    found = [Finding("recipe", "ok", f"can run, with {', '.join(map(str, models))}")]
    if not weights:
        found.append(
            Finding(
                "model",
                "warning",
                "only config.json is there, no weights",
                "fetch model.safetensors before a run",
            )
        )
    if job.rank == 0:
        arch = read_arch(models[0], weights=False)
        found += [
            _tokenizer(recipe, arch),
            room(recipe, project.paths, arch, read_arch(models[-1], weights=False)),
        ]
    return found


def _tokenizer(recipe: Recipe, arch: Arch) -> Finding:
    from minitron_mp.data.tokenizer import check_vocabulary, load_tokenizer

    folder = recipe.data.tokenizer or recipe.model
    try:
        loaded = load_tokenizer(folder)
        check_vocabulary(loaded, arch.vocab_size)
    except InputError as error:
        return Finding("tokenizer", "failed", str(error))
    return Finding(
        "tokenizer", "ok", f"{folder}: {loaded.vocab_size:,} tokens, a document ends with {loaded.eod}"
    )


def room(recipe: Recipe, paths: dict[str, Path], base: Arch, tutor: Arch) -> Finding:
    """Free space, and files, against what the stages without an artefact will write. paths: stage -> artefact."""
    missing = {
        name: size
        for name, size in artefact_bytes(recipe, base, tutor).items()
        if name in paths and not paths[name].exists()
    }
    root = recipe.root.absolute()
    near = next(folder for folder in (root, *root.parents) if folder.exists())
    free, needed, files = (
        shutil.disk_usage(near).free,
        sum(missing.values()) * MARGIN,
        os.statvfs(near).f_favail,
    )
    largest = ", ".join(
        f"{name} {missing[name] / 1e9:,.1f}" for name in sorted(missing, key=lambda name: -missing[name])[:3]
    )
    what = (
        f"{near} has {free / 1e9:,.1f} GB free, the stages to come write about {needed / 1e9:,.1f} GB"
        + f" ({largest})" * bool(largest)
    )
    if needed > free:
        return Finding(
            "space", "failed", what, "make room, set another output, or lower distill.keep_checkpoints"
        )
    if 0 < files < 10_000:
        return Finding(
            "space",
            "warning",
            f"{near} has room for {files:,} more files",
            "delete files: a sharded checkpoint has several for each rank",
        )
    return Finding("space", "ok", what)


def artefact_bytes(recipe: Recipe, base: Arch, tutor: Arch) -> dict[str, float]:
    """Stage -> bytes of its artefact and of its checkpoints while it trains, of the stages that write models or signals."""
    from minitron_mp.pruning.search_space import search_candidates
    from minitron_mp.pruning.target import resolve_target

    def parameters(arch: Arch) -> int:
        return rank_parameters(arch, recipe.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": None}))[0]

    def on_disk(folder: str, arch: Arch) -> float:
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) or size * parameters(
            arch
        )

    def training(count: int, kept: int) -> float:
        """The model, and its checkpoints with float32 weights and moments: those kept and the one that is written."""
        return size * count + (size + 12) * count * (kept + 1)

    found = (
        search_candidates(recipe, base)
        if recipe.search
        else [resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)]
    )
    size, student = BYTES[recipe.precision], max(map(parameters, found))
    model, d, c = on_disk(recipe.model, base), recipe.distill, recipe.correct
    correct = training(parameters(base), c.keep_checkpoints) if c else 0.0
    return {
        "import": model,
        "import-teacher": on_disk(recipe.teacher.model or recipe.model, tutor),
        "correct": correct,
        "prune": model * student / parameters(base),
        "cache": d.steps
        * d.global_batch_size
        * recipe.data.sequence_length
        * payload_bytes_per_token(tutor, recipe),
        "distill": training(student, d.keep_checkpoints) + (correct if recipe.corrects_meanwhile else 0.0),
        "export": BYTES[recipe.export.dtype or recipe.precision] * student,
    }


def _among_ranks(job: Any, clock: Callable[[], float]) -> list[Finding]:
    """What needs a process group. The first check that fails is the last one: others may have left it."""
    import torch
    import torch.distributed as dist

    from minitron_mp.cluster.network import clocks, links
    from minitron_mp.distributed.launcher import compute_device
    from minitron_mp.distributed.world import start_job

    found: list[Finding] = []
    owns, cure = (
        not dist.is_initialized(),
        "the row ports, if it failed; NCCL_DEBUG=INFO; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
    )
    say(
        f"{job.size} ranks join; if nothing follows within {JOIN_MINUTES:.0f} minute, they do not reach each other: {cure}"
    )
    try:
        device = start_job(JOIN_MINUTES) if owns else compute_device()
        local, count = job.hosts().count(job.host), torch.cuda.device_count()
        if device.type == "cuda" and local > count:
            more = "one rank a GPU; for tests, a NCCL_HOSTID of its own for each rank"
            found.append(Finding("ranks", "warning", f"{local} ranks on {job.host} share {count} GPUs", more))
        return [*found, *links(job, device), clocks(job, clock)]
    except Exception as error:  # whatever gloo, NCCL or a dead peer make of it
        return [
            *found,
            Finding(
                "ranks", "failed", f"on rank {job.rank} ({job.host}): {str(error).splitlines()[0]}", cure
            ),
        ]
    finally:
        if owns and dist.is_initialized():
            dist.destroy_process_group()


def _gather(job: Any, findings: Sequence[Finding]) -> list[Finding] | None:
    """The findings of all ranks, on rank 0; None on the others."""
    job.store.set(f"findings/{job.rank}", json.dumps([asdict(f) for f in findings]))
    hosts = job.hosts()
    if job.rank > 0:
        return None
    silent = job.silent("findings", TALK_S)
    told = {
        rank: [Finding(**row) for row in json.loads(job.store.get(f"findings/{rank}"))]
        for rank in range(job.size)
        if rank not in silent
    }
    rows = together(told, hosts, ALIKE)
    if silent:
        rows.append(
            Finding(
                "ranks",
                "failed",
                f"{ranks_text(silent, hosts)} did not answer within {TALK_S:.0f} s",
                "look at what they printed",
            )
        )
    return rows


def _show(findings: Sequence[Finding], start: float) -> int:
    from rich.table import Table
    from rich.text import Text

    failed, warnings = (sum(f.verdict == verdict for f in findings) for verdict in ("failed", "warning"))
    if speaks():
        colour = {"ok": "green", "warning": "yellow", "failed": "bold red"}
        grid = Table("check", "", "found", "what to do")
        for f in findings:
            grid.add_row(f.check, Text(f.verdict, colour[f.verdict]), Text(f.found), Text(f.cure))
        console.print(grid)
        say(
            f"{failed} failed, {warnings} warnings, {len(findings) - failed - warnings} ok, in {time.monotonic() - start:.1f} s on {socket.gethostname()}"
        )
    return int(failed > 0)
