"""Runs are recorded once, completely, and whatever happens to the store never stops training."""

import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, sha256_of
from fwp_lightning.results import outcomes, read_points
from fwp_lightning.system_metrics import SystemMetrics
from fwp_lightning.tracking import (
    RunRecorder,
    close_dead_runs,
    command_line,
    deliver_journals,
    describe_origin,
    experiment_id,
    is_alive,
    is_locked,
    locked_run,
    open_store,
    params_of,
    this_process,
)

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(tracked, client, clock):
    return make_recorder(tracked, client, clock)


def make_recorder(tracked, client, clock, key="a" * 16):
    tags = {"run_key": key, "profile": "smoke", "row": "plain"}
    return RunRecorder(client, tracked.project, run_key=key, experiment="toy", name="toy/x", tags=tags, clock=clock)


def stored(client):
    homes = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(homes, "tags.run_key != ''")


def points(client, run_id):
    return [(step, value) for _, _, step, value in read_points(client, [run_id]).get(run_id, [])]


class Refusing:
    """A client that lost its store."""

    def __getattr__(self, name):
        def refuse(*args, **kwargs):
            raise RuntimeError("database is locked")

        return refuse


# --- what is recorded


def test_a_run_is_recorded_with_points_tags_parameters_and_artifacts(train, tracked, client):
    run = tracked.runs(rows=["tanh"])[0]
    assert train(run).status == "complete"
    (found,) = stored(client)
    assert found.info.run_name == "toy/tanh/n_keys=2/seed1"
    assert found.info.status == "FINISHED"
    tags = found.data.tags
    assert tags["run_key"] == run.run_key
    assert tags["config_sha256"] == run.config_sha256
    assert (tags["complete"], tags["feature_map"], tags["n_params"]) == ("true", "tanh", "3")
    assert found.data.params["attention.kind"] == "tanh"
    assert found.data.params["data.n_keys"] == "2"
    steps = [step for step, _ in points(client, found.info.run_id)]
    assert steps == [5, 10, 15, 20, 25, 30] * 2
    metrics = found.data.metrics
    assert metrics["final/valid_loss"] == metrics["valid/loss"]
    assert metrics["best/valid_loss"] <= metrics["final/valid_loss"]
    assert (metrics["steps"], metrics["tokens"]) == (30, 240)
    assert metrics["peak_memory_mb"] > 50
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "environment.json"} <= artifacts
    home = client.get_experiment(found.info.experiment_id)
    assert home.name == "toy"
    assert home.artifact_location == (tracked.root / "mlartifacts" / "toy").as_uri()


def test_flat_parameters_drop_the_models_prefix():
    config = {"trainer": {"max_epochs": 3}, "data": {"class_path": "D", "init_args": {"n": 1, "list": [1, 2]}}}
    assert params_of(config) == {"trainer.max_epochs": "3", "data": "D", "data.n": "1", "data.list": "[1, 2]"}


def test_the_command_is_kept_without_paths_of_the_machine():
    typed = ["sweep", "figure2", "--rows", "FAVOR+ (64)", "--import=/home/me/my_map.py", "/abs/x.yaml"]
    assert command_line(typed) == "fwp sweep figure2 --rows 'FAVOR+ (64)' --import=my_map.py x.yaml"


def test_the_state_of_the_source_is_known_and_results_do_not_make_it_dirty(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=tmp_path, check=True)

    assert describe_origin(Project(tmp_path), []).git_commit == ""
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/runs.csv"):
        (tmp_path / name).write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    (tmp_path / "results" / "runs.csv").write_text("2\n")
    clean = describe_origin(Project(tmp_path), ["sweep"])
    assert (len(clean.git_commit), clean.git_dirty, clean.git_diff) == (40, "false", "")
    (tmp_path / "code.py").write_text("2\n")
    dirty = describe_origin(Project(tmp_path), ["sweep"])
    assert dirty.git_dirty == "true"
    assert "+2" in dirty.git_diff
    assert json.loads(dirty.environment)["packages"]["torch"]


# --- buffering


def test_a_run_names_its_data_and_the_machines_load(train, tracked, client):
    (run,) = tracked.runs(rows=["plain"])[:1]
    train(run)
    (found,) = stored(client)
    (data,) = found.inputs.dataset_inputs
    assert data.dataset.name == run.config["data"]["class_path"].rpartition(".")[2]
    assert data.dataset.digest == sha256_of([run.config["data"]])[:12]
    assert json.loads(data.dataset.source) == run.config["data"]
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}
    assert 0 <= found.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert found.data.metrics["system/system_memory_usage_megabytes"] > 0
    # no result: other machines have others
    assert "system" not in {split for split, *_ in read_points(client, [found.info.run_id])[found.info.run_id]}


def test_a_dataset_that_is_delivered_twice_is_one(recorder, client):
    recorder.start()
    for _ in range(2):
        recorder.log_dataset("RetrievalData", "d" * 64, "{}")
        recorder.flush(insist=True)
    (found,) = stored(client)
    assert [entry.dataset.digest for entry in found.inputs.dataset_inputs] == ["d" * 12]


def test_data_that_another_run_names_at_the_same_moment_are_named_again(recorder, client, monkeypatch):
    recorder.start()
    log_inputs, calls = client.log_inputs, []

    def race(run_id, datasets):
        calls.append(run_id)
        if len(calls) == 1:
            said = "UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest"
            raise MlflowException(said, BAD_REQUEST)
        log_inputs(run_id, datasets)

    monkeypatch.setattr(client, "log_inputs", race)
    recorder.log_dataset("RetrievalData", "d" * 64, "{}")
    recorder.flush(insist=True)
    assert not recorder.journal.exists()
    (found,) = stored(client)
    assert len(found.inputs.dataset_inputs) == 1


def test_an_experiment_that_another_process_creates_at_the_same_moment_is_shared(tmp_path, client, monkeypatch):
    theirs = client.create_experiment("toy")
    find, calls = client.get_experiment_by_name, []

    def race(name):
        calls.append(name)
        return find(name) if len(calls) > 1 else None

    monkeypatch.setattr(client, "get_experiment_by_name", race)
    assert experiment_id(client, Project(tmp_path), "toy") == theirs
    assert len(calls) == 2


def test_the_machine_is_looked_at_every_10_seconds(clock):
    machine = SystemMetrics(clock)
    assert not machine.look()
    clock.now += 9.9
    assert not machine.look()
    clock.now += 0.1
    assert machine.look()
    assert not machine.look()
    assert machine.look(at_once=True)


def test_points_wait_until_500_or_5_seconds(recorder, client, clock):
    recorder.start()
    for step in range(499):
        recorder.log_points({"valid/loss": 0.5}, step)
    assert points(client, recorder.run_id) == []
    recorder.log_points({"valid/loss": 0.5}, 499)
    assert len(points(client, recorder.run_id)) == 500
    recorder.log_points({"valid/loss": 0.5}, 500)
    assert len(points(client, recorder.run_id)) == 500
    clock.now += 5
    recorder.flush_if_old()
    assert len(points(client, recorder.run_id)) == 501


def test_more_points_than_one_call_takes_are_split(recorder, client):
    recorder.start()
    recorder._points = [("valid/loss", float(step), 0, step) for step in range(2500)]
    recorder.flush()
    assert len(points(client, recorder.run_id)) == 2500


# --- a store that cannot be reached


def test_a_lost_store_costs_no_point_and_the_next_start_delivers_them(recorder, tracked, client, clock):
    recorder.start()
    recorder.client = Refusing()
    recorder.log_points({"valid/loss": 1.0}, 1)
    recorder.flush()
    recorder.log_points({"valid/loss": 2.0}, 2)
    recorder.finish("FINISHED", {"complete": "true"})
    assert recorder.journal.exists()
    assert outcomes(client) == {recorder.run_key: "running"}
    assert deliver_journals(client, tracked.project) == 1
    assert points(client, recorder.run_id) == [(1, 1.0), (2, 2.0)]
    assert outcomes(client) == {recorder.run_key: "complete"}
    assert not recorder.journal.exists()
    assert deliver_journals(client, tracked.project) == 0


def test_a_store_that_was_never_there_gets_the_whole_run_later(tracked, client, clock):
    recorder = make_recorder(tracked, Refusing(), clock)
    assert recorder.start({"attention.rule": "sum"}, {"config.yaml": "a: 1"})
    recorder.log_points({"valid/loss": 1.0}, 1)
    recorder.finish("FINISHED", {"complete": "true"})
    assert stored(client) == []
    assert deliver_journals(client, tracked.project) == 1
    (found,) = stored(client)
    assert found.data.params["attention.rule"] == "sum"
    assert found.data.tags["complete"] == "true"
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["config.yaml"]


@pytest.mark.parametrize("away", [False, True])
def test_a_run_whose_end_waits_in_the_journal_is_not_trained_again(train, tracked, client, monkeypatch, away):
    run = tracked.runs()[0]
    monkeypatch.setattr("fwp_lightning.tracking.deliver", raises(RuntimeError("the server is gone")))
    assert train(run).status == "complete"
    if not away:
        monkeypatch.undo()
    monkeypatch.setattr("fwp_lightning.sweep.training.fit", raises(AssertionError("trained again")))
    assert train(run).status == "done before"
    monkeypatch.undo()
    # at the second start already, unless the store was still away
    assert (outcomes(client)[run.run_key] == "complete") is not away
    assert deliver_journals(client, tracked.project) == away
    assert outcomes(client) == {run.run_key: "complete"}
    assert len(points(client, stored(client)[0].info.run_id)) == 12


def test_a_store_that_comes_back_is_tried_again_after_a_while(recorder, client, clock):
    recorder.start()
    recorder.client = Refusing()
    recorder.log_points({"valid/loss": 1.0}, 1)
    recorder.flush()
    recorder.client = client
    recorder.log_points({"valid/loss": 2.0}, 2)
    recorder.flush()
    assert points(client, recorder.run_id) == []
    clock.now += 31
    recorder.flush()
    assert points(client, recorder.run_id) == [(1, 1.0), (2, 2.0)]
    assert not recorder.journal.exists()


def test_training_goes_on_without_a_store(train, tracked, client, monkeypatch):
    run = tracked.runs()[0]
    monkeypatch.setattr("fwp_lightning.tracking.deliver", raises(RuntimeError("the server is gone")))
    assert train(run).status == "complete"
    monkeypatch.undo()
    assert deliver_journals(client, tracked.project) == 1
    assert outcomes(client) == {run.run_key: "complete"}
    assert len(points(client, stored(client)[0].info.run_id)) == 12


def test_a_database_that_refuses_loses_nothing(recorder, tracked, client):
    recorder.start()
    recorder.log_points({"valid/loss": 1.0}, 1)
    # refuses at once, where a lock would be waited for by MLflow for 20 seconds
    with sqlite3.connect(tracked.root / "mlflow.db") as database:
        database.execute("alter table metrics rename to away")
    recorder.finish("FINISHED", {"complete": "true"})
    with sqlite3.connect(tracked.root / "mlflow.db") as database:
        database.execute("alter table away rename to metrics")
    assert recorder.journal.exists()
    assert deliver_journals(client, tracked.project) == 1
    assert points(client, recorder.run_id) == [(1, 1.0)]
    assert outcomes(client) == {recorder.run_key: "complete"}


def test_points_delivered_twice_are_one(recorder, tracked, client):
    recorder.start()
    recorder.client = Refusing()
    recorder.log_points({"valid/loss": 1.0}, 1)
    recorder.flush()
    journal = recorder.journal.read_text()
    deliver_journals(client, tracked.project)
    recorder.journal.write_text(journal)
    deliver_journals(client, tracked.project)
    assert points(client, recorder.run_id) == [(1, 1.0)]


def test_a_journal_line_that_was_cut_short_does_not_lose_the_others(recorder, tracked, client, caplog):
    recorder.start()
    recorder.client = Refusing()
    for step in (1, 2):
        recorder.log_points({"valid/loss": float(step)}, step)
        recorder.flush()
    whole = recorder.journal.read_text()
    recorder.journal.write_text(whole[:-9])
    with recorder.journal.open("a") as file:
        file.write('\n{"op": "points", "points": [["valid/loss", 3.0, 7, 3]]}')
    assert deliver_journals(client, tracked.project) == 1
    assert points(client, recorder.run_id) == [(1, 1.0), (3, 3.0)]
    assert "cut short" in caplog.text


def test_a_full_disk_keeps_points_in_memory_until_there_is_room(recorder, client, clock, monkeypatch):
    recorder.start()
    recorder.client = Refusing()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "open", raises(full))
    recorder.log_points({"valid/loss": 1.0}, 1)
    recorder.flush()
    assert recorder.undelivered
    monkeypatch.undo()
    recorder.client = client
    recorder.finish("FINISHED", {"complete": "true"})
    assert not recorder.undelivered
    assert points(client, recorder.run_id) == [(1, 1.0)]


def test_a_disk_that_stays_full_fails_the_run_in_a_sentence(train, tracked, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("fwp_lightning.tracking.deliver", raises(full))
    monkeypatch.setattr(RunRecorder, "_write_journal", lambda self: None)
    outcome = train(tracked.runs()[0])
    assert outcome.status == "failed"
    assert outcome.message == "neither the store nor the journal could be written"


def raises(error):
    def call(*args, **kwargs):
        raise error

    return call


# --- opening


def test_a_resumed_run_is_the_same_run_and_running_again(tracked, client, clock):
    first = make_recorder(tracked, client, clock)
    first.start({"lr": "1"})
    first.finish("KILLED")
    second = make_recorder(tracked, client, clock)
    assert second.start({"lr": "2"})
    assert second.run_id == first.run_id
    (found,) = stored(client)
    assert found.info.status == "RUNNING"
    assert found.data.params == {"lr": "1"}


def test_a_complete_run_is_not_opened_again(tracked, client, clock):
    first = make_recorder(tracked, client, clock)
    first.start()
    first.finish("FINISHED", {"complete": "true"})
    assert not make_recorder(tracked, client, clock).start()


def test_a_run_whose_process_is_gone_is_marked_killed(recorder, tracked, client):
    recorder.start()
    assert close_dead_runs(client, tracked.project) == 0
    host = this_process().split(":")[0]
    client.set_tag(recorder.run_id, "fwp.process", f"{host}:{os.getpid()}:12345")
    assert close_dead_runs(client, tracked.project) == 1
    assert stored(client)[0].info.status == "KILLED"


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone():
    assert is_alive(this_process())
    host, pid, started = this_process().split(":")
    assert not is_alive(f"{host}:{pid}:{float(started) - 100}")
    assert not is_alive(f"{host}:4000000:{started}")
    assert is_alive(f"another-{host}:{pid}:{started}")


def test_the_lock_of_a_run_is_held_by_one(tracked):
    folder = tracked.project.runs / "k"
    folder.mkdir(parents=True)
    assert not is_locked(tracked.project, "k")
    with locked_run(folder):
        assert is_locked(tracked.project, "k")
    assert not is_locked(tracked.project, "k")
    assert not is_locked(tracked.project, "never seen")


@pytest.mark.slow
def test_four_processes_on_a_fresh_store_all_succeed(tmp_path):
    code = """
import sys
from fwp_lightning.experiment import Project, sha256_of
from fwp_lightning.tracking import RunRecorder, open_store
project = Project(__import__("pathlib").Path(sys.argv[1]))
key = sys.argv[2] * 16
recorder = RunRecorder(open_store(project), project, run_key=key, experiment="toy", name=key, tags={"run_key": key})
recorder.start()
recorder.log_points({"valid/loss": 1.0}, 1)
recorder.finish("FINISHED", {"complete": "true"})
assert not recorder.journal.exists()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen([*command, key], env=environment) for key in "abcd"]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0, 0]
    assert set(outcomes(open_store(Project(tmp_path))).values()) == {"complete"}
    assert len(outcomes(open_store(Project(tmp_path)))) == 4


# --- stores that cannot be used


def refusal(project):
    with pytest.raises(UserError) as caught:
        open_store(project)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_of_another_schema_is_one_sentence(tracked):
    with sqlite3.connect(tracked.root / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    sentence = refusal(tracked.project)
    assert "has a schema that MLflow" in sentence
    assert "mlflow db upgrade" in sentence


def test_a_store_that_is_no_database_is_one_sentence(toy):
    (toy.root / "mlflow.db").write_text("this is a text\n" * 100)
    assert "is not a SQLite database" in refusal(toy.project)


def test_a_read_only_store_is_one_sentence(tracked, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".db")
    assert "mlflow.db is read-only; make it writable" in refusal(tracked.project)


def test_a_store_below_a_file_is_one_sentence(toy, monkeypatch):
    (toy.root / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy.root}/file/mlflow.db")
    assert "the folder of the MLflow store cannot be made" in refusal(toy.project)


def test_a_server_that_is_down_is_one_sentence_within_seconds(toy, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    assert "the MLflow server http://127.0.0.1:9 does not answer; start it" in refusal(toy.project)
    assert time.monotonic() - started < 20


def test_a_deleted_experiment_is_restored(tracked, client, clock):
    make_recorder(tracked, client, clock).start()
    client.delete_experiment(client.get_experiment_by_name("toy").experiment_id)
    second = make_recorder(tracked, client, clock, key="b" * 16)
    second.start()
    assert not second.journal.exists()
    shutil.rmtree(tracked.project.runs)


def test_a_folder_where_the_store_must_be_is_one_sentence(toy):
    (toy.root / "mlflow.db").mkdir()
    assert "mlflow.db is a folder where the MLflow store must be; move it away" in refusal(toy.project)


def test_a_store_just_begun_on_a_full_disk_is_removed(toy, monkeypatch):
    import mlflow
    from sqlalchemy.exc import OperationalError

    def full(tracking_uri):
        (toy.root / "mlflow.db").write_bytes(b"half a store")
        raise OperationalError("CREATE TABLE", {}, Exception("database or disk is full"))

    monkeypatch.setattr(mlflow, "MlflowClient", full)
    assert "is full; free some space" in refusal(toy.project)
    assert not (toy.root / "mlflow.db").exists()


def test_imported_files_are_recorded_with_their_content(toy, tmp_path):
    path = tmp_path / "some_map.py"
    path.write_text("# a map\n")
    (digest,) = describe_origin(toy.project, [], [str(path)]).import_hashes
    assert digest == hashlib.sha256(b"# a map\n").hexdigest()
    with pytest.raises(UserError, match=r"absent\.py: there is no such file"):
        describe_origin(toy.project, [], ["absent.py"])


def test_a_database_that_breaks_on_the_way_is_one_sentence(toy, monkeypatch, capsys):
    from sqlalchemy.exc import DatabaseError

    from fwp_lightning import cli

    def broken(arguments):
        raise DatabaseError("SELECT", {}, Exception("database disk image is malformed"))

    monkeypatch.setattr(cli, "_dispatch", broken)
    monkeypatch.setenv("FWP_ROOT", str(toy.root))
    assert cli.main(["status"]) == 2
    assert "mlflow.db is damaged; put a copy back or move it away" in capsys.readouterr().err
