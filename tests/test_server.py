"""Eight processes against an MLflow server with PostgreSQL, which goes away and comes back: `make test-server`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_TASK, ToyProject
from test_faults import at_call, audit, end_of, finish, fork, server, sweep, twins_of, wait_for

from fwp_lightning.results import read_points, read_store
from fwp_lightning.sweep.training import Circumstances, train_run
from fwp_lightning.sweep.workers import import_file, prepare_torch
from fwp_lightning.tracking import Origin, open_store

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL here; run: apt-get install postgresql"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg2") is None, reason="psycopg2-binary is not installed"),
]
PROCESSES = 8
# of the 30 batches and 6 ends of an epoch at which a run is asked whether to stop: in the second and the last epoch
EARLY, LATE = 7, 32


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_other_user(folder: Path) -> list[str]:
    """How to run a program as somebody who is not root, as PostgreSQL insists; the folder is made theirs."""
    if os.geteuid():
        return []
    names = {user.pw_name for user in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    shutil.chown(folder, user)
    return ["runuser", "-u", user, "--"]


@pytest.fixture
def database() -> Iterator[str]:
    """The address of an empty PostgreSQL database."""
    assert PROGRAMS is not None
    # not under tmp_path, which other users may not enter
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/fwp-postgres-XXXXXX"], text=True).strip())
    prefix, port = as_other_user(folder), free_port()

    def call(program: str, *arguments: str) -> None:
        command = [*prefix, str(PROGRAMS.with_name(program)), *arguments]
        subprocess.run(command, check=True, cwd=folder, timeout=120, stdout=subprocess.DEVNULL)

    data, options = str(folder / "data"), f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
    call("initdb", "-D", data, "-U", "fwp", "--auth=trust", "--no-sync")
    call("pg_ctl", "-D", data, "-l", str(folder / "log"), "-o", options, "--wait", "start")
    try:
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "fwp", "mlflow")
        yield f"postgresql+psycopg2://fwp@127.0.0.1:{port}/mlflow"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def alone(toy: ToyProject, run: Any, early: Path, late: Path) -> None:
    """Train one run, as a job or a worker does, and wait for a file early in it, and late for another."""
    prepare_torch()
    client = open_store(toy.project)
    waits = [at_call(EARLY, lambda: wait_for(early.exists, 600)), at_call(LATE, lambda: wait_for(late.exists, 600))]

    def asked() -> None:
        for wait in waits:
            wait()

    shared = Circumstances(toy.project, Origin(), asked, checkpoint_seconds=0)
    outcome = train_run(run, client, shared)
    assert outcome.status == "complete", outcome


def journals(toy: ToyProject) -> set[str]:
    return {path.parent.name for path in toy.project.runs.glob("*/journal.jsonl")}


def runs_with_points(toy: ToyProject) -> int:
    client = open_store(toy.project)
    return len(read_points(client, [run.run_id for run in read_store(client)]))


def test_eight_processes_and_a_server_that_goes_away(
    toy: ToyProject,
    tmp_path: Path,
    empty_store: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import_file(str(TOY_TASK))
    seeds = list(range(1, 1 + PROCESSES // 2))
    twins = twins_of(tmp_path, "twin", empty_store, rows=["plain"], seeds=seeds)
    runs: Sequence[Any] = toy.runs(rows=["plain"], seeds=seeds)
    assert len(runs) == PROCESSES
    port, gone, back = free_port(), toy.root / "server_is_gone", toy.root / "server_is_back"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server(toy.root, port, database))
        # half of the runs end while the server is away, half only when it is back
        lates = [gone, back] * (PROCESSES // 2)
        children = [
            fork(toy, lambda run=run, late=late: alone(toy, run, gone, late))
            for run, late in zip(runs, lates, strict=True)
        ]
        wait_for(lambda: runs_with_points(toy) == PROCESSES, 300)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        gone.touch()
        codes = [end_of(child, 300) for child in children[::2]]
        wait_for(lambda: len(journals(toy)) == PROCESSES, 300)
        stack.enter_context(server(toy.root, port, database))
        back.touch()
        codes += [end_of(child, 300) for child in children[1::2]]
        assert codes == [0] * PROCESSES, (toy.root / "child.log").read_text()[-3000:]
        # who was still there has delivered its own, the next sweep delivers the others'
        assert journals(toy) == {run.run_key for run in runs[::2]}
        finish(toy, lambda: sweep(toy, runs))
        assert not journals(toy)
        counts = audit(toy, runs, twins, open_store(toy.project))
    head = f"{PROCESSES} processes at once, a server on PostgreSQL that was killed under them and came back"
    counts.say(capsys, head, len(runs))
