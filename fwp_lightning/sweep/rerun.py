"""Repeat one run from what is tracked of it and compare: then | now. Nothing that is tracked is touched."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Config, Project, Run, View, load_experiment, resolve_runs
from fwp_lightning.results import NO_CURVES, find_run, format_number, read_artifact, read_points, read_results
from fwp_lightning.results_csv import Row
from fwp_lightning.sweep.progress import console
from fwp_lightning.sweep.training import Circumstances, first_cause, fit, quiet_lightning
from fwp_lightning.sweep.workers import prepare_torch
from fwp_lightning.tracking import Origin, RunRecorder

if TYPE_CHECKING:
    from mlflow import MlflowClient

# split/metric -> step -> value as it stands in metrics.csv
Curves = dict[str, dict[int, str]]
Prepare = Callable[[list[Run]], list[Run]]


@dataclass(frozen=True)
class Record:
    """What is known of a run: how to repeat it, and what came out then."""

    run: Run
    run_key: str
    status: str
    curves: Curves
    source: str


class Transcript(RunRecorder):
    """Keeps in memory what a run logs; neither a store nor a journal hears of it."""

    def __init__(self, project: Project, run: Run) -> None:
        """Open a transcript with the folder of the run in ``project``."""
        super().__init__(None, project, run_key=run.run_key, experiment=run.experiment, name=run.name, tags={})  # type: ignore[arg-type]
        self.curves: Curves = {}

    def flush(self, *, insist: bool = False) -> None:
        """Move the points that wait into the curves."""
        for key, value, _, step in self._points:
            self.curves.setdefault(key, {})[step] = format_number(value)
        self._points, self._queue = [], []


# --- what is tracked -------------------------------------------------------------------------------------------------


def find_record(key: str, client: MlflowClient | None, project: Project, prepare: Prepare = list) -> Record:
    """Return what the store, or else results/*.csv, knows of the run with this key."""
    runs, metrics, _ = read_results(project)
    if client is not None and (stored := find_run(client, key)):
        points = read_points(client, [stored.run_id]).get(stored.run_id, [])
        curves = _curves((split, metric, step, format_number(value)) for split, metric, step, value in points)
        config = yaml.safe_load(read_artifact(client, stored.run_id, "config.yaml"))
        return Record(_run_from(stored.tags, config, project), key, stored.outcome, curves, "the MLflow store")
    for row in runs:
        if row["run_key"] == key:
            own = ((m["split"], m["metric"], int(m["step"]), m["value"]) for m in metrics if m["run_key"] == key)
            return Record(_resolved(row, project, prepare), key, row["status"], _curves(own), "results/*.csv")
    close = difflib.get_close_matches(key, [row["run_key"] for row in runs], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"no tracked run has the key {key!r}; {hint}results/runs.csv and the MLflow store have them.")


def _curves(points: Iterable[tuple[str, str, int, str]]) -> Curves:
    found: Curves = {}
    for split, metric, step, value in points:
        found.setdefault(f"{split}/{metric}", {})[step] = value
    return found


def _run_from(tags: Mapping[str, str], config: Config, project: Project) -> Run:
    """Return the run of a tracked configuration, which must be the one that its hash names."""
    run = Run(
        experiment=tags.get("experiment", ""),
        row=tags.get("row", ""),
        point=tags.get("point", ""),
        seed=int(tags.get("seed") or 0),
        profile=tags.get("profile", ""),
        protocol=tags.get("protocol", ""),
        version=int(tags.get("version") or 1),
        config=config,
    )
    stated = tags.get("config_sha256", "")
    for added in ({}, _added_options(run.experiment, project)):
        try:
            if (found := replace(run, added=added)).config_sha256 == stated:
                return found
        except (KeyError, TypeError):
            # a run older than the option
            continue
    raise UserError(
        f"{run.name}: its artifact config.yaml is not the configuration that config_sha256 {stated[:16]} names."
    )


def _added_options(name: str, project: Project) -> Config:
    try:
        experiment = load_experiment(name, project)
    except UserError:
        return {}
    return (experiment.parent if isinstance(experiment, View) else experiment).added


def _resolved(row: Row, project: Project, prepare: Prepare) -> Run:
    """Return the run that the experiment file gives for a line of runs.csv."""
    planned = resolve_runs(
        load_experiment(row["experiment"], project),
        profile=row["profile"],
        protocol=row["protocol"],
        seeds=[int(row["seed"])],
    )
    for run in prepare(planned):
        if run.run_key == row["run_key"]:
            return run
    commit = f"; check out commit {row['git_commit'][:10]} and try again" if row["git_commit"] else ""
    raise UserError(
        f"experiments/{row['experiment']}.yaml no longer gives the run {row['run_key']}, and the MLflow store does not "
        f"have its configuration{commit}."
    )


# --- again -----------------------------------------------------------------------------------------------------------


def rerun(
    key: str, client: MlflowClient | None, project: Project, prepare: Prepare = list, imports: Sequence[str] = ()
) -> int:
    """Train the run with this key once more in a folder that is thrown away; print then | now, return the exit code."""
    record = find_record(key, client, project, prepare)
    out = console()
    out.print(f"{record.run.name} ({key}), from {record.source}", markup=False, soft_wrap=True)
    prepare_torch()
    with tempfile.TemporaryDirectory(prefix="fwp-rerun-") as folder, quiet_lightning():
        scratch = Project(Path(folder))
        transcript = Transcript(scratch, record.run)
        try:
            diverged = fit(
                record.run, transcript, Circumstances(scratch, Origin(imports=tuple(imports))), transcript.folder
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a run that failed then may fail again
            status, said = "failed", f"failed: {first_cause(error)}"
        else:
            status, said = ("diverged", f"diverged: {diverged}") if diverged else ("complete", "")
        transcript.flush()
    if said:
        out.print(said, markup=False, soft_wrap=True)
    out.print(comparison(record, status, transcript.curves))
    out.print(verdict(record.curves, _shown(transcript.curves)), markup=False, soft_wrap=True)
    return 0 if status == record.status else 1


def comparison(record: Record, status: str, curves: Curves) -> Table:
    """Return a table with the last value of each metric, then and now."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("then", "now", "difference", "at step, then", "now"):
        table.add_column(name, justify="right")
    table.add_row("status", record.status, status, "", "", "")
    for name in sorted(record.curves.keys() | _shown(curves).keys()):
        then, now = _last(record.curves.get(name, {})), _last(curves.get(name, {}))
        difference = ""
        if then[1] and now[1]:
            difference = "0" if then[1] == now[1] else f"{float(now[1]) - float(then[1]):+.3g}"
        table.add_row(name, then[1] or "--", now[1] or "--", difference, then[0] or "--", now[0] or "--")
    return table


def verdict(then: Curves, now: Curves) -> str:
    """Return how many of the values then are the same now, and where the first other one stands."""
    values = sorted((step, name, value) for name, curve in then.items() for step, value in curve.items())
    other = [(step, name) for step, name, value in values if now.get(name, {}).get(step) != value]
    beyond = sum(len(curve.keys() - then.get(name, {}).keys()) for name, curve in now.items())
    more = f"; {beyond} more now" if beyond else ""
    if not other:
        return f"all {len(values)} values are the same{more}"
    step, name = other[0]
    same = f"{len(values) - len(other)} of {len(values)} values are the same"
    return f"{same}{more}; the first other one: {name} at step {step}"


def _shown(curves: Curves) -> Curves:
    # the summaries repeat values of the curves; figures without a split are times and sizes
    return {name: curve for name, curve in curves.items() if name.partition("/")[0] not in (name, *NO_CURVES)}


def _last(curve: Mapping[int, Any]) -> tuple[str, str]:
    step = max(curve, default=None)
    return ("", "") if step is None else (str(step), curve[step])
