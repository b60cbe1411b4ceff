"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError

from minitron_mp import artifact, checkpoint, data, hf, importance, signals, slicing, text
from minitron_mp.ablation import losses_without, scores_without
from minitron_mp.arch import AXES, Arch, layout_problems
from minitron_mp.artifact import Manifest
from minitron_mp.candidates import layers_to_drop
from minitron_mp.card import CARD, model_card, source_card
from minitron_mp.config import InputError, Recipe, Training, must_divide, refuse
from minitron_mp.console import Tracker, say
from minitron_mp.correction import PREFIX, LearningTeacher
from minitron_mp.evaluate import compare
from minitron_mp.model import DTYPES, build_model, unwrap
from minitron_mp.parallel import World, everyone, on_main
from minitron_mp.plan import PrunePlan, Trials, depth_candidates, exportable
from minitron_mp.schedule import Batch, run
from minitron_mp.search import search
from minitron_mp.spans import num_groups
from minitron_mp.speed import measure
from minitron_mp.states import Pairs
from minitron_mp.tasks import judge, read_items, result_of, right_log_p, rows_of
from minitron_mp.teacher import ColocatedTeacher
from minitron_mp.trainer import Run, StepMetrics, metrics_line, resume_step, train

ASSETS = "assets"
"""Folder inside a checkpoint artefact with the Hugging Face side files: config.json, tokenizer."""
METRICS = {"correct": "metrics_correct.jsonl", "distill": "metrics.jsonl"}
"""Beside the artefacts while a stage trains; a copy of the whole curve goes into the artefact that it made."""
CHECKPOINTS = "checkpoints"
"""Beside the artefacts while a stage trains, a folder for each."""
READ_BYTES = 2e9
"""Tensors that export holds at a time."""
SPEED_SHARE, SPEED_S = 0.04, 2.0
"""Share of the time of evaluate, and at least so many seconds, after which the measurement of speed repeats nothing more."""


@dataclass(frozen=True)
class Job:
    """One stage of one recipe on this rank. paths: stage -> artefact; manifest: of the artefact to be written.

    students: role -> recipe of those that a remote teacher serves in this job.
    """

    recipe: Recipe
    world: World
    paths: dict[str, Path]
    manifest: Manifest
    students: dict[str, Recipe] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.paths[self.manifest.stage]

    def arch(self, stage: str) -> Arch:
        """Architecture of the model that a stage left."""
        arch = artifact.require(self.paths[stage], stage).arch
        assert arch is not None
        return arch

    def tokenizer(self) -> data.Tokenizer:
        return data.load_tokenizer(self.recipe.data.tokenizer or self.paths["import"] / ASSETS)

    def build(self, stage: str) -> list[Any]:
        """The model that a stage left, loaded, in this recipe's layout and precision."""
        chunks = build_model(self.arch(stage), self.world, precision=self.recipe.precision, sequence_length=self.recipe.data.sequence_length)
        checkpoint.load_model(chunks, self.paths[stage], self.world)
        return chunks

    def teacher(self, pairs: Pairs | None = None, *, corrected: bool = False) -> ColocatedTeacher:
        """The teacher of the student. pairs: states that it hands over. corrected: as it is after distill, where that corrects it."""
        arch, options = self.arch(self.recipe.tutor), {"precision": self.recipe.teacher_precision, "sequence_length": self.recipe.data.sequence_length}
        if corrected and self.recipe.corrects_meanwhile:
            return ColocatedTeacher(arch, self.paths["distill"], self.world, **options, prefix=PREFIX)
        return ColocatedTeacher(arch, self.paths[self.recipe.tutor], self.world, **options, pairs=pairs)

    def groups(self, part: str, num_samples: int, micro_batch_size: int, *, exact: bool) -> tuple[int, Iterator[list[Batch]]]:
        """How many groups, and the groups: this data parallel rank's microbatches of a part of the text, enough to fill the pipeline.

        exact: InputError unless the samples divide; otherwise the last group is filled up with samples of zero loss_mask.
        """
        world, recipe = self.world, self.recipe
        dp, pp, interleaved = world.groups.dp.size(), world.parallel.pp, world.parallel.interleaved
        if exact and (problem := must_divide("score.num_samples", num_samples, micro_batch_size, dp, interleaved)):
            raise InputError(problem)
        unit = micro_batch_size * dp * interleaved
        units = -(-num_samples // unit)
        size = unit * max(n for n in range(1, min(4 * pp, units) + 1) if not exact or units % n == 0)
        samples = data.samples(self.paths["data"], part, recipe.data.sequence_length, num_samples, recipe.seed, self.tokenizer(), repeat=False)
        sizes = {"global_batch_size": size, "micro_batch_size": micro_batch_size, "dp_rank": world.groups.dp.rank(), "dp_size": dp, "limit": num_samples}
        count = -(-num_samples // size)
        return count, (data.micro_batches(samples, i, **sizes) for i in range(count))


def import_model(job: Job) -> None:
    """Hugging Face folder -> sharded checkpoint, in the folder's dtype. Each rank converts every world-size-th layer."""
    source = Path(job.recipe.model if job.manifest.stage == "import" else job.recipe.teacher.model or "")
    arch = hf.read_arch(source)
    source_card(source)  # refused now, not by the export hours later
    weights, mine = hf.Weights(source, arch), {}
    keys = [(key, layer) for key, layer in hf.canonical_keys(arch) if (layer or 0) % dist.get_world_size() == dist.get_rank()]
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
        for path in hf.assets(source) + [source / CARD] * (source / CARD).is_file():  # the card changes no model: no fingerprint has it
            shutil.copy(path, folder / ASSETS)

    checkpoint.save(mine, job.output, job.manifest.model_copy(update={"arch": arch}), copy_assets)


def tokenize(job: Job) -> None:
    """Text -> three Megatron indexed datasets; rank 0 works, the others wait."""
    done = 0

    def progress(documents: int) -> None:
        nonlocal done
        if documents - done >= 250:
            done = documents
            say(f"data: {documents} documents")

    def write() -> None:
        tokenizer = job.tokenizer()
        data.check_vocabulary(tokenizer, job.arch("import").vocab_size)
        try:
            with artifact.writing(job.output, job.manifest) as folder:
                tokens = text.tokenize(job.recipe.data, tokenizer, folder, job.recipe.seed, progress=progress)
        except OSError as error:
            raise InputError(f"{job.output} cannot be written: {error}") from error
        say("data: " + ", ".join(f"{part} {count:,} tokens" for part, count in tokens.items()))

    on_main(write)


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
    total, measure = (_task_without if settings.metric == "task" else _text_without)(job, chunks, arch.vocab_size)
    greedy, gone, rounds = settings.method == "greedy", frozenset(), []
    with Tracker("depth", count, "rounds") if greedy else Tracker("depth", total, "batches") as tracker:
        for _ in range(count if greedy else 1):
            candidates = depth_candidates(settings, arch.num_layers, count, gone)
            found = measure(candidates, gone, (lambda: None) if greedy else lambda: tracker.advance(1))
            if greedy:
                best = found.ranked()[0]
                rounds.append(found.model_copy(update={"trials": [found.trials[best]], "accuracies": found.accuracies[best : best + 1]}))
                gone = frozenset(found.trials[best][0])
                accuracy = "".join(f", accuracy {share:.1%}" for share in rounds[-1].accuracies)
                tracker.advance(1, f"without {', '.join(map(str, sorted(gone)))}: loss {found.trials[best][1]:.4f}{accuracy}")
            else:
                rounds = [found]
    together = {"trials": [trial for r in rounds for trial in r.trials], "accuracies": [share for r in rounds for share in r.accuracies]}
    result = rounds[0].model_copy(update=together)
    on_main(lambda: result.save(job.output, job.manifest))


Measure = Callable[[list[frozenset[int]], frozenset[int], Callable[[], None]], Trials]
"""(candidates, layers that are gone already, progress) -> one trial for each candidate."""


def _text_without(job: Job, chunks: list[Any], vocab_size: int) -> tuple[int, Measure]:
    """How many groups of microbatches of calibration text, and the losses on them."""
    settings = job.recipe.depth
    _, first = job.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=False)
    groups = list(first)

    def measure(candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]) -> Trials:
        base, losses = losses_without(chunks, groups, job.world, candidates, gone=gone, vocab_size=vocab_size, progress=progress)
        return Trials(base=base, trials=[(sorted(dropped), loss) for dropped, loss in zip(candidates, losses)])

    return len(groups), measure


def _task_without(job: Job, chunks: list[Any], vocab_size: int) -> tuple[int, Measure]:
    """How many groups of microbatches of the task's options, and accuracies and losses on them."""
    settings, tokenizer = job.recipe.depth, job.tokenizer()
    assert settings.task is not None
    items = read_items(Path(settings.task), settings.task_items)
    rows, size = rows_of(items, tokenizer, job.recipe.data.sequence_length), settings.micro_batch_size
    place = {"micro_batch_size": size, "vocab_size": vocab_size, "eod": tokenizer.eod}

    def measure(candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]) -> Trials:
        whole, scores = scores_without(chunks, rows, job.world, candidates, gone=gone, **place, progress=progress)
        shares, losses = zip(*[(result_of(items, own).accuracy, -right_log_p(items, own)) for own in (whole, *scores)])
        trials = [(sorted(dropped), loss) for dropped, loss in zip(candidates, losses[1:])]
        return Trials(base=losses[0], trials=trials, base_accuracy=shares[0], accuracies=list(shares[1:]))

    return num_groups(len(rows), job.world, size), measure


def prune(job: Job) -> None:
    """Slice the teacher by the plan and write the student."""
    plan = PrunePlan.load(job.paths["plan"])
    chunks = job.build(job.recipe.base)
    if plan.teacher != job.arch(job.recipe.base):
        raise InputError(f"{job.paths['plan']} was made for another architecture than {job.paths[job.recipe.base]}; run `minitron-mp plan` again")
    refuse("this layout does not fit the student:", layout_problems(plan.student, job.recipe.parallel.tp))
    state = slicing.prune(chunks, plan, job.world)
    checkpoint.save(state, job.output, job.manifest.model_copy(update={"arch": plan.student}), _assets_from(job.paths["import"]))


def correct(job: Job) -> None:
    """Train the teacher on the distillation text by cross-entropy (2408.11796, teacher correction)."""
    assert job.recipe.correct is not None
    _fit(job, "import", job.recipe.correct, lambda first, log: None)


def distill(job: Job) -> None:
    """Train the student on the teacher's distribution."""
    if job.world.role == "teacher":
        signals.teach(job)
    else:
        _fit(job, "prune", job.recipe.distill, lambda first, log: _learning_teacher(job, log) if job.recipe.corrects_meanwhile else signals.source(job, first))


def _learning_teacher(job: Job, log: Callable[[StepMetrics], None]) -> LearningTeacher:
    recipe, tutor = job.recipe, job.recipe.tutor
    assert recipe.correct is not None
    arch, place = job.arch(tutor), {"precision": recipe.teacher_precision, "sequence_length": recipe.data.sequence_length}
    chunks = build_model(arch, job.world, training=recipe.correct, **place)
    checkpoint.load_model(chunks, job.paths[tutor], job.world)
    state = {"checkpoints": None, "manifest": job.manifest}
    return LearningTeacher(Run(chunks, None, recipe.correct, job.world, vocab_size=arch.vocab_size, on_step=log, **state))


def _fit(job: Job, start: str, settings: Training, teacher_from: Callable[[int, Callable], Any]) -> None:
    """Train the model that the stage `start` left; its metrics and TensorBoard come beside the artefact.

    teacher_from: (first step, what is called with the teacher's metrics, where it learns) -> the teacher, or None.
    """
    recipe, world, name = job.recipe, job.world, job.manifest.stage
    arch, place = job.arch(start), {"dp_rank": job.world.groups.dp.rank(), "dp_size": job.world.groups.dp.size()}
    train_set = signals.train_set(job, settings)
    sizes = {"global_batch_size": settings.global_batch_size, "micro_batch_size": settings.micro_batch_size}
    data.micro_batches(train_set, 0, **sizes, **place)  # refuse sizes that do not divide before any model is built

    def batches_of(step: int) -> Sequence[Batch]:
        return data.micro_batches(train_set, step, **sizes, **place)

    model = build_model(arch, world, training=settings, precision=recipe.precision, sequence_length=recipe.data.sequence_length)
    checkpoint.load_model(model, job.paths[start], world)
    checkpoints = recipe.root / CHECKPOINTS / name
    first = resume_step(checkpoints, job.manifest, world)
    if first:
        say(f"{name}: going on from step {first}")
    curves = {which: recipe.root / METRICS[which] for which in (name, *["correct"] * (name == "distill" and recipe.corrects_meanwhile))}
    with Tracker(name, settings.steps, "steps", first) as tracker, ExitStack() as stack:
        logs = {which: stack.enter_context(_Log(path, which, first, world)) for which, path in curves.items()}

        def on_step(metrics: StepMetrics) -> None:
            logs[name](metrics)
            tracker.advance(1, f"loss {metrics.loss:.4f}  {metrics.tokens_per_s:,.0f} tokens/s  lr {metrics.lr:.2e}  grad norm {metrics.grad_norm:.2f}")

        teacher = teacher_from(first, logs.get("correct", on_step))
        companion = teacher if isinstance(teacher, LearningTeacher) else None
        options = {"vocab_size": arch.vocab_size, "seed": recipe.seed, "checkpoints": checkpoints, "manifest": job.manifest, "companion": companion}
        train(model, teacher, batches_of, settings, world, **options, on_step=on_step)
        if teacher is not None:
            teacher.close()
    state = checkpoint.model_state(model, world)
    if companion is not None:
        state["teacher"] = checkpoint.prefixed(checkpoint.model_state(list(map(unwrap, companion.chunks)), world), PREFIX)

    def add_files(folder: Path) -> None:
        _assets_from(job.paths["import"])(folder)
        for path in curves.values():
            shutil.copy(path, folder / path.name)

    checkpoint.save(state, job.output, job.manifest.model_copy(update={"arch": arch}), add_files)
    on_main(lambda: artifact.discard_checkpoints(checkpoints, job.manifest))


def evaluate(job: Job) -> None:
    """Held-out loss, perplexity and KL of teacher, the teacher before correction, pruned and distilled student, in one pass over the text.

    Then their scores in tasks, and their speed, which changes from run to run and so is no part of what the manifest says.
    """
    settings, start = job.recipe.evaluate, time.monotonic()
    teacher = job.teacher(corrected=True)
    left_by = {"uncorrected": "import"} if job.recipe.correct else {}
    if job.recipe.tutor != job.recipe.base:
        left_by["unpruned"] = job.recipe.base
    left_by |= {"pruned": "prune", "distilled": "distill"}
    models = {name: job.build(stage) for name, stage in left_by.items()}
    count, groups = job.groups("valid", settings.num_samples, settings.micro_batch_size, exact=False)
    vocab_size, every = job.arch("import").vocab_size, {"teacher": teacher.chunks, **models}
    with Tracker("evaluate", count, "batches") as tracker:
        quality = compare(models, teacher, groups, job.world, vocab_size=vocab_size, progress=lambda: tracker.advance(1))
    tasks, texts = _judge_tasks(job, every), _judge_texts(job, teacher, models)
    shape = {"sequence_length": job.recipe.data.sequence_length, "micro_batch_size": settings.micro_batch_size, "vocab_size": vocab_size}
    kinds = {name: (job.arch(stage), job.recipe.precision) for name, stage in left_by.items()}
    kinds = {"teacher": (job.arch(job.recipe.tutor), job.recipe.teacher_precision), **kinds}
    speed = measure(every, kinds, job.world, **shape, budget_s=max(SPEED_S, SPEED_SHARE * (time.monotonic() - start)))
    content = {"manifest": job.manifest.model_dump(mode="json"), **{name: q.model_dump() for name, q in quality.items()}, "tasks": tasks}
    content |= {"texts": texts, "speed": speed.model_dump()}
    on_main(lambda: artifact.write_text(job.output, json.dumps(content, indent=1)))


def _judge_texts(job: Job, teacher: ColocatedTeacher, models: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Name of a further held-out text -> model -> its quality there."""
    settings, found = job.recipe.evaluate, {}
    for name in job.recipe.data.held_out:
        count, groups = job.groups(text.held_out(name), settings.num_samples, settings.micro_batch_size, exact=False)
        with Tracker(f"evaluate, {name}", count, "batches") as tracker:
            progress = partial(tracker.advance, 1)
            quality = compare(models, teacher, groups, job.world, vocab_size=job.arch("import").vocab_size, progress=progress)
        found[name] = {model: q.model_dump() for model, q in quality.items()}
    return found


def _judge_tasks(job: Job, models: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Task -> model -> its result."""
    settings, found = job.recipe.evaluate, {}
    for task, path in settings.tasks.items():
        items, size = read_items(Path(path), settings.task_items), settings.micro_batch_size
        calls = num_groups(sum(len(item.options) for item in items), job.world, size) * len(models)
        place = {"sequence_length": job.recipe.data.sequence_length, "micro_batch_size": size, "vocab_size": job.arch(job.recipe.base).vocab_size}
        with Tracker(task, calls, "batches") as tracker:
            results = judge(models, items, job.tokenizer(), job.world, **place, progress=lambda tracker=tracker: tracker.advance(1))
        found[task] = {name: result.model_dump() for name, result in results.items()}
    return found


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
                card = model_card(job.recipe, job.paths, job.manifest, as_written.family, job.paths["import"] / ASSETS)
                (folder / CARD).write_text(card, encoding="utf-8")
    except InputError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = InputError(f"{job.output} cannot be written: {error}")
    for _ in tensors:  # reading is collective: the other ranks, and rank 0 after a failure, walk it to the end
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


class _Log:
    """metrics.jsonl and TensorBoard scalars, on rank 0; takes back what was logged after the step that a run resumes from."""

    def __init__(self, path: Path, name: str, first: int, world: World):
        self.path, self.name, self.first, self.enabled = path, name, first, world.is_main

    def __enter__(self) -> Callable[[StepMetrics], None]:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() and self.first else []
            artifact.write_text(self.path, "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.first))
            self.file = self.path.open("a", buffering=1)
            self.board = SummaryWriter(str(self.path.with_name("tensorboard") / self.name), purge_step=self.first + 1)
        return self._write

    def _write(self, metrics: StepMetrics) -> None:
        self.file.write(metrics_line(metrics) + "\n")
        for name, value in metrics.given().items():
            if name != "step":
                self.board.add_scalar(f"{self.name}/{name}", value, metrics.step)
        self.board.flush()  # or a kill takes up to two minutes of points, and a resumed run does not repeat those before its checkpoint

    def __exit__(self, *_: Any) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()


def _assets_from(checkpoint_folder: Path) -> Callable[[Path], None]:
    """Copies the Hugging Face side files of a checkpoint artefact into the next one."""
    return lambda folder: shutil.copytree(checkpoint_folder / ASSETS, folder / ASSETS)


RUN: dict[str, Callable[[Job], None]] = {
    "import": import_model,
    "import-teacher": import_model,
    "data": tokenize,
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
