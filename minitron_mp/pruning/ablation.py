"""Loss of a model without some of its layers, for many candidates in one pass.

One pass over the layers of a microbatch evaluates all candidates. At its first missing layer a
candidate starts from the hidden states of the base run, and continues over the layers that it
keeps. So for blocks of n layers at every start the work is L + (L - n)(L - n + 1)/2 layer forwards
per microbatch. Separate passes would need (L - n + 1)(L - n).

A model chunk receives one tensor with the hidden states of the base run and of the candidates that
start before the chunk. It runs its layers and sends the results to the next chunk. Ranks process
the microbatches in sequence, so pipeline stages work at the same time.

    s' as in run_schedule()   b microbatch   h hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mp.distillation.last_stage_loss import evaluation_objective, last_stage_loss
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import local_batch, run_schedule
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.evaluation.log_likelihood import Row, row_batches, span_sums, summed
from minitron_mp.models.sharded_model import ShardedModel, output_weight, unwrap

Layers = frozenset[int]
"""Dropped layers, numbered from 0."""

BASE = -1
"""Key of the base run."""

Judge = Callable[[int, Any, Tensor, Batch], None]
"""Function called on the last stage with the key of a run, the chunk, the hidden states after the
final norm [s', b, h], and the local batch."""


def losses_without(
    model: ShardedModel,
    groups: Iterable[Sequence[Batch]],
    candidates: Sequence[Layers],
    *,
    gone: Layers = frozenset(),
    progress: Callable[[], None] = lambda: None,
) -> tuple[float, list[float]]:
    """Return the mean cross-entropy without the layers `gone`, and without each candidate.

    In nats per token, equal on every rank. Each candidate contains `gone` and at least one more
    layer. groups: as for compare(). progress: called after each group. All ranks must call this.
    """
    world = model.world
    sums = torch.zeros((1 + len(candidates), 2), dtype=torch.float64, device=world.device)

    def judge(key: int, chunk: Any, hidden: Tensor, batch: Batch) -> None:
        objective = evaluation_objective(hidden, kl_weight=0.0)
        loss = last_stage_loss(
            hidden,
            output_weight(chunk),
            batch,
            None,
            objective,
            vocab_size=model.arch.vocab_size,
            group=world.groups.tp,
        )
        sums[key + 1] += torch.stack([loss.cross_entropy.sum(), loss.num_tokens]).double()

    _walk(model, groups, [gone, *candidates], judge, progress)
    summed(sums, world)
    if not sums[:, 1].all():
        raise InputError(
            "the calibration samples have no token that counts in the loss; raise depth.num_samples, or give "
            "other text"
        )
    base, *losses = (sums[:, 0] / sums[:, 1]).tolist()
    return base, losses


def scores_without(
    model: ShardedModel,
    rows: Sequence[Row],
    candidates: Sequence[Layers],
    *,
    gone: Layers = frozenset(),
    micro_batch_size: int,
    eod: int,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the tensors [rows, 2] of score_rows() without `gone`, and without each candidate.

    Equal on every rank. candidates, gone, progress: as for losses_without(). All ranks must call
    this.
    """
    world = model.world
    scores = torch.zeros((1 + len(candidates), len(rows), 2), dtype=torch.float64, device=world.device)

    def judge(key: int, chunk: Any, hidden: Tensor, batch: Batch) -> None:
        sums = span_sums(chunk, hidden, batch, world, model.arch.vocab_size)
        scores[key + 1].index_add_(0, batch["rows"], sums)

    groups = row_batches(rows, world, micro_batch_size, eod)
    _walk(model, groups, [gone, *candidates], judge, progress)
    base, *candidate_scores = summed(scores, world).cpu()
    return base, candidate_scores


def _walk(
    model: ShardedModel,
    groups: Iterable[Sequence[Batch]],
    missing: Sequence[Layers],
    judge: Judge,
    progress: Callable[[], None],
) -> None:
    """Call judge() for every microbatch and each set of missing layers; the base run has the first."""
    walk = _Walk(model, missing, judge)
    with torch.no_grad():
        for batches in groups:
            walk.prepare(batches[: model.world.parallel.interleaved])
            for batch in batches:
                walk(local_batch(batch, model.world))
            progress()


class _Walk:
    """Runs the base model and all candidates, one microbatch after the other."""

    def __init__(self, model: ShardedModel, missing: Sequence[Layers], judge: Judge):
        self.chunks = [unwrap(chunk) for chunk in model.chunks]
        self.world, self.judge = model.world, judge
        self.missing = {key - 1: layers for key, layers in enumerate(missing)}
        self.branch = {
            key: min(layers - self.missing[BASE]) for key, layers in self.missing.items() if key != BASE
        }
        """First layer at which a candidate differs from the base run."""
        self.length = 0

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Prepare for batches of this sequence length. A new length needs one forward pass.

        All ranks must call this.
        """
        length = batches[0]["tokens"].shape[1]
        if length != self.length:
            self.length = length
            self.arguments = _arguments_of_layers(self.chunks, self.world, batches)

    def __call__(self, batch: Batch) -> None:
        for number, chunk in enumerate(self.chunks):
            layers = {block.layer_number - 1: block for block in chunk.decoder.layers}
            first = min(layers)
            runs = (
                {BASE: chunk.embedding(batch["tokens"], batch["position_ids"])}
                if chunk.pre_process
                else self._receive(first, batch)
            )
            for layer, block in layers.items():
                runs |= {key: runs[BASE] for key, branch in self.branch.items() if branch == layer}
                for key in [key for key in runs if layer not in self.missing[key]]:
                    replaced = {"hidden_states": runs[key], "attention_mask": batch.get("documents")}
                    output = block(**self.arguments[number] | replaced)
                    runs[key] = output[0] if isinstance(output, tuple) else output
            if chunk.post_process:
                for key, x in runs.items():
                    self.judge(key, chunk, chunk.decoder.final_layernorm(x), batch)
            else:
                self._send(runs)

    def _send(self, runs: dict[int, Tensor]) -> None:
        pp = self.world.groups.pp
        dist.send(
            torch.stack([runs[key] for key in sorted(runs)]),
            dist.get_global_rank(pp, (pp.rank() + 1) % pp.size()),
            group=pp,
        )

    def _receive(self, first: int, batch: Batch) -> dict[int, Tensor]:
        """Receive key -> [s', b, h] of the base run and the candidates that start before this chunk."""
        pp, p = self.world.groups.pp, self.world.parallel
        config = self.chunks[0].config
        keys = [BASE, *sorted(key for key, branch in self.branch.items() if branch < first)]
        b, tokens = batch["tokens"].shape
        shape = (len(keys), tokens // (p.tp if p.sequence_parallel else 1), b, config.hidden_size)
        received = torch.empty(shape, dtype=config.params_dtype, device=self.world.device)
        dist.recv(received, dist.get_global_rank(pp, (pp.rank() - 1) % pp.size()), group=pp)
        return dict(zip(keys, received))


def _arguments_of_layers(chunks: list[Any], world: World, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Return the arguments that Megatron passes to the layers of each chunk (rotary embeddings).

    They are recorded in one forward pass, and depend only on the sequence length. The hidden states
    and the mask among them are replaced by the caller.
    """
    recorded: list[dict[str, Any]] = [{} for _ in chunks]

    def record(number: int) -> Callable:
        return lambda _, args, kwargs: recorded[number].update(kwargs)

    handles = [
        chunk.decoder.layers[0].register_forward_pre_hook(record(i), with_kwargs=True)
        for i, chunk in enumerate(chunks)
    ]
    try:
        run_schedule(chunks, batches, world, None)
    finally:
        for handle in handles:
            handle.remove()
    return recorded
