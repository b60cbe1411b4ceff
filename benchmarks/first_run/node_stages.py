"""The stages on a node of 8 GPUs: what one GPU cannot show. Their rehearsal has 4 gloo ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gpu_stages import HERE, NEEDS_GPU, Words, project, torchrun
from readings import log_of, read_project, read_result
from stages import Reader, Stage, read_nothing

NODE_MINUTES = 14.0
RANKS, REHEARSAL_RANKS = 8, 4
RAISE_LIMIT_S = 60.0
"""A job of which one rank raises must end within this time after that."""


def read_worlds(folder: Path) -> dict[str, Any]:
    """Seconds to enter and leave each world, both times."""
    found = [json.loads(line) for line in re.findall(r"^numbers (.*)$", log_of(folder), re.M)]
    if not found:
        raise ValueError("no world was left")
    return {"worlds": found}


def read_raise(folder: Path) -> dict[str, Any]:
    """Seconds from the exception of one rank to the last line of the job's log."""
    text = log_of(folder)
    raised = re.search(r"^raised at ([\d.]+)$", text, re.M)
    if raised is None or "this rank fails on purpose" not in text:
        raise ValueError("the log does not have the error of the rank that raised")
    seconds = (folder / "log").stat().st_mtime - float(raised[1])
    if seconds > RAISE_LIMIT_S:
        raise ValueError(f"the job ended {seconds:.0f} s after the error; allowed: {RAISE_LIMIT_S:.0f} s")
    return {"end_s": round(seconds, 1)}


def node_stages(facts: dict[str, Any], rehearse: bool) -> list[Stage]:
    """Return all stages for this machine."""
    ranks = REHEARSAL_RANKS if rehearse else RANKS
    gpus = len(facts["hardware"]["gpus"])
    missing = "" if rehearse or gpus >= RANKS else f"needs {RANKS} GPUs, here are {gpus}"
    whole = {"tp": ranks, "sequence_parallel": True}
    pair = {"tp": 2, "sequence_parallel": True}
    apart = 2  # ranks of the remote teacher
    replicas = (ranks - apart) // pair["tp"]  # data parallel ranks of its student
    batch, samples = 2 * replicas, 8 * replicas  # microbatches are 2 in training and 4 elsewhere

    def work(what: str, *words: str) -> Words:
        return torchrun(ranks, str(HERE / "node_work.py"), what, *words)

    def step(layout: dict[str, Any], **settings: Any) -> Words:
        return work("step", json.dumps(layout), json.dumps(settings), "{folder}/result.json")

    def stage(
        name: str,
        shows: str,
        limit_s: float,
        command: Words,
        read: Reader = read_nothing,
        accepted: tuple[int, ...] = (0,),
        only_gpus: bool = False,
    ) -> Stage:
        lacking = NEEDS_GPU if rehearse and only_gpus else missing
        return Stage(name, shows, command, limit_s, read, accepted=accepted, missing=lacking)

    return [
        stage(
            "worlds",
            "worlds are entered and left twice, in two layouts",
            150,
            work("worlds", json.dumps(whole), json.dumps(pair)),
            read_worlds,
        ),
        stage(
            "rank_raises",
            "one rank raises, and all ranks end within a minute",
            150,
            work("raises", json.dumps(whole)),
            read_raise,
            accepted=(1,),
        ),
        stage(
            "doctor",
            "versions, GPUs, network and disk, by minitron-mp doctor",
            120,
            torchrun(ranks, "-m", "minitron_mp", "doctor"),
        ),
        stage("tp_all", f"steps with tp {ranks}", 120, step(whole), read_result),
        stage("tp2_dp", f"steps with tp 2 x dp {ranks // 2}", 120, step(pair, overlap=True), read_result),
        stage(
            "remote_teacher",
            f"a recipe with the teacher on {apart} ranks and the student on {ranks - apart}",
            180,
            project(
                "remote",
                *("teacher.ranks=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
                *(f"distill.global_batch_size={batch}", f"score.num_samples={samples}"),
                f"evaluate.num_samples={samples}",
                ranks=ranks,
            ),
            read_project,
        ),
        stage(
            "tp_comm_overlap",
            f"steps with tp {ranks} whose communication is hidden behind products",
            120,
            step(whole, tp_comm_overlap=True),
            read_result,
            only_gpus=True,
        ),
    ]
