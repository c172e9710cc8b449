"""The journal alone makes a run whole: nothing here is trained a second time, which would hide what was lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_TASK, ToyProject
from test_faults import SUMMARIES, at_call, die_at, end_of, fork

from fwp_lightning import tracking
from fwp_lightning.results import StoredRun, outcomes, read_points, read_store
from fwp_lightning.sweep.training import Circumstances, train_run
from fwp_lightning.sweep.workers import import_file, prepare_torch
from fwp_lightning.tracking import Origin, RunRecorder, close_dead_runs, deliver_journals, open_store, read_journal

# of the 30 batches and 6 ends of an epoch at which a run is asked whether to stop
BEFORE_ITS_START, SECOND_EPOCH, FOURTH_EPOCH, NEVER = 0, 8, 21, 1000


# --- runs that are killed, for real, while their store refuses -------------------------------------------------------


def refuse_writes(root: Path) -> None:
    """Let the database refuse all that is recorded of runs, at once: MLflow would wait 20 s for one that is locked."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        for table in ("runs", "metrics", "params", "tags"):
            for event in ("insert", "update"):
                database.execute(
                    f"create trigger no_{event}_{table} before {event} on {table} begin select raise(abort, 'no'); end"
                )
        database.commit()


def take_writes(root: Path) -> None:
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        for (name,) in database.execute("select name from sqlite_master where type = 'trigger'").fetchall():
            database.execute(f"drop trigger {name}")
        database.commit()


def train_and_kill(toy: ToyProject, run: Any, *, refused_at: int, killed_at: int) -> None:
    """Train a run in a child that saves after every epoch, until kill -9 in an epoch or else behind its last word."""

    def train() -> None:
        prepare_torch()
        client = open_store(toy.project)
        refuse = at_call(refused_at, lambda: refuse_writes(toy.root))
        die = at_call(killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        if refused_at == BEFORE_ITS_START:
            refuse_writes(toy.root)
        die_at(RunRecorder, "finish", "after", 1)
        train_run(run, client, Circumstances(toy.project, Origin(), lambda: refuse() or die(), checkpoint_seconds=0))

    import_file(str(TOY_TASK))
    code = end_of(fork(toy, train))
    assert code == -signal.SIGKILL, (toy.root / "child.log").read_text()[-3000:]
    take_writes(toy.root)


def run_and_twin(toy: ToyProject) -> tuple[Any, Any]:
    """A run, and the same training under another key."""
    twin = toy.runs(rows=["plain"])[0]
    toy.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.001")
    return toy.runs(rows=["plain"])[0], twin


def stored(client: Any, run_key: str) -> StoredRun:
    (found,) = (found for found in read_store(client) if found.run_key == run_key)
    return found


def points_of(client: Any, run_key: str) -> dict[Any, float]:
    run_id = stored(client, run_key).run_id
    return {tuple(place): value for *place, value in read_points(client, [run_id])[run_id]}


def last_point_at(client: Any, run_key: str) -> float:
    """When the newest point of a run was made."""
    found = stored(client, run_key)
    history = (client.get_metric_history(found.run_id, key) for key in found.metrics)
    return max(point.timestamp for point in itertools.chain(*history)) / 1000


@pytest.mark.parametrize("refused_at", [BEFORE_ITS_START, SECOND_EPOCH])
def test_a_run_killed_at_its_end_is_complete_from_its_journal_alone(
    tracked: ToyProject, client: Any, train: Any, refused_at: int
) -> None:
    run, twin = run_and_twin(tracked)
    train_and_kill(tracked, run, refused_at=refused_at, killed_at=NEVER)
    died = time.time()
    assert outcomes(client).get(run.run_key) != "complete"
    assert deliver_journals(client, tracked.project) == 1
    assert not list(tracked.project.runs.glob("*/journal.jsonl"))
    assert outcomes(client) == {run.run_key: "complete"}
    assert last_point_at(client, run.run_key) <= died
    assert train(twin).status == "complete"
    assert len(points_of(client, run.run_key)) == 12
    assert points_of(client, run.run_key) == points_of(client, twin.run_key)
    ours, theirs = read_store(client)
    assert {key: ours.metrics[key] for key in SUMMARIES} == {key: theirs.metrics[key] for key in SUMMARIES}
    assert (ours.status, ours.tags["n_params"]) == (theirs.status, theirs.tags["n_params"]) == ("FINISHED", "3")
    recorded, expected = (client.get_run(found.run_id).data.params for found in (ours, theirs))
    assert recorded == {**expected, "seconds_per_step": "0.001"}
    assert {"config.yaml", "environment.json"} <= {file.path for file in client.list_artifacts(ours.run_id)}


@pytest.mark.parametrize("refused_at", [BEFORE_ITS_START, SECOND_EPOCH])
def test_a_run_killed_in_an_epoch_has_every_point_up_to_its_checkpoint_from_its_journal_alone(
    tracked: ToyProject, client: Any, train: Any, refused_at: int
) -> None:
    run, twin = run_and_twin(tracked)
    train_and_kill(tracked, run, refused_at=refused_at, killed_at=FOURTH_EPOCH)
    died = time.time()
    checkpoint = torch.load(tracked.project.runs / run.run_key / "last.ckpt", map_location="cpu", weights_only=True)
    saved = int(checkpoint["state_dict"]["done"])
    assert saved == 15
    assert deliver_journals(client, tracked.project) == 1
    assert close_dead_runs(client, tracked.project) == 1
    assert outcomes(client) == {run.run_key: "interrupted"}
    assert last_point_at(client, run.run_key) <= died
    train(twin)
    assert points_of(client, run.run_key) == {
        (split, metric, step): value
        for (split, metric, step), value in points_of(client, twin.run_key).items()
        if step <= saved
    }


# --- a delivery that breaks off at each of its writes ----------------------------------------------------------------


class Death(BaseException):
    """The end of a process: like kill -9 it passes by whatever handles errors."""


class Broken:
    """A client whose n-th write is the last: it does not come about, or does but nobody hears of it."""

    WRITES = ("create_run", "log_batch", "log_inputs", "log_text", "set_terminated", "update_run")

    def __init__(self, client: Any, last: int, how: str) -> None:
        self._client, self._left, self._how = client, last, how
        self.broke = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return (lambda *given, **named: self._write(method, *given, **named)) if name in self.WRITES else method

    def _write(self, method: Any, *given: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left > 0:
            return method(*given, **named)
        self.broke = True
        if self._how == "unheard":
            method(*given, **named)
        raise Death if self._how == "died" else RuntimeError("the store is away")


POINTS = {("train", "loss", step): 1 / step for step in range(1, 8)} | {("valid", "loss", 7): 0.25}
PARAMS = {"attention.rule": "sum", "data.n_keys": "2", "learning_rate": "1"}
TEXTS = {"config.yaml": "a: 1", "environment.json": "{}"}
HOW = ["refused", "unheard", "died"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several writes of each kind, so that there is something to break off between them."""
    for name, size in (("BATCH_POINTS", 5), ("BATCH_PARAMS", 2), ("BATCH_TAGS", 3)):
        monkeypatch.setattr(tracking, name, size)


def recorder_of(toy: ToyProject, client: Any, run_key: str) -> RunRecorder:
    tags = {"run_key": run_key, "row": "plain", "seed": "1"}
    return RunRecorder(client, toy.project, run_key=run_key, experiment="toy", name=run_key, tags=tags)


def log(recorder: RunRecorder, steps: range) -> None:
    for (split, metric, step), value in POINTS.items():
        if step in steps:
            recorder.log_points({f"{split}/{metric}": value}, step)


def begun_while_away(toy: ToyProject, client: Any, run_key: str, steps: range) -> RunRecorder:
    """A run up to some step, of which a store that is away has taken nothing."""
    recorder = recorder_of(toy, Broken(client, 1, "refused"), run_key)
    recorder.start(PARAMS, TEXTS)
    recorder.log_dataset("ToyData", "d" * 64, "{}")
    log(recorder, steps)
    return recorder


def check_whole(client: Any, run_key: str) -> None:
    """A run that stands as complete is so in everything."""
    found = stored(client, run_key)
    assert points_of(client, run_key) == POINTS
    run = client.get_run(found.run_id)
    assert run.data.params == PARAMS
    assert [named.dataset.name for named in run.inputs.dataset_inputs] == ["ToyData"]
    assert {file.path for file in client.list_artifacts(found.run_id)} == set(TEXTS)
    assert found.status == "FINISHED"
    assert found.tags["row"] == "plain"


def breakable(client: Any, how: str) -> Any:
    """Clients that break off at their first, second, ... write, each with a run key; until one is not broken."""
    for last in itertools.count(1):
        yield f"{how}{last}", (broken := Broken(client, last, how))
        if not broken.broke:
            # a run, two texts, a dataset, two writes of points, two of parameters, a status and three of tags
            assert last > 11
            return


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("how", HOW)
def test_a_delivery_that_breaks_off_anywhere_is_made_up_for_by_the_next(
    tracked: ToyProject, client: Any, how: str
) -> None:
    for run_key, broken in breakable(client, how):
        recorder = begun_while_away(tracked, client, run_key, range(1, 8))
        recorder.finish("FINISHED", {"complete": "true"})
        written = read_journal(recorder.journal)
        with contextlib.suppress(Death):
            deliver_journals(broken, tracked.project)
        if outcomes(client).get(run_key) == "complete":
            check_whole(client, run_key)
        if broken.broke:
            # until the store has said that it has everything, the journal has
            assert read_journal(recorder.journal) == written
            assert deliver_journals(client, tracked.project) == 1
        assert not recorder.journal.exists()
        assert outcomes(client)[run_key] == "complete"
        check_whole(client, run_key)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("how", HOW)
def test_a_run_whose_store_comes_back_and_breaks_off_anywhere_is_made_whole_by_the_next_start(
    tracked: ToyProject, client: Any, how: str
) -> None:
    for run_key, broken in breakable(client, how):
        recorder = begun_while_away(tracked, client, run_key, range(1, 4))
        recorder.flush()
        recorder.client = broken
        with contextlib.suppress(Death):
            log(recorder, range(4, 8))
            recorder.flush(insist=True)
            recorder.finish("FINISHED", {"complete": "true"})
        if outcomes(client).get(run_key) == "complete":
            check_whole(client, run_key)
        deliver_journals(client, tracked.project)
        if how == "died" and outcomes(client)[run_key] != "complete":
            # what was in memory alone went with the process
            kept = points_of(client, run_key)
            assert {where: value for where, value in POINTS.items() if where[2] < 4}.items() <= kept.items()
            continue
        assert outcomes(client)[run_key] == "complete"
        check_whole(client, run_key)
