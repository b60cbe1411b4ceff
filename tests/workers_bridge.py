"""What tests/test_bridge.py runs on ranks that import Megatron-Bridge; they are started afresh, with the shims before anything else."""

# ruff: noqa: E402
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bridge_shims

sys.path.append(str(Path(__file__).parents[1] / "examples"))
bridge_shims.install()

import numpy as np
import torch
import torch.distributed as dist
from bridge_shims import on_cpu
from megatron.bridge import AutoBridge
from megatron.core.distributed import DistributedDataParallelConfig

from minitron_mp import bridge, checkpoint, hf, parallel, schedule, slicing
from minitron_mp.arch import AXES
from minitron_mp.artifact import Manifest
from minitron_mp.config import Distill, Parallel, Target
from minitron_mp.job import ASSETS, assets_from
from minitron_mp.model import DTYPES, build_model
from minitron_mp.parallel import World
from minitron_mp.plan import Importance, make_plan
from minitron_mp.teacher import ColocatedTeacher, with_signals
from minitron_mp.trainer import Run

SEQUENCE_LENGTH = 16


def joined(tp: int, pp: int, **more: Any) -> Any:
    return parallel.world(Parallel(tp=tp, pp=pp, **more), seed=1)


def built(source: Path, world: World, dtype: torch.dtype = torch.float32, *, weights: bool = True) -> list[Any]:
    """Chunks that Bridge makes of a Hugging Face folder, in the layout of a world."""
    provider = AutoBridge.from_hf_pretrained(source, torch_dtype=dtype).to_megatron_provider(load_weights=weights)
    provider = on_cpu(provider, world.parallel.tp, world.parallel.pp, dtype)
    provider.vocab_size = -(-provider.vocab_size // 128) * 128
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, mixed_precision_wrapper=None, pg_collection=world.groups)


def import_folder(source: Path, folder: Path, world: World) -> None:
    """Our converter: Hugging Face folder -> checkpoint, with its side files."""
    from minitron_mp.stages import _sharded

    arch = hf.read_arch(source)
    weights, mine = hf.Weights(source, arch), {}
    for key, layer in hf.canonical_keys(arch):
        if (layer or 0) % dist.get_world_size() == dist.get_rank():
            mine[f"{key}/{layer}"] = _sharded(key, layer, weights.tensor(key, layer), arch)

    def assets(made: Path) -> None:
        (made / ASSETS).mkdir()
        for path in hf.assets(source):
            shutil.copy(path, made / ASSETS)

    checkpoint.save(mine, folder, Manifest(stage="import", settings={}, inputs={}, arch=arch), assets)


def compare_converters(*, tp: int, pp: int, sources: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Family -> (tensors on this rank, those that differ between Bridge's conversion and ours); both write it back, too."""
    found = {}
    with joined(tp, pp) as world:
        for family, source in sources.items():
            import_folder(source, folder / family, world)
            theirs, ours = built(source, world), built(source, world, weights=False)
            bridge.load_pruned(folder / family)(ours)
            mine = {name: value for name, value in ours[0].state_dict().items() if isinstance(value, torch.Tensor)}
            differ = [name for name, value in theirs[0].state_dict().items() if name in mine and not torch.equal(value, mine[name])]
            bridge.export(bridge.defer_head(ours), json.loads((source / "config.json").read_text()), folder / f"{family}_hf", source=source)
            found[family] = len(mine), differ
    return found


def prepare(*, source: Path, folder: Path) -> tuple[int, int]:
    """teacher/ and student/ below the folder, as import and prune leave them; layers of both. Scores are drawn."""
    with joined(1, 1) as world:
        import_folder(source, folder / "teacher", world)
        arch, draw = hf.read_arch(source), np.random.default_rng(0)
        shapes = (arch.num_layers, arch.ffn_hidden_size), (arch.num_layers, arch.num_attention_heads), (arch.hidden_size,), (arch.num_layers,)
        plan = make_plan(Importance(*(draw.random(shape).astype(np.float32) for shape in shapes)), arch, Target(hidden_size=48, ffn_hidden_size=64))
        chunks = build_model(arch, world, precision="fp32", sequence_length=SEQUENCE_LENGTH)
        checkpoint.load_model(chunks, folder / "teacher", world)
        made = Manifest(stage="prune", settings={}, inputs={}, arch=plan.student)
        checkpoint.save(slicing.prune(chunks, plan, world), folder / "student", made, assets_from(folder / "teacher"))
        return arch.num_layers, plan.student.num_layers


class Losses:
    """A callback that keeps what Bridge would log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_step_end(self, context: Any) -> None:
        self.rows.append({name: value.item() for name, value in context.loss_dict.items()} | {"grad_norm": float(context.grad_norm)})


def pretrain(*, folder: Path, tp: int, pp: int, overrides: list[str], precision: str = "fp32") -> list[dict[str, float]]:
    """examples/bridge_distill.py through Bridge's own pretrain(); what it would log, on ranks of the last stage."""
    from bridge_distill import recipe
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    cfg, step = recipe(folder / "student", folder / "teacher", sequence_length=SEQUENCE_LENGTH, precision=precision)
    cfg = process_config_with_overrides(config=cfg, config_filepath=None, cli_overrides=overrides)
    on_cpu(cfg.model, tp, pp, DTYPES[precision])
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", step.vocab_size - 1  # and an end of text
    bridge.check(cfg, step)
    bridge_shims.pretrain_without_cuda(cfg)
    losses = Losses()
    pretrain(cfg, step, callbacks=[step, losses])
    parallel.leave_groups()
    assert step.teacher.chunk is None, "the teacher is given back at the end"
    return losses.rows
