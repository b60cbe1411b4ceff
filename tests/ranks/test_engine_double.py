"""Transformer Engine's layers on CPUs, with the double of tests/support/engine_double.py.

Megatron's own wrappers build the model, so names, arguments, layouts and contexts are those of a
GPU. The kernels are not: tests/gpu/test_engine_gpu.py has those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import ARCHS, BY_NAME, SEQUENCE_LENGTH
from pool import Pool

FAMILIES = ("qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "nemotron")))
ROUNDING = 1e-4
"""Relative difference of float32 sums in another order, after 6 layers."""
BF16 = 0.03
"""The same in bf16, where each rounding is up to 0.4 %."""


@pytest.fixture(scope="module")
def engine_ranks() -> Iterator:
    """engine_ranks(size, "function", **kwargs) runs a worker in processes that import the double."""
    pools: dict[int, Pool] = {}

    def run(size: int, function: str, **kwargs: object) -> list:
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        return pools.setdefault(size, Pool(size, environment)).run(f"engine_workers.{function}", **kwargs)

    yield run
    for pool in pools.values():
        pool.close()


def run(engine_ranks, tmp_path: Path, family: str, name: str, precision: str, **options: object) -> list:
    """Return the results of engine_workers.run_model() by rank."""
    layout, folder = BY_NAME[name], tmp_path / "teacher"
    if not folder.exists():
        engine_ranks(1, "write_teacher", arch=ARCHS[family], folder=folder, engine=False)
    return engine_ranks(
        layout.ranks,
        "run_model",
        layout=layout,
        arch=ARCHS[family],
        teacher=folder,
        precision=precision,
        output=tmp_path / str(options["engine"]),
        **options,
    )


def compare(engine_ranks, tmp_path: Path, *case: str, **training: object) -> list[tuple[dict, dict]]:
    """Run both kinds of layers; return (local, Transformer Engine) of each rank."""
    local = run(engine_ranks, tmp_path, *case, engine=False, **training)
    return list(zip(local, run(engine_ranks, tmp_path, *case, engine=True, **training)))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def assert_same(local: dict, engine: dict, tolerance: float) -> None:
    if local["hidden"] is not None:
        assert difference(engine["hidden"], local["hidden"]) < tolerance
    assert engine["scores"].keys() == local["scores"].keys()
    for key, want in local["scores"].items():
        assert difference(engine["scores"][key], want) < tolerance, key
    assert engine["losses"] == pytest.approx(local["losses"], rel=tolerance)
    assert engine["weights"].keys() == local["weights"].keys()
    for key, want in local["weights"].items():
        assert difference(engine["weights"][key], want) < tolerance, key


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_layers_compute_what_the_local_layers_compute(engine_ranks, tmp_path, family):
    ((local, engine),) = compare(engine_ranks, tmp_path, family, "one", "fp32")
    assert_same(local, engine, ROUNDING)
    assert not local["calls"]
    norm = "layernorm" if family == "nemotron" else "rmsnorm"
    assert engine["calls"][f"{norm}_fwd"] > engine["calls"][f"{norm}_bwd"] > 0
    assert engine["calls"]["fused weight gradients"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "cp2", "pp2-vpp2", "dp2"])
def test_engine_layers_in_layouts(engine_ranks, tmp_path, layout):
    for local, engine in compare(engine_ranks, tmp_path, "qwen3", layout, "fp32", recompute=True):
        assert_same(local, engine, ROUNDING)


@pytest.mark.slow
def test_engine_layers_in_bf16(engine_ranks, tmp_path):
    ((local, engine),) = compare(engine_ranks, tmp_path, "qwen3", "one", "bf16")
    assert difference(engine["hidden"], local["hidden"]) < BF16
    assert engine["losses"] == pytest.approx(local["losses"], rel=BF16)


@pytest.mark.slow
@pytest.mark.parametrize("written_by", ["local", "engine"])
def test_both_kinds_of_layers_read_one_checkpoint(engine_ranks, tmp_path, written_by):
    """The keys are equal, and the model of the other kind loads every weight."""
    arch = ARCHS["nemotron"]
    folders = {name: tmp_path / name for name in ("local", "engine")}
    keys = [
        engine_ranks(1, "write_teacher", arch=arch, folder=folder, engine=name == "engine")[0]
        for name, folder in folders.items()
    ]
    assert keys[0] == keys[1]
    hidden = [
        engine_ranks(
            1, "hidden_of", arch=arch, teacher=folders[written_by], engine=engine, layout=BY_NAME["one"]
        )[0]
        for engine in (False, True)
    ]
    assert difference(hidden[1], hidden[0]) < ROUNDING


@pytest.mark.slow
def test_tp_comm_overlap_reaches_each_layer(engine_ranks, tmp_path):
    """Column-parallel layers get the overlaps of the backward pass as well."""
    (engine, _) = run(engine_ranks, tmp_path, "qwen3", "tp2-sp", "bf16", engine=True, tp_comm_overlap=True)
    forward = {"ub_overlap_ag": True, "ub_overlap_rs": True}
    backward = {"ub_bulk_dgrad": True, "ub_bulk_wgrad": True, "ub_overlap_rs_dgrad": False}
    none = dict.fromkeys(backward, False)
    assert engine["settings"] == {
        "qkv": forward | backward,
        "fc1": forward | backward,
        "proj": forward | none,
        "fc2": forward | none,
    }
    tokens, hidden = 2 * SEQUENCE_LENGTH, ARCHS["qwen3"].hidden_size
    assert engine["calls"][f"initialize_ub [{tokens}, {hidden}] 2 none"] == 1
    assert engine["calls"]["destroy_ub"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("tensorwise", "Float8CurrentScaling"),
        ("delayed", "TEDelayedScaling"),
        ("blockwise", "Float8BlockScaling"),
    ],
)
def test_fp8_contexts_surround_each_layer(engine_ranks, tmp_path, kind, recipe):
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}
    arch = ARCHS["llama"].resized(**sizes).model_copy(update={"kv_channels": 16})
    engine_ranks(1, "write_teacher", arch=arch, folder=tmp_path / "teacher", engine=True)
    (found,) = engine_ranks(
        1,
        "run_fp8",
        layout=BY_NAME["one"],
        arch=arch,
        teacher=tmp_path / "teacher",
        kind=kind,
        output=tmp_path / "run",
        tokens=32,
    )
    for calls in found.values():
        assert calls["layers in FP8"] == 4 * arch.num_layers
        assert calls[f"fp8_autocast {recipe}"] > 0
    assert "fp8_model_init" not in found["training"], "a trained model keeps its bf16 weights"
    assert found["frozen"]["fp8_model_init"] > 0
