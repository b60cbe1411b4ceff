"""A model whose layers differ in size: built, saved and loaded at several layouts; planned and counted."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import BY_NAME, MIXED, make_samples, make_weights

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.models.arch import Arch, fp8_problems, layout_problems
from minitron_mp.models.flops import forward_flops, layer_flops
from minitron_mp.planning.memory import rank_parameters

LAYOUTS = ["one", "tp2", "pp2"]
ROUNDING = 2e-5
"""Of float32 logits, relative to the largest, as in test_slicing.py."""
COUNTERPART = {"one": "tp2", "tp2": "pp2", "pp2": "one"}
"""Layout that loads -> layout that saved."""


@pytest.fixture(scope="module")
def logits(ranks, tmp_path_factory):
    """Logits of (layout that saved, layout that loaded), by rank."""
    folder = tmp_path_factory.mktemp("mixed")
    ranks(1, "model_workers.write_weights", folder=folder / "given", arch=MIXED, weights=make_weights(MIXED))
    for name in LAYOUTS:
        layout = BY_NAME[name]
        copy = {"source": folder / "given", "folder": folder / name, "arch": MIXED}
        ranks(layout.ranks, "model_workers.save_again", layout=layout, **copy)

    def load(saved, loaded):
        layout = BY_NAME[loaded]
        models = {"model": (MIXED, folder / saved)}
        found = ranks(layout.ranks, "model_workers.load_and_run", layout=layout, models=models)
        return [rank["model"] for rank in found if rank["model"] is not None]

    return load


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_match_dense_reference_after_loading_at_another_layout(logits, layout):
    want = reference.logits(MIXED, make_weights(MIXED), make_samples(MIXED, 0, 8)["tokens"])
    found = logits(COUNTERPART[layout], layout)
    assert found, "no rank has logits"
    for ours in found:
        assert (ours - want).abs().max() < ROUNDING * want.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_each_stage_match_the_built_model(ranks, layout):
    layout = BY_NAME[layout]
    by_rank = ranks(layout.ranks, "model_workers.count_parameters", layout=layout, arch=MIXED)
    want = rank_parameters(MIXED, ParallelConfig(**layout.parallel))
    assert by_rank == [(stage, want[stage]) for stage, _ in by_rank]


def test_arch_round_trips_through_its_written_form():
    assert not MIXED.is_uniform
    written = MIXED.model_dump(mode="json")
    assert len(written["blocks"]) == 2
    assert Arch.model_validate(written) == MIXED
    assert Arch.model_validate_json(MIXED.model_dump_json()) == MIXED


def test_counts_sum_over_layers():
    first, second = (MIXED.with_block(block) for block in MIXED.blocks)
    average = (first.num_parameters() + second.num_parameters()) / 2
    assert MIXED.num_parameters() == average
    shapes = MIXED.shapes()
    padding = (MIXED.padded_vocab_size - MIXED.vocab_size) * MIXED.hidden_size
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == MIXED.num_parameters() + padding
    layers = layer_flops(first, 24) + layer_flops(second, 24)
    assert forward_flops(MIXED, 24, head=False) == layers


def test_problems_name_the_layers():
    assert layout_problems(MIXED, 2) == []
    problems = layout_problems(MIXED, 4)
    assert problems == [
        "tensor parallel size 4 does not divide num_query_groups 2 in layer 1; use a divisor of 2"
    ]
    assert any("ffn_hidden_size / tp (48 / 2) in layer 1" in text for text in fp8_problems(MIXED, 2, 16))
