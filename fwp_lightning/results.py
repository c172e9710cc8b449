"""The only reader of MLflow: tracked runs become tidy CSV files, checked before they are written."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Project, Run, View, load_experiment, natural_key, resolve_runs
from fwp_lightning.results_csv import (
    DONE,
    METRIC_COLUMNS,
    PROBE_COLUMNS,
    RUN_COLUMNS,
    STATUSES,
    TRANSLATION_COLUMNS,
    Row,
    read_metrics,
    read_probes,
    read_runs,
    read_translations,
)
from fwp_lightning.slurm import jobs_in_queue
from fwp_lightning.tracking import is_alive, require_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

Point = tuple[str, str, int, float]  # split, metric, step, value

# columns that hold a metric of the MLflow run, the others are its tags
MEASURED_COLUMNS = ("wall_seconds", "steps", "tokens", "peak_memory_mb")
PLACE = ("experiment", "row", "point", "seed", "profile", "protocol")
# derived from the curves, for MLflow's table, and the machine's load, for its page of system metrics
NO_CURVES = ("final", "best", "system")


@dataclass(frozen=True)
class StoredRun:
    """A tracked run as it stands in the store."""

    run_id: str
    run_key: str
    status: str
    started: int
    ended: int
    tags: dict[str, str]
    metrics: dict[str, float]

    @property
    def place(self) -> tuple[str, ...]:
        """Return what the run is a run of: experiment, row, point, seed, profile, protocol."""
        return tuple(self.tags.get(key, "") for key in PLACE)

    @property
    def outcome(self) -> str:
        """Return complete, diverged, failed, running or interrupted."""
        if self.tags.get("complete") == "true":
            return "diverged" if self.tags.get("diverged") else "complete"
        if self.status == "RUNNING":
            return "running" if is_alive(self.tags.get("fwp.process", "")) else "interrupted"
        return "failed" if self.status == "FAILED" else "interrupted"


# --- reading the store -----------------------------------------------------------------------------------------------


def read_store(client: MlflowClient) -> list[StoredRun]:
    """Return every run of the store that the suite recorded, the oldest first, one per run key."""
    homes = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[StoredRun] = []
    token: str | None = None
    while homes:
        page = client.search_runs(homes, "tags.run_key != ''", max_results=1000, page_token=token)
        found.extend(_stored(run) for run in page)
        token = page.token
        if not token:
            break
    by_key: dict[str, StoredRun] = {}
    for run in sorted(found, key=lambda run: (run.outcome in DONE, run.started)):
        by_key[run.run_key] = run
    return sorted(by_key.values(), key=lambda run: run.started)


def _stored(run: MlflowRun) -> StoredRun:
    return StoredRun(
        run_id=run.info.run_id,
        run_key=run.data.tags["run_key"],
        status=run.info.status,
        started=run.info.start_time or 0,
        ended=run.info.end_time or 0,
        tags=run.data.tags,
        metrics=run.data.metrics,
    )


def outcomes(client: MlflowClient) -> dict[str, str]:
    """Return the outcome of every run key in the store."""
    return {run.run_key: run.outcome for run in read_store(client)}


def find_run(client: MlflowClient, run_key: str) -> StoredRun | None:
    """Return the tracked run with a key, None if there is none."""
    return next((run for run in read_store(client) if run.run_key == run_key), None)


def read_artifact(client: MlflowClient, run_id: str, name: str) -> str:
    """Return a text that was recorded with a run; one that is gone is one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except (OSError, MlflowException) as error:
        raise UserError(f"the artifact {name} of the run {run_id} cannot be read: {sentence_of(error)}") from error


def read_points(client: MlflowClient, run_ids: Sequence[str]) -> dict[str, list[Point]]:
    """Return the curves of runs, one value per split, metric and step: of repeated points the last recorded."""
    latest: dict[str, dict[tuple[str, str, int], tuple[int, float]]] = defaultdict(dict)
    for run_id, key, step, at, value in _history(client, run_ids):
        split, slash, metric = key.partition("/")
        if not slash or split in NO_CURVES:
            continue
        place = (split, metric, step)
        if place not in latest[run_id] or latest[run_id][place][0] <= at:
            latest[run_id][place] = (at, value)
    return {
        run_id: sorted((*place, value) for place, (_, value) in points.items()) for run_id, points in latest.items()
    }


def _history(client: MlflowClient, run_ids: Sequence[str]) -> Iterator[tuple[str, str, int, int, float]]:
    """Return (run_id, key, step, timestamp, value): from the database in bulk, from a server run by run."""
    store = client._tracking_client.store
    if not hasattr(store, "ManagedSessionMaker"):
        yield from _history_from_server(client, run_ids)
        return
    from mlflow.store.tracking.dbmodels.models import SqlMetric

    columns = (
        SqlMetric.run_uuid,
        SqlMetric.key,
        SqlMetric.step,
        SqlMetric.timestamp,
        SqlMetric.value,
        SqlMetric.is_nan,
    )
    with store.ManagedSessionMaker() as session:
        for start in range(0, len(run_ids), 500):
            chosen: Any = SqlMetric.run_uuid.in_(run_ids[start : start + 500])
            for run_id, key, step, at, value, is_nan in session.query(*columns).filter(chosen):
                yield run_id, key, step, at, math.nan if is_nan else value


def _history_from_server(client: MlflowClient, run_ids: Sequence[str]) -> Iterator[tuple[str, str, int, int, float]]:
    for run_id in run_ids:
        for key in client.get_run(run_id).data.metrics:
            for metric in client.get_metric_history(run_id, key):
                yield run_id, key, metric.step, metric.timestamp, metric.value


def read_text(client: MlflowClient, run: StoredRun, name: str) -> str | None:
    """Return a text that a run left to be read; None if it left none of this name, or somebody removed it."""
    if name not in run.tags.get("texts", "").split(","):
        return None
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run.run_id, name, folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            log.warning("%s of run %s cannot be read and is left out: %s", name, run.run_key, sentence_of(error))
            return None


# --- export ----------------------------------------------------------------------------------------------------------


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class Export:
    """What an export did."""

    exported: int
    total: int
    superseded: int
    changed: bool

    def sentence(self) -> str:
        """Return the export in one line."""
        replaced = f", {self.superseded} of a former configuration replaced" if self.superseded else ""
        change = "" if self.changed else "; nothing changed"
        return f"exported {counted(self.exported, 'run')} to results/ ({self.total} in runs.csv{replaced}){change}"


@dataclass(frozen=True)
class TextTable:
    """A table that single runs leave as a text beside their metrics, and that has a file in results/ if any did."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Path], list[Row]]
    order: Callable[[Row], tuple[Any, ...]]


def _translation_order(row: Row) -> tuple[str, str, int]:
    return row["run_key"], row["split"], int(row["line"])


def _probe_order(row: Row) -> tuple[Any, ...]:
    return row["run_key"], int(row["layer"]), int(row["head"]), row["statistic"], float(row["x"]), int(row["y"])


TEXT_TABLES = (
    TextTable("translations.csv", TRANSLATION_COLUMNS, read_translations, _translation_order),
    TextTable("probes.csv", PROBE_COLUMNS, read_probes, _probe_order),
)


def csv_files(project: Project) -> tuple[Path, Path]:
    """Return the files of runs and of metrics."""
    return project.results / "runs.csv", project.results / "metrics.csv"


def read_results(project: Project) -> tuple[list[Row], list[Row], dict[str, list[Row]]]:
    """Return the checked rows of the CSV files: of runs, of metrics, and of the tables of ``TEXT_TABLES`` by name."""
    runs_file, metrics_file = csv_files(project)
    tables = {table.name: table.read(project.results / table.name) for table in TEXT_TABLES}
    return read_runs(runs_file), read_metrics(metrics_file), tables


def export(client: MlflowClient, project: Project) -> Export:
    """Merge the store's ended runs into results/runs.csv, metrics.csv and the tables that some runs left.

    Rows of runs that the store does not hold stay. A run replaces the rows of its own key, and those of an older run
    of the same experiment, row, point, seed, profile and protocol: a changed configuration is measured anew.
    """
    runs_file, metrics_file = csv_files(project)
    old_runs, old_metrics, old_tables = read_results(project)
    ended = _newest(run for run in read_store(client) if run.outcome in STATUSES and run.tags.get("profile"))
    rows = [_run_row(run) for run in ended]
    keys, places = {run.run_key for run in ended}, {run.place for run in ended}
    others = [row for row in old_runs if row["run_key"] not in keys]
    kept = [row for row in others if tuple(row[column] for column in PLACE) not in places]
    runs = sorted([*kept, *rows], key=_run_order)

    kept_keys = {row["run_key"] for row in kept}
    points = read_points(client, [run.run_id for run in ended])
    metrics = [row for row in old_metrics if row["run_key"] in kept_keys]
    for run in ended:
        metrics.extend(_metric_rows(run.run_key, points.get(run.run_id, [])))
    metrics.sort(key=_metric_order)

    # a reader between the writes finds points of unknown runs, never runs without points
    changed = [_write_csv(metrics_file, METRIC_COLUMNS, metrics)]
    for table in TEXT_TABLES:
        old = old_tables[table.name]
        new = [row for run in ended for row in _rows_of_text(client, run, table)]
        # those of a run whose artifacts were removed are still its own
        still = kept_keys | (keys - {row["run_key"] for row in new})
        rows_of_table = sorted([*(row for row in old if row["run_key"] in still), *new], key=table.order)
        if rows_of_table or old:
            changed.append(_write_csv(project.results / table.name, table.columns, rows_of_table))
    changed.append(_write_csv(runs_file, RUN_COLUMNS, runs))
    return Export(len(rows), len(runs), len(others) - len(kept), any(changed))


def _newest(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """Return one run per place: the newest that ended well, else the newest."""
    by_place: dict[tuple[str, ...], StoredRun] = {}
    for run in sorted(runs, key=lambda run: (run.outcome != "failed", run.started)):
        by_place[run.place] = run
    return list(by_place.values())


def _run_row(run: StoredRun) -> Row:
    row = {column: run.tags.get(column, "") for column in RUN_COLUMNS}
    row |= {column: format_number(run.metrics[column]) for column in MEASURED_COLUMNS if column in run.metrics}
    return row | {"run_key": run.run_key, "status": run.outcome, "finished": format_time(run.ended)}


def format_time(milliseconds: int) -> str:
    """Return a time as it stands in a CSV file, in UTC; empty if it is not known.

    >>> format_time(1767225600999), format_time(0)
    ('2026-01-01T00:00:00Z', '')
    """
    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else ""


def _metric_rows(run_key: str, points: Iterable[Point]) -> Iterator[Row]:
    for split, metric, step, value in points:
        yield {"run_key": run_key, "split": split, "metric": metric, "step": str(step), "value": format_number(value)}


def _rows_of_text(client: MlflowClient, run: StoredRun, table: TextTable) -> Iterator[Row]:
    text = read_text(client, run, table.name)
    for row in csv.DictReader(io.StringIO(text or "")):
        yield {"run_key": run.run_key, **{column: row[column] for column in table.columns[1:]}}


def format_number(value: float) -> str:
    """Return a number as it stands in a CSV file, nine significant digits.

    >>> format_number(100.0), format_number(0.1 + 0.2), format_number(float("nan"))
    ('100', '0.3', 'nan')
    """
    # MLflow stores infinities as the largest double
    if abs(value) > 1.7e308:
        return "inf" if value > 0 else "-inf"
    # counts keep all their digits
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.9g}"


def _run_order(row: Row) -> tuple[Any, ...]:
    place = (row["experiment"], row["profile"], row["protocol"], row["row"], row["point"], row["seed"], row["run_key"])
    return tuple(natural_key(text) for text in place)


def _metric_order(row: Row) -> tuple[str, str, str, int]:
    return row["run_key"], row["split"], row["metric"], int(row["step"])


# --- the CSV files ---------------------------------------------------------------------------------------------------


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> bool:
    """Write rows through a temporary file; return whether the content is new."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = buffer.getvalue().encode()
    require_folder(path.parent)
    if path.exists() and path.read_bytes() == content:
        return False
    partial = ""
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    except OSError as error:
        if partial:
            Path(partial).unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}; it is as before.") from error
    return True


# --- what is done, and what it took ----------------------------------------------------------------------------------


@dataclass
class RowStatus:
    """How far one row of an experiment is under a profile and a protocol."""

    experiment: str
    profile: str
    protocol: str
    row: str
    total: int = 0
    complete: int = 0
    diverged: int = 0
    failed: int = 0
    running: int = 0
    interrupted: int = 0
    queued: int = 0

    @property
    def done(self) -> int:
        """Return the number of runs that ended, diverged ones among them."""
        return self.complete + self.diverged


def count_rows(runs: Iterable[Run], known: dict[str, str]) -> list[RowStatus]:
    """Return one line per row of the planned ``runs``, counting what ``known`` says of their keys."""
    lines: dict[tuple[str, ...], RowStatus] = {}
    for run in runs:
        place = (run.experiment, run.profile, run.protocol, run.row)
        line = lines.setdefault(place, RowStatus(*place))
        line.total += 1
        if outcome := known.get(run.run_key):
            setattr(line, outcome, getattr(line, outcome) + 1)
    return list(lines.values())


def note_on(rows: Sequence[RowStatus]) -> str:
    """Return in Markdown how far an experiment is, for the head of its page in MLflow."""
    name = rows[0].experiment
    lines = [
        f"| {' | '.join([row.row.replace('|', '/'), row.profile, row.protocol])} "
        f"| {row.complete}/{row.total} | {row.diverged} |"
        for row in rows
    ]
    return "\n".join(
        [
            f"Runs of `experiments/{name}.yaml`; `fwp report {name}` draws them into `reports/output/index.html`.",
            "",
            "| row | profile | protocol | complete | diverged |",
            "| --- | --- | --- | ---: | ---: |",
            *lines,
        ]
    )


def measured_seconds(client: MlflowClient | None, project: Project) -> list[Row]:
    """Return the ended runs of the store and of results/runs.csv that say how long they took."""
    rows = read_runs(csv_files(project)[0])
    if client is not None:
        rows += [_run_row(run) for run in read_store(client) if run.outcome in DONE]
    return [row for row in rows if row["wall_seconds"]]


class Estimate:
    """Seconds that a run will take, from runs of the same experiment and profile that were measured."""

    def __init__(self, measured: Iterable[Row]) -> None:
        self._by_row: dict[tuple[str, ...], list[tuple[str, float]]] = defaultdict(list)
        for row in measured:
            place = (row["experiment"], row["profile"], row["row"])
            self._by_row[place].append((row["point"], float(row["wall_seconds"])))

    def add(self, run: Run, seconds: float) -> None:
        """Take a run into account that has just ended."""
        self._by_row[run.experiment, run.profile, run.row].append((run.point, seconds))

    def seconds(self, run: Run) -> float | None:
        """Return the mean of the nearest measured grid point, of the run's own row if it has any; None if unknown."""
        measured = self._by_row.get((run.experiment, run.profile, run.row)) or [
            pair
            for (experiment, profile, _), pairs in self._by_row.items()
            if (experiment, profile) == (run.experiment, run.profile)
            for pair in pairs
        ]
        if not measured:
            return None
        nearest = min(_distance(point, run.point) for point, _ in measured)
        times = [seconds for point, seconds in measured if _distance(point, run.point) == nearest]
        return sum(times) / len(times)


def _distance(one: str, other: str) -> float:
    """Return how far two grid points lie apart: the sum of the log ratios of their numbers."""
    far = 0.0
    for (kind, left), (_, right) in zip(natural_key(one), natural_key(other), strict=False):
        if kind == 0 and isinstance(left, float) and isinstance(right, float):
            far += abs(math.log((left + 1e-9) / (right + 1e-9)))
        else:
            far += float(left != right)
    return far


def project_status(
    client: MlflowClient,
    project: Project,
    names: Iterable[str],
    *,
    complain: Callable[[UserError], None] | None = None,
    prepare: Callable[[list[Run]], list[Run]] = list,
) -> list[RowStatus]:
    """Return how far the rows of experiments are, for every profile and protocol with a run that is tracked or queued.

    An experiment that cannot be read is told to ``complain`` and left out. ``prepare`` is applied to planned runs.
    """
    stored = read_store(client)
    known = {run.run_key: run.outcome for run in stored}
    in_queue = {key: state for key, (_, state) in jobs_in_queue(project).items() if known.get(key) not in DONE}
    known |= in_queue
    tracked = {(run.tags.get("experiment"), run.tags.get("profile"), run.tags.get("protocol")) for run in stored}
    lines = []
    for name in names:
        try:
            experiment = load_experiment(name, project)
        except UserError as error:
            if complain is None:
                raise
            complain(error)
            continue
        if isinstance(experiment, View):
            continue
        for profile in experiment.profiles:
            for protocol in experiment.protocols:
                if (name, profile, protocol) not in tracked and not in_queue:
                    continue
                runs = prepare(resolve_runs(experiment, profile=profile, protocol=protocol))
                if (name, profile, protocol) in tracked or any(run.run_key in in_queue for run in runs):
                    lines += count_rows(runs, known)
    return lines
