"""Inside a Megatron-Bridge recipe: our pruned student, teacher and loss in Bridge's pretrain(), scores of a model that Bridge built, and export.

The only file that imports megatron.bridge, and only when a function that needs it is called. Bridge has two ways to say what a model
is, and both end in chunks of megatron-core's GPTModel; a hook on these chunks, before they are wrapped, is all that we add:

    provider   0.6: AutoBridge.to_megatron_provider(), hooks by register_pre_wrap_hook()
    config     main: AutoBridge.get_model_config(), hooks in the list pre_wrap_hooks; Bridge 0.6 trains such a config, too

    cfg.model = bridge.student("out/student", sequence_length=4096)
    step = bridge.KDForwardStep(bridge.BesideStudent("out/teacher"), vocab_size=...)
    bridge.check(cfg, step)
    pretrain(cfg, step, callbacks=[step])

s sequence  b microbatch  h hidden  v padded vocabulary; s' is s/cp, under sequence parallelism s/cp/tp
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from minitron_mp.artifacts.checkpoint import load_model, model_state
from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import DTYPES
from minitron_mp.models.layers import DeferredHead
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.pruning.slicing import prune
from minitron_mp.workflow.context import ASSETS

Hook = Callable[[list[Any]], list[Any]]
"""Chunks of a bare GPTModel -> the chunks that are wrapped; what Bridge calls a pre-wrap hook."""

BRIDGE = (
    "install Megatron-Bridge (docs/bridge.md says how), or work without it: `minitron-mp compress` needs none"
)


# ---- the student -------------------------------------------------------------------------------------------------------------------
def student_provider(
    folder: str | Path,
    *,
    sequence_length: int,
    precision: str = "bf16",
    api: Literal["provider", "config"] = "provider",
) -> Any:
    """What a recipe's cfg.model is set to: the pruned (or distilled) model of an artefact folder, which fills itself when Bridge builds it.

    The folder is a sharded checkpoint that `minitron-mp` or examples/bridge_prune.py left; any layout loads it. Parallel sizes are set on the
    result as on any other provider; hooks on it run after ours. InputError when Bridge is absent, or has not this api.
    """
    arch = _arch_in(Path(folder))
    bridge = auto_bridge(pruned_config(json.loads((Path(folder) / ASSETS / "config.json").read_text()), arch))
    if api == "config" and not hasattr(bridge, "get_model_config"):
        raise InputError(
            "this Megatron-Bridge has no AutoBridge.get_model_config(); use api='provider', or a newer Bridge"
        )
    model = bridge.get_model_config() if api == "config" else bridge.to_megatron_provider(load_weights=False)
    return prepare(
        model, arch, sequence_length=sequence_length, precision=precision, weights=load_pruned(folder)
    )


def prepare(model: Any, arch: Arch, *, sequence_length: int, precision: str, weights: Hook) -> Any:
    """Set on a provider or ModelConfig what our student needs, and the hook that fills it; returns it."""
    # Padded as our checkpoints are, at every tp, so that student and teacher have the same columns on a rank.
    model.vocab_size, model.should_pad_vocab = arch.padded_vocab_size, False
    model.seq_length = sequence_length
    model.params_dtype = model.pipeline_dtype = DTYPES[precision]
    model.bf16, model.fp16 = precision == "bf16", False
    # The loss adds the head's gradient to main_grad as it goes: a factor that comes later would be too late.
    model.calculate_per_token_loss = True
    add_pre_wrap_hook(model, weights)
    add_pre_wrap_hook(model, defer_head)
    return model


def add_pre_wrap_hook(model: Any, hook: Hook) -> None:
    """Register a hook on a provider (Bridge 0.6) or a ModelConfig (main)."""
    if hasattr(model, "register_pre_wrap_hook"):
        model.register_pre_wrap_hook(hook)
    elif hasattr(model, "pre_wrap_hooks"):
        model.pre_wrap_hooks.append(hook)
    else:
        raise InputError(
            f"{type(model).__name__} takes no pre-wrap hooks; give a provider of Megatron-Bridge or a ModelConfig"
        )


def load_pruned(folder: str | Path) -> Hook:
    """A hook that fills the chunks from a sharded checkpoint of any layout; reached by all ranks."""

    def fill(chunks: list[Any]) -> list[Any]:
        load_model(chunks, Path(folder), world_of_provider(chunks))
        return chunks

    return fill


def slice_teacher(teacher: Callable[[], list[Any]], plan: PrunePlan) -> Hook:
    """A hook that fills the chunks with what the plan keeps of a teacher, with nothing on disk between; reached by all ranks.

    teacher(): its chunks, unwrapped, in the student's layout; they are consumed. InputError where layers go and pp is above 1: a layer
    would change its rank, which only a checkpoint does (`slicing.prune`, `checkpoint.save`, then load_pruned).
    """

    def fill(chunks: list[Any]) -> list[Any]:
        world = world_of_provider(chunks)
        if plan.student.num_layers < plan.teacher.num_layers and world.parallel.pp > 1:
            raise InputError(
                f"the plan drops layers, and pp is {world.parallel.pp}: layers would move between stages; prune to a checkpoint, and load that"
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
    """A hook: the last stage returns hidden states [b, s', h] after the final norm, and the loss applies the head; checkpoint keys stay."""
    chunk = chunks[-1]
    if chunk.post_process:
        chunk.output_layer = DeferredHead.taking_over(
            chunk.output_layer, chunk.config, chunk.pg_collection.tp
        )
    return chunks


# ---- models that Bridge built ------------------------------------------------------------------------------------------------------
def world_of_provider(chunks: Sequence[Any]) -> World:
    """Layout, process groups and device of a model that Bridge built, wrapped or not."""
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
    """A model that Bridge built, wrapped or not, as score(), prune() and masked() take it.

    sequence_length: tokens of a sample; default: the most that the model takes.
    """
    inner = bare_model(chunks[0])
    precision = "bf16" if inner.config.params_dtype == torch.bfloat16 else "fp32"
    length = sequence_length or inner.max_sequence_length
    return ShardedModel(chunks, arch, world_of_provider(chunks), length, precision)


def bare_model(model: Any) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def arch_of(model: Any, config: dict[str, Any]) -> Arch:
    """Sizes of a provider or ModelConfig, of any family that Bridge maps. config: the Hugging Face config.json.

    Enough to score, plan and prune. How its activations and positions work is Bridge's business: build_model() makes no such model unless
    hf.py maps the family. InputError for experts, and for what keeps states beside the table of axes.
    """
    problems = [
        f"{name} is {value}"
        for name in ("num_moe_experts", "mtp_num_layers", "multi_latent_attention")
        if (value := getattr(model, name, None))
    ]
    refuse("only dense decoders are pruned:", problems)
    return Arch(
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        tied=model.share_embeddings_and_output_weights,
        qkv_bias=model.add_qkv_bias,
        qk_norm=model.qk_layernorm,
        norm="rms" if model.normalization == "RMSNorm" else "layer1p",
        activation="swiglu" if model.gated_linear_unit else "squared_relu",
        norm_epsilon=model.layernorm_epsilon,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        **{
            name: getattr(model, name)
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
        },
    )


def auto_bridge(config: dict[str, Any]) -> Any:
    """AutoBridge.from_hf_config of a config.json."""
    try:
        from megatron.bridge import AutoBridge
        from megatron.bridge.models.conversion.param_mapping import AutoMapping
    except ImportError as error:
        raise InputError(f"megatron.bridge cannot be imported ({error}); {BRIDGE}") from error
    from transformers import AutoConfig

    AutoMapping.register_module_type(DeferredHead.__name__, "column")
    known = {name: value for name, value in config.items() if name != "model_type"}
    return AutoBridge.from_hf_config(AutoConfig.for_model(config["model_type"], **known))


def _arch_in(folder: Path) -> Arch:
    found = find_manifest(folder)
    if found is None or found.arch is None:
        raise InputError(
            f"{folder} is no model of minitron-mp; `minitron-mp import` and `minitron-mp prune` leave some"
        )
    return found.arch


def pruned_config(config: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """The teacher's config.json with the student's sizes, for families that name them as Llama does; others: change your own copy."""
    names = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
    }
    sizes = {
        names.get(name, name): getattr(arch, name) for name in (*names, "hidden_size", "num_attention_heads")
    }
    refuse(
        "this config.json names its sizes in another way:",
        [f"{name} is missing" for name in sizes if name not in config and name != "head_dim"],
    )
    types = config.get("layer_types")
    return {**config, **sizes, **({"layer_types": types[: arch.num_layers]} if types else {})}
