"""The teacher stream over NCCL: two ranks on one GPU, in a torchrun job."""

from __future__ import annotations

import sys

import pytest
import torch
from gpu_job import run_ranks, separate_hosts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
def test_received_signals_equal_sent_signals_over_nccl(payload, window):
    assert "received 40, wrong []" in run_ranks(__file__, payload, str(window), timeout_s=180)


def main(payload: str, window: int) -> None:
    """On each rank: 40 signals with work on both sides; the student compares."""
    separate_hosts()
    from teacher_stream_workers import whole_signal

    from minitron_mp.config.parallel import ParallelConfig
    from minitron_mp.distillation.receiver import Receiver
    from minitron_mp.distillation.stream import Link, Sender
    from minitron_mp.distillation.stream_layout import Grid, StreamShape
    from minitron_mp.distributed.roles import join_roles

    one, width = ParallelConfig(), {"hidden": 512, "logits": 1024, "topk": 65}[payload]
    shape = StreamShape(payload, 256, 2, width, torch.bfloat16 if payload != "topk" else torch.float32)
    with join_roles({"student": (1, one), "teacher": (1, one)}, seed=1, stream_timeout_s=60) as world:
        link = Link(world.channel, shape, Grid("teacher", one, 1, 1), [Grid("student", one, 1, 0)], window)
        load = torch.randn((2048, 2048), device=world.device)
        if world.role == "teacher":
            sender = Sender(link)
            for id in range(40):
                sender.make_room()
                signal = whole_signal(shape, id).to(world.device)
                for _ in range(20):  # the signal is there only after this
                    load = torch.mm(load, load).clamp(-1, 1)
                sender.send(id, signal + 0 * load[0, 0].to(signal.dtype))
            sender.finish()
            return
        receiver, wrong = Receiver(link, link.students[0], range(40), world.device), []
        for id in range(40):
            signal = receiver.get(id)
            load = torch.mm(load, load).clamp(-1, 1)
            if not torch.equal(signal.cpu(), whole_signal(shape, id)):
                wrong.append(id)
            receiver.release(id)
        receiver.close()
        print(f"received 40, wrong {wrong}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
