"""The store becomes tidy CSV files: exact, merged, sorted, checked, and written whole or not at all."""

import csv
import errno
import math
import os
import shutil
import time

import pytest

from fwp_lightning.errors import UserError
from fwp_lightning.results import (
    METRIC_COLUMNS,
    RUN_COLUMNS,
    count_rows,
    export,
    format_number,
    note_on,
    outcomes,
    project_status,
    read_metrics,
    read_points,
    read_probes,
    read_runs,
    read_store,
    read_translations,
)
from fwp_lightning.tracking import RunRecorder, describe_experiment, open_store


def record(tracked, client, key, *, row="plain", seed="1", point="n_keys=2", losses=(1.0,), status="FINISHED", **tags):
    """Put a run into the store without training it."""
    names = {"run_key": key, "experiment": "toy", "row": row, "point": point, "seed": seed}
    tags = {**names, "profile": "smoke", "protocol": "released", "version": "1", **tags}
    recorder = RunRecorder(client, tracked.project, run_key=key, experiment="toy", name=key, tags=tags)
    recorder.start()
    for step, loss in enumerate(losses, start=1):
        recorder.log_points({"valid/loss": loss}, step)
    recorder.log_points({"wall_seconds": 2.5, "steps": 100.0, "final/valid_loss": 9.0}, 100)
    recorder.finish(status, {"complete": "true"} if status == "FINISHED" else {})
    return recorder


def files(tracked):
    return tracked.root / "results" / "runs.csv", tracked.root / "results" / "metrics.csv"


def record_translated(tracked, client, key, *translations):
    """Put a run with translations into the store."""
    lines = [f'test,{i},a b,"c, d",{text}\n' for i, text in enumerate(translations, start=1)]
    recorder = record(tracked, client, key)
    recorder.log_text("translations.csv", "split,line,source,reference,translation\n" + "".join(lines))
    recorder.set_tags({"texts": "translations.csv"})
    recorder.flush()


def translations(tracked):
    rows = read_translations(tracked.root / "results" / "translations.csv")
    return [(row["run_key"], row["line"], row["reference"], row["translation"]) for row in rows]


def test_an_export_holds_every_column_and_point(train, tracked, client):
    run = tracked.runs(rows=["steep"])[0]
    train(run)
    done = export(client, tracked.project)
    assert (done.exported, done.total, done.changed) == (1, 1, True)
    runs_file, metrics_file = files(tracked)
    assert next(csv.reader(runs_file.open())) == list(RUN_COLUMNS)
    assert next(csv.reader(metrics_file.open())) == list(METRIC_COLUMNS)
    (row,) = read_runs(runs_file)
    expected = {
        "run_key": run.run_key, "experiment": "toy", "row": "steep", "point": "n_keys=2", "seed": "1",
        "profile": "smoke", "protocol": "released", "status": "complete", "version": "1", "rule": "sum",
        "feature_map": "identity", "n_params": "3", "state": "0", "steps": "30", "tokens": "240",
        "precision": "32-true", "config_sha256": run.config_sha256, "command": "fwp test", "deviations": "six epochs",
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert float(row["wall_seconds"]) > 0
    assert row["device"].startswith("cpu (")
    points = [(row["split"], row["metric"], row["step"]) for row in read_metrics(metrics_file)]
    assert points == [(split, "loss", str(step)) for split in ("train", "valid") for step in range(5, 35, 5)]


def test_a_second_export_changes_nothing(tracked, client):
    record(tracked, client, "a" * 16)
    export(client, tracked.project)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files(tracked)]
    assert not export(client, tracked.project).changed
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files(tracked)] == before


def test_rows_of_other_runs_stay_and_rows_are_sorted_as_people_count(tracked, client, tmp_path):
    for key, point in (("a" * 16, "n_keys=100"), ("b" * 16, "n_keys=20"), ("c" * 16, "n_keys=3")):
        record(tracked, client, key, point=point)
    export(client, tracked.project)
    assert [row["point"] for row in read_runs(files(tracked)[0])] == ["n_keys=3", "n_keys=20", "n_keys=100"]
    for stored in read_store(client):
        if stored.run_key != "c" * 16:
            client.delete_run(stored.run_id)
    before = [path.read_bytes() for path in files(tracked)]
    assert export(client, tracked.project).total == 3
    assert [path.read_bytes() for path in files(tracked)] == before


def test_a_run_of_a_changed_configuration_replaces_the_former_one(tracked, client):
    record(tracked, client, "a" * 16, losses=(1.0, 2.0))
    export(client, tracked.project)
    time.sleep(0.01)
    record(tracked, client, "b" * 16, losses=(3.0,))
    record(tracked, client, "c" * 16, seed="2")
    done = export(client, tracked.project)
    assert done.superseded == 1
    assert [row["run_key"][0] for row in read_runs(files(tracked)[0])] == ["b", "c"]
    assert {row["run_key"][0] for row in read_metrics(files(tracked)[1])} == {"b", "c"}


def test_translations_are_exported_and_outlive_the_store(tracked, client):
    record_translated(tracked, client, "0" * 16, "e f", *"ghijklmnop")
    export(client, tracked.project)
    first = translations(tracked)
    assert first[0] == ("0" * 16, "1", "c, d", "e f")
    assert [line for _, line, _, _ in first] == [str(i) for i in range(1, 12)]
    assert not export(client, tracked.project).changed
    (run,) = read_store(client)
    shutil.rmtree(client.download_artifacts(run.run_id, ""))
    export(client, tracked.project)
    assert translations(tracked) == first


def test_what_a_probe_recorded_is_exported(tracked, client):
    recorder = record(tracked, client, "0" * 16)
    recorder.log_text("probes.csv", "step,layer,head,statistic,x,y,mean,std,n\n7,0,1,beta,0,0,0.5,0.1,4\n")
    recorder.set_tags({"texts": "probes.csv"})
    recorder.flush()
    export(client, tracked.project)
    (row,) = read_probes(tracked.root / "results" / "probes.csv")
    assert (row["run_key"], row["head"], row["statistic"], row["mean"]) == ("0" * 16, "1", "beta", "0.5")
    assert not (tracked.root / "results" / "translations.csv").exists()


def test_translations_of_another_machine_stay(tracked, client):
    record_translated(tracked, client, "0" * 16, "e f")
    export(client, tracked.project)
    before = translations(tracked)
    (tracked.root / "mlflow.db").unlink()
    other = open_store(tracked.project)
    record(tracked, other, "1" * 16, row="steep")
    export(other, tracked.project)
    assert translations(tracked) == before


def test_only_ended_runs_of_experiments_are_exported(tracked, client):
    record(tracked, client, "a" * 16, status="FAILED")
    record(tracked, client, "b" * 16, status="KILLED", seed="2")
    record(tracked, client, "c" * 16, diverged="NaN at step 3", seed="3")
    record(tracked, client, "d" * 16, profile="", seed="4")
    export(client, tracked.project)
    found = {row["run_key"][0]: row["status"] for row in read_runs(files(tracked)[0])}
    assert found == {"a": "failed", "c": "diverged"}
    assert outcomes(client)["b" * 16] == "interrupted"


def test_of_points_logged_twice_the_later_one_counts(tracked, client):
    recorder = record(tracked, client, "a" * 16, losses=(1.0, 2.0, 3.0))
    time.sleep(0.01)
    recorder.log_points({"valid/loss": 7.0}, 2)
    recorder.flush()
    points = read_points(client, [recorder.run_id])[recorder.run_id]
    assert points == [("valid", "loss", 1, 1.0), ("valid", "loss", 2, 7.0), ("valid", "loss", 3, 3.0)]


def test_nan_and_infinity_survive(tracked, client):
    record(tracked, client, "a" * 16, losses=(math.nan, math.inf, -math.inf, 1e-30))
    export(client, tracked.project)
    assert [row["value"] for row in read_metrics(files(tracked)[1])] == ["nan", "inf", "-inf", "1e-30"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000782944029, "0.000782944029"), (1 / 3, "0.333333333"), (123456789012.0, "123456789012"), (-0.5, "-0.5")],
)
def test_numbers_keep_nine_digits_and_counts_all(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("run_key,experiment", "experiment", "runs.csv lacks the column 'run_key'"),
        ("deviations", "deviations,mood", "runs.csv has an unknown column 'mood'"),
        ("smoke,released,complete", "smoke,released,finished", "line 2: status 'finished' is none of"),
        ("toy,plain", "toy", "line 2: 32 fields are expected, not 31; move it away, then run `fwp export`"),
    ],
)
def test_a_damaged_csv_is_refused_before_anything_is_written(tracked, client, old, new, sentence):
    record(tracked, client, "a" * 16)
    export(client, tracked.project)
    runs_file, metrics_file = files(tracked)
    runs_file.write_text(runs_file.read_text().replace(old, new, 1))
    before = runs_file.read_bytes(), metrics_file.read_bytes()
    record(tracked, client, "b" * 16, seed="2")
    with pytest.raises(UserError) as caught:
        export(client, tracked.project)
    assert sentence in str(caught.value)
    assert (runs_file.read_bytes(), metrics_file.read_bytes()) == before


@pytest.mark.parametrize("name", [0, 1])
def test_a_key_that_stands_twice_is_refused(tracked, client, name):
    record(tracked, client, "a" * 16)
    export(client, tracked.project)
    path = files(tracked)[name]
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"line 3: run_key.* = aaaaaaaaaaaaaaaa.* stands twice"):
        export(client, tracked.project)


def test_a_value_that_is_no_number_is_refused(tracked, client):
    record(tracked, client, "a" * 16)
    export(client, tracked.project)
    path = files(tracked)[1]
    path.write_text(path.read_text().replace(",1\n", ",one\n"))
    with pytest.raises(UserError, match="line 2: value 'one' is no number; move it away, then run `fwp export`"):
        read_metrics(path)


def test_a_full_disk_leaves_the_former_file(tracked, client, monkeypatch):
    record(tracked, client, "a" * 16)
    export(client, tracked.project)
    before = [path.read_bytes() for path in files(tracked)]
    record(tracked, client, "b" * 16, seed="2")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics.csv cannot be written: No space left on device; it is as before"):
        export(client, tracked.project)
    assert [path.read_bytes() for path in files(tracked)] == before
    assert {path.name for path in (tracked.root / "results").iterdir()} == {"runs.csv", "metrics.csv"}


def test_a_server_is_read_run_by_run_with_the_same_result(tracked, client):
    recorder = record(tracked, client, "a" * 16, losses=(1.0, math.nan, 2.0))
    in_bulk = read_points(client, [recorder.run_id])

    class Server:
        """The client of a store that is no database of ours."""

        _tracking_client = type("Tracking", (), {"store": object()})
        get_run = staticmethod(client.get_run)
        get_metric_history = staticmethod(client.get_metric_history)

    assert repr(read_points(Server(), [recorder.run_id])) == repr(in_bulk)


def test_status_counts_the_runs_of_every_row(tracked, client, train):
    runs = tracked.runs()
    train(runs[0])
    (plain, tanh, steep) = project_status(client, tracked.project, ["toy", "view"])
    assert (plain.row, plain.done, plain.total) == ("plain", 1, 2)
    assert (tanh.done, steep.total) == (0, 2)
    known = {runs[0].run_key: "diverged", runs[1].run_key: "failed", runs[2].run_key: "running"}
    plain, tanh, _ = count_rows(runs, known)
    assert (plain.done, plain.diverged, plain.failed, tanh.running) == (1, 1, 1, 1)


def test_the_page_of_an_experiment_says_how_far_it_is(tracked, client, train):
    runs = tracked.runs()
    train(runs[0])
    rows = project_status(client, tracked.project, ["toy"])
    describe_experiment(client, tracked.project, "toy", note_on(rows))
    tags = client.get_experiment_by_name("toy").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "| plain | smoke | released | 1/2 | 0 |" in tags["mlflow.note.content"].splitlines()


def test_a_note_that_is_refused_stops_nothing(tracked, client, caplog):
    class Refusing:
        def __getattr__(self, name):
            raise RuntimeError("the store is away")

    describe_experiment(Refusing(), tracked.project, "toy", "x")
    assert "the note of the experiment was refused (the store is away)" in caplog.text


def test_the_end_of_a_run_is_a_column_and_survives_a_late_delivery(tracked, client, monkeypatch):
    monkeypatch.setattr("fwp_lightning.tracking.time.time", lambda: 1767225600.5)
    record(tracked, client, "a" * 16)
    monkeypatch.undo()
    export(client, tracked.project)
    assert RUN_COLUMNS[RUN_COLUMNS.index("wall_seconds") + 1] == "finished"
    assert [row["finished"] for row in read_runs(files(tracked)[0])] == ["2026-01-01T00:00:00Z"]


def runs_csv(path, **changed):
    row = {
        **dict.fromkeys(RUN_COLUMNS, ""), "run_key": "a" * 16, "experiment": "toy", "seed": "1", "version": "1",
        "status": "complete", **changed,
    }  # fmt: skip
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([RUN_COLUMNS, [row[column] for column in RUN_COLUMNS]])
    return path


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("seed", "x", "seed 'x' is no whole number"),
        ("version", "", "version '' is no whole number"),
        ("wall_seconds", "abc", "wall_seconds 'abc' is no number"),
        ("wall_seconds", "-1", "wall_seconds '-1' is no number of seconds"),
        ("finished", "yesterday", "finished 'yesterday' is no time such as"),
        ("status", "done", "status 'done' is none of complete, diverged, failed"),
        ("run_key", "", "run_key '' is empty"),
    ],
)
def test_every_value_has_its_type(tmp_path, column, value, problem):
    path = runs_csv(tmp_path / "runs.csv", **{column: value})
    with pytest.raises(UserError) as caught:
        read_runs(path)
    assert f"line 2: {problem}" in str(caught.value)
    assert str(caught.value).endswith("move it away, then run `fwp export`.")


def test_a_file_that_is_no_csv_is_one_sentence(tmp_path):
    assert read_runs(tmp_path / "absent.csv") == []
    assert len(read_runs(runs_csv(tmp_path / "good.csv"))) == 1
    (tmp_path / "garbage.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"garbage\.csv cannot be read: it is no text in UTF-8; move it away"):
        read_runs(tmp_path / "garbage.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv cannot be read: Is a directory"):
        read_metrics(tmp_path / "folder.csv")


def test_results_being_a_file_is_one_sentence(tracked, client):
    record(tracked, client, "a" * 16)
    tracked.project.results.write_text("")
    with pytest.raises(UserError, match="results is a file where a folder must be; move it away"):
        export(client, tracked.project)
