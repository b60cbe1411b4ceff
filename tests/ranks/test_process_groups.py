"""Start and end of process groups: order of destruction, abort after a failure, backends."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from pool import Pool
from tiny import make_recipe_file

INIT = "init nccl ['rank', 'store', 'timeout', 'world_size']"
"""The default group is of NCCL alone, and is not bound to a device."""


@pytest.fixture
def own_pool():
    """Two ranks that no other test uses, because their connections break."""
    two = Pool(2)
    yield two
    with contextlib.suppress(Exception):
        two.close()


@pytest.mark.parametrize("owns_default", [True, False])
def test_two_ranks_destroy_their_common_groups_in_one_order(ranks, owns_default):
    """A group of NCCL may wait until its other ranks destroy it, so two orders would wait for ever."""
    layout = {"tp": 2, "pp": 2} if owns_default else {"tp": 2}
    by_rank = ranks(4, "process_groups_workers.shut_down", layout=layout, owns_default=owns_default)
    for left, right in itertools.combinations(by_rank, 2):
        common = set(left) & set(right)
        assert len(common) >= 3
        assert [name for name in left if name in common] == [name for name in right if name in common]


def test_world_inside_a_nemo_recipe_keeps_the_groups_of_the_recipe(ranks):
    outer = {"tensor_model_parallel_size": 2}
    sums = ranks(4, "process_groups_workers.inside_nemo", outer=outer, inner={"pp": 2})
    assert sums == [(1.0, 6.0), (1.0, 6.0), (5.0, 6.0), (5.0, 6.0)]


@pytest.mark.parametrize("role", [False, True], ids=["world", "role"])
def test_failed_rank_with_a_gpu_aborts_its_groups(ranks, role):
    """Without a shutdown before, which would wait for collectives in progress."""
    [(ends, is_left)] = ranks(1, "process_groups_workers.fail", role=role)
    assert [end for end in ends if end != "raw group"] == [INIT, "abort"]
    assert not is_left


def test_finished_rank_with_a_gpu_destroys_its_groups(ranks):
    [ends] = ranks(1, "process_groups_workers.succeed")
    assert ends == [INIT, "raw group", "destroy"]


def test_abort_that_waits_for_other_ranks_does_not_keep_the_process(ranks):
    [(seconds, exits_without_destructors)] = ranks(1, "process_groups_workers.abort_that_waits")
    assert seconds < 2
    assert exits_without_destructors


def test_failed_rank_ends_its_peers_on_a_cpu(own_pool):
    waited, _ = own_pool.run("process_groups_workers.one_fails")
    assert waited < 30


def test_groups_of_256_ranks_have_no_connections_over_gloo(ranks):
    """Megatron-Core makes about a thousand groups; one of gloo is for values in host memory."""
    [counts] = ranks(1, "process_groups_workers.count_groups", layout={"tp": 8, "pp": 4}, num_ranks=256)
    assert counts.pop("gloo") == 1
    assert 900 < counts.pop("inherited") < 2000
    assert not counts


def test_checks_between_stages_accept_a_plain_group_of_nccl(ranks, tmp_path):
    assert ranks(2, "process_groups_workers.checks_over_nccl", folder=tmp_path) == [1, 1]


STEPS = ("distill.steps=4", "distill.warmup_steps=1")
CORRECT = "correct={steps: 2, global_batch_size: 4, micro_batch_size: 2, lr: 1e-4, warmup_steps: 1}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["parallel.tp=2"], ["parallel.pp=2", "distill.states={layers: [[1, 1]]}"], [CORRECT]],
    ids=["tp2", "pp2", "dp2"],
)
def test_all_stages_run_over_plain_groups_of_nccl(own_pool, inputs, tmp_path, overrides):
    recipe = make_recipe_file(tmp_path / "r.yaml", inputs / "model", inputs / "text", tmp_path / "output")
    words = ["compress", str(recipe), *STEPS, *overrides]
    for done, collectives in own_pool.run("process_groups_workers.compress", arguments=words):
        assert done.code == 0, done.err
        assert sum(collectives.values()) > 100
