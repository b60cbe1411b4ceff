"""What the ranks of a node do in first_node.sh, under torchrun.

    node_work.py worlds 8 LAYOUT LAYOUT     enter and leave each world, twice
    node_work.py raises LAYOUT              one rank raises while the others wait in a collective
    node_work.py step LAYOUT SETTINGS OUT   time steps of 4 layers at 8B width

LAYOUT and SETTINGS are JSON of parallel and of a training section. On a CPU the sizes are small.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World, join_world
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.flops import training_flops
from minitron_mp.training.loop import train_one
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.options import RunOptions

ON_GPU = torch.cuda.is_available()
LENGTH = 8192 if ON_GPU else 64
STEPS, FIRST_TIMED = 10, 4
ARCH = Arch(
    family="mistral",
    num_layers=4,
    hidden_size=4096 if ON_GPU else 128,
    ffn_hidden_size=11520 if ON_GPU else 256,
    num_attention_heads=32 if ON_GPU else 8,
    num_query_groups=8,
    kv_channels=128 if ON_GPU else 16,
    vocab_size=131072 if ON_GPU else 512,
    max_position_embeddings=8192,
    tied=False,
)


def say(world: World, **values: Any) -> None:
    if world.is_main:
        print("numbers", json.dumps(values), flush=True)


def worlds(layouts: list[ParallelConfig]) -> None:
    """Enter and leave each world twice, with a collective in it, and print the times."""
    for turn in (1, 2):
        for layout in layouts:
            start = time.perf_counter()
            with join_world(layout, seed=1) as world:
                entered = time.perf_counter() - start
                total = torch.ones(1, device=world.device)
                for group in (world.groups.tp, world.groups.dp, world.groups.mp):
                    dist.all_reduce(total, group=group)
                found = total.item()
                start = time.perf_counter()
                is_main = world.is_main
            left = time.perf_counter() - start
            if is_main:
                values = {"turn": turn, "layout": layout_name(layout), "sum": found}
                print("numbers", json.dumps(values | {"enter_s": entered, "leave_s": left}), flush=True)


def layout_name(layout: ParallelConfig) -> str:
    return f"tp{layout.tp}-pp{layout.pp}-cp{layout.cp}"


def raises(layout: ParallelConfig) -> None:
    """The last rank raises; the others wait for it in a collective."""
    with join_world(layout, seed=1) as world:
        value = torch.ones(1, device=world.device)
        dist.all_reduce(value)
        if world.rank == world.size - 1:
            print(f"raised at {time.time():.3f}", flush=True)
            raise RuntimeError("this rank fails on purpose")
        dist.all_reduce(value)
        value.item()


def batches(world: World, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(world.groups.dp.rank())
    rows = torch.randint(0, ARCH.vocab_size, (count, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).view(1, LENGTH)
    return [
        {
            "tokens": row[None, :-1].contiguous(),
            "labels": row[None, 1:].contiguous(),
            "position_ids": places,
            "loss_mask": torch.ones(1, LENGTH),
        }
        for row in rows
    ]


def step(layout: ParallelConfig, settings: dict[str, Any], out: Path) -> None:
    """Train with cross-entropy from random weights and write the times of the last steps."""
    with join_world(layout, seed=1) as world:
        replicas = world.groups.dp.size()
        training = CorrectionConfig(
            steps=STEPS,
            warmup_steps=0,
            global_batch_size=2 * replicas,
            micro_batch_size=1,
            lr=1e-5,
            min_lr=1e-6,
            log_interval=1,
            **settings,
        )
        options = ModelOptions("bf16", LENGTH, training=training, random_weights=True)
        model, metrics = build_model(ARCH, world, options), list[StepMetrics]()
        own = batches(world, 2)
        manifest = Manifest(stage="correct", settings={}, inputs={})
        run = RunOptions(None, manifest, on_step=metrics.append)
        train_one(model, None, lambda _: own, training, run)
        if world.is_main:
            write_step(metrics, world.size, out)


def write_step(metrics: list[StepMetrics], num_ranks: int, out: Path) -> None:
    times = [each.step_time_s for each in metrics[FIRST_TIMED:]]
    tokens = metrics[-1].num_tokens
    seconds = statistics.median(times)
    flops = tokens * training_flops(ARCH, LENGTH)
    content = {
        "step_ms": 1e3 * seconds,
        "least_ms": 1e3 * min(times),
        "most_ms": 1e3 * max(times),
        "tflops_per_rank": flops / seconds / num_ranks / 1e12,
        "tokens_per_s": tokens / seconds,
        "losses": [each.loss for each in metrics],
        "ranks": num_ranks,
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content), flush=True)


def main(what: str, words: list[str]) -> None:
    if what == "worlds":
        worlds([ParallelConfig(**json.loads(word)) for word in words])
    elif what == "raises":
        raises(ParallelConfig(**json.loads(words[0])))
    else:
        layout, settings, out = words
        step(ParallelConfig(**json.loads(layout)), json.loads(settings), Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
