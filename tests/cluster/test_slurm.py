"""launch/slurm.sbatch on a real Slurm of two virtual nodes with two gloo ranks each.

Jobs run all stages, with and without interruptions.
"""

import shutil
import time
from datetime import datetime
from pathlib import Path

import pytest
from jobs import AFTER_PRUNING, STEPS, recipe, submit
from tiny import ROOT, read_metrics


def steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_uninterrupted_job_completes(slurm, unbroken):
    job, output = unbroken
    log, details = slurm.log(job), slurm.job(job)
    assert details["JobState"] == "COMPLETED", log
    assert "launch/slurm.sbatch: finished" in log
    assert "# job: ranks 0 to 3, nodes 0 to 1" in log
    assert (output / "finished").exists()
    assert steps(output) == STEPS
    assert "launch/slurm.sbatch: job" not in log  # nothing was submitted again
    assert not list((slurm.root / "jobs").glob(".minitron*"))


def test_deadline_is_before_the_time_limit(slurm, unbroken):
    job, _ = unbroken
    said = slurm.log(job).split("until ")[1].split(",")[0]
    margin = (
        datetime.fromisoformat(slurm.job(job)["StartTime"]).timestamp()
        + 20 * 60
        - datetime.fromisoformat(said).timestamp()
    )
    assert abs(margin - 120) <= 1  # the site's


def test_container_flags(slurm, unbroken):
    """pyxis gets the image and the folders of job, checkout and user, but not the home."""
    jobs = slurm.root / "jobs"
    given = dict(line.split(" ", 1) for line in (slurm.root / "pyxis.txt").read_text().splitlines())
    expected = (
        "container-image=nvcr.io#nvidia/pytorch:26.06-py3 "
        f"container-mounts={jobs}:{jobs},{ROOT}:{ROOT},/models:/models:ro container-workdir={jobs}"
    )
    assert given == {node: f"{expected} no-container-mount-home=yes" for node in ("n0", "n1")}


def test_resumes_after_deadline_stop_file_and_lost_node(slurm, project, unbroken):
    """One run in three jobs, the last one started twice.

    Its curve is bitwise identical to an uninterrupted run.
    """
    _, whole = unbroken
    output, options = (
        project / "broken",
        ("--partition=other", "--job-name=mine", "--exclude=", "--time=3", "--signal=B:USR1@5"),
    )
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(*AFTER_PRUNING))

    # The deadline passes while the ranks start: they leave before the first step.
    site = Path(slurm.environment["MINITRON_SITE"])
    usual = site.read_text()
    site.write_text(usual.replace("MINITRON_MARGIN_S=120", "MINITRON_MARGIN_S=175"))
    first = submit(slurm, "compress", recipe(project, "broken"), options=options)
    slurm.wait(lambda: "try 1" in slurm.log(first), first)
    slurm.run("scontrol", "update", "PartitionName=other", "State=DOWN")  # the next job waits to be looked at
    slurm.wait(lambda: slurm.ended(first), first)
    site.write_text(usual)
    second = slurm.jobs()[-1]
    assert "stopped before distill" in slurm.log(first), slurm.log(first)
    same = ("JobName", "NumNodes", "TimeLimit", "Partition", "TresPerNode", "Command", "WorkDir")
    forwarded, original = (
        {name: slurm.job(job)[name].removesuffix("-2") for name in same} for job in (second, first)
    )  # 2-2 nodes while it waits
    assert forwarded == original
    assert slurm.job(second)["StdOut"].endswith(f"mine-{second}.out")
    slurm.run("scontrol", "update", f"JobId={second}", "TimeLimit=20")
    slurm.run("scontrol", "update", "PartitionName=other", "State=UP")

    # Slurm's warning in the middle of distillation: the stop file, a checkpoint at the step where
    # they are.
    slurm.wait(lambda: steps(output) >= 4, second, 300)
    slurm.run("scancel", "--batch", "--signal=USR1", str(second))
    slurm.wait(lambda: slurm.ended(second), second)
    third = slurm.jobs()[-1]
    assert third > second
    assert not (output / "stop").exists()
    assert not (output / "finished").exists()
    done = steps(output)
    assert done < STEPS, "it was over before it was stopped"

    # A node fails, with its agent, its ranks and Slurm's daemon. It returns later, and Slurm
    # requeues the job.
    slurm.wait(lambda: steps(output) >= done + 4, third, 300)
    slurm.lose("n1")
    slurm.wait(lambda: slurm.job(third)["Restarts"] == "1", third)
    assert steps(output) < STEPS, "it was over before the node was lost"
    slurm.start("n1")
    # A requeued job waits for two minutes, and so does this test. Within the first of them Slurm
    # 22.05 sends the returned node another request to end the job. That would end the new job,
    # which has the same number.
    slurm.wait(lambda: "try 4 of at most 100 on" in slurm.log(third) and slurm.ended(third), third, 400)
    assert slurm.job(third)["JobState"] == "COMPLETED", (
        f"{slurm.job(third)}\n{slurm.log(third)}\n{slurm.log_ends()}"
    )
    assert all(
        slurm.job(job)["JobState"] == "CANCELLED" for job in slurm.jobs() if job > third
    )  # submitted before Slurm said that it requeues
    assert (output / "finished").exists()
    assert read_metrics(output) == read_metrics(whole)


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("MINITRON_MAX_TRIES", "this was try 1 of at most 1, not resubmitted"),
        ("MINITRON_MAX_FAILURES", "ended 1 times in a row without progress, not resubmitted"),
    ],
)
def test_last_attempt_is_not_resubmitted(slurm, project, variable, said):
    """The deadline passes while the ranks start.

    One try is allowed, or one try without progress.
    """
    site = Path(slurm.environment["MINITRON_SITE"])
    usual = site.read_text()
    site.write_text(usual.replace("MINITRON_MARGIN_S=120", "MINITRON_MARGIN_S=175"))
    try:
        job = submit(
            slurm,
            "compress",
            recipe(project, "last"),
            options=("--time=3", "--signal=B:USR1@5"),
            **{variable: "1"},
        )
        slurm.wait(lambda: slurm.ended(job), job)
    finally:
        site.write_text(usual)
    assert said in slurm.log(job), slurm.log(job)
    assert not (project / "last" / "finished").exists()
    time.sleep(1)
    assert slurm.jobs()[-1] == job


def test_cancelled_job_is_not_resubmitted(slurm, project, unbroken):
    _, whole = unbroken
    output = project / "cancelled"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(*AFTER_PRUNING))
    job = submit(slurm, "compress", recipe(project, "cancelled"))
    slurm.wait(lambda: steps(output) >= 2, job, 300)
    slurm.run("scancel", str(job))
    slurm.wait(lambda: slurm.ended(job), job)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    time.sleep(8)  # KillWait and more: the script may still be there, and must not submit anything
    assert slurm.jobs()[-1] == job


def test_invalid_recipe_is_not_resubmitted(slurm, project):
    job = submit(slurm, "compress", recipe(project, "wrong"), "parallel.tp=3")
    slurm.wait(lambda: slurm.ended(job), job)
    assert slurm.job(job)["ExitCode"] == "2:0"
    assert "needs a multiple of 3" in slurm.log(job)
    assert "invalid recipe or arguments, not resubmitted" in slurm.log(job)
    time.sleep(1)
    assert slurm.jobs()[-1] == job


def test_stages_without_gpu_run_in_an_array_of_cpu_jobs(slurm, project):
    """import, data as a job array, and data again, each of which waits for the one before."""
    path, script = recipe(project, "prepared"), ROOT / "launch" / "cpu.sbatch"
    options = ("--time=20",)
    first = slurm.submit(*options, script, "import", path)
    array = slurm.submit(*options, "--array=3-7:2", f"--dependency=afterok:{first}", script, "data", path)
    last = slurm.submit(*options, f"--dependency=afterok:{array}", script, "data", path)
    for job in (first, array, last):
        slurm.wait(lambda job=job: slurm.ended(job), job, 300)
        assert slurm.job(job)["JobState"] == "COMPLETED", slurm.log(job)
    log = slurm.log(last)
    assert "data: 1 of 1 shards are done" in log
    assert (project / "prepared" / "data" / "parts.json").is_file()
    jobs = slurm.root / "jobs"
    shares = [text for path in jobs.glob("minitron-cpu-*.out") for text in [path.read_text()]]
    for share in ("share 1/3 has 1 of 1", "share 2/3 has 0 of 1", "share 3/3 has 0 of 1"):
        assert any(share in text for text in shares), shares
