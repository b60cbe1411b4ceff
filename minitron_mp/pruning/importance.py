"""Activation importance of a sharded model, by forward hooks and a few small reductions.

Each hook accumulates one vector. Formulas: 2407.14679 section 2.2. A probed tensor a [s, b, d] is
aggregated over the sequence to m [b, d], then over samples to a score [d]. aggregation.py has the
formulas of both.

The table of axes has the probes. The score of a unit with several channels (a head) is the l2 norm
of the scores of its channels. The score of a unit of an axis that all layers share (hidden) is the
sum over the probes in all layers. The score of a layer is 1 - cosine(input, output), the mean over
tokens.

The parallel layout determines when sums are reduced. The formulas take squares and roots of the
sums over a sequence, so partial sums over a split sequence (context parallel; sequence parallel for
the norms) are added before that, with one collective per group for all hooks of a microbatch. Sums
over samples are added over data parallel ranks once, at the end. Scores of channels that are split
over tensor parallel ranks are combined once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.errors import InputError
from minitron_mp.models.axes import AXES, NO_LAYER, SUBLAYERS, Axis, LinearInput, NormOutput
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.pruning.aggregation import BATCH_AGGREGATIONS, SEQUENCE_AGGREGATIONS
from minitron_mp.pruning.scores import Scores

IN_ORDER = sorted(AXES.values(), key=lambda axis: not axis.per_layer)
"""The order of the axes in every reduction: first the axes that each layer has separately."""


@dataclass
class Site:
    """The running sums of one probed tensor of a layer (global number, from 0)."""

    axis: Axis
    probe: LinearInput | NormOutput
    layer: int
    partial: Tensor | None = None
    """[statistics, b, d] float32: sums over this rank's part of the sequence of a microbatch."""
    totals: Tensor | None = None
    """[2, d] float64: sums of m and of m squared over samples (aggregation.py)."""

    def read_partial(self) -> Tensor:
        assert self.partial is not None, "no microbatch is in flight"
        return self.partial

    def read_totals(self) -> Tensor:
        assert self.totals is not None, "no microbatch has run"
        return self.totals


@dataclass
class Recorder:
    """Accumulates scores while microbatches run through the hooked chunks. recording() creates it."""

    model: ShardedModel
    config: ScoreConfig
    sites: list[Site] = field(default_factory=list)
    cosine: dict[int, Tensor] = field(default_factory=dict)
    """layer -> [2] float64: sum over tokens of 1 - cosine, number of tokens."""
    num_samples: int = 0

    def importance(self) -> Scores:
        """Return the scores in global numbering, equal on every rank. All ranks must call this.

        InputError names the first layer whose activations were not finite.
        """
        samples = torch.tensor(float(self.num_samples), dtype=torch.float64, device=self.model.world.device)
        dist.all_reduce(samples, group=self.model.world.groups.dp)
        self._add_over_data_parallel_ranks()
        units = self._units(samples)
        layers = self._layers()
        self._refuse_non_finite(units, layers)
        return Scores(
            {axis: {layer: _to_numpy(row) for layer, row in units[axis].items()} for axis in AXES},
            _to_numpy(layers),
        )

    def _add_over_data_parallel_ranks(self) -> None:
        if not self.sites:
            return
        stacked = torch.cat([site.read_totals().view(-1) for site in self.sites])
        dist.all_reduce(stacked, group=self.model.world.groups.dp)
        sizes = [site.read_totals().numel() for site in self.sites]
        for site, totals in zip(self.sites, stacked.split(sizes)):
            site.totals = totals.view(2, -1)

    def _units(self, samples: Tensor) -> dict[str, dict[int, Tensor]]:
        """Return axis -> layer -> scores [units] float64. samples: number of samples over all ranks."""
        arch, groups = self.model.arch, self.model.world.groups
        scores_of_axis = {
            axis.name: {layer: self._zeros(axis.num_units(arch, layer)) for layer in axis.layers(arch)}
            for axis in IN_ORDER
        }
        over_samples = BATCH_AGGREGATIONS[self.config.batch_aggregation]
        for site in self.sites:
            axis = site.axis
            total, squares = site.read_totals()
            scores = over_samples(total, squares, samples)  # [d]
            if axis.width(arch) > 1:
                scores = scores.view(-1, axis.width(arch)).norm(dim=1)
            row = scores_of_axis[axis.name][site.layer if axis.per_layer else NO_LAYER]
            if axis.split_over_tp:
                _part(row, groups.tp).add_(scores)
            else:
                row.add_(scores / groups.tp.size())  # equal on all tp ranks, summed below
        rows = [row for by_layer in scores_of_axis.values() for row in by_layer.values()]
        flat = torch.cat(rows)
        dist.all_reduce(flat, group=groups.tp)
        dist.all_reduce(flat, group=groups.pp)
        for row, reduced in zip(rows, flat.split([row.numel() for row in rows])):
            row.copy_(reduced)
        return scores_of_axis

    def _layers(self) -> Tensor:
        """Return [L] float64: 1 - cosine of each layer, the mean over tokens."""
        groups = self.model.world.groups
        layers = self._zeros(2, self.model.arch.num_layers)
        for layer, pair in self.cosine.items():
            layers[:, layer] = pair
        if not self.model.world.parallel.sequence_parallel:
            # Equal on all tp ranks. Under sequence parallelism each rank has different tokens.
            layers /= groups.tp.size()
        for group in (groups.dp_cp, groups.tp, groups.pp):
            dist.all_reduce(layers, group=group)
        return layers[0] / layers[1]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.model.world.device)

    def _refuse_non_finite(self, units: dict[str, dict[int, Tensor]], layers: Tensor) -> None:
        for layer in range(self.model.arch.num_layers):
            damaged = [
                axis.sublayer
                for axis in AXES.values()
                if axis.per_layer and not units[axis.name][layer].isfinite().all()
            ]
            if damaged or not layers[layer].isfinite():
                first = next((name for name in SUBLAYERS if name in damaged), SUBLAYERS[-1])
                raise InputError(
                    f"activations of layer {layer} ({first}) are NaN or infinite on the calibration text; "
                    "the model is damaged, or overflows in this precision: "
                    "check the source weights, or set precision: fp32"
                )

    def start_site(self, axis: Axis, probe: LinearInput | NormOutput, layer: int) -> Callable[[Tensor], None]:
        """Register a site and return the function that its hook calls with the tensor [s, b, d]."""
        site = Site(axis, probe, layer)
        self.sites.append(site)

        aggregation = SEQUENCE_AGGREGATIONS[self.config.sequence_aggregation]

        def record(a: Tensor) -> None:
            site.partial = aggregation.partial(a.detach())

        return record

    def record_cosine(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Add a layer's cosine distances. Ranks that split the sequence count each token once.

        before, after [s, b, h]: the sequence part of this rank.
        """
        distance = _cosine_distance(before.detach().flatten(0, 1), after.detach().flatten(0, 1))
        count = distance.new_tensor(distance.numel(), dtype=torch.float64)
        pair = torch.stack([distance.sum(dtype=torch.float64), count])
        self.cosine[layer] = self.cosine[layer] + pair if layer in self.cosine else pair

    def end_microbatch(self, sites: list[Site], *, counts_samples: bool) -> None:
        """Aggregate the sites of one chunk over the full sequence and add them to the totals."""
        world = self.model.world
        aggregation = SEQUENCE_AGGREGATIONS[self.config.sequence_aggregation]
        if world.parallel.sequence_parallel:
            norms = [site for site in sites if isinstance(site.probe, NormOutput)]
            _reduce_over(norms, world.groups.tp, aggregation.reduce_op)
        _reduce_over(sites, world.groups.cp, aggregation.reduce_op)
        if counts_samples and sites:
            self.num_samples += sites[0].read_partial().shape[1]
        for site in sites:
            sums = site.read_partial()
            m = aggregation.finish(sums, self.model.sequence_length).double()  # [b, d]
            totals = torch.stack([m.sum(0), m.square().sum(0)])
            site.totals = totals if site.totals is None else site.totals + totals
            site.partial = None


@contextmanager
def recording(model: ShardedModel, config: ScoreConfig) -> Iterator[Recorder]:
    """Register hooks on the model, yield the recorder, and remove every hook on exit.

    Run full microbatches of [b, model.sequence_length] inside the context.
    """
    recorder, handles = Recorder(model, config), []
    try:
        for number, chunk in enumerate(map(unwrap, model.chunks)):
            first = len(recorder.sites)
            for block in chunk.decoder.layers:
                handles += _hook_block(block, recorder)
            chunk_sites = recorder.sites[first:]

            def end(*_: Any, sites: list[Site] = chunk_sites, is_first: bool = number == 0) -> None:
                recorder.end_microbatch(sites, counts_samples=is_first)

            handles.append(chunk.register_forward_hook(end))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def score(
    model: ShardedModel, batches: Iterable[Sequence[Batch]], config: ScoreConfig | None = None
) -> Scores:
    """Return a model's importance scores from forward passes over calibration text.

    batches: for each pass of the pipeline, this data parallel rank's microbatches. Every rank needs
    the same number of them. config: default aggregations if None. The scores are equal on every
    rank, and equal to rounding for every parallel layout. All ranks must call this. The model is
    not changed.
    """
    with recording(model, config or ScoreConfig()) as recorder, torch.no_grad():
        for microbatches in batches:
            run_schedule(model.chunks, microbatches, model.world, None)
    return recorder.importance()  # every rank has the same values, so all ranks raise or none


def _to_numpy(scores: Tensor) -> np.ndarray:
    return scores.float().cpu().numpy()


def _hook_block(block: Any, recorder: Recorder) -> list[Any]:
    """Register the hooks of one TransformerLayer: at all probes, and around it for the cosine."""
    layer = block.layer_number - 1
    handles = []
    for axis in IN_ORDER:
        for probe in axis.probes:
            record = recorder.start_site(axis, probe, layer)
            if isinstance(probe, LinearInput):
                handles.append(_hook_input(block.get_submodule(probe.module), record))
            else:
                norm, linear = (block.get_submodule(path) for path in (probe.norm, probe.linear))
                handles.append(_hook_norm(norm, linear, record))
    layer_inputs: list[Tensor] = []

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        layer_inputs[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def leave(_: Any, args: Any, output: Any) -> None:
        recorder.record_cosine(layer, layer_inputs.pop(), output[0] if isinstance(output, tuple) else output)

    return [
        *handles,
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ]


def _hook_input(linear: Any, record: Callable[[Tensor], None]) -> Any:
    return linear.register_forward_pre_hook(lambda _, args: record(args[0]))


def _hook_norm(norm: Any, linear: Any, record: Callable[[Tensor], None]) -> Any:
    if not isinstance(norm, IdentityOp):
        return norm.register_forward_hook(lambda _, args, output: record(output))
    # Transformer Engine's LayerNormLinear does not return the output of its norm (and rounds it in
    # FP8), so the norm is recomputed.
    return linear.register_forward_pre_hook(
        lambda module, args: record(_norm_inside(module, args[0].detach()))
    )


def _norm_inside(linear: Any, x: Tensor) -> Tensor:
    """Return the output [s, b, h] of the norm inside a Transformer Engine LayerNormLinear."""
    weight = linear.layer_norm_weight + 1 if linear.zero_centered_gamma else linear.layer_norm_weight
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine of each pair of rows: a, b [n, h] -> [n] float32, computed in float32.

    The float32 precision is needed because in bf16 the result would be rounding noise for a layer
    whose output is close to its input.
    """
    if not a.is_cuda:
        return 1 - torch.cosine_similarity(a.float(), b.float(), dim=-1)
    from minitron_mp.pruning.cosine_kernel import cosine_distance

    return cosine_distance(a, b)


def _reduce_over(sites: list[Site], group: Any, reduce_op: dist.ReduceOp.RedOpType) -> None:
    """Combine the partial sums of all sites over a group that splits the sequence, in one collective."""
    if group.size() == 1 or not sites:
        return
    sums = [site.read_partial() for site in sites]
    flat = torch.cat([each.reshape(-1) for each in sums])
    dist.all_reduce(flat, op=reduce_op, group=group)
    for site, each, part in zip(sites, sums, flat.split([each.numel() for each in sums])):
        site.partial = part.view(each.shape)


def _part(row: Tensor, tp: Any) -> Tensor:
    """Return this tensor parallel rank's slice of a global vector."""
    return row.chunk(tp.size())[tp.rank()]
