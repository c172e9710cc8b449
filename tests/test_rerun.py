"""`fwp rerun` repeats a run bit for bit from what is tracked of it, says so, and leaves everything as it was."""

import shutil

import pytest

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project
from fwp_lightning.results import export, find_run, read_store
from fwp_lightning.sweep.rerun import find_record, rerun, verdict


def everything(root):
    """Content of every file of a project, of the store what it says."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("mlflow.db")]
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def run(train, tracked, client):
    """A complete run that is tracked and exported."""
    run = tracked.runs(rows=["tanh"], seeds=[3])[1]
    assert train(run).status == "complete"
    export(client, tracked.project)
    return run


def test_a_run_is_repeated_from_the_store_bit_for_bit_and_nothing_is_touched(run, tracked, client, capsys):
    before, stored = everything(tracked.root), read_store(client)
    # what the experiment file says today does not matter: the tracked configuration is repeated
    tracked.edit("toy", "released: {version: 1, statistic: last, set: {model.noise: 0.2}}", "released: {}")
    edited = tracked.root / "experiments" / "toy.yaml"
    before[edited] = edited.read_bytes()
    assert rerun(run.run_key, client, tracked.project) == 0
    said = capsys.readouterr().out
    assert f"toy/tanh/n_keys=10/seed3 ({run.run_key}), from the MLflow store" in said
    assert "all 12 values are the same" in said
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:] if line.split()}
    then, now, *rest = lines["valid/loss"]
    assert then == now
    assert rest == ["0", "30", "30"]
    assert lines["status"] == ["complete", "complete"]
    assert everything(tracked.root) == before
    assert read_store(client) == stored


def test_a_run_that_only_the_csv_files_know_is_repeated_from_the_experiment_file(run, tracked, capsys):
    assert rerun(run.run_key, None, tracked.project) == 0
    said = capsys.readouterr().out
    assert "from results/*.csv" in said
    assert "all 12 values are the same" in said


def test_a_result_that_was_changed_is_seen(run, tracked, capsys):
    path = tracked.project.results / "metrics.csv"
    lines = path.read_text().splitlines()
    # sorted by split, metric and step: the last line is the last evaluation
    lines[-1] = lines[-1].rpartition(",")[0] + ",0.25"
    path.write_text("\n".join(lines) + "\n")
    rerun(run.run_key, None, tracked.project)
    said = capsys.readouterr().out
    assert "11 of 12 values are the same; the first other one: valid/loss at step 30" in said
    (line,) = [line.split() for line in said.splitlines() if line.startswith("valid/loss")]
    assert line[1] == "0.25"
    assert float(line[3]) == pytest.approx(float(line[2]) - 0.25, rel=1e-2)  # three digits are shown


def test_a_diverged_run_is_repeated_as_such(train, tracked, client, capsys):
    tracked.edit("toy", "plain: {}", "plain: {model.nan_at: 10}")
    run = tracked.runs(rows=["plain"])[0]
    train(run)
    assert rerun(run.run_key, client, tracked.project) == 0
    said = capsys.readouterr().out
    assert "diverged: the loss is NaN at step 10" in said
    # NaN is the same as NaN
    assert "all 4 values are the same" in said


def test_a_run_that_fails_now_is_exit_code_1(run, tracked, client, capsys, monkeypatch):
    import toy_task

    def fail(self, batch, index):
        raise RuntimeError("no more toys")

    monkeypatch.setattr(toy_task.ToyTask, "training_step", fail)
    assert rerun(run.run_key, client, tracked.project) == 1
    assert "failed: RuntimeError: no more toys" in capsys.readouterr().out


def test_an_unknown_key_is_one_sentence(run, tracked, client):
    near = run.run_key[:-1] + ("0" if run.run_key[-1] != "0" else "1")
    with pytest.raises(UserError, match=f"no tracked run has the key '{near}'; did you mean '{run.run_key}'"):
        find_record(near, client, tracked.project)


def test_a_run_whose_experiment_file_has_changed_is_one_sentence(run, tracked):
    tracked.edit("toy", "released: {version: 1", "released: {version: 2")
    with pytest.raises(UserError, match=r"experiments/toy.yaml no longer gives the run .* does not have its config"):
        find_record(run.run_key, None, tracked.project)


def test_a_tracked_configuration_that_was_changed_is_refused(run, tracked, client):
    stored = find_run(client, run.run_key)
    (path,) = tracked.project.artifacts.glob(f"*/{stored.run_id}/artifacts/config.yaml")
    path.write_text(path.read_text().replace("noise: 0.2", "noise: 0.1"))
    with pytest.raises(UserError, match=r"config.yaml is not the configuration that config_sha256 .* names"):
        find_record(run.run_key, client, tracked.project)
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=r"the artifact config.yaml of the run .* cannot be read"):
        find_record(run.run_key, client, tracked.project)


def test_a_verdict_counts_values_that_are_new_or_gone():
    then = {"valid/loss": {1: "0.5", 2: "0.25"}, "train/loss": {1: "1"}}
    longer = {**then, "valid/loss": {1: "0.5", 2: "0.25", 3: "0"}}
    assert verdict(then, then) == "all 3 values are the same"
    assert verdict(then, longer) == "all 3 values are the same; 1 more now"
    first_other = "the first other one: train/loss at step 1"
    assert verdict(then, {"valid/loss": {1: "0.5"}}) == f"1 of 3 values are the same; {first_other}"


@pytest.mark.slow
def test_the_command_needs_no_store_and_makes_none(run, tracked, tmp_path):
    shutil.move(tracked.root / "mlflow.db", tmp_path / "away.db")
    done = tracked.fwp("rerun", run.run_key)
    assert done.returncode == 0, done.stderr
    assert "all 12 values are the same" in done.stdout
    assert Project(tracked.root).store_file.exists() is False
