"""A GPU and its links in a few numbers, and how long the parts of a model take on it: measured layer times, stretched by a roofline.

A roofline time is the sum over operations of the longer of FLOPs / product rate and bytes / memory rate. Where layer times were measured
(layer_times.json, written by benchmarks/layers.py), the ratio measured / roofline of each point is what efficiency is left; between points of one kind the
ratio is interpolated linearly over the logarithm of FLOPs, beyond them the nearest one's holds. So at a measured point the time is the measured one.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch

SHIPPED = Path(__file__).with_name("layer_times.json")

MEASURED, SCALED, ROOFLINE = "measured", "measured, scaled", "roofline only"
"""What a time rests on: a point at these very sizes; the ratios of points at others; a ratio of 0.8 of the roofline."""

UNMEASURED = 1.25
"""measured / roofline where no point of a kind is there."""


class Hardware(BaseModel):
    """One GPU, and a node of them. Bandwidths are of one direction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_gib: float
    bf16_tflops: float
    """Dense peak."""
    fp8_tflops: float | None = None
    fp32_tflops: float
    hbm_tb_s: float
    nvlink_gb_s: float
    nic_gb_s: float
    """Of a GPU's share of the network: 400 Gb/s are 50."""
    gpus_per_node: int = 8
    product_efficiency: float = 0.73
    """Share of the peak that large products keep up: 720 of 989 on the H100 that was measured. Used where layer_times.json has no rate."""
    hbm_efficiency: float = 0.9
    """3.02 of 3.35 TB/s there."""
    nvlink_efficiency: float = 0.8
    """Of large NCCL collectives. Assumed."""
    nic_efficiency: float = 0.8
    """Assumed; a network that is shared has less."""
    latency_us: float = 20.0
    """Of a collective, whatever its size. Assumed."""
    host_bf16_ms: float | None = None
    """Least time in which a process can issue forward and backward pass of a layer; default: that of the layer times."""
    host_fp8_ms: float | None = None
    """The same in FP8."""
    host_graphs_ms: float = 0.3
    """The same with distill.cuda_graphs, in either format. Assumed."""
    tp_exposed: float = 1.0
    """Share of tensor parallel communication that computation does not hide."""
    tp_exposed_overlapped: float = 0.3
    """The same with distill.tp_comm_overlap. Assumed."""
    reserved_gib: float = 4.0
    """CUDA context, NCCL, cuBLAS and what the allocator cannot use. Assumed."""
    source: str = ""


# Peaks are dense ones. Network: DGX systems' eight adapters, one a GPU.
GPUS = {
    "h100": Hardware(
        name="H100 SXM", memory_gib=79.1, bf16_tflops=989, fp8_tflops=1979, fp32_tflops=67, hbm_tb_s=3.35, nvlink_gb_s=450, nic_gb_s=50,
        source="glennklockwood.com/garden/processors/h100, after NVIDIA's datasheet; 8 x 400 Gb/s",
    ),
    "h200": Hardware(
        name="H200 SXM", memory_gib=140.0, bf16_tflops=989, fp8_tflops=1979, fp32_tflops=67, hbm_tb_s=4.8, nvlink_gb_s=450, nic_gb_s=50,
        source="glennklockwood.com/garden/processors/h100 (an H100 with other memory: 141 GB, 4.8 TB/s); 8 x 400 Gb/s assumed",
    ),
    "a100": Hardware(
        name="A100 80GB SXM", memory_gib=79.1, bf16_tflops=312, fp32_tflops=19.5, hbm_tb_s=2.039, nvlink_gb_s=300, nic_gb_s=25,
        source="glennklockwood.com/garden/processors/A100, after NVIDIA's datasheet; 8 x 200 Gb/s assumed",
    ),
}  # fmt: skip


def read_hardware(gpu: str, path: Path | None = None) -> Hardware:
    """A row of GPUS, with the values of a YAML or JSON file in place of its own; InputError for names and keys that are not there."""
    if gpu not in GPUS:
        raise InputError(
            f"--gpu {gpu} is not known; known: {', '.join(GPUS)}. Another one: --hardware FILE with all keys (docs/estimate.md)"
        )
    given = _read(path) if path else {}
    try:
        return Hardware.model_validate(GPUS[gpu].model_dump() | given)
    except ValidationError as error:
        refuse(
            f"{path} cannot be used:",
            [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}; known: {', '.join(Hardware.model_fields)}"
                for e in error.errors()
            ],
        )
        raise


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    import yaml  # JSON is YAML

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not keys and values")
    return content


class Times:
    """Measured times, as roofline ratios. gpu: whose they are; on another one all is 'measured, scaled' at best."""

    def __init__(self, hardware: Hardware, content: dict[str, Any], *, same_gpu: bool):
        self.hardware, self.same_gpu, self.about = hardware, same_gpu, content.get("about", {})
        rates = content["gemm_tflops"] if same_gpu else {}
        peaks = {"bf16": hardware.bf16_tflops, "fp8": hardware.fp8_tflops, "fp32": hardware.fp32_tflops}
        self.rates = {
            name: 1e12 * (rates.get(name) or (peak or 0) * hardware.product_efficiency)
            for name, peak in peaks.items()
        }
        self.hbm = 1e12 * (content["copy_tb_s"] if same_gpu else hardware.hbm_tb_s * hardware.hbm_efficiency)
        # The ratios of a measured GPU are its own: points are compared with its roofline, not with this one's.
        home = self if same_gpu else Times(GPUS[content["gpu"]], content, same_gpu=True)
        self.points: dict[tuple, list[tuple[float, float]]] = {}
        for point in content["points"]:
            key, flops, seconds = home._of_point(point)
            self.points.setdefault(key, []).append((math.log(flops), point["ms"] / 1e3 / seconds))
        for points in self.points.values():
            points.sort()
        measured = {"bf16": 3.0, "fp8": 8.0} | content.get("host_ms_per_layer", {})
        self.host_s = {
            name: (measured[name] if own is None else own) / 1e3
            for name, own in (("bf16", hardware.host_bf16_ms), ("fp8", hardware.host_fp8_ms))
        }
        self.layer = functools.lru_cache(maxsize=65536)(self._layer)
        self.loss = functools.lru_cache(maxsize=65536)(self._loss)

    def _layer(
        self, arch: Arch, tokens: int, sequence_length: int, parallel: ParallelConfig, dtype: str, train: bool
    ) -> tuple[float, str]:
        """(seconds, what they rest on) of one layer for a microbatch on one rank; train: forward and backward pass. tokens: of the rank."""
        flops, seconds = self._layer_roofline(arch, tokens, sequence_length, parallel, dtype, train)
        ratio, basis = self._ratio(("train" if train else "forward", dtype), flops)
        return seconds * ratio, basis

    def issue_s(self, dtype: str, passes: int, *, cuda_graphs: bool = False) -> float:
        """Seconds in which the host issues a layer's passes: 1 forward, 3 forward and backward."""
        each = (
            self.hardware.host_graphs_ms / 1e3
            if cuda_graphs
            else self.host_s["bf16" if dtype in ("bf16", "fp32") else "fp8"]
        )
        return each * passes / 3

    def _loss(
        self,
        hidden: int,
        teacher_hidden: int,
        vocab: int,
        tokens: int,
        tp: int,
        logits: str,
        dtype: str = "bf16",
    ) -> tuple[float, str]:
        """(seconds, what they rest on) of both output layers with the loss, forward and backward; teacher_hidden 0: without a teacher's."""
        flops, seconds = self._loss_roofline(hidden, teacher_hidden, vocab, tokens, tp, logits, dtype)
        ratio, basis = self._ratio(("loss", logits), flops)
        return seconds * ratio, basis

    def _ratio(self, key: tuple, flops: float) -> tuple[float, str]:
        points = self.points.get(key) or []
        if not points:
            return UNMEASURED, ROOFLINE
        at = math.log(flops)
        ratio = float(np.interp(at, [where for where, _ in points], [value for _, value in points]))
        near = min(abs(at - where) for where, _ in points) < 1e-3
        return ratio, MEASURED if near and self.same_gpu else SCALED

    def _of_point(self, point: dict[str, Any]) -> tuple[tuple, float, float]:
        """(kind, FLOPs, roofline seconds) of a measured point."""
        parallel = ParallelConfig(tp=point["tp"], sequence_parallel=point["tp"] > 1)
        if point["what"] == "loss":
            widths = (
                point["hidden_size"],
                point["teacher_hidden_size"],
                point["vocab_size"],
                point["tokens"],
                point["tp"],
                point["dtype"],
            )
            return ("loss", point["dtype"]), *self._loss_roofline(*widths)
        sizes = {
            name: point[name]
            for name in (
                "hidden_size",
                "ffn_hidden_size",
                "num_attention_heads",
                "num_query_groups",
                "kv_channels",
                "num_layers",
            )
        }
        other = {
            "family": "",
            "vocab_size": 128,
            "max_position_embeddings": point["sequence_length"],
            "tied": True,
        }
        arch = Arch(**sizes, **other, activation=point.get("activation", "swiglu"))
        tokens, train = point["sequence_length"] * point["micro_batch_size"], point["what"] == "train"
        flops, seconds = self._layer_roofline(
            arch, tokens, point["sequence_length"], parallel, point["dtype"], train
        )
        return (point["what"], point["dtype"]), flops, seconds * point["num_layers"]

    def _layer_roofline(
        self, arch: Arch, tokens: int, sequence_length: int, parallel: ParallelConfig, dtype: str, train: bool
    ) -> tuple[float, float]:
        """(FLOPs, seconds). A backward pass has twice the products' FLOPs and bytes, and 2.5 times the attention's, which recomputes its scores."""
        tp, along = parallel.tp, parallel.tp if parallel.sequence_parallel else 1
        h, heads, qkv, gate_up, ffn = (
            arch.hidden_size,
            *map(arch.dim_size, ("heads", "qkv", "gate_up", "ffn")),
        )
        rate = self.rates["fp8" if dtype not in ("bf16", "fp32") else dtype]
        size = 4 if dtype == "fp32" else 2
        flops = total = 0.0
        for rows, columns in ((qkv // tp, h), (h, heads // tp), (gate_up // tp, h), (h, ffn // tp)):
            product = 2 * tokens * rows * columns
            moved = size * (tokens * (rows + columns) + rows * columns)
            flops, total = flops + product, total + max(product / rate, moved / self.hbm)
        attention = 2 * tokens * sequence_length * heads / tp
        attention_s = attention / self.rates["fp32" if dtype == "fp32" else "bf16"]
        # Read and written beside products and attention: two norms and residuals, the gate, rotated q and k.
        elements = tokens * (10 * h / along + (gate_up + ffn + 2 * qkv) / tp)
        elementwise = size * elements / self.hbm
        passes, attention_passes = (3, 3.5) if train else (1, 1)
        return passes * (flops + attention), passes * (total + elementwise) + attention_passes * attention_s

    def _loss_roofline(
        self,
        hidden: int,
        teacher_hidden: int,
        vocab: int,
        tokens: int,
        tp: int,
        logits: str,
        dtype: str = "bf16",
    ) -> tuple[float, float]:
        """(FLOPs, seconds): three products of the student's output layer, one of the teacher's; a logit of both models is written, read
        twice, and its gradient written once: 26 bytes with float32 logits, 14 with bf16."""
        flops = tokens * vocab / tp * (6 * hidden + 2 * teacher_hidden)
        moved = tokens * vocab / tp * (26 if logits == "fp32" else 14) * (1 if teacher_hidden else 0.5)
        return flops, flops / self.rates["fp32" if dtype == "fp32" else "bf16"] + moved / self.hbm

    def collective_s(self, num_bytes: float, size: int, stride: int) -> float:
        """Seconds of an all-gather or reduce-scatter of so many bytes in all among `size` ranks that are `stride` apart. An all-reduce is two.

        A node's members share what comes in over the network; each passes the rest on by NVLink.
        """
        if size == 1:
            return 0.0
        here, nodes = self.nodes(size, stride)
        network = num_bytes * (nodes - 1) / nodes / here
        inside = num_bytes * (size - 1) / size - network
        return max(network / self.nic, inside / self.nvlink) + self.hardware.latency_us / 1e6

    def nodes(self, size: int, stride: int) -> tuple[int, int]:
        """(members of a group on one node, nodes of the group)."""
        here = max(1, min(size, self.hardware.gpus_per_node // stride))
        return here, math.ceil(size / here)

    @property
    def nic(self) -> float:
        return 1e9 * self.hardware.nic_gb_s * self.hardware.nic_efficiency

    @property
    def nvlink(self) -> float:
        return 1e9 * self.hardware.nvlink_gb_s * self.hardware.nvlink_efficiency


def read_times(gpu: str, hardware: Hardware, path: Path | None = None) -> Times:
    """Layer times of a file that benchmarks/layers.py wrote; default: those that are shipped."""
    path = path or SHIPPED
    try:
        content = json.loads(path.read_text())
        return Times(hardware, content, same_gpu=content["gpu"] == gpu)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no layer times ({type(error).__name__}: {error}); write them with: python benchmarks/layers.py RECIPE --out {path}"
        ) from error
