"""Sweeps end with every run complete, once, whatever interrupts them on the way."""

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fwp_lightning.errors import UserError
from fwp_lightning.results import Estimate, outcomes, read_points, read_store
from fwp_lightning.sweep import LocalSweep, Plan, plan_sweep, run_sweep, seconds_for
from fwp_lightning.sweep.progress import duration, summary
from fwp_lightning.sweep.training import check_run, first_cause, newest_checkpoint
from fwp_lightning.sweep.workers import import_file
from fwp_lightning.tracking import Origin, locked_run, open_store, run_folder


def curves(client):
    """The points of every run, by run key."""
    runs = read_store(client)
    points = read_points(client, [run.run_id for run in runs])
    return {run.run_key: points.get(run.run_id, []) for run in runs}


def stop_after(seconds):
    """A stop that is asked for once a run has trained for a while."""
    started = time.monotonic()

    def asked():
        waited = time.monotonic() - started - seconds
        return waited if waited > 0 else None

    return asked


# --- one run, in this process


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(train, tracked, client):
    tracked.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.01")
    run, twin = tracked.runs(rows=["plain"], seeds=[1])[0], tracked.runs(rows=["plain"], profile="paper")[0]
    assert train(run, stop=stop_after(0.1)).status == "stopped"
    assert outcomes(client) == {run.run_key: "interrupted"}
    assert read_store(client)[0].status == "KILLED"
    assert newest_checkpoint(run_folder(tracked.project, run.run_key)) is not None
    assert train(run).status == "complete"
    # the same training under another key, which only goes on for longer
    assert train(twin).status == "complete"
    found = curves(client)
    assert len(found[run.run_key]) == 12
    assert set(found[run.run_key]) < set(found[twin.run_key])
    (stored,) = [stored for stored in read_store(client) if stored.run_key == run.run_key]
    assert stored.status == "FINISHED"
    assert stored.metrics["steps"] == 30


def test_a_run_interrupted_at_every_epoch_still_ends_the_same(train, tracked, client):
    run, twin = tracked.runs(rows=["plain"])[0], tracked.runs(rows=["plain"], profile="paper")[0]
    for _ in range(5):
        assert train(run, stop=lambda: 0.0).status == "stopped"
    assert train(run, stop=lambda: 0.0).status in ("stopped", "complete")
    assert train(run).status in ("complete", "done before")
    train(twin)
    found = curves(client)
    assert set(found[run.run_key]) < set(found[twin.run_key])
    assert read_store(client)[0].metrics["best/step"] <= 30


def test_a_damaged_checkpoint_falls_back_to_the_former_one(train, tracked, client, caplog):
    run, twin = tracked.runs(rows=["plain"])[0], tracked.runs(rows=["plain"], profile="paper")[0]
    folder = run_folder(tracked.project, run.run_key)
    for _ in range(2):
        train(run, stop=lambda: 0.0)
    last = folder / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert newest_checkpoint(folder) == folder / "previous.ckpt"
    assert "cannot be read" in caplog.text
    train(run)
    train(twin)
    found = curves(client)
    assert set(found[run.run_key]) < set(found[twin.run_key])
    os.truncate(folder / "previous.ckpt", 10) if (folder / "previous.ckpt").exists() else None
    assert newest_checkpoint(folder) is None


def test_checkpoints_of_complete_runs_are_removed(train, tracked):
    run = tracked.runs()[0]
    train(run, checkpoint_seconds=0)
    assert not list(run_folder(tracked.project, run.run_key).glob("*.ckpt*"))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(train, tracked, monkeypatch, caplog):
    from lightning.pytorch import Trainer

    def full(self, path, *args):
        path.write_bytes(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    run = tracked.runs()[0]
    assert train(run, checkpoint_seconds=0).status == "complete"
    assert "No space left on device" in caplog.text
    assert not list(run_folder(tracked.project, run.run_key).glob("*.ckpt*"))


def test_a_diverged_run_is_complete_and_shown_as_diverged(train, tracked, client):
    tracked.edit("toy", "plain: {}", "plain: {model.nan_at: 10}")
    run = tracked.runs(rows=["plain"])[0]
    outcome = train(run)
    assert (outcome.status, outcome.message) == ("diverged", "the loss is NaN at step 10")
    assert outcomes(client) == {run.run_key: "diverged"}
    assert train(run).status == "done before"
    assert [value != value for *_, step, value in curves(client)[run.run_key] if step == 10] == [False, True]


def test_a_failed_run_keeps_its_traceback_and_is_tried_again(train, tracked, client):
    tracked.edit("toy", "plain: {}", "plain: {model.fail_at: 7}")
    run = tracked.runs(rows=["plain"])[0]
    outcome = train(run)
    assert (outcome.status, outcome.message) == ("failed", "RuntimeError: the toy was told to fail")
    (stored,) = read_store(client)
    assert stored.outcome == "failed"
    path = client.download_artifacts(stored.run_id, "traceback.txt")
    assert "in training_step" in Path(path).read_text(encoding="utf-8")
    assert train(run).status == "failed"
    assert len(read_store(client)) == 1


def test_a_run_that_another_process_trains_is_left_alone(train, tracked):
    run = tracked.runs()[0]
    with locked_run(run_folder(tracked.project, run.run_key)):
        assert train(run).status == "busy"


def test_a_run_folder_that_cannot_be_made_fails_the_run_in_a_sentence(train, tracked):
    tracked.project.runs.write_text("a file where a folder should be")
    outcome = train(tracked.runs()[0])
    assert outcome.status == "failed"
    assert "the run cannot be recorded" in outcome.message


def test_rows_are_built_on_the_meta_device_and_complaints_name_the_row(tracked, train):
    tracked.edit("toy", "nu: 2", "nu: 10")
    steep, plain = tracked.runs(rows=["steep"])[0], tracked.runs(rows=["plain"])[0]
    assert check_run(plain) is None
    assert check_run(steep) == ("toy, row 'steep', n_keys=2", "nu=10 is over 9; choose a smaller one")
    tracked.edit("toy", "kind: tanh", "kind: tahn")
    place, reason = check_run(tracked.runs(rows=["tanh"])[0])
    assert place == "toy, row 'tanh', n_keys=2"
    assert reason.startswith("unknown map 'tahn'")


def test_a_further_run_in_the_same_process_is_cheap(train, tracked):
    first, second = tracked.runs(rows=["plain"])
    train(first)
    started = time.process_time()
    assert train(second).status == "complete"
    # measured 0.25 s on one core; a new process costs eight
    assert time.process_time() - started < 1.5


# --- planning


def test_complete_runs_are_skipped_and_the_longest_start_first(train, tracked, client):
    runs = tracked.runs()
    train(runs[0])
    plan = plan_sweep([*runs, *runs], client, tracked.project)
    assert (len(plan.runs), plan.done) == (6, 1)
    assert runs[0] not in plan.pending
    sizes = [run.point for run in plan_sweep(runs, None, tracked.project).pending]
    assert sizes == ["n_keys=10"] * 3 + ["n_keys=2"] * 3


def test_time_is_estimated_from_the_nearest_point_of_the_row(tracked):
    small, large = tracked.runs(rows=["plain"])
    place = {"experiment": "toy", "profile": "smoke"}
    measured = [
        {**place, "row": "plain", "point": "n_keys=3", "wall_seconds": "10"},
        {**place, "row": "plain", "point": "n_keys=9", "wall_seconds": "60"},
        {**place, "row": "tanh", "point": "n_keys=2", "wall_seconds": "1000"},
    ]
    estimate = Estimate(measured)
    assert (estimate.seconds(small), estimate.seconds(large)) == (10, 60)
    assert estimate.seconds(tracked.runs(profile="paper")[0]) is None
    assert seconds_for([small, large], estimate, 1) == 70
    assert seconds_for([small, large], estimate, 2) == 60
    assert seconds_for([], estimate, 1) is None
    assert Plan([small], [small], {}, Estimate([])).seconds(1) is None


def test_progress_reads_as_people_say_it():
    assert summary(57, 320, 720) == "57/320 done, 12 min left"
    assert summary(0, 3, None) == "0/3 done, time left not known yet"
    assert summary(3, 3, 0) == "3/3 done"
    assert [duration(seconds) for seconds in (-1, 42, 600, 36000)] == ["0 s", "42 s", "10 min", "10.0 h"]


def test_a_run_that_is_late_takes_nothing_off_those_that_wait(toy):
    runs = toy.runs()[:3]
    plan = Plan(runs, runs, {}, Estimate([]))
    plan.estimate.add(runs[0], 100.0)
    workers = []
    sweep = LocalSweep(plan, toy.project, SimpleNamespace(busy=lambda: workers), jobs=1)
    assert sweep._seconds_left(*sweep._load()) == pytest.approx(300, abs=1)
    workers.append(SimpleNamespace(run=sweep.waiting.popleft(), since=time.monotonic() - 30))
    assert sweep._seconds_left(*sweep._load()) == pytest.approx(270, abs=1)
    workers[0].since -= 1000
    assert sweep._seconds_left(*sweep._load()) == pytest.approx(200, abs=1)
    sweep.waiting.clear()
    assert sweep._seconds_left(*sweep._load()) is None


@pytest.mark.parametrize("folder", ["runs", "results"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_sentence_before_anything_trains(tracked, monkeypatch, folder, code):
    write = Path.write_bytes

    def refuse(self, data):
        if self.parent.name == folder:
            raise OSError(code, os.strerror(code), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=rf"{folder} cannot be written: {os.strerror(code)}"):
        run_sweep(tracked.runs(), tracked.project, Origin())


def test_a_users_file_that_fails_is_one_sentence(tmp_path):
    (tmp_path / "broken_map.py").write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match=r"broken_map.py: ModuleNotFoundError: .*nothing_like_this"):
        import_file(str(tmp_path / "broken_map.py"))
    with pytest.raises(UserError, match="there is no such file"):
        import_file(str(tmp_path / "absent.py"))


# --- whole sweeps, in processes of their own


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_one_failed_run_stops_nothing_and_diverged_runs_are_no_failure(tracked, capsys):
    tracked.edit("toy", "plain: {}", "plain: {model.fail_at: 3}")
    tracked.edit("toy", "kind: tanh", "kind: tanh, model.nan_at: 10")
    done = tracked.fwp("sweep", "toy", "--jobs", "1")
    assert done.returncode == 1, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["toy", "smoke", "released", "plain", "0/2", "-", "2", "-", "-"] in lines
    assert ["toy", "smoke", "released", "tanh", "2/2", "2", "-", "-", "-"] in lines
    assert ["toy", "smoke", "released", "steep", "2/2", "-", "-", "-", "-"] in lines
    assert "failed: toy/plain/n_keys=2/seed1: RuntimeError: the toy was told to fail" in done.stdout
    assert "exported 6 runs to results/" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "litlogger" not in done.stdout + done.stderr
    # what is complete is not trained again, and the second export changes nothing
    client = open_store(tracked.project)
    before = curves(client)
    assert run_sweep(tracked.runs(rows=["tanh", "steep"]), tracked.project, Origin()) == 0
    said = capsys.readouterr().out
    assert "to train" not in said
    assert "nothing changed" in said
    assert curves(client) == before


@pytest.mark.slow
def test_kill_and_ctrl_c_and_two_sweeps_at_once_end_in_one_complete_run_per_key(tracked, train, client):
    tracked.edit("base/toy", "seconds_per_step: 0.0", "seconds_per_step: 0.02")
    runs = tracked.runs(profile="paper", rows=["plain", "steep"])
    arguments = ["sweep", "toy", "--profile", "paper", "--rows", "plain,steep", "--jobs", "1"]
    killed = tracked.start(*arguments, "--checkpoint-seconds", "0.1")
    wait_for(lambda: list(tracked.project.runs.glob("*/last.ckpt")))
    time.sleep(random.uniform(0, 1.5))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    begun = {run.run_id for run in read_store(client)}
    assert begun

    stopped, finished = tracked.start(*arguments), tracked.start(*arguments)
    wait_for(lambda: any(trained_by(run, stopped.pid) for run in read_store(client)) or stopped.poll() is not None)
    os.killpg(stopped.pid, signal.SIGINT)
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode in (130, 0), said
    assert "Traceback" not in said
    said, _ = finished.communicate(timeout=100)
    assert finished.returncode == 0, said

    stored = read_store(client)
    assert {run.run_key: run.outcome for run in stored} == {run.run_key: "complete" for run in runs}
    home = client.get_experiment_by_name("toy").experiment_id
    assert len(client.search_runs([home])) == len(runs)
    assert begun <= {run.run_id for run in stored}
    # the same runs undisturbed: without their pauses they have other keys and the same losses
    tracked.edit("base/toy", "seconds_per_step: 0.02", "seconds_per_step: 0.0")
    twins = tracked.runs(profile="paper", rows=["plain", "steep"])
    assert {train(run).status for run in twins} == {"complete"}
    found = curves(client)
    assert [found[run.run_key] for run in runs] == [found[twin.run_key] for twin in twins]


def trained_by(run, pid):
    """Whether a worker of the process ``pid`` trains the run."""
    worker = run.tags.get("fwp.process", "").split(":")[1:2]
    if run.status != "RUNNING" or not worker:
        return False
    with contextlib.suppress(psutil.Error):
        return psutil.Process(int(worker[0])).ppid() == pid
    return False


@pytest.mark.parametrize("name", ["runs.csv", "metrics.csv"])
def test_damaged_results_are_found_before_anything_trains(toy, name):
    toy.project.results.mkdir()
    (toy.project.results / name).write_text("garbage\n")
    with pytest.raises(UserError, match=rf"{name} lacks the column 'run_key'.*move it away, then run `fwp export`"):
        run_sweep(toy.runs(), toy.project, Origin())
    assert not (toy.root / "mlflow.db").exists()


def _allocate_too_much() -> None:
    torch.empty(2**60)


def _as_a_gpu_says() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15 GiB")


@pytest.mark.parametrize("allocate", [_allocate_too_much, _as_a_gpu_says])
def test_memory_that_runs_out_is_said_with_what_to_lower(allocate: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as error:
        allocate()
    said = first_cause(error.value)
    assert said.startswith("memory ran out (it asked for ")
    assert "lower data.batch_size" in said
    assert "data.accumulation" in said
