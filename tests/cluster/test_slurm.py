"""launch/slurm.sbatch on a real Slurm of two virtual nodes with two gloo ranks each.

Jobs run all stages, with and without interruptions.
"""

import shutil
import subprocess
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from jobs import AFTER_PRUNING, BATCH, SHARES, STEPS, recipe, submit, with_faults
from slurm import clean
from tiny import ROOT, command, environment, minitron, read_metrics

OPTIONS = ("--partition=other", "--job-name=mine", "--exclude=", "--time=3", "--signal=B:USR1@5")

NAN_STEP, NAN_RANK = 20, 3
NAN_NAME = "decoder.layers.1.mlp.linear_fc2.weight"
NAN_FAULT = {"NAN": f"{NAN_RANK}:{NAN_STEP}:{NAN_NAME}"}

NEW_LR = ("distill.lr=0.08", "--accept", "lr")

TIMED_OUT = "Timed out waiting"


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


def test_one_curve_through_all_faults(slurm, project, unbroken):
    """One run in three jobs: a deadline, a NaN, a hang, a stop file, another lr, and a lost node.

    Its curve is bitwise identical to an uninterrupted run up to the NaN, to an uninterrupted run
    with that NaN up to the new lr, and then to an uninterrupted run from there.
    """
    _, whole = unbroken
    output = project / "broken"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(*AFTER_PRUNING))
    faults = with_faults(slurm.environment, **NAN_FAULT)
    start = partial(submit, slurm, "compress", recipe(project, "broken"), "timeout_minutes=0.5", **faults)

    first = stop_at_the_deadline(slurm, start)
    second = slurm.jobs()[-1]
    inherits_the_options(slurm, first, second)
    slurm.run("scontrol", "update", f"JobId={second}", "TimeLimit=20")
    slurm.run("scontrol", "update", "PartitionName=other", "State=UP")

    slurm.wait(lambda: steps(output) >= NAN_STEP + 2, second, 300)
    restart_after_a_hang(slurm, output, second)
    slurm.run("scontrol", "update", "PartitionName=other", "State=DOWN")  # the next job waits
    stop_by_slurms_warning(slurm, output, second)
    slurm.run("scancel", str(slurm.jobs()[-1]))
    slurm.run("scontrol", "update", "PartitionName=other", "State=UP")
    done = steps(output)
    before_the_change = shutil.copytree(output, project / "before_the_change")

    third = start(*NEW_LR, options=OPTIONS[:-2])
    slurm.wait(lambda: steps(output) >= done + 4, third, 300)
    lose_a_node(slurm, output, third)
    # A requeued job waits for two minutes, in which the runs to compare with are made. Within the
    # first of them Slurm 22.05 sends the returned node another request to end the job. That would
    # end the new job, which has the same number.
    with_nan = project / "with_nan"
    shutil.copytree(whole, with_nan, ignore=shutil.ignore_patterns(*AFTER_PRUNING))
    without_slurm("distill", recipe(project, "with_nan"), **faults)
    without_slurm("distill", recipe(project, "before_the_change"), *NEW_LR)
    slurm.wait(lambda: "try 2 of at most 100 on" in slurm.log(third) and slurm.ended(third), third, 400)
    assert slurm.job(third)["JobState"] == "COMPLETED", (
        f"{slurm.job(third)}\n{slurm.log(third)}\n{slurm.log_ends()}"
    )
    later = [slurm.job(job)["JobState"] for job in slurm.jobs() if job > third]
    assert set(later) <= {"CANCELLED"}  # submitted before Slurm requeued
    assert (output / "finished").exists()
    compare_curves(output, whole, with_nan, before_the_change, done)
    export_the_best(project, output)


def stop_at_the_deadline(slurm, start) -> int:
    """The deadline passes while the ranks start, so they leave before the first step."""
    site = Path(slurm.environment["MINITRON_SITE"])
    usual = site.read_text()
    site.write_text(usual.replace("MINITRON_MARGIN_S=120", "MINITRON_MARGIN_S=175"))
    job = start(options=OPTIONS)
    slurm.wait(lambda: "try 1" in slurm.log(job), job)
    slurm.run("scontrol", "update", "PartitionName=other", "State=DOWN")  # the next job waits
    slurm.wait(lambda: slurm.ended(job), job)
    site.write_text(usual)
    assert "stopped before distill" in slurm.log(job), slurm.log(job)
    return job


def inherits_the_options(slurm, first: int, second: int) -> None:
    same = ("JobName", "NumNodes", "TimeLimit", "Partition", "TresPerNode", "Command", "WorkDir")
    forwarded, original = (
        {name: slurm.job(job)[name].removesuffix("-2") for name in same} for job in (second, first)
    )  # 2-2 nodes while it waits
    assert forwarded == original
    assert slurm.job(second)["StdOut"].endswith(f"mine-{second}.out")


def restart_after_a_hang(slurm, output: Path, job: int) -> None:
    """A rank is suspended. The others time out, and all ranks restart in the same job."""
    resumed = slurm.log(job).count("distill: resuming from step")
    slurm.suspend(rank=2)
    begin = time.monotonic()
    slurm.wait(lambda: TIMED_OUT in slurm.log(job), job, 120)
    detected_s = time.monotonic() - begin
    slurm.wait(lambda: slurm.log(job).count("distill: resuming from step") > resumed, job, 120)
    resumed_steps = steps(output)
    slurm.wait(lambda: steps(output) > resumed_steps, job, 120)
    print(f"\nhang: detected after {detected_s:.1f} s, next step after {time.monotonic() - begin:.1f} s")
    assert detected_s < 30 + 10  # timeout_minutes, and the step in which it was suspended
    assert slurm.job(job)["Restarts"] == "0"
    logs = list(output.glob(f"logs/job-{job}-0/*/*/attempt_1/*/stdout.log"))
    assert len(logs) >= 2  # of the node whose rank hung
    assert len(list(output.glob(f"logs/job-{job}-0/n*"))) == 2


def stop_by_slurms_warning(slurm, output: Path, job: int) -> None:
    """The stop file: a checkpoint at the step where the ranks are."""
    begin = steps(output)
    slurm.wait(lambda: steps(output) > begin, job)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait(lambda: slurm.ended(job), job)
    assert slurm.jobs()[-1] > job
    assert not (output / "stop").exists()
    assert not (output / "finished").exists()
    assert steps(output) < STEPS - 6, "it was almost over before it was stopped"


def lose_a_node(slurm, output: Path, job: int) -> None:
    """A node fails, with its agent, its ranks and Slurm's daemon. It returns after the requeue."""
    slurm.lose("n1")
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", job)
    assert steps(output) < STEPS, "it was over before the node was lost"
    slurm.start("n1")


def without_slurm(*words: str | Path, **variables: str) -> None:
    done = subprocess.run(
        command(*words, ranks=4), env=clean(environment()) | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compare_curves(output: Path, whole: Path, with_nan: Path, with_new_lr: Path, changed_at: int) -> None:
    broken, unbroken, reference = map(read_metrics, (output, whole, with_nan))
    assert len(broken) == STEPS
    assert broken[: NAN_STEP - 1] == unbroken[: NAN_STEP - 1]
    assert broken[NAN_STEP - 1]["loss"] == unbroken[NAN_STEP - 1]["loss"]
    assert broken[NAN_STEP - 1]["num_skipped"] == 1
    assert broken[:changed_at] == reference[:changed_at]
    assert reference[NAN_STEP] != unbroken[NAN_STEP]
    assert broken[changed_at:] == read_metrics(with_new_lr)[changed_at:]
    assert broken[changed_at]["lr"] > 5 * reference[changed_at]["lr"]
    print(
        f"curve: {STEPS} steps are bitwise equal: to {NAN_STEP - 1} to a run without faults, to "
        f"{changed_at} to a run with the NaN, and then to one from there with the new lr"
    )


def export_the_best(project: Path, output: Path) -> None:
    losses = {row["step"]: row["valid_loss"] for row in read_metrics(output) if "valid_loss" in row}
    assert sorted(losses) == [*range(10, STEPS, 10), STEPS]
    best = min(losses, key=losses.get)
    done = minitron("export", project / "broken.yaml", *NEW_LR[:1], "--step", "best")
    assert done.returncode == 0, done.stderr
    assert (output / f"student_hf_step_{best}" / "config.json").is_file()
    print(f"held-out losses {losses}, exported step {best}")


def test_shares_of_the_blend_are_exact(slurm, unbroken):
    job, output = unbroken
    (index,) = (output / "data" / "index" / "train").glob("*dataset_index.npy")
    counts = np.bincount(np.load(index)[: STEPS * BATCH]).tolist()
    total = sum(SHARES.values())
    print(f"\nsamples of {', '.join(SHARES)}: {counts}")
    assert counts == [STEPS * BATCH * weight // total for weight in SHARES.values()]
    for name, share in zip(SHARES, ("50.00%", "33.33%", "16.67%")):
        assert f"text/{name}: {share} of the samples" in slurm.log(job)


def test_skipped_step_names_rank_and_layer(slurm, project, unbroken):
    """Of the run of test_one_curve_through_all_faults."""
    logs = [slurm.log(job) for job in slurm.jobs() if slurm.job(job)["JobName"] == "mine"]
    lines = [line for log in logs for line in log.splitlines() if "update skipped" in line]
    assert lines, "run test_one_curve_through_all_faults, too"
    for line in lines:
        assert f"step {NAN_STEP} has gradient norm nan; first gradient that is not finite: {NAN_NAME}" in line
        assert f" on rank {NAN_RANK} (dp 1, pp 0, cp 0, tp 1)" in line


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


def test_bad_node_is_excluded_and_a_cancelled_job_ends(slurm, project):
    """doctor fails on the node of the first job. The second one runs on the other node, and is
    cancelled.
    """
    site = Path(slurm.environment["MINITRON_SITE"])
    usual = site.read_text()
    site.write_text(usual.replace("MINITRON_DOCTOR=no\n", ""))
    try:
        faults = with_faults(slurm.environment, BAD_NODE="n0")
        job = submit(slurm, "compress", recipe(project, "sick"), options=("--nodes=1",), **faults)
        slurm.wait(lambda: slurm.ended(job), job)
        log = slurm.log(job)
        assert "doctor failed on node n0:" in log, log
        assert "no-address.invalid" in log, log
        assert "(doctor failed on n0)" in log
        assert "# job: ranks" not in log  # no rank of the job has started
        successor = slurm.jobs()[-1]
        assert slurm.job(successor)["ExcNodeList"] == "n0"
        slurm.wait(lambda: "# job: ranks 0 to 1" in slurm.log(successor), successor)
        assert "doctor: 1 nodes are healthy" in slurm.log(successor)
    finally:
        site.write_text(usual)
    slurm.run("scancel", str(successor))
    slurm.wait(lambda: slurm.ended(successor), successor)
    assert slurm.job(successor)["JobState"] == "CANCELLED"
    time.sleep(8)  # KillWait and more: the script may still be there, and must not submit anything
    assert slurm.jobs()[-1] == successor


@pytest.mark.parametrize(
    ("override", "said"),
    [("parallel.tp=3", "needs a multiple of 3"), ("model=no_folder", "no_folder is not a folder")],
    ids=["found_by_the_script", "found_by_the_ranks"],
)
def test_invalid_recipe_is_not_resubmitted(slurm, project, override, said):
    job = submit(slurm, "compress", recipe(project, "wrong"), override)
    slurm.wait(lambda: slurm.ended(job), job)
    assert slurm.job(job)["ExitCode"] == "2:0"
    assert said in slurm.log(job), slurm.log(job)
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
