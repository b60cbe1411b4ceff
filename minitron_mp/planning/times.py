"""Times of the parts of a model on a GPU, from measured layer times and a roofline.

A roofline time is the sum over operations of max(FLOPs / product rate, bytes / memory rate).
Measured layer times (layer_times.json, written by benchmarks/layers.py) scale it: each measured
point has a ratio measured / roofline. Between points of one kind the ratio is interpolated linearly
over the logarithm of FLOPs. Outside their range the ratio of the nearest point is used. So the time
at a measured point is the measured time.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.planning.hardware import GPUS, Hardware

SHIPPED = Path(__file__).with_name("layer_times.json")

MEASURED = "measured"
"""Source of a time: a measured point of exactly these sizes."""

SCALED = "measured, scaled"
"""Source of a time: measured / roofline ratios of other sizes, or of another GPU."""

ROOFLINE = "roofline only"
"""Source of a time: no point of the kind was measured."""

UNMEASURED_RATIO = 1.25
"""Assumed ratio measured / roofline for a kind without measured points."""


@dataclass(frozen=True)
class OutputLayers:
    """Sizes of both output layers and the loss on one rank."""

    hidden_size: int
    teacher_hidden_size: int
    """0 for a loss without a teacher."""
    vocab_size: int
    tokens: int
    tp: int
    logits_precision: str
    precision: str = "bf16"
    second_pass: bool = False
    """Whether the divergence reads the logits once more, see losses.parameters.SECOND_PASS."""


Kind = tuple[str, str]
"""(timed part: train, forward or loss; number format)."""


class Times:
    """Times of layers and losses, from a roofline and measured points.

    same_gpu: whether the points were measured on this GPU. Otherwise no time is MEASURED.
    corrected: whether estimates are corrected towards published rates (published.py).
    """

    def __init__(
        self, hardware: Hardware, content: dict[str, Any], *, same_gpu: bool, corrected: bool = True
    ):
        self.hardware = hardware
        self.same_gpu = same_gpu
        self.corrected = corrected
        self.about = content.get("about", {})
        measured_rates = content["gemm_tflops"] if same_gpu else {}
        peaks = {"bf16": hardware.bf16_tflops, "fp8": hardware.fp8_tflops, "fp32": hardware.fp32_tflops}
        self.rates = {
            name: 1e12 * (measured_rates.get(name) or (peak or 0) * hardware.product_efficiency)
            for name, peak in peaks.items()
        }
        self.hbm = 1e12 * (content["copy_tb_s"] if same_gpu else hardware.hbm_tb_s * hardware.hbm_efficiency)
        # Points are compared with the roofline of the GPU that they were measured on.
        measured_gpu = self if same_gpu else Times(GPUS[content["gpu"]], content, same_gpu=True)
        self.passes: dict[tuple[object, ...], Any] = {}
        """Times of passes through a model (model_pass.py)."""
        self.points: dict[Kind, list[tuple[float, float]]] = {}
        for point in content["points"]:
            kind, flops, seconds = measured_gpu._roofline_of_point(point)
            self.points.setdefault(kind, []).append((math.log(flops), point["ms"] / 1e3 / seconds))
        for points in self.points.values():
            points.sort()
        host_ms = {"bf16": 3.0, "fp8": 8.0} | content.get("host_ms_per_layer", {})
        if hardware.host_bf16_ms is not None:
            host_ms["bf16"] = hardware.host_bf16_ms
        if hardware.host_fp8_ms is not None:
            host_ms["fp8"] = hardware.host_fp8_ms
        self.host_s = {name: host_ms[name] / 1e3 for name in ("bf16", "fp8")}
        self.layer = functools.lru_cache(maxsize=65536)(self._layer)
        self.loss = functools.lru_cache(maxsize=65536)(self._loss)

    def _layer(
        self, arch: Arch, tokens: int, sequence_length: int, parallel: ParallelConfig, dtype: str, train: bool
    ) -> tuple[float, str]:
        """Return (seconds, source of the time) of one layer for a microbatch on one rank.

        tokens: of the microbatch on this rank. train: forward and backward pass.
        """
        flops, seconds = self._layer_roofline(arch, tokens, sequence_length, parallel, dtype, train)
        ratio, basis = self._ratio(("train" if train else "forward", dtype), flops)
        return seconds * ratio, basis

    def issue_s(self, dtype: str, passes: float, *, cuda_graphs: bool = False) -> float:
        """Return the seconds in which the host issues a layer. passes: 1 forward, 3 with backward."""
        if cuda_graphs:
            train_s = self.hardware.host_graphs_ms / 1e3
        else:
            train_s = self.host_s["fp8" if _is_fp8(dtype) else "bf16"]
        return train_s * passes / 3

    def correction(self, dtype: str) -> float:
        """Return the factor from arithmetic to expected seconds for this format of the products."""
        if not self.corrected:
            return 1.0
        return self.hardware.correction_fp8 if _is_fp8(dtype) else self.hardware.correction_bf16

    def _loss(self, sizes: OutputLayers) -> tuple[float, str]:
        """Return (seconds, source of the time) of output layers and loss, forward and backward."""
        flops, seconds = self._loss_roofline(sizes)
        ratio, basis = self._ratio(("loss", sizes.logits_precision), flops)
        return seconds * ratio, basis

    def _ratio(self, kind: Kind, flops: float) -> tuple[float, str]:
        points = self.points.get(kind)
        if not points:
            return UNMEASURED_RATIO, ROOFLINE
        log_flops = math.log(flops)
        positions = [position for position, _ in points]
        ratio = float(np.interp(log_flops, positions, [value for _, value in points]))
        is_measured = min(abs(log_flops - position) for position in positions) < 1e-3
        return ratio, MEASURED if is_measured and self.same_gpu else SCALED

    def _roofline_of_point(self, point: dict[str, Any]) -> tuple[Kind, float, float]:
        """Return (kind, FLOPs, roofline seconds) of a measured point."""
        if point["what"] == "loss":
            sizes = OutputLayers(
                point["hidden_size"],
                point["teacher_hidden_size"],
                point["vocab_size"],
                point["tokens"],
                point["tp"],
                point["dtype"],
            )
            return ("loss", point["dtype"]), *self._loss_roofline(sizes)
        block = BlockArch(
            ffn_hidden_size=point["ffn_hidden_size"],
            num_attention_heads=point["num_attention_heads"],
            num_query_groups=point["num_query_groups"],
        )
        arch = Arch(
            family="",
            hidden_size=point["hidden_size"],
            blocks=(block,) * point["num_layers"],
            kv_channels=point["kv_channels"],
            vocab_size=128,
            max_position_embeddings=point["sequence_length"],
            tied=True,
            activation=point.get("activation", "swiglu"),
        )
        flops, seconds = self._layer_roofline(
            arch,
            point["sequence_length"] * point["micro_batch_size"],
            point["sequence_length"],
            ParallelConfig(tp=point["tp"], sequence_parallel=point["tp"] > 1),
            point["dtype"],
            point["what"] == "train",
        )
        return (point["what"], point["dtype"]), flops, seconds * point["num_layers"]

    def _layer_roofline(
        self, arch: Arch, tokens: int, sequence_length: int, parallel: ParallelConfig, dtype: str, train: bool
    ) -> tuple[float, float]:
        """Return (FLOPs, seconds) of one layer.

        The backward pass has twice the FLOPs and bytes of the products, and 2.5 times the FLOPs of
        attention, because it recomputes the attention scores.
        """
        tp = parallel.tp
        sequence_split = tp if parallel.sequence_parallel else 1
        h = arch.hidden_size
        widths = arch.widths()
        query = widths.query // tp
        qkv = widths.qkv // tp
        fc1 = widths.fc1 // tp
        fc2 = widths.fc2 // tp
        rate = self.rates["fp8" if _is_fp8(dtype) else dtype]
        size = 4 if dtype == "fp32" else 2
        flops = 0.0
        products_s = 0.0
        for rows, columns in ((qkv, h), (h, query), (fc1, h), (h, fc2)):
            product = 2 * tokens * rows * columns
            num_bytes = size * (tokens * (rows + columns) + rows * columns)
            flops += product
            products_s += max(product / rate, num_bytes / self.hbm)
        attention = 2 * tokens * sequence_length * widths.query / tp
        attention_s = attention / self.rates["fp32" if dtype == "fp32" else "bf16"]
        # Memory traffic outside products and attention: two norms and residuals, the gate, rotated
        # q and k.
        elements = tokens * (10 * h / sequence_split + (widths.fc1 + widths.fc2 + 2 * widths.qkv) / tp)
        elementwise_s = size * elements / self.hbm
        passes = 3 if train else 1
        attention_passes = 3.5 if train else 1
        seconds = passes * (products_s + elementwise_s) + attention_passes * attention_s
        return passes * (flops + attention), seconds

    def _loss_roofline(self, sizes: OutputLayers) -> tuple[float, float]:
        """Return (FLOPs, seconds) of three products of the student's output layer and one of the
        teacher's.

        A logit of both models is written and read twice, and its gradient is written once: 26 bytes
        with float32 logits, 14 with bf16. A second pass reads the logits of both models once more.
        """
        logits = sizes.tokens * sizes.vocab_size / sizes.tp
        flops = logits * (6 * sizes.hidden_size + 2 * sizes.teacher_hidden_size)
        bytes_per_logit = 26 if sizes.logits_precision == "fp32" else 14
        num_bytes = logits * bytes_per_logit * (1 if sizes.teacher_hidden_size else 0.5)
        if sizes.second_pass:
            num_bytes += logits * (8 if sizes.logits_precision == "fp32" else 4)
        rate = self.rates["fp32" if sizes.precision == "fp32" else "bf16"]
        return flops, flops / rate + num_bytes / self.hbm

    def collective_s(self, num_bytes: float, size: int, stride: int) -> float:
        """Return the seconds of an all-gather or reduce-scatter of `size` ranks, `stride` apart.

        num_bytes: of the full result. An all-reduce takes twice this time. Each rank of a node
        receives a part over the network and forwards it over NVLink.
        """
        if size == 1:
            return 0.0
        ranks_per_node, num_nodes = self.nodes(size, stride)
        network = num_bytes * (num_nodes - 1) / num_nodes / ranks_per_node
        nvlink = num_bytes * (size - 1) / size - network
        return max(network / self.nic, nvlink / self.nvlink) + self.hardware.latency_us / 1e6

    def nodes(self, size: int, stride: int) -> tuple[int, int]:
        """Return (ranks of a group on one node, nodes of the group)."""
        ranks_per_node = max(1, min(size, self.hardware.gpus_per_node // stride))
        return ranks_per_node, math.ceil(size / ranks_per_node)

    @property
    def nic(self) -> float:
        """Return the network bandwidth of a GPU in bytes per second."""
        return 1e9 * self.hardware.nic_gb_s * self.hardware.nic_efficiency

    @property
    def nvlink(self) -> float:
        """Return the NVLink bandwidth of a GPU in bytes per second."""
        return 1e9 * self.hardware.nvlink_gb_s * self.hardware.nvlink_efficiency


def _is_fp8(dtype: str) -> bool:
    return dtype not in ("bf16", "fp32")


def read_times(gpu: str, hardware: Hardware, path: Path | None = None, *, corrected: bool = True) -> Times:
    """Read the layer times of a file written by benchmarks/layers.py; default: the shipped file.

    corrected: whether estimates are corrected towards published rates.
    """
    path = path or SHIPPED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Times(hardware, content, same_gpu=content["gpu"] == gpu, corrected=corrected)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no layer times ({type(error).__name__}: {error}); write them with: "
            f"python benchmarks/layers.py RECIPE --out {path}"
        ) from error


def less_certain(a: str, b: str) -> str:
    """Return the less certain of two sources of times."""
    return max(a, b, key=(MEASURED, SCALED, ROOFLINE).index)
