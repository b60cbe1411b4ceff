"""Models of a Megatron-Bridge recipe: the pruned student, and models that Bridge has built.

student_provider                      the student, for cfg.model
load_pruned, slice_teacher            hooks that fill the student with weights
defer_head                            hook that leaves the output layer to the loss
world_of_provider, arch_of            world and sizes of a model that Bridge built
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from minitron_mp.artifacts.checkpoint import load_weights, model_state
from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.saved_model import saved_arch
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, BlockArch
from minitron_mp.models.families.family import CONFIG_FIELDS
from minitron_mp.models.layers import DeferredHead
from minitron_mp.models.sharded_model import DTYPES, ShardedModel
from minitron_mp.models.transformer_config import NORMALIZATION
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.slicing import prune

Hook = Callable[[list[Any]], list[Any]]
"""Pre-wrap hook of Bridge: chunks of an unwrapped GPTModel -> the chunks that Bridge wraps."""


def student_provider(
    folder: str | Path,
    *,
    sequence_length: int,
    precision: str = "bf16",
    api: Literal["provider", "config"] = "provider",
) -> Any:
    """Return the cfg.model of a recipe: a pruned or distilled model, which Bridge builds and loads.

    folder: sharded checkpoint of `minitron-mp` or examples/bridge_prune.py, saved in any layout.

    Set parallel sizes on the result as on any other provider. Hooks that you add run after the
    hooks of this function. InputError when Bridge is not installed, or does not have this api.
    """
    arch = saved_arch(Path(folder))
    config = json.loads((Path(folder) / ASSETS / "config.json").read_text(encoding="utf-8"))
    bridge = auto_bridge(pruned_config(config, arch))
    if api == "config" and not hasattr(bridge, "get_model_config"):
        raise InputError(
            "this Megatron-Bridge has no AutoBridge.get_model_config(); use api='provider' or a newer Bridge"
        )
    model = bridge.get_model_config() if api == "config" else bridge.to_megatron_provider(load_weights=False)
    return prepare(
        model, arch, sequence_length=sequence_length, precision=precision, weights=load_pruned(folder)
    )


def prepare(model: Any, arch: Arch, *, sequence_length: int, precision: str, weights: Hook) -> Any:
    """Set a provider or ModelConfig up for the student, with the hook that loads it; return it."""
    # Padded as in the checkpoints, so that student and teacher have the same columns on a rank.
    model.vocab_size, model.should_pad_vocab = arch.padded_vocab_size, False
    model.seq_length = sequence_length
    model.params_dtype = model.pipeline_dtype = DTYPES[precision]
    model.bf16, model.fp16 = precision == "bf16", False
    # The loss adds the head's gradient to main_grad in the forward pass. A later factor would not
    # scale it.
    model.calculate_per_token_loss = True
    add_pre_wrap_hook(model, weights)
    add_pre_wrap_hook(model, defer_head)
    return model


def add_pre_wrap_hook(model: Any, hook: Hook) -> None:
    """Register a hook on a provider (Bridge 0.6) or a ModelConfig (Bridge's main branch)."""
    if hasattr(model, "register_pre_wrap_hook"):
        model.register_pre_wrap_hook(hook)
    elif hasattr(model, "pre_wrap_hooks"):
        model.pre_wrap_hooks.append(hook)
    else:
        raise InputError(
            f"{type(model).__name__} takes no pre-wrap hooks; give a Megatron-Bridge provider or ModelConfig"
        )


def load_pruned(folder: str | Path) -> Hook:
    """Return a hook that loads the chunks from a sharded checkpoint of any layout."""

    def fill(chunks: list[Any]) -> list[Any]:
        load_weights(chunks, Path(folder), world_of_provider(chunks))
        return chunks

    return fill


def slice_teacher(teacher: Callable[[], list[Any]], plan: PrunePlan) -> Hook:
    """Return a hook that fills the chunks with slices of a teacher, without a checkpoint on disk.

    teacher(): returns the teacher's chunks, unwrapped, in the student's layout. They cannot be used
    afterwards. The hook runs on all ranks. InputError when the plan drops layers and pp is above 1,
    because layers would move to other ranks, which needs a checkpoint (pruning.slicing.prune,
    artifacts.checkpoint.save_checkpoint, then load_pruned).
    """

    def fill(chunks: list[Any]) -> list[Any]:
        world = world_of_provider(chunks)
        if plan.student.num_layers < plan.teacher.num_layers and world.parallel.pp > 1:
            raise InputError(
                f"the plan drops layers and pp is {world.parallel.pp}, so layers would move between stages; "
                "save the pruned model as a checkpoint and use load_pruned()"
            )
        student = prune(sharded_model(teacher(), plan.teacher), plan)
        kept = {(tensor.key, tensor.global_offset): tensor for tensor in student.values()}
        with torch.no_grad():
            for state in model_state(chunks, world).values():
                for entry in state.values():
                    for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                        part.data.copy_(kept.pop((part.key, part.global_offset)).data)
        assert not kept, list(kept)
        return chunks

    return fill


def defer_head(chunks: list[Any]) -> list[Any]:
    """Replace the output layer, so that the loss applies it. This is a hook.

    The last stage then returns hidden states [b, s', h] after the final norm. The keys of
    checkpoints do not change. s' is s/cp, or s/cp/tp under sequence parallelism.
    """
    chunk = chunks[-1]
    if chunk.post_process:
        chunk.output_layer = DeferredHead.replacing(chunk.output_layer, chunk.config, chunk.pg_collection.tp)
    return chunks


def world_of_provider(chunks: Sequence[Any]) -> World:
    """Return layout, process groups and device of a model that Bridge built, wrapped or not."""
    inner = bare_model(chunks[0])
    c = inner.config
    vpp = c.virtual_pipeline_model_parallel_size
    layout = ParallelConfig(
        tp=c.tensor_model_parallel_size,
        pp=c.pipeline_model_parallel_size,
        cp=c.context_parallel_size,
        vpp=vpp,
        sequence_parallel=c.sequence_parallel,
    )
    return World(layout, inner.pg_collection, next(inner.parameters()).device)


def sharded_model(chunks: list[Any], arch: Arch, sequence_length: int | None = None) -> ShardedModel:
    """Return a model that Bridge built, wrapped or not, as input of score(), prune() and masked().

    sequence_length: tokens of a sample; default: the model's maximum.
    """
    inner = bare_model(chunks[0])
    precision = "bf16" if inner.config.params_dtype == torch.bfloat16 else "fp32"
    length = sequence_length or inner.max_sequence_length
    return ShardedModel(chunks, arch, world_of_provider(chunks), length, precision)


def bare_model(model: Any) -> Any:
    """Return the GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def has_float16_module(model: Any) -> bool:
    """Return whether Float16Module wraps the GPTModel. By default it casts the model's output."""
    while hasattr(model, "module"):
        if hasattr(model, "float16_convertor"):
            return True
        model = model.module
    return False


def arch_of(model: Any, config: dict[str, Any]) -> Arch:
    """Return the sizes of a provider or ModelConfig, of any family that Bridge maps.

    config: content of the Hugging Face config.json. The result is enough to score, plan and prune.
    build_model() needs more, and supports the families of models/families only. InputError for
    experts and other parts that the table of axes does not have.
    """
    problems = [
        f"{name} is {value}"
        for name in ("num_moe_experts", "mtp_num_layers", "multi_latent_attention")
        if (value := getattr(model, name, None))
    ]
    norms = {name: norm for norm, name in NORMALIZATION.items()}
    if model.normalization not in norms:
        problems.append(f"normalization is {model.normalization}; supported: {', '.join(norms)}")
    refuse("only dense decoders can be pruned; give another model:", problems)
    block = BlockArch(
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
    )
    return Arch(
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        tied=model.share_embeddings_and_output_weights,
        qkv_bias=model.add_qkv_bias,
        qk_norm=model.qk_layernorm,
        norm=norms[model.normalization],
        activation="swiglu" if model.gated_linear_unit else "squared_relu",
        norm_epsilon=model.layernorm_epsilon,
        hidden_size=model.hidden_size,
        kv_channels=model.kv_channels,
        blocks=(block,) * model.num_layers,
    )


def auto_bridge(config: dict[str, Any]) -> Any:
    """Return the AutoBridge of a config.json. config: its content."""
    try:
        from megatron.bridge import AutoBridge
        from megatron.bridge.models.conversion.param_mapping import AutoMapping
    except ImportError as error:
        raise InputError(
            f"megatron.bridge cannot be imported ({error}); install Megatron-Bridge "
            "(docs/megatron_bridge.md), or use `minitron-mp compress`, which does not need it"
        ) from error
    from transformers import AutoConfig

    AutoMapping.register_module_type(DeferredHead.__name__, "column")
    fields = {name: value for name, value in config.items() if name != "model_type"}
    return AutoBridge.from_hf_config(AutoConfig.for_model(config["model_type"], **fields))


def pruned_config(config: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """Return config.json with the student's sizes, for families with the field names of Llama.

    For other families edit a copy of config.json yourself.
    """
    sizes = {CONFIG_FIELDS[name]: getattr(arch, name) for name in (*arch.sizes(), "kv_channels")}
    refuse(
        "this config.json does not have the field names of Llama; edit a copy of it yourself:",
        [f"{name} is missing" for name in sizes if name not in config and name != "head_dim"],
    )
    types = config.get("layer_types")
    return {**config, **sizes, **({"layer_types": types[: arch.num_layers]} if types else {})}
