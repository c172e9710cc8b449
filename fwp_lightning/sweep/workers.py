"""Worker processes: each trains one run after the other, so that imports and parsers are paid for once.

Parent and worker talk through a pipe of their own. Nothing is shared between workers, so that one that is killed cannot
hold up the others; a worker whose parent is gone sees the end of its pipe and stops.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import CHECKPOINT_SECONDS, Project, Run
from fwp_lightning.tracking import Origin

# one thread a worker: several small models at once are faster than one on several threads
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# glibc hands large tensors back to the system at every free and faults their pages in again at every step:
# keeping them made steps of 80 MB tensors 1.6 times faster
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
WORKER_ENVIRONMENT = ONE_THREAD | KEEP_MEMORY


@dataclass(frozen=True)
class Settings:
    """What a worker is started with."""

    project: Project
    origin: Origin
    checkpoint_seconds: float = CHECKPOINT_SECONDS


class Refusal(NamedTuple):
    """Why a row cannot be built."""

    place: str
    """The experiment and its row, or the file of the base configuration whose mistake it is."""
    reason: str


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    run_key: str
    status: Literal["complete", "diverged", "failed", "stopped", "busy", "done before"]
    seconds: float = 0.0
    message: str = ""


def import_file(name: str) -> None:
    """Import a user's file or module, so that what it registers is known."""
    path = Path(name)
    if path.suffix != ".py" and not path.exists():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(f"--import {name}: {sentence_of(error)}") from error
        return
    if not path.is_file():
        raise UserError(f"--import {name}: there is no such file.")
    if path.stem in sys.modules:
        known = getattr(sys.modules[path.stem], "__file__", None)
        if known and Path(known).resolve() == path.resolve():
            return
        raise UserError(f"--import {name}: a module {path.stem!r} is loaded already; rename the file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[path.stem]
        raise UserError(f"--import {name}: {sentence_of(error)}") from error


# --- in the worker ---------------------------------------------------------------------------------------------------


class Mailbox:
    """Receives orders in a thread, so that "stop" arrives while a run trains."""

    def __init__(self, connection: Connection) -> None:
        self._orders: queue.SimpleQueue[tuple[str, Run | None]] = queue.SimpleQueue()
        self._stopped_at: float | None = None
        threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        while True:
            try:
                kind, run = connection.recv()
            except (EOFError, OSError):
                kind, run = "stop", None
            if kind == "stop":
                self.stop()
                return
            self._orders.put((kind, run))

    def stop(self, *_: Any) -> None:
        """Ask the run that trains to end, and the worker after it."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        self._orders.put(("stop", None))

    def asked_to_stop(self) -> float | None:
        """Return for how many seconds the worker has been asked to stop, None if it has not been."""
        return None if self._stopped_at is None else time.monotonic() - self._stopped_at

    def orders(self) -> Iterator[tuple[str, Run]]:
        """Yield what to do until the worker is asked to stop."""
        while True:
            kind, run = self._orders.get()
            if kind == "stop" or run is None or self._stopped_at is not None:
                return
            yield kind, run


def work(connection: Connection, settings: Settings) -> None:
    """Check and train the runs that the parent sends, until it says stop or is gone."""
    # Ctrl-C reaches the whole group of processes; the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mailbox = Mailbox(connection)
    signal.signal(signal.SIGTERM, mailbox.stop)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with contextlib.suppress(BrokenPipeError):
        try:
            _serve(connection, settings, mailbox)
        except UserError as error:
            connection.send(("broken", str(error)))


def prepare_torch() -> None:
    """Set what every process that trains runs has in common."""
    import torch

    torch.set_num_threads(1)
    # subnormal numbers cost a hundred times the time of others, and no result depends on them
    torch.set_flush_denormal(True)


def _serve(connection: Connection, settings: Settings, mailbox: Mailbox) -> None:
    from fwp_lightning.sweep.training import Circumstances, check_run, train_run
    from fwp_lightning.tracking import open_store

    prepare_torch()
    for name in settings.origin.imports:
        import_file(name)
    shared = Circumstances(
        settings.project,
        settings.origin,
        stop=mailbox.asked_to_stop,
        checkpoint_seconds=settings.checkpoint_seconds,
    )
    client = open_store(settings.project)
    connection.send(("ready", None))
    for kind, run in mailbox.orders():
        answer = check_run(run) if kind == "check" else train_run(run, client, shared)
        connection.send(("checked" if kind == "check" else "ended", answer))


# --- in the parent ---------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker process as its parent sees it."""

    process: Any
    connection: Connection
    ready: bool = False
    run: Run | None = None
    since: float = field(default_factory=time.monotonic)


class Pool:
    """A number of workers; one that dies can be replaced."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.workers: list[Worker] = []
        self._context = multiprocessing.get_context("spawn")

    def start(self, number: int) -> None:
        """Start further workers."""
        before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
        os.environ.update(WORKER_ENVIRONMENT)
        try:
            for _ in range(number):
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=work, args=(theirs, self.settings))
                process.start()
                theirs.close()
                self.workers.append(Worker(process, ours))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def idle(self) -> list[Worker]:
        """Return the workers that wait for an order."""
        return [worker for worker in self.workers if worker.ready and worker.run is None]

    def busy(self) -> list[Worker]:
        """Return the workers that have a run."""
        return [worker for worker in self.workers if worker.run is not None]

    def give(self, worker: Worker, kind: str, run: Run) -> None:
        """Send an order to an idle worker."""
        worker.run, worker.since = run, time.monotonic()
        # a worker that has just died is noticed with the next messages
        with contextlib.suppress(OSError):
            worker.connection.send((kind, run))

    def messages(self, seconds: float) -> list[tuple[Worker, str, Any]]:
        """Wait for messages; a worker that died sends ("died", exit code)."""
        by_connection = {worker.connection: worker for worker in self.workers}
        found: list[tuple[Worker, str, Any]] = []
        for connection in wait(list(by_connection), timeout=seconds):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                kind, content = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(timeout=5)
                self.workers.remove(worker)
                kind, content = "died", worker.process.exitcode
            worker.ready = worker.ready or kind == "ready"
            found.append((worker, kind, content))
        return found

    def stop(self) -> None:
        """Ask every worker to end; the runs that train are saved first."""
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.connection.send(("stop", None))

    def close(self, seconds: float) -> None:
        """End every worker, by force those that do not within ``seconds``."""
        self.stop()
        until = time.monotonic() + seconds
        for worker in self.workers:
            worker.process.join(timeout=max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self.workers = []
