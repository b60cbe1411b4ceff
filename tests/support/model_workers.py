"""Worker functions that several tests run on the ranks of a pool.

Module-level functions with keyword arguments and plain return values. Each joins a world of one
layout and leaves it. If a result must agree between ranks, every rank returns it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pool
import torch
import torch.distributed as dist
from cases import DEFAULT_PAIR, SEQUENCE_LENGTH, Layout, make_samples, microbatches, targets
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from minitron_mp.artifacts.checkpoint import load_weights, model_state, save_checkpoint
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distributed.collectives import context_parallel_slice, exchange_kept
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World, join_world
from minitron_mp.evaluation.prefill_speed import measure
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.axes import AXIS_OF_DIM
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel, logits
from minitron_mp.pruning.importance import score
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.masks import masked
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.slicing import merge_rows, prune

Weights = dict[str, Tensor]


@contextmanager
def joined(layout: Layout) -> Iterator[World]:
    """Join the world of a layout over the pool's default group; errors report its coordinates."""
    with join_world(ParallelConfig(**layout.parallel), seed=1) as world:
        pool.here["coordinates"] = world.coordinates
        yield world
    RotaryEmbedding.forward.cache_clear()  # holds the last 32 modules and so their groups, see pool.serve


def wait_for_slow_main(*, seconds: float, patience_s: float) -> list[int]:
    """Return rank 0's two results; the second takes longer than the collective timeout."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience_s))
    try:
        return [on_rank_0(lambda n=n: (time.sleep(n * seconds), n)[1], takes_long=True) for n in (0, 1)]
    finally:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=pool.GROUP_TIMEOUT_S))


def manifest(stage: str, arch: Arch | None = None, **settings: Any) -> Manifest:
    return Manifest(stage=stage, settings=settings, inputs={}, arch=arch)


def write_weights(folder: Path, arch: Arch, weights: Weights) -> None:
    """One rank: global tensors -> a checkpoint."""
    state = {key: ShardedTensor.from_rank_offsets(key, value.clone()) for key, value in weights.items()}
    with joined(Layout("one", 1)):
        save_checkpoint(state, folder, manifest("teacher", arch))


def write_hugging_face(folder: Path, source: Path) -> Arch:
    """One rank: Hugging Face folder -> a checkpoint in float32."""
    from minitron_mp.models.hf_config import read_arch
    from minitron_mp.models.hf_weights import HFWeights

    arch = read_arch(source)
    opened = HFWeights(source, arch)
    write_weights(folder, arch, {key: opened.tensor(key).float() for key in arch.shapes()})
    return arch


def read_tensors(folder: Path, prefix: str) -> Weights:
    """Return the global tensors of a checkpoint whose keys start with prefix. One rank."""
    with joined(Layout("one", 1)):
        return {
            key: value
            for key, value in dist_checkpointing.load_plain_tensors(str(folder)).items()
            if key.startswith(prefix)
        }


def count_forwards(num_layers: int, candidates: list[frozenset[int]]) -> int:
    """Return the layer forwards of one microbatch in a depth search. One rank.

    There are two steps, because the first one also runs the pass that captures the layer inputs.
    """
    from minitron_mp.pruning.ablation import losses_without

    sizes = {
        "hidden_size": 16,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 30,
    }
    arch, calls = (
        Arch(family="llama", tied=False, max_position_embeddings=64, num_layers=num_layers, **sizes),
        [],
    )
    with joined(Layout("one", 1)) as world:
        model = build_model(
            arch, world, ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH, random_weights=True)
        )
        for block in model.eval().chunks[0].decoder.layers:
            block.register_forward_hook(lambda *_: calls.append(1))
        steps, after = [[make_samples(arch, step, 1)] for step in range(2)], []
        losses_without(model, steps, candidates, progress=lambda: after.append(len(calls)))
        return after[1] - after[0]


def judge_everything(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    files: Path,
    missing: dict[frozenset[int], list[frozenset[int]]],
    gone: frozenset[int],
    candidates: list[frozenset[int]],
) -> dict[str, Any]:
    """Return the losses and task scores of one model without some of its layers.

    "losses": gone -> [loss without these layers, then without each candidate], on two steps.
    "choices", "words": the results of these task files. "scores": the scores of all their options.
    "scores without": the scores without `gone`, then without each of `candidates`.
    """
    from minitron_mp.evaluation import choice_tasks as tasks
    from minitron_mp.evaluation.choice_tasks import rows_of, score_task
    from minitron_mp.evaluation.log_likelihood import score_rows
    from minitron_mp.evaluation.task_files import read_task_file
    from minitron_mp.pruning.ablation import losses_without, scores_without

    tokenizer = characters(arch)
    results: dict[str, Any] = {}
    with joined(layout) as world:
        model = load(arch, teacher, world).eval()
        interleaved = layout.dp > 1 and "vpp" in layout.parallel
        batch_slice = (1 if interleaved else 2, world.groups.dp.rank(), world.groups.dp.size())
        steps = [microbatches(make_samples(arch, step, 4), *batch_slice) for step in range(2)]
        results["losses"] = {}
        for already, without in missing.items():
            base, losses = losses_without(model, steps, without, gone=already)
            results["losses"][already] = [base, *losses]
        # Tensor and context parallel ranks communicate per microbatch, so they get few large ones.
        size = 4 if layout.tp * layout.parallel.get("cp", 1) > 1 else 2
        tried, scores = {name: read_task_file(files / f"{name}.jsonl") for name in ("choices", "words")}, []
        with mock.patch.object(
            tasks,
            "score_rows",
            lambda *case, **more: scores.append(score_rows(*case, **more)) or scores[-1],
        ):
            for name, items in tried.items():
                results[name] = score_task({"m": model}, items, tokenizer, micro_batch_size=size)["m"]
        results["scores"] = torch.cat(scores)
        rows = rows_of([*tried["choices"], *tried["words"]], tokenizer, SEQUENCE_LENGTH)
        base, without_layers = scores_without(
            model, rows, candidates, gone=gone, eod=0, micro_batch_size=size
        )
        return results | {"scores without": [base, *without_layers]}


def characters(arch: Arch) -> Any:
    """A tokenizer with a token for each character."""
    from minitron_mp.data.tokenizer import Tokenizer

    return Tokenizer(
        lambda texts: [[ord(c) % (arch.vocab_size - 1) + 1 for c in text] for text in texts],
        arch.vocab_size,
        0,
    )


def load(arch: Arch, folder: Path, world: World, precision: str = "fp32") -> ShardedModel:
    model = build_model(arch, world, ModelOptions(precision=precision, sequence_length=SEQUENCE_LENGTH))
    load_weights(model.chunks, folder, world)
    return model


def global_logits(model: ShardedModel, samples: dict[str, Tensor]) -> Tensor | None:
    """Return the logits [count, s, v] of all samples on every last-stage rank, None elsewhere.

    Every data parallel rank computes all samples.
    """
    half = (
        len(samples["tokens"]) // 2
    )  # two microbatches: the interleaved schedule wants as many as pipeline stages
    world = model.world
    local = model.forward(
        microbatches(samples, half, 0, 1), lambda hidden, _: logits(model.last_chunk, hidden)
    )
    if not world.is_last_stage:
        return None
    vocab = gather(torch.cat(local, 1), 2, world.groups.tp)  # [s/cp, count, v]
    places = context_parallel_slice(torch.arange(SEQUENCE_LENGTH), 0, world.groups.cp)
    order = gather(places, 0, world.groups.cp).argsort()
    return gather(vocab, 0, world.groups.cp)[order].transpose(0, 1)


def gather(x: Tensor, dim: int, group: Any) -> Tensor:
    parts = [torch.empty_like(x.contiguous()) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def score_samples(model: ShardedModel, samples: dict[str, Tensor], pair: tuple[str, str]) -> Scores:
    groups = model.world.groups
    config = ScoreConfig(batch_aggregation=pair[0], sequence_aggregation=pair[1])
    local_batches = microbatches(samples, 2, groups.dp.rank(), groups.dp.size())
    return score(model, [local_batches], config)


def count_hooks(chunks: list[Any]) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
    )
    return sum(len(getattr(module, kind)) for chunk in chunks for module in chunk.modules() for kind in kinds)


def prune_everything(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    output: Path,
    save: list[str],
    masks: list[str],
    pairs: list[tuple[str, str]],
    uneven: bool,
) -> dict[str, Any]:
    """Return scores, plans, slices and hook counts of one layout, and save the students.

    The first aggregation pair makes the plans. uneven: with a plan whose layers keep different sizes.
    """
    with joined(layout) as world:
        model = load(arch, teacher, world)
        chunks = model.chunks
        samples = make_samples(arch, 0, 8)
        hooks, before = count_hooks(chunks), global_logits(model, samples)
        scores = {pair: score_samples(model, samples, pair) for pair in pairs}
        plans = {
            name: make_plan(scores[pairs[0]], arch, target, tp=layout.tp)
            for name, target in targets(arch, layout.tp).items()
        }
        if uneven:
            plans["uneven"] = uneven_plan(plans["all"])
        by_masks = {}
        for name in masks:
            with masked(model, plans[name]):
                by_masks[name] = global_logits(model, samples)
        after = global_logits(model, samples)
        unchanged = count_hooks(chunks) == hooks and (before is None or torch.equal(before, after))
        full_data = [(parameter, parameter.data) for chunk in chunks for parameter in chunk.parameters()]
        pieces = {}
        for name, plan in plans.items():
            state = prune(model, plan)
            pieces[name] = [_piece(tensor) for tensor in state.values()]
            if name in ("identity", "uneven", *save):
                save_checkpoint(state, output / name, manifest("prune", plan.student))
            for parameter, data in full_data:  # prune() consumes the model
                parameter.data = data
        return {
            "logits": before,
            "unchanged": unchanged,
            "masked": by_masks,
            "scores": {pair: value.tensors() for pair, value in scores.items()},
            "plans": plans,
            "pieces": pieces,
            "identity": global_logits(load(arch, output / "identity", world), samples),
        }


def uneven_plan(plan: PrunePlan) -> PrunePlan:
    """The plan, but every second layer keeps half of the neurons, and one head in half of the groups."""
    blocks, keep = [], {name: dict(by_layer) for name, by_layer in plan.keep.items()}
    per_group = plan.teacher.heads_per_group
    for number, (layer, block) in enumerate(zip(plan.layers, plan.student.blocks)):
        if number % 2 == 0:
            groups = range(block.num_query_groups // 2)
            first = {head // per_group: head for head in reversed(keep["heads"][layer])}
            keep["heads"][layer] = [first[group] for group in groups]
            keep["ffn"][layer] = keep["ffn"][layer][::2]
            block = BlockArch(
                ffn_hidden_size=len(keep["ffn"][layer]),
                num_attention_heads=len(groups),
                num_query_groups=len(groups),
            )
        blocks.append(block)
    student = plan.student.model_copy(update={"blocks": tuple(blocks)})
    return PrunePlan.model_validate({**plan.model_dump(), "student": student, "keep": keep})


def _piece(tensor: ShardedTensor) -> tuple[str, tuple[int, ...], Tensor, bool]:
    """Return (key, global offset, data, whether this copy is saved)."""
    assert tensor.prepend_axis_num == 0
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return tensor.key, tuple(tensor.global_offset), tensor.data.clone(), not any(replica)


def exchange(layout: Layout, rows: Tensor, keeps: list[Tensor]) -> list[tuple[Tensor, int]]:
    """Return (rows of this rank afterwards, number of all-to-alls) for each choice of kept rows."""
    with (
        joined(layout) as world,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent,
    ):
        group, exchanged = world.groups.tp, []
        for keep in keeps:
            before, part = sent.call_count, len(rows) // group.size()
            start = group.rank() * part
            exchanged.append(
                (exchange_kept(rows[start : start + part], 0, keep, start, group), sent.call_count - before)
            )
        return exchanged


def merge_queries(plan: PrunePlan, rows: Tensor, pairs: list[tuple[int, int]], layer: int) -> Tensor:
    query_rows = AXIS_OF_DIM["qkv"].dims["qkv"].merged_rows
    return merge_rows(rows, 0, pairs, query_rows, plan.teacher, layer)


def load_and_run(layout: Layout, models: dict[str, tuple[Arch, Path]]) -> dict[str, Tensor | None]:
    """Return the logits of checkpoints loaded at this layout."""
    with joined(layout) as world:
        return {
            name: global_logits(load(arch, folder, world), make_samples(arch, 0, 8))
            for name, (arch, folder) in models.items()
        }


def fail_while_scoring(layout: Layout, arch: Arch, teacher: Path) -> tuple[str, int]:
    """Return (message, number of remaining hooks) after an exception between forward passes."""
    with joined(layout) as world:
        model = load(arch, teacher, world)
        chunks = model.chunks
        hooks = count_hooks(chunks)

        def batches() -> Iterator[list[dict[str, Tensor]]]:
            yield microbatches(make_samples(arch, 0, 4), 2, 0, 1)
            raise ValueError("stopped by the test")

        try:
            score(model, batches())
        except ValueError as error:
            return str(error), count_hooks(chunks) - hooks
        return "not stopped", 0


def score_in_bf16(layout: Layout, arch: Arch, teacher: Path) -> dict[str, Any]:
    with joined(layout) as world:
        model = load(arch, teacher, world, "bf16")
        return score_samples(model, make_samples(arch, 0, 8), DEFAULT_PAIR).tensors()


def score_checkpoint(
    arch: Arch, folder: Path, samples: dict[str, Tensor], pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], Any]:
    """Return the scores of a checkpoint. One rank."""
    with joined(Layout("one", 1)) as world:
        model = build_model(
            arch, world, ModelOptions(precision="fp32", sequence_length=samples["tokens"].shape[1])
        )
        load_weights(model.chunks, folder, world)
        return {pair: score_samples(model, samples, pair).tensors() for pair in pairs}


def measure_speed(*, layout: Layout, arch: Arch, **options: Any) -> dict[str, Any]:
    """Measure the speed of a model, a smaller one, and a twin that has the smaller one's arch."""
    small = arch.resized(ffn_hidden_size=arch.ffn_hidden_size // 2)
    with joined(layout) as world:
        build = {"precision": "fp32", "sequence_length": SEQUENCE_LENGTH, "random_weights": True}
        models = {
            name: build_model(kind, world, ModelOptions(**build))
            for name, kind in (("large", arch), ("small", small))
        }
        models["twin"] = replace(models["small"], chunks=[])
        return measure(models, **options).model_dump()


def save_again(layout: Layout, arch: Arch, source: Path, folder: Path) -> None:
    """Load a checkpoint at this layout, and save it from there."""
    with joined(layout) as world:
        save_checkpoint(
            model_state(load(arch, source, world).chunks, world), folder, manifest("teacher", arch)
        )


def count_parameters(layout: Layout, arch: Arch) -> tuple[int, int]:
    """(pipeline stage, number of parameters on this rank) of a model."""
    with joined(layout) as world:
        model = build_model(arch, world, ModelOptions(precision="fp32", sequence_length=SEQUENCE_LENGTH))
        count = sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
        return world.groups.pp.rank(), count
