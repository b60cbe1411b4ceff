"""The pool itself: answers, failures, time-outs, and that no process is left."""

import os
import time
from pathlib import Path

import pytest
from pool import Pool, RankError


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


def add_ranks(number: int) -> int:
    """On the ranks: number + sum of ranks, by a collective."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return number + int(total) + dist.get_rank()


def fail_on(rank: int) -> None:
    """On the ranks: one fails, the others wait for it in a collective."""
    import torch.distributed as dist
    from pool import here

    here["coordinates"] = "(dp 7)"
    if dist.get_rank() == rank:
        raise ValueError("so it goes")
    dist.barrier()


def die_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def start_child() -> int:
    """On the ranks: start a process that outlives its parent, as Megatron-Core's manager would."""
    import subprocess

    return subprocess.Popen(["sleep", "600"]).pid


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def running(pid: int) -> bool:
    """A killed orphan may stay as a zombie where nobody reaps; that is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int]) -> bool:
    """Whether they do within 5 s: a kill is not instantaneous."""
    deadline = time.monotonic() + 5
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(running, pids))


def test_results_are_ordered_by_rank_and_ranks_persist(pool):
    assert pool.run("test_pool.add_ranks", number=10) == [13, 14]
    pids = [rank.process.pid for rank in pool.ranks]
    assert pool.run("test_pool.add_ranks", number=0) == [3, 4]
    assert [rank.process.pid for rank in pool.ranks] == pids


def test_failure_names_its_rank_and_next_call_works(pool):
    with pytest.raises(
        RankError, match=r"(?s)rank 1 of 2: \(dp 7\).*so it goes.*rank 0 of 2 has not answered"
    ):
        pool.run("test_pool.fail_on", rank=1)
    assert pool.run("test_pool.add_ranks", number=10) == [13, 14]
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 3"):
        pool.run("test_pool.die_on", rank=0)


def test_timeout_kills_the_pool_and_its_children(pool):
    children = pool.run("test_pool.start_child")
    with pytest.raises(RankError, match=r"(?s)has not answered in 1 s.*test_pool.py\", line \d+ in sleep"):
        pool.run("test_pool.sleep", seconds=60, timeout_s=1)
    assert all_end(children)


def test_close_leaves_no_process():
    pool = Pool(2)
    children = pool.run("test_pool.start_child")
    pids = [rank.process.pid for rank in pool.ranks]
    pool.close()
    assert all_end([*children, *pids])
