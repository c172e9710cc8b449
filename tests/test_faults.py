"""Accidents, for real: processes that are killed at any moment, stores that lock, fill up or go away.

`make test-faults` runs these; each prints its counts. Most children are forked from this process, which has imported
everything, so that dozens of them take seconds; they do what `fwp sweep` does in one process. FAULTS=n sets the number
of random kills, FAULT_SEED the moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_TASK, ToyProject
from lightning.pytorch import Trainer
from mlflow import MlflowClient

from fwp_lightning import results, tracking
from fwp_lightning.results import export, read_points, read_store
from fwp_lightning.results_csv import read_metrics, read_runs
from fwp_lightning.sweep import plan_sweep, training
from fwp_lightning.sweep.training import Circumstances, train_run
from fwp_lightning.sweep.workers import import_file, prepare_torch
from fwp_lightning.tracking import Origin, close_dead_runs, deliver_journals, open_store, read_journal

# against hanging alone: on two cores that others loaded tenfold, two minutes of processor time took half an hour
HANGING_SECONDS = 900.0
pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * HANGING_SECONDS)]

KILLS = int(os.environ.get("FAULTS", "30"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
LANES = 3
SUMMARIES = ("final/valid_loss", "best/valid_loss", "final/step", "best/step", "steps", "tokens")
PAUSE = "seconds_per_step: 0.02"
Wait = Callable[[], bool]


@pytest.fixture(autouse=True)
def _toy_task() -> None:
    import_file(str(TOY_TASK))


# --- children --------------------------------------------------------------------------------------------------------


def sweep(toy: ToyProject, runs: Sequence[Any], **circumstances: Any) -> None:
    """Train what is not complete and export it, as `fwp sweep` does."""
    prepare_torch()
    client = open_store(toy.project)
    deliver_journals(client, toy.project)
    close_dead_runs(client, toy.project)
    for run in plan_sweep(runs, client, toy.project).pending:
        train_run(run, client, Circumstances(toy.project, Origin(), **{"checkpoint_seconds": 0.1, **circumstances}))
    deliver_journals(client, toy.project)
    close_dead_runs(client, toy.project)
    export(client, toy.project)


def fork(toy: ToyProject, work: Callable[[], None]) -> int:
    """Start a child that does some work; its output and traceback go to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (toy.root / "child.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                work()
                code = 0
            except BaseException:  # noqa: BLE001 - whatever it is, it must not reach pytest in a forked child
                traceback.print_exc(file=log)
                log.flush()
    finally:
        os._exit(code)


def end_of(pid: int, seconds: float = HANGING_SECONDS) -> int:
    """Wait for a child and return its exit code, negative if a signal ended it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"a child did not end within {seconds} s")


def finish(toy: ToyProject, work: Callable[[], None]) -> None:
    """Do some work undisturbed in a child."""
    code = end_of(fork(toy, work))
    assert code == 0, (toy.root / "child.log").read_text()[-3000:]


def wait_for(condition: Wait, seconds: float = HANGING_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# --- what is counted -------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What accidents did to tracked runs; each entry is a sentence, so that a failure says which run it was."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    falsified: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.falsified += other.falsified

    def say(self, capsys: pytest.CaptureFixture[str], head: str, runs: int) -> None:
        with capsys.disabled():
            print(
                f"\n{head}: {runs} runs; lost {len(self.lost)}, duplicated {len(self.duplicated)}, "
                f"falsified {len(self.falsified)}"
            )
        assert (self.lost, self.duplicated, self.falsified) == ([], [], [])


def place(run: Any) -> tuple[str, str, str]:
    return run.row, run.point, str(run.seed)


def audit(toy: ToyProject, runs: Sequence[Any], twins: Any, client: MlflowClient) -> Counts:
    """Compare what is tracked and exported with the undisturbed twins of the runs."""
    counts = Counts()
    homes = [home.experiment_id for home in client.search_experiments()]
    every = client.search_runs(homes, "tags.run_key != ''", max_results=10_000)
    for key, number in Counter(run.data.tags["run_key"] for run in every).items():
        if number > 1:
            counts.duplicated.append(f"{key} has {number} runs in the store")
    stored = {run.run_key: run for run in read_store(client)}
    points = read_points(client, [run.run_id for run in stored.values()])
    for run in runs:
        found = stored.get(run.run_key)
        if found is None or found.outcome != "complete" or found.status != "FINISHED":
            counts.lost.append(f"{run.name} is {found and (found.outcome, found.status)} in the store")
            continue
        compare(run.name, points.get(found.run_id, []), found.metrics, twins[place(run)], counts)
    compare_csv(toy, runs, twins, counts)
    return counts


def compare(name: str, points: Any, metrics: Any, twin: Any, counts: Counts) -> None:
    """Compare curves and summaries with those of the undisturbed run, bit for bit."""
    ours = {tuple(where): value for *where, value in points}
    theirs = {tuple(where): value for *where, value in twin["points"]}
    counts.lost += [f"{name}: {where}" for where in theirs.keys() - ours.keys()]
    counts.falsified += [f"{name}: {where} is invented" for where in ours.keys() - theirs.keys()]
    counts.falsified += [f"{name}: {where}" for where in ours.keys() & theirs.keys() if ours[where] != theirs[where]]
    for key in SUMMARIES:
        if key not in metrics:
            counts.lost.append(f"{name}: {key}")
        elif metrics[key] != twin["metrics"][key]:
            counts.falsified.append(f"{name}: {key} is {metrics[key]}, not {twin['metrics'][key]}")


def compare_csv(toy: ToyProject, runs: Sequence[Any], twins: Any, counts: Counts) -> None:
    rows = read_runs(toy.project.results / "runs.csv")
    lines = Counter(row["run_key"] for row in read_metrics(toy.project.results / "metrics.csv"))
    for where, number in Counter((row["row"], row["point"], row["seed"]) for row in rows).items():
        if number > 1:
            counts.duplicated.append(f"{where} has {number} lines in runs.csv")
    complete = {row["run_key"]: row for row in rows if row["status"] == "complete"}
    for run in runs:
        row = complete.get(run.run_key)
        if row is None or lines[run.run_key] != len(twins[place(run)]["points"]):
            counts.lost.append(f"{run.name} in results/*.csv")
        elif (row["config_sha256"], row["seed"]) != (run.config_sha256, str(run.seed)):
            counts.falsified.append(f"{run.name} in runs.csv")


def twins_of(tmp_path: Path, name: str, empty_store: Path, **chosen: Any) -> Any:
    """Train the same runs undisturbed: without the pauses they have other keys and the same values."""
    twin = ToyProject(tmp_path / name)
    shutil.copy(empty_store, twin.root / "mlflow.db")
    runs = twin.runs(**chosen)
    finish(twin, lambda: sweep(twin, runs))
    client = open_store(twin.project)
    by_key = {run.run_key: run for run in read_store(client)}
    points = read_points(client, [run.run_id for run in by_key.values()])
    found = {place(run): by_key[run.run_key] for run in runs}
    return {where: {"points": points[run.run_id], "metrics": run.metrics} for where, run in found.items()}


def behind_checkpoints(toy: ToyProject) -> list[str]:
    """Return the points up to each run's checkpoint that neither the store nor the journal has."""
    missing = []
    with contextlib.closing(sqlite3.connect(toy.root / "mlflow.db", timeout=20)) as database:
        for path in toy.project.runs.glob("*/last.ckpt"):
            # must load: a checkpoint is complete or absent
            state = torch.load(path, map_location="cpu", weights_only=True)
            key = path.parent.name
            query = (
                "select m.key, m.step from metrics m join tags t on m.run_uuid = t.run_uuid where t.key = 'run_key' "
                "and t.value = ?"
            )
            known = set(database.execute(query, [key]))
            journal = path.parent / "journal.jsonl"
            for operation in read_journal(journal) if journal.exists() else []:
                known |= {(name, step) for name, _, _, step in operation.get("points", [])}
            steps = range(5, int(state["state_dict"]["done"]) + 1, 5)
            for metric in ("train/loss", "valid/loss"):
                missing += [f"{key}: {metric} at step {step}" for step in steps if (metric, step) not in known]
    return missing


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """A project whose sweep is killed again and again; when all is complete it goes on with further seeds."""

    toy: ToyProject
    seeds: list[int] = field(default_factory=lambda: [1])

    @property
    def runs(self) -> Sequence[Any]:
        return self.toy.runs(seeds=self.seeds)

    def start(self) -> int:
        return fork(self.toy, lambda: sweep(self.toy, self.runs))

    def kill(self, pid: int) -> bool:
        os.kill(pid, signal.SIGKILL)
        if end_of(pid) == -signal.SIGKILL:
            return True
        self.seeds.append(self.seeds[-1] + 1)
        return False


def test_kill_9_at_random_moments(
    tracked: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # runs wait most of the time, so that several sweeps take as long as one
    lanes = [Lane(tracked), *(Lane(ToyProject(tmp_path / f"lane{number}")) for number in range(1, LANES))]
    for lane in lanes:
        shutil.copy(empty_store, lane.toy.root / "mlflow.db")
        lane.toy.edit("base/toy", "seconds_per_step: 0.0", PAUSE)
    moments = random.Random(SEED)
    kills, missing = 0, []
    while kills < KILLS:
        ends = sorted((moments.uniform(0, 3.0), number, lane.start()) for number, lane in enumerate(lanes))
        started = time.monotonic()
        for moment, number, pid in ends:
            time.sleep(max(0.0, started + moment - time.monotonic()))
            if lanes[number].kill(pid):
                kills += 1
                missing += behind_checkpoints(lanes[number].toy)
    seeds = max((lane.seeds for lane in lanes), key=len)
    twins = twins_of(tmp_path, "twin", empty_store, seeds=seeds)
    counts, runs = Counts(lost=missing), 0
    for lane in lanes:
        finish(lane.toy, lambda lane=lane: sweep(lane.toy, lane.runs))
        counts.add(audit(lane.toy, lane.runs, twins, open_store(lane.toy.project)))
        runs += len(lane.runs)
    counts.say(capsys, f"{kills} kill -9 at random moments (seed {SEED}) in {len(lanes)} sweeps at a time", runs)


# where a run is most vulnerable: what is called, and whether the process ends before it, behind it, or with half of the
# file written that it was to write
POINTS: list[tuple[Any, str, str]] = [
    (tracking, "_write_atomically", "before"),
    (MlflowClient, "create_run", "after"),
    (MlflowClient, "log_batch", "after"),
    (tracking, "deliver", "before"),
    (tracking, "deliver", "after"),
    (Trainer, "save_checkpoint", "halfway"),
    (Trainer, "save_checkpoint", "after"),
    (training, "write_checkpoint", "after"),
    (tracking.RunRecorder, "secure", "after"),
    (training, "publish_checkpoint", "before"),
    (training, "publish_checkpoint", "after"),
    (tracking.RunRecorder, "finish", "before"),
    (MlflowClient, "set_terminated", "after"),
    (tracking.RunRecorder, "finish", "after"),
    (training, "remove_checkpoints", "before"),
    (results, "_write_csv", "before"),
    (results, "_write_csv", "after"),
]


def die_at(owner: Any, name: str, when: str, number: int) -> None:
    """Let this process be killed at the n-th call of a function."""
    original, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*arguments, **options)
        if calls[0] == number:
            if when == "halfway":
                path = Path(arguments[-1])
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)


def test_kill_9_where_it_hurts(
    tracked: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, seeds, kills = [], [], 0
    for seed, (owner, name, when) in enumerate(POINTS, start=1):
        seeds.append(seed)
        runs = tracked.runs(rows=["plain"], seeds=seeds)
        for number in (1, 2):

            def work(runs: Any = runs, point: Any = (owner, name, when, number)) -> None:
                die_at(*point)
                sweep(tracked, runs, checkpoint_seconds=0)

            code = end_of(fork(tracked, work))
            assert code in (0, -signal.SIGKILL), (tracked.root / "child.log").read_text()[-3000:]
            kills += code != 0
            missing += behind_checkpoints(tracked)
    runs = tracked.runs(rows=["plain"], seeds=seeds)
    finish(tracked, lambda: sweep(tracked, runs))
    twins = twins_of(tmp_path, "twin", empty_store, rows=["plain"], seeds=seeds)
    counts = audit(tracked, runs, twins, open_store(tracked.project))
    counts.lost += missing
    assert kills >= len(POINTS)
    counts.say(capsys, f"{kills} kill -9 beside writes to store, journal, checkpoint and CSV", len(runs))


def test_a_journal_that_is_half_delivered(
    tracked: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tracked.runs(rows=["plain"])

    def refused() -> None:
        def refuse(*arguments: Any) -> None:
            raise RuntimeError("the store is away")

        tracking.deliver = refuse
        prepare_torch()
        client = open_store(tracked.project)
        for run in runs:
            train_run(run, client, Circumstances(tracked.project, Origin()))

    def half() -> None:
        die_at(MlflowClient, "log_batch", "after", 1)
        sweep(tracked, runs)

    finish(tracked, refused)
    assert len(list(tracked.project.runs.glob("*/journal.jsonl"))) == len(runs)
    assert end_of(fork(tracked, half)) == -signal.SIGKILL
    twins = twins_of(tmp_path, "twin", empty_store, rows=["plain"])
    # what stands as complete in the store has all its points there
    client = open_store(tracked.project)
    for run in (run for run in read_store(client) if run.outcome == "complete"):
        found = read_points(client, [run.run_id]).get(run.run_id, [])
        assert len(found) == len(twins[run.tags["row"], run.tags["point"], run.tags["seed"]]["points"])
    finish(tracked, lambda: sweep(tracked, runs))
    assert not list(tracked.project.runs.glob("*/journal.jsonl"))
    counts = audit(tracked, runs, twins, open_store(tracked.project))
    counts.say(capsys, "a journal whose delivery was killed", len(runs))


# --- signals, to `fwp sweep` itself ----------------------------------------------------------------------------------


def progress(toy: ToyProject) -> int:
    with contextlib.closing(sqlite3.connect(toy.root / "mlflow.db", timeout=20)) as database:
        return database.execute("select count(*) from metrics").fetchone()[0]


def test_sigterm_ctrl_c_and_kill_9_of_whole_sweeps(
    tracked: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracked.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.1")
    arguments = ["sweep", "toy", "--rows", "plain,steep", "--jobs", "2", "--checkpoint-seconds", "0.5"]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = progress(tracked)
        process = tracked.start(*arguments)
        wait_for(lambda before=before: progress(tracked) > before)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=HANGING_SECONDS)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert process.returncode == expected, said
        assert "Traceback" not in said
    done = tracked.fwp(*arguments, seconds=HANGING_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tracked.runs(rows=["plain", "steep"])
    twins = twins_of(tmp_path, "twin", empty_store, rows=["plain", "steep"])
    counts = audit(tracked, runs, twins, open_store(tracked.project))
    counts.say(capsys, "kill -9, SIGTERM and Ctrl-C of `fwp sweep` with two workers", len(runs))


# --- the disk, the database, the server ------------------------------------------------------------------------------


def no_file_beyond(size: int) -> None:
    """Let every write beyond a file size fail from now on, as on a disk without room; what fits in is still taken."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def at_call(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return what is asked at every batch whether to stop; it does something at the n-th time."""
    calls = [0]

    def asked() -> None:
        calls[0] += 1
        if calls[0] == number:
            action()

    return asked


@pytest.mark.parametrize(("room", "journal"), [("store", True), ("nothing", False)])
def test_a_full_disk(
    tracked: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str], room: str, journal: bool
) -> None:
    runs = tracked.runs(rows=["plain"])
    # the database cannot grow, or nothing at all can be written
    size = (tracked.root / "mlflow.db").stat().st_size if room == "store" else 64

    def full() -> None:
        prepare_torch()
        client = open_store(tracked.project)
        for run in runs:
            no_file_beyond(resource.RLIM_INFINITY)
            stop = at_call(7, lambda: no_file_beyond(size))
            outcome = train_run(run, client, Circumstances(tracked.project, Origin(), stop, checkpoint_seconds=0))
            print(outcome)
            # the database may have had room in its last page
            assert outcome.status == "complete" or not journal
            assert outcome.status in ("complete", "failed")

    finish(tracked, full)
    missing = behind_checkpoints(tracked)
    finish(tracked, lambda: sweep(tracked, runs))
    counts = audit(tracked, runs, twins_of(tmp_path, "twin", empty_store, rows=["plain"]), open_store(tracked.project))
    counts.lost += missing
    counts.say(capsys, f"a disk with room for {'journals alone' if journal else 'nothing'}", len(runs))


def test_a_database_that_another_process_locks(
    tracked: ToyProject,
    tmp_path: Path,
    empty_store: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = tracked.runs(rows=["plain"])
    held: list[sqlite3.Connection] = []

    def lock() -> None:
        held.append(sqlite3.connect(tracked.root / "mlflow.db", isolation_level=None))
        held[-1].execute("begin exclusive")

    def locked() -> None:
        prepare_torch()
        client = open_store(tracked.project)
        outcome = train_run(runs[0], client, Circumstances(tracked.project, Origin(), at_call(7, lock)))
        assert outcome.status == "complete", outcome

    # waits one second for a lock instead of MLflow's twenty
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracked.root / 'mlflow.db'}?timeout=1")
    finish(tracked, locked)
    assert list(tracked.project.runs.glob("*/journal.jsonl"))
    finish(tracked, lambda: sweep(tracked, runs))
    client = open_store(tracked.project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    counts = audit(tracked, runs, twins_of(tmp_path, "twin", empty_store, rows=["plain"]), client)
    counts.say(capsys, "a database that another connection locked", len(runs))


@contextlib.contextmanager
def server(root: Path, port: int, store: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run an MLflow server on a store, else on the project's file, until the block ends."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store or f"sqlite:///{root / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(root / "a")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (root / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(port))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_tracking_server_that_goes_away(
    tracked: ToyProject,
    tmp_path: Path,
    empty_store: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = tracked.runs(rows=["plain"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    twins = twins_of(tmp_path, "twin", empty_store, rows=["plain"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with server(tracked.root, port) as process:

        def gone() -> None:
            prepare_torch()
            client = open_store(tracked.project)
            leave = at_call(7, lambda: os.killpg(process.pid, signal.SIGKILL))
            for run in runs:
                assert train_run(run, client, Circumstances(tracked.project, Origin(), leave)).status == "complete"

        finish(tracked, gone)
    assert len(list(tracked.project.runs.glob("*/journal.jsonl"))) == len(runs)
    with server(tracked.root, port):
        finish(tracked, lambda: sweep(tracked, runs))
        counts = audit(tracked, runs, twins, open_store(tracked.project))
    counts.say(capsys, "a tracking server that went away and came back", len(runs))


def test_eight_processes_on_one_fresh_store(
    toy: ToyProject, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = toy.runs(seeds=[1, 2])
    # all of them want all runs: locks decide who trains which
    children = [fork(toy, lambda runs=runs[n:] + runs[:n]: sweep(toy, runs)) for n in range(8)]
    codes = [end_of(pid) for pid in children]
    assert codes == [0] * 8, (toy.root / "child.log").read_text()[-3000:]
    finish(toy, lambda: sweep(toy, runs))
    counts = audit(toy, runs, twins_of(tmp_path, "twin", empty_store, seeds=[1, 2]), open_store(toy.project))
    counts.say(capsys, "8 processes on one fresh store", len(runs))
