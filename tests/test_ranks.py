"""Runs on two devices: one run in the store, the parameters of one process, resumed bit for bit, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fwp_lightning.results import read_points, read_store
from fwp_lightning.sweep.training import FINAL, check_run, newest_checkpoint
from fwp_lightning.tracking import run_folder

BASE = """
seed_everything: 1
trainer:
  {accelerator: cpu, devices: 1, strategy: auto, num_nodes: 1, precision: 32-true, max_epochs: -1,
   num_sanity_val_steps: 0, log_every_n_steps: 1}
model:
  class_path: fwp_lightning.tasks.language_modeling.LanguageModelingTask
  init_args:
    attention: {rule: delta, phi_norm: sum}
    architecture: {n_layers: 1, d_model: 8, n_heads: 2, d_ff: 8, dropout: 0.0, positions: none, cutoffs: [40, 200]}
    evaluation: {kind: segments}
    context: segment
    lr: 1e-2
    warmup_steps: 2
    max_steps: 20
data:
  class_path: fwp_lightning.data.wikitext.WikiTextData
  init_args: {corpus: facts, n_tokens: 2000, length: 12, batch_size: 6, steps_per_block: 5, evaluation_batch_size: 2}
"""
EXPERIMENT = """
title: Words
base: base/words.yaml
seeds: [1]
rows:
  one: {model.lr: 1e-2}
  two: {trainer: {devices: 2, strategy: ddp}}
  carried: {trainer: {devices: 2, strategy: ddp}, model.context: carried, model.architecture.dropout: 0.3}
  carried once more:
    {trainer: {devices: 2, strategy: ddp}, model.context: carried, model.architecture.dropout: 0.3}
  spawned: {trainer: {devices: 2, strategy: ddp_spawn}}
  two machines: {trainer: {devices: 2, strategy: ddp, num_nodes: 2}}
protocols: {released: {version: 1}}
profiles: {smoke: {}}
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def words(tracked: Any) -> Any:
    """A project whose experiment trains on one process and on two."""
    tracked.write("base/words", BASE)
    tracked.write("words", EXPERIMENT)
    return tracked


def run_of(words: Any, row: str) -> Any:
    return words.runs("words", rows=[row])[0]


def points(client: Any, run: Any) -> list[Any]:
    (stored,) = [stored for stored in read_store(client) if stored.run_key == run.run_key]
    assert (stored.outcome, stored.status) == ("complete", "FINISHED")
    return read_points(client, [stored.run_id])[stored.run_id]


def weights(words: Any, run: Any) -> dict[str, torch.Tensor]:
    return torch.load(run_folder(words.project, run.run_key) / FINAL, weights_only=True)["weights"]


def runs_in_store(client: Any) -> int:
    homes = [home.experiment_id for home in client.search_experiments()]
    return len(client.search_runs(homes))


def test_two_processes_are_one_run_with_the_parameters_of_one_process(
    train: Callable[..., Any], words: Any, client: Any
) -> None:
    one, two = run_of(words, "one"), run_of(words, "two")
    assert train(one).status == "complete"
    assert train(two).status == "complete"
    assert train(two).status == "done before"
    assert runs_in_store(client) == 2
    ours, theirs = points(client, two), points(client, one)
    assert [point[:3] for point in ours] == [point[:3] for point in theirs]
    # float32 sums in another order
    assert [point[3] for point in ours] == pytest.approx([point[3] for point in theirs], rel=1e-5)
    for name, parameter in weights(words, two).items():
        # ... and Adam divides by the size of a gradient, however small
        torch.testing.assert_close(parameter, weights(words, one)[name], rtol=1e-3, atol=1e-4)
    assert not multiprocessing.active_children()
    assert not torch.distributed.is_initialized()


def test_two_processes_resume_bit_for_bit(train: Callable[..., Any], words: Any, client: Any) -> None:
    # each process has dropout and a carried state of its own
    run, twin = run_of(words, "carried"), run_of(words, "carried once more")
    assert train(run, stop=lambda: 0.0).status == "stopped"
    assert newest_checkpoint(run_folder(words.project, run.run_key)) is not None
    assert train(run).status == "complete"
    assert train(twin).status == "complete"
    assert runs_in_store(client) == 2
    assert points(client, run) == points(client, twin)
    for name, parameter in weights(words, run).items():
        assert torch.equal(parameter, weights(words, twin)[name])


def test_what_goes_wrong_in_the_second_process_is_the_runs_traceback(
    train: Callable[..., Any], words: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words.root.joinpath("second.py").write_text(
        "import os, fwp_lightning.sweep.training as t\n"
        "def refuse(*args):\n    raise RuntimeError('the second process was told to fail')\n"
        f"if os.getpid() != {os.getpid()}:\n    t.newest_checkpoint = refuse\n"
    )
    from fwp_lightning.sweep.training import Circumstances, train_run
    from fwp_lightning.tracking import Origin

    origin = Origin(imports=(str(words.root / "second.py"),))
    outcome = train_run(run_of(words, "two"), client, Circumstances(words.project, origin))
    assert outcome.status == "failed"
    assert "the second process was told to fail" in outcome.message
    (stored,) = read_store(client)
    assert stored.status == "FAILED"
    text = Path(client.download_artifacts(stored.run_id, "traceback.txt")).read_text(encoding="utf-8")
    assert "in refuse" in text
    assert not multiprocessing.active_children()


def test_processes_that_a_sweep_cannot_start_are_found_before_anything_trains(words: Any) -> None:
    assert "trainer.strategy=ddp_spawn: a sweep starts the processes" in check_run(run_of(words, "spawned")).reason
    assert (
        "trainer.num_nodes=2: a run of a sweep trains on one machine" in check_run(run_of(words, "two machines")).reason
    )
    assert check_run(run_of(words, "two")) is None


def test_a_killed_sweep_leaves_no_process(words: Any, client: Any) -> None:
    words.edit("base/words", "max_steps: 20", "max_steps: 4000")
    arguments = ["sweep", "words", "--rows", "two", "--jobs", "1", "--checkpoint-seconds", "0.1"]
    process = words.start(*arguments)
    key = run_of(words, "two").run_key
    until = time.monotonic() + 250
    while not (words.project.runs / key / "last.ckpt").exists():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert runs_in_store(client) == 1


def test_fit_on_two_devices_is_one_run(words: Any, client: Any) -> None:
    command = [
        sys.executable,
        "-m",
        "fwp_lightning",
        "fit",
        "--config",
        str(words.root / "experiments/base/words.yaml"),
    ]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        command, env=words.environment, cwd=words.root, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is recorded") == 1
    (stored,) = read_store(client)
    assert stored.outcome == "complete"
    assert len(list(words.project.runs.iterdir())) == 1
