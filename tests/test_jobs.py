"""What of sweeps on SLURM needs no cluster: what jobs ask for, the queue, signals; SLURM's commands are stand-ins."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_TASK, ToyProject

from fwp_lightning import slurm
from fwp_lightning.cli import main
from fwp_lightning.errors import UserError
from fwp_lightning.results import project_status, read_points, read_store
from fwp_lightning.slurm import Job, Queue, read_resources, write_job
from fwp_lightning.sweep import run_sweep, training
from fwp_lightning.sweep.jobs import SlurmSweep, train_in_job
from fwp_lightning.sweep.workers import Settings, import_file
from fwp_lightning.tracking import Origin, close_dead_runs, is_alive, this_process

CPU, GPU = {"accelerator": "cpu", "devices": 1}, {"accelerator": "gpu", "devices": 3}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a shell script in the place of a command of SLURM; what it is called with goes to the file returned."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "QUEUE", Queue())

    def put(name: str, script: str) -> Path:
        path, calls = folder / name, folder / f"{name}.calls"
        path.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
        path.chmod(0o755)
        slurm.QUEUE = Queue()
        return calls

    return put


# --- what a job asks for


def test_jobs_ask_for_what_was_said_and_for_the_devices_of_the_run() -> None:
    given = {"partition": "gpu", "time": "1-12:00:00", "mem": "16G", "cpus": "4"}
    asked = read_resources(given, ["exclude=node7,node8"]).for_job(CPU)
    assert asked == {
        "partition": "gpu", "time": "1-12:00:00", "mem": "16G", "cpus-per-task": "4", "exclude": "node7,node8",
        "signal": "USR2@120", "requeue": True,
    }  # fmt: skip
    three = read_resources({"grace": "300"}).for_job(GPU)
    assert three == {"cpus-per-task": "3", "gpus-per-node": "3", "signal": "USR2@300", "requeue": True}
    assert read_resources({"gpus": "a100:1"}).for_job(CPU)["gpus-per-node"] == "a100:1"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "8h"}, "--slurm-time '8h' is not understood; as in 8:00:00."),
        ({"mem": "much"}, "--slurm-mem 'much' is not understood; as in 16G."),
        ({"cpus": "0"}, "--slurm-cpus '0' is not understood"),
        ({"grace": "-5"}, "--slurm-grace '-5' is not understood"),
        # would be a line of its own in the job's script
        ({"partition": "gpu\nrm -r ."}, "--slurm-partition"),
        ({"account": ""}, "--slurm-account '' is not understood"),
    ],
)
def test_what_slurm_would_not_read_is_one_sentence(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=r"is not understood") as error:
        read_resources(given)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["exclude", "=node7", "exclude=", "exclude=a b", "--exclude=a", "comment=a\nb"])
def test_other_options_are_names_and_values(text: str) -> None:
    with pytest.raises(UserError, match="--slurm-option"):
        read_resources({}, [text])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slurm-time", "10"], "--slurm-time belongs to --executor slurm."),
        (["--slurm-option", "exclude=a"], "--slurm-option belongs to --executor slurm."),
        (["--executor", "slurm", "--slurm-time", "soon"], "--slurm-time 'soon' is not understood"),
        (["--executor", "slurm"], "needs submitit, which is not installed; run: pip install submitit"),
    ],
)
def test_command_lines_that_cannot_be_are_one_sentence(
    arguments: list[str], said: str, tracked: ToyProject, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["sweep", "toy", "--import", str(TOY_TASK), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_where_there_is_no_slurm_that_is_one_sentence(
    tracked: ToyProject, monkeypatch: pytest.MonkeyPatch, commands: Any, capsys: Any
) -> None:
    commands("squeue", "exit 1")
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    assert main(["sweep", "toy", "--import", str(TOY_TASK), "--executor", "slurm"]) == 2
    assert "squeue does not answer; run this where jobs of your cluster are submitted" in capsys.readouterr().err


# --- the queue


def test_status_tells_runs_that_wait_from_runs_that_train(tracked: ToyProject, client: Any, commands: Any) -> None:
    commands("squeue", 'echo "7_0 RUNNING"; echo "7_1 PENDING"; echo "9 PENDING"')
    waits, trains, gone, _ = tracked.runs(rows=["plain", "tanh"])
    for run, job in ((waits, "7_1"), (trains, "7_0"), (gone, "6_0")):
        write_job(tracked.project, run.run_key, Job(job, "log"))
    lines = project_status(client, tracked.project, ["toy"])
    # runs that are queued for the first time have nothing in the store yet
    assert [(line.row, line.queued, line.running, line.total) for line in lines] == [
        ("plain", 1, 1, 2), ("tanh", 0, 0, 2), ("steep", 0, 0, 2),
    ]  # fmt: skip


def test_a_run_on_another_machine_is_alive_while_its_job_runs(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert this_process().endswith(":7_3")
    assert is_alive(this_process())
    commands("squeue", 'echo "7_3 RUNNING"; echo "7_4 PENDING"')
    assert is_alive("elsewhere:123:1700000000:7_3")
    # queued again: its process is gone
    assert not is_alive("elsewhere:123:1700000000:7_4")
    assert not is_alive("elsewhere:123:1700000000:7_5")
    assert is_alive("elsewhere:123:1700000000")
    commands("squeue", "exit 1")
    assert is_alive("elsewhere:123:1700000000:7_5")


# --- in the job


@pytest.fixture
def job(tracked: ToyProject, monkeypatch: pytest.MonkeyPatch, commands: Any) -> Iterator[Path]:
    """Make this process a task of a job array; the calls of scontrol go to the file."""
    import_file(str(TOY_TASK))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    commands("squeue", "true")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield commands("scontrol", "true")
    for number, handler in before.items():
        signal.signal(number, handler)


def send_soon(number: signal.Signals, seconds: float = 0.5) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_a_job_that_is_warned_saves_and_queues_again_and_one_that_is_ended_saves(
    tracked: ToyProject, client: Any, job: Path, train: Any, number: signal.Signals, requeued: bool
) -> None:
    tracked.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.1")
    run, twin = tracked.runs(rows=["plain"])[0], tracked.runs(rows=["plain"], profile="paper")[0]
    settings = Settings(tracked.project, Origin(), checkpoint_seconds=1000)
    send_soon(number)
    assert train_in_job(run, settings, 60.0) == "stopped"
    assert job.read_text() == "requeue 7_1\n" if requeued else not job.exists()
    assert (tracked.project.runs / run.run_key / "last.ckpt").exists()
    (stored,) = read_store(client)
    assert (stored.status, stored.outcome) == ("KILLED", "interrupted")
    # the same job, once more
    assert train_in_job(run, settings, 60.0) == "complete"
    assert {found.run_id for found in read_store(client)} == {stored.run_id}
    # the same training under another key, undisturbed, which goes on for longer
    assert train(twin).status == "complete"
    points = read_points(client, [found.run_id for found in read_store(client)])
    assert len(points[stored.run_id]) == 12
    assert set(points.pop(stored.run_id)) < set(*points.values())


def test_a_job_whose_limit_is_too_short_for_a_checkpoint_is_not_queued_for_ever(
    tracked: ToyProject, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.5")
    monkeypatch.setattr(training, "STOP_SECONDS", 0.0)
    run = tracked.runs(rows=["plain"])[0]
    write_job(tracked.project, run.run_key, Job("7_1", "log"))
    send_soon(signal.SIGUSR2)
    with pytest.raises(UserError, match="no checkpoint was reached within the time limit of the job; raise --slurm-t"):
        train_in_job(run, Settings(tracked.project, Origin()), 0.2)
    assert not job.exists()
    said = slurm.read_job(tracked.project, run.run_key)
    assert said is not None
    assert said.said.startswith("no checkpoint was reached")


def test_a_killed_job_on_another_machine_is_marked(tracked: ToyProject, client: Any, job: Path, train: Any) -> None:
    run = tracked.runs(rows=["plain"])[0]
    train(run)
    (stored,) = read_store(client)
    client.update_run(stored.run_id, status="RUNNING")
    client.set_tag(stored.run_id, "complete", "false")
    client.set_tag(stored.run_id, "fwp.process", "elsewhere:123:1700000000:7_1")
    # squeue names no job
    assert close_dead_runs(client, tracked.project) == 1
    assert read_store(client)[0].status == "KILLED"


# --- the watch


@pytest.fixture
def cluster(tracked: ToyProject, commands: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that takes one job, which runs until the file returned is there."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    ended = tracked.root / "ended"
    commands("squeue", f'[ -e {ended} ] || echo "7 RUNNING"')
    commands("sbatch", 'echo "Submitted batch job 7"')
    commands("srun", "exit 1")
    import_file(str(TOY_TASK))
    # every look asks the queue
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0.0)
    return ended


def rename_tables(toy: ToyProject, old: str, new: str) -> None:
    """Take the tables of the store away, or bring them back: it refuses at once what is asked meanwhile."""
    with contextlib.closing(sqlite3.connect(toy.root / "mlflow.db")) as database:
        for table in ("experiments", "runs"):
            database.execute(f"alter table {old}{table} rename to {new}{table}")


def test_a_job_that_ends_while_the_store_is_away_is_taken_in_when_it_is_back(
    tracked: ToyProject, client: Any, train: Any, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (run,) = tracked.runs(profile="short", seeds=[1])
    journal = tracked.project.runs / run.run_key / "journal.jsonl"
    happened = []

    def rest(sweep: SlurmSweep) -> None:
        """What goes on between two looks."""
        happened.append(sorted(sweep._jobs))
        match len(happened):
            case 1:
                rename_tables(tracked, "", "away_")
                assert train(run).status == "complete"
                assert journal.exists()
            case 2:
                cluster.touch()
            case 5:
                rename_tables(tracked, "away_", "")
        assert len(happened) < 8

    monkeypatch.setattr(SlurmSweep, "_rest", rest)
    origin = Origin(imports=(str(TOY_TASK),))
    assert run_sweep([run], tracked.project, origin, resources=read_resources({})) == 0
    # the job stays in the list until it is known how it ended: at the looks after 2, 3 and 4 it is not
    assert happened == [[run.run_key]] * 5 + [[]]
    assert not journal.exists()
    (stored,) = read_store(client)
    assert (stored.outcome, stored.status) == ("complete", "FINISHED")
    assert len(read_points(client, [stored.run_id])[stored.run_id]) == 12
    assert not list(tracked.project.runs.glob("slurm/*.pkl"))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("it is asked again how 1 job ended") == 1
    # the table at the end; runs that end well share a line every ten seconds
    assert "toy short released plain 1/1" in said
    assert "exported 1 run to" in said


def test_a_job_submitted_since_the_queue_was_last_asked_is_not_taken_for_ended(
    tracked: ToyProject, client: Any, train: Any, cluster: Path, commands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = tracked.runs(profile="short", seeds=[1])
    # a job of it was cancelled before, so that the queue is asked just before the submission
    write_job(tracked.project, run.run_key, Job("3", "3.log"))
    submitted = tracked.root / "submitted"
    commands("sbatch", f'touch {submitted}; echo "Submitted batch job 7"')
    commands("squeue", f'[ -e {submitted} ] && [ ! -e {cluster} ] && echo "7 PENDING"; true')
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 600.0)
    happened = []

    def rest(sweep: SlurmSweep) -> None:
        happened.append(sorted(sweep._jobs))
        if len(happened) == 1:
            assert train(run).status == "complete"
            cluster.touch()
            slurm.QUEUE_SECONDS = 0.0

    monkeypatch.setattr(SlurmSweep, "_rest", rest)
    origin = Origin(imports=(str(TOY_TASK),))
    assert run_sweep([run], tracked.project, origin, resources=read_resources({})) == 0
    assert happened == [[run.run_key], []]
    assert not list(tracked.project.runs.glob("slurm/*.pkl"))
