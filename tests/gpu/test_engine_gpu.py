"""Transformer Engine's layers and FP8 on a GPU: same model, same scores, loss curves close to bf16.

    pytest tests/gpu

Each test is skipped if its requirements are missing. Tests without a GPU are in
tests/ranks/test_precision.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import microbatches
from gpu_job import run_ranks, separate_hosts
from tiny import make_model, make_recipe_file, make_text, read_metrics

from minitron_mp.artifacts.checkpoint import load_weights, model_state, save_checkpoint
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig, TargetConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distributed.schedule import run_schedule
from minitron_mp.distributed.world import join_world, seed_all
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import HIDDEN
from minitron_mp.models.precision import check_cuda_graphs
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.pruning.importance import score
from minitron_mp.pruning.make_plan import make_plan
from minitron_mp.pruning.masks import masked

NEEDED = {"model": "m", "output": "o"}
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3": {"qk_norm": True},
    "nemotron": {"norm": "layer1p", "activation": "squared_relu", "rotary_percent": 0.5},
}
SIZES = {
    "num_layers": 3,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
}
SIZES |= {"vocab_size": 1024, "max_position_embeddings": 4096, "tied": False}
SEQUENCE = 128
LOCAL, ENGINE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not find_spec("transformer_engine"), reason="needs Transformer Engine"),
]


def needs_fp8(kind: str) -> None:
    """Skip, with what is missing, where this machine does not compute this kind of FP8."""
    from minitron_mp.models.precision import check_hardware

    try:
        check_hardware(kind, torch.device("cuda", 0))
    except InputError as error:
        pytest.skip(str(error))


def needs_graphs() -> None:
    try:
        check_cuda_graphs()
    except InputError as error:
        pytest.skip(str(error))


def arch_of(family: str) -> Arch:
    return Arch(family=family, **{**SIZES, **FAMILIES[family]})


@pytest.fixture
def world():
    with join_world(ParallelConfig(), seed=1) as alone:
        yield alone


@pytest.fixture
def models(world, tmp_path):
    """build(arch, precision, **options) returns chunks in eval mode, of one checkpoint per arch."""
    from minitron_mp.models.build import ModelOptions, build_model

    def build(arch: Arch, precision: str = "bf16", **options):
        folder = tmp_path / arch.family
        if not folder.exists():
            torch.manual_seed(0)
            chunks = build_model(
                arch,
                world,
                ModelOptions(precision="fp32", sequence_length=SEQUENCE, random_weights=True, **LOCAL),
            ).chunks
            with torch.no_grad():
                for name, parameter in chunks[0].named_parameters():
                    if "norm" in name:  # ones and zeros by themselves
                        parameter.add_(0.2 * torch.randn_like(parameter))
                    elif "linear" in name:  # logits of a size that tells models apart
                        parameter.mul_(3)
                    if "linear_fc1.weight" in name and arch.gated:
                        parameter[: arch.ffn_hidden_size].mul_(
                            4
                        )  # gate and up differ, as in real models: one scale for both has to be both's
            save_checkpoint(
                model_state(chunks, world),
                folder,
                Manifest(stage="teacher", settings={}, inputs={}, arch=arch),
            )
        chunks = build_model(
            arch, world, ModelOptions(precision=precision, sequence_length=SEQUENCE, **options)
        ).chunks
        load_weights(chunks, folder, world)
        for chunk in chunks:
            chunk.eval()
        return chunks

    return build


def batches_of(arch: Arch, step: int = 0, count: int = 4, size: int = 1):
    """As the data loader makes them, whole sequences of SEQUENCE tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, arch.vocab_size, (count, SEQUENCE + 1), generator=generator)
    place = torch.arange(SEQUENCE).expand(count, SEQUENCE).contiguous()
    samples = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": place,
        "loss_mask": torch.ones(count, SEQUENCE),
    }
    return microbatches(samples, size, 0, 1)


def hidden_of(chunks, arch: Arch, world, step: int = 0) -> torch.Tensor:
    """[s, count, h] after the final norm, float32."""
    return torch.cat(run_schedule(chunks, batches_of(arch, step), world, lambda hidden, _: hidden.float()), 1)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_te_and_local_layers_build_the_same_model(models, world, family):
    """Compare bf16 with float32.

    The error of Transformer Engine's layers may be 1.5 times that of the local ones, because they
    round at other places.
    """
    arch = arch_of(family)
    want = hidden_of(models(arch, "fp32", **LOCAL), arch, world)
    local, engine = models(arch, **LOCAL), models(arch, **ENGINE)
    keys = [
        {(entry.key, tuple(entry.data.shape)) for entry in model_state(chunks, world)["model0"].values()}
        for chunks in (local, engine)
    ]
    assert keys[0] == keys[1]
    errors = [error_of(hidden_of(chunks, arch, world), want) for chunks in (local, engine)]
    print(family, "error of local and Transformer Engine layers", errors)
    assert errors[1] < 1.5 * errors[0]
    assert any("transformer_engine" in type(module).__module__ for module in engine[0].modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_te_and_local_scores_keep_the_same_indices(models, world, family):
    """Kept indices of Transformer Engine's layers match those of the local layers in float32.

    Compared are bf16 and float32, whose products are tf32 there. Exceptions are indices whose
    score is close to the cut: 0.1 % and 2 %.
    """
    arch, kept = arch_of(family), {"hidden": 192, "ffn": 384, "heads": 4}
    found = {}
    for name, precision, options in (
        ("local", "fp32", LOCAL),
        ("fp32", "fp32", ENGINE),
        ("bf16", "bf16", ENGINE),
    ):
        chunks, batches = models(arch, precision, **options), batches_of(arch, 0, 16, 4)
        model = ShardedModel(chunks, arch, world, SEQUENCE, precision)
        found[name] = score(model, [batches], ScoreConfig())
    for name, near in (("fp32", 1e-3), ("bf16", 2e-2)):
        for axis, count in kept.items():
            for layer, own in found[name][axis].items():
                want = found["local"][axis][layer]
                order = np.argsort(-want)
                differ = set(order[:count]) ^ set(np.argsort(-own)[:count])
                assert all(abs(want[i] / want[order[count - 1]] - 1) < near for i in differ), (
                    name,
                    axis,
                    sorted(differ),
                )


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_masks_match_for_te_and_local_layers(models, world, family):
    arch = arch_of(family)
    local = models(arch, "fp32", **LOCAL)
    model = ShardedModel(local, arch, world, SEQUENCE, "fp32")
    scores = score(model, [batches_of(arch)], ScoreConfig())
    plan = make_plan(scores, arch, TargetConfig(hidden_size=192, ffn_hidden_size=384, num_attention_heads=4))
    found = []
    for chunks in (local, models(arch, **LOCAL), models(arch, **ENGINE)):
        with masked(replace(model, chunks=chunks), plan):
            hidden = hidden_of(chunks, arch, world)
        found.append(hidden[..., torch.as_tensor(plan.units(HIDDEN), device=hidden.device)])
    assert error_of(found[2], found[0]) < 1.5 * error_of(found[1], found[0])


def test_fp8_rejects_unaligned_sizes(models):
    needs_fp8("tensorwise")
    odd = arch_of("llama").resized(ffn_hidden_size=504)
    with pytest.raises(
        InputError, match=r"multiples of 16, ffn_hidden_size / tp \(504 / 1\) is 504; nearest 512"
    ):
        models(odd, fp8="tensorwise")


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_fp8_teacher_is_independent_of_previous_batches(models, world, kind):
    """Bitwise; near the bf16 teacher; and its linear layers hold 1 byte a weight."""
    needs_fp8(kind)
    arch = arch_of("llama")
    exact = hidden_of(models(arch), arch, world)
    chunks = models(arch, fp8=kind)
    for chunk in chunks:
        chunk.requires_grad_(False)
    first, second = hidden_of(chunks, arch, world, 0), hidden_of(chunks, arch, world, 1)
    assert torch.equal(hidden_of(chunks, arch, world, 1), second)
    assert torch.equal(hidden_of(chunks, arch, world, 0), first)
    print(kind, "error of the hidden states", error_of(first, exact))
    assert 0 < error_of(first, exact) < 0.15  # 3 bits of mantissa: 3 % a product, 12 products in a row
    weights = [dict(model[0].named_parameters()) for model in (chunks, models(arch))]
    quantised = [
        name for name, weight in weights[0].items() if "transformer_engine" in type(weight).__module__
    ]
    assert len(quantised) == 4 * arch.num_layers
    for name in quantised:  # half a step of e4m3 is 1/16 at most, 1/32 on average
        assert error_of(weights[0][name].dequantize().float(), weights[1][name].float()) < 0.04, name


STEPS = 60


def losses_of(
    arch: Arch, world, checkpoints: Path, fp8: str | None, *, stop_after: int | None = None, **more
) -> list[float]:
    """Cross-entropy of STEPS steps on 8 samples over and over, from the same random weights."""
    from minitron_mp.models.build import ModelOptions, build_model
    from minitron_mp.training.loop import train_one
    from minitron_mp.training.options import RunOptions

    settings = CorrectionConfig(
        steps=STEPS,
        warmup_steps=4,
        global_batch_size=8,
        micro_batch_size=2,
        lr=1e-3,
        min_lr=1e-4,
        fp8=fp8,
        checkpoint_interval=20,
        **more,
    )
    seed_all(5)
    model = build_model(
        arch,
        world,
        ModelOptions(precision="bf16", sequence_length=SEQUENCE, training=settings, random_weights=True),
    )
    chunks, found = model.chunks, []
    assert hasattr(chunks[0].decoder.layers[0], "cudagraph_manager") == settings.cuda_graphs
    recorded = []

    def on_step(metrics) -> None:
        found.append(metrics.loss)
        if settings.cuda_graphs:
            recorded.append(
                [
                    runner.bwd_graph
                    for layer in chunks[0].decoder.layers
                    for runner in layer.cudagraph_manager.cudagraph_runners
                ]
            )

    manifest = Manifest(stage="correct", settings={"fp8": fp8}, inputs={})
    options = RunOptions(checkpoints, manifest, seed=3, on_step=on_step)
    train_one(model, None, lambda step: batches_of(arch, 0, 8, 2), settings, options, stop_after=stop_after)
    if settings.cuda_graphs:
        assert len(recorded[1]) >= len(chunks[0].decoder.layers)
        assert all(recorded[1])
        hidden_of(
            [chunk.eval() for chunk in chunks], arch, world
        )  # the trained model is used without its graphs
    return found


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise", "delayed"])
def test_fp8_loss_follows_bf16(world, tmp_path, kind):
    """The loss, 6.9 nats at first, stays in a band around bf16 at each of the last 20 steps.

    The band is 5 % of the first loss; 15 % for delayed scaling, which starts slowly.
    """
    needs_fp8(kind)
    arch = arch_of("llama")
    want, got = (losses_of(arch, world, tmp_path / str(fp8), fp8) for fp8 in (None, kind))
    print(kind, "first, middle and last loss", got[:: STEPS // 2 - 1], "in bf16", want[:: STEPS // 2 - 1])
    assert want[-1] < 0.7 * want[0], "bf16 itself must learn something"
    band = (0.15 if kind == "delayed" else 0.05) * want[0]
    assert max(abs(a - b) for a, b in zip(got[-20:], want[-20:])) < band


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_precision": "bf16"},
        {"moment_precision": "bf16"},
        {"gradient_precision": "bf16", "moment_precision": "bf16"},
    ],
    ids=["gradients", "moments", "both"],
)
def test_bf16_gradients_and_moments_follow_float32_and_resume(world, tmp_path, change, deterministic):
    """The loss stays within 5 % of the first loss, and the run resumes bitwise.

    The checkpoint has the moments in float32, and their values are those of bf16.
    """
    from megatron.core import dist_checkpointing

    arch = arch_of("llama")
    want = losses_of(arch, world, tmp_path / "float32", None)
    torch.cuda.reset_peak_memory_stats()
    whole = losses_of(arch, world, tmp_path / "whole", None, **change)
    print(change, "last losses", whole[-3:], "float32", want[-3:], torch.cuda.max_memory_allocated())
    assert whole != want
    assert max(abs(a - b) for a, b in zip(whole, want)) < 0.05 * want[0]
    parts = losses_of(arch, world, tmp_path / "parts", None, stop_after=20, **change)
    folder = tmp_path / "parts" / "step_00000020"
    saved = dist_checkpointing.load_plain_tensors(str(folder))
    moments = {key: value for key, value in saved.items() if key.startswith("optimizer.exp_avg")}
    assert {value.dtype for value in moments.values()} == {torch.float32}
    rounded = all(torch.equal(value, value.bfloat16().float()) for value in moments.values())
    assert rounded == ("moment_precision" in change)
    parts += losses_of(arch, world, tmp_path / "parts", None, **change)
    assert parts == whole


@pytest.mark.parametrize("kind", [None, "tensorwise", "delayed"])
@pytest.mark.parametrize(
    "more",
    [{}, {"recompute": True}, {"async_save": True}, {"cuda_graphs": True}],
    ids=["stored", "recomputed", "async", "graphs"],
)
def test_fp8_training_resumes(world, tmp_path, kind, more, deterministic):
    """Resume bitwise, with attention that adds in a fixed order.

    The checkpoint has the histories of delayed scaling. A background checkpoint holds the weights
    of its step, not those of later steps.
    """
    if kind:
        needs_fp8(kind)
    if "cuda_graphs" in more:
        needs_graphs()
        if kind == "delayed":
            pytest.skip("a recipe refuses it")
    arch = arch_of("llama")
    whole = losses_of(arch, world, tmp_path / "whole", kind, **more)
    parts = losses_of(arch, world, tmp_path / "parts", kind, stop_after=20, **more) + losses_of(
        arch, world, tmp_path / "parts", kind, **more
    )
    assert parts == whole


@pytest.mark.parametrize("kind", [None, "tensorwise"])
def test_cuda_graphs_match_eager_execution(world, tmp_path, kind, deterministic):
    """Bitwise: same kernels, same numbers, attention that adds in a fixed order.

    A resumed run computes its first step without graphs.
    """
    needs_graphs()
    if kind:
        needs_fp8(kind)
    arch = arch_of("llama")
    found = [
        losses_of(arch, world, tmp_path / f"{i}", kind, cuda_graphs=on)
        for i, on in enumerate((False, True, True, False))
    ]
    print(
        kind,
        "furthest from the run without graphs",
        [max(abs(a - b) for a, b in zip(one, found[0])) for one in found],
    )
    assert found[2] == found[1]
    assert found[3] == found[0]
    assert found[1] == found[0]


TP = {"tp": 2, "sequence_parallel": True}
TWO_RANKS = {
    "tp": (TP, {}, 1),
    "tp-graphs": (TP, {"cuda_graphs": True}, 1),
    "tp-without-sp-graphs": ({"tp": 2}, {"cuda_graphs": True}, 1),
    "cp-graphs": ({"cp": 2}, {"cuda_graphs": True}, 1),
    "tp-communication-overlapped": (TP, {"tp_comm_overlap": True}, 2),
    "pp": ({"pp": 2}, {}, 1),
    "pp-graphs": ({"pp": 2}, {"cuda_graphs": True}, 1),
    "cp": ({"cp": 2}, {}, 1),
    "dp": ({}, {}, 1),
    "dp-overlapped": ({}, {"overlap": True}, 1),
    "dp-overlapped-graphs": ({}, {"overlap": True, "cuda_graphs": True}, 1),
    "dp-overlapped-async": ({}, {"overlap": True, "async_save": True, "checkpoint_interval": 2}, 1),
}
"""Layout, training settings and number of GPUs.

tp_comm_overlap writes into another GPU's memory, so it needs two.
"""


@pytest.mark.parametrize("fp8", [None, "tensorwise"], ids=str)
@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_match_one_rank(models, world, tmp_path, case, fp8):
    """Compare two ranks with one.

    In float32 and bf16 only the order of sums differs. In FP8 the scale of a tensor comes from its
    maximum over the tp and cp ranks, and from the microbatches of one dp rank.
    """
    parallel_of, settings, gpus = TWO_RANKS[case]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, here is {torch.cuda.device_count()}")
    if fp8:
        needs_fp8(fp8)
    if "cuda_graphs" in settings:
        needs_graphs()
        if fp8 and "pp" in parallel_of:
            pytest.skip("a recipe refuses it")
    arch = arch_of("llama")
    models(arch, **LOCAL)  # writes the checkpoint
    alone = losses_from(arch, world, tmp_path / arch.family, tmp_path / "one", {"fp8": fp8})
    said = run_ranks(
        __file__,
        "train",
        tmp_path / arch.family,
        tmp_path / "two",
        json.dumps(parallel_of),
        json.dumps(settings | {"fp8": fp8}),
    )
    two, _ = json.JSONDecoder().raw_decode(said.split("losses ")[1])
    print(case, fp8, alone, two)
    assert len(two) == len(alone)
    assert max(abs(a - b) for a, b in zip(alone, two)) < 0.02 * alone[0]


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_fp8_teacher_loads_at_another_tp(models, world, tmp_path, kind):
    """One rank writes, two ranks read: each holds its shard of the full weights; bound as above."""
    needs_fp8(kind)
    arch = arch_of("llama")
    torch.save(hidden_of(models(arch), arch, world).cpu(), tmp_path / "exact.pt")
    found = json.loads(
        run_ranks(__file__, "teacher", tmp_path / arch.family, tmp_path / "exact.pt", kind).split("errors ")[
            1
        ]
    )
    print(kind, found)
    assert 0 < found["hidden"] < 0.15
    assert len(found["weights"]) == 4 * arch.num_layers
    assert max(found["weights"].values()) < 0.04


def losses_from(arch: Arch, world, folder: Path, checkpoints: Path, more: dict) -> list[float]:
    """Cross-entropy of a few steps from a checkpoint."""
    from minitron_mp.models.build import ModelOptions, build_model
    from minitron_mp.training.loop import train_one
    from minitron_mp.training.options import RunOptions

    settings = CorrectionConfig(steps=8, warmup_steps=0, global_batch_size=4, lr=3e-4, min_lr=1e-4, **more)
    model = build_model(
        arch, world, ModelOptions(precision="bf16", sequence_length=SEQUENCE, training=settings)
    )
    load_weights(model.chunks, folder, world)
    found: list[float] = []
    options = RunOptions(
        checkpoints,
        Manifest(stage="correct", settings={}, inputs={}),
        seed=3,
        on_step=lambda metrics: found.append(metrics.loss),
    )
    own = batches_of(arch)[world.groups.dp.rank() :: world.groups.dp.size()]
    train_one(model, None, lambda step: own, settings, options)
    return found


def test_cuda_graphs_with_colocated_teacher(tmp_path):
    """The whole tiny project: what is distilled is what is distilled without them."""
    needs_graphs()
    make_model(tmp_path / "model")
    make_text(tmp_path / "text")
    curves = []
    for on in (False, True):
        training = {"precision": "bf16", "distill": {"cuda_graphs": on}}
        run_ranks(
            __file__,
            "compress",
            make_recipe_file(
                tmp_path / f"{on}.yaml", tmp_path / "model", tmp_path / "text", tmp_path / str(on), **training
            ),
        )
        curves.append([row["loss"] for row in read_metrics(tmp_path / str(on))])
    assert max(abs(a - b) for a, b in zip(*curves)) < 0.02 * curves[0][0]


def test_remote_fp8_teacher(tmp_path):
    """The student matches a colocated FP8 teacher's, up to the order of bf16 sums.

    Runs the complete small project on two ranks of one GPU.
    """
    needs_fp8("tensorwise")
    make_model(tmp_path / "model")
    make_text(tmp_path / "text")
    both = {"precision": "bf16", "distill": {"fp8": "tensorwise"}}
    curves = {}
    for name, teacher in (("colocated", {}), ("remote", {"placement": "remote", "ranks": 1})):
        recipe = make_recipe_file(
            tmp_path / f"{name}.yaml",
            tmp_path / "model",
            tmp_path / "text",
            tmp_path / name,
            teacher={"fp8": "tensorwise", **teacher},
            **both,
        )
        out = run_ranks(__file__, "compress", recipe)
        assert "teacher in FP8 (tensorwise): KL(bf16 || FP8)" in out
        curves[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert max(abs(a - b) for a, b in zip(*curves.values())) < 0.05 * curves["remote"][0]


def main(what: str, *arguments: str) -> None:
    """On each rank of run_ranks()."""
    separate_hosts()
    if what == "compress":
        from minitron_mp.cli import main

        sys.argv = ["minitron-mp", what, *arguments]
        main()
        return
    arch, folder = arch_of("llama"), Path(arguments[0])
    if what == "teacher":
        _, exact, kind = arguments
        with join_world(ParallelConfig(tp=2), seed=1) as world:
            found = errors_of_a_teacher(arch, world, folder, torch.load(exact), kind)
            if world.is_main:
                print("errors", json.dumps(found), flush=True)
        return
    _, checkpoints, layout, settings = arguments
    with join_world(ParallelConfig(**json.loads(layout)), seed=1) as world:
        losses = losses_from(arch, world, folder, Path(checkpoints), json.loads(settings))
        if world.is_main:
            print("losses", json.dumps(losses), flush=True)


def errors_of_a_teacher(arch: Arch, world, folder: Path, exact: torch.Tensor, kind: str) -> dict:
    """Return relative errors of the hidden states and of each FP8 weight against bf16 shards.

    Only rank 0's are returned.
    """
    from minitron_mp.models.build import ModelOptions, build_model

    options = {"precision": "bf16", "sequence_length": SEQUENCE}
    quantised = build_model(arch, world, ModelOptions(fp8=kind, **options)).chunks
    plain = build_model(arch, world, ModelOptions(**options)).chunks
    for chunks in (quantised, plain):
        load_weights(chunks, folder, world)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    weights = dict(plain[0].named_parameters())
    pairs = {
        name: (weight, weights[name])
        for name, weight in quantised[0].named_parameters()
        if "transformer_engine" in type(weight).__module__
    }
    found = {name: error_of(own.dequantize().float(), want.float()) for name, (own, want) in pairs.items()}
    return {"hidden": error_of(hidden_of(quantised, arch, world), exact.to(world.device)), "weights": found}


if __name__ == "__main__":
    main(*sys.argv[1:])
