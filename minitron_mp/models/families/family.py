"""Family: the description of a model family of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_mp.models.arch import Arch
from minitron_mp.models.families.readers import ReaderRule
from minitron_mp.models.parameters import EMBEDDING, FINAL_NORM, HEAD

CONFIG_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
"""Field of Arch -> key of config.json, with the keys of Llama."""

DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
"""Key of config.json -> default of transformers. A family overrides them in `defaults`."""

REQUIRED_SETTINGS: dict[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "hidden_act": "silu",
}
"""Key of config.json that changes the computation -> the only supported value."""

ROPE_SETTINGS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Keys of config.json with the rotary settings."""

COMPUTATION_WORDS = (
    "rope",
    "rotary",
    "theta",
    "position",
    "activation",
    "_act",
    "act_fn",
    "bias",
    "norm",
    "_eps",
    "epsilon",
    "scal",
    "multiplier",
    "logit",
    "cap",
    "clip",
    "window",
    "attn",
    "attention",
    "qk",
    "residual",
    "parallel",
    "expert",
    "moe",
    "router",
    "drop",
    "alibi",
    "softmax",
    "causal",
    "glu",
    "gated",
    "mlp_type",
    "ffn_type",
    "block_type",
)
"""Parts of the names of keys that usually change the computation. The list is not complete."""

ON_BY_DEFAULT = (
    "use_rope",
    "apply_rope",
    "use_rotary",
    "apply_rotary",
    "rotary_emb",
    "rotary_dim",
    "rotary_pct",
    "rotary_percent",
    "rope_percent",
    "use_rms",
    "use_norm",
    "apply_norm",
    "scale_attn",
    "scale_attention",
    "causal",
    "gated",
    "glu",
)
"""Name parts of switches that must stay on: every family has these features. False or 0 is rejected."""

KERNEL_SETTINGS = ("attn_implementation", "use_flash_attn", "use_flash_attention", "flash_attn")
"""Starts of the names of keys that choose a kernel of attention, and not what it computes."""

DROPOUT_WORDS = ("dropout", "pdrop")
"""Parts of the names of keys that set a dropout. This package trains without dropout, and dropout
does not change the logits, so these keys are accepted with every value and not used."""

WEIGHTS: dict[str, tuple[str, ...]] = {
    EMBEDDING: ("model.embed_tokens.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    FINAL_NORM: ("model.norm.weight",),
    HEAD: ("lm_head.weight",),
}
"""Name of a parameter -> the Hugging Face weights that hold its rows, in this order, with the names
of Llama. Names of the weights of a layer have the prefix model.layers.N.
"""


@dataclass(frozen=True)
class ExportAs:
    """Conversion of a model of one family to another family that computes the same function.

    drop: keys of config.json that the other family does not have. add: keys that it needs.
    problems: returns the reasons why a model cannot be converted.
    """

    drop: tuple[str, ...]
    add: Mapping[str, object]
    problems: Callable[[Arch], list[str]]


@dataclass(frozen=True)
class Family:
    """A model family: its names in transformers, its switches, and its rules.

    The defaults describe Llama. A family sets only the fields that differ. Supported layers:

    Norms       one before attention, one before the MLP: RMSNorm, or LayerNorm with weight 1 + w,
                where the file stores w (Nemotron). No plain LayerNorm, no norm after a sublayer.
    Biases      of q, k and v, or none. Nemotron's norms have one.
    Q/k norm    one RMSNorm of width head_dim for the heads of q and one for those of k, or none.
    Activation  SwiGLU, or squared ReLU without a gate.
    Positions   rotary, of the whole head or a part of it, unscaled or scaled as in Llama 3.
    Attention   causal, over all positions, with the scale head_dim^-1/2.
    Weights     separate q, k and v weights, separate gate and up.
    """

    name: str
    """model_type of config.json."""
    title: str
    """The vendor's name, for messages and README.md."""
    transformers_class: str
    """Class in transformers. `architectures` of config.json must be missing, or this name alone, or
    one of other_architectures alone. The export writes this name."""
    defaults: Mapping[str, Any]
    """Key of config.json -> default of transformers, in addition to DEFAULTS."""
    other_architectures: tuple[str, ...] = ()
    """Further values of `architectures` that are accepted: classes of the vendor's own code, if
    transformers loads the folder with transformers_class."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Arch that are the same for every model of the family."""
    config_fields: Mapping[str, str] = field(default_factory=lambda: CONFIG_FIELDS)
    """Field of Arch -> key of config.json. The rotary keys have the names of ROPE_SETTINGS."""
    weights: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: WEIGHTS)
    required_settings: Mapping[str, object] = field(default_factory=lambda: REQUIRED_SETTINGS)
    other_settings: tuple[str, ...] = ()
    """Accepted keys that `config_problems` checks, or that have no effect on the logits. An unlisted
    key is rejected if its name contains one of COMPUTATION_WORDS and its value is not empty, false or 0;
    for ON_BY_DEFAULT, if it is false or 0. Keys of a dropout are accepted, see DROPOUT_WORDS."""
    rope_aliases: tuple[str, ...] = ()
    """Keys of config.json that must have the value of partial_rotary_factor if they are present.
    Transformers does not read them."""
    required_rope: Mapping[str, object] = field(default_factory=lambda: {"partial_rotary_factor": 1})
    """Rotary setting -> the only supported value."""
    config_problems: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    """Returns further reasons why a config.json with its defaults is not supported."""
    layers_may_differ: bool = False
    """Whether transformers has separate sizes for each layer."""
    heads_divide_hidden: bool = False
    """Whether transformers requires that hidden_size is a multiple of num_attention_heads."""
    exports_as: Mapping[str, ExportAs] = field(default_factory=dict)
    """Name of another family -> the conversion of a model of this family to it."""
    readers: Mapping[str, ReaderRule] = field(default_factory=dict)
    """Name of a reader of exported folders -> which sizes it accepts. Readers that are not listed have
    not been tried."""

    @property
    def settings(self) -> set[str]:
        """Keys of config.json that are read or checked."""
        return {
            *self.config_fields.values(),
            *self.required_settings,
            *self.other_settings,
            *ROPE_SETTINGS,
            *self.rope_aliases,
            "original_max_position_embeddings",
            "layer_types",
        }
