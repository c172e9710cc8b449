"""Train one run in this process: LightningCLI builds it, callbacks checkpoint and measure it, tracking records it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import logging
import math
import os
import random
import re
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from fwp_lightning.checkpoint_files import read_plain
from fwp_lightning.errors import RunBusy, RunStopped, UserError, sentence_of
from fwp_lightning.experiment import CHECKPOINT_SECONDS, Config, Project, Run, sha256_of
from fwp_lightning.peak_memory import peak_memory_mb, reset_peak_memory
from fwp_lightning.registry import did_you_mean
from fwp_lightning.sweep.ranks import Ranks, other_processes, refuse_devices
from fwp_lightning.sweep.workers import Outcome, Refusal, Settings
from fwp_lightning.system_metrics import SystemMetrics
from fwp_lightning.tasks.processes import gather
from fwp_lightning.tracking import (
    Origin,
    RunRecorder,
    cpu_name,
    locked_run,
    params_of,
    run_folder,
    tags_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# a run that is asked to stop may end its epoch and save within this time
STOP_SECONDS = 10.0
LAST, PREVIOUS, FINAL = "last.ckpt", "previous.ckpt", "final.ckpt"
DESCRIBED = ("n_params", "state", "rule", "feature_map", "phi_norm", "attention_norm", "backend")


# --- LightningCLI ----------------------------------------------------------------------------------------------------


class RunCLI(LightningCLI):
    """LightningCLI for one run of a sweep: runs share a parser; logger and callbacks are the suite's."""

    shared_parser: LightningArgumentParser | None = None

    def __init__(self, config: Config, trainer_settings: Mapping[str, Any], callbacks: list[Callback]) -> None:
        """Build trainer, model and data from a resolved configuration."""
        self.trainer_settings = dict(trainer_settings)
        self.own_callbacks = callbacks
        super().__init__(
            args=config,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False},
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Make the parser once per process: it reads the signatures of Lightning's classes, which takes long."""
        if RunCLI.shared_parser is None:
            super().setup_parser(*args, **kwargs)
            RunCLI.shared_parser = self.parser
        self.parser = RunCLI.shared_parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse a configuration, without Lightning's warning that the command line is not read."""
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer with the suite's logger and callbacks beside those of the configuration."""
        config = {**self._get(self.config_init, "trainer", default={}), **self.trainer_settings}
        return self._instantiate_trainer(config, self.own_callbacks)


def check_run(run: Run) -> Refusal | None:
    """Build a run's data and model on the meta device; return what is wrong with its configuration, None if nothing."""
    place = f"{run.experiment}, row {run.row!r}" + (f", {run.point}" if run.point else "")
    try:
        if problem := unknown_key(run.config) or missing_devices(run.config["trainer"]):
            return Refusal(run.base_file or place, problem)
        with quiet_lightning():
            cli = RunCLI(run.config, {"logger": False, "plugins": [Ranks()], **SILENT_TRAINER}, [])
            refuse_devices(run.config, cli.trainer)
            build_on_meta(cli.model, cli.datamodule)
            if (check := getattr(cli.model, "check_numbers", None)) is not None:
                check(cli.trainer, cli.datamodule)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any exception here is a row that cannot run
        return Refusal(place, first_cause(error))
    return None


def build_on_meta(task: LightningModule, datamodule: Any) -> nn.Module | None:
    """Check data that can be, and return a task's model, built without memory and without drawing numbers.

    So that a wrong choice, or a file that is missing or damaged, is found before anything trains.
    """
    check = getattr(datamodule, "check", None)
    if check is not None:
        check()
    build: Callable[[Any], nn.Module] | None = getattr(task, "build_model", None)
    if build is None:
        return None
    with torch.device("meta"):
        return build(datamodule)


def unknown_key(config: Config) -> str | None:
    """Return which key of a configuration its class does not have, None if all are known.

    jsonargparse finds such keys too, but says neither what they were meant to be nor where they stand.
    """
    parts: list[tuple[str, Any, Config]] = [("trainer", Trainer, config["trainer"])]
    for part in ("model", "data"):
        module, _, name = str(config[part]["class_path"]).rpartition(".")
        parts.append((part, getattr(importlib.import_module(module), name), config[part].get("init_args") or {}))
    return next((said for part in parts if (said := _unknown_in(*part))), None)


def _unknown_in(place: str, kind: Any, settings: Config) -> str | None:
    signature = inspect.signature(kind)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return None
    known = list(signature.parameters)
    types = get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)
    for key, value in settings.items():
        if key not in known:
            return f"unknown key '{place}.{key}'. {did_you_mean(key, known)}"
        is_group = isinstance(value, dict) and dataclasses.is_dataclass(types.get(key))
        if is_group and (said := _unknown_in(f"{place}.{key}", types[key], value)):
            return said
    return None


def missing_devices(trainer: Config) -> str | None:
    """Return which GPUs a trainer asks for that this machine does not have, None if there are enough."""
    if trainer.get("accelerator") not in ("gpu", "cuda"):
        return None
    asked, here = trainer.get("devices", 1), torch.cuda.device_count()
    needed = max(asked) + 1 if isinstance(asked, list) else asked if isinstance(asked, int) else 1
    if max(needed, 1) <= here:
        return None
    built = "" if torch.backends.cuda.is_built() else f", and torch {torch.__version__} is built without CUDA"
    return (
        f"trainer.accelerator={trainer['accelerator']} with trainer.devices={asked} needs a machine with as many GPUs; "
        f"here are {here}{built}. --dry-run --measure says what the runs would cost"
    )


# PyTorch's allocator on the CPU has no exception of its own
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def first_cause(error: BaseException) -> str:
    """Return the sentence of the error behind jsonargparse's nested reports of it."""
    if ran_out_of_memory(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        return (
            f"memory ran out{f' (it asked for {asked[1]})' if asked else ''}; lower data.batch_size (translation: "
            "data.max_tokens); where there is data.accumulation, raise it by as much and an update sees as much data"
        )
    while isinstance(error, ArgumentError) and isinstance(error.__cause__, ValueError | TypeError):
        error = error.__cause__
    # of the alternatives that jsonargparse tried, the first is what was meant, and the value is repeated behind it
    text = str(error).split("Errors:")[-1].split("- Expected a <class 'NoneType'>")[0].split("Given value type:")[0]
    text = " ".join(text.split()).removeprefix("- ")
    plain = ArgumentError | ValueError | TypeError | MisconfigurationException
    return text[:600] if isinstance(error, plain) else sentence_of(error)[:600]


SILENT_TRAINER = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's banners and advice out of the output of a sweep."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings(
            "ignore", message=".*(num_workers|log_every_n_steps|logging interval|IterableDataset).*"
        )
        yield


# --- logger and callbacks --------------------------------------------------------------------------------------------


class TrackingLogger(Logger):
    """Hands what Lightning logs to a recorder, at the steps that the task states."""

    def __init__(self, recorder: RunRecorder) -> None:
        """Log to ``recorder``."""
        super().__init__()
        self.recorder = recorder

    @property
    def name(self) -> str:
        """Return the name of the run."""
        return self.recorder.name

    @property
    def version(self) -> str:
        """Return the key of the run."""
        return self.recorder.run_key

    @property
    def save_dir(self) -> str:
        """Return the folder of the run."""
        return str(self.recorder.folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics; a name without a split, such as Lightning's epoch, is none of ours."""
        values = {key: value for key, value in metrics.items() if "/" in key}
        self.recorder.log_points(values, step or 0)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved configuration is recorded at the start."""


class ExactCheckpoint(Callback):
    """Saves what a run needs to continue bit for bit: Lightning's state and that of the global random generators.

    The file is complete or absent: it is written aside, flushed to the disk and renamed; the former one is kept. It is
    renamed only when every point up to it is recorded, so that no point is lost behind a checkpoint.
    """

    def __init__(self, recorder: RunRecorder, *, seconds: float, stop: Callable[[], float | None]) -> None:
        """Save every ``seconds``; ``stop`` returns for how long the run has been asked to end."""
        self.recorder = recorder
        self.seconds = seconds
        self.stop = stop
        self._saved_at = time.monotonic()
        self._written = False
        self._stopping = False
        self._random_state: dict[str, Any] | None = None
        self._of_others: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the random generators at the end of the epoch: the first process's, then the others'."""
        others = {"random_of_others": self._of_others} if self._of_others else {}
        return {"random": self._random_state, **others}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of the random generators over."""
        self._random_state = state_dict["random"]
        self._of_others = state_dict.get("random_of_others", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()
        if 0 < trainer.global_rank <= len(self._of_others):
            self._random_state = self._of_others[trainer.global_rank - 1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Continue every epoch from where the generators stood at the end of the one before.

        Making a loader's iterator draws a number too, and a resumed run makes other ones than an undisturbed run.
        """
        if batch_idx == 0 and self._random_state is not None:
            set_random_state(self._random_state)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop within an epoch only if its end is long in coming."""
        asked = self.stop()
        if asked is not None and asked > STOP_SECONDS:
            raise RunStopped

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop at once: the final evaluation is made anew."""
        if self.stop() is not None:
            raise RunStopped

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint aside if it is time; a run that has reached its end has nothing to save."""
        self._random_state = random_state()
        stopping = self.stop() is not None
        due = stopping or time.monotonic() - self._saved_at >= self.seconds
        # the first process decides for all
        self._stopping, due = trainer.strategy.broadcast((stopping, due))
        if due and not trainer.should_stop:
            self._of_others = gather(trainer, self._random_state)[1:]
            self._written = write_checkpoint(trainer, self.recorder.folder)
            self._saved_at = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the checkpoint in place once the epoch's own means, which Lightning logs last, are recorded too."""
        if self._written:
            self._written = False
            if trainer.is_global_zero and self.recorder.secure():
                publish_checkpoint(self.recorder.folder)
        if self._stopping:
            raise RunStopped


class OwnSignals(Callback):
    """Keeps SIGTERM what it was: Lightning would end the run at the next batch, without a checkpoint."""

    def __init__(self) -> None:
        """Remember what a signal does now."""
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the handler back, if there was one."""
        if self.handler not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_test_start = on_train_start


def random_state() -> dict[str, Any]:
    """Return the state of all global random generators, in types that load with weights_only."""
    kind, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002 - whatever uses the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),  # type: ignore[union-attr]
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all global random generators to a state from ``random_state``."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))  # noqa: NPY002 - as above


def write_checkpoint(trainer: Trainer, folder: Path) -> bool:
    """Write a checkpoint aside and return whether that worked; a full disk costs the checkpoint, not the run."""
    partial = folder / f"{LAST}.tmp"
    try:
        _save(trainer, partial)
        _sync(partial)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as RuntimeError
        log.warning("no checkpoint in %s: %s", folder, sentence_of(error))
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return False
    return True


def _save(trainer: Trainer, path: Path) -> None:
    try:
        trainer.save_checkpoint(path)
    except (OSError, RuntimeError):
        # the other processes have nothing to write and wait for this one
        trainer.strategy.barrier()
        raise


def publish_checkpoint(folder: Path) -> None:
    """Make the written checkpoint last.ckpt, the former one previous.ckpt."""
    last = folder / LAST
    try:
        if last.exists():
            last.replace(folder / PREVIOUS)
        (folder / f"{LAST}.tmp").replace(last)
        _sync(folder)
    except OSError as error:
        log.warning("no checkpoint in %s: %s", folder, sentence_of(error))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that can be read, None if there is none."""
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            read_plain(path)
        except UserError as error:
            log.warning("%s An earlier one is taken.", error)
        else:
            return path
    return None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the shapes of the weights in a task's checkpoint, on the meta device; ``UserError`` for any other file."""
    content = read_plain(path, "meta")
    if "state_dict" not in content:
        what = f"a {FINAL}, which `fwp generate` reads" if "weights" in content else "no checkpoint of a task"
        raise UserError(f"{path}: it is {what}; name a {LAST} that `fwp fit` left behind.")
    return dict(content["state_dict"])


def why_not_weights_of(weights: Mapping[str, torch.Tensor], model: nn.Module | None) -> str | None:
    """Return how the weights in a checkpoint differ from those of a task's ``model``, None if they do not."""
    if model is None:
        return None
    theirs = {name: tuple(x.shape) for name, x in weights.items() if name.startswith("model.")}
    ours = {f"model.{name}": tuple(x.shape) for name, x in model.state_dict().items()}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            here, there = (str(list(x[name])) if name in x else "absent" for x in (ours, theirs))
            return f"{name} is {there} in it and {here} here"
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that is complete."""
    for name in (LAST, PREVIOUS, f"{LAST}.tmp"):
        (folder / name).unlink(missing_ok=True)


class Measurements(Callback):
    """Takes a run's time, memory, best evaluation and the machine's load; the first three outlive an interruption."""

    def __init__(self, recorder: RunRecorder, data: Config) -> None:
        """Describe the run to ``recorder`` once it is built; ``data`` is the configuration of its data."""
        self.recorder = recorder
        self.data = data
        self.system = SystemMetrics()
        self.best: float | None = None
        self.best_step = 0
        self.final: float | None = None
        self.final_step = 0
        self._earlier_seconds = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, those before an interruption included."""
        return self._earlier_seconds + (time.monotonic() - self._started if self._started else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run continues from."""
        evaluations = {"best": self.best, "best_step": self.best_step, "final": self.final}
        return {**evaluations, "final_step": self.final_step, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from an interrupted run."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.final, self.final_step = state_dict["final"], state_dict["final_step"]
        self._earlier_seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and record what the configuration does not spell out."""
        self._started = time.monotonic()
        reset_peak_memory()
        described = describe_task(trainer, pl_module)
        self.recorder.set_tags(described)
        # generated data are known by what they are generated from
        digest = described["data_sha256"] or sha256_of([self.data])
        self.recorder.log_dataset(name_of_data(self.data), digest, json.dumps(self.data))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look at the machine if it is time."""
        if values := self.system.look():
            self.recorder.log_points(values, steps_of(trainer, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the machine once at least."""
        self.recorder.log_points(self.system.look(at_once=True), steps_of(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best and the last evaluation."""
        name = getattr(pl_module, "monitor", "valid/loss")
        if trainer.sanity_checking or name not in trainer.callback_metrics:
            return
        value, step = float(trainer.callback_metrics[name]), steps_of(trainer, pl_module)
        sign = -1 if getattr(pl_module, "monitor_mode", "min") == "max" else 1
        self.final, self.final_step = value, step
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best):
            self.best, self.best_step = value, step
        self.recorder.flush_if_old()

    def summary(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        """Return the run's figures for MLflow's table and runs.csv."""
        metric = getattr(task, "monitor", "valid/loss").replace("/", "_")
        steps = steps_of(trainer, task)
        found = {
            f"final/{metric}": self.final,
            f"best/{metric}": self.best,
            "final/step": self.final_step,
            "best/step": self.best_step,
            "wall_seconds": round(self.seconds, 3),
            "steps_per_second": steps / max(self.seconds, 1e-9),
            "peak_memory_mb": round(peak_memory_mb(trainer.strategy.root_device), 1),
            "steps": steps,
            "tokens": getattr(task, "tokens", None),
        }
        return {key: float(value) for key, value in found.items() if value is not None}


def name_of_data(data: Config) -> str:
    """Return what data are called: their corpus, else their class.

    >>> name_of_data({"class_path": "a.RetrievalData", "init_args": {"n_keys": 20}})
    'RetrievalData'
    """
    return str(data.get("init_args", {}).get("corpus") or data.get("class_path", "").rpartition(".")[2] or "data")


def steps_of(trainer: Trainer, task: LightningModule) -> int:
    """Return the optimiser steps done: as the task counts them, else as Lightning does."""
    return int(getattr(task, "steps", trainer.global_step))


def describe_task(trainer: Trainer, task: LightningModule) -> dict[str, str]:
    """Return the tags of a built task: its size, its axes, its data and where it runs."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    describe = getattr(task, "describe", dict)
    described: dict[str, Any] = describe()
    tags = {key: str(described[key]) for key in DESCRIBED if key in described}
    data_sha256 = getattr(trainer.datamodule, "data_sha256", "")  # type: ignore[attr-defined]
    return {
        **tags,
        "device": f"{device.type} ({name})",
        "precision": str(trainer.precision),
        "data_sha256": str(data_sha256() if callable(data_sha256) else data_sha256),
    }


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circumstances:
    """What all runs of a process share."""

    project: Project
    origin: Origin
    stop: Callable[[], float | None] = lambda: None
    checkpoint_seconds: float = CHECKPOINT_SECONDS


def train_run(run: Run, client: MlflowClient, shared: Circumstances) -> Outcome:
    """Train a run to its end, from its last checkpoint if it has one; whatever happens is an outcome, never raised."""
    try:
        folder = run_folder(shared.project, run.run_key)
        with locked_run(folder):
            return _train_locked(run, client, shared, folder)
    except RunBusy:
        return Outcome(run.run_key, "busy")
    except OSError as error:
        return Outcome(run.run_key, "failed", message=f"{sentence_of(error)}: the run cannot be recorded")


def _train_locked(run: Run, client: MlflowClient, shared: Circumstances, folder: Path) -> Outcome:
    recorder = RunRecorder(
        client,
        shared.project,
        run_key=run.run_key,
        experiment=run.experiment,
        name=run.name,
        tags=tags_of(run, shared.origin),
    )
    texts = {
        "config.yaml": yaml.safe_dump(run.config, sort_keys=False),
        "environment.json": shared.origin.environment,
        "git.diff": shared.origin.git_diff,
        **{f"imported/{Path(name).name}": _source_of(name) for name in shared.origin.imports},
    }
    if not recorder.start(params_of(run.config), {name: text for name, text in texts.items() if text}):
        return Outcome(run.run_key, "done before")
    started = time.monotonic()
    try:
        with quiet_lightning():
            diverged = fit(run, recorder, shared, folder)
    except (RunStopped, SIGTERMException):
        recorder.finish("KILLED")
        return Outcome(run.run_key, "stopped", time.monotonic() - started)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one failed run stops nothing
        message = first_cause(error)
        recorder.log_text("traceback.txt", traceback.format_exc())
        recorder.finish("FAILED", {"failed": message})
        return Outcome(run.run_key, "failed", time.monotonic() - started, message)
    recorder.finish("FINISHED", {"diverged": diverged or "", "failed": "", "complete": "true"})
    if recorder.undelivered:
        return Outcome(run.run_key, "failed", message="neither the store nor the journal could be written")
    remove_checkpoints(folder)
    return Outcome(run.run_key, "diverged" if diverged else "complete", time.monotonic() - started, diverged or "")


def fit(run: Run, recorder: RunRecorder, shared: Circumstances, folder: Path, ranks: Ranks | None = None) -> str | None:
    """Train and test, as one process of several where ``ranks`` says so; return why the run diverged, if it did."""
    ranks = ranks or Ranks()
    checkpoint = ExactCheckpoint(recorder, seconds=shared.checkpoint_seconds, stop=shared.stop)
    measurements = Measurements(recorder, run.config["data"])
    own = {"logger": TrackingLogger(recorder), "default_root_dir": str(folder), "plugins": [ranks], **SILENT_TRAINER}
    cli = RunCLI(run.config, own, [checkpoint, measurements, OwnSignals()])
    trainer, task = cli.trainer, cli.model
    former = newest_checkpoint(folder)
    with other_processes(run, trainer, ranks, Settings(shared.project, shared.origin)):
        trainer.fit(task, cli.datamodule, ckpt_path=former, weights_only=True)
        diverged = divergence_of(task, measurements)
        if diverged is None and is_overridden("test_step", task):
            trainer.test(task, cli.datamodule, verbose=False)
    if diverged is None and trainer.is_global_zero:
        write_final(task, run.config, folder)
        record_texts(task, trainer, recorder)
    recorder.log_points(measurements.summary(trainer, task), steps_of(trainer, task))
    return diverged


def write_final(task: LightningModule, config: Config, folder: Path) -> None:
    """Write what a task wants kept of a complete run to final.ckpt; a full disk costs the file, not the run."""
    content: dict[str, Any] = getattr(task, "final", dict)()
    if not content:
        return
    partial = folder / f"{FINAL}.tmp"
    try:
        torch.save({"config": config, **content}, partial)
        partial.replace(folder / FINAL)
    except (OSError, RuntimeError) as error:
        log.warning("no %s in %s: %s", FINAL, folder, sentence_of(error))
        partial.unlink(missing_ok=True)


def record_texts(task: LightningModule, trainer: Trainer, recorder: RunRecorder) -> None:
    """Record what task and callbacks of a complete run leave to be read, by file name, and in a tag which there are."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for part in (task, *callbacks):
        texts |= getattr(part, "texts", dict)()
    for name, text in texts.items():
        recorder.log_text(name, text)
    if texts:
        recorder.set_tags({"texts": ",".join(texts)})


def divergence_of(task: LightningModule, measurements: Measurements) -> str | None:
    """Return the task's own sentence on why it diverged, or that its last evaluation is no number."""
    said: str | None = getattr(task, "diverged", None)
    if said is None and measurements.final is not None and not math.isfinite(measurements.final):
        return f"{getattr(task, 'monitor', 'valid/loss')} is {measurements.final} at step {measurements.final_step}"
    return said


def _source_of(name: str) -> str:
    path = Path(name)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
