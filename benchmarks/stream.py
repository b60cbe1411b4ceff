"""Cost of the teacher stream: the student's waiting time per step, and sent bytes.

    torchrun --nproc-per-node 2 benchmarks/stream.py
    torchrun --nproc-per-node 2 benchmarks/stream.py --payload logits --window 1

The transfers are real. The compute is replaced by work of a given time: matrix products on a GPU,
which two ranks may share, and sleep on a CPU. The default times are half of the planner's estimate
for 12B -> 8B, a microbatch of 8192 tokens and tp 8 on 8 H100 (student 119 ms, teacher 38 ms). The
default sizes are an eighth of that microbatch, which is a rank's part at tp 8, because a CPU's
loopback is slower than NVLink. It also prints the same transfers without work. Bytes are computed
and counted.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time

import torch

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.distillation.receiver import Receiver
from minitron_mp.distillation.stream import Link, Sender
from minitron_mp.distillation.stream_layout import Grid, StreamShape
from minitron_mp.distributed.roles import join_roles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a microbatch on this rank")
    parser.add_argument("--hidden-size", type=int, default=5120)
    parser.add_argument(
        "--vocabulary", type=int, default=16384, help="columns on this rank, for --payload logits"
    )
    parser.add_argument("--payload", choices=("hidden", "logits", "topk"), default="hidden")
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--student-ms", type=float, default=119.0, help="forward and backward of a microbatch"
    )
    parser.add_argument("--teacher-ms", type=float, default=38.0)
    parser.add_argument(
        "--pause-ms", type=float, default=60.0, help="optimizer step, in which no microbatch is consumed"
    )
    args = parser.parse_args()
    if 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        os.environ["NCCL_HOSTID"] = (
            f"{socket.gethostname()}-{os.environ['RANK']}"  # or NCCL refuses two ranks on one GPU
        )
    width, dtype = {
        "hidden": (args.hidden_size, torch.bfloat16),
        "logits": (args.vocabulary, torch.bfloat16),
        "topk": (2 * args.top_k + 1, torch.int32),
    }[args.payload]
    shape, one = StreamShape(args.payload, args.tokens, 1, width, dtype), ParallelConfig()
    with join_roles({"student": (1, one), "teacher": (1, one)}, seed=1) as world:
        assert world.channel is not None
        for title, student_s, teacher_s, pause_s in (
            ("nothing else to do", 0.0, 0.0, 0.0),
            ("with the work of a GPU", args.student_ms / 1e3, args.teacher_ms / 1e3, args.pause_ms / 1e3),
        ):
            link = Link(
                world.channel, shape, Grid("teacher", one, 1, 1), [Grid("student", one, 1, 0)], args.window
            )
            count = args.steps * args.microbatches
            if world.role == "teacher":
                serve(link, count, teacher_s, world.device)
            else:
                report(title, args, link, *consume(link, args, student_s, pause_s, world.device))


def serve(link: Link, count: int, teacher_s: float, device: torch.device) -> None:
    sender, signal = (
        Sender(link),
        torch.randn(link.shape.local(ParallelConfig()), device=device).to(link.shape.dtype),
    )
    for id in range(count):
        sender.make_room()
        work(teacher_s, device)
        sender.send(id, signal)
    sender.finish()


def consume(
    link: Link, args: argparse.Namespace, student_s: float, pause_s: float, device: torch.device
) -> tuple[list[float], list[float]]:
    """Return (times of the steps, waiting times) without the first step.

    The first step starts with an empty window.
    """
    receiver = Receiver(link, link.students[0], range(args.steps * args.microbatches), device)
    steps, waits = [], []
    for step in range(args.steps):
        start, waited = time.perf_counter(), 0.0
        for i in range(args.microbatches):
            before = time.perf_counter()
            receiver.get(step * args.microbatches + i)
            waited += time.perf_counter() - before
            work(student_s, device)
            receiver.release(step * args.microbatches + i)
        work(pause_s, device)
        steps.append(time.perf_counter() - start)
        waits.append(waited)
    receiver.close()
    return steps[1:], waits[1:]


def work(seconds: float, device: torch.device) -> None:
    """Keep the device busy for this time, with matrix products of 2048 rows on a GPU."""
    if device.type == "cpu" or not seconds:
        time.sleep(seconds)
        return
    end, a = time.perf_counter() + seconds, torch.ones((2048, 4096), device=device, dtype=torch.bfloat16)
    b = torch.ones((4096, 4096), device=device, dtype=torch.bfloat16)
    while time.perf_counter() < end:
        for _ in range(8):
            torch.mm(a, b)
        torch.cuda.current_stream().synchronize()


def report(title: str, args: argparse.Namespace, link: Link, steps: list[float], waits: list[float]) -> None:
    tokens = args.tokens * args.microbatches
    step, wait = statistics.median(steps), statistics.median(waits)
    counted = link.num_bytes / (tokens * args.steps)
    per_token = link.shape.width * link.shape.dtype.itemsize
    print(
        f"{title}: {args.payload}, window {args.window}, step {step * 1e3:.0f} ms, "
        f"waiting {wait * 1e3:.1f} ms = {wait / step:.1%}; "
        f"{tokens * per_token / step / 1e9:.2f} GB/s; bytes a token: "
        f"{per_token:,} computed, {counted:,.0f} counted",
        flush=True,
    )


if __name__ == "__main__":
    main()
