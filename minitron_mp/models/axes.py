"""The prunable axes: the weight rows of each unit, and the modules that are scored and masked.

Scores, plans, targets, search, masks, slicing and reports are loops over AXES. A new axis needs a
row in this table, and its dimensions in the table of parameters. Depth is not an axis: a plan lists
the kept layers.

    h hidden  f ffn  np heads  ng query groups  hn head width

The rows of linear_qkv are interleaved by query group. 4 heads in 2 groups are the slots
    q0 q1 k0 v0  q2 q3 k1 v1        each of hn rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from minitron_mp.models.arch import Arch

NO_LAYER = -1
"""Layer number of an axis that all layers share."""

SUBLAYERS = ("attention", "MLP")
"""Sublayers of a block, in the order of the forward pass."""

Rows = Callable[[np.ndarray, Arch, int], np.ndarray]
"""(units [k] int64, architecture, layer) -> their weight rows."""


@dataclass(frozen=True)
class Size:
    """A size of the architecture that a target or a search may set."""

    field: str
    """Field of Arch or BlockArch. The sections target and search use the same name."""
    letter: str
    """Abbreviation in names of search candidates."""
    unit: str
    """Name of the counted unit, in the singular."""

    @property
    def units(self) -> str:
        return self.unit + "s"


@dataclass(frozen=True)
class WeightDim:
    """A dimension of weights along an axis."""

    rows: Rows
    """Kept units, ascending -> kept rows of one copy, ascending."""
    copies: Callable[[Arch], int] = lambda arch: 1
    """Number of copies of the axis in the dimension. Megatron-Core shards each copy separately."""
    merged_rows: Rows | None = None
    """Units -> rows that receive the residual of a pruned unit, in the order of the units. None if
    residuals are not merged."""


@dataclass(frozen=True)
class LinearInput:
    """The input [s, b, units x width] of a linear layer of a block, split like the axis."""

    module: str


@dataclass(frozen=True)
class NormOutput:
    """The output [s, b, units] of a norm of a block; sequence parallelism splits s.

    Only norms read the residual stream. Transformer Engine may fuse the norm into the linear layer
    that follows. Then the module `norm` is an IdentityOp.
    """

    norm: str
    linear: str


@dataclass(frozen=True, eq=False)
class Axis:
    """One prunable axis."""

    name: str
    """Key in scores and plans."""
    size: Size
    dims: Mapping[str, WeightDim]
    """Name of a weight dimension in the table of parameters -> its rows."""
    probes: tuple[LinearInput | NormOutput, ...]
    """Tensors of each block that are scored and masked. Scores of several probes are added."""
    per_layer: bool = True
    """Whether each layer has separate units. Otherwise layers share them, and scores are added."""
    sublayer: str = ""
    """One of SUBLAYERS, for messages."""
    split_over_tp: bool = True
    """Whether tensor parallelism splits the units. Then ranks exchange kept units after slicing."""
    aligned: bool = False
    """Whether a target rounds the size to multiples of `align` on each rank, and may scale it."""
    group: Size | None = None
    """Groups inside which units are ranked. Each kept group keeps the same number of units."""
    width_field: str | None = None
    """Field of Arch: channels of a unit in the probed tensor. None: one channel."""
    outer_norms: tuple[str, ...] = ()
    """Norms of the decoder outside the blocks that read the axis. They are masked, not scored."""

    def layers(self, arch: Arch) -> list[int]:
        """Return the layers that have separate units, or [NO_LAYER] if layers share the units."""
        return list(range(arch.num_layers)) if self.per_layer else [NO_LAYER]

    def num_units(self, arch: Arch, layer: int) -> int:
        return getattr(arch.blocks[layer] if self.per_layer else arch, self.size.field)

    def num_groups(self, arch: Arch, layer: int) -> int:
        """Return the number of groups of a layer, 1 without groups."""
        if self.group is None:
            return 1
        return getattr(arch.blocks[layer] if self.per_layer else arch, self.group.field)

    def width(self, arch: Arch) -> int:
        """Return the number of channels of a unit in the probed tensor."""
        return 1 if self.width_field is None else getattr(arch, self.width_field)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that a target may set, groups first."""
        return (self.size,) if self.group is None else (self.group, self.size)

    @property
    def merges(self) -> bool:
        """Whether kept units may receive the residual of pruned units of their group."""
        return any(dim.merged_rows is not None for dim in self.dims.values())


def query_slots(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    """Return the slots of linear_qkv that hold the queries of these heads, in the same order."""
    per_group = arch.blocks[layer].heads_per_group
    return heads // per_group * (per_group + 2) + heads % per_group


def slot_rows(slots: np.ndarray, arch: Arch) -> np.ndarray:
    """Return the hn rows of each slot, in the order of the slots."""
    return (slots[:, None] * arch.kv_channels + np.arange(arch.kv_channels)).reshape(-1)


def _same_rows(units: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return units


def _head_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return slot_rows(heads, arch)


def _query_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return slot_rows(query_slots(heads, arch, layer), arch)


def _qkv_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    """Return the rows of the kept queries, and of key and value of each group with a kept head.

    A group without a kept head is dropped. 8 heads in 2 groups:
    keep [0 3 4 5] -> slots [0 3 4 5 6 7 10 11], keep [4 5 7] -> slots [6 7 9 10 11].
    """
    per_group = arch.blocks[layer].heads_per_group
    width = per_group + 2
    key_value = np.unique(heads // per_group)[:, None] * width + [width - 2, width - 1]
    slots = np.concatenate([query_slots(heads, arch, layer), key_value.reshape(-1)])
    return slot_rows(np.sort(slots), arch)


def _gate_and_up(arch: Arch) -> int:
    """Return 2 if linear_fc1 holds gate rows and then up rows, 1 if it holds up rows only."""
    return 2 if arch.gated else 1


HIDDEN = Axis(
    name="hidden",
    size=Size("hidden_size", "h", "hidden channel"),
    dims={"hidden": WeightDim(_same_rows)},
    probes=(
        NormOutput("input_layernorm", "self_attention.linear_qkv"),
        NormOutput("pre_mlp_layernorm", "mlp.linear_fc1"),
    ),
    per_layer=False,
    split_over_tp=False,
    aligned=True,
    outer_norms=("final_layernorm",),
)
"""Channels of the residual stream."""

FFN = Axis(
    name="ffn",
    size=Size("ffn_hidden_size", "f", "neuron"),
    dims={"ffn": WeightDim(_same_rows), "gate_up": WeightDim(_same_rows, copies=_gate_and_up)},
    probes=(LinearInput("mlp.linear_fc2"),),
    sublayer="MLP",
    aligned=True,
)

HEADS = Axis(
    name="heads",
    size=Size("num_attention_heads", "a", "head"),
    dims={"heads": WeightDim(_head_rows), "qkv": WeightDim(_qkv_rows, merged_rows=_query_rows)},
    probes=(LinearInput("self_attention.linear_proj"),),
    sublayer="attention",
    group=Size("num_query_groups", "g", "query group"),
    width_field="kv_channels",
)

AXES: dict[str, Axis] = {axis.name: axis for axis in (HIDDEN, FFN, HEADS)}

*STEPPED, SOLVED = (axis for axis in AXES.values() if axis.aligned)
"""The axes that a budget reduces, in the order of the table. Sizes of all but the last are tried in
steps. No export rule limits the last one, so its size is computed from the budget."""

AXIS_OF_DIM: dict[str, Axis] = {dim: axis for axis in AXES.values() for dim in axis.dims}
"""Name of a weight dimension -> its axis. Dimensions without an axis (vocabulary, head width) are
not pruned."""
