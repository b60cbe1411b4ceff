"""minitron-mp doctor: each check, where it passes and where what it looks for is really broken."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import make_model, make_recipe_file, make_text, make_tokenizer

from minitron_mp import make_recipe
from minitron_mp.cli import main
from minitron_mp.cluster import doctor as doctor
from minitron_mp.cluster import file_system, network
from minitron_mp.cluster.checks import CheckResult, merge_results
from minitron_mp.cluster.doctor import _check_process_group, _gather
from minitron_mp.cluster.file_system import FILE_BYTES, _read_while_replaced, check_file_system
from minitron_mp.cluster.machine import (
    check_extensions,
    check_fp8,
    check_gpus,
    check_limits,
    check_packages,
)
from minitron_mp.cluster.network import RankTable, check_ports
from minitron_mp.cluster.recipe_checks import (
    artifact_bytes,
    check_cuda_graphs,
    check_disk_space,
    check_tokenizer,
)
from minitron_mp.distributed import launcher
from minitron_mp.distributed.launcher import JobRank
from minitron_mp.models import precision as precision
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.number_formats import FP8_SUPPORT
from minitron_mp.planning.memory import rank_parameters


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    return make_recipe_file(
        root / "recipe.yaml", make_model(root / "model"), make_text(root / "text"), root / "out"
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """here(words...) -> exit code and output of minitron-mp doctor in this process."""

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["minitron-mp", "doctor", *map(str, words)])
        monkeypatch.setattr(doctor.console, "width", 400)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(name, version, lines...) puts a distribution's metadata first on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, version: str, *lines: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]) + "\n"
        )

    return run


def verdicts(results) -> dict[str, str]:
    return {result.check: result.verdict for result in results}


def told(results, check: str) -> str:
    return "; ".join(f"{f.verdict}: {f.detail} -> {f.advice}" for f in results if f.check == check)


def test_valid_recipe_passes_and_leaves_no_files(here, recipe):
    code, out = here(recipe)
    assert code == 0, out
    for words in (
        "valid; models:",
        "300 tokens, end-of-document id",
        "GB free",
        "renames are atomic",
        "0 failed",
    ):
        assert words in out
    assert not (recipe.parent / "out").exists()


def test_doctor_without_a_recipe(here):
    code, out = here()
    assert code == 0
    assert "no recipe given" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill.stepz=3"], "did you mean steps"),
        (["model=nowhere"], "nowhere is not a folder"),
        (["parallel.pp=4"], "4 pipeline stages"),
        (["distill.keep_checkpoints=1000000000000"], "the remaining stages write about"),
        (["output=RECIPE/out"], "cannot be written"),
    ],
)
def test_invalid_recipe_fails(here, recipe, words, said):
    code, out = here(recipe, *(word.replace("RECIPE", str(recipe)) for word in words))
    assert code == 1, out
    assert said in out
    # Such an output also fails the check of the file system.
    assert f"{2 if words[0].startswith('output') else 1} failed" in out


def test_mismatched_tokenizers_are_named(recipe, tmp_path):
    model = shutil.copytree(recipe.parent / "model", tmp_path / "model")
    arch = read_arch(model)
    assert check_tokenizer(model, arch).verdict == "ok"
    make_tokenizer(tmp_path / "larger", 340)
    result = check_tokenizer(tmp_path / "larger", arch)
    assert result.verdict == "warning"
    assert "the model's embedding has 300 rows; a text with a larger id is rejected" in result.detail
    for path in model.glob("tokenizer*"):
        path.unlink()
    result = check_tokenizer(model, arch)
    assert result.verdict == "failed"
    assert "cannot be read as a tokenizer" in result.detail


def test_estimated_disk_space_matches_the_artifacts(whole):
    """The estimate matches a finished run, without its checkpoints, manifests and tokenizers."""
    project = whole.project()
    arch = read_arch(Path(project.recipe.model))
    expected = artifact_bytes(project, arch, arch)
    (student,) = rank_parameters(read_arch(project.paths["export"]), project.recipe.parallel)
    expected["distill"] -= (
        16 * student * (project.recipe.distill.keep_checkpoints + 1)
    )  # float32 weights, and their copies and moments for Adam
    for name in ("import", "prune", "distill", "export"):
        written = sum(
            p.stat().st_size
            for p in project.paths[name].rglob("*")
            if p.suffix in (".distcp", ".safetensors")
        )
        assert written == pytest.approx(expected[name], rel=0.2), name  # here headers are a part of it
    assert check_disk_space(project, arch, arch).detail.endswith("write about 0.0 GB")


def test_versions_are_checked_against_the_metadata(install):
    install("leptonai", "0.47.3")
    install("nemo-run", "0.11.1")
    install("megatron-core", "0.19.2")
    install("nvidia-resiliency-ext", "0.4.1")
    needs = [
        "torch>=99",
        "numpy",
        "pydantic>=2.9",
        "transformers>=4",
        "no-such-package>=1",
        'leptonai<0.47; extra == "nemo-run"',
        'gone; extra == "eval"',
    ]
    install("minitron-mp", "7", "Requires-Python: >=3.10", *(f"Requires-Dist: {text}" for text in needs))
    found = check_packages()
    assert verdicts(found) == {
        "python": "ok",
        "torch": "failed",
        "transformers": "ok",
        "no-such-package": "failed",
        "leptonai": "warning",
        "other packages": "ok",
        "nemo-run 0.11.1 + leptonai 0.47.3": "warning",
        "megatron-core 0.19.2 + nvidia-resiliency-ext 0.4.1": "failed",
    }
    assert "supported: >=99 -> pip install 'torch>=99'" in told(found, "torch")
    assert "not installed, required: >=1" in told(found, "no-such-package")


def test_old_python_and_missing_package_fail(install):
    install("minitron-mp", "7", "Requires-Python: >=3.99")
    assert verdicts(check_packages()) == {"python": "failed"}
    assert verdicts(check_packages("no-such-package")) == {"packages": "warning"}


def test_prerelease_of_the_image_is_accepted(install):
    """NVIDIA's images have versions such as 2.12.0a0+5228986c39.nv26.6."""
    install("torch", "2.12.0a0+5228986c39.nv26.6")
    install("minitron-mp", "7", "Requires-Dist: torch>=2.11")
    assert verdicts(check_packages())["torch"] == "ok"


@pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="needs a machine without an NVIDIA driver"
)
def test_gpus(monkeypatch, tmp_path):
    assert verdicts(check_gpus({})) == {"GPU": "ok"}
    found = check_gpus({"distill.fp8": "tensorwise"})
    assert (
        told(found, "FP8")
        == "failed: distill.fp8: tensorwise needs a GPU -> remove distill.fp8, or run on Hopper or later"
    )
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert verdicts(check_gpus({})) == {"GPU": "failed"}


@pytest.mark.parametrize(
    ("capability", "engine", "cuda", "possible"),
    [
        ((9, 0), "2.16.1", (13, 0), "delayed, tensorwise, blockwise"),
        ((9, 0), "2.16.1", (12, 8), "delayed, tensorwise"),
        ((8, 9), "2.16.1", (13, 0), "delayed, tensorwise"),
        ((9, 0), "2.1.0", (13, 0), "delayed"),
        ((8, 0), "2.16.1", (13, 0), ""),
        ((9, 0), None, (13, 0), ""),
    ],
)
def test_fp8_requirements(capability, engine, cuda, possible):
    (result,) = check_fp8({}, capability, engine, cuda)
    assert result.detail.startswith(f"supported: {possible}" if possible else "not supported: ")
    for kind in FP8_SUPPORT:
        found = check_fp8({"distill.fp8": kind}, capability, engine, cuda)
        assert [f.verdict for f in found] == ["ok" if kind in possible.split(", ") else "failed"]


@pytest.mark.parametrize(
    ("installed", "verdict"), [("0.16.1", "failed"), ("0.18.2", "failed"), ("0.19.0", "ok"), ("0.20.1", "ok")]
)
def test_cuda_graph_requirements(monkeypatch, installed, verdict):
    monkeypatch.setattr(precision, "version", lambda name: installed)
    recipe = make_recipe({"model": "m", "output": "o", "distill": {"cuda_graphs": True}})
    assert verdicts(check_cuda_graphs(recipe)) == {"CUDA graphs": verdict}
    assert check_cuda_graphs(make_recipe({"model": "m", "output": "o"})) == check_cuda_graphs(None) == []


def test_broken_extensions_fail(monkeypatch, tmp_path):
    assert verdicts(check_extensions(on_gpu=True))["Transformer Engine"] == "warning"
    (tmp_path / "apex.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = check_extensions(on_gpu=True)
    assert verdicts(found) == {"Transformer Engine": "ok", "Apex": "failed"}
    assert "undefined symbol" in told(found, "Apex")
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("limits", "warns"), [((500, 500), True), ((500, 4096), False)])
def test_low_open_file_limit(monkeypatch, limits, warns):
    """A job raises the soft limit to the hard one."""
    limit_of = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: limits if kind == resource.RLIMIT_NOFILE else limit_of(kind)
    )
    assert (verdicts(check_limits()).get("open files") == "warning") == warns


def test_ports(monkeypatch):
    job = RankTable(dist.HashStore())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in told(check_ports(job, launcher_port=port), "ports")
    assert verdicts(check_ports(RankTable(dist.HashStore()), launcher_port=port)) == {"ports": "ok"}
    two = RankTable(dist.HashStore(), 0, 2, "here")
    two.store.set("port/1", f"127.0.0.1 {port}")  # where nobody listens any more
    two.store.set("reached/1", "1")
    assert f"rank 0 (here) cannot connect to rank 1 at 127.0.0.1 {port}" in told(check_ports(two), "ports")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert "no-such-host.invalid, cannot be resolved" in told(
        check_ports(RankTable(dist.HashStore())), "ports"
    )


def test_non_atomic_rename_fails(monkeypatch, tmp_path):
    file = tmp_path / "file"
    monkeypatch.setattr(file_system, "VISIBLE_S", 0.05)
    for content, said in (
        (b"", "half-written while it is replaced"),
        (b"\1" * 99 + b"\2" * (FILE_BYTES - 99), "half-written while it is replaced"),
        (b"\1" * FILE_BYTES, "does not see files of rank 0 within"),
    ):
        file.write_bytes(content)
        (problem,) = _read_while_replaced(file)
        assert said in problem
    monkeypatch.setattr(
        file_system, "_replace", lambda path, count: path.write_bytes(bytes([count]) * (FILE_BYTES // 2))
    )
    assert verdicts(check_file_system(tmp_path / "out", RankTable(dist.HashStore()))) == {
        "file system": "failed"
    }


def test_nodes_without_a_shared_file_system(ranks, tmp_path):
    first, second = ranks(2, "doctor_workers.disks_of_their_own", folder=str(tmp_path / "disks"))
    assert any("rank 0 does not see files of ranks 1" in row for row in first)
    assert any("this rank does not see files of rank 0" in row for row in second)
    assert all(row.startswith("failed") for row in first + second)


def test_two_ranks(ranks, recipe):
    """Under a launcher: links, clocks and one folder; rank 0 speaks."""
    (code, out), (silent, nothing) = ranks(2, "doctor_workers.examine", words=[str(recipe)])
    assert (code, silent, nothing) == (0, 0, ""), out
    for words in (
        "every rank can connect to the next",
        "gloo, 2 ranks on 1 hosts",
        "each rank to the next",
        "differ by at most",
        "one folder for all ranks",
    ):
        assert words in " ".join(out.replace("│", " ").split())
    assert not (recipe.parent / "out").exists()


def test_two_ranks_with_problems(ranks, recipe):
    """A clock that is two minutes fast, and a layout for three."""
    (code, out), (silent, _) = ranks(
        2, "doctor_workers.examine", words=[str(recipe), "parallel.pp=3"], skew_s=120.0
    )
    assert (code, silent) == (1, 0)
    for words in (
        "2 ranks for the student must be a multiple of tp x pp x cp = 3",
        "differ by 120.0 s, most on rank 1",
        "2 failed",
    ):
        assert words in " ".join(out.replace("│", " ").split()), out


def test_missing_rank_times_out(monkeypatch):
    monkeypatch.setattr(network, "STORE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(RankTable.missing_ranks, "__defaults__", (0.1,))
    monkeypatch.setattr(doctor, "RESULTS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(doctor, "JOIN_MINUTES", 0.01)
    store = dist.HashStore()
    monkeypatch.setattr(launcher, "job_rank", lambda: JobRank(store, 0, 2))
    job = RankTable(dist.HashStore(), 0, 2, "here")
    assert verdicts(_check_process_group(job, lambda: 0.0)) == {"ranks": "failed"}
    assert not dist.is_initialized()
    assert "rank 1 () sent no results" in told(_gather(job, []), "ranks")


def test_results_of_many_ranks_become_one_table():
    same, old = CheckResult("limits", "ok", "enough"), CheckResult("torch", "ok", "2.11")
    ranks = {rank: [same, CheckResult("torch", "ok", "2.13")] for rank in range(4)} | {
        4: [same, old],
        5: [same, old],
    }
    ranks[1] = [*ranks[1], CheckResult("ports", "failed", "closed", "open it")]
    rows = merge_results(ranks, ["a", "a", "a", "a", "b", "b"], {"torch"})
    assert [(row.check, row.verdict, row.detail) for row in rows] == [
        ("limits", "ok", "enough"),
        ("torch", "failed", "ranks 0-3 (a): 2.13"),
        ("ports", "failed", "rank 1 (a): closed"),
        ("torch", "failed", "ranks 4-5 (b): 2.11"),
    ]
    assert "one image or environment" in rows[1].advice
    assert rows[2].advice == "open it"


def test_results_round_trip_through_json(monkeypatch):
    job = RankTable(dist.HashStore(), host="here")
    (row,) = _gather(job, [CheckResult("a", "warning", "b", "c")])
    assert row == CheckResult("a", "warning", "b", "c")
    assert json.loads(job.store.get("results/0")) == [
        {"check": "a", "verdict": "warning", "detail": "b", "advice": "c"}
    ]
