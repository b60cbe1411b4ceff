"""The stages on one GPU, the most informative first, and their rehearsal on a CPU.

First whether each path is right, side by side and without times. Then times, alone: the loss, a
step, facts of the GPU, where the loss's time goes, other vocabularies, a shard of tp 8, layer times,
and how far the planner is off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from machine import ROOT
from readings import (
    read_layers,
    read_loss,
    read_planner,
    read_project,
    read_result,
    read_step,
    read_tests,
)
from stages import Reader, Stage

Words = tuple[str, ...]

HERE = ROOT / "benchmarks" / "first_run"
PYTHON = sys.executable
RECIPE = str(ROOT / "examples" / "mn_minitron_8b.yaml")
PYTEST: Words = (PYTHON, "-m", "pytest", "-rfEs", "--maxfail=6", "-p", "no:cacheprovider")
TOGETHER = "right or wrong"
MINUTES = 14.0
NEEDS_GPU = "needs a GPU"
TOY_RECIPE = "{output}/toy/recipe.yaml"
"""Written by main.py for a rehearsal."""


def pytest_on(file: str, chosen: str = "") -> Words:
    """pytest on a file below tests, with -k."""
    path = (str(ROOT / "tests" / file),)
    return (*PYTEST, "--basetemp={folder}/pytest", *path, *(("-k", chosen) if chosen else ()))


def program(name: str, *words: str) -> Words:
    return (PYTHON, str(ROOT / "benchmarks" / name), *words)


def own(name: str, *words: str) -> Words:
    """A program of this folder that writes {folder}/result.json."""
    return (PYTHON, str(HERE / name), *words, "--out", "{folder}/result.json")


def project(kind: str, *overrides: str, ranks: int = 1) -> Words:
    """The tiny project, under torchrun for more than one rank."""
    words = (str(HERE / "project.py"), "{folder}", kind, *overrides)
    return (PYTHON, *words) if ranks == 1 else torchrun(ranks, *words)


def torchrun(ranks: int, *words: str) -> Words:
    """torchrun on this node; --local-addr, because the name of a machine may not resolve."""
    local = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks))
    return (PYTHON, "-m", "torch.distributed.run", *local, *words)


@dataclass(frozen=True)
class Row:
    """One stage: its command on a GPU and in the rehearsal, where it may be absent."""

    name: str
    shows: str
    limit_s: float
    command: Words
    rehearsal: Words = ()
    read: Reader = read_tests
    read_rehearsal: Reader | None = None
    together: str = ""
    needs: Words = ()
    accepted: tuple[int, ...] = (0,)
    with_file: tuple[str, str] | None = None


GPU_TESTS = "gpu/test_engine_gpu.py"
CORRECT = (
    Row(
        "tests_losses",
        "Triton kernels and the loss against float64, at real vocabularies",
        190,
        pytest_on("gpu/test_losses_gpu.py"),
        pytest_on("ranks/test_kernels.py", "large_logits or matches"),
        needs=("pytest",),
    ),
    Row(
        "tests_engine",
        "Transformer Engine builds the same model, scores and masks as the local layers",
        190,
        pytest_on(
            GPU_TESTS, "same_model or scores_keep or masks_match or rejects or independent_of_previous"
        ),
        pytest_on("ranks/test_precision.py", "local_layers_run_on_cpu or garbage"),
        needs=("pytest", "te"),
    ),
    Row(
        "tests_fp8",
        "FP8 training follows bf16",
        190,
        pytest_on(GPU_TESTS, "loss_follows_bf16 and (tensorwise or blockwise)"),
        needs=("pytest", "te"),
    ),
    Row(
        "tests_resume",
        "runs resume bitwise, with and without FP8 and asynchronous saves",
        190,
        pytest_on(GPU_TESTS, "training_resumes and (stored or async) and (None or tensorwise)"),
        needs=("pytest", "te"),
    ),
    Row(
        "tests_graphs",
        "CUDA graphs give the numbers of eager execution",
        190,
        pytest_on(GPU_TESTS, "graphs_match and None"),
        needs=("pytest", "te"),
    ),
    Row(
        "tests_stream",
        "the teacher stream over NCCL, two ranks on one GPU",
        190,
        pytest_on("gpu/test_teacher_stream_gpu.py", "hidden-3 or logits-1 or topk-3"),
        needs=("pytest",),
    ),
    Row(
        "tests_timer",
        "the timer of forward passes does not wait for the device",
        60,
        pytest_on("gpu/test_stragglers_gpu.py"),
        needs=("pytest",),
    ),
    *(
        Row(
            f"two_ranks_{layout.replace('-', '_')}_{precision}",
            f"two ranks on one GPU train as one: {layout}, {precision}",
            190,
            pytest_on(GPU_TESTS, f"two_ranks_match_one_rank and {layout}-{fp8} and not graphs"),
            needs=("pytest", "te"),
        )
        for layout, fp8, precision in (
            ("tp", "None", "bf16"),
            ("tp", "tensorwise", "fp8"),
            ("pp", "None", "bf16"),
            ("cp", "None", "bf16"),
            ("dp-overlapped", "None", "bf16"),
        )
    ),
    Row(
        "project_bf16",
        "every stage of a recipe in one process",
        150,
        project("bf16"),
        project("bf16"),
        read=read_project,
    ),
    Row(
        "project_fp8",
        "every stage of a recipe with FP8 teacher and student",
        190,
        project("fp8"),
        read=read_project,
        needs=("te",),
    ),
    Row(
        "project_remote",
        "a recipe with the teacher on a separate rank, over the stream",
        190,
        project("remote", ranks=2),
        project("remote", ranks=2),
        read=read_project,
    ),
    Row(
        "scoring_waits",
        "scoring does not wait for the device (torch's sync debug mode)",
        90,
        own("scoring_waits.py"),
        own("scoring_waits.py"),
        read=read_result,
    ),
)
SMALL_LOSS = ("--tokens", "64", "--student", "32", "--teacher", "48", "--repeats", "2", "--rows", "8")


def loss(name: str, shows: str, limit_s: float, words: Words, small: Words) -> Row:
    return Row(
        name,
        shows,
        limit_s,
        program("kd_loss.py", "--repeats", "5", *words),
        program("kd_loss.py", *SMALL_LOSS, *small),
        read=read_loss,
    )


TIMES = (
    loss("loss", "loss against its peers and its floor, V = 131072", 80, (), ("--vocab", "512")),
    Row(
        "step",
        "a distillation step of 4 + 4 layers at the 12B and 8B widths, bf16 and FP8",
        120,
        program(
            "step.py", "--repeats", "5", "--fp8", "tensorwise", "blockwise", "--out", "{folder}/step.json"
        ),
        program("step.py", "--layers", "1", "--repeats", "2", "--out", "{folder}/step.json"),
        read=read_step,
    ),
    Row(
        "micro",
        "products at odd row counts, launches, copies, host time of norms",
        50,
        own("micro.py"),
        own("micro.py"),
        read=read_result,
    ),
    Row(
        "profile_float32",
        "time of the loss by kernel, float32 logits",
        40,
        own("profile_loss.py", "--logits", "float32"),
        own("profile_loss.py", "--logits", "float32", "--vocab", "512"),
        read=read_result,
    ),
    Row(
        "layers",
        "layer times for `minitron-mp estimate --times`",
        110,
        program(
            "layers.py",
            RECIPE,
            *("--out", "{folder}/times.json", "--tp", "1,8", "--repeats", "5"),
            *("--dtypes", "bf16,tensorwise"),
        ),
        program(
            "layers.py",
            TOY_RECIPE,
            *("--out", "{folder}/times.json", "--gpu", "h100", "--layers", "1", "--repeats", "1"),
        ),
        read=read_layers,
    ),
    Row(
        "planner",
        "measured step against `minitron-mp estimate`; exit code 3: off by more than 15 %",
        90,
        program("planner_check.py", RECIPE, "--steps", "5"),
        program(
            "planner_check.py",
            TOY_RECIPE,
            *("--toy", "--layers", "1", "--steps", "3", "--microbatches", "1"),
        ),
        read=read_planner,
        accepted=(0, 3),
        with_file=("--times", "{output}/layers/times.json"),
    ),
    loss(
        "loss_128256",
        "loss at the vocabulary of Llama 3, which is no multiple of 128 rows",
        50,
        ("--vocab", "128256"),
        ("--vocab", "500"),
    ),
    loss(
        "loss_256000",
        "loss at the vocabulary of Nemotron-4",
        50,
        ("--vocab", "256000"),
        ("--vocab", "1000"),
    ),
    loss(
        "loss_tp8",
        "loss of one shard of tp 8, without communication",
        40,
        ("--tp-shard", "8"),
        ("--vocab", "512", "--tp-shard", "4"),
    ),
    Row(
        "profile_bf16",
        "time of the loss by kernel, bf16 logits",
        30,
        own("profile_loss.py", "--logits", "bf16"),
        read=read_result,
    ),
    Row(
        "step_graphs",
        "a step with CUDA graphs at 4,096 tokens, where the host is the limit",
        90,
        program(
            "step.py",
            *("--cuda-graphs", "--sequence-length", "4096", "--repeats", "5"),
            *("--out", "{folder}/step.json"),
        ),
        read=read_step,
    ),
)

AVAILABLE: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "gpu": (NEEDS_GPU, lambda facts: bool(facts["hardware"]["gpus"])),
    "te": ("needs Transformer Engine", lambda facts: bool(facts["versions"]["transformer-engine"])),
    "pytest": ("needs pytest (pip install pytest)", lambda facts: bool(facts["versions"]["pytest"])),
}


def missing(row: Row, facts: dict[str, Any], rehearse: bool) -> str:
    """Return why this machine cannot run the stage, or ""."""
    if rehearse:
        if not row.rehearsal:
            return NEEDS_GPU
        needed = [name for name in row.needs if name == "pytest"]
    else:
        needed = ["gpu", *row.needs]
    return next((AVAILABLE[name][0] for name in needed if not AVAILABLE[name][1](facts)), "")


def gpu_stages(facts: dict[str, Any], rehearse: bool) -> list[Stage]:
    """Return all stages for this machine."""
    import_all = (PYTHON, str(HERE / "imports.py"))
    stages = [Stage("imports", "every import of the GPU path, and the versions", import_all, 90)]
    for rows, together in ((CORRECT, TOGETHER), (TIMES, "")):
        for row in rows:
            stages.append(
                Stage(
                    row.name,
                    row.shows,
                    row.rehearsal if rehearse else row.command,
                    row.limit_s * (2 if rehearse else 1),
                    (rehearse and row.read_rehearsal) or row.read,
                    together if not rehearse else "",
                    row.accepted,
                    missing=missing(row, facts, rehearse),
                    with_file=row.with_file,
                    environment={"TORCHINDUCTOR_COMPILE_THREADS": "2"} if together else {},
                )
            )
    return stages
