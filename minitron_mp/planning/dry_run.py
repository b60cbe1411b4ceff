"""Rows of a dry run: layout, parameters, memory and time of a recipe."""

from __future__ import annotations

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.layout import stage_layers
from minitron_mp.models.arch import Arch
from minitron_mp.models.families.export import reader_rows
from minitron_mp.models.number_formats import BYTES
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.hardware import read_hardware
from minitron_mp.planning.layouts import layout_problem
from minitron_mp.planning.memory import (
    GIB,
    distillation_memory,
    fullest,
    held_out_signal_bytes,
    payload_bytes_per_token,
    rank_parameters,
    training_peak,
)
from minitron_mp.planning.step_time import estimate_distillation
from minitron_mp.planning.times import read_times

Row = tuple[str, str]


def dry_run_rows(base: Arch, case: PlanningCase) -> list[Row]:
    """Return rows (what, value) for a recipe whose layout has been checked.

    base: the model that is pruned.
    """
    return [
        *_layout_rows(case),
        *_model_rows(base, case),
        *_memory_rows(base, case),
        *_time_rows(case),
        *_reader_rows(case),
    ]


def _layout_rows(case: PlanningCase) -> list[Row]:
    t = case.recipe.teacher
    rows = [("student ranks", _ranks_text(case.student_ranks, case.recipe.parallel))]
    if t.is_remote:
        rows.append(("teacher ranks", _ranks_text(case.teacher_ranks, t.parallel)))
        per_token = payload_bytes_per_token(case.teacher, case.recipe)
        per_step = per_token * _tokens_per_step(case)
        payload = t.payload + (" and states" if case.recipe.distill.states else "")
        rows.append(("teacher stream", f"{payload}: {per_token:,} bytes per token, {per_step:,} per step"))
        held_out = held_out_signal_bytes(case.teacher, case.recipe, case.student_ranks)
        if held_out:
            text = f"{_gib(held_out)} of host memory on each rank of the student's last stage"
            rows.append(("teacher signals for the validations", text))
    return rows


def _ranks_text(ranks: int, p: ParallelConfig) -> str:
    text = f"{ranks} = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {ranks // p.model_ranks}"
    if p.vpp:
        text += f", vpp {p.vpp}"
    if p.sequence_parallel:
        text += ", sequence parallel"
    return text


def _tokens_per_step(case: PlanningCase) -> int:
    return case.recipe.distill.global_batch_size * case.recipe.data.sequence_length


def _model_rows(base: Arch, case: PlanningCase) -> list[Row]:
    recipe = case.recipe
    teacher_layout = recipe.teacher.parallel if recipe.teacher.is_remote else recipe.parallel
    models = [("teacher", case.teacher, teacher_layout)]
    if base not in (case.teacher, case.student):
        models.append(("unpruned", base, recipe.parallel))
    models.append(("student", case.student, recipe.parallel))
    rows = []
    for name, arch, layout in models:
        total = arch.num_parameters()
        without_embeddings = arch.num_parameters(embeddings=False)
        per_rank = ", ".join(f"{count:,}" for count in rank_parameters(arch, layout))
        rows.append((f"{name} layers per stage", _layers_text(arch.num_layers, layout)))
        rows.append(
            (
                f"{name} parameters",
                f"{total:,} ({without_embeddings:,} without embeddings); per rank of each stage: {per_rank}",
            )
        )
    d = recipe.distill
    tokens = d.steps * _tokens_per_step(case)
    rows.append(
        (
            "distillation",
            f"{d.steps:,} steps x {d.global_batch_size} samples x {recipe.data.sequence_length} tokens "
            f"= {tokens:,} tokens",
        )
    )
    return rows


def _layers_text(num_layers: int, layout: ParallelConfig) -> str:
    """Return the layers of each stage, and those of the even split if they differ."""
    stages = stage_layers(num_layers, layout)
    even = stage_layers(num_layers, ParallelConfig(pp=layout.pp, vpp=layout.vpp))
    return str(stages) if stages == even else f"{stages} (evenly split: {even})"


def _memory_rows(base: Arch, case: PlanningCase) -> list[Row]:
    recipe = case.recipe
    memory = fullest(distillation_memory(case))
    rows = [(f"memory: {part}", _gib(num_bytes)) for part, num_bytes in memory.items()]
    rows.append(("memory: sum on the fullest rank", _gib(sum(memory.values()))))
    if recipe.correct and not recipe.corrects_during_distillation and not recipe.earlier:
        needed = training_peak(base, recipe.correct, recipe, case.student_ranks)
        rows.append(("memory during teacher correction", _gib(needed)))
    if recipe.search:
        num_students = min(recipe.search.together or recipe.search.finalists, recipe.search.finalists)
        students = num_students * training_peak(case.student, recipe.distill, recipe, case.student_ranks)
        teacher = BYTES[recipe.teacher_precision] * max(rank_parameters(case.teacher, recipe.parallel))
        rows.append((f"memory while the search distils {num_students} students", _gib(students + teacher)))
    return rows


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _time_rows(case: PlanningCase) -> list[Row]:
    times = read_times("h100", read_hardware("h100"))
    if layout_problem(case, times):
        return []
    estimate = estimate_distillation(case, times)
    text = (
        f"{estimate.step_s:.2f} s per step, {estimate.tokens_per_gpu_s:,.0f} tokens/s/GPU, "
        f"{estimate.gpu_hours:,.0f} GPU-hours; details: minitron-mp estimate"
    )
    return [("distillation on H100 SXM (estimate)", text)]


def _reader_rows(case: PlanningCase) -> list[Row]:
    """Return which programs read the exported student; with a search, the largest candidate."""
    exported = case.student.model_copy(update={"family": case.recipe.export.family or case.student.family})
    rows = reader_rows(exported)
    accepting = ", ".join(reader for reader, reason in rows if not reason)
    return [
        *([("the export works with", accepting)] if accepting else []),
        *((f"the export does not work with {reader}", reason) for reader, reason in rows if reason),
    ]
