"""The only writer to MLflow: opens the store, records runs, and keeps what the store refuses in a journal.

A record is a list of operations (points, tags, texts, a status). They are delivered in batches; while the store cannot
be reached they wait in ``runs/<run_key>/journal.jsonl`` and training goes on. The next start delivers them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from fwp_lightning import slurm
from fwp_lightning.errors import RunBusy, UserError, sentence_of
from fwp_lightning.experiment import Config, Project, Run
from fwp_lightning.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Operation = dict[str, Any]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

FLUSH_POINTS = 500
FLUSH_SECONDS = 5.0
RETRY_SECONDS = 30.0  # doubled with every further refusal
LONGEST_RETRY_SECONDS = 300.0
# what MLflow takes in one call
BATCH_POINTS, BATCH_PARAMS, BATCH_TAGS = 1000, 100, 100
LONGEST_PARAM, LONGEST_TAG = 500, 4900
# of a hash, in MLflow's lists; the tag data_sha256 has the whole
SHOWN_DIGEST = 12
LOCK_SECONDS = 120
# opens the runs of an experiment in MLflow's pages on training, not in those on language model applications
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
NOTE, LONGEST_NOTE = "mlflow.note.content", 4900


# --- the store -------------------------------------------------------------------------------------------------------


def open_store(project: Project) -> MlflowClient:
    """Return a client of the project's store, which is created if need be; an unusable store is one sentence."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # texts that an export reads are of a few lines
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # two lines for every run that ends, between those of a sweep; README says where the runs are
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # a server that is down must cost seconds, not minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import sqlalchemy.exc
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # MLflow sets the levels itself when it is imported
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    file = project.store_file
    if file is not None:
        _require_writable(file)
    is_new = file is not None and not file.exists()
    try:
        # two processes that create the tables of one database at once break it
        with _store_lock(file):
            client = MlflowClient(tracking_uri=project.store_uri)
            client.search_experiments(max_results=1)
    except Timeout as error:
        raise UserError(
            f"{error.lock_file} has been locked for {LOCK_SECONDS} s by another process; end it."
        ) from error
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        if is_new and file is not None:
            # half a store would be refused as damaged when there is room again
            for part in (file, Path(f"{file}-journal")):
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        raise UserError(store_sentence(project, error)) from error
    return client


@contextmanager
def _store_lock(file: Path | None) -> Iterator[None]:
    if file is None:
        yield
        return
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        yield


def _require_writable(file: Path) -> None:
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of the MLflow store cannot be made: {sentence_of(error)}.") from error
    if file.is_dir():
        raise UserError(f"{file} is a folder where the MLflow store must be; move it away or set MLFLOW_TRACKING_URI.")
    for path in (folder, file):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path} is read-only; make it writable or set MLFLOW_TRACKING_URI to another store.")


def require_folder(folder: Path) -> None:
    """Make a folder for output if need be; one that cannot be made or written is one sentence."""
    probe = folder / f".probe{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is a file where a folder must be; move it away.") from error
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UserError(f"{folder} cannot be written: {sentence_of(error)}; make room or change its rights.") from error


def is_of_store(error: BaseException) -> bool:
    """Return whether an error was raised by MLflow or by its database."""
    return type(error).__module__.split(".")[0] in ("mlflow", "sqlalchemy", "sqlite3")


def store_sentence(project: Project, error: Exception) -> str:
    """Return what is wrong with the store, and what to do, in one sentence."""
    text, address = str(error), redacted(project.store_uri)
    if "database schema" in text:
        file, version = project.store_file or address, metadata.version("mlflow")
        return (
            f"the MLflow store {file} has a schema that MLflow {version} does not read; install the MLflow version "
            f"that wrote it, or back it up and run: mlflow db upgrade {address}"
        )
    if "not a database" in text:
        return f"{project.store_file} is not a SQLite database; move it away or set MLFLOW_TRACKING_URI."
    if "malformed" in text and project.store_file:
        return f"{project.store_file} is damaged; put a copy back or move it away, then run the sweep again."
    if project.store_uri.startswith("http") and ("Max retries" in text or "API request" in text):
        return f"the MLflow server {address} does not answer; start it or unset MLFLOW_TRACKING_URI."
    if "disk is full" in text or "No space left" in text:
        return f"the disk of the MLflow store {address} is full; free some space."
    first = redacted(" ".join(text.split("\n")[0].split()))
    return f"the MLflow store {address} cannot be used: {first[:300]}"


def experiment_id(client: MlflowClient, project: Project, name: str) -> str:
    """Return the id of an MLflow experiment, which is created with an artifact location of its own if need be."""
    from mlflow.exceptions import MlflowException

    with _store_lock(project.store_file):
        found = client.get_experiment_by_name(name)
        if found is None:
            # a server knows itself where artifacts go; beside a database they lie in the project
            remote = project.store_uri.startswith("http")
            location = None if remote else (project.artifacts / name).absolute().as_uri()
            try:
                return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                # of processes on several machines that miss it at once, one creates it
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(name)
            assert found is not None
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id


def describe_experiment(client: MlflowClient, project: Project, name: str, note: str) -> None:
    """Set what MLflow shows above the runs of an experiment, in Markdown; a store that refuses costs the note alone."""
    try:
        home = experiment_id(client, project, name)
        for key, text in {**EXPERIMENT_TAGS, NOTE: redacted(note)[:LONGEST_NOTE]}.items():
            client.set_experiment_tag(home, key, text)
    except Exception as error:  # noqa: BLE001 - whatever the store raises, the results matter more
        log.warning("%s: the note of the experiment was refused (%s)", name, _short(error))


# --- where a run comes from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a command was started with: the same for every run of a sweep."""

    command: str = ""
    git_commit: str = ""
    git_dirty: str = ""
    git_diff: str = ""
    imports: tuple[str, ...] = ()
    import_hashes: tuple[str, ...] = ()
    environment: str = "{}"


def hashes_of(imports: Iterable[str]) -> tuple[str, ...]:
    """Return the SHA-256 of each imported file or module; what these import in turn is not followed."""
    return tuple(hashlib.sha256(_source_file(name).read_bytes()).hexdigest() for name in imports)


def _source_file(name: str) -> Path:
    path = Path(name)
    if path.suffix != ".py" and not path.exists():
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError) as error:
            raise UserError(f"--import {name}: {sentence_of(error)}") from error
        if spec is None or not spec.origin:
            raise UserError(f"--import {name}: there is no such file or module.")
        path = Path(spec.origin)
    if not path.is_file():
        raise UserError(f"--import {name}: there is no such file.")
    return path


def describe_origin(project: Project, arguments: Iterable[str], imports: Sequence[str] = ()) -> Origin:
    """Return the command as typed, the state of the source tree and the installed packages."""
    commit = _git(project.root, "rev-parse", "HEAD").strip()
    # results that runs write are no change of the source
    tracked = ("--", ".", ":!results", ":!reports/output")
    changed = _git(project.root, "status", "--porcelain", "--untracked-files=no", *tracked) if commit else ""
    fresh = _git(project.root, "status", "--porcelain", "--", "fwp_lightning", "experiments") if commit else ""
    return Origin(
        command=command_line(arguments),
        git_commit=commit,
        git_dirty=str(bool(changed.strip() or fresh.strip())).lower() if commit else "",
        git_diff=_git(project.root, "diff", "HEAD", *tracked)[:5_000_000] if commit else "",
        imports=tuple(imports),
        import_hashes=hashes_of(imports),
        environment=json.dumps(describe_environment(), indent=1, sort_keys=True),
    )


def command_line(arguments: Iterable[str]) -> str:
    """Return the command as typed, of absolute paths only the last part, and without secrets.

    >>> command_line(["sweep", "figure2", "--import", "/home/me/my_map.py"])
    'fwp sweep figure2 --import my_map.py'
    """
    shown = []
    for argument in arguments:
        head, equals, tail = argument.rpartition("=")
        shown.append(head + equals + (Path(tail).name if tail.startswith(("/", "~")) else tail))
    return shlex.join(["fwp", *map(redacted, shown)])


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, errors="replace", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def describe_environment() -> dict[str, Any]:
    """Return Python, the machine and every installed package with its version."""
    packages = {dist.name: dist.version for dist in metadata.distributions() if dist.name}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def this_process() -> str:
    """Return host, process id and start time of this process, which name it among all that ever ran, and its job."""
    import psutil

    named = f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"
    job = slurm.job_of_this_process()
    return f"{named}:{job}" if job else named


def is_alive(process: str) -> bool:
    """Return whether the process named by ``this_process`` runs; on another host if its job does, or if it has none."""
    import psutil

    host, pid, started, job = [*process.split(":", 3), "", "", ""][:4]
    if host != socket.gethostname() or not pid.isdigit():
        return slurm.is_running(job) if job else bool(pid)
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
    except (psutil.Error, ValueError):
        return False


# --- one run ---------------------------------------------------------------------------------------------------------


def run_folder(project: Project, run_key: str) -> Path:
    """Return the folder of a run's checkpoints and journal, which is created."""
    folder = project.runs / run_key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run; raise ``RunBusy`` if another process has it. The lock ends with its process."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunBusy(folder.name) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(project: Project, run_key: str) -> bool:
    """Return whether some process trains the run at this moment."""
    folder = project.runs / run_key
    if not folder.is_dir():
        return False
    try:
        with locked_run(folder):
            return False
    except RunBusy:
        return True


def tags_of(run: Run, origin: Origin) -> dict[str, str]:
    """Return the tags that name a run and say where it comes from."""
    return {
        "run_key": run.run_key,
        "experiment": run.experiment,
        "row": run.row,
        "point": run.point,
        "seed": str(run.seed),
        "profile": run.profile,
        "protocol": run.protocol,
        "version": str(run.version),
        "deviations": run.deviations,
        "config_sha256": run.config_sha256,
        "command": origin.command,
        # the column Source of MLflow's pages
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": origin.command,
        "git_commit": origin.git_commit,
        "git_dirty": origin.git_dirty,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lightning": metadata.version("lightning"),
        "fwp.version": _own_version(),
        "fwp.imports": ", ".join(Path(name).name for name in origin.imports),
        "fwp.imports_sha256": ", ".join(origin.import_hashes),
    }


def _own_version() -> str:
    try:
        return metadata.version("fwp-lightning")
    except metadata.PackageNotFoundError:
        return "0.0.0"


def params_of(config: Config) -> dict[str, str]:
    """Return a configuration as flat parameters: the model's without prefix, the others as ``data.`` and ``trainer.``.

    >>> params_of({"seed_everything": 1, "model": {"class_path": "a.B", "init_args": {"attention": {"rule": "sum"}}}})
    {'seed_everything': '1', 'model': 'a.B', 'attention.rule': 'sum'}
    """
    flat: dict[str, str] = {}
    for part, value in config.items():
        if isinstance(value, dict) and "class_path" in value:
            flat[part] = str(value["class_path"])
            value = value.get("init_args") or {}
        prefix = () if part == "model" and isinstance(value, dict) else (part,)
        _flatten(value, prefix, flat)
    return flat


def _flatten(value: Any, names: tuple[str, ...], flat: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _flatten(item, (*names, str(name)), flat)
    elif names:
        flat[".".join(names)] = value if isinstance(value, str) else json.dumps(value)


class RunRecorder:
    """Records one run, identified by its run key, in the one MLflow run that belongs to it.

    Nothing that goes wrong at the store raises: operations that could not be delivered wait in the run's journal.
    What is secret (see ``redaction``) goes into neither.
    """

    def __init__(
        self,
        client: MlflowClient,
        project: Project,
        *,
        run_key: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self.project = project
        self.run_key = run_key
        self.experiment = experiment
        self.name = name
        self.tags = {key: redacted(text) for key, text in tags.items()}
        self.run_id: str | None = None
        self.resumed = False
        self.folder = run_folder(project, run_key)
        self._clock = clock
        self._points: list[tuple[str, float, int, int]] = []
        self._queue: list[Operation] = []
        self._last_flush = clock()
        self._retry_at = 0.0
        self._patience = RETRY_SECONDS

    @property
    def journal(self) -> Path:
        """File of the operations that the store has not taken yet, one JSON object a line."""
        return self.folder / "journal.jsonl"

    def start(self, params: Mapping[str, str] | None = None, texts: Mapping[str, str] | None = None) -> bool:
        """Open the run, reopening the one of an interrupted training; return False if it is complete already.

        In the store, or in the journal of a process that ended while the store was away.
        """
        header = {"experiment": self.experiment, "name": self.name, "tags": self.tags}
        _write_atomically(self.folder / "run.json", json.dumps(header, indent=1))
        if self._ended_in_journal():
            self.flush(insist=True)
            return False
        try:
            if self._open() == "complete":
                return False
        except Exception as error:  # noqa: BLE001 - whatever the store raises, training goes on
            self._refused(error)
        self._queue.append({"op": "status", "status": "RUNNING"})
        self.set_tags({**self.tags, "fwp.process": this_process(), "complete": "false"})
        if params and not self.resumed:
            shown = {key: redacted(text)[:LONGEST_PARAM] for key, text in params.items()}
            self._queue.append({"op": "params", "params": shown})
        for name, text in (texts or {}).items():
            self.log_text(name, text)
        self.flush()
        return True

    def _ended_in_journal(self) -> bool:
        """Return whether the run is complete but for what the store has not taken: its checkpoints are gone then."""
        with contextlib.suppress(OSError):
            tags = [operation["tags"] for operation in read_journal(self.journal) if operation["op"] == "tags"]
            return next((found["complete"] for found in reversed(tags) if "complete" in found), "false") == "true"
        return False

    def _open(self) -> Literal["new", "resumed", "complete"]:
        home = experiment_id(self.client, self.project, self.experiment)
        query = f"tags.run_key = '{self.run_key}'"
        found = self.client.search_runs([home], query, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            self.run_id, self.resumed = found[0].info.run_id, True
            return "complete" if found[0].data.tags.get("complete") == "true" else "resumed"
        tags = {**self.tags, "fwp.process": this_process()}
        self.run_id = self.client.create_run(home, run_name=self.name, tags=tags).info.run_id
        return "new"

    def log_points(self, values: Mapping[str, float], step: int) -> None:
        """Keep one value per metric name; flush when 500 points wait or 5 s have passed."""
        now = int(time.time() * 1000)
        self._points.extend((key, float(value), now, step) for key, value in values.items())
        if len(self._points) >= FLUSH_POINTS:
            self.flush()
        else:
            self.flush_if_old()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags with the next delivery."""
        self._queue.append(
            {"op": "tags", "tags": {key: redacted(str(text))[:LONGEST_TAG] for key, text in tags.items()}}
        )

    def log_text(self, name: str, text: str) -> None:
        """Keep a text as an artifact with the next delivery."""
        self._queue.append({"op": "text", "name": name, "text": redacted(text)})

    def log_dataset(self, name: str, digest: str, source: str) -> None:
        """Name the data that the run trains on with the next delivery; ``source`` is a text that says where from."""
        dataset = {"name": name, "digest": digest[:SHOWN_DIGEST], "source": redacted(source)}
        self._queue.append({"op": "dataset", "dataset": dataset})

    def flush_if_old(self) -> None:
        """Deliver what waits if the last delivery is 5 s old."""
        if self._clock() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self, *, insist: bool = False) -> None:
        """Deliver everything that waits; ``insist`` also tries a store that refused a moment ago."""
        self._last_flush = self._clock()
        if self._points:
            self._queue.append({"op": "points", "points": self._points})
            self._points = []
        waiting = self.journal.exists()
        if not self._queue and not waiting:
            return
        if self._clock() < self._retry_at and not insist:
            self._write_journal()
            return
        try:
            if self.run_id is None:
                self._open()
            assert self.run_id is not None
            earlier = read_journal(self.journal) if waiting else []
            deliver(self.client, self.run_id, [*earlier, *self._queue])
        except Exception as error:  # noqa: BLE001 - whatever the store raises, training goes on
            self._refused(error)
            self._write_journal()
            return
        self._queue = []
        self._patience = RETRY_SECONDS
        self.journal.unlink(missing_ok=True)

    def secure(self) -> bool:
        """Put everything that waits into the store or the journal; return whether nothing is left in memory."""
        self.flush()
        return not self.undelivered

    def finish(self, status: Status, tags: Mapping[str, str] | None = None) -> None:
        """Deliver everything, then the tags (``complete`` among them) last, and close the run."""
        self.flush(insist=True)
        self._queue.append({"op": "status", "status": status, "at": int(time.time() * 1000)})
        self.set_tags(tags or {})
        # a store that refused a moment ago is not waited for a second time
        self.flush(insist=not self.journal.exists())

    def _refused(self, error: Exception) -> None:
        log.warning("%s: the MLflow store refused (%s); points wait in the run's journal", self.name, _short(error))
        self._retry_at = self._clock() + self._patience
        self._patience = min(2 * self._patience, LONGEST_RETRY_SECONDS)

    def _write_journal(self) -> None:
        """Append the queue to the journal; where even that fails it stays in memory and is tried again."""
        try:
            with self.journal.open("a", encoding="utf-8") as file:
                # a start on a fresh line keeps the journal readable behind a line that a full disk cut short
                file.write("".join(f"\n{json.dumps(operation)}" for operation in self._queue))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.warning("%s: the journal cannot be written (%s)", self.name, sentence_of(error))
        else:
            self._queue = []

    @property
    def undelivered(self) -> int:
        """Number of operations that neither the store nor the journal has."""
        return len(self._queue) + bool(self._points)


def _short(error: Exception) -> str:
    return redacted(" ".join(str(error).split("\n")[0].split()))[:200] or type(error).__name__


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_journal(path: Path) -> list[Operation]:
    """Return the operations in a journal; a line that was cut short is left out."""
    operations = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            operation = json.loads(line) if line else None
        except ValueError:
            log.warning("%s: a line that was cut short is left out", path)
            continue
        if operation:
            operations.append(operation)
    return operations


def deliver(client: MlflowClient, run_id: str, operations: Iterable[Operation]) -> None:
    """Apply operations to an MLflow run, points first, tags (``complete``) last; raise whatever the store raises."""
    from mlflow.entities import Metric, Param, RunTag

    points: list[Metric] = []
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    status: Status | None = None
    ended: int | None = None
    for operation in operations:
        match operation["op"]:
            case "points":
                points.extend(Metric(key, value, at, step) for key, value, at, step in operation["points"])
            case "params":
                params |= operation["params"]
            case "tags":
                tags |= operation["tags"]
            case "text" | "dataset":
                _record(client, run_id, operation)
            case "status":
                # the run ended then, however late the store hears of it
                status, ended = operation["status"], operation.get("at")
    if status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    for batch in _batches(points, BATCH_POINTS):
        client.log_batch(run_id, metrics=batch)
    for batch in _batches([Param(key, value) for key, value in params.items()], BATCH_PARAMS):
        client.log_batch(run_id, params=batch)
    if status not in (None, "RUNNING"):
        client.set_terminated(run_id, status, end_time=ended)
    for batch in _batches([RunTag(key, value) for key, value in tags.items()], BATCH_TAGS):
        client.log_batch(run_id, tags=batch)


def _record(client: MlflowClient, run_id: str, operation: Operation) -> None:
    """Record a text or a dataset, which is there once however often."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    if operation["op"] == "text":
        client.log_text(run_id, operation["text"], operation["name"])
        return
    dataset = Dataset(**operation["dataset"], source_type="fwp_lightning")
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as error:
        # the store looks for a dataset and then adds it: of two runs that name a new one at once, one is refused
        if error.error_code != "BAD_REQUEST":
            raise
        client.log_inputs(run_id, inputs)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- after an unclean end --------------------------------------------------------------------------------------------


def deliver_journals(client: MlflowClient, project: Project) -> int:
    """Deliver the journals that earlier processes left behind; return how many could be."""
    delivered = 0
    for journal in sorted(project.runs.glob("*/journal.jsonl")):
        try:
            header = json.loads((journal.parent / "run.json").read_text(encoding="utf-8"))
            with locked_run(journal.parent):
                recorder = RunRecorder(client, project, run_key=journal.parent.name, **header)
                recorder.flush(insist=True)
        except RunBusy:
            continue
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s cannot be delivered: %s", journal, sentence_of(error))
            continue
        delivered += not journal.exists()
    return delivered


def close_dead_runs(client: MlflowClient, project: Project) -> int:
    """Mark runs KILLED that are RUNNING in the store but whose process is gone; return how many."""
    closed = 0
    homes = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(homes, "attributes.status = 'RUNNING' and tags.run_key != ''", max_results=10_000):
        process = run.data.tags.get("fwp.process", "")
        if process and not is_alive(process):
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed
