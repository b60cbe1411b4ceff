"""Time of one microbatch on each pipeline stage of a model, and the bytes that a GPU sends for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.planning.memory import Parts
from minitron_mp.planning.stages import stage_blocks
from minitron_mp.planning.times import Times, less_certain

STUDENT = "student's layers"
TEACHER = "teacher's layers"
LOSS = "output layers and loss"
RECOMPUTE = "recomputation"

TP = "tensor parallel"
CP = "context parallel"
PP = "pipeline transfers"
HOST = "waiting for the host"


@dataclass(frozen=True)
class Traffic:
    """The bytes of one kind of transfer on one GPU. link: "NVLink", "network" or "disk"."""

    link: str
    num_bytes: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a microbatch by part on each pipeline stage, and the traffic of a GPU of the first
    stage.
    """

    stages: list[Parts]
    traffic: dict[str, Traffic]
    basis: str
    """Source of the times (times.py)."""

    @property
    def slowest_s(self) -> float:
        """Return the seconds of a microbatch on the slowest stage."""
        return max(sum(stage.values()) for stage in self.stages)


@dataclass(frozen=True)
class ModelPass:
    """One microbatch through all layers of a model: forward, or forward and backward."""

    arch: Arch
    parallel: ParallelConfig
    sequence_length: int
    micro_batch_size: int
    number_format: str
    """Format of the matrix products: bf16, fp32 or a kind of FP8 scaling."""
    train: bool = False
    """Whether the microbatch also has a backward pass."""
    recompute: float = 0.0
    """Share of the layers whose activations are recomputed."""
    tp_comm_overlap: bool = False
    cuda_graphs: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens of the microbatch on a context-parallel rank."""
        return self.sequence_length // self.parallel.cp * self.micro_batch_size

    @property
    def value_bytes(self) -> int:
        """Return the bytes of one activation value."""
        return 4 if self.number_format == "fp32" else 2

    @property
    def hidden_state_bytes(self) -> int:
        """Return the bytes of the hidden states [s/cp, b, h] of the microbatch."""
        return self.value_bytes * self.tokens * self.arch.hidden_size

    @property
    def num_passes(self) -> float:
        """Return the number of passes that communicate: forward, backward, recomputed forward."""
        return 1 + (1 if self.train else 0) + self.recompute


def stage_times(work: ModelPass, times: Times) -> StageTimes:
    """Return the time of one microbatch on each stage, without the loss and the optimizer.

    Each pass is computed once for `times`. The caller may change the parts of the stages.
    """
    # Hashing an architecture takes longer than looking up its pass; `times` keeps it alive.
    p = work.parallel
    sizes = work.sequence_length, work.micro_batch_size, work.number_format
    key = (id(work.arch), p, *sizes, work.train, work.recompute, work.tp_comm_overlap, work.cuda_graphs)
    if key not in times.passes:
        times.passes[key] = work.arch, _stage_times(work, times)
    _, found = times.passes[key]
    return StageTimes([dict(stage) for stage in found.stages], found.traffic, found.basis)


def _stage_times(work: ModelPass, times: Times) -> StageTimes:
    layers = {block: _layer_times(work, block, times) for block in work.arch.block_counts()}
    transfer = _transfer_s(work, times)
    stages = []
    for blocks in stage_blocks(work.arch, work.parallel):
        stage = {
            part: sum(count * layers[block][0][part] for block, count in blocks.items())
            for part in (STUDENT, RECOMPUTE, TP, CP, HOST)
        }
        stages.append({**stage, PP: transfer})
    basis = functools.reduce(less_certain, (basis for _, basis in layers.values()))
    return StageTimes(stages, _traffic(work, times), basis)


def host_load(work: ModelPass, times: Times) -> tuple[float, float]:
    """Return (seconds to issue a layer, seconds of the GPU for it) for the smallest layers."""
    loads = []
    for block in work.arch.block_counts():
        parts, _ = _layer_times(work, block, times)
        loads.append((_issue_s(work, times), sum(parts.values()) - parts[HOST]))
    return min(loads, key=lambda load: load[1])


def _issue_s(work: ModelPass, times: Times) -> float:
    passes = (3 if work.train else 1) + work.recompute
    return times.issue_s(work.number_format, passes, cuda_graphs=work.cuda_graphs)


def _layer_times(work: ModelPass, block: BlockArch, times: Times) -> tuple[Parts, str]:
    """Return (seconds of one layer of these sizes by part, source of the times)."""
    p = work.parallel
    arch = work.arch.with_block(block)
    layer, basis = times.layer(arch, work.tokens, work.sequence_length, p, work.number_format, work.train)
    recomputed = 0.0
    if work.recompute:
        forward, _ = times.layer(arch, work.tokens, work.sequence_length, p, work.number_format, False)
        recomputed = work.recompute * forward
    exposed = times.hardware.tp_exposed_overlapped if work.tp_comm_overlap else times.hardware.tp_exposed
    tensor = 4 * work.num_passes * times.collective_s(work.hidden_state_bytes, p.tp, 1) * exposed
    context = work.num_passes * times.collective_s(_key_value_bytes(work, block), p.cp, p.tp)
    host = max(0.0, _issue_s(work, times) - layer - recomputed - tensor - context)
    return {STUDENT: layer, RECOMPUTE: recomputed, TP: tensor, CP: context, HOST: host}, basis


def link_name(times: Times, size: int, stride: int) -> str:
    """Return the link that limits a collective among `size` ranks that are `stride` apart."""
    _, num_nodes = times.nodes(size, stride)
    return "network" if num_nodes > 1 else "NVLink"


def _key_value_bytes(work: ModelPass, block: BlockArch) -> float:
    """Return the bytes of the keys and values that context parallelism gathers for one layer."""
    keys_and_values = 2 * work.arch.widths(block).key
    return work.value_bytes * work.tokens * work.parallel.cp * keys_and_values / work.parallel.tp


def _pipeline_link(work: ModelPass, times: Times) -> str:
    p = work.parallel
    nodes_apart = max(1, times.hardware.gpus_per_node // (p.tp * p.cp))
    return link_name(times, p.pp, p.model_ranks // p.pp * nodes_apart)


def _transfer_s(work: ModelPass, times: Times) -> float:
    """Return the seconds in which a stage waits for hidden states, forward and backward.

    Interleaved stages send while they compute, so they do not wait.
    """
    p = work.parallel
    if p.pp == 1 or p.vpp:
        return 0.0
    speed = times.nic if _pipeline_link(work, times) == "network" else times.nvlink
    sequence_split = p.tp if p.sequence_parallel else 1
    directions = 2 if work.train else 1
    return directions * (work.hidden_state_bytes / sequence_split / speed + times.hardware.latency_us / 1e6)


def _traffic(work: ModelPass, times: Times) -> dict[str, Traffic]:
    p = work.parallel
    blocks = stage_blocks(work.arch, p)[0]
    num_layers = sum(blocks.values())
    states = work.hidden_state_bytes
    traffic = {}
    if p.tp > 1:
        # With sequence parallelism the inputs of the products are gathered again for the weight
        # gradients.
        regathered = 2 if work.train and p.sequence_parallel else 0
        num_bytes = num_layers * (4 * work.num_passes + regathered) * states * (p.tp - 1) / p.tp
        traffic[TP] = Traffic(link_name(times, p.tp, 1), num_bytes)
    if p.cp > 1:
        gathered = sum(count * _key_value_bytes(work, block) for block, count in blocks.items())
        num_bytes = work.num_passes * gathered * (p.cp - 1) / p.cp
        traffic[CP] = Traffic(link_name(times, p.cp, p.tp), num_bytes)
    if p.pp > 1:
        sequence_split = p.tp if p.sequence_parallel else 1
        directions = 2 if work.train else 1
        num_bytes = directions * (p.vpp or 1) * states / sequence_split
        traffic[PP] = Traffic(_pipeline_link(work, times), num_bytes)
    return traffic
