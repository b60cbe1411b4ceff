"""What the tests run on the ranks of a pool: module-level functions, their case as keywords, plain values back.

Each joins a world of one layout and leaves it. Results that must agree between ranks are returned by each rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pool
import torch
import torch.distributed as dist
from cases import DEFAULT_PAIR, DISTILL, ONE_STEP, RESUME_AT, SEQUENCE_LENGTH, Layout, make_samples, micro_batches, settings, targets
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from minitron_mp import checkpoint, importance, losses, parallel, schedule, slicing, trainer
from minitron_mp.arch import AXES, Arch
from minitron_mp.artifact import Manifest
from minitron_mp.collectives import context_parallel_slice
from minitron_mp.config import Distill, InputError, Parallel, Score
from minitron_mp.evaluate import compare
from minitron_mp.model import build_model, logits
from minitron_mp.parallel import World
from minitron_mp.plan import Importance, make_plan
from minitron_mp.teacher import ColocatedTeacher
from minitron_mp.trainer import StepMetrics, train

Weights = dict[str, Tensor]


@contextmanager
def joined(layout: Layout) -> Iterator[World]:
    """The world of a layout, over the pool's default group; a failure is reported with the coordinates in it."""
    with parallel.world(Parallel(**layout.parallel), seed=1) as world:
        pool.here["coordinates"] = world.coordinates
        yield world
    RotaryEmbedding.forward.cache_clear()  # holds the last 32 modules and so their groups, see pool.serve


def manifest(stage: str, arch: Arch | None = None, **settings: Any) -> Manifest:
    return Manifest(stage=stage, settings=settings, inputs={}, arch=arch)


def write_weights(folder: Path, arch: Arch, weights: Weights) -> None:
    """One rank: global tensors -> a checkpoint."""
    state = {}
    for key, whole in weights.items():
        layers = range(arch.num_layers) if AXES[key][0] == "layer" else [None]
        for layer in layers:
            place = {} if layer is None else {"prepend_axis_num": 1}
            offsets = [] if layer is None else [(0, layer, arch.num_layers)]
            state[f"{key}/{layer}"] = ShardedTensor.from_rank_offsets(key, whole if layer is None else whole[layer].clone(), *offsets, **place)
    with joined(Layout("one", 1)):
        checkpoint.save(state, folder, manifest("teacher", arch))


def write_hugging_face(folder: Path, source: Path) -> Arch:
    """One rank: Hugging Face folder -> a checkpoint in float32."""
    from minitron_mp import hf

    arch = hf.read_arch(source)
    opened, weights = hf.Weights(source, arch), {}
    for key, layer in hf.canonical_keys(arch):
        weights.setdefault(key, []).append(opened.tensor(key, layer).float())
    write_weights(folder, arch, {key: torch.stack(parts) if AXES[key][0] == "layer" else parts[0] for key, parts in weights.items()})
    return arch


def read_tensors(folder: Path, prefix: str) -> Weights:
    """One rank: the global tensors of a checkpoint whose keys begin so."""
    with joined(Layout("one", 1)):
        return {key: value for key, value in dist_checkpointing.load_plain_tensors(str(folder)).items() if key.startswith(prefix)}


def load(arch: Arch, folder: Path, world: World, precision: str = "fp32", training: Distill | None = None) -> list[Any]:
    chunks = build_model(arch, world, precision=precision, sequence_length=SEQUENCE_LENGTH, training=training)
    checkpoint.load_model(chunks, folder, world)
    return chunks


def global_logits(chunks: list[Any], samples: dict[str, Tensor], world: World) -> Tensor | None:
    """[count, s, v] of all samples, put together on every last-stage rank; None elsewhere. Every dp rank computes all."""
    half = len(samples["tokens"]) // 2  # two microbatches: the interleaved schedule wants as many as pipeline stages
    local = schedule.run(chunks, micro_batches(samples, half, 0, 1), world, lambda hidden, _: logits(chunks[-1], hidden))
    if not world.is_last_stage:
        return None
    vocab = _gather(torch.cat(local, 1), 2, world.groups.tp)  # [s/cp, count, v]
    places = context_parallel_slice(torch.arange(SEQUENCE_LENGTH), 0, world.groups.cp)
    order = _gather(places, 0, world.groups.cp).argsort()
    return _gather(vocab, 0, world.groups.cp)[order].transpose(0, 1)


def _gather(x: Tensor, dim: int, group: Any) -> Tensor:
    parts = [torch.empty_like(x.contiguous()) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def score_samples(chunks: list[Any], arch: Arch, samples: dict[str, Tensor], world: World, pair: tuple[str, str]) -> Importance:
    settings = Score(batch_aggregation=pair[0], sequence_aggregation=pair[1])
    mine = micro_batches(samples, 2, world.groups.dp.rank(), world.groups.dp.size())
    return importance.score(chunks, arch, settings, world, samples["tokens"].shape[1], lambda: schedule.run(chunks, mine, world, None))


def count_hooks(chunks: list[Any]) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for chunk in chunks for module in chunk.modules() for kind in kinds)


def prune_everything(layout: Layout, arch: Arch, teacher: Path, output: Path, save: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Scores, plans, slices and saved students of one layout, and what hooks leave behind. The first pair makes the plans."""
    with joined(layout) as world:
        chunks = load(arch, teacher, world)
        samples = make_samples(arch, 0, 8)
        hooks, before = count_hooks(chunks), global_logits(chunks, samples, world)
        scores = {pair: score_samples(chunks, arch, samples, world, pair) for pair in pairs}
        after = global_logits(chunks, samples, world)
        unchanged = count_hooks(chunks) == hooks and (before is None or torch.equal(before, after))
        plans = {name: make_plan(scores[pairs[0]], arch, target, tp=layout.tp) for name, target in targets(arch).items()}
        whole = [(parameter, parameter.data) for chunk in chunks for parameter in chunk.parameters()]
        pieces = {}
        for name, plan in plans.items():
            state = slicing.prune(chunks, plan, world)
            pieces[name] = [_piece(tensor) for tensor in state.values()]
            if name in ("identity", *save):
                checkpoint.save(state, output / name, manifest("prune", plan.student))
            for parameter, data in whole:  # prune() consumes the model
                parameter.data = data
        return {
            "logits": before,
            "unchanged": unchanged,
            "scores": {pair: vars(value) for pair, value in scores.items()},
            "plans": plans,
            "pieces": pieces,
            "identity": global_logits(load(arch, output / "identity", world), samples, world),
        }


def _piece(tensor: ShardedTensor) -> tuple[str, tuple[int, ...], Tensor, bool]:
    """(key, where in the global tensor, data with all global dimensions, whether this copy is the one that is saved)."""
    data = tensor.data.view((1,) * tensor.prepend_axis_num + tuple(tensor.data.shape)).clone()
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return tensor.key, tuple(tensor.global_offset), data, not any(replica)


def load_and_run(layout: Layout, models: dict[str, tuple[Arch, Path]]) -> dict[str, Tensor | None]:
    """Logits of checkpoints loaded at this layout."""
    with joined(layout) as world:
        return {name: global_logits(load(arch, folder, world), make_samples(arch, 0, 8), world) for name, (arch, folder) in models.items()}


def fail_while_scoring(layout: Layout, arch: Arch, teacher: Path) -> tuple[str, int]:
    """(message, hooks that are left) after an exception in the middle of the forward passes."""
    with joined(layout) as world:
        chunks = load(arch, teacher, world)
        hooks = count_hooks(chunks)

        def run() -> None:
            schedule.run(chunks, micro_batches(make_samples(arch, 0, 4), 2, 0, 1), world, None)
            raise ValueError("stopped by the test")

        try:
            importance.score(chunks, arch, Score(), world, SEQUENCE_LENGTH, run)
        except ValueError as error:
            return str(error), count_hooks(chunks) - hooks
        return "not stopped", 0


def score_in_bf16(layout: Layout, arch: Arch, teacher: Path) -> dict[str, Any]:
    with joined(layout) as world:
        return vars(score_samples(load(arch, teacher, world, "bf16"), arch, make_samples(arch, 0, 8), world, DEFAULT_PAIR))


def score_checkpoint(arch: Arch, folder: Path, samples: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """One rank: scores of a checkpoint."""
    with joined(Layout("one", 1)) as world:
        chunks = build_model(arch, world, precision="fp32", sequence_length=samples["tokens"].shape[1])
        checkpoint.load_model(chunks, folder, world)
        return {pair: vars(score_samples(chunks, arch, samples, world, pair)) for pair in pairs}


def train_everything(layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path) -> dict[str, Any]:
    """An unbroken run, the same run resumed from its checkpoint, a student that is its teacher, and evaluations.

    The checkpoint after RESUME_AT steps stays in output/unbroken. Metrics are rank 0's, [] elsewhere.
    """
    with joined(layout) as world:
        signals = ColocatedTeacher(arch, teacher, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)
        run = Runner(world, signals, settings(layout))
        unbroken = run(student_arch, student, output / "unbroken")
        copy_once(output / "unbroken", output / "resumed")
        resumed = run(student_arch, None, output / "resumed")
        pure = ONE_STEP.model_copy(update={"ce_weight": 0.0, "micro_batch_size": 4})
        steps = [micro_batches(make_samples(arch, step, 4), 2, world.groups.dp.rank(), world.groups.dp.size()) for step in range(2)]
        models = {"student": load(student_arch, student, world), "teacher again": signals.chunks}
        return {
            "unbroken": unbroken.metrics,
            "resumed": resumed.metrics,
            "bitwise": all(map(torch.equal, unbroken.weights, resumed.weights)),
            "same": Runner(world, signals, pure)(arch, teacher, output / "same").metrics,
            "quality": compare(models, signals, steps, world, vocab_size=arch.vocab_size),
        }


def train_variants(layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path, variants: dict[str, Distill]) -> dict[str, Any]:
    """Metrics of a run with each of these settings, stopped and resumed where it is long enough; rank 0's."""
    found = {}
    with joined(layout) as world, small_buckets():
        signals = ColocatedTeacher(arch, teacher, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)
        for name, chosen in variants.items():
            run = Runner(world, signals, chosen)
            found[name] = run(student_arch, student, output / name, stop_after=RESUME_AT).metrics
            if chosen.steps > RESUME_AT:
                found[name] += run(student_arch, None, output / name).metrics
    return found


@contextmanager
def small_buckets() -> Iterator[None]:
    """Megatron's buckets of gradients hold 40 million and more: these models would fit in one."""
    usual = trainer.DistributedDataParallelConfig
    trainer.DistributedDataParallelConfig = partial(usual, bucket_size=5000)
    try:
        yield
    finally:
        trainer.DistributedDataParallelConfig = usual


def resume(layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, stopped: Path, output: Path) -> list[StepMetrics]:
    """The rest of a run that another layout stopped; rank 0's metrics."""
    with joined(layout) as world:
        copy_once(stopped, output)
        signals = ColocatedTeacher(arch, teacher, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)
        return Runner(world, signals, settings(layout))(student_arch, None, output).metrics


def copy_once(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


@dataclass
class Run:
    """metrics: rank 0's, one entry a step. weights: this rank's, at the end."""

    metrics: list[StepMetrics]
    weights: list[Tensor]


@dataclass
class Runner:
    """train() with the batches of these tests."""

    world: World
    teacher: Any
    settings: Distill
    precision: str = "fp32"
    lr_in_manifest: int = 0
    """Something by which two runs can differ."""

    def __call__(
        self, arch: Arch, start: Path | None, checkpoints: Path, *, stop_after: int | None = None, batch_of_step: Callable[[int], int] = lambda step: step
    ) -> Run:
        """start: the student's first weights; None leaves them as they come, for a run that resumes."""
        world, chosen, metrics = self.world, self.settings, []
        chunks = build_model(arch, world, precision=self.precision, sequence_length=SEQUENCE_LENGTH, training=chosen)
        if start is not None:
            checkpoint.load_model(chunks, start, world)

        def batches_of(step: int) -> list[dict[str, Tensor]]:
            samples = make_samples(arch, batch_of_step(step), chosen.global_batch_size)
            return micro_batches(samples, chosen.micro_batch_size, world.groups.dp.rank(), world.groups.dp.size())

        options = {"vocab_size": arch.vocab_size, "seed": 3, "checkpoints": checkpoints, "manifest": manifest("distill", lr=self.lr_in_manifest)}
        train(chunks, self.teacher, batches_of, chosen, world, **options, on_step=metrics.append, stop_after=stop_after)
        return Run(metrics, [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()])


def train_in_bf16(layout: Layout, arch: Arch, teacher: Path, student_arch: Arch, student: Path, output: Path, steps: int) -> list[float]:
    """Losses of a few steps on one batch, teacher and student in bf16."""
    with joined(layout) as world:
        signals = ColocatedTeacher(arch, teacher, world, precision="bf16", sequence_length=SEQUENCE_LENGTH)
        chosen = settings(layout).model_copy(update={"steps": steps})
        run = Runner(world, signals, chosen, precision="bf16")
        return [m.loss for m in run(student_arch, student, output, batch_of_step=lambda step: 0).metrics]


def vocab_parallel_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, vocab_size: int, chunk_elements: int, settings: dict[str, float]
) -> Any:
    """(loss, kl, ce, gradient of this rank's columns) of sum(loss * weights), over the default group."""
    group, usual = dist.group.WORLD, losses.CHUNK_ELEMENTS
    own = student.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    own_teacher = None if teacher is None else teacher.chunk(group.size(), -1)[group.rank()].clone()
    try:
        losses.CHUNK_ELEMENTS = chunk_elements
        loss, kl, ce = losses.distillation_loss(own, own_teacher, labels, vocab_size=vocab_size, group=group, **settings)
    finally:
        losses.CHUNK_ELEMENTS = usual
    (loss * weights).sum().backward()
    return loss.detach(), kl, ce, own.grad


def refusal(action: Callable[[], Any]) -> str:
    """The text of the InputError, "" when there was none."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


def refused_model(layout: Layout, arch: Arch) -> str:
    def build() -> None:
        with joined(layout) as world:
            build_model(arch, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)

    return refusal(build)


def refused_scores(layout: Layout, arch: Arch, teacher: Path, key: str, layer: int) -> str:
    """One weight of one layer is NaN."""
    with joined(layout) as world, torch.no_grad():
        chunks = load(arch, teacher, world)
        for block in (block for chunk in chunks for block in chunk.decoder.layers):
            if block.layer_number - 1 == layer:
                dict(block.named_parameters())[key][0, 0] = torch.nan
        return refusal(lambda: score_samples(chunks, arch, make_samples(arch, 0, 4), world, DEFAULT_PAIR))


def refused_checkpoint(layout: Layout, arch: Arch, folder: Path) -> str:
    with joined(layout) as world:
        return refusal(lambda: load(arch, folder, world))


def refused_microbatches(layout: Layout, arch: Arch, teacher: Path) -> str:
    with joined(layout) as world:
        chunks = load(arch, teacher, world)
        return refusal(lambda: schedule.run(chunks, micro_batches(make_samples(arch, 0, 3), 1, 0, 1), world, None))


def refused_parameter(layout: Layout, arch: Arch, teacher: Path) -> str:
    with joined(layout) as world:
        chunks = load(arch, teacher, world)
        plan = make_plan(score_samples(chunks, arch, make_samples(arch, 0, 4), world, DEFAULT_PAIR), arch, targets(arch)["all"])
        tensor = ShardedTensor.from_rank_offsets("decoder.layers.mlp.unheard_of.weight", torch.ones(2))
        return refusal(lambda: slicing.slice_tensor(tensor, plan, world))


def refused_wrapped(layout: Layout, arch: Arch, teacher: Path) -> str:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    with joined(layout) as world:
        (chunk,) = load(arch, teacher, world)
        plan = make_plan(score_samples([chunk], arch, make_samples(arch, 0, 4), world, DEFAULT_PAIR), arch, targets(arch)["all"])
        wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
        return refusal(lambda: slicing.prune([wrapped], plan, world))


def refused_resume(layout: Layout, arch: Arch, teacher: Path, checkpoints: Path) -> str:
    with joined(layout) as world:
        first = Runner(world, None, DISTILL.model_copy(update={"kl_weight": 0.0}), lr_in_manifest=1)
        first(arch, teacher, checkpoints, stop_after=1)
        second = Runner(world, None, first.settings, lr_in_manifest=2)
        return refusal(lambda: second(arch, teacher, checkpoints))


def refused_loss(layout: Layout, arch: Arch, teacher: Path, checkpoints: Path) -> str:
    """The teacher's final norm is NaN, so its logits are, on the last stage only."""
    with joined(layout) as world:
        signals = ColocatedTeacher(arch, teacher, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)
        if world.is_last_stage:
            signals.chunks[-1].decoder.final_layernorm.weight.fill_(torch.nan)
        return refusal(lambda: Runner(world, signals, settings(layout))(arch, teacher, checkpoints))


def refused_by_one(layout: Layout) -> str:
    with joined(layout) as world:
        return refusal(lambda: parallel.everyone(InputError("the disk is full") if world.rank == 1 else None))
