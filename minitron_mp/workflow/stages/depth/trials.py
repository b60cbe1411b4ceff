"""Trials of the stage depth: the teacher without some of its layers, on text or on a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from minitron_mp.console import Tracker
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.evaluation.choice_tasks import result_of, right_log_p, rows_of
from minitron_mp.evaluation.log_likelihood import num_groups
from minitron_mp.evaluation.task_files import read_task_file
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.ablation import losses_without, scores_without
from minitron_mp.pruning.depth import DepthTrials, Trial, depth_candidates
from minitron_mp.pruning.search_space import layers_to_drop
from minitron_mp.workflow.context import StageContext


def measure_depth(context: StageContext) -> None:
    """Measure the teacher without single layers or blocks of layers and write depth.json.

    The metric is the loss on calibration text, or the accuracy on a task. Called on all ranks.
    """
    settings = context.recipe.depth
    model = context.build(context.recipe.pruning_base).eval()
    count = layers_to_drop(context.recipe, model.arch)
    make_measure = _task_measure if settings.metric == "task" else _text_measure
    num_groups_in_pass, measure = make_measure(context, model)
    if settings.method == "greedy":
        result = _greedy_rounds(context, model, count, measure)
    else:
        candidates = depth_candidates(settings, model.arch.num_layers, count)
        with Tracker("depth", num_groups_in_pass, "batches") as tracker:
            result = measure(candidates, frozenset(), lambda: tracker.advance(1))
    on_rank_0(lambda: result.save(context.output, context.manifest))


Measure = Callable[[list[frozenset[int]], frozenset[int], Callable[[], None]], DepthTrials]
"""(candidates, layers that are already dropped, progress) -> one trial for each candidate."""


def _greedy_rounds(context: StageContext, model: ShardedModel, count: int, measure: Measure) -> DepthTrials:
    """Drop one layer per round. Each round keeps the best candidate with one more dropped layer."""
    gone: frozenset[int] = frozenset()
    rounds: list[Trial] = []
    with Tracker("depth", count, "rounds") as tracker:
        for number in range(count):
            candidates = depth_candidates(context.recipe.depth, model.arch.num_layers, count, gone)
            trials = _from_rank_0(measure(candidates, gone, lambda: None))
            if number == 0:
                base = trials.base
            best, *remaining = trials.ranked()
            rounds.append(best.model_copy(update={"next_best": remaining[0] if remaining else None}))
            gone = frozenset(best.dropped)
            accuracy = "" if best.accuracy is None else f", accuracy {best.accuracy:.1%}"
            without = ", ".join(map(str, best.dropped))
            tracker.advance(1, f"without {without}: loss {best.loss:.4f}{accuracy}")
    return DepthTrials(base=base, trials=rounds)


def _from_rank_0(trials: DepthTrials) -> DepthTrials:
    """Return rank 0's trials on every rank, so that a greedy search continues with equal values."""
    return on_rank_0(lambda: trials)


def _text_measure(context: StageContext, model: ShardedModel) -> tuple[int, Measure]:
    """Return the number of groups of calibration text, and the function that measures losses."""
    settings = context.recipe.depth
    _, first = context.groups("calibration", settings.num_samples, settings.micro_batch_size, exact=False)
    groups = list(first)

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> DepthTrials:
        base, losses = losses_without(model, groups, candidates, gone=gone, progress=progress)
        trials = [Trial(dropped=sorted(dropped), loss=loss) for dropped, loss in zip(candidates, losses)]
        return DepthTrials(base=Trial(dropped=[], loss=base), trials=trials)

    return len(groups), measure


def _task_measure(context: StageContext, model: ShardedModel) -> tuple[int, Measure]:
    """Return the number of groups of task options, and the function that measures accuracies."""
    settings, tokenizer = context.recipe.depth, context.tokenizer()
    assert settings.task is not None
    items = read_task_file(Path(settings.task), settings.task_items)
    rows = rows_of(items, tokenizer, model.sequence_length)

    def trial(dropped: Iterable[int], scores: Tensor) -> Trial:
        accuracy = result_of(items, scores).accuracy
        return Trial(dropped=sorted(dropped), loss=-right_log_p(items, scores), accuracy=accuracy)

    def measure(
        candidates: list[frozenset[int]], gone: frozenset[int], progress: Callable[[], None]
    ) -> DepthTrials:
        base, scores = scores_without(
            model,
            rows,
            candidates,
            gone=gone,
            micro_batch_size=settings.micro_batch_size,
            eod=tokenizer.eod,
            progress=progress,
        )
        trials = [trial(dropped, rows_scores) for dropped, rows_scores in zip(candidates, scores)]
        return DepthTrials(base=trial([], base), trials=trials)

    return num_groups(len(rows), context.world, settings.micro_batch_size), measure
