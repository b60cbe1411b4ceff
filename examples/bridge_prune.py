"""Score, plan and prune a model that Megatron-Bridge built, of any dense family that Bridge maps.

torchrun --nproc-per-node 4 examples/bridge_prune.py MODEL_FOLDER PRUNED --keep 0.75 --tp 2 --pp 2

It writes PRUNED, a checkpoint for any layout, and PRUNED_hf, a Hugging Face folder.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from minitron_mp import InputError, join_world, make_plan, prune, score
from minitron_mp.artifacts.checkpoint import save_checkpoint
from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig, TargetConfig
from minitron_mp.integrations.megatron_bridge import arch_of, defer_head, pruned_config, sharded_model
from minitron_mp.pruning.plan import PrunePlan


def batches(vocab_size: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Return this data parallel rank's microbatches [b, s].

    Replace them with your calibration text.
    """
    tokens = torch.randint(0, vocab_size, (4, 2, 64), generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(64).expand(2, 64).contiguous()
    return [
        {"tokens": t, "labels": t, "loss_mask": torch.ones(t.shape), "position_ids": positions}
        for t in tokens
    ]


def compress(provider, source: Path, output: Path, target: TargetConfig, world) -> PrunePlan:
    """Prune a model and write the checkpoint. Called by all ranks.

    provider: Bridge's provider of the model in `source`, which loads its weights.
    """
    config = json.loads((source / "config.json").read_text())
    arch = arch_of(provider, config)
    provider.finalize()
    chunks = defer_head(
        provider.provide_distributed_model(
            wrap_with_ddp=False, mixed_precision_wrapper=None, pg_collection=world.groups
        )
    )
    model = sharded_model(chunks, arch, 64)
    for chunk in chunks:
        chunk.eval()
    scores = score(model, [batches(arch.vocab_size, world.groups.dp.rank())], ScoreConfig())
    plan = make_plan(scores, arch, target, tp=world.parallel.tp)
    student_config = pruned_config(config, plan.student)

    def assets(folder: Path) -> None:
        (folder / ASSETS).mkdir()
        (folder / ASSETS / "config.json").write_text(json.dumps(student_config))
        for path in source.glob("tokenizer*"):
            shutil.copy(path, folder / ASSETS)

    manifest = Manifest(stage="prune", settings={"target": target.model_dump()}, inputs={}, arch=plan.student)
    save_checkpoint(prune(model, plan), output, manifest, assets)
    if world.is_main:
        print(f"{output}: {plan.student.num_parameters():,} of {arch.num_parameters():,} parameters")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider = AutoBridge.from_hf_pretrained(args.model).to_megatron_provider()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = args.tp, args.pp
    provider.pipeline_dtype = provider.params_dtype
    # Scores are read at the norms, and Transformer Engine's layers have no separate norms.
    provider.transformer_layer_spec = local_layer_spec
    with join_world(ParallelConfig(tp=args.tp, pp=args.pp), seed=1) as world:
        compress(provider, args.model, args.pruned, TargetConfig(keep=args.keep), world)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
