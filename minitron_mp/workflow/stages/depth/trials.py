"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minitron_mp.console import Tracker
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.evaluation.choice_tasks import result_of, right_log_p, rows_of
from minitron_mp.evaluation.log_likelihood import num_groups
from minitron_mp.evaluation.task_files import read_task_file
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.ablation import losses_without, scores_without
from minitron_mp.pruning.candidates import layers_to_drop
from minitron_mp.pruning.depth import DepthTrials, depth_candidates
from minitron_mp.workflow.context import StageContext


def measure_depth(job: StageContext) -> None:
    """What the teacher loses without single layers or blocks of them, on calibration text or on a task."""
    recipe, settings, arch = job.recipe, job.recipe.depth, job.arch(job.recipe.pruning_base)
    count = layers_to_drop(recipe, arch)
    model = job.build(job.recipe.pruning_base).eval()
    total, measure = (_task_without if settings.metric == "task" else _text_without)(job, model)
    greedy, gone, rounds = settings.method == "greedy", frozenset(), []
    with Tracker("depth", count, "rounds") if greedy else Tracker("depth", total, "batches") as tracker:
        for _ in range(count if greedy else 1):
            candidates = depth_candidates(settings, arch.num_layers, count, gone)
            mine = measure(candidates, gone, (lambda: None) if greedy else lambda: tracker.advance(1))
            found = on_rank_0(
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
    on_rank_0(lambda: result.save(job.output, job.manifest))


Measure = Callable[[list[frozenset[int]], frozenset[int], Callable[[], None]], DepthTrials]
"""(candidates, layers that are gone already, progress) -> one trial for each candidate."""


def _text_without(job: StageContext, model: ShardedModel) -> tuple[int, Measure]:
    """How many groups of microbatches of calibration text, and the losses on them."""
    settings = job.recipe.depth
    _, first = job.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=False)
    groups = list(first)

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> DepthTrials:
        base, losses = losses_without(
            model.chunks,
            groups,
            job.world,
            candidates,
            gone=gone,
            vocab_size=model.arch.vocab_size,
            progress=progress,
        )
        return DepthTrials(
            base=base, trials=[(sorted(dropped), loss) for dropped, loss in zip(candidates, losses)]
        )

    return len(groups), measure


def _task_without(job: StageContext, model: ShardedModel) -> tuple[int, Measure]:
    """How many groups of microbatches of the task's options, and accuracies and losses on them."""
    settings, tokenizer = job.recipe.depth, job.tokenizer()
    assert settings.task is not None
    items = read_task_file(Path(settings.task), settings.task_items)
    rows, size = rows_of(items, tokenizer, job.recipe.data.sequence_length), settings.micro_batch_size
    place = {"micro_batch_size": size, "vocab_size": model.arch.vocab_size, "eod": tokenizer.eod}

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> DepthTrials:
        whole, scores = scores_without(
            model.chunks, rows, job.world, candidates, gone=gone, **place, progress=progress
        )
        shares, losses = zip(
            *[(result_of(items, own).accuracy, -right_log_p(items, own)) for own in (whole, *scores)]
        )
        trials = [(sorted(dropped), loss) for dropped, loss in zip(candidates, losses[1:])]
        return DepthTrials(
            base=losses[0], trials=trials, base_accuracy=shares[0], accuracies=list(shares[1:])
        )

    return num_groups(len(rows), job.world, size), measure
