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
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from minitron_mp import artifact, checkpoint, hf
from minitron_mp.arch import Arch, layout_problems
from minitron_mp.errors import InputError, refuse
from minitron_mp.job import ASSETS
from minitron_mp.losses import Objective, TeacherHidden, distillation_loss
from minitron_mp.losses import Teacher as Target
from minitron_mp.model import DTYPES, DeferredHead, output_weight
from minitron_mp.parallel import World
from minitron_mp.plan import PrunePlan
from minitron_mp.precision import silently_wrong
from minitron_mp.schedule import Batch, local_batch
from minitron_mp.sections import Parallel
from minitron_mp.slicing import prune
from minitron_mp.teacher import frozen_model

Hook = Callable[[list[Any]], list[Any]]
"""Chunks of a bare GPTModel -> the chunks that are wrapped; what Bridge calls a pre-wrap hook."""
BRIDGE = (
    "install Megatron-Bridge (docs/bridge.md says how), or work without it: `minitron-mp compress` needs none"
)


# ---- the student -------------------------------------------------------------------------------------------------------------------


def student(
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
        checkpoint.load_model(chunks, Path(folder), world_of(chunks))
        return chunks

    return fill


def slice_teacher(teacher: Callable[[], list[Any]], plan: PrunePlan) -> Hook:
    """A hook that fills the chunks with what the plan keeps of a teacher, with nothing on disk between; reached by all ranks.

    teacher(): its chunks, unwrapped, in the student's layout; they are consumed. InputError where layers go and pp is above 1: a layer
    would change its rank, which only a checkpoint does (`slicing.prune`, `checkpoint.save`, then load_pruned).
    """

    def fill(chunks: list[Any]) -> list[Any]:
        world = world_of(chunks)
        if plan.student.num_layers < plan.teacher.num_layers and world.parallel.pp > 1:
            raise InputError(
                f"the plan drops layers, and pp is {world.parallel.pp}: layers would move between stages; prune to a checkpoint, and load that"
            )
        kept = {
            (tensor.key, tensor.global_offset): tensor for tensor in prune(teacher(), plan, world).values()
        }
        with torch.no_grad():
            for state in checkpoint.model_state(chunks, world).values():
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


def world_of(chunks: Sequence[Any]) -> World:
    """Layout, process groups and device of a model that Bridge built, wrapped or not; what importance.score and slicing.prune take."""
    inner = bare(chunks[0])
    c = inner.config
    vpp = c.virtual_pipeline_model_parallel_size
    layout = Parallel(
        tp=c.tensor_model_parallel_size,
        pp=c.pipeline_model_parallel_size,
        cp=c.context_parallel_size,
        vpp=vpp,
        sequence_parallel=c.sequence_parallel,
    )
    return World(layout, inner.pg_collection, next(inner.parameters()).device)


def bare(model: Any) -> Any:
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


def export(
    chunks: list[Any], config: dict[str, Any], folder: str | Path, *, source: str | Path | None = None
) -> None:
    """Write the chunks as a Hugging Face folder through Bridge's mapping of its family; reached by all ranks, rank 0 writes.

    config: config.json of this very model (pruned_config()). source: folder whose tokenizer and other small files belong to it.
    """
    bridge, folder = auto_bridge(config), Path(folder)
    inner = [bare(chunk) for chunk in chunks]
    tensors = bridge.export_hf_weights(inner, cpu=True, show_progress=False)
    padded = inner[0].vocab_size, inner[0].config.hidden_size

    def own_rows(name: str, tensor: Tensor) -> Tensor:
        """Embedding and head without the padding of the vocabulary, which Bridge leaves on."""
        return tensor[: config["vocab_size"]] if tensor.shape == padded and ".layers." not in name else tensor

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        hf.copy_assets(Path(source) if source else None, folder, config)
        hf.write_weights(
            folder, ((name, own_rows(name, tensor)) for name, tensor in tensors), inner[0].config.params_dtype
        )
    for _ in tensors:  # the export is collective: the other ranks walk it to the end
        pass
    dist.barrier()


# ---- the teacher -------------------------------------------------------------------------------------------------------------------


class BesideStudent:
    """A frozen teacher on the student's ranks, in the student's layout: each stage runs its part just before the student's part of a microbatch.

    Its hidden states travel from stage to stage in a process group of their own (in the student's, NCCL would match them with the student's by
    order alone). What a stage has sent is held until it is received, of pp microbatches at most.
    """

    def __init__(self, folder: str | Path, *, precision: str = "bf16"):
        self.folder, self.precision, self.arch = Path(folder), precision, _arch_in(Path(folder))
        self.sent: deque[tuple[Any, Tensor]] = deque()
        self.chunk: Any = None
        self.group: Any = None

    def start(self, world: World, sequence_length: int) -> None:
        """Load it; reached by all ranks."""
        self.world = world
        (self.chunk,) = frozen_model(
            self.arch, self.folder, world, precision=self.precision, sequence_length=sequence_length
        )
        mine: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(mine, dist.get_process_group_ranks(world.groups.pp))
        for ranks in sorted(map(list, set(map(tuple, mine)))) if world.parallel.pp > 1 else []:
            group = dist.new_group(ranks)
            self.group = group if dist.get_rank() in ranks else self.group

    def signal(self, batch: Batch, student: Any) -> Tensor | None:
        """Hidden states [s', b, h_t] after the final norm on the last stage, None elsewhere; called by every stage before the student's forward pass."""
        stage, last = self.world.groups.pp.rank(), self.world.parallel.pp - 1
        if stage:
            rows = (
                student.decoder.input_tensor
            )  # [s', b, h_s]: the student's, which Megatron's schedule has set
            received = torch.empty(
                (*rows.shape[:2], self.arch.hidden_size), dtype=DTYPES[self.precision], device=rows.device
            )
            dist.recv(received, group=self.group, group_src=stage - 1)
            self.chunk.set_input_tensor([received])
        with torch.no_grad():
            output = self.chunk(batch.get("tokens"), batch.get("position_ids"), None)
        if stage == last:
            return output.transpose(0, 1)
        while len(self.sent) >= self.world.parallel.pp:
            self.sent.popleft()[0].wait()
        self.sent.append((dist.isend(output, group=self.group, group_dst=stage + 1), output))
        return None

    def target(self, signal: Tensor) -> Target:
        return TeacherHidden(signal, output_weight(self.chunk))

    def done(self, signal: Any) -> None:
        """The loss is done with it."""

    def end_step(self) -> None:
        while self.sent:
            self.sent.popleft()[0].wait()

    def close(self) -> None:
        """Give its memory back."""
        self.chunk = None


class Streamed:
    """A teacher on ranks of its own, with a layout of its own, as stream.py brings it. source: teacher.RemoteTeacher, which knows the payload.

    The job is one of parallel.roles(), so Bridge's default process group is the student's; docs/bridge.md has what that takes. Evaluation inside
    pretrain() has no teacher then: its microbatches are not among those that the teacher serves.
    """

    def __init__(self, source: Any, arch: Arch, first_microbatch: int = 0):
        self.source, self.arch, self.count = source, arch, first_microbatch

    def start(self, world: World, sequence_length: int) -> None:
        self.world = world

    def signal(self, batch: Batch, student: Any) -> int | None:
        """Id of the microbatch, counted from the first of this data parallel rank; None in evaluation."""
        if not torch.is_grad_enabled():
            return None
        dp, self.count = self.world.groups.dp, self.count + 1
        return (self.count - 1) * dp.size() + dp.rank()

    def target(self, signal: int) -> Target:
        return self.source.target(signal)

    def done(self, signal: int) -> None:
        self.source.release(signal)

    def end_step(self) -> None: ...

    def close(self) -> None:
        self.source.close()


# ---- training ----------------------------------------------------------------------------------------------------------------------


class KDForwardStep:
    """Forward step and callbacks of pretrain(cfg, step, callbacks=[step]): distils into a student() from a teacher.

    The loss is losses.distillation_loss, vocabulary-parallel and in chunks of tokens; the model's own cross-entropy does not run. vocab_size:
    without padding. Bridge logs "kd loss" (what is optimised), "kl" and "lm loss", means over tokens; and the teacher is loaded when training
    starts and dropped after the last evaluation.
    """

    def __init__(
        self,
        teacher: BesideStudent | Streamed,
        *,
        vocab_size: int,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        logits_precision: str = "fp32",
    ):
        self.teacher, self.vocab_size = teacher, vocab_size
        self.objective = Objective(divergence, temperature, kl_weight, ce_weight, DTYPES[logits_precision])
        self.world: World | None = None
        self.trained = False

    def __call__(
        self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable]:
        """(output, loss function): Bridge's forward step; Bridge binds the first argument, its GlobalState."""
        if self.world is None:
            raise InputError(
                "the step was not told that training starts: give it to pretrain() among the callbacks, too: callbacks=[step]"
            )
        assert not return_schedule_plan, (
            "check() refuses the overlap of expert communication, which alone asks for a schedule plan"
        )
        world, student, batch = self.world, bare(model), {}
        if world.is_first_stage or world.is_last_stage:  # Bridge reads no data elsewhere
            raw = next(data_iterator)
            if raw.get("cu_seqlens") is not None or raw.get("cu_seqlens_q") is not None:
                raise InputError(
                    "this data set packs several sequences into one (cu_seqlens); set the packing of cfg.dataset off"
                )
            batch = local_batch(
                {key: raw[key] for key in ("tokens", "labels", "loss_mask", "position_ids")}, world
            )
        signal = self.teacher.signal(batch, student)
        cast = {"fp32_output": False} if _in_half(model) else {}  # or the hidden states would come in float32
        output = model(batch.get("tokens"), batch.get("position_ids"), None, **cast)
        return output, partial(
            self._loss,
            model=model,
            batch=batch,
            signal=signal,
            check_nan=state.cfg.rerun_state_machine.check_for_nan_in_loss,
        )

    def _loss(
        self, output: Tensor, *, model: Any, batch: Batch, signal: Any, check_nan: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum over tokens, tokens, name -> [sum, tokens]) of a microbatch on the last stage; Bridge adds them over ranks and divides."""
        assert self.world is not None
        student, hidden, mask = bare(model), output.transpose(0, 1), batch["loss_mask"]
        weight = output_weight(student)
        tied_here = (
            student.share_embeddings_and_output_weights and student.pre_process
        )  # then the embedding's gradient comes last, and tells
        if torch.is_grad_enabled() and model.ddp_config.overlap_grad_reduce and not tied_here:
            # The loss adds the weight's gradient to its main_grad; this tells the wrapper, which waits for all of a bucket.
            hidden.register_hook(lambda _: model.param_to_bucket_group[weight].register_grad_ready(weight))
        target = self.teacher.target(signal) if signal is not None else None
        objective = (
            self.objective
            if target is not None
            else Objective(kl_weight=0.0, ce_weight=1.0, logits_dtype=self.objective.logits_dtype)
        )
        place = {"vocab_size": self.vocab_size, "group": self.world.groups.tp}
        total, per_token = distillation_loss(
            hidden, weight, batch["labels"], mask, target, objective, **place
        )
        if signal is not None:
            self.teacher.done(signal)
        if check_nan and not torch.isfinite(total):
            raise InputError(
                f"the loss is {total.item()} on {self.world.coordinates}; lower the learning rate, or use params_dtype float32"
            )
        tokens = mask.sum()
        sums = dict(zip(("kd loss", "kl", "lm loss"), (per_token * mask).sum((1, 2))))
        if target is None:
            sums = {"lm loss": sums["lm loss"]}
        return (
            total,
            tokens.to(torch.int32),
            {name: torch.stack([value, tokens.to(value.dtype)]) for name, value in sums.items()},
        )

    # Bridge's callback manager takes any object by the names of its events.
    def on_train_start(self, context: Any) -> None:
        # Not in check(): Bridge fills these settings in from others on its way here.
        wrong = [
            text
            for chunk in context.model
            if hasattr(chunk, "ddp_config")
            for text in silently_wrong(chunk.config, chunk.ddp_config)
        ]
        refuse("this model would be trained wrongly:", list(dict.fromkeys(wrong)))
        self.world = world_of(context.model)
        self.teacher.start(self.world, context.state.cfg.model.seq_length)

    def on_train_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_eval_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_test_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_train_end(self, context: Any) -> None:
        self.trained = True
        if not (context.state.train_state.do_valid or context.state.train_state.do_test):
            self.teacher.close()

    def on_eval_end(self, context: Any) -> None:
        if self.trained and not context.state.train_state.do_test:
            self.teacher.close()

    def on_test_end(self, context: Any) -> None:
        self.teacher.close()


def check(cfg: Any, step: KDForwardStep) -> None:
    """InputError with everything in a ConfigContainer that does not fit distillation by this step; call it when all overrides are in.

    What Bridge checks by itself (its own divisibility, its own files) is left to Bridge. No rank communicates.
    """
    m, teacher = cfg.model, step.teacher.arch
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    own = isinstance(step.teacher, BesideStudent)
    found = [
        (
            m.vocab_size != teacher.padded_vocab_size,
            f"model.vocab_size is {m.vocab_size}, the teacher's, padded, is {teacher.padded_vocab_size}; take cfg.model from student()",
        ),
        (
            m.should_pad_vocab,
            "model.should_pad_vocab is true: the columns of student and teacher would differ; set it to False",
        ),
        (
            step.vocab_size != teacher.vocab_size,
            f"vocab_size of the step is {step.vocab_size}, the teacher's {teacher.vocab_size}; student and teacher need one tokenizer",
        ),
        (
            getattr(cfg.tokenizer, "use_tokenizer_vocab_size", False),
            "tokenizer.use_tokenizer_vocab_size would replace the student's vocabulary; set it to False",
        ),
        (
            not m.calculate_per_token_loss,
            "model.calculate_per_token_loss is False; the loss is a mean over tokens: set it to True",
        ),
        (
            cfg.ddp.average_in_collective,
            "ddp.average_in_collective averages over ranks, not over tokens; set it to False",
        ),
        (m.fp16, "model.fp16: the loss takes no loss scale; use bf16 or float32"),
        (
            m.bf16 != (m.params_dtype is torch.bfloat16),
            f"model.bf16 is {m.bf16} with params_dtype {m.params_dtype}; let cfg.mixed_precision say the same as student(precision=...)",
        ),
        (
            bool(m.virtual_pipeline_model_parallel_size) and own,
            "virtual pipeline stages are for a teacher on ranks of its own; unset virtual_pipeline_model_parallel_size",
        ),
        (
            bool(getattr(m, "mtp_num_layers", None)),
            "model.mtp_num_layers: the loss has no multi-token prediction; set it to None",
        ),
        (bool(getattr(m, "num_moe_experts", None)), "model.num_moe_experts: only dense decoders"),
        (
            cfg.dist.use_megatron_fsdp or cfg.dist.use_torch_fsdp2,
            "FSDP: use the distributed optimizer (ddp.use_distributed_optimizer)",
        ),
        (
            cfg.dist.use_gloo_process_groups and not own,
            "dist.use_gloo_process_groups: the world of a role has none; set it to False",
        ),
        (cfg.peft is not None, "cfg.peft: adapters are no target of distillation here; set it to None"),
        (
            getattr(m, "cuda_graph_impl", "none") != "none",
            "model.cuda_graph_impl: the loss and the teacher run between the student's kernels; set it to 'none'",
        ),
        (
            m.num_layers % pp != 0 and not getattr(m, "pipeline_model_parallel_layout", None),
            f"pp {pp} does not divide the student's {m.num_layers} layers; set pipeline_model_parallel_layout",
        ),
        (
            own and teacher.num_layers < pp,
            f"the teacher has {teacher.num_layers} layers for pp {pp}; lower pp",
        ),
        (
            m.seq_length % (2 * cp if cp > 1 else 1) != 0,
            f"model.seq_length {m.seq_length} is no multiple of 2 x context_parallel_size {cp}",
        ),
        (
            m.seq_length > teacher.max_position_embeddings,
            f"model.seq_length {m.seq_length} is beyond the teacher's {teacher.max_position_embeddings} positions",
        ),
        *(
            (length != m.seq_length, f"dataset.seq_length {length} is not model.seq_length {m.seq_length}")
            for length in [_dataset_length(cfg)]
            if length
        ),
        (
            cfg.train.global_batch_size % cfg.train.micro_batch_size != 0,
            f"train.global_batch_size {cfg.train.global_batch_size} is no multiple of micro_batch_size {cfg.train.micro_batch_size}",
        ),
    ]
    problems = [text for wrong, text in found if wrong]
    problems += [f"student: {text}" for text in layout_problems(_sizes(m, teacher), tp)]
    problems += [f"teacher: {text}" for text in layout_problems(teacher, tp)] if own else []
    refuse("this Megatron-Bridge configuration does not fit:", problems)


def _sizes(m: Any, like: Arch) -> Arch:
    """The student's sizes, as far as tensor parallelism cuts them."""
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size")
    return like.model_copy(update={name: getattr(m, name) or m.num_attention_heads for name in names})


def _dataset_length(cfg: Any) -> int | None:
    return getattr(cfg.dataset, "seq_length", None) or getattr(cfg.dataset, "sequence_length", None)


def _in_half(model: Any) -> bool:
    """Whether Float16Module is around the GPTModel, which casts the output of the last stage unless told not to."""
    while hasattr(model, "module"):
        if hasattr(model, "float16_convertor"):
            return True
        model = model.module
    return False


def _arch_in(folder: Path) -> Arch:
    found = artifact.find(folder)
    if found is None or found.arch is None:
        raise InputError(
            f"{folder} is no model of minitron-mp; `minitron-mp import` and `minitron-mp prune` leave some"
        )
    return found.arch
