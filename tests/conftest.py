"""Shared fixtures: a small project of toy runs, its store, and the command `fwp` in a process of its own."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

TESTS = Path(__file__).resolve().parent
TOY_TASK = TESTS / "toy_task.py"

TOY_BASE = """
seed_everything: 1
trainer:
  {accelerator: cpu, devices: 1, precision: 32-true, max_epochs: 6, num_sanity_val_steps: 0, log_every_n_steps: 5}
model:
  class_path: toy_task.ToyTask
  init_args:
    attention: {kind: identity, nu: 1}
    learning_rate: 5e-2
    noise: 0.1
    seconds_per_step: 0.0
    nan_at: -1
    fail_at: -1
    stop_below: 0.0
data: {class_path: toy_task.ToyData, init_args: {n_keys: 4, block: 5, data_dir: data}}
"""
TOY = """
title: Toy
source: Figure 0
base: base/toy.yaml
protocol: released
seeds: [1]
rows:
  plain: {}
  tanh: {model.attention.kind: tanh}
  steep: {model.attention: {nu: 2}, model.learning_rate: 1e-1}
grid: {data.n_keys: [2, 10]}
protocols:
  released: {version: 1, statistic: last, set: {model.noise: 0.2}}
  corrected: {version: 1, statistic: best, rows: {tanh: {model.noise: 0.3}}}
profiles:
  smoke: {}
  short: {grid: {data.n_keys: [3]}, seeds: [1, 2], rows: [plain], row_set: {plain: {model.noise: 0.5}}}
  paper: {set: {trainer.max_epochs: 9}, row_grid: {tanh: {data.n_keys: [2]}}}
deviations: {smoke: "  six\\n  epochs ", corrected: noise differs}
"""
TOY_VIEW = """
title: Toy at 10
runs_of: toy
rows: [plain, tanh]
grid: {data.n_keys: [10]}
profiles: {short: {grid: {data.n_keys: [3]}}}
"""


class ToyProject:
    """A project folder in a temporary place, with ways to look at it."""

    def __init__(self, root: Path) -> None:
        from fwp_lightning.experiment import Project

        self.root = root
        self.project = Project(root)
        (root / "experiments" / "base").mkdir(parents=True)
        (root / "pyproject.toml").touch()
        self.write("base/toy", TOY_BASE)
        self.write("toy", TOY)
        self.write("view", TOY_VIEW)

    def write(self, name: str, text: str) -> Path:
        path = self.root / "experiments" / f"{name}.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / "experiments" / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def runs(self, name: str = "toy", **chosen: Any) -> list[Any]:
        from fwp_lightning.experiment import load_experiment, resolve_runs

        return resolve_runs(load_experiment(name, self.project), **chosen)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fwp_lightning", "--import", str(TOY_TASK), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path, "FWP_ROOT": str(self.root), "COLUMNS": "200"}

    def fwp(self, *arguments: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start `fwp` as the leader of a process group, so that its workers can be signalled with it."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """What trains or measures flushes them, for the whole process; the next test may need them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _no_store_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("FWP_ROOT", raising=False)


@pytest.fixture
def toy(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path / "project")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was just created: copying it saves each test the seconds that MLflow takes to make one."""
    from fwp_lightning.experiment import Project
    from fwp_lightning.tracking import open_store

    root = tmp_path_factory.mktemp("store")
    open_store(Project(root))
    return root / "mlflow.db"


@pytest.fixture
def tracked(toy: ToyProject, empty_store: Path) -> ToyProject:
    """A toy project with an empty store."""
    shutil.copy(empty_store, toy.root / "mlflow.db")
    return toy


@pytest.fixture
def client(tracked: ToyProject) -> Any:
    from fwp_lightning.tracking import open_store

    return open_store(tracked.project)


@pytest.fixture
def train(tracked: ToyProject, client: Any) -> Callable[..., Any]:
    """Train a run of the tracked project in this process."""
    from fwp_lightning.sweep.training import Circumstances, train_run
    from fwp_lightning.sweep.workers import import_file
    from fwp_lightning.tracking import Origin

    import_file(str(TOY_TASK))

    def call(run: Any, **circumstances: Any) -> Any:
        return train_run(run, client, Circumstances(tracked.project, Origin(command="fwp test"), **circumstances))

    return call
