"""Settings of the stream from a remote teacher to its students: shape, rank grids, and the check
that sender and receiver agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minitron_mp.artifacts.manifest import Change
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.distillation.stream import STREAM_VERSION, Link
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Grid, HeadSpec, StreamShape
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.errors import InputError, differing_fields, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.settings import blend_settings


def microbatch_ids(recipe: Recipe, first_step: int) -> range:
    """Return the stream ids of the microbatches of all steps from `first_step` on."""
    per_step = recipe.distill.global_batch_size // recipe.distill.micro_batch_size
    return range(first_step * per_step, recipe.distill.steps * per_step)


def signal_shape(context: StageContext) -> StreamShape:
    """Return payload, size and dtype of the signals of one microbatch."""
    recipe = context.recipe
    arch = context.arch(recipe.distillation_teacher)
    dtype = DTYPES[recipe.teacher_precision]
    if recipe.teacher.payload == "hidden":
        width = arch.hidden_size
    elif recipe.teacher.payload == "logits":
        width = arch.padded_vocab_size
    else:
        width = 2 * recipe.teacher.top_k + 1
        dtype = torch.int32
    return StreamShape(
        recipe.teacher.payload,
        recipe.data.sequence_length,
        recipe.distill.micro_batch_size,
        width,
        dtype,
    )


def role_link(context: StageContext) -> Link:
    """Return the stream between the roles of this job, equal on all ranks."""
    recipe, channel = context.recipe, _channel(context)

    def grid(role: str, parallel: ParallelConfig) -> Grid:
        ranks = channel.spans[role]
        return Grid(role, parallel, len(ranks) // parallel.model_ranks, ranks.start)

    students = [
        grid(role, student.parallel)
        for role, student in context.students.items()
        if channel.role in ("teacher", role)
    ]
    teacher = grid("teacher", recipe.teacher.parallel)
    return Link(channel, signal_shape(context), teacher, students, recipe.teacher.window)


def stream_end(context: StageContext, link: Link) -> StreamEnd:
    """Return the object that ends this job's stream at an early stop."""
    recipe = context.recipe
    per_step = len(microbatch_ids(recipe, 0)) // recipe.distill.steps
    ahead = (link.window + min(link.window, recipe.teacher.parallel.pp)) * link.teacher.dp
    return StreamEnd(_channel(context), per_step, 1 + -(-ahead // per_step))


def _channel(context: StageContext) -> RoleChannel:
    assert context.world.channel is not None
    return context.world.channel


@dataclass(frozen=True)
class StreamStart:
    """The first step of the students, and the changes of their settings before it."""

    step: int
    changes: list[Change]


def handshake(context: StageContext, link: Link, first_step: int) -> StreamStart:
    """Return the start of the students, after the roles have compared their settings.

    Called on all ranks of the roles. InputError on all of them names every field that differs.
    first_step: of this student. The teacher's step and changes are not used.
    """
    recipe = context.recipe
    teacher = recipe.distillation_teacher
    model = context.arch(teacher if context.world.role == "teacher" else recipe.initial_student)
    settings = stream_settings(
        recipe,
        link,
        context.arch(teacher),
        vocab_size=model.vocab_size,
        fingerprints={
            "teacher checkpoint": context.manifest_of(teacher).fingerprint,
            "data": context.manifest_of("data").fingerprint,
        },
        tokenizer=dict(context.tokenizer().unique_identifiers),
    )
    start = StreamStart(first_step, context.manifest.changes)
    return compare_settings(_channel(context), list(context.students), settings, start)


def stream_settings(
    recipe: Recipe,
    link: Link,
    teacher: Arch,
    *,
    vocab_size: int,
    fingerprints: dict[str, str],
    tokenizer: dict[str, object],
) -> dict[str, object]:
    """Return the settings that sender and receiver must share. vocab_size: of this role's model."""
    return {
        **fingerprints,
        "tokenizer": tokenizer,
        "seed": recipe.seed,
        "steps": recipe.distill.steps,
        "valid_batches": recipe.distill.valid_batches if recipe.distill.valid_interval else 0,
        "global_batch_size": recipe.distill.global_batch_size,
        "skip_batches": recipe.distill.skip_batches,
        "temperature": recipe.distill.temperature,
        "states": recipe.distill.states and recipe.distill.states.model_dump(),
        **{f"head {name}": value for name, value in vars(HeadSpec.of(teacher)).items()},
        "head vocab_size": vocab_size,
        "teacher ranks": str(link.teacher),
        **{name: str(value) for name, value in vars(link.shape).items()},
        "window": link.window,
        "document_mask": recipe.data.document_mask,
        **blend_settings(recipe, "train", *(["valid"] if recipe.distill.valid_interval else [])),
        "context parallel order": "zig-zag",
        "stream version": STREAM_VERSION,
    }


def compare_settings(
    channel: RoleChannel, students: Sequence[str], settings: dict[str, object], start: StreamStart
) -> StreamStart:
    """Return the start of the students; InputError on all ranks when the roles differ."""
    changes = [change.model_dump(mode="json") for change in start.changes]
    sent = {"step": start.step, "changes": changes, "settings": settings}
    received = channel.exchange("settings", sent, roles=["teacher", *students])
    problems = [
        row
        for role in students
        for row in differing_fields(
            received["teacher"]["settings"], received[role]["settings"], "teacher", role
        )
    ]
    refuse("teacher and student must have the same settings:", problems)
    starts = {
        role: StreamStart(received[role]["step"], list(map(Change.model_validate, received[role]["changes"])))
        for role in students
    }
    steps = {role: start.step for role, start in starts.items()}
    if len(set(steps.values())) > 1:
        resumed = ", ".join(f"{role} at step {step}" for role, step in steps.items())
        raise InputError(
            f"all students of one teacher must resume from the same step, given {resumed}; go back to a "
            f"common one with `minitron-mp rewind RECIPE distill {min(steps.values())}`, which moves later "
            "checkpoints of all students aside"
        )
    sizes = {role: _batch_sizes(start.changes) for role, start in starts.items()}
    if any(size != sizes[students[0]] for size in sizes.values()):
        first = min(step for changes in sizes.values() for step in changes)
        raise InputError(
            f"all students of one teacher must change global_batch_size at the same steps, given {sizes}; "
            f"go back to a step before with `minitron-mp rewind RECIPE distill {first}`, "
            "which moves later checkpoints of all students aside"
        )
    return starts[students[0]]


def _batch_sizes(changes: Sequence[Change]) -> dict[int, object]:
    """Return step -> global_batch_size from it on, of changes during a run."""
    return {change.step: change.new for change in changes if change.name == "global_batch_size"}
