"""The planner: its parameters, bytes and times match real ones; the command `estimate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cases import ARCHS
from test_cli import here  # noqa: F401 (a fixture)
from tiny import ROOT, SIZES, make_recipe_file, refused

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import load_recipe, make_recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.models.arch import Arch
from minitron_mp.planning.activations import activation_bytes_per_token, layers_in_flight
from minitron_mp.planning.case import PlanningCase
from minitron_mp.planning.command import read_models
from minitron_mp.planning.hardware import GPUS, read_hardware
from minitron_mp.planning.layouts import BATCH, ENGINE
from minitron_mp.planning.memory import rank_parameters, training_memory
from minitron_mp.planning.model_pass import STUDENT, TEACHER
from minitron_mp.planning.search import fastest_layout, search_layouts
from minitron_mp.planning.step_time import TP, estimate_distillation, estimate_training
from minitron_mp.planning.times import MEASURED, SCALED, SHIPPED, OutputLayers, Times, read_times

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.stem != "quickstart")
"""The quick start's model is fetched first."""
CLUSTER = ParallelConfig(tp=8, pp=4, sequence_parallel=True)
TWELVE_TO_EIGHT = "examples/mn_minitron_8b.yaml"
NO_OVERLAP = [
    f"{section}.{key}=false" for section in ("distill", "correct") for key in ("overlap", "tp_comm_overlap")
]


def case_of(*overrides: str, world: int) -> PlanningCase:
    """12B -> 8B on so many GPUs."""
    recipe = load_recipe(TWELVE_TO_EIGHT, overrides)
    models = read_models(recipe)
    return PlanningCase(models.student, models.teacher, recipe, world)


def archs_of(recipe) -> tuple[Arch, Arch, Arch]:
    models = read_models(recipe)
    return models.base, models.teacher, models.student


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_parameter_counts_match_megatron(ranks, examples):
    """All models of the recipes at their layout and at tp 8 x pp 4, with and without interleaving.

    Also tied and uneven test models.
    """
    recipes = [load_recipe(path) for path in EXAMPLES]
    own = {(arch, recipe.parallel) for recipe in recipes for arch in archs_of(recipe)}
    cases = [*own, *((arch, CLUSTER) for arch in {arch for arch, _ in own})]
    cases += [
        (arch, CLUSTER.model_copy(update={"vpp": 5})) for arch in archs_of(load_recipe(TWELVE_TO_EIGHT))[1:]
    ]
    cases += [
        (arch, ParallelConfig(tp=tp, pp=4, sequence_parallel=tp > 1))
        for arch in ARCHS.values()
        for tp in (1, 2)
        if arch.num_query_groups % tp == 0
    ]
    assert {arch.num_parameters() for arch, _ in cases} > {12_247_782_400, 8_414_105_600}
    for (arch, p), found in zip(cases, ranks(1, "planning_workers.parameters", cases=cases)[0]):
        assert found == [(n, n) for n in rank_parameters(arch, p)], (
            f"{arch.family} {arch.num_parameters():,} at {p}"
        )


WIDE = {
    "hidden_size": 96,
    "ffn_hidden_size": 320,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 256,
}
WIDE |= {"max_position_embeddings": 256, "num_layers": 3}
KINDS = {
    "nemotron": {"norm": "layer1p", "activation": "squared_relu"},
    "llama": {},
    "qwen3": {"qk_norm": True},
}


def test_activation_bytes_match_autograd(ranks):
    """Compare three layers less two.

    Added here is what the formula leaves out: rotary tables, and the normalised input that
    F.rms_norm keeps on a CPU, where it is made of small operations.
    """
    split, archs = ParallelConfig(tp=2, sequence_parallel=True), {}
    cases = [
        ("nemotron", p, precision, False) for p in (ParallelConfig(), split) for precision in ("fp32", "bf16")
    ]
    cases += [(kind, p, "fp32", False) for kind in ("llama", "qwen3") for p in (ParallelConfig(), split)]
    cases += [("nemotron", ParallelConfig(cp=2), "fp32", False), ("llama", ParallelConfig(), "fp32", True)]
    for name, extra in KINDS.items():
        archs[name] = [Arch(family=name, tied=False, **WIDE | {"num_layers": n}, **extra) for n in (2, 3)]
    wanted = [
        (arch, p, precision, recompute, 128, 2)
        for kind, p, precision, recompute in cases
        for arch in archs[kind]
    ]
    (found,) = ranks(1, "planning_workers.kept", cases=wanted)
    for (kind, p, precision, recompute), two, three in zip(cases, found[::2], found[1::2]):
        arch, size, tokens = archs[kind][0], 4 if precision == "fp32" else 2, 256 // p.cp
        want = tokens * activation_bytes_per_token(arch, p, size)
        if recompute:
            want = tokens * size * arch.hidden_size
        else:
            want += 4 * 128 // p.cp * arch.kv_channels * size + 64 * 128 * size * (p.cp > 1)  # the mask
            want += tokens * size * 2 * arch.hidden_size / p.tp * (arch.norm == "rms")
            want += (
                tokens
                * size
                * (arch.num_attention_heads + arch.num_query_groups)
                * arch.kv_channels
                / p.tp
                * arch.qk_norm
            )
        assert three - two == pytest.approx(want, rel=0.01), (kind, p, precision)


def test_layers_in_flight_match_the_schedule(ranks):
    """Megatron's own schedules stage by stage: few microbatches, uneven stages, interleaving."""
    arch = ARCHS["qwen2"].resized(num_layers=9)
    cases = [
        (ParallelConfig(pp=2), 4),
        (ParallelConfig(pp=4), 2),
        (ParallelConfig(pp=4), 6),
        (ParallelConfig(pp=2, vpp=2), 2),
        (ParallelConfig(pp=2, vpp=2), 8),
        (ParallelConfig(pp=4, vpp=2), 8),
        (ParallelConfig(pp=2, layers=(7, 2)), 4),
        (ParallelConfig(pp=2, vpp=2, layers=(1, 4, 1, 3)), 8),
    ]
    (found,) = ranks(1, "planning_workers.in_flight", arch=arch, cases=cases)
    for (p, microbatches), peaks in zip(cases, found):
        assert peaks == [
            layers_in_flight(arch.num_layers, p, microbatches, stage) for stage in range(p.pp)
        ], p


def test_recomputation_of_more_layers_needs_less_memory_and_more_time(examples):
    recipe, arch = load_recipe(TWELVE_TO_EIGHT), ARCHS["nemotron"].resized(num_layers=8)
    recipe = recipe.model_copy(update={"parallel": ParallelConfig(pp=2)})

    def activations(recompute: bool | int) -> float:
        training = recipe.distill.model_copy(update={"recompute": recompute})
        return training_memory(arch, training, recipe, 2, 0)["activations (estimate)"]

    def seconds(recompute: bool | int) -> float:
        training = recipe.distill.model_copy(update={"recompute": recompute})
        return sum(estimate_training(arch, training, recipe, 2, shipped(), None).seconds.values())

    assert activations(4) == activations(9) == activations(True)
    assert activations(True) < activations(3) < activations(2)
    assert activations(True) < activations(False)
    steps = [seconds(n) for n in (False, 1, 2, 3, True)]
    assert steps == sorted(steps)
    assert steps[0] < steps[1]
    assert seconds(4) == seconds(True)


def test_training_bytes_are_exact(ranks, examples):
    """On the first rank. Only buffer padding may shift the optimizer's shard between ranks."""
    arch, recipe = ARCHS["nemotron"], load_recipe(TWELVE_TO_EIGHT)
    cases = [
        (ParallelConfig(), 1, "fp32"),
        (ParallelConfig(), 1, "bf16"),
        (ParallelConfig(), 4, "bf16"),
        (ParallelConfig(tp=2, sequence_parallel=True), 2, "bf16"),
    ]
    for (p, dp, precision), found in zip(
        cases, ranks(1, "planning_workers.training_bytes", arch=arch, cases=cases)[0]
    ):
        chosen = recipe.model_copy(update={"parallel": p, "precision": precision})
        want = training_memory(arch, TrainingConfig(), chosen, p.model_ranks * dp, 0)
        for part in ("weights", "gradients (float32)"):
            assert found[part] == want[part]
        assert found["optimizer state"] == pytest.approx(want["optimizer state"], rel=0.02 if dp > 1 else 0)


def test_layer_times_at_measured_points_are_the_measured_ones():
    times, content = shipped(), json.loads(SHIPPED.read_text())
    for point in content["points"]:
        if point["what"] == "loss":
            seconds, basis = times.loss(
                OutputLayers(
                    point["hidden_size"],
                    point["teacher_hidden_size"],
                    point["vocab_size"],
                    point["tokens"],
                    1,
                    point["dtype"],
                )
            )
        else:
            seconds, basis = times.layer(
                arch_of(point), 8192, 8192, ParallelConfig(), point["dtype"], point["what"] == "train"
            )
            seconds *= point["num_layers"]
        assert (seconds * 1e3, basis) == (pytest.approx(point["ms"]), MEASURED)
    half, basis = times.layer(arch_of(content["points"][0]), 4096, 4096, ParallelConfig(), "bf16", True)
    assert basis == SCALED
    assert half * 4e3 == pytest.approx(35.3, rel=0.05)  # quoted, with CUDA graphs; not among the points


def test_times_of_one_width_predict_the_other():
    """Each measured width from the points of the other: at most 9 % off."""
    content = json.loads(SHIPPED.read_text())
    for left_out in content["points"]:
        if left_out["what"] == "loss":
            continue
        rest = {
            **content,
            "points": [
                point
                for point in content["points"]
                if point["hidden_size"] != left_out["hidden_size"] or point["what"] == "loss"
            ],
        }
        seconds, _ = Times(GPUS["h100"], rest, same_gpu=True).layer(
            arch_of(left_out), 8192, 8192, ParallelConfig(), left_out["dtype"], left_out["what"] == "train"
        )
        assert seconds * left_out["num_layers"] * 1e3 == pytest.approx(left_out["ms"], rel=0.09)


@pytest.mark.parametrize(("dtype", "measured_ms"), [("bf16", 170.9), ("delayed", 140.2)])
def test_distillation_step_is_the_sum_of_its_parts(dtype, measured_ms):
    """Quoted: 4 + 4 layers of 12B -> 8B with the prototype's loss, bf16 logits, no optimizer."""
    times, points = shipped(), json.loads(SHIPPED.read_text())["points"]
    archs = {
        (point["what"], point["hidden_size"]): arch_of(point) for point in points if point["what"] != "loss"
    }
    step = 4 * times.layer(archs["train", 4096], 8192, 8192, ParallelConfig(), dtype, True)[0]
    step += (
        4 * times.layer(archs["forward", 5120], 8192, 8192, ParallelConfig(), dtype, False)[0]
        + times.loss(OutputLayers(4096, 5120, 131072, 8192, 1, "bf16"))[0]
    )
    assert step * 1e3 == pytest.approx(measured_ms, rel=0.02)


def test_second_pass_of_a_divergence_costs_memory_traffic_and_a_gather(examples):
    times = shipped()
    costs = {
        name: estimate_distillation(
            case_of("parallel.tp=2", f"distill.divergence={name}", world=256), times
        ).seconds
        for name in ("forward_kl", "js", "skewed_forward_kl")
    }
    sizes = OutputLayers(4096, 5120, 131072, 8192, 2, "fp32")
    further = times.loss(replace(sizes, second_pass=True))[0] - times.loss(sizes)[0]
    read = 8 * 8192 * 131072 / 2 / times.hbm
    assert further == pytest.approx(read, rel=0.3)  # times the ratio measured / roofline
    assert costs["js"] == costs["skewed_forward_kl"]
    assert sum(costs["js"].values()) > sum(costs["forward_kl"].values())
    gathered = costs["js"][TP] - costs["forward_kl"][TP]
    assert 0 < gathered < 0.01 * costs["forward_kl"][TP]


def test_parts_of_a_step_add_up(examples):
    """Closed forms: a pipeline with bubble and last-stage loss, a slow remote teacher, overlap."""
    times = shipped()
    base, teacher, student = archs_of(load_recipe(TWELVE_TO_EIGHT))
    assert base == teacher
    changes = ["parallel={tp: 1, pp: 4, sequence_parallel: false}", *NO_OVERLAP]

    def at(world: int, *overrides: str):
        return estimate_distillation(case_of(*changes, *overrides, world=world), times)

    one = at(256)
    layer, loss = (
        times.layer(student, 8192, 8192, ParallelConfig(), "bf16", True)[0],
        times.loss(OutputLayers(4096, 5120, 131072, 8192, 1, "fp32"))[0],
    )
    m, transfers = 768 // 64, one.seconds["pipeline transfers"] / 12
    assert one.seconds["student's layers"] == pytest.approx(m * 10 * layer)
    assert one.seconds["uneven stages"] == pytest.approx(m * loss * 3 / 4)
    teachers = 10 * times.layer(teacher, 8192, 8192, ParallelConfig(), "bf16", False)[0]
    assert one.seconds["pipeline bubble"] == pytest.approx(3 * (10 * layer + teachers + transfers), rel=1e-3)
    assert one.arithmetic_s == pytest.approx(sum(one.seconds.values()))
    interleaved = at(256, "parallel.vpp=5")
    assert interleaved.seconds["pipeline bubble"] == pytest.approx(3 * (10 * layer + teachers) / 5, rel=1e-3)
    small = at(256, "parallel={tp: 8, sequence_parallel: true}", "data.sequence_length=1024")
    assert sum(
        small.seconds[name]
        for name in ("student's layers", "tensor parallel", "teacher's layers", "waiting for the host")
    ) == pytest.approx(24 * (40 * (3e-3 + 1e-3) + times.collective_s(2 * 1024 * (2 * 4096 + 5120), 8, 1)))
    hidden = at(256, "distill.overlap=true")
    assert hidden.seconds["data parallel"] < one.seconds["data parallel"] / 3
    remote = ["teacher.placement=remote", "teacher.ranks=32"]
    apart = at(224, *remote)
    assert apart.arithmetic_s == pytest.approx(768 / 32 * 4 * teachers)  # the teacher is the slower one
    assert apart.seconds["waiting for the teacher"] > 1
    assert "waiting for the teacher" not in at(256, "teacher.placement=cached").seconds
    one_to_one = [*remote, "teacher.ranks=4", "teacher.parallel.pp=4", "teacher.window=4"]
    assert at(8, *one_to_one).seconds["waiting for the teacher"] == 0
    assert apart.traffic["teacher stream"].num_bytes == 10240 * 8192 * 768 / 48


def test_layouts_are_valid_and_ordered(examples):
    case, times = case_of(world=64), shipped()
    search = search_layouts(case, times)
    hours = [estimate.step_s / estimate.tokens for estimate in search.possible]
    assert hours == sorted(hours)
    assert search.impossible[BATCH]
    for estimate in search.possible:
        dp = estimate.case.student_ranks // estimate.recipe.parallel.model_ranks
        d = estimate.recipe.distill
        assert d.global_batch_size % (dp * d.micro_batch_size) == 0
        assert estimate.case.student_ranks + estimate.case.teacher_ranks == 64
        assert estimate.needed_bytes <= 75.1 * 2**30
    assert any(estimate.case.teacher_ranks for estimate in search.possible)
    assert any(estimate.recipe.parallel.vpp for estimate in search.possible)
    fastest = fastest_layout(case, times)
    assert fastest.step_s / fastest.tokens == hours[0]


@pytest.mark.parametrize("key", ["cuda_graphs", "tp_comm_overlap"])
def test_no_proposed_layout_is_rejected_by_the_recipe(examples, key):
    case = case_of(*NO_OVERLAP, f"distill.{key}=true", world=64)
    search = search_layouts(case, shipped())
    assert search.possible
    assert not search.impossible[ENGINE]  # the search drops the keys where they are impossible
    for estimate in search.possible[:50]:
        make_recipe(estimate.recipe.model_dump())


def test_corrected_teacher_has_the_batches_of_the_student(examples):
    """The search changes both sections, so its layouts are recipes, and the teacher's time is counted."""
    values = load_recipe(TWELVE_TO_EIGHT, NO_OVERLAP).model_dump(exclude_unset=True)
    values["distill"] |= {"micro_batch_size": 4}
    values["correct"] = {"when": "during", "steps": 15900, "micro_batch_size": 4}
    values["correct"] |= {"global_batch_size": 768, "warmup_steps": 120}
    recipe = make_recipe(values)
    models = read_models(recipe)
    case = PlanningCase(models.student, models.teacher, recipe, 256)
    assert case.recipe.corrects_during_distillation
    search = search_layouts(case, shipped())
    assert {each.recipe.distill.micro_batch_size for each in search.possible} > {1}
    for estimate in search.possible[:50]:
        make_recipe(estimate.recipe.model_dump(exclude_unset=True))
        assert estimate.seconds[TEACHER] > 0.3 * estimate.seconds[STUDENT]


def test_estimate_command(here, examples, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("minitron_mp.console.console.width", 80)
    files = tmp_path / "e.json", tmp_path / "e.png"
    code, out, err = here(
        "estimate",
        TWELVE_TO_EIGHT,
        "--world",
        "256",
        "--price",
        "2",
        "--json",
        files[0],
        "--plot",
        files[1],
        "parallel.tp=2",
    )
    assert (code, err) == (0, "")
    for words in (
        "380.0B tokens",
        "GPU-hours",
        "gradients (float32)",
        "teacher weights",
        "impossible layouts",
        "2,048",
        "teacher correction",
        "% of the bf16 peak (MFU)",
        "arithmetic",
        "fewest GPU-hours (format of the recipe)",
        "fewest GPU-hours (FP8, which changes the numbers)",
        "published pre-training",
    ):
        assert words in out, out
    assert max(len(line) for line in out.splitlines() if line.startswith(("│", "┃"))) <= 80
    content = json.loads(files[0].read_text())
    shown = content["shown"]
    assert shown["gpu_hours"] == pytest.approx(shown["step_s"] * 60400 * 256 / 3600)
    assert shown["gpu_hours"] * 2 == pytest.approx(
        float(out.split("at 2 per GPU-hour")[0].split()[-1].replace(",", "")), abs=1
    )
    assert [row["world"] for row in content["scaling"]] == [8 << i for i in range(9)]
    assert len(content["best"]) == 10
    assert shown["gpu_hours"] >= content["best"][0]["gpu_hours"]
    assert shown["step_s"] == pytest.approx(shown["correction"] * shown["arithmetic_s"])
    assert sum(content["campaign"].values()) > shown["gpu_hours"] + content["campaign"]["teacher correction"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_estimate_rejects_invalid_arguments(here, examples, tmp_path):  # noqa: F811
    refused(
        here("estimate", TWELVE_TO_EIGHT, "--world", "1"),
        "do not fit on 1 x H100 SXM",
        "GiB per GPU, 75.1 GiB are available",
        "use at least 4 GPUs",
    )
    refused(
        here("estimate", TWELVE_TO_EIGHT, "--world", "251", "distill.global_batch_size=8"),
        "no layout is possible on 251 GPUs",
        "GPUs that work: 256",
        BATCH,
    )
    refused(
        here("estimate", TWELVE_TO_EIGHT, "--gpu", "b100"),
        "--gpu b100 is unknown; give one of h100, h200, a100",
    )
    refused(here("estimate", TWELVE_TO_EIGHT, f"model={tmp_path}"), "no config.json")
    refused(here("estimate", TWELVE_TO_EIGHT, "--plot", "a.jpeg"), "must end in .png, .svg or .pdf")
    (tmp_path / "mine.yaml").write_text("nic_gbs: 25\n")
    refused(
        here("estimate", TWELVE_TO_EIGHT, "--hardware", tmp_path / "mine.yaml"),
        "nic_gbs",
        "known keys: name, memory_gib",
    )
    refused(here("estimate", TWELVE_TO_EIGHT, "--times", tmp_path / "mine.yaml"), "holds no layer times")


def test_custom_hardware_file(examples, tmp_path):
    """A slower network shows, and only there."""
    (tmp_path / "mine.json").write_text('{"nic_gb_s": 5}')
    case = case_of(world=256)
    fast, slow = (
        estimate_distillation(case, read_times("h100", read_hardware("h100", path)))
        for path in (None, tmp_path / "mine.json")
    )
    differ = {name for name in fast.seconds if fast.seconds[name] != slow.seconds[name]}
    assert differ == {"data parallel"}
    assert slow.seconds["data parallel"] > 5 * fast.seconds["data parallel"]
    older = estimate_distillation(case, read_times("a100", read_hardware("a100")))
    assert older.step_s > 1.5 * fast.step_s


def test_cuda_graphs_remove_host_launch_time():
    """At 1024 tokens the host launches an FP8 layer more slowly than the GPU computes it."""
    case = case_of(*NO_OVERLAP, "data.sequence_length=1024", "distill.fp8=tensorwise", world=256)
    usual, graphs = (
        estimate_training(
            case.student,
            case.recipe.distill.model_copy(update={"cuda_graphs": on}),
            case.recipe,
            256,
            shipped(),
            case.teacher,
        ).seconds
        for on in (False, True)
    )
    assert usual["waiting for the host"] > 0.2 * sum(usual.values())
    assert "waiting for the host" not in graphs
    assert {name for name in usual if usual[name] != graphs.get(name)} <= {
        "waiting for the host",
        "uneven stages",
        "pipeline bubble",
    }


def shipped() -> Times:
    return read_times("h100", GPUS["h100"])


def arch_of(point: dict) -> Arch:
    sizes = {
        name: point[name]
        for name in (
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
        )
    }
    return Arch(
        family="mistral", vocab_size=131072, max_position_embeddings=8192, tied=False, num_layers=40, **sizes
    )


def test_layer_times_are_measured_and_read(ranks, tmp_path):
    """benchmarks/layers.py on a CPU at toy sizes; the planner then rests on them."""
    recipe, out = make_toy(tmp_path), tmp_path / "times.json"
    arguments = [
        str(recipe),
        "--out",
        str(out),
        "--gpu",
        "h100",
        "--layers",
        "1",
        "--repeats",
        "1",
        "--tp",
        "1,2",
    ]
    ranks(
        1, "planning_workers.benchmark", folder=ROOT / "benchmarks", program="layers.py", arguments=arguments
    )
    content = json.loads(out.read_text())
    kinds = [(point["what"], point["dtype"], point["tp"]) for point in content["points"]]
    assert kinds == [(what, "fp32", tp) for tp in (1, 2) for what in ("train", "forward", "forward", "loss")]
    assert all(point["ms"] > 0 for point in content["points"])
    times = read_times("h100", read_hardware("h100"), out)
    student = read_models(load_recipe(recipe)).student
    seconds, basis = times.layer(student, 32, 32, ParallelConfig(), "fp32", True)
    point = content["points"][0]
    assert seconds == pytest.approx(point["ms"] / 1e3)
    assert times.issue_s("fp32", 3) == pytest.approx(
        max(p["host_ms"] for p in content["points"] if p["what"] == "train") / 1e3
    )
    assert basis == MEASURED


def test_planner_check_runs_on_cpu(ranks, tmp_path):
    """benchmarks/planner_check.py trains on a CPU; its comparison is meaningless there."""
    arguments = [str(make_toy(tmp_path)), "--toy", "--layers", "1", "--steps", "3", "--microbatches", "1"]
    (out,) = ranks(
        1,
        "planning_workers.benchmark",
        folder=ROOT / "benchmarks",
        program="planner_check.py",
        arguments=arguments,
    )
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    assert list(rows) == ["configuration", "as it is", "half as long, two, recomputing"]
    assert float(rows["as it is"][0]) > 0


def make_toy(folder: Path) -> Path:
    """A recipe whose model is a config.json."""
    config = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 128, **SIZES}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return make_recipe_file(folder / "recipe.yaml", folder / "model", folder / "text", folder / "out")
