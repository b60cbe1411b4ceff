"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError

from minitron_mp import artifact, checkpoint, data, hf, importance, signals, slicing, text
from minitron_mp.ablation import losses_without, scores_without
from minitron_mp.arch import AXES, Arch, layout_problems
from minitron_mp.candidates import layers_to_drop
from minitron_mp.card import CARD, model_card, source_card
from minitron_mp.console import Tracker, say
from minitron_mp.errors import InputError, refuse
from minitron_mp.fit import correct, distill
from minitron_mp.items import read_items
from minitron_mp.job import ASSETS, Job, assets_from
from minitron_mp.judging import evaluate
from minitron_mp.model import DTYPES
from minitron_mp.parallel import World, environment_variable, everyone, on_main
from minitron_mp.plan import PrunePlan, Trials, depth_candidates, exportable
from minitron_mp.schedule import run
from minitron_mp.search import search
from minitron_mp.spans import num_groups
from minitron_mp.tasks import result_of, right_log_p, rows_of

READ_BYTES = 2e9
"""Tensors that export holds at a time."""


def import_model(job: Job) -> None:
    """Hugging Face folder -> sharded checkpoint, in the folder's dtype. Each rank converts every world-size-th layer."""
    source = Path(job.recipe.model if job.manifest.stage == "import" else job.recipe.teacher.model or "")
    arch = hf.read_arch(source)
    source_card(source)  # refused now, not by the export hours later
    weights, mine = hf.Weights(source, arch), {}
    keys = [
        (key, layer)
        for key, layer in hf.canonical_keys(arch)
        if (layer or 0) % dist.get_world_size() == dist.get_rank()
    ]
    failure: Exception | None = None
    try:
        with Tracker(job.manifest.stage, len(keys), "tensors") as tracker:
            for key, layer in keys:
                mine[f"{key}/{layer}"] = _sharded(key, layer, weights.tensor(key, layer), arch)
                tracker.advance(1)
    except InputError as error:
        failure = error
    everyone(failure)

    def copy_assets(folder: Path) -> None:
        (folder / ASSETS).mkdir()
        for path in (
            hf.assets(source) + [source / CARD] * (source / CARD).is_file()
        ):  # the card changes no model: no fingerprint has it
            shutil.copy(path, folder / ASSETS)

    checkpoint.save(mine, job.output, job.manifest.model_copy(update={"arch": arch}), copy_assets)


def tokenize(job: Job) -> None:
    """Text -> three Megatron indexed datasets, or those of data.held_out (stage texts); rank 0 works, the others wait."""
    done = 0

    def progress(documents: int) -> None:
        nonlocal done
        if documents - done >= 250:
            done = documents
            say(f"{job.manifest.stage}: {documents} documents")

    def write() -> None:
        tokenizer = job.tokenizer()
        data.check_vocabulary(tokenizer, job.arch("import").vocab_size)
        try:
            # On many cores; elsewhere the launch scripts forbid it, for the sake of processes that are forked.
            with (
                environment_variable("TOKENIZERS_PARALLELISM", "true"),
                artifact.writing(job.output, job.manifest) as folder,
            ):
                further = job.manifest.stage == "texts"
                tokens = text.tokenize(
                    job.recipe.data, tokenizer, folder, job.recipe.seed, further=further, progress=progress
                )
        except OSError as error:
            raise InputError(f"{job.output} cannot be written: {error}") from error
        say(
            f"{job.manifest.stage}: "
            + ", ".join(f"{part} {count:,} tokens" for part, count in tokens.items())
        )

    on_main(write, takes_long=True)


def score(job: Job) -> None:
    """Importance of all axes in one forward pass over the calibration text."""
    settings, sequence_length = job.recipe.score, job.recipe.data.sequence_length
    arch, chunks = job.arch(job.recipe.base), job.build(job.recipe.base)
    _, groups = job.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=True)
    for chunk in chunks:
        chunk.eval()

    def forward() -> None:
        with Tracker("score", settings.num_samples, "samples") as tracker:
            for batches in groups:
                run(chunks, batches, job.world, None)
                tracker.advance(len(batches) * settings.micro_batch_size * job.world.groups.dp.size())

    result = importance.score(chunks, arch, settings, job.world, sequence_length, forward)
    on_main(lambda: result.save(job.output, job.manifest.model_copy(update={"arch": arch})))


def depth(job: Job) -> None:
    """What the teacher loses without single layers or blocks of them, on calibration text or on a task."""
    recipe, settings, arch = job.recipe, job.recipe.depth, job.arch(job.recipe.base)
    count = layers_to_drop(recipe, arch)
    chunks = job.build(job.recipe.base)
    for chunk in chunks:
        chunk.eval()
    total, measure = (_task_without if settings.metric == "task" else _text_without)(
        job, chunks, arch.vocab_size
    )
    greedy, gone, rounds = settings.method == "greedy", frozenset(), []
    with Tracker("depth", count, "rounds") if greedy else Tracker("depth", total, "batches") as tracker:
        for _ in range(count if greedy else 1):
            candidates = depth_candidates(settings, arch.num_layers, count, gone)
            mine = measure(candidates, gone, (lambda: None) if greedy else lambda: tracker.advance(1))
            found = on_main(
                lambda mine=mine: mine
            )  # what a greedy search goes on from is the same on all ranks, to the last bit
            if greedy:
                best, *others = found.ranked()
                own = {"trials": [found.trials[best]], "accuracies": found.accuracies[best : best + 1]}
                for i in others[:1]:
                    own |= {"second": [found.trials[i]], "second_accuracies": found.accuracies[i : i + 1]}
                rounds.append(found.model_copy(update=own))
                gone = frozenset(found.trials[best][0])
                accuracy = "".join(f", accuracy {share:.1%}" for share in rounds[-1].accuracies)
                tracker.advance(
                    1,
                    f"without {', '.join(map(str, sorted(gone)))}: loss {found.trials[best][1]:.4f}{accuracy}",
                )
            else:
                rounds = [found]
    together = {
        name: [row for r in rounds for row in getattr(r, name)]
        for name in ("trials", "accuracies", "second", "second_accuracies")
    }
    result = rounds[0].model_copy(update=together)
    on_main(lambda: result.save(job.output, job.manifest))


Measure = Callable[[list[frozenset[int]], frozenset[int], Callable[[], None]], Trials]
"""(candidates, layers that are gone already, progress) -> one trial for each candidate."""


def _text_without(job: Job, chunks: list[Any], vocab_size: int) -> tuple[int, Measure]:
    """How many groups of microbatches of calibration text, and the losses on them."""
    settings = job.recipe.depth
    _, first = job.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=False)
    groups = list(first)

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> Trials:
        base, losses = losses_without(
            chunks, groups, job.world, candidates, gone=gone, vocab_size=vocab_size, progress=progress
        )
        return Trials(
            base=base, trials=[(sorted(dropped), loss) for dropped, loss in zip(candidates, losses)]
        )

    return len(groups), measure


def _task_without(job: Job, chunks: list[Any], vocab_size: int) -> tuple[int, Measure]:
    """How many groups of microbatches of the task's options, and accuracies and losses on them."""
    settings, tokenizer = job.recipe.depth, job.tokenizer()
    assert settings.task is not None
    items = read_items(Path(settings.task), settings.task_items)
    rows, size = rows_of(items, tokenizer, job.recipe.data.sequence_length), settings.micro_batch_size
    place = {"micro_batch_size": size, "vocab_size": vocab_size, "eod": tokenizer.eod}

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> Trials:
        whole, scores = scores_without(
            chunks, rows, job.world, candidates, gone=gone, **place, progress=progress
        )
        shares, losses = zip(
            *[(result_of(items, own).accuracy, -right_log_p(items, own)) for own in (whole, *scores)]
        )
        trials = [(sorted(dropped), loss) for dropped, loss in zip(candidates, losses[1:])]
        return Trials(base=losses[0], trials=trials, base_accuracy=shares[0], accuracies=list(shares[1:]))

    return num_groups(len(rows), job.world, size), measure


def prune(job: Job) -> None:
    """Slice the teacher by the plan and write the student."""
    plan = PrunePlan.load(job.paths["plan"])
    chunks = job.build(job.recipe.base)
    if plan.teacher != job.arch(job.recipe.base):
        raise InputError(
            f"{job.paths['plan']} was made for another architecture than {job.paths[job.recipe.base]}; run `minitron-mp plan` again"
        )
    refuse("this layout does not fit the student:", layout_problems(plan.student, job.recipe.parallel.tp))
    state = slicing.prune(chunks, plan, job.world)
    checkpoint.save(
        state,
        job.output,
        job.manifest.model_copy(update={"arch": plan.student}),
        assets_from(job.paths["import"]),
    )


def export(job: Job) -> None:
    """Sharded checkpoint -> Hugging Face folder that transformers loads, with a model card."""
    arch = job.arch("distill")
    settings = job.recipe.export
    as_written = exportable(arch, settings.family)
    dtype = DTYPES[settings.dtype or job.recipe.precision]
    tensors = read_tensors(job.paths["distill"], arch, job.world)
    failure: Exception | None = None
    checkpoint.check_room(arch.num_parameters() * dtype.itemsize if job.world.is_main else 0, job.output)
    try:
        if job.world.is_main:
            with artifact.writing(job.output, job.manifest.model_copy(update={"arch": as_written})) as folder:
                hf.write_folder(folder, job.paths["import"] / ASSETS, as_written, dtype, tensors)
                card = model_card(
                    job.recipe, job.paths, job.manifest, as_written.family, job.paths["import"] / ASSETS
                )
                (folder / CARD).write_text(card, encoding="utf-8")
    except InputError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = InputError(f"{job.output} cannot be written: {error}")
    for (
        _
    ) in tensors:  # reading is collective: the other ranks, and rank 0 after a failure, walk it to the end
        pass
    everyone(failure)


def read_tensors(folder: Path, arch: Arch, world: World) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(key, layer, canonical tensor on the CPU in the checkpoint's dtype) on rank 0, nothing elsewhere; reached by all ranks."""
    keys, shapes, dtypes = list(hf.canonical_keys(arch)), arch.shapes(), checkpoint.dtypes(folder)
    while keys:
        part: dict[str, tuple[str, int | None]] = {}
        state, num_bytes = {}, 0
        while keys and num_bytes < READ_BYTES:
            key, layer = keys.pop(0)
            empty = torch.empty(shapes[key][layer is not None :], dtype=dtypes[key])
            num_bytes += empty.nbytes
            part[f"{key}/{layer}"] = (key, layer)
            if world.is_main:
                state[f"{key}/{layer}"] = _sharded(key, layer, empty, arch)
        loaded = checkpoint.load(state, folder)
        if world.is_main:
            for name, (key, layer) in part.items():
                yield key, layer, loaded[name]


def _sharded(key: str, layer: int | None, tensor: torch.Tensor, arch: Arch) -> ShardedTensor:
    """A canonical tensor as the whole of its key, or as one layer of it."""
    if AXES[key][0] != "layer":
        return ShardedTensor.from_rank_offsets(key, tensor)
    return ShardedTensor.from_rank_offsets(key, tensor, (0, layer, arch.num_layers), prepend_axis_num=1)


RUN: dict[str, Callable[[Job], None]] = {
    "import": import_model,
    "import-teacher": import_model,
    "data": tokenize,
    "texts": tokenize,
    "score": score,
    "correct": correct,
    "depth": depth,
    "search": search,
    "prune": prune,
    "cache": signals.cache,
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
}
