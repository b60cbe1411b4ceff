"""Where the teacher's signals of a distillation come from: the teacher here, on other ranks, or what a teacher left on disk.

Recipe and artefacts -> the links, ends and ids that teacher.py, stream.py and cache.py work with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from minitron_mp import artifact, checkpoint, data
from minitron_mp.arch import Arch, HeadSpec, differing_fields
from minitron_mp.cache import Reader, Writer, write_index
from minitron_mp.config import Recipe
from minitron_mp.console import Tracker, say
from minitron_mp.drift import tell_drift
from minitron_mp.errors import InputError, refuse
from minitron_mp.job import Job
from minitron_mp.leaving import Ending
from minitron_mp.model import DTYPES
from minitron_mp.parallel import Bridge, everyone, on_main
from minitron_mp.plan import PrunePlan
from minitron_mp.schedule import Batch
from minitron_mp.sections import Parallel
from minitron_mp.states import Pairs
from minitron_mp.stream import STREAM_VERSION, Grid, Link, Receiver, Sender, Senders, Shape
from minitron_mp.teacher import ColocatedTeacher, RemoteTeacher, frozen_model, load_head, serve
from minitron_mp.training_config import Training


def train_set(job: Job, settings: Training) -> Dataset:
    """The samples of all steps, the same for every role."""
    recipe, owner = job.recipe, "teacher" if job.world.role == "teacher" else ""
    count = settings.steps * settings.global_batch_size
    return data.samples(
        job.paths["data"],
        "train",
        recipe.data.sequence_length,
        count,
        recipe.seed,
        job.tokenizer(),
        repeat=True,
        owner=owner,
    )


def ids(recipe: Recipe, first: int) -> range:
    """Ids (stream.py) of the microbatches of all steps from `first` on."""
    per_step = recipe.distill.global_batch_size // recipe.distill.micro_batch_size
    return range(first * per_step, recipe.distill.steps * per_step)


def source(job: Job, first: int) -> ColocatedTeacher | RemoteTeacher:
    """The teacher as the student's trainer sees it; first: the step that the run goes on from."""
    recipe, world = job.recipe, job.world
    t, pairs = recipe.teacher, _pairs(job)
    if t.placement == "colocated":
        return job.teacher(pairs=pairs, fp8=t.fp8)
    receiver, ending, dp = None, None, world.groups.dp
    mine = [id for id in ids(recipe, first) if id % dp.size() == dp.rank()]
    if t.placement == "cached":
        place = (dp.rank(), world.groups.cp.rank(), world.groups.tp.rank())
        student = Grid("student", recipe.parallel, dp.size())
        receiver = (
            Reader(job.paths["cache"], _shape(job), student, place, mine, world.device)
            if world.is_last_stage
            else None
        )
    else:
        link = _link(job)
        _handshake(job, link, first)
        ending = _ending(job, link)
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
            job.arch(recipe.tutor), job.paths[recipe.tutor], world, DTYPES[recipe.teacher_precision]
        )
    return RemoteTeacher(receiver, t.payload, head, world, pairs, ending)


def teach(job: Job) -> None:
    """The ranks of a remote teacher in distill: stream the signals of all microbatches that the student is still to see."""
    link = _link(job)
    first, pairs, sender = _handshake(job, link, 0), _pairs(job), None
    if job.world.is_last_stage:
        blocks = pairs.blocks(job.recipe.parallel) if pairs else None
        sender = Senders(link.to_stages(blocks), blocks, link.shape.width) if blocks else Sender(link)
    _serve(job, link.shape, link.teacher, sender, first, link.window, pairs=pairs, ending=_ending(job, link))


def _ending(job: Job, link: Link) -> Ending:
    """How the stream ends early."""
    assert job.world.bridge is not None
    per_step = len(ids(job.recipe, 0)) // job.recipe.distill.steps
    ahead = (link.window + min(link.window, job.recipe.teacher.parallel.pp)) * link.teacher.dp
    return Ending(job.world.bridge, per_step, 1 + -(-ahead // per_step))


def cache(job: Job) -> None:
    """The teacher over all microbatches of distill, on all ranks in the recipe's layout, to disk."""
    recipe, world, shape = job.recipe, job.world, _shape(job)
    teacher = Grid("teacher", recipe.parallel, world.groups.dp.size())
    g, is_last = world.groups, world.is_last_stage
    share = (
        len(ids(recipe, 0))
        / teacher.dp
        * torch.Size(shape.local(recipe.parallel)).numel()
        * shape.dtype.itemsize
    )
    on_main(lambda: shutil.rmtree(artifact.aside(job.output), ignore_errors=True))
    checkpoint.check_room(share if is_last else 0, job.output)
    folder = on_main(lambda: artifact.prepare(job.output))
    writer = Writer(folder, teacher.last_stage(g.dp.rank(), g.cp.rank(), g.tp.rank())) if is_last else None
    failure: Exception | None = None
    with Tracker("cache", len(ids(recipe, 0)), "microbatches") as tracker:
        try:
            _serve(
                job,
                shape,
                teacher,
                writer,
                0,
                recipe.parallel.pp,
                lambda count: tracker.advance(count * teacher.dp),
            )
        except Exception as error:
            failure = error
    everyone(failure)

    def finish() -> None:
        write_index(folder, shape, teacher, 0, len(ids(recipe, 0)))
        artifact.commit(job.output, job.manifest)

    on_main(finish)


def _serve(
    job: Job,
    shape: Shape,
    teacher: Grid,
    sender: Any,
    first: int,
    group: int,
    progress: Any = lambda count: None,
    pairs: Pairs | None = None,
    ending: Ending | None = None,
) -> None:
    recipe, world, d, samples = job.recipe, job.world, job.recipe.distill, train_set(job, job.recipe.distill)
    per_step = d.global_batch_size // d.micro_batch_size

    def batch_of(id: int) -> Batch:
        place = {"dp_rank": id % per_step, "dp_size": per_step}
        return data.micro_batches(
            samples,
            id // per_step,
            global_batch_size=d.global_batch_size,
            micro_batch_size=d.micro_batch_size,
            **place,
        )[0]

    arch = job.arch(recipe.tutor)
    chunks = frozen_model(
        arch,
        job.paths[recipe.tutor],
        world,
        precision=recipe.teacher_precision,
        fp8=recipe.teacher.fp8,
        **job.build_options,
    )
    tell_drift(job, chunks)
    settings: dict[str, Any] = {
        "vocab_size": arch.vocab_size,
        "top_k": recipe.teacher.top_k,
        "temperature": d.temperature,
        "pairs": pairs,
        "ending": ending,
    }
    serve(
        chunks,
        world,
        shape,
        teacher,
        sender,
        batch_of,
        ids(recipe, first),
        group=group,
        progress=progress,
        **settings,
    )


def _pairs(job: Job) -> Pairs | None:
    """The states to match; a student cut from its teacher knows the channels that it kept."""
    recipe = job.recipe
    if recipe.distill.states is None:
        return None
    channels = None if recipe.teacher.model else tuple(PrunePlan.load(job.paths["plan"]).hidden)
    return Pairs(recipe.distill.states, job.arch("prune"), job.arch(recipe.tutor), channels)


def _shape(job: Job) -> Shape:
    recipe, arch = job.recipe, job.arch(job.recipe.tutor)
    width, dtype = {
        "hidden": (arch.hidden_size, DTYPES[recipe.teacher_precision]),
        "logits": (arch.padded_vocab_size, DTYPES[recipe.teacher_precision]),
        "topk": (2 * recipe.teacher.top_k + 1, torch.int32),
    }[recipe.teacher.payload]
    return Shape(
        recipe.teacher.payload, recipe.data.sequence_length, recipe.distill.micro_batch_size, width, dtype
    )


def _link(job: Job) -> Link:
    """The stream between the roles of this job, the same on all ranks."""
    recipe, bridge = job.recipe, job.world.bridge
    assert bridge is not None

    def grid(role: str, parallel: Parallel) -> Grid:
        return Grid(role, parallel, len(bridge.spans[role]) // parallel.model_ranks, bridge.spans[role].start)

    students = [
        grid(role, own.parallel) for role, own in job.students.items() if bridge.role in ("teacher", role)
    ]
    return Link(
        bridge, _shape(job), grid("teacher", recipe.teacher.parallel), students, recipe.teacher.window
    )


def _handshake(job: Job, link: Link, first: int) -> int:
    """The first step, as the student says it; InputError on all ranks that names every field on which the roles differ."""
    recipe, bridge = job.recipe, job.world.bridge
    assert bridge is not None
    own = job.arch(recipe.tutor if job.world.role == "teacher" else "prune")
    made_from = {
        stage: artifact.require(job.paths[stage], stage).fingerprint for stage in (recipe.tutor, "data")
    }
    mine = contract(
        recipe,
        link,
        job.arch(recipe.tutor),
        own.vocab_size,
        made_from,
        dict(job.tokenizer().unique_identifiers),
    )
    return compare_contracts(bridge, list(job.students), mine, first)


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
        "teacher checkpoint": made_from[recipe.tutor],
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


def compare_contracts(bridge: Bridge, students: Sequence[str], mine: dict[str, Any], first: int) -> int:
    """What the students say is the first step, when the roles agree on everything; InputError on all their ranks otherwise."""
    said = bridge.exchange("contract", {"first": first, "contract": mine}, roles=["teacher", *students])
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
