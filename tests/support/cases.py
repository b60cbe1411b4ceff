"""Layouts, small odd architectures, weights and batches of the multi-rank tests.

This module does not import megatron.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import TargetConfig
from minitron_mp.config.training import CorrectionConfig, TrainingConfig
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.parameters import EMBEDDING, MODEL_PARAMETERS, dims_of, layer_key, split_key
from minitron_mp.pruning.aggregation import BATCH_AGGREGATIONS, SEQUENCE_AGGREGATIONS

SEQUENCE_LENGTH = 24
"""Divides by 8: 2 cp x tp under context and sequence parallelism."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout.

    parallel: arguments of ParallelConfig. The data parallel size follows from the ranks.
    """

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def tp(self) -> int:
        return self.parallel.get("tp", 1)

    @property
    def dp(self) -> int:
        return self.ranks // (self.tp * self.parallel.get("pp", 1) * self.parallel.get("cp", 1))


SP = {"sequence_parallel": True}
LAYOUTS = [
    Layout("one", 1),
    Layout("tp2", 2, {"tp": 2}),
    Layout("tp2-sp", 2, {"tp": 2, **SP}),
    Layout("pp2", 2, {"pp": 2}),
    Layout("pp2-vpp2", 2, {"pp": 2, "vpp": 2}),
    Layout("cp2", 2, {"cp": 2}),
    Layout("dp2", 2),
    Layout("tp2-pp2-sp", 4, {"tp": 2, "pp": 2, **SP}),
    Layout("tp2-pp2-vpp2-sp", 4, {"tp": 2, "pp": 2, "vpp": 2, **SP}),
    Layout("tp2-cp2-sp", 4, {"tp": 2, "cp": 2, **SP}),
    Layout("tp2-dp2-sp", 4, {"tp": 2, **SP}),
    Layout("pp2-dp2", 4, {"pp": 2}),
    Layout("cp2-dp2", 4, {"cp": 2}),
    Layout("tp4-sp", 4, {"tp": 4, **SP}),
    Layout("cp4", 4, {"cp": 4}),
    Layout("pp4", 4, {"pp": 4}),
    Layout("pp2-cp2", 4, {"pp": 2, "cp": 2}),
    Layout("pp2-vpp2-dp2", 4, {"pp": 2, "vpp": 2}),
]
BY_NAME = {layout.name: layout for layout in LAYOUTS}

# Odd on purpose: hidden_size is neither heads x head width nor a multiple of 128. The layers divide
# over 2 stages but not over 4. The vocabulary needs padding, and at tp 4 one rank has padding only.
# Only heads, groups and ffn are even, because tp must divide them.
SIZES = {
    "num_layers": 6,
    "hidden_size": 40,
    "ffn_hidden_size": 112,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
}
SIZES |= {"vocab_size": 150, "max_position_embeddings": 256}
MANY_GROUPS = {"num_attention_heads": 24, "num_query_groups": 8, "kv_channels": 4}
"""Half of them still divide by tp 4, and two lie on each rank, which may keep both or none."""
ARCHS = {
    "qwen3": Arch(family="qwen3", tied=True, qk_norm=True, norm_epsilon=1e-3, **SIZES),
    "qwen2": Arch(family="qwen2", tied=False, qkv_bias=True, rotary_base=5000.0, **SIZES | MANY_GROUPS),
    "nemotron": Arch(
        family="nemotron", tied=False, norm="layer1p", activation="squared_relu", rotary_percent=0.5, **SIZES
    ),
    "llama": Arch(
        family="llama",
        tied=False,
        **SIZES | {"num_attention_heads": 9, "num_query_groups": 3, "hidden_size": 44},
    ),
}
"""qwen3 has an epsilon large enough that a mask that forgets it shows."""

MIXED = ARCHS["qwen3"].model_copy(
    update={
        "blocks": (
            BlockArch(ffn_hidden_size=112, num_attention_heads=12, num_query_groups=4),
            BlockArch(ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2),
        )
    }
)
"""Two layers that differ in every size."""

# qwen3 runs at every layout. The others run where they differ: biases, an untied head, and head
# counts that tp does not divide.
SOME = {
    "qwen2": ("one", "tp2-sp", "pp2-vpp2", "tp2-pp2-sp", "tp2-cp2-sp", "tp4-sp"),
    "llama": ("one", "pp2", "cp2", "dp2", "pp4"),
    "nemotron": ("one", "tp2-sp", "tp2-pp2-vpp2-sp"),
}
UNEVEN_LAYOUTS = ("one", "tp2", "tp2-sp", "pp2", "tp2-pp2-vpp2-sp")
CASES = [(arch, layout) for arch in ARCHS for layout in LAYOUTS if layout.name in SOME.get(arch, BY_NAME)]
IDS = [f"{arch}-{layout.name}" for arch, layout in CASES]
UNEVEN = [(arch, layout) for arch, layout in CASES if layout.name in UNEVEN_LAYOUTS]
"""Where a student is cut whose layers differ in size."""


def targets(arch: Arch, tp: int = 1) -> dict[str, TargetConfig]:
    """Return name -> target of a student.

    One for each axis, one with all axes and all groups, one with merged heads, and the teacher
    again ("identity"). With align 4 the kept sizes still divide at tp 4. Where the kept groups do
    not divide, students with fewer groups are left out.
    """
    sizes = {
        "hidden": {"hidden_size": 28},
        "ffn": {"ffn_hidden_size": 48},
        "heads": {"num_attention_heads": arch.num_query_groups * 2},
        "layer": {"num_layers": 5},
    }
    sizes["all"] = {name: size for one in sizes.values() for name, size in one.items()}
    groups = math.ceil(arch.num_query_groups / 2)
    if groups % tp == 0:
        sizes["groups"] = {"num_query_groups": groups}
        sizes["merged"] = {
            **sizes["all"],
            "num_query_groups": groups,
            "num_attention_heads": groups * 2,
            "merge_heads": True,
        }
    sizes["identity"] = {"num_layers": arch.num_layers}
    return {name: TargetConfig(align=4, **size) for name, size in sizes.items()}


def make_weights(arch: Arch, seed: int = 0) -> dict[str, Tensor]:
    """Return checkpoint key -> global float32 tensor that exposes mistakes.

    Activations are of order one, and each layer changes the residual stream visibly. Norm weights
    differ from one. Important neurons lie on the first tensor parallel rank in even layers and on
    the last one in odd layers, so that the kept ones are very uneven. The rows of the padded
    vocabulary hold garbage, which must have no effect.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, noise in _noise(arch, generator):
        if ("layernorm" in key or "layer_norm" in key) and not key.endswith("bias"):
            weights[key] = (arch.norm == "rms") + 0.3 * noise
        elif key.endswith("bias"):
            weights[key] = 0.5 * noise
        elif dims_of(key)[0] == "vocab":
            weights[key] = 0.4 * noise
        else:
            weights[key] = 1.2 * noise / noise.shape[-1] ** 0.5
    importance = torch.linspace(0.7, 1.3, arch.num_layers)
    for layer, block in enumerate(arch.blocks):
        ramp = torch.logspace(0.5, -0.5, block.ffn_hidden_size)
        fc1 = weights[layer_key(layer, "mlp.linear_fc1.weight")]
        fc1.unflatten(0, (-1, block.ffn_hidden_size)).mul_(
            (ramp if layer % 2 == 0 else ramp.flip(0))[:, None]
        )
        weights[layer_key(layer, "self_attention.linear_proj.weight")] *= importance[layer]
    return weights


def _noise(arch: Arch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, normal values), one parameter of all layers after the other."""
    by_name: dict[str, list[str]] = {}
    shapes = arch.shapes()
    for key in shapes:
        by_name.setdefault(split_key(key)[1], []).append(key)
    order = sorted(by_name, key=lambda name: 0 if name == EMBEDDING else 2 if name in MODEL_PARAMETERS else 1)
    for name in order:
        keys = by_name[name]
        if len({shapes[key] for key in keys}) == 1:
            parts = torch.randn((len(keys), *shapes[keys[0]]), generator=generator).unbind()
        else:
            parts = [torch.randn(shapes[key], generator=generator) for key in keys]
        yield from zip(keys, parts)


def make_samples(arch: Arch, step: int, count: int) -> dict[str, Tensor]:
    """Return `count` samples of a step with unequal token counts.

    They have tokens, labels, position_ids and loss_mask, each [count, s]. Of four samples the
    first counts fully, the second about half, the third with one token, the fourth not at all.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, arch.vocab_size, (count, SEQUENCE_LENGTH + 1), generator=generator)
    kind = torch.arange(count)[:, None] % 4
    position = torch.arange(SEQUENCE_LENGTH)
    half = torch.rand((count, SEQUENCE_LENGTH), generator=generator) < 0.5
    mask = (kind == 0) | ((kind == 1) & half) | ((kind == 2) & (position == step % SEQUENCE_LENGTH))
    positions = position.expand(count, SEQUENCE_LENGTH).contiguous()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": positions,
        "loss_mask": mask.float(),
    }


def microbatches(
    samples: dict[str, Tensor], micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[dict[str, Tensor]]:
    """This data parallel rank's part of a global batch: every dp_size-th microbatch."""
    parts = {name: value.split(micro_batch_size) for name, value in samples.items()}
    count = len(parts["tokens"])
    return [{name: value[i] for name, value in parts.items()} for i in range(dp_rank, count, dp_size)]


def saved_axes(arch: str) -> list[str]:
    """Return the students that are saved and loaded at another layout.

    The slices of the others are compared in memory only, to save time.
    """
    return {"qwen3": ["layer", "all"], "qwen2": ["all", "merged"]}.get(arch, ["all"])


def masked_axes(arch: str, layout: Layout) -> list[str]:
    """Return the students that are also computed by the masked teacher, which has no merged heads.

    Each axis separately for qwen3, and all axes on one rank.
    """
    chosen = (
        saved_axes(arch)
        if arch != "qwen3" and layout.ranks > 1
        else ["hidden", "ffn", "heads", "layer", "all"]
    )
    names = [
        axis for axis in targets(ARCHS[arch], layout.tp) if axis in (*chosen, "groups") and axis != "merged"
    ]
    return names + ["uneven"] * ((arch, layout) in UNEVEN)


CHOICES = [
    {"query": "what is the answer to this", "choices": ["one word", "two other words", "nothing"], "gold": 1},
    {"query": "and now", "choices": ["it is over, as long as this sentence is", "go"], "gold": 0},
    {"query": "x" * 40, "choices": ["an ending behind a context that is too long", "b"], "gold": 1},
    {
        "context_options": ["the cat saw the dog and the cat", "the cat saw the dog and the dog"],
        "continuation": "ran away.",
        "gold": 0,
    },
]
WORDS = [{"text": "a b c d e"}, {"text": "the last word of this is hello"}]
"""Items of choice tasks, a token for each character: rows of several lengths."""
BLOCKS = [frozenset({i, i + 1}) for i in range(SIZES["num_layers"] - 1)] + [
    frozenset({0, 5}),
    frozenset({1, 2, 4}),
]
GONE = frozenset({3})
"""Layers that are left out, and one that a greedy search has dropped before."""
GONE_LAYOUTS = ("one", "tp2-pp2-vpp2-sp")
TASK_CANDIDATES = [GONE | more for more in ({4}, {0, 5}, {1, 2})]

DEFAULT_PAIR = ("l2", "mean")
ALL_PAIRS = sorted(
    itertools.product(BATCH_AGGREGATIONS, SEQUENCE_AGGREGATIONS), key=lambda pair: pair != DEFAULT_PAIR
)
"""(aggregation over samples, aggregation over the sequence), the default first."""
LAYOUTS_OF_ALL_PAIRS = ("dp2", "cp2", "tp2-pp2-vpp2-sp")
"""Each kind of split once: the samples, the sequence in two ways, the layers."""


def pairs(arch: str, layout: Layout) -> list[tuple[str, str]]:
    """Return pairs (batch, sequence) of aggregations to score with. The first one makes the plans."""
    return ALL_PAIRS if arch == "qwen3" and layout.name in ("one", *LAYOUTS_OF_ALL_PAIRS) else [DEFAULT_PAIR]


STEPS, RESUME_AT, GLOBAL_BATCH_SIZE = 4, 2, 4
DISTILL = DistillConfig(
    steps=STEPS,
    warmup_steps=1,
    lr=1e-3,
    temperature=2.0,
    ce_weight=0.5,
    clip_grad=0.5,
    global_batch_size=GLOBAL_BATCH_SIZE,
    checkpoint_interval=RESUME_AT,
)
"""Each term of the loss and the clipping take part."""
UNTIED = ("one", "tp2-sp", "pp2-vpp2", "tp2-pp2-sp")
TRAINED = [
    (arch, layout) for arch, layout in CASES if arch == "qwen3" or (arch == "qwen2" and layout.name in UNTIED)
]
TRAINED_IDS = [f"{arch}-{layout.name}" for arch, layout in TRAINED]


def settings(layout: Layout) -> DistillConfig:
    """Return DISTILL with the microbatch size of a layout.

    Tensor and context parallel ranks communicate in each layer of each microbatch. So they get
    few large microbatches: as many as fill the pipeline.
    """
    parts = (
        layout.parallel.get("pp", 1)
        if layout.tp * layout.parallel.get("cp", 1) > 1
        else GLOBAL_BATCH_SIZE // layout.dp
    )
    return DISTILL.model_copy(update={"micro_batch_size": max(1, GLOBAL_BATCH_SIZE // layout.dp // parts)})


ONE_STEP = DISTILL.model_copy(update={"steps": 1, "warmup_steps": 0, "global_batch_size": 8})
SPLITS = {f"micro{n}": ONE_STEP.model_copy(update={"micro_batch_size": n}) for n in (1, 2, 4)}
SPLIT_LAYOUTS = ("one", "dp2", "pp2-vpp2", "tp2-dp2-sp")
OVERLAP_LAYOUTS = ("dp2", "tp2-dp2-sp", "pp2-dp2", "cp2-dp2", "pp2-vpp2")
RECOMPUTE_LAYOUTS = ("one", "tp2-dp2-sp", "pp2-vpp2")
RESUMED_LAYOUTS = (
    "one",
    "tp2-sp",
    "pp2-vpp2",
    "cp2",
    "dp2",
    "tp2-pp2-vpp2-sp",
    "tp2-dp2-sp",
    "pp2-dp2",
    "tp4-sp",
)
CORRECT = CorrectionConfig(
    **DISTILL.model_dump(include=set(TrainingConfig.model_fields) - {"steps"}), steps=2
)
"""Cross-entropy alone, without a teacher."""
MEANWHILE = CORRECT.model_copy(update={"steps": 3})
"""Runs with DISTILL, which has one more step; both stop and resume after step 2."""
MEANWHILE_LAYOUTS = ("one", "pp2-vpp2", "cp2")
"""At the other layouts with --all."""


def variants(layout: Layout) -> dict[str, DistillConfig | CorrectionConfig]:
    """Other settings of a run that must not change its numbers."""
    chosen = dict(SPLITS) if layout.name in SPLIT_LAYOUTS else {}
    for name, where in (("overlap", OVERLAP_LAYOUTS), ("recompute", RECOMPUTE_LAYOUTS)):
        if layout.name in where:
            chosen[name] = settings(layout).model_copy(update={name: True})
    if layout.name in RECOMPUTE_LAYOUTS:
        chosen["recompute one"] = settings(layout).model_copy(update={"recompute": 1})
    return {
        **chosen,
        "correct": CORRECT.model_copy(update={"micro_batch_size": settings(layout).micro_batch_size}),
    }
