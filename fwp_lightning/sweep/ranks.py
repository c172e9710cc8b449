"""Runs on several devices of one machine, by Lightning's DDP: the sweep starts the processes beyond the first itself.

Lightning would start them by running the command anew, which here is a whole sweep. The first process holds the lock of
the run, records it and decides when to save and to stop; the others train with it and record nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fwp_lightning.errors import RunStopped
from fwp_lightning.experiment import Project, Run
from fwp_lightning.sweep.workers import Settings, import_file, prepare_torch
from fwp_lightning.tracking import RunRecorder

if TYPE_CHECKING:
    from fwp_lightning.experiment import Config

# the others have nothing left to do but to end once the first process has
END_SECONDS = 30.0
READY = "ready"
NOT_FOR_OTHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Ranks(LightningEnvironment):
    """Says which process of a run this one is; none of them is started by Lightning."""

    def __init__(self, rank: int = 0, port: int | None = None, connection: Connection | None = None) -> None:
        """Be process ``rank``; the first one listens on ``port``, one that is free if none is given."""
        super().__init__()
        self._rank, self._port, self.connection = rank, port, connection

    @property
    def creates_processes_externally(self) -> bool:
        """Return true: Lightning starts no process."""
        return True

    @property
    def main_address(self) -> str:
        """Return this machine's address for itself."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Return the port of the first process."""
        if self._port is None:
            self._port = find_free_network_port()
        return self._port

    def local_rank(self) -> int:
        """Return which process this is."""
        return self._rank

    def node_rank(self) -> int:
        """Return 0: there is one machine."""
        return 0


class SilentRecorder(RunRecorder):
    """Records nothing: the first process of the run does."""

    def start(self, params: Mapping[str, str] | None = None, texts: Mapping[str, str] | None = None) -> bool:
        """Return true: whether there is something to train was decided by the first process."""
        return True

    def flush(self, *, insist: bool = False) -> None:
        """Forget everything that waits."""
        self._points, self._queue = [], []


def silent_recorder(project: Project, run_key: str, experiment: str, name: str) -> SilentRecorder:
    """Return a recorder for a process of a run beyond the first."""
    return SilentRecorder(None, project, run_key=run_key, experiment=experiment, name=name, tags={})  # type: ignore[arg-type]


def refuse_devices(config: Config, trainer: Trainer) -> None:
    """Raise ``ValueError`` for processes that a sweep cannot start."""
    if trainer.num_nodes > 1:
        raise ValueError(f"trainer.num_nodes={trainer.num_nodes}: a run of a sweep trains on one machine; set 1.")
    strategy = config["trainer"].get("strategy", "auto")
    if trainer.world_size > 1 and any(word in str(strategy) for word in ("spawn", "fork", "notebook")):
        raise ValueError(f"trainer.strategy={strategy}: a sweep starts the processes of a run itself; set ddp.")


@contextlib.contextmanager
def other_processes(run: Run, trainer: Trainer, ranks: Ranks, settings: Settings) -> Iterator[None]:
    """Have the processes of a run beyond the first train until the block ends; in these it says that they are ready.

    What went wrong in one of them is raised here: the first process knows no more than that it is gone.
    """
    if trainer.world_size == 1:
        yield
        return
    if ranks.connection is not None:
        ranks.connection.send(READY)
        yield
        return
    context = multiprocessing.get_context("spawn")
    others: list[tuple[Any, Connection]] = []
    patience = 0.0
    try:
        with _blocked_signals():
            for rank in range(1, trainer.world_size):
                ours, theirs = context.Pipe()
                arguments = (theirs, run, settings, rank, ranks.main_port)
                process = context.Process(target=follow, args=arguments, daemon=True)
                process.start()
                theirs.close()
                others.append((process, ours))
        for _, connection in others:
            # one that fails before the processes meet would be waited for without end
            _await_ready(connection)
        yield
        patience = END_SECONDS
    except (RunStopped, SIGTERMException):
        raise
    except Exception as error:
        said = [text for _, connection in others if (text := _last_words(connection))]
        if said:
            raise RuntimeError("\n".join(said)) from error
        raise
    finally:
        _end(others, patience)


def _end(others: list[tuple[Any, Connection]], patience: float) -> None:
    for process, connection in others:
        process.join(timeout=patience)
        process.kill()
        process.join()
        connection.close()
    # the next run of this process makes a group of its own
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Let processes be born deaf to the signals that are meant for the first one, which hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_OTHERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_ready(connection: Connection) -> None:
    try:
        said = connection.recv()
    except (EOFError, OSError):
        said = "a process of the run died at its start"
    if said != READY:
        raise RuntimeError(said)


def _last_words(connection: Connection) -> str:
    """Return what a process said of its end, empty if nothing; one that lives is waited for a moment."""
    with contextlib.suppress(EOFError, OSError):
        if connection.poll(timeout=2):
            return str(connection.recv())
    return ""


def follow(connection: Connection, run: Run, settings: Settings, rank: int, port: int) -> None:
    """Train as process ``rank`` of a run; the first process decides when to stop."""
    for number in NOT_FOR_OTHERS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    from fwp_lightning.sweep.training import Circumstances, first_cause, fit, quiet_lightning

    try:
        prepare_torch()
        for name in settings.origin.imports:
            import_file(name)
        recorder = silent_recorder(settings.project, run.run_key, run.experiment, run.name)
        with quiet_lightning():
            ranks = Ranks(rank, port, connection)
            fit(run, recorder, Circumstances(settings.project, settings.origin), recorder.folder, ranks)
    except RunStopped:
        return
    except (Exception, SystemExit) as error:
        connection.send(f"process {rank} of the run: {first_cause(error)}\n\n{traceback.format_exc()}")
        raise SystemExit(1) from error


def _end_with_parent(connection: Connection) -> None:
    """End this process as soon as the first one is gone: an operation that waits for it would not notice."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
