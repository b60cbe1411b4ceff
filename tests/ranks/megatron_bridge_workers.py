"""Worker functions for test_megatron_bridge.py, on ranks that import Megatron-Bridge.

Such ranks are spawned and import the shims before anything else.
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bridge_shims

sys.path.append(str(Path(__file__).parents[2] / "examples"))
bridge_shims.install()

import numpy as np
import torch
import torch.distributed as dist
from bridge_shims import on_cpu
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from teacher_stream_workers import joined_roles, make_link

from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.hf_folder import copy_assets_from
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.artifacts.saved_model import load_model, saved_arch
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig, TargetConfig
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.serve import ServedTeacher, serve_signals
from minitron_mp.distillation.stream import Sender
from minitron_mp.distillation.stream_layout import StreamShape
from minitron_mp.distillation.teacher import ColocatedTeacher, RemoteTeacher
from minitron_mp.distillation.teacher_head import load_head
from minitron_mp.distributed.process_groups import all_groups, end_groups
from minitron_mp.distributed.world import World, join_world
from minitron_mp.errors import InputError
from minitron_mp.integrations.megatron_bridge import (
    KDForwardStep,
    arch_of,
    check_config,
    defer_head,
    export_student,
    load_pruned,
    pruned_config,
    sharded_model,
    slice_teacher,
    student_provider,
)
from minitron_mp.integrations.megatron_bridge import (
    RemoteTeacher as BridgeRemoteTeacher,
)
from minitron_mp.integrations.megatron_bridge.model import prepare as prepare_model
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.hf_weights import HFWeights
from minitron_mp.models.model_folder import asset_files
from minitron_mp.models.parameters import split_key
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.pruning.importance import score
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.scores import random_scores
from minitron_mp.pruning.slicing import prune
from minitron_mp.training.loop import train_one
from minitron_mp.training.options import RunOptions

SEQUENCE_LENGTH = 16


def joined(tp: int, pp: int, **more: Any) -> Any:
    return join_world(ParallelConfig(tp=tp, pp=pp, **more), seed=1)


def built(
    source: Path, world: World, dtype: torch.dtype = torch.float32, *, weights: bool = True
) -> list[Any]:
    """Chunks that Bridge makes of a Hugging Face folder, in the layout of a world."""
    provider = AutoBridge.from_hf_pretrained(source, torch_dtype=dtype).to_megatron_provider(
        load_weights=weights
    )
    provider = on_cpu(provider, world.parallel.tp, world.parallel.pp, dtype)
    provider.vocab_size = -(-provider.vocab_size // 128) * 128
    provider.finalize()
    return provider.provide_distributed_model(
        wrap_with_ddp=False,
        use_cpu_initialization=True,
        mixed_precision_wrapper=None,
        pg_collection=world.groups,
    )


def import_folder(source: Path, folder: Path, world: World) -> None:
    """Our converter: Hugging Face folder -> checkpoint, with its side files."""
    arch = read_arch(source)
    weights, mine = HFWeights(source, arch), {}
    for key in arch.shapes():
        if (split_key(key)[0] or 0) % dist.get_world_size() == dist.get_rank():
            mine[key] = ShardedTensor.from_rank_offsets(key, weights.tensor(key))

    def assets(made: Path) -> None:
        (made / ASSETS).mkdir()
        for path in asset_files(source):
            shutil.copy(path, made / ASSETS)

    save_checkpoint(mine, folder, Manifest(stage="import", settings={}, inputs={}, arch=arch), assets)


def compare_converters(*, tp: int, pp: int, sources: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Return family -> (number of tensors on this rank, tensors whose conversions differ).

    Bridge's conversion is compared with ours in both directions.
    """
    found = {}
    with joined(tp, pp) as world:
        for family, source in sources.items():
            import_folder(source, folder / family, world)
            theirs, ours = built(source, world), built(source, world, weights=False)
            load_pruned(folder / family)(ours)
            mine = {
                name: value for name, value in ours[0].state_dict().items() if isinstance(value, torch.Tensor)
            }
            differ = [
                name
                for name, value in theirs[0].state_dict().items()
                if name in mine and not torch.equal(value, mine[name])
            ]
            export_student(
                defer_head(ours),
                json.loads((source / "config.json").read_text()),
                folder / f"{family}_hf",
                source=source,
            )
            found[family] = len(mine), differ
    return found


def compare_scores(*, tp: int, pp: int, source: Path, folder: Path) -> float:
    """Largest relative difference between the scores of Bridge's model and of ours."""
    with joined(tp, pp) as world:
        import_folder(source, folder / "scored", world)
        arch, tokens = (
            read_arch(source),
            torch.randint(0, 120, (4, 2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0)),
        )
        positions = torch.arange(SEQUENCE_LENGTH).expand(2, -1).contiguous()
        batches = [
            {"tokens": t, "labels": t, "loss_mask": torch.ones(t.shape), "position_ids": positions}
            for t in tokens
        ]
        ours = load_model(folder / "scored", world, sequence_length=SEQUENCE_LENGTH, precision="fp32").chunks
        found = []
        for chunks in (ours, defer_head(built(source, world))):
            chunks[0].eval()
            model = sharded_model(chunks, arch, SEQUENCE_LENGTH)
            found.append(score(model, [batches], ScoreConfig()).tensors())
        ours, theirs = found
        return max(float(np.abs(ours[name] / theirs[name] - 1).max()) for name in ours)


def prepare(*, source: Path, folder: Path) -> tuple[int, int]:
    """Write teacher/ and student/ below the folder, as import and prune do; scores are random.

    Returns the layers of both.
    """
    with joined(1, 1) as world:
        import_folder(source, folder / "teacher", world)
        arch = read_arch(source)
        plan = make_plan(random_scores(arch), arch, TargetConfig(hidden_size=48, ffn_hidden_size=64))
        model = load_model(folder / "teacher", world, sequence_length=SEQUENCE_LENGTH, precision="fp32")
        made = Manifest(stage="prune", settings={}, inputs={}, arch=plan.student)
        student = prune(model, plan)
        save_checkpoint(student, folder / "student", made, copy_assets_from(folder / "teacher"))
        return arch.num_layers, plan.student.num_layers


class Losses:
    """A callback that keeps what Bridge would log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_step_end(self, context: Any) -> None:
        self.rows.append(
            {name: value.item() for name, value in context.loss_dict.items()}
            | {"grad_norm": float(context.grad_norm)}
        )


def as_model_config(provider: Any, folder: Path) -> Any:
    """Return the student as AutoBridge.get_model_config() of Bridge's main branch describes it.

    Bridge 0.6 does not have that method, but its pretrain() accepts the object.
    """
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.transformer_config import TransformerConfig

    same = {
        field.name: getattr(provider, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if field.init
    }
    names = (
        "share_embeddings_and_output_weights",
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
    )
    config = GPTModelConfig(
        transformer=TransformerConfig(**same), **{name: getattr(provider, name) for name in names}
    )
    prepare_model(
        config,
        saved_arch(folder),
        sequence_length=SEQUENCE_LENGTH,
        precision="fp32",
        weights=load_pruned(folder),
    )
    config.transformer.seq_length = (
        SEQUENCE_LENGTH  # 0.6, not main, looks for it there when it warms up its fused functions
    )
    return config


def pretrain(
    *,
    folder: Path,
    tp: int,
    pp: int,
    overrides: list[str],
    precision: str = "fp32",
    sequence_parallel: bool = False,
    spy: bool = False,
    teacher: Any = None,
    api: str = "provider",
) -> Any:
    """Run examples/bridge_distill.py with Bridge's pretrain().

    Returns what Bridge would log, on ranks of the last stage.
    spy: whether the microbatches are returned too.
    api: "config" replaces the provider with a ModelConfig.
    """
    from bridge_distill import recipe
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    cfg, step = recipe(
        folder / "student", folder / "teacher", sequence_length=SEQUENCE_LENGTH, precision=precision
    )
    cfg = process_config_with_overrides(config=cfg, config_filepath=None, cli_overrides=overrides)
    on_cpu(cfg.model, tp, pp, DTYPES[precision]).sequence_parallel = sequence_parallel
    step.teacher = teacher or step.teacher
    if api == "config":
        cfg.model = on_cpu(as_model_config(cfg.model, folder / "student"), tp, pp, DTYPES[precision])
    if spy:
        step.__class__, step.seen = Spied, []
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = (
        "NullTokenizer",
        step.vocab_size - 1,
    )  # and an end of text
    cfg.dataset.num_workers, cfg.dataset.persistent_workers = (
        0,
        False,
    )  # processes that would import everything again
    check_config(cfg, step)
    bridge_shims.pretrain_without_cuda(cfg)
    losses = Losses()
    pretrain(cfg, step, callbacks=[step, losses])
    if teacher is None:
        parallel_state.destroy_model_parallel()
        made = [group for group in all_groups() if group is not dist.group.WORLD]
        end_groups(made, torch.device("cpu"), is_failed=False)
        assert step.teacher.chunk is None, "the teacher is given back at the end"
    return (losses.rows, step.seen) if spy else losses.rows


class Spied(KDForwardStep):
    """Keeps the microbatches that it was given."""

    seen: list[dict[str, Any]]

    def __call__(self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        raw = next(data_iterator)
        self.seen.append({key: raw[key] for key in ("tokens", "labels", "loss_mask", "position_ids")})
        return super().__call__(state, iter([raw]), model, return_schedule_plan)


def train_by_hand(*, folder: Path, batches: list[dict[str, Any]], steps: int) -> list[dict[str, float]]:
    """The same run by trainer.train, without Bridge; one rank."""
    rows: list[dict[str, float]] = []
    per_step = len(batches) // steps
    same = {
        "steps": steps,
        "lr": 1e-4,
        "min_lr": 1e-4,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "adam_beta2": 0.999,
        "clip_grad": 1.0,
    }
    with joined(1, 1) as world:
        arch = saved_arch(folder / "student")
        model = load_model(folder / "student", world, sequence_length=SEQUENCE_LENGTH, precision="fp32")
        teacher = ColocatedTeacher(
            load_model(folder / "teacher", world, sequence_length=SEQUENCE_LENGTH, precision="fp32")
        )
        settings = DistillConfig(**same, global_batch_size=per_step, micro_batch_size=1)
        train_one(
            model,
            teacher,
            lambda step: batches[step * per_step : (step + 1) * per_step],
            settings,
            RunOptions(
                folder / "by_hand",
                Manifest(stage="distill", settings={}, inputs={}, arch=arch),
                seed=1,
                on_step=lambda metrics: rows.append(
                    {
                        "kd loss": metrics.loss,
                        "forward_kl": metrics.divergence,
                        "lm loss": metrics.ce,
                        "grad_norm": metrics.grad_norm,
                    }
                ),
            ),
        )
    return rows


def pretrain_beside_teacher(
    *, folder: Path, batches: list[dict[str, Any]], overrides: list[str], first_microbatch: int = 0
) -> list[dict[str, float]]:
    """Run Bridge's pretrain() on four ranks in two worlds: a student of pp 2, a teacher of tp 2.

    Rank 1, the student's last stage, returns what Bridge would log. first_microbatch: of the data
    parallel rank, when the overrides load a checkpoint of the student.
    """
    arch = saved_arch(folder / "teacher")
    roles = {"student": (2, {"pp": 2}), "teacher": (2, {"tp": 2})}
    shape = StreamShape("hidden", SEQUENCE_LENGTH, 1, arch.hidden_size, torch.float32)
    with joined_roles(roles) as world:
        link, ids = make_link(world, roles, shape, 2), range(first_microbatch, len(batches))
        if world.role == "teacher":
            model = load_model(folder / "teacher", world, sequence_length=SEQUENCE_LENGTH, precision="fp32")
            serve_signals(ServedTeacher(model.freeze(), shape, 1), Sender(link), lambda id: batches[id], ids)
            return []
        head = load_head(arch, folder / "teacher", world, torch.float32)
        receiver = Receiver(link, link.students[0], ids, world.device) if world.is_last_stage else None
        streamed = BridgeRemoteTeacher(RemoteTeacher(receiver, "hidden", head, world), arch, first_microbatch)
        return pretrain(
            folder=folder,
            tp=1,
            pp=2,
            overrides=[*overrides, "dist.use_gloo_process_groups=false"],
            teacher=streamed,
        )


def refusals(*, folder: Path) -> str:
    """What check() says of a recipe with everything wrong."""
    from bridge_distill import recipe

    with joined(1, 1):
        cfg, step = recipe(
            folder / "student", folder / "teacher", sequence_length=SEQUENCE_LENGTH, precision="fp32"
        )
        check_config(cfg, step)
        cfg.model.vocab_size, cfg.model.should_pad_vocab, step.vocab_size = 64, True, 17
        cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size = 3, 3
        cfg.model.seq_length, cfg.model.calculate_per_token_loss, cfg.model.fp16, cfg.model.bf16 = (
            100,
            False,
            True,
            True,
        )
        cfg.ddp.average_in_collective = cfg.dist.use_megatron_fsdp = (
            cfg.tokenizer.use_tokenizer_vocab_size
        ) = True
        cfg.train.global_batch_size, cfg.train.micro_batch_size = 7, 2
        try:
            check_config(cfg, step)
        except InputError as error:
            return str(error)
    return ""


def prune_unmapped(*, source: Path, folder: Path, tp: int, pp: int) -> dict[str, Any]:
    """Run examples/bridge_prune.py on a family that models/hf does not map.

    Writes the resulting checkpoint, and the same pruning in memory, as Hugging Face folders.
    """
    from bridge_prune import compress

    target, config = (
        TargetConfig(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4),
        json.loads((source / "config.json").read_text()),
    )
    found: dict[str, Any] = {}
    with joined(tp, pp) as world:

        def provider(api_folder: Path, **options: Any) -> Any:
            made = AutoBridge.from_hf_pretrained(api_folder, torch_dtype=torch.float32).to_megatron_provider(
                **options
            )
            return on_cpu(made, tp, pp)

        teacher = provider(source)
        arch = arch_of(teacher, config)
        plan = compress(teacher, source, folder / "pruned", target, world)
        smaller = pruned_config(config, plan.student)
        for name, weights in {
            "loaded": load_pruned(folder / "pruned"),
            "sliced": slice_teacher(lambda: built(source, world), plan),
        }.items():
            student = student_provider(folder / "pruned", sequence_length=SEQUENCE_LENGTH, precision="fp32")
            student._pre_wrap_hooks[0] = weights
            on_cpu(student, tp, pp).finalize()
            chunks = student.provide_distributed_model(
                wrap_with_ddp=False, use_cpu_initialization=True, pg_collection=world.groups
            )
            export_student(chunks, smaller, folder / name, source=source)
        found = {
            "teacher": arch.num_parameters(),
            "student": plan.student.num_parameters(),
            "keep": plan.keep,
        }
    return found
