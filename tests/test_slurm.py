"""Sweeps on a real SLURM of one node that the tests start, by `make test-slurm`; test_jobs.py is what needs no cluster.

Jobs are preempted, cancelled and fail; afterwards every run is there once, with the numbers of an undisturbed run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, ToyProject

from fwp_lightning.results import read_points, read_store
from fwp_lightning.slurm import Queue, read_job
from fwp_lightning.sweep.training import Circumstances, train_run
from fwp_lightning.sweep.workers import prepare_torch
from fwp_lightning.tracking import Origin, open_store

CLUSTER = TESTS / "slurm" / "cluster"
PATH = "/usr/sbin:/usr/bin"
MISSING = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name, path=PATH)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here; run: tests/slurm/cluster install"),
    pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed"),
]
RETRIEVAL = """
title: Retrieval on a cluster
base: base/retrieval.yaml
protocol: corrected
seeds: [1]
rows:
  Linear: {model.attention: {feature_map: elu, attention_norm: readout}}
  DPFP-1: {model.attention: {feature_map: dpfp, nu: 1, phi_norm: sum}}
protocols: {corrected: {version: 1, statistic: best}}
# as figure2's smoke runs, but long enough to be interrupted
profiles:
  smoke: {set: {model.max_steps: 3000, model.stop_loss: 0, model.patience: 1000, model.compute: plain, data.n_keys: 20}}
"""


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    subprocess.run(["scancel", "--me"], check=False)
    subprocess.run([CLUSTER, "stop", folder], check=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def project(_cluster: None, tracked: ToyProject) -> ToyProject:
    """A toy project on a machine with a cluster."""
    shutil.copy(TESTS.parent / "experiments" / "base" / "retrieval.yaml", tracked.root / "experiments" / "base")
    tracked.write("retrieval", RETRIEVAL)
    return tracked


SWEEP = ("sweep", "--executor", "slurm", "--slurm-mem", "700M", "--slurm-time", "10", "--checkpoint-seconds", "0.5")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 400.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.3)


def state_of(job: str) -> str:
    return (Queue().states() or {}).get(job, "")


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True, timeout=30)


def curve(client: Any, run: Any) -> list[Any]:
    (stored,) = [stored for stored in read_store(client) if stored.run_key == run.run_key]
    assert (stored.outcome, stored.status) == ("complete", "FINISHED")
    return read_points(client, [stored.run_id])[stored.run_id]


def runs_in_store(client: Any) -> int:
    return len(client.search_runs([home.experiment_id for home in client.search_experiments()]))


def undisturbed(tmp_path: Path, runs: list[Any], empty_store: Path) -> dict[str, list[Any]]:
    """The points of the same runs, trained here and left alone."""
    twin = ToyProject(tmp_path / "twin")
    shutil.copy(empty_store, twin.root / "mlflow.db")
    client = open_store(twin.project)
    prepare_torch()
    for run in runs:
        assert train_run(run, client, Circumstances(twin.project, Origin())).status == "complete"
    return {run.run_key: curve(client, run) for run in runs}


def call(project: ToyProject, *arguments: str) -> tuple[int, str]:
    """Run `fwp` to its end; return its exit code and all it said."""
    process = project.start(*arguments)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def test_preempted_tasks_go_on_in_the_same_run_and_end_as_undisturbed_ones(
    project: ToyProject, tmp_path: Path, empty_store: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = project.runs("retrieval")
    process = project.start(SWEEP[0], "retrieval", *SWEEP[1:], "--jobs", "2")
    folders = [project.project.runs / run.run_key for run in runs]
    wait_for(lambda: process.poll() is not None or all((f / "last.ckpt").exists() for f in folders), "checkpoints")
    assert process.poll() is None, process.communicate()
    jobs = [read_job(project.project, run.run_key).id for run in runs]
    assert sorted(jobs) == [f"{jobs[0].partition('_')[0]}_{task}" for task in (0, 1)]
    begun = {run.run_id for run in read_store(client)}
    # one is warned of its time limit, the other one is preempted by SLURM
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    scontrol("requeue", jobs[1])
    for job in jobs:
        wait_for(lambda job=job: state_of(job) == "PENDING", f"job {job} to be queued again")
    _, status = call(project, "status", "retrieval")
    assert "queued" in status
    assert [line.split()[-1] for line in status.splitlines()[1:]] == ["1", "1"]
    # SLURM lets a job that was queued again wait for two minutes
    for job in jobs:
        scontrol("update", f"JobId={job}", "StartTime=now")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert [line.split()[4] for line in said.splitlines() if line.startswith("retrieval ")] == ["1/1", "1/1"]
    assert {run.run_id for run in read_store(client)} == begun
    assert runs_in_store(client) == len(runs)
    twins = undisturbed(tmp_path, runs, empty_store)
    for run in runs:
        assert curve(client, run) == twins[run.run_key]
    logs = [Path(read_job(project.project, run.run_key).log).with_suffix(".out") for run in runs]
    restarts = [log.read_text(encoding="utf-8").count("Starting with") for log in logs]
    assert restarts == [2, 2]
    assert not list(project.project.runs.glob("slurm/*.pkl"))
    with capsys.disabled():
        n = sum(len(points) for points in twins.values())
        print(f"\n2 array tasks, each interrupted once: lost 0, duplicated 0, {n} points equal to undisturbed runs")


def test_a_failed_job_is_failed_with_its_traceback_and_stops_nothing(project: ToyProject, client: Any) -> None:
    project.edit("toy", "plain: {}", "plain: {model.fail_at: 3}")
    code, said = call(project, SWEEP[0], "toy", *SWEEP[1:], "--points", "n_keys=2", "--rows", "plain,tanh")
    assert code == 1, said
    assert "failed: toy/plain/n_keys=2/seed1: RuntimeError: the toy was told to fail" in said
    stored = {run.tags["row"]: run for run in read_store(client)}
    assert {row: run.status for row, run in stored.items()} == {"plain": "FAILED", "tanh": "FINISHED"}
    text = Path(client.download_artifacts(stored["plain"].run_id, "traceback.txt")).read_text(encoding="utf-8")
    assert "in training_step" in text


def test_jobs_outlive_ctrl_c_are_watched_again_and_can_be_cancelled(project: ToyProject, client: Any) -> None:
    project.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 1.0")
    arguments = (SWEEP[0], "toy", *SWEEP[1:], "--points", "n_keys=2", "--rows", "plain,tanh")
    process = project.start(*arguments)
    runs = {run.row: run for run in project.runs() if run.point == "n_keys=2" and run.row in ("plain", "tanh")}
    wait_for(lambda: all((project.project.runs / run.run_key / "last.ckpt").exists() for run in runs.values()), "work")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    jobs = {row: read_job(project.project, run.run_key).id for row, run in runs.items()}
    assert f"scancel {jobs['plain'].partition('_')[0]}" in said
    assert {state_of(job) for job in jobs.values()} == {"RUNNING"}
    # the same command submits nothing that is in the queue, and says so where a job ends without a result
    process = project.start(*arguments)
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(2)]
    assert f"submitted 0, in the queue already 2: {jobs['plain'].partition('_')[0]}" in first[1]
    subprocess.run(["scancel", jobs["tanh"]], check=True)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert f"its job {jobs['tanh']} was ended from outside" in said
    assert "1 run was stopped; the next sweep goes on with it" in said
    assert {run.tags["row"]: run.outcome for run in read_store(client)} == {"plain": "complete", "tanh": "interrupted"}
    # what is no longer in the queue is submitted anew, and goes on in its run
    code, said = call(project, *arguments)
    assert code == 0, said
    assert "submitted 1, in the queue already 0" in said
    assert read_job(project.project, runs["plain"].run_key).id == jobs["plain"]
    assert {run.outcome for run in read_store(client)} == {"complete"}
    assert runs_in_store(client) == 2


def test_a_job_that_dies_is_reported_with_its_output(project: ToyProject, client: Any) -> None:
    project.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.5")
    process = project.start(SWEEP[0], "toy", *SWEEP[1:], "--points", "n_keys=2", "--rows", "plain")
    (run,) = (run for run in project.runs(rows=["plain"]) if run.point == "n_keys=2")
    wait_for(lambda: (project.project.runs / run.run_key / "last.ckpt").exists(), "work")
    job = read_job(project.project, run.run_key)
    # as where memory runs out; scancel would ask it to save first
    os.kill(int(read_store(client)[0].tags["fwp.process"].split(":")[1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert f"job {job.id}: it died; its output is in {job.log}" in said
    assert read_store(client)[0].status == "KILLED"


def test_a_run_longer_than_the_time_limit_is_done_in_several_goes(project: ToyProject, client: Any) -> None:
    # three minutes in nine epochs, with a limit of three, of which SLURM may warn a minute too early
    project.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 4.0")
    process = project.start(
        *("sweep", "toy", "--executor", "slurm", "--profile", "paper", "--slurm-time", "3", "--slurm-grace", "30"),
        *("--checkpoint-seconds", "0.5", "--points", "n_keys=2", "--rows", "plain"),
    )
    (run,) = (run for run in project.runs(profile="paper", rows=["plain"]) if run.point == "n_keys=2")
    waited = 0.0
    while process.poll() is None:
        time.sleep(1)
        job = read_job(project.project, run.run_key)
        if job and state_of(job.id) == "PENDING" and time.monotonic() > waited:
            # it may not start before the former processes are gone
            scontrol("update", f"JobId={job.id}", "StartTime=now")
            waited = time.monotonic() + 20
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert len(curve(client, run)) == 18
    assert runs_in_store(client) == 1
    log = Path(read_job(project.project, run.run_key).log).with_suffix(".out").read_text(encoding="utf-8")
    assert log.count("Starting with") >= 2
    assert log.count("complete: toy/plain/n_keys=2/seed1") == 1


def test_what_slurm_refuses_is_one_sentence(project: ToyProject) -> None:
    code, said = call(project, "sweep", "toy", "--executor", "slurm", "--slurm-partition", "nowhere")
    assert code == 2
    assert "fwp: error: SLURM took no job: " in said
    assert "partition" in said
    assert "Traceback" not in said
