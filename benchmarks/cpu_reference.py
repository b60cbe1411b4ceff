"""Distillation speed: this library's train() against a plain transformers loop, step by step in turn, in one process.

    python benchmarks/cpu_reference.py out/quickstart/teacher_hf --steps 10

Both distil the same teacher into a student of the same sizes, on the same random tokens, in bf16: here bf16 weights with float32
main weights in the optimizer; there what a plain loop does, float32 weights under autocast, fused AdamW, a bf16 teacher, and
KL(teacher || student) from log_softmax in float32. Prints the median time of a step, tokens/s and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from minitron_mp import hf, parallel
from minitron_mp.artifact import Manifest
from minitron_mp.config import Recipe
from minitron_mp.job import Job
from minitron_mp.model import build_model
from minitron_mp.sections import Parallel
from minitron_mp.stages import import_model
from minitron_mp.teacher import ColocatedTeacher
from minitron_mp.trainer import StepMetrics, train
from minitron_mp.training_config import Distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="Hugging Face folder")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ffn-hidden-size", type=int, default=1152)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with parallel.world(Parallel(), seed=1) as world, tempfile.TemporaryDirectory() as scratch:
        run(args, world, Path(scratch))


def run(args: argparse.Namespace, world: parallel.World, scratch: Path) -> None:
    recipe = Recipe(model=str(args.teacher), output=str(scratch))
    manifest = Manifest(stage="import", settings={}, inputs={})
    import_model(Job(recipe, world, {"import": scratch / "teacher"}, manifest))
    arch = hf.read_arch(args.teacher)
    student_arch = arch.model_copy(update={"hidden_size": args.hidden_size, "ffn_hidden_size": args.ffn_hidden_size})
    settings = Distill(
        steps=args.steps + 2,
        global_batch_size=args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        warmup_steps=1,
        checkpoint_interval=10**6,
        logits_precision="bf16",  # as the loop, whose logits are bf16 under autocast
    )
    options = {"precision": "bf16", "sequence_length": args.sequence_length}
    teacher = ColocatedTeacher(arch, scratch / "teacher", world, **options)
    student = build_model(student_arch, world, training=settings, random_weights=True, **options)
    plain_step = plain_loop(args.teacher, student_arch, settings)
    ours: list[float] = []
    theirs: list[float] = []

    def on_step(metrics: StepMetrics) -> None:
        ours.append(metrics.step_time_s)
        start = time.perf_counter()
        plain_step(batch(metrics.step - 1, args))
        theirs.append(time.perf_counter() - start)

    train(
        student,
        teacher,
        lambda step: [batch(step, args)],
        settings,
        world,
        vocab_size=arch.vocab_size,
        seed=1,
        checkpoints=scratch / "checkpoints",
        manifest=manifest,
        on_step=on_step,
    )
    ours, theirs = ours[2:], theirs[2:]  # two warm-up steps
    tokens = args.micro_batch_size * args.sequence_length
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {tokens} tokens a step, {len(ours)} pairs of steps")
    for name, times in (("minitron_mp", ours), ("transformers loop", theirs)):
        middle = statistics.median(times)
        print(f"{name:18s} {middle:7.3f} s a step (min {min(times):.3f}, max {max(times):.3f}) {tokens / middle:7.1f} tokens/s")
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    print(f"speed of minitron_mp over the loop, pair by pair: median {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})")


def plain_loop(folder: Path, student_arch, settings: Distill):
    """One step of distillation as a user of transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

    sizes = json.loads((folder / "config.json").read_text())
    config = MistralConfig(
        hidden_size=student_arch.hidden_size,
        intermediate_size=student_arch.ffn_hidden_size,
        num_hidden_layers=student_arch.num_layers,
        num_attention_heads=student_arch.num_attention_heads,
        num_key_value_heads=student_arch.num_query_groups,
        head_dim=student_arch.kv_channels,
        vocab_size=student_arch.vocab_size,
        tie_word_embeddings=student_arch.tied,
        rms_norm_eps=sizes["rms_norm_eps"],
        sliding_window=None,
    )
    assert AutoConfig.from_pretrained(folder).vocab_size == config.vocab_size
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2), fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            z_t = teacher(batch["tokens"]).logits.float()
        with torch.autocast("cpu", torch.bfloat16):
            z_s = student(batch["tokens"]).logits
        kl = F.kl_div(F.log_softmax(z_s.float(), -1), F.log_softmax(z_t, -1), log_target=True, reduction="none").sum(-1).mean()
        kl.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(step: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 32000, (args.micro_batch_size, args.sequence_length + 1), generator=generator)
    positions = torch.arange(args.sequence_length)[None].expand(args.micro_batch_size, -1).contiguous()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": positions,
        "loss_mask": torch.ones(positions.shape),
    }


if __name__ == "__main__":
    main()
