"""Published step times of Megatron runs, and the planner's estimates in the same layouts.

The ratios published / arithmetic are the corrections of Hardware: correction_bf16 and
correction_fp8 are their geometric means. A run counts if the planner sees little waiting for the
host in it, because the time in which a host issues a layer differs most between machines. All runs
are shown, and docs/planning.md has the sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.flops import training_flops
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.estimate import Estimate
from minitron_mp.planning.hardware import GPUS
from minitron_mp.planning.model_pass import HOST
from minitron_mp.planning.step_time import estimate_distillation, estimate_training
from minitron_mp.planning.times import Times, read_times

HOST_SHARE = 0.05
"""A run counts for the correction if the planner's share of waiting for the host is below this."""


@dataclass(frozen=True)
class PublishedRun:
    """Pre-training of a dense model. The optimizer is distributed, its transfers are overlapped."""

    model: str
    world: int
    layout: ParallelConfig
    batch: int
    micro_batch: int
    sequence_length: int
    fp8: str | None
    step_s: float
    source: str
    gpu: str = "h100"
    tp_comm_overlap: bool = True

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.batch * self.sequence_length / self.step_s / self.world

    @property
    def tflops(self) -> float:
        """Return the published rate in this project's model FLOPs (models/flops.py)."""
        return training_flops(MODELS[self.model], self.sequence_length) * self.tokens_per_gpu_s / 1e12


@dataclass(frozen=True)
class Comparison:
    """A published run and the planner's arithmetic for it."""

    run: PublishedRun
    arithmetic_s: float
    host_share: float

    @property
    def ratio(self) -> float:
        """Return published / arithmetic step time."""
        return self.run.step_s / self.arithmetic_s

    @property
    def counts(self) -> bool:
        return self.host_share < HOST_SHARE


def _arch(sizes: tuple[int, ...], vocab_size: int, activation: str = "swiglu") -> Arch:
    num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels = sizes
    block = BlockArch(
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
    )
    return Arch(
        family="published",
        hidden_size=hidden_size,
        blocks=(block,) * num_layers,
        kv_channels=kv_channels,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        tied=False,
        activation=activation,
    )


# Layers, hidden size, ffn, heads, query groups, head width.
MODELS = {
    "Llama 3 8B": _arch((32, 4096, 14336, 32, 8, 128), 128256),
    "Llama 3 70B": _arch((80, 8192, 28672, 64, 8, 128), 128256),
    "Llama 3 405B": _arch((126, 16384, 53248, 128, 8, 128), 128256),
    "Llama 2 7B": _arch((32, 4096, 11008, 32, 32, 128), 32000),
    "Llama 2 13B": _arch((40, 5120, 13824, 40, 40, 128), 32000),
    "Llama 2 70B": _arch((80, 8192, 28672, 64, 8, 128), 32000),
    "Nemotron 8B": _arch((32, 4096, 16384, 32, 32, 128), 256000, "squared_relu"),
    "Nemotron-4 15B": _arch((32, 6144, 24576, 48, 8, 128), 256000, "squared_relu"),
    "Nemotron-4 340B": _arch((96, 18432, 73728, 96, 8, 192), 256000, "squared_relu"),
    "GPT 22B": _arch((48, 6144, 24576, 64, 64, 96), 51200, "squared_relu"),
    "GPT 175B": _arch((96, 12288, 49152, 96, 96, 128), 51200, "squared_relu"),
    "Mistral NeMo 12B": _arch((40, 5120, 14336, 32, 8, 128), 131072),
    "MN-Minitron 8B": _arch((40, 4096, 11520, 32, 8, 128), 131072),
}

DGXC = "DGX Cloud benchmarks 24.09"
NEMO = "NeMo 24.07"
BRIDGE = "Megatron-Bridge 25.11"
KORTHIKANTI = "arXiv 2205.05198"


def _layout(tp: int = 1, pp: int = 1, cp: int = 1, vpp: int | None = None) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)


def _from_rate(run: tuple[str, int, ParallelConfig, int, int, int], rate: float, source: str) -> PublishedRun:
    """Return a run that was published as tokens per second and GPU.

    run: model, GPUs, layout, batch, microbatch, sequence length.
    """
    model, world, layout, batch, micro_batch, sequence_length = run
    step_s = batch * sequence_length / world / rate
    fp8 = "tensorwise" if source == BRIDGE else "delayed"
    return PublishedRun(model, world, layout, batch, micro_batch, sequence_length, fp8, step_s, source)


_8B, _15B = ("Llama 3 8B", "Nemotron-4 15B")
_70B = _layout(4, 4, 2, 5)

PUBLISHED = (
    PublishedRun(_8B, 8, _layout(cp=2), 128, 1, 8192, None, 12.91, DGXC),
    PublishedRun(_8B, 128, _layout(cp=2), 2048, 1, 8192, None, 13.10, DGXC),
    PublishedRun(_15B, 16, _layout(4), 64, 4, 4096, None, 2.812, DGXC),
    PublishedRun(_15B, 128, _layout(4), 512, 4, 4096, None, 2.859, DGXC),
    PublishedRun("Llama 3 70B", 64, _70B, 128, 1, 8192, None, 14.72, DGXC),
    PublishedRun("Llama 3 70B", 2048, _70B, 4096, 1, 8192, None, 14.98, DGXC),
    PublishedRun(_8B, 8, _layout(cp=2), 128, 1, 8192, "delayed", 9.67, DGXC),
    PublishedRun(_15B, 16, _layout(4), 64, 4, 4096, "delayed", 2.039, DGXC),
    PublishedRun("Llama 3 70B", 64, _70B, 128, 1, 8192, "delayed", 11.01, DGXC),
    _from_rate((_8B, 8, _layout(), 128, 1, 8192), 14451, BRIDGE),
    _from_rate(("Llama 3 70B", 64, _layout(4, 8, 1, 5), 128, 1, 8192), 1602, BRIDGE),
    _from_rate(("Llama 3 405B", 1024, _layout(8, 8, 2, 8), 512, 1, 8192), 292, BRIDGE),
    _from_rate(("Llama 2 7B", 8, _layout(), 128, 1, 4096), 16634, NEMO),
    _from_rate(("Llama 2 13B", 16, _layout(1, 4, 1, 10), 128, 1, 4096), 8715, NEMO),
    _from_rate(("Llama 2 70B", 64, _layout(4, 4, 1, 20), 128, 1, 4096), 1717, NEMO),
    _from_rate(("Nemotron 8B", 64, _layout(2), 256, 4, 4096), 12507, NEMO),
    _from_rate(("Nemotron-4 340B", 128, _layout(8, 8, 1, 12), 32, 1, 4096), 328, NEMO),
    PublishedRun("GPT 22B", 8, _layout(8), 4, 4, 2048, None, 1.10, KORTHIKANTI, "a100", False),
    PublishedRun("GPT 175B", 64, _layout(8, 8, 1, 3), 64, 1, 2048, None, 13.75, KORTHIKANTI, "a100", False),
)
"""Sources: docs/planning.md. The kind of FP8 scaling is that of the release. H100 unless stated."""

KD_TOKENS_PER_GPU_S = 2917
"""Published distillation: ModelOpt, Nemotron-Nano-9B-v2 to 7B, 768 H100, tp 8, microbatch 4."""

KD_FLOPS_PER_TOKEN = 59.8e9
"""Its model FLOPs: 6 x 7.0e9 + 2 x 8.9e9 parameters. Most of its layers are Mamba, without
attention's share.
"""

KD_TFLOPS = KD_TOKENS_PER_GPU_S * KD_FLOPS_PER_TOKEN / 1e12


def compare(run: PublishedRun, times: Times) -> Comparison:
    """Estimate a published run in its own layout."""
    training = {
        "steps": 1000,
        "global_batch_size": run.batch,
        "micro_batch_size": run.micro_batch,
        "fp8": run.fp8,
        "overlap": True,
        "tp_comm_overlap": run.layout.tp > 1 and run.tp_comm_overlap,
    }
    recipe = make_recipe(
        {
            "model": "published",
            "output": "published",
            "data": {"sequence_length": run.sequence_length},
            "parallel": run.layout.model_dump(),
            "correct": training,
        }
    )
    assert recipe.correct is not None
    seconds = estimate_training(MODELS[run.model], recipe.correct, recipe, run.world, times, None).seconds
    total = sum(seconds.values())
    return Comparison(run, total, seconds.get(HOST, 0.0) / total)


def comparisons(gpu: str) -> list[Comparison]:
    """Return all published runs of a GPU, with the shipped layer times. The h200 has those of the
    h100.
    """
    name = "h100" if gpu == "h200" else gpu
    times = read_times(name, GPUS[name])
    return [compare(run, times) for run in PUBLISHED if run.gpu == name]


def correction(compared: Sequence[Comparison], *, fp8: bool) -> tuple[float, list[float]]:
    """Return (geometric mean of the ratios that count, these ratios)."""
    ratios = [each.ratio for each in compared if each.counts and (each.run.fp8 is not None) == fp8]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0, ratios


def published_distillation(times: Times) -> Estimate:
    """Return the estimate of 12B -> 8B in the layout of the published distillation.

    The published models are hybrids, which the planner does not know, so rates are compared in
    FLOPs: Estimate.tflops with KD_TFLOPS.
    """
    recipe = make_recipe(
        {
            "model": "published",
            "output": "published",
            "data": {"sequence_length": 8192},
            "parallel": _layout(8).model_dump(),
            "distill": {"steps": 1000, "global_batch_size": 768, "micro_batch_size": 4, "overlap": True},
        }
    )
    case = PlanningCase(MODELS["MN-Minitron 8B"], MODELS["Mistral NeMo 12B"], recipe, 768)
    return estimate_distillation(case, times)
