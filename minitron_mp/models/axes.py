"""The prunable axes: which weight rows a unit owns, and where units are scored and masked.

Scores, plans, targets, search, masks, slicing and reports are loops over AXES. A new axis is a new
row here, and its dimensions in the table of parameters. Depth is no axis: a plan lists the layers
that stay.

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
"""Stands for the layer where all layers share an axis."""

SUBLAYERS = ("attention", "MLP")
"""Of a block, in the order in which it runs them."""

Rows = Callable[[np.ndarray, Arch, int], np.ndarray]
"""(units [k] int64, architecture, layer) -> their weight rows."""


@dataclass(frozen=True)
class Size:
    """A size of the architecture that a target or a search may set."""

    field: str
    """Of Arch or BlockArch; target and search name it alike."""
    letter: str
    """In names of search candidates."""
    unit: str
    """What it counts, in the singular."""

    @property
    def units(self) -> str:
        return self.unit + "s"


@dataclass(frozen=True)
class WeightDim:
    """A dimension of weights along an axis."""

    rows: Rows
    """Kept units, ascending -> kept rows of one copy, ascending."""
    copies: Callable[[Arch], int] = lambda arch: 1
    """How many copies of the axis lie one after the other. Megatron-Core shards each separately."""
    merged_rows: Rows | None = None
    """Units -> rows, in the order given, that take the residual of a pruned unit, if any do."""


@dataclass(frozen=True)
class LinearInput:
    """The input [s, b, units x width] of a linear layer of a block; split as the axis is."""

    module: str


@dataclass(frozen=True)
class NormOutput:
    """The output [s, b, units] of a norm of a block; sequence parallelism splits s.

    Every reader of the residual stream is a norm. Transformer Engine may keep the norm inside the
    linear layer behind it: then the module `norm` is an IdentityOp.
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
    """What is scored in each block. Scores of several probes are added. Masks apply there, too."""
    per_layer: bool = True
    """Whether each layer has its own units. Otherwise all share them, and scores are added."""
    sublayer: str = ""
    """One of SUBLAYERS, for messages."""
    split_over_tp: bool = True
    """Whether tensor parallelism splits the units. Kept ones are then exchanged between ranks."""
    aligned: bool = False
    """Whether a target keeps sizes to multiples of `align` on each rank, and may scale the axis."""
    group: Size | None = None
    """Units are ranked inside these groups, and each kept group keeps equally many."""
    width_field: str | None = None
    """Field of Arch: channels of a unit in the probed tensor. None: one."""
    outer_norms: tuple[str, ...] = ()
    """Norms of the decoder behind the blocks that read the axis: masked, not scored."""

    def layers(self, arch: Arch) -> list[int]:
        """The layers that have units of their own, or NO_LAYER alone."""
        return list(range(arch.num_layers)) if self.per_layer else [NO_LAYER]

    def num_units(self, arch: Arch, layer: int) -> int:
        return getattr(arch.blocks[layer] if self.per_layer else arch, self.size.field)

    def num_groups(self, arch: Arch, layer: int) -> int:
        """1 without groups."""
        if self.group is None:
            return 1
        return getattr(arch.blocks[layer] if self.per_layer else arch, self.group.field)

    def width(self, arch: Arch) -> int:
        """Channels of a unit in the probed tensor."""
        return 1 if self.width_field is None else getattr(arch, self.width_field)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that a target may set, groups first."""
        return (self.size,) if self.group is None else (self.group, self.size)

    @property
    def merges(self) -> bool:
        """Whether kept units may take the residual of pruned ones of their group."""
        return any(dim.merged_rows is not None for dim in self.dims.values())


def query_slots(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    """Where the queries of these heads lie among the slots of linear_qkv, in the order given."""
    per_group = arch.blocks[layer].heads_per_group
    return heads // per_group * (per_group + 2) + heads % per_group


def slot_rows(slots: np.ndarray, arch: Arch) -> np.ndarray:
    """The hn rows of each slot of one head width, in the order given."""
    return (slots[:, None] * arch.kv_channels + np.arange(arch.kv_channels)).reshape(-1)


def _same_rows(units: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return units


def _head_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return slot_rows(heads, arch)


def _query_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    return slot_rows(query_slots(heads, arch, layer), arch)


def _qkv_rows(heads: np.ndarray, arch: Arch, layer: int) -> np.ndarray:
    """Rows of the kept queries, and of the key and value of each group that keeps a head.

    A group without one goes whole. 8 heads in 2 groups:
    keep [0 3 4 5] -> slots [0 3 4 5 6 7 10 11], keep [4 5 7] -> slots [6 7 9 10 11].
    """
    per_group = arch.blocks[layer].heads_per_group
    width = per_group + 2
    key_value = np.unique(heads // per_group)[:, None] * width + [width - 2, width - 1]
    slots = np.concatenate([query_slots(heads, arch, layer), key_value.reshape(-1)])
    return slot_rows(np.sort(slots), arch)


def _gate_and_up(arch: Arch) -> int:
    """fc1 holds all gate rows, then all up rows; without a gate the up rows alone."""
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

AXIS_OF_DIM: dict[str, Axis] = {dim: axis for axis in AXES.values() for dim in axis.dims}
"""Name of a weight dimension -> its axis. Those without one (vocabulary, head width) stay whole."""
