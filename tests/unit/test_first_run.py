"""benchmarks/first_gpu.sh and first_node.sh: stages, their results, and the pages made from them."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_job import environment_of, line_of
from tiny import ROOT

FOLDER = ROOT / "benchmarks" / "first_run"
NO_GPU = {"hardware": {"gpus": []}, "versions": {"transformer-engine": None, "pytest": "9"}}
ONE_GPU = {"hardware": {"gpus": [{"name": "H200"}]}, "versions": {"transformer-engine": "2", "pytest": "9"}}


@pytest.fixture(scope="module")
def first_run():
    """The modules of the folder by name."""
    names = ("stages", "readings", "machine", "gpu_stages", "node_stages", "main", "publish")
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


def args_of(output: Path, minutes: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(output=output, rehearse=True, minutes=minutes)


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def python(first_run, name: str, code: str, **options):
    words = (sys.executable, "-c", code)
    return first_run.stages.Stage(name, f"shows {name}", words, **{"limit_s": 20.0, **options})


def test_later_stages_run_after_a_broken_one_and_the_json_names_it(first_run, tmp_path):
    """A stage raises, one hangs, one has an unreadable result; each costs only itself."""
    write = "import sys; open(sys.argv[1] + '/result.json', 'w').write('{\"ms\": 3}')"
    read = first_run.readings.read_result
    stages = [
        python(first_run, "good", "print('fine')"),
        python(first_run, "raises", "raise SystemExit('broken on purpose')"),
        python(first_run, "hangs", HANGS, limit_s=1.5, together="side by side"),
        python(first_run, "beside", "print('beside')", together="side by side"),
        python(first_run, "unreadable", "pass", read=read),
        python(first_run, "absent", "pass", missing="needs a GPU"),
        first_run.stages.Stage("last", "", (sys.executable, "-c", write, "{folder}"), 20.0, read),
    ]
    content = first_run.main.run("gpu", stages, args_of(tmp_path), {"date": "today"})
    assert json.loads((tmp_path / "first_gpu.json").read_text()) == content
    assert {each["name"]: each["result"] for each in content["stages"]} == {
        "good": "ok",
        "raises": "failed",
        "hangs": "timed out",
        "beside": "ok",
        "unreadable": "failed",
        "absent": "needs a GPU",
        "last": "ok",
    }
    assert content["failed"] == ["raises", "hangs", "unreadable"]
    assert content["not_run"] == {"absent": "needs a GPU"}
    assert content["finished"]
    by_name = {each["name"]: each for each in content["stages"]}
    assert by_name["raises"]["rc"] == 1
    assert by_name["raises"]["last_lines"] == ["broken on purpose"]
    assert by_name["last"]["numbers"] == {"ms": 3}
    child = int(Path(by_name["hangs"]["log"]).read_text())
    assert first_run.stages.name_of(child) == ""  # killed, although it had a session of its own


def test_no_stage_goes_on_after_the_deadline(first_run, tmp_path, monkeypatch):
    stages = [python(first_run, name, "import time; time.sleep(60)") for name in ("first", "second")]
    monkeypatch.setattr(first_run.stages, "LEAST_S", 1.0)
    start = time.monotonic()
    content = first_run.main.run("gpu", stages, args_of(tmp_path, minutes=2 / 60), {})
    assert time.monotonic() - start < 6
    assert [each["result"] for each in content["stages"]] == ["timed out", "no time left"]


def test_exit_code_is_that_of_the_stages_that_can_run(first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for code, want in ((0, 0), (3, 1)):
        stages = [
            python(first_run, "one", f"raise SystemExit({code})"),
            python(first_run, "two", "", missing="needs a GPU"),
        ]
        monkeypatch.setitem(first_run.main.KINDS, "gpu", (lambda *_, stages=stages: stages, 14.0))
        assert first_run.main.main(["gpu", "--rehearse", "--output", str(tmp_path)]) == want
    with pytest.raises(SystemExit, match="unknown stages: three; known: one, two"):
        first_run.main.main(["gpu", "--only", "three", "--output", str(tmp_path)])


def test_stages_of_a_gpu_and_their_rehearsal(first_run):
    stages = first_run.gpu_stages.gpu_stages(ONE_GPU, rehearse=False)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert {stage.missing for stage in stages} == {""}
    beside = max(stage.limit_s for stage in stages if stage.together)
    alone = [stage.limit_s for stage in stages if not stage.together]
    assert beside + sum(alone) <= 1.25 * 60 * 14  # limits; the usual times are about half of them
    engine = {**ONE_GPU, "versions": {"transformer-engine": None, "pytest": None}}
    lacking = {s.name: s.missing for s in first_run.gpu_stages.gpu_stages(engine, rehearse=False)}
    assert lacking["tests_fp8"] == lacking["tests_losses"] == "needs pytest (pip install pytest)"
    assert lacking["project_fp8"] == "needs Transformer Engine"
    assert lacking["loss"] == ""
    rehearsed = first_run.gpu_stages.gpu_stages(NO_GPU, rehearse=True)
    assert [stage.name for stage in rehearsed] == names
    assert sum(not stage.missing for stage in rehearsed) >= 14
    assert {stage.missing for stage in rehearsed} == {"", "needs a GPU"}


def test_programs_of_all_stages_exist(first_run):
    stages = [
        stage
        for rehearse in (False, True)
        for stage in (
            *first_run.gpu_stages.gpu_stages(ONE_GPU, rehearse),
            *first_run.node_stages.node_stages(ONE_GPU, rehearse),
        )
    ]
    files = {word for stage in stages for word in stage.command if word.startswith(str(ROOT))}
    assert len(files) > 12
    assert [file for file in files if not Path(file).exists()] == []


def test_node_stages_need_all_gpus(first_run):
    stages = first_run.node_stages.node_stages(ONE_GPU, rehearse=False)
    assert {stage.missing for stage in stages} == {"needs 8 GPUs, here are 1"}
    (raises,) = (stage for stage in stages if stage.name == "rank_raises")
    assert raises.accepted == (1,)


def test_end_after_an_exception_has_a_limit(first_run, tmp_path):
    """The limit is from the exception, not from the start of the ranks."""
    read, log = first_run.node_stages.read_raise, tmp_path / "log"
    log.write_text(f"raised at {time.time() - 5:.3f}\nRuntimeError: this rank fails on purpose\n")
    assert 4 < read(tmp_path)["end_s"] < 20
    log.write_text(f"raised at {time.time() - 100:.3f}\nRuntimeError: this rank fails on purpose\n")
    with pytest.raises(ValueError, match="100 s after the error; allowed: 60 s"):
        read(tmp_path)
    log.write_text("RuntimeError: another error\n")
    with pytest.raises(ValueError, match="does not have the error"):
        read(tmp_path)


def test_readings(first_run, tmp_path):
    readings = first_run.readings

    def of(text: str):
        (tmp_path / "log").write_text(text)
        return tmp_path

    text = "FAILED tests/a.py::test_b[1] - E\nSKIPPED [3] tests/c.py:4: needs 2 GPUs\n1 failed, 2 passed, 3 "
    found = readings.read_tests(of(text + "skipped in 2.10s\n"))
    assert found["failures"] == ["tests/a.py::test_b[1]"]
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 3)
    assert found["skipped_because"] == ["needs 2 GPUs"]
    found = readings.read_tests(of("SKIPPED [3] tests/c.py:4: needs a GPU\n3 skipped in 0.1s\n"))
    assert found["nothing_ran"] == "needs a GPU"
    with pytest.raises(ValueError, match="no summary"):
        readings.read_tests(of("Killed"))
    table = "H200, torch 2.11, bf16, tokens 8192, vocab 131072\n\n" + "\n".join(
        [
            f"{'the four products':28} {51.5:8.1f} {1:8.0%}",
            f"{'ours, float32 logits':28} {60.25:8.1f} {0.85:8.0%} {1.1:9.2f} {2.2:9.2f} {3e-4:8.1e}",
            f"{'torch, float32':28} does not run: out of memory",
        ]
    )
    rows = readings.read_loss(of(table))["rows"]
    assert rows["the four products"] == {"ms": 51.5, "of_floor": 1.0}
    assert rows["ours, float32 logits"] == {
        "ms": 60.2,
        "of_floor": 0.85,
        "beyond_gb": 1.1,
        "gradients_gb": 2.2,
        "error": 3e-4,
    }
    found = readings.read_planner(of(f"{'as it is':34} {100.0:8.1f} {90.0:8.1f} {-0.1:6.1%}  1.0  1.0 0.0%"))
    assert found["rows"]["as it is"] == {"step_ms": 100.0, "planned_ms": 90.0, "off": -0.1}


def result_of_a_gpu() -> dict:
    loss = {"ms": 58.5, "of_floor": 0.88, "beyond_gb": 1.15, "error": 2e-4}
    step = {"layers": "bf16", "loss": "ours", "step_ms": 130.0, "tflops": 650.0, "of_ceiling": 0.87}
    stages = [
        {"name": "tests_losses", "result": "failed", "seconds": 40.0, "numbers": {}},
        {
            "name": "loss",
            "result": "ok",
            "seconds": 31.0,
            "numbers": {"sizes": "H200, bf16, vocab 131072", "rows": {"ours, float32 logits": loss}},
        },
        {
            "name": "step",
            "result": "ok",
            "seconds": 50.0,
            "numbers": {"sequence_length": 8192, "rows": [{**step, "beyond_gib": 9.0}]},
        },
    ]
    gpu = {"name": "NVIDIA H200", "memory.total": "143771 MiB", "driver_version": "580.1"}
    return {
        "kind": "gpu",
        "rehearsal": False,
        "date": "2026-12-02 10:00 UTC",
        "commit": "0123456789abcdef",
        "seconds": 700.0,
        "failed": ["tests_losses"],
        "hardware": {"gpus": [gpu]},
        "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": None},
        "stages": stages,
    }


def test_pages_take_their_numbers_from_the_json(first_run, tmp_path):
    publish, path = first_run.publish, tmp_path / "first_gpu.json"
    path.write_text(json.dumps(result_of_a_gpu()))
    content = publish.read(path)
    readme, results = publish.readme_text(content), publish.results_text(content)
    assert "NVIDIA H200 (2026-12-02): 2 of 3 stages succeeded; failed: `tests_losses`" in readme
    assert "58.5 ms, 88%" in readme.replace("\n  ", " ")
    assert "| vocab 131072 | ours, float32 logits | 58.5 | 88% | 1.15 | 2.0e-04 |" in results
    assert "| 8,192 tokens, bf16, ours | 130.0 | 650 | 87% | 9.00 |" in results
    assert "driver 580.1" in results
    assert "python 3.12.3, torch 2.11.0 |" in results
    assert "| `tests_losses` | 40 | failed |" in results
    assert "othing has run" not in readme + results
    path.write_text(json.dumps({**result_of_a_gpu(), "rehearsal": True}))
    with pytest.raises(publish.NotPublishableError):
        publish.read(path)
    assert publish.read(tmp_path / "none.json") is None


def test_pages_match_the_kept_result(first_run):
    """Without a result they state that nothing has run on a GPU."""
    publish = first_run.publish
    content = publish.read(publish.KEPT)
    for name, write in publish.PAGES.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        assert publish.filled(page, write(content)) == page, "run python benchmarks/first_run/publish.py"
        assert ("othing has run on a GPU" in page) == (content is None)


def test_gpu_tests_can_be_collected_without_a_gpu():
    """Each file of tests/gpu is imported; pytest skips its tests."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert files
    for file in files:
        spec = importlib.util.spec_from_file_location(f"collected_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert any(name.startswith("test_") for name in vars(module)), file


def test_ranks_of_gpu_tests_keep_the_users_packages_and_need_no_host_name(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/site/packages")
    paths = environment_of()["PYTHONPATH"].split(os.pathsep)
    assert paths[-1] == "/site/packages"
    assert str(ROOT) in paths
    assert environment_of()["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment_of()["NCCL_IB_DISABLE"] == "1"
    line = line_of("file.py", "a", 3)
    assert line[line.index("--local-addr") + 1] == "127.0.0.1"
    assert line[-3:] == ["file.py", "a", "3"]
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):  # all of them take this way
        assert "torch.distributed.run" not in file.read_text(), file
