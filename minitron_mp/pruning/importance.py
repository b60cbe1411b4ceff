"""Activation importance of a sharded model: forward hooks, one accumulator vector a hook, reductions late and small.

Formulas: 2407.14679 section 2.2. For a hooked tensor a [s, b, d], first over the sequence, then over samples:

    m[b, c] = mean_s |a|        (sequence aggregation: mean; or l2 = sqrt(sum_s a^2), or var over s)
    score[c] = sqrt(sum_b m^2)  (batch aggregation: l2; or mean, or var over b)

    ffn     input of linear_fc2                                       [L, f]
    heads   input of linear_proj, l2 over the head width              [L, np]
    hidden  outputs of both norms of a layer, summed over all hooks   [h]
    layers  1 - cosine(input, output) of a layer, mean over tokens    [L]

What is split over ranks decides what is reduced when. The inner aggregation is not linear afterwards, so partial sums over a
split sequence (context parallel; sequence parallel for the norms) are added before it, all hooks of a microbatch in one
collective a group. Sums over samples are added over data parallel ranks once, at the end. Channels split over tensor parallel
ranks stay there until the end, when the vectors are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError
from minitron_mp.losses import kernels as kernels
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import unwrap
from minitron_mp.pruning.scores import Scores


@dataclass
class Site:
    """One hooked tensor. kind: ffn, heads, hidden; layer: global number, from 0."""

    kind: str
    layer: int
    partial: Tensor | None = None
    """[statistics, b, d] float32: sums over this rank's part of the sequence, of the microbatch in flight."""
    totals: Tensor | None = None
    """[2, d] float64: sum and sum of squares over samples of the inner aggregation."""


@dataclass
class Recorder:
    """Accumulates scores while microbatches run through the hooked chunks; made by recording()."""

    arch: Arch
    score: ScoreConfig
    world: World
    sites: list[Site] = field(default_factory=list)
    cosine: dict[int, Tensor] = field(default_factory=dict)
    """layer -> [2] float64: sum over tokens of 1 - cosine, number of tokens."""
    num_samples: int = 0

    def importance(self) -> Scores:
        """Scores under global numbering, the same on every rank; reached by all ranks.

        InputError names the first layer whose activations were not finite.
        """
        groups, arch, tp = self.world.groups, self.arch, self.world.groups.tp
        samples = torch.tensor(float(self.num_samples), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(samples, group=groups.dp)
        for site in self.sites:
            assert site.totals is not None, "no microbatch has run"
        if self.sites:
            stacked = torch.cat([site.totals.view(-1) for site in self.sites])
            dist.all_reduce(stacked, group=groups.dp)
            for site, totals in zip(self.sites, stacked.split([site.totals.numel() for site in self.sites])):
                site.totals = totals.view(2, -1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.world.device)

        ffn, heads, hidden = (
            zeros(arch.num_layers, arch.ffn_hidden_size),
            zeros(arch.num_layers, arch.num_attention_heads),
            zeros(arch.hidden_size),
        )
        for site in self.sites:
            scores = self._over_samples(site.totals, samples)  # [d]
            if site.kind == "ffn":
                _part(ffn[site.layer], tp).copy_(scores)
            elif site.kind == "heads":
                _part(heads[site.layer], tp).copy_(scores.view(-1, arch.kv_channels).norm(dim=1))
            else:
                hidden += scores / tp.size()  # equal on all tensor parallel ranks, which are summed below
        layers = zeros(2, arch.num_layers)
        for layer, pair in self.cosine.items():
            layers[:, layer] = pair
        if self.world.parallel.sequence_parallel is False:
            layers /= tp.size()  # likewise; under sequence parallelism each rank saw its own tokens
        everything = torch.cat([x.reshape(-1) for x in (ffn, heads, hidden)])
        dist.all_reduce(everything, group=groups.tp)
        dist.all_reduce(everything, group=groups.pp)
        for group in (groups.dp_cp, groups.tp, groups.pp):
            dist.all_reduce(layers, group=group)
        sizes = [x.numel() for x in (ffn, heads, hidden)]
        ffn, heads, hidden = (
            part.view(like.shape) for part, like in zip(everything.split(sizes), (ffn, heads, hidden))
        )
        layers = layers[0] / layers[1]
        self._refuse_non_finite(ffn, heads, layers)
        return Scores(*(x.float().cpu().numpy() for x in (ffn, heads, hidden, layers)))

    def _over_samples(self, totals: Tensor, samples: Tensor) -> Tensor:
        total, squares = totals
        if self.score.batch_aggregation == "l2":
            return squares.sqrt()
        mean = total / samples
        return mean if self.score.batch_aggregation == "mean" else (squares / samples - mean**2).clamp(min=0)

    def _refuse_non_finite(self, ffn: Tensor, heads: Tensor, layers: Tensor) -> None:
        finite = heads.isfinite().all(1) & ffn.isfinite().all(1) & layers.isfinite()
        if not finite.all():
            layer = int((~finite).nonzero()[0])
            where = "attention" if not heads[layer].isfinite().all() else "MLP"
            raise InputError(
                f"activations of layer {layer} ({where}) are NaN or infinite on the calibration text; the model is damaged, or overflows in this precision: "
                "check the source weights, or set precision: fp32"
            )

    def start_site(self, kind: str, layer: int) -> Callable[[Tensor], None]:
        """Register a site; returns what its hook calls with the tensor [s, b, d]."""
        site = Site(kind, layer)
        self.sites.append(site)

        def record(a: Tensor) -> None:
            site.partial = _sequence_sums(a.detach(), self.score.sequence_aggregation)

        return record

    def record_cosine(self, layer: int, before: Tensor, after: Tensor) -> None:
        """before, after [s, b, h]: sequence part of this rank; each token counts once over all ranks that split it."""
        distance = _cosine_distance(before.detach().flatten(0, 1), after.detach().flatten(0, 1))
        pair = torch.stack(
            [distance.sum(dtype=torch.float64), distance.new_tensor(distance.numel(), dtype=torch.float64)]
        )
        self.cosine[layer] = self.cosine[layer] + pair if layer in self.cosine else pair

    def end_microbatch(self, sites: list[Site], tokens: int, is_first_chunk: bool) -> None:
        """Close the inner aggregation of one chunk's sites. tokens: the whole sequence length s."""
        groups = self.world.groups
        norms = [site for site in sites if site.kind == "hidden"]
        if self.world.parallel.sequence_parallel:
            _add_over(norms, groups.tp)
        _add_over(sites, groups.cp)
        for site in sites:
            m = _over_sequence(site.partial, tokens, self.score.sequence_aggregation).double()  # [b, d]
            totals = torch.stack([m.sum(0), m.square().sum(0)])
            site.totals = totals if site.totals is None else site.totals + totals
            self.num_samples += m.shape[0] if is_first_chunk and site is sites[0] else 0
            site.partial = None


@contextmanager
def recording(
    chunks: list[Any], arch: Arch, score: ScoreConfig, world: World, sequence_length: int
) -> Iterator[Recorder]:
    """Hook the chunks, yield the recorder, take every hook off again. Run whole microbatches of [b, sequence_length] inside."""
    recorder, handles = Recorder(arch, score, world), []
    try:
        for number, chunk in enumerate(map(unwrap, chunks)):
            first = len(recorder.sites)
            for block in chunk.decoder.layers:
                handles += _hook_layer(block, recorder)
            mine = recorder.sites[first:]

            def end(*_: Any, mine: list[Site] = mine, is_first: bool = number == 0) -> None:
                recorder.end_microbatch(mine, sequence_length, is_first)

            handles.append(chunk.register_forward_hook(end))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def score(
    chunks: list[Any],
    arch: Arch,
    settings: ScoreConfig,
    world: World,
    sequence_length: int,
    run: Callable[[], None],
) -> Scores:
    """Importance of a model under run(), which sends all calibration microbatches through the chunks, forward only.

    The same scores on every rank (to rounding: the same at every layout). Reached by all ranks; leaves the model as it was.
    """
    with recording(chunks, arch, settings, world, sequence_length) as recorder, torch.no_grad():
        run()
    return recorder.importance()  # every rank has the same values, and raises alike


def _hook_layer(block: Any, recorder: Recorder) -> list[Any]:
    """Hooks of one TransformerLayer, its norms modules of their own or inside the linear layers behind them."""
    layer = block.layer_number - 1
    ffn, heads = recorder.start_site("ffn", layer), recorder.start_site("heads", layer)
    norms = (
        (block.input_layernorm, block.self_attention.linear_qkv),
        (block.pre_mlp_layernorm, block.mlp.linear_fc1),
    )
    entering: list[Tensor] = []

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        entering[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def leave(_: Any, args: Any, output: Any) -> None:
        recorder.record_cosine(layer, entering.pop(), output[0] if isinstance(output, tuple) else output)

    return [
        block.mlp.linear_fc2.register_forward_pre_hook(lambda _, args: ffn(args[0])),
        block.self_attention.linear_proj.register_forward_pre_hook(lambda _, args: heads(args[0])),
        *(_hook_norm(norm, linear, recorder.start_site("hidden", layer)) for norm, linear in norms),
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ]


def _hook_norm(norm: Any, linear: Any, record: Callable[[Tensor], None]) -> Any:
    if not isinstance(norm, IdentityOp):
        return norm.register_forward_hook(lambda _, args, output: record(output))
    # Transformer Engine's LayerNormLinear keeps its norm's output to itself (in FP8 even rounded), so the norm is computed once more.
    return linear.register_forward_pre_hook(
        lambda module, args: record(_norm_inside(module, args[0].detach()))
    )


def _norm_inside(linear: Any, x: Tensor) -> Tensor:
    """What the norm inside a layer like Transformer Engine's LayerNormLinear makes of x [s, b, h]."""
    weight = linear.layer_norm_weight + 1 if linear.zero_centered_gamma else linear.layer_norm_weight
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[n, h] twice -> [n] float32, computed in float32: rounded to bf16, 1 - cosine of a layer that changes little would be noise."""
    if not a.is_cuda:
        return 1 - torch.cosine_similarity(a.float(), b.float(), dim=-1)
    from minitron_mp.pruning.cosine_kernel import cosine_distance

    return cosine_distance(a, b)


def _sequence_sums(a: Tensor, aggregation: str) -> Tensor:
    """[s, b, d] in its own dtype -> [statistics, b, d] float32, read once each, no float32 copy of a."""
    if aggregation == "mean":
        if a.is_cuda:
            return torch.linalg.vector_norm(a, 1, dim=0, dtype=torch.float32)[None]
        return a.abs().sum(0, dtype=torch.float32)[
            None
        ]  # 40 times faster than vector_norm on a CPU, for one copy in a's dtype
    squares = torch.linalg.vector_norm(a, 2, dim=0, dtype=torch.float32).square()
    return squares[None] if aggregation == "l2" else torch.stack([a.sum(0, dtype=torch.float32), squares])


def _over_sequence(sums: Tensor, tokens: int, aggregation: str) -> Tensor:
    """[statistics, b, d] over the whole sequence -> [b, d]."""
    if aggregation == "mean":
        return sums[0] / tokens
    return (
        sums[0].sqrt() if aggregation == "l2" else (sums[1] / tokens - (sums[0] / tokens) ** 2).clamp(min=0)
    )


def _add_over(sites: list[Site], group: Any) -> None:
    """Add the partial sums of all sites over a group that splits the sequence, in one collective."""
    if group.size() == 1 or not sites:
        return
    flat = torch.cat([site.partial.reshape(-1) for site in sites])
    dist.all_reduce(flat, group=group)
    for site, part in zip(sites, flat.split([site.partial.numel() for site in sites])):
        site.partial = part.view(site.partial.shape)


def _part(row: Tensor, tp: Any) -> Tensor:
    """This tensor parallel rank's slice of a global vector."""
    return row.chunk(tp.size())[tp.rank()]
