"""A share of the work of a stage, for the tasks of a job array (--shard)."""

from __future__ import annotations

from minitron_mp.artifacts.manifest import find_manifest
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, speaks
from minitron_mp.data.shards import parse_share
from minitron_mp.distributed.job import sigterm_exits
from minitron_mp.workflow.graph import StageGraph


def run_share(name: str, recipe: Recipe, share: str, *, force: bool = False) -> None:
    """Do a share, such as "3/16", of the work of a stage in this process, before the stage runs.

    Any number of processes may do different shares at the same time, so the output folder is not
    locked. force: do it even if the artifact is up to date. InputError for an invalid share.
    """
    parsed = parse_share(share)
    graph = StageGraph(recipe)
    graph.require_stage(name)
    graph.check_output(report=False)
    graph.require_inputs(name)
    work = graph.stages[name].run_share
    assert work is not None
    if not speaks():  # one process of torchrun does it
        return
    has_artifact = find_manifest(graph.paths[name]) is not None
    if has_artifact and not force and graph.why_not_done(name) is None:
        say(f"{name}: done, {graph.paths[name]}")
        return
    with sigterm_exits():
        work(graph.share_files(name), parsed)
