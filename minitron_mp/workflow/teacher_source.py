"""What FP8 costs the teacher: KL(teacher in bf16 || teacher in FP8) on some held-out text, told before a student learns from the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say
from minitron_mp.data.batches import micro_batches
from minitron_mp.distillation.cache import Reader
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.serve import ServedTeacher, SignalSender, serve_signals
from minitron_mp.distillation.stream import STREAM_VERSION, Link, Sender, Senders
from minitron_mp.distillation.stream_end import StreamEnd
from minitron_mp.distillation.stream_layout import Grid, HeadSpec, StreamShape
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher, SignalReceiver
from minitron_mp.distillation.teacher_head import load_head
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.role_channel import RoleChannel
from minitron_mp.errors import InputError, differing_fields, refuse
from minitron_mp.evaluation.quality import compare
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import HIDDEN
from minitron_mp.models.build import DTYPES
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.workflow.context import StageContext, training_samples

KL_SAMPLES = 4
"""Of held-out text; 4 x 8192 tokens."""


def log_fp8_teacher_kl(job: StageContext, model: ShardedModel | None) -> str | None:
    """What rank 0 of the student says of a teacher in FP8; None, and nothing done, where the recipe has none.

    model: the teacher, where it is on these ranks, whatever their role; None on those of a student whose teacher is elsewhere. The bf16
    teacher is loaded beside it for the while, 2 bytes a parameter. Reached by all ranks of each role.
    """
    text, channel = None, job.world.channel
    if job.recipe.teacher.fp8 is None:
        return None
    if model is not None:
        text = _fp8_teacher_kl(job, model)
    if channel is not None:
        text = channel.exchange("drift", text, timeout_s=None, roles=["teacher", *job.students])["teacher"]
    if text is not None:
        say(text)
    return text


def _fp8_teacher_kl(job: StageContext, model: ShardedModel) -> str:
    _, groups = job.groups("valid", KL_SAMPLES, job.recipe.distill.micro_batch_size, exact=False)
    quality = compare({"fp8": model}, job.teacher(), groups)
    exact, rough = quality["teacher"], quality["fp8"]
    name = job.recipe.teacher.fp8
    return f"teacher in FP8 ({name}): KL(bf16 || FP8) {rough.kl:.5f} on {exact.num_tokens:,} tokens, loss {rough.loss:.4f}, in bf16 {exact.loss:.4f}"


def ids(recipe: Recipe, first: int) -> range:
    """Ids (stream.py) of the microbatches of all steps from `first` on."""
    per_step = recipe.distill.global_batch_size // recipe.distill.micro_batch_size
    return range(first * per_step, recipe.distill.steps * per_step)


def open_teacher(job: StageContext, first: int) -> ColocatedTeacher | RemoteTeacher:
    """The teacher as the student's trainer sees it; first: the step that the run goes on from."""
    recipe, world = job.recipe, job.world
    t, pairs = recipe.teacher, _pairs(job)
    if t.placement == "colocated":
        return job.teacher(pairs=pairs, fp8=t.fp8)
    dp = world.groups.dp
    receiver: SignalReceiver | None = None
    stream_end: StreamEnd | None = None
    mine = [id for id in ids(recipe, first) if id % dp.size() == dp.rank()]
    if t.placement == "cached":
        place = (dp.rank(), world.groups.cp.rank(), world.groups.tp.rank())
        student = Grid("student", recipe.parallel, dp.size())
        receiver = (
            Reader(job.paths["cache"], signal_shape(job), student, place, mine, world.device)
            if world.is_last_stage
            else None
        )
    else:
        link = _link(job)
        _handshake(job, link, first)
        stream_end = _stream_end(job, link)
        copies = link.teacher.dp
        say(
            f"distill: {copies} {'copies' if copies > 1 else 'copy'} of the teacher, from job rank {link.teacher.first} on"
        )
        own = link.to_stages(pairs.blocks(recipe.parallel) if pairs else {recipe.parallel.pp - 1: [0]}).get(
            world.groups.pp.rank()
        )
        receiver = Receiver(own, link.students[0], mine, world.device) if own else None
    head = None
    if t.payload == "hidden":
        head = load_head(
            job.arch(recipe.distillation_teacher),
            job.paths[recipe.distillation_teacher],
            world,
            DTYPES[recipe.teacher_precision],
        )
    return RemoteTeacher(receiver, t.payload, head, world, pairs, stream_end)


def serve_students(job: StageContext) -> None:
    """The ranks of a remote teacher in distill: stream the signals of all microbatches that the student is still to see."""
    link = _link(job)
    first, pairs = _handshake(job, link, 0), _pairs(job)
    sender: SignalSender | None = None
    if job.world.is_last_stage:
        blocks = pairs.blocks(job.recipe.parallel) if pairs else None
        sender = Senders(link.to_stages(blocks), blocks, link.shape.width) if blocks else Sender(link)
    serve(job, sender, first, window=link.window, pairs=pairs, stream_end=_stream_end(job, link))


def _stream_end(job: StageContext, link: Link) -> StreamEnd:
    """Return the early end of this job's stream."""
    assert job.world.channel is not None
    per_step = len(ids(job.recipe, 0)) // job.recipe.distill.steps
    ahead = (link.window + min(link.window, job.recipe.teacher.parallel.pp)) * link.teacher.dp
    return StreamEnd(job.world.channel, per_step, 1 + -(-ahead // per_step))


def serve(
    job: StageContext,
    sender: SignalSender | None,
    first: int,
    *,
    window: int,
    progress: Callable[[int], None] = lambda count: None,
    pairs: LayerPairs | None = None,
    stream_end: StreamEnd | None = None,
) -> None:
    """Run the teacher over all microbatches of distill from step `first` on, and send its signals.

    Called by all ranks that hold the teacher. window: microbatches in the pipeline at once.
    """
    recipe = job.recipe
    settings = recipe.distill
    samples = training_samples(job, settings)
    per_step = settings.global_batch_size // settings.micro_batch_size

    def batch_of(id: int) -> Batch:
        (batch,) = micro_batches(
            samples,
            id // per_step,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=id % per_step,
            dp_size=per_step,
        )
        return batch

    model = job.teacher_model(fp8=recipe.teacher.fp8).freeze()
    log_fp8_teacher_kl(job, model)
    teacher = ServedTeacher(
        model,
        signal_shape(job),
        window,
        top_k=recipe.teacher.top_k,
        temperature=settings.temperature,
        pairs=pairs,
        stream_end=stream_end,
    )
    serve_signals(teacher, sender, batch_of, ids(recipe, first), progress=progress)


def _pairs(job: StageContext) -> LayerPairs | None:
    """The states to match; a student cut from its teacher knows the channels that it kept."""
    recipe = job.recipe
    if recipe.distill.states is None:
        return None
    channels = None
    if not recipe.teacher.model:
        channels = tuple(PrunePlan.load(job.paths["plan"]).units(HIDDEN).tolist())
    return LayerPairs(
        recipe.distill.states, job.arch("prune"), job.arch(recipe.distillation_teacher), channels
    )


def signal_shape(job: StageContext) -> StreamShape:
    """Return what the signals of all microbatches have in common."""
    recipe, arch = job.recipe, job.arch(job.recipe.distillation_teacher)
    width, dtype = {
        "hidden": (arch.hidden_size, DTYPES[recipe.teacher_precision]),
        "logits": (arch.padded_vocab_size, DTYPES[recipe.teacher_precision]),
        "topk": (2 * recipe.teacher.top_k + 1, torch.int32),
    }[recipe.teacher.payload]
    return StreamShape(
        recipe.teacher.payload, recipe.data.sequence_length, recipe.distill.micro_batch_size, width, dtype
    )


def _link(job: StageContext) -> Link:
    """The stream between the roles of this job, the same on all ranks."""
    recipe, channel = job.recipe, job.world.channel
    assert channel is not None

    def grid(role: str, parallel: ParallelConfig) -> Grid:
        return Grid(
            role, parallel, len(channel.spans[role]) // parallel.model_ranks, channel.spans[role].start
        )

    students = [
        grid(role, own.parallel) for role, own in job.students.items() if channel.role in ("teacher", role)
    ]
    return Link(
        channel, signal_shape(job), grid("teacher", recipe.teacher.parallel), students, recipe.teacher.window
    )


def _handshake(job: StageContext, link: Link, first: int) -> int:
    """The first step, as the student says it; InputError on all ranks that names every field on which the roles differ."""
    recipe, channel = job.recipe, job.world.channel
    assert channel is not None
    own = job.arch(recipe.distillation_teacher if job.world.role == "teacher" else "prune")
    made_from = {
        stage: require_artifact(job.paths[stage], stage).fingerprint
        for stage in (recipe.distillation_teacher, "data")
    }
    mine = contract(
        recipe,
        link,
        job.arch(recipe.distillation_teacher),
        own.vocab_size,
        made_from,
        dict(job.tokenizer().unique_identifiers),
    )
    return compare_contracts(channel, list(job.students), mine, first)


def contract(
    recipe: Recipe,
    link: Link,
    teacher: Arch,
    vocab_size: int,
    made_from: dict[str, str],
    tokenizer: dict[str, Any],
) -> dict[str, Any]:
    """What both ends of the stream must have alike. vocab_size: of this end's own model; made_from: fingerprints of teacher and data."""
    return {
        "teacher checkpoint": made_from[recipe.distillation_teacher],
        "data": made_from["data"],
        "tokenizer": tokenizer,
        "seed": recipe.seed,
        "steps": recipe.distill.steps,
        "global_batch_size": recipe.distill.global_batch_size,
        "temperature": recipe.distill.temperature,
        "states": recipe.distill.states and recipe.distill.states.model_dump(),
        **{f"head {name}": value for name, value in vars(HeadSpec.of(teacher)).items()},
        "head vocab_size": vocab_size,
        "teacher ranks": str(link.teacher),
        **{name: str(value) for name, value in vars(link.shape).items()},
        "window": link.window,
        "context parallel order": "zig-zag",
        "stream version": STREAM_VERSION,
    }


def compare_contracts(channel: RoleChannel, students: Sequence[str], mine: dict[str, Any], first: int) -> int:
    """What the students say is the first step, when the roles agree on everything; InputError on all their ranks otherwise."""
    said = channel.exchange("contract", {"first": first, "contract": mine}, roles=["teacher", *students])
    problems = [
        row
        for role in students
        for row in differing_fields(said["teacher"]["contract"], said[role]["contract"], "teacher", role)
    ]
    refuse("teacher and student do not fit:", problems)
    steps = {role: said[role]["first"] for role in students}
    if len(set(steps.values())) > 1:
        where = ", ".join(f"{role} from step {step}" for role, step in steps.items())
        raise InputError(
            f"students of one stream go on together, these would go on {where}; delete the checkpoints after the earliest of these steps"
        )
    return steps[students[0]]
