"""Connect the ranks of a teacher stream before its first signal.

NCCL connects two ranks at their first transfer, and torch's timeout does not cover that. If the
other rank ended in between, the first transfer of a training would wait for ever. So each pair
transfers one byte at the start, and this file limits the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from minitron_mp.distillation.stream import DATA, Link
from minitron_mp.distributed.process_groups import within


def rank_pairs(link: Link, stages: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Return (job rank of the teacher, job rank of a student) that share signals, ascending.

    stages: receiving pipeline stages of the students beside the one of the link.
    """
    pairs = set()
    for stage_link in (link, *link.to_stages({stage: [0] for stage in stages}).values()):
        for student in link.students:
            for id in range(math.lcm(link.teacher.dp, student.dp)):
                messages = stage_link.messages(id, student)
                pairs |= {(message.source, message.target) for message in messages}
    return sorted(pairs)


def connect_pairs(link: Link, stages: Iterable[int] = ()) -> None:
    """Transfer one byte between each pair of ranks; reached by all ranks of the roles of a stream.

    StreamError when a rank does not take part within the timeout of the channel. All ranks go
    through the pairs in the same order, so they cannot wait for each other in a circle.
    """
    channel = link.channel
    peers = [
        (target if source == channel.rank else source, source == channel.rank)
        for source, target in rank_pairs(link, stages)
        if channel.rank in (source, target)
    ]
    connected: list[int] = []
    errors: list[Exception] = []

    def connect() -> bool:
        if channel.device.type == "cuda":
            torch.cuda.set_device(channel.device)  # a new thread starts with the first GPU
        try:
            for peer, is_source in peers:
                with channel.transfer_stream(behind_current=False):
                    byte = torch.zeros(1, dtype=torch.uint8, device=channel.device)
                    transfer = channel.data.send if is_source else channel.data.recv
                    transfer([byte], peer, DATA).wait(channel.timeout)
                connected.append(peer)
        except Exception as error:
            errors.append(error)
        return True

    # A pair may wait for earlier pairs of the other rank. So the time is that of all of them.
    is_done = within(channel.timeout.total_seconds() + 1, connect)
    if is_done is None or errors:
        peer, _ = peers[len(connected)]
        cause = errors[0] if errors else None
        raise link.error(peer, "did not connect for the signals of the teacher", cause) from cause
