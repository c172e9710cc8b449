"""What tracking costs: a step that is logged, an export of a thousand runs, and the report drawn from them."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ToyProject
from large_store import fill_store
from lightning.pytorch import Callback
from mlflow import MlflowClient

from fwp_lightning.experiment import load_experiment, resolve_runs
from fwp_lightning.results import export
from fwp_lightning.sweep.training import SILENT_TRAINER, RunCLI, TrackingLogger, quiet_lightning
from fwp_lightning.tracking import RunRecorder
from reports.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
RUNS, POINTS = 1000, 100
# what nobody waits for, and a cost that no measured time has to be corrected for; of processor time, so that other
# programs on the machine do not count
EXPORT_SECONDS, DRAW_SECONDS, SHARE_OF_STEP = 10, 20, 0.02


@pytest.fixture
def papers(tracked: ToyProject) -> ToyProject:
    """A project with the paper's experiments and numbers."""
    shutil.rmtree(tracked.root / "experiments")
    shutil.copytree(ROOT / "experiments", tracked.root / "experiments")
    (tracked.root / "results").mkdir()
    shutil.copy(ROOT / "results" / "paper.csv", tracked.root / "results")
    return tracked


@pytest.mark.slow
def test_a_thousand_runs_are_exported_in_10_seconds_and_drawn_in_20(
    papers: ToyProject, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = {
        (name, protocol): resolve_runs(
            load_experiment(name, papers.project), profile="paper", protocol=protocol, seeds=[1, 2, 3, 4]
        )
        for name in ("figure2", "figure5")
        for protocol in ("released", "corrected")
    }
    runs = [run for found in planned.values() for run in found[: RUNS // len(planned)]]
    fill_store(client, papers.project, runs, POINTS)
    started = time.process_time()
    assert export(client, papers.project).exported == len(runs) == RUNS
    exported = time.process_time()
    assert main(["--root", str(papers.root)]) == 0
    drawn = time.process_time()
    with capsys.disabled():
        print(f"\n{RUNS} runs: exported in {exported - started:.1f} s, drawn in {drawn - exported:.1f} s")
    assert exported - started < EXPORT_SECONDS
    assert drawn - exported < DRAW_SECONDS
    assert (papers.root / "reports/output/paper/corrected/figure5.pdf").is_file()


class EveryStep(Callback):
    """Logs every step of every other ten, and takes the processor time of steps and of logging."""

    def __init__(self) -> None:
        self.blocks: dict[bool, list[float]] = {True: [], False: []}
        self.logging, self.n_logged = 0.0, 0
        self._began = 0.0

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, index: int) -> None:
        step = trainer.global_step
        if is_logged := step // 10 % 2 == 0:
            before = time.process_time()
            trainer.logger.log_metrics({"train/loss": float(outputs["loss"]), "train/nats": 1.0}, step)
            self.logging += time.process_time() - before
            self.n_logged += 1
        if step % 10 == 9:
            now = time.process_time()
            # the first steps warm up
            if step > 30:
                self.blocks[is_logged].append((now - self._began) / 10)
            self._began = now


@pytest.mark.slow
def test_logging_every_step_costs_less_than_two_percent_of_a_step(
    papers: ToyProject, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = resolve_runs(load_experiment("table2", papers.project), rows=["Delta Network"], seeds=[1])
    # 5 s of the process lie between two writes, as on a machine that has nothing else to do
    place = {"run_key": "a" * 16, "experiment": "x", "name": "x", "tags": {}}
    recorder = RunRecorder(client, papers.project, clock=time.process_time, **place)
    recorder.start()
    every = EveryStep()
    settings = {"logger": TrackingLogger(recorder), "limit_val_batches": 0, **SILENT_TRAINER}
    with quiet_lightning():
        cli = RunCLI(run.config, settings, [every])
        cli.trainer.fit(cli.model, cli.datamodule)
    before = time.process_time()
    recorder.flush()
    every.logging += time.process_time() - before
    logged, silent = (statistics.median(every.blocks[is_logged]) for is_logged in (True, False))
    share = every.logging / every.n_logged / silent
    with capsys.disabled():
        print(f"\na step {1e3 * silent:.2f} ms, logged {1e3 * logged:.2f} ms: {100 * share:.2f} % for logging")
    # of the calls alone; the medians of whole steps are printed beside it
    assert share <= SHARE_OF_STEP


def test_a_thousand_logged_steps_are_four_writes(tracked: ToyProject, client: Any, monkeypatch: Any) -> None:
    writes = []
    original = MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda self, *given, **named: (writes.append(given), original(self, *given, **named))
    )
    recorder = RunRecorder(
        client, tracked.project, run_key="a" * 16, experiment="x", name="x", tags={}, clock=lambda: 0.0
    )
    recorder.start()
    writes.clear()
    for step in range(1000):
        recorder.log_points({"train/loss": 1.0, "train/nats": 1.0}, step)
    assert len(writes) == 4
