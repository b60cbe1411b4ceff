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
from torch import Tensor

from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.errors import InputError
from minitron_mp.models.axes import AXES, NO_LAYER, SUBLAYERS, Axis, LinearInput, NormOutput
from minitron_mp.models.sharded_model import ShardedModel, unwrap
from minitron_mp.pruning.aggregation import (
    BATCH_AGGREGATIONS,
    SEQUENCE_AGGREGATIONS,
    SequenceAggregation,
)
from minitron_mp.pruning.probes import cosine_distance, hook_input, hook_norm
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
    width: int = 0
    """d of the tensor, from the first microbatch on."""

    def read_partial(self) -> Tensor:
        assert self.partial is not None, "no microbatch is in flight"
        return self.partial


@dataclass
class ChunkSums:
    """The sites and layers of one model chunk, and their sums over microbatches.

    Sites of the same width share one tensor, so that a microbatch needs a few kernels for all of
    them and not a few for each. Numbers of tokens are counted on the host. A copy of a host number
    to the device would make the host wait for all earlier kernels.
    """

    sites: list[Site] = field(default_factory=list)
    totals: dict[int, Tensor] = field(default_factory=dict)
    """Width d -> [sites, 2, d] float64: sums of m and of m squared over samples (aggregation.py)."""
    distances: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> float32 [s b]: 1 - cosine of each token of the current microbatch."""
    layers: list[int] = field(default_factory=list)
    cosine: Tensor | None = None
    """[layers] float64: sums over tokens of 1 - cosine."""
    num_tokens: int = 0
    """Number of tokens that each sum of `cosine` has on this rank."""

    def sites_of_width(self, width: int) -> list[Site]:
        return [site for site in self.sites if site.width == width]


@dataclass
class Recorder:
    """Accumulates scores while microbatches run through the hooked chunks. recording() creates it."""

    model: ShardedModel
    config: ScoreConfig
    chunks: list[ChunkSums] = field(default_factory=list)
    num_samples: int = 0

    def importance(self) -> Scores:
        """Return the scores in global numbering, equal on every rank. All ranks must call this.

        InputError names the first layer whose activations were not finite.
        """
        samples = torch.tensor(float(self.num_samples), dtype=torch.float64, device=self.model.world.device)
        dist.all_reduce(samples, group=self.model.world.groups.dp)
        units = self._units(self._totals_over_data_parallel_ranks(), samples)
        layers = self._layers()
        self._refuse_non_finite(units, layers)
        return Scores(
            {axis: {layer: _to_numpy(row) for layer, row in units[axis].items()} for axis in AXES},
            _to_numpy(layers),
        )

    def _totals_over_data_parallel_ranks(self) -> list[tuple[Site, Tensor]]:
        """Return the sites of this rank, each with its totals [2, d] over all samples."""
        totals = [
            (chunk.sites_of_width(width), total)
            for chunk in self.chunks
            for width, total in chunk.totals.items()
        ]
        if not totals:
            return []
        flat = torch.cat([total.view(-1) for _, total in totals])
        dist.all_reduce(flat, group=self.model.world.groups.dp)
        parts = flat.split([total.numel() for _, total in totals])
        return [
            (site, row)
            for (sites, total), part in zip(totals, parts)
            for site, row in zip(sites, part.view(total.shape), strict=True)
        ]

    def _units(self, totals: list[tuple[Site, Tensor]], samples: Tensor) -> dict[str, dict[int, Tensor]]:
        """Return axis -> layer -> scores [units] float64. samples: number of samples over all ranks."""
        arch, groups = self.model.arch, self.model.world.groups
        scores_of_axis = {
            axis.name: {layer: self._zeros(axis.num_units(arch, layer)) for layer in axis.layers(arch)}
            for axis in IN_ORDER
        }
        over_samples = BATCH_AGGREGATIONS[self.config.batch_aggregation]
        for site, (total, squares) in totals:
            axis = site.axis
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
        for chunk in self.chunks:
            if chunk.cosine is not None:
                layers[0, chunk.layers] = chunk.cosine
                layers[1, chunk.layers] = float(chunk.num_tokens)
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

    def start_site(
        self, chunk: ChunkSums, axis: Axis, probe: LinearInput | NormOutput, layer: int
    ) -> Callable[[Tensor], None]:
        """Register a site and return the function that its hook calls with the tensor [s, b, d]."""
        site = Site(axis, probe, layer)
        chunk.sites.append(site)

        aggregation = SEQUENCE_AGGREGATIONS[self.config.sequence_aggregation]

        def record(a: Tensor) -> None:
            site.partial = aggregation.partial(a.detach())
            site.width = a.shape[-1]

        return record

    def end_microbatch(self, chunk: ChunkSums, *, counts_samples: bool) -> None:
        """Aggregate the sites of one chunk over the full sequence and add them to its totals."""
        world, sites = self.model.world, chunk.sites
        aggregation = SEQUENCE_AGGREGATIONS[self.config.sequence_aggregation]
        if world.parallel.sequence_parallel:
            norms = [site for site in sites if isinstance(site.probe, NormOutput)]
            _reduce_over(norms, world.groups.tp, aggregation.reduce_op)
        _reduce_over(sites, world.groups.cp, aggregation.reduce_op)
        if counts_samples and sites:
            self.num_samples += sites[0].read_partial().shape[1]
        for width in dict.fromkeys(site.width for site in sites):
            self._add_to_totals(chunk, width, aggregation)
        _add_distances(chunk)

    def _add_to_totals(self, chunk: ChunkSums, width: int, aggregation: SequenceAggregation) -> None:
        """Add the sites of one width to their totals, and clear their partial sums."""
        sites = chunk.sites_of_width(width)
        sums = torch.stack([site.read_partial() for site in sites], 1)  # [statistics, sites, b, d]
        m = aggregation.finish(sums.flatten(1, 2), self.model.sequence_length).double()
        m = m.view(sums.shape[1:])  # [sites, b, d]
        totals = torch.stack([m.sum(1), m.square().sum(1)], 1)
        chunk.totals[width] = chunk.totals[width] + totals if width in chunk.totals else totals
        for site in sites:
            site.partial = None


@contextmanager
def recording(model: ShardedModel, config: ScoreConfig) -> Iterator[Recorder]:
    """Register hooks on the model, yield the recorder, and remove every hook on exit.

    Run full microbatches of [b, model.sequence_length] inside the context.
    """
    recorder, handles = Recorder(model, config), []
    try:
        for number, chunk in enumerate(map(unwrap, model.chunks)):
            sums = ChunkSums()
            recorder.chunks.append(sums)
            for block in chunk.decoder.layers:
                handles += _hook_block(block, recorder, sums)

            def end(*_: Any, sums: ChunkSums = sums, is_first: bool = number == 0) -> None:
                recorder.end_microbatch(sums, counts_samples=is_first)

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


def _hook_block(block: Any, recorder: Recorder, sums: ChunkSums) -> list[Any]:
    """Register the hooks of one TransformerLayer: at all probes, and around it for the cosine.

    sums: of the chunk of the layer.
    """
    layer = block.layer_number - 1
    handles = []
    for axis in IN_ORDER:
        for probe in axis.probes:
            record = recorder.start_site(sums, axis, probe, layer)
            if isinstance(probe, LinearInput):
                handles.append(hook_input(block.get_submodule(probe.module), record))
            else:
                norm, linear = (block.get_submodule(path) for path in (probe.norm, probe.linear))
                handles.append(hook_norm(norm, linear, record))
    layer_inputs: list[Tensor] = []

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        layer_inputs[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def leave(_: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = (tensor.detach().flatten(0, 1) for tensor in (layer_inputs.pop(), hidden))
        sums.distances[layer] = cosine_distance(*rows)

    return [
        *handles,
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ]


def _add_distances(chunk: ChunkSums) -> None:
    """Add the cosine distances of a microbatch to the sums of each layer, and clear them.

    Ranks that split the sequence count each token once.
    """
    if not chunk.distances:
        return
    distances = torch.stack(list(chunk.distances.values()))  # [layers, s b]
    sums = distances.sum(1, dtype=torch.float64)
    chunk.cosine = sums if chunk.cosine is None else chunk.cosine + sums
    chunk.layers = list(chunk.distances)
    chunk.num_tokens += distances.shape[1]
    chunk.distances.clear()


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
