"""The held-out text of the validations of distill, and a remote teacher's signals for it.

A remote teacher streams these signals once, before those of the training, and the student keeps
them in host memory. The microbatches are numbered like those of the training: a batch of
global_batch_size samples is a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.data.batches import microbatches, open_samples
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.serve import ServedTeacher, serve_signals
from minitron_mp.distillation.stream import Link, Sender
from minitron_mp.distillation.stream_layout import Traffic
from minitron_mp.distillation.teacher import RemoteTeacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.errors import refuse
from minitron_mp.workflow.context import StageContext, corpus
from minitron_mp.workflow.host_memory import host_memory_problems


@dataclass(frozen=True)
class HeldOutText:
    """The held-out samples that a training run is validated on; equal for every role."""

    samples: Dataset
    settings: TrainingConfig

    @classmethod
    def open(cls, context: StageContext, settings: TrainingConfig) -> HeldOutText:
        """Open the samples; called on all ranks."""
        num_samples = settings.valid_batches * settings.global_batch_size
        return cls(open_samples(corpus(context), "valid", num_samples, repeat=False), settings)

    def batches(self, number: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """Return the microbatches of one batch on a data-parallel rank."""
        return microbatches(
            self.samples,
            number,
            global_batch_size=self.settings.global_batch_size,
            micro_batch_size=self.settings.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )


class HeldSignals:
    """Signals in host memory. It is a SignalReceiver, and can be read more than once."""

    def __init__(self, signals: dict[int, Tensor], device: torch.device):
        self.signals, self.device = signals, device

    def get(self, id: int) -> Tensor:
        return self.signals[id].to(self.device)

    def release(self, id: int) -> None: ...

    def traffic(self) -> Traffic | None:
        return None

    def close(self) -> None: ...


def held_out_ids(recipe: Recipe) -> range:
    """Return the ids of the microbatches of a validation; empty without validations."""
    settings = recipe.distill
    num_batches = settings.valid_batches if settings.valid_interval else 0
    return range(num_batches * (settings.global_batch_size // settings.micro_batch_size))


def receive_held_out(context: StageContext, link: Link, head: Tensor | None) -> RemoteTeacher | None:
    """Receive the signals of the held-out text, and return a teacher that reads them.

    Called on all ranks of the student, before the stream of the training. None without validations.
    """
    ids, world = held_out_ids(context.recipe), context.world
    if not ids:
        return None
    teacher = context.arch(context.recipe.distillation_teacher)
    memory_problems = on_rank_0(lambda: host_memory_problems(context.recipe, teacher, world.size))
    refuse("the validations cannot run:", memory_problems)
    receiver = None
    stage_link = link.to_stages({world.parallel.pp - 1: [0]}).get(world.groups.pp.rank())
    if stage_link is not None:
        dp = world.groups.dp
        local_ids = [id for id in ids if id % dp.size() == dp.rank()]
        stream = Receiver(stage_link, link.students[0], local_ids, world.device)
        signals: dict[int, Tensor] = {}
        for id in local_ids:
            signals[id] = stream.get(id).cpu()
            stream.release(id)
        stream.close()
        receiver = HeldSignals(signals, world.device)
    return RemoteTeacher(receiver, context.recipe.teacher.payload, head, world)


def serve_held_out(context: StageContext, teacher: ServedTeacher, link: Link) -> None:
    """Stream the signals of the held-out text; called on all ranks of the teacher.

    A validation has temperature 1 and compares no hidden states.
    """
    ids = held_out_ids(context.recipe)
    if not ids:
        return
    text = HeldOutText.open(context, context.recipe.distill)
    per_step = len(ids) // context.recipe.distill.valid_batches

    def batch_of(id: int) -> Batch:
        (batch,) = text.batches(id // per_step, id % per_step, per_step)
        return batch

    served = replace(teacher, temperature=1.0, pairs=None, stream_end=None)
    serve_signals(served, Sender(link) if context.world.is_last_stage else None, batch_of, ids)
