"""Where scoring waits for the device: its microbatches under torch's sync debug mode.

    python benchmarks/first_run/scoring_waits.py --out result.json

In mode "error" a synchronising call raises; the stack of the first one is the result. In mode
"warn" all of them are counted. The modes do not see pageable copies of small tensors. Without a GPU
the program runs, and both numbers are null.
"""

from __future__ import annotations

import argparse
import json
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.world import World, join_world
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.importance import recording

LENGTH, MICROBATCHES = 128, 4
ARCH = Arch(
    family="llama",
    num_layers=3,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=1024,
    max_position_embeddings=4096,
    tied=False,
)


def batches(world: World) -> list[Batch]:
    """Microbatches that are on the device."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, ARCH.vocab_size, (MICROBATCHES, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).view(1, LENGTH)
    return [
        {
            "tokens": row[None, :-1].to(world.device),
            "labels": row[None, 1:].to(world.device),
            "position_ids": places.to(world.device),
            "loss_mask": torch.ones(1, LENGTH, device=world.device),
        }
        for row in rows
    ]


def run(model: ShardedModel, microbatches: list[Batch], mode: str) -> None:
    """Score the microbatches; only the passes themselves are under the mode."""
    on_gpu = model.world.device.type == "cuda"
    with recording(model, ScoreConfig()) as recorder, torch.no_grad():
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
        try:
            run_schedule(model.chunks, microbatches, model.world, None)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    recorder.importance()


def waits(model: ShardedModel, microbatches: list[Batch]) -> dict[str, Any]:
    """Return the number of waits of one pass, their places, and the stack of the first."""
    if model.world.device.type != "cuda":
        run(model, microbatches, "default")
        return {"waits": None, "first": None, "microbatches": len(microbatches)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, microbatches, "warn")
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}"
        for each in caught
        if "synchronizing CUDA operation" in str(each.message)
    )
    first = None
    try:
        run(model, microbatches, "error")
    except RuntimeError:
        first = traceback.format_exc().splitlines()[-12:]
    return {
        "waits": sum(places.values()),
        "places": places.most_common(20),
        "first": first,
        "microbatches": len(microbatches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with join_world(ParallelConfig(), seed=1) as world:
        options = ModelOptions(precision="bf16", sequence_length=LENGTH, random_weights=True)
        model = build_model(ARCH, world, options)
        for chunk in model.chunks:
            chunk.eval()
        own = batches(world)
        run(model, own, "default")  # compiles
        found = waits(model, own)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    if found["waits"] or found["first"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
