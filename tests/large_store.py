"""A store of many complete runs, put into the database in bulk: through the client it would take minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from sqlalchemy import insert

from fwp_lightning.experiment import Run
from fwp_lightning.tracking import Origin, experiment_id, params_of, tags_of, this_process

MEASURED = ("final/valid_loss", "best/valid_loss", "final/step", "best/step", "wall_seconds", "steps_per_second")


def fill_store(client: Any, project: Any, runs: Sequence[Run], n_points: int, metric: str = "valid/loss") -> None:
    """Record every run as complete, with a curve of ``n_points``, its parameters, tags and summary."""
    homes = {name: int(experiment_id(client, project, name)) for name in {run.experiment for run in runs}}
    origin = Origin(command="fwp sweep everything --jobs 2", git_commit="0123456789abcdef" * 2 + "01234567")
    now = int(time.time() * 1000)
    tables: dict[Any, list[dict[str, Any]]] = {
        kind: [] for kind in (SqlRun, SqlTag, SqlParam, SqlMetric, SqlLatestMetric)
    }
    for number, run in enumerate(runs):
        run_id = {"run_uuid": f"{number:032x}"}
        tables[SqlRun].append(
            run_id
            | {
                "name": run.name,
                "experiment_id": homes[run.experiment],
                "status": "FINISHED",
                "lifecycle_stage": "active",
            }
            | {"start_time": now, "end_time": now, "artifact_uri": "", "user_id": ""}
        )
        tags = tags_of(run, origin) | {"complete": "true", "fwp.process": this_process(), "device": "cpu (a CPU)"}
        tables[SqlTag] += [run_id | {"key": key, "value": text} for key, text in tags.items()]
        tables[SqlParam] += [run_id | {"key": key, "value": text} for key, text in params_of(run.config).items()]
        values = dict.fromkeys((*MEASURED, "peak_memory_mb", "steps", "tokens"), 60.0) | {metric: 1 / n_points}
        last = [run_id | {"key": key, "value": value, "step": 100 * n_points} for key, value in values.items()]
        tables[SqlLatestMetric] += [line | {"timestamp": now, "is_nan": False} for line in last]
        curve = [run_id | {"key": metric, "value": 1 / step, "step": 100 * step} for step in range(1, n_points + 1)]
        tables[SqlMetric] += [line | {"timestamp": now, "is_nan": False} for line in (*curve, *last[:-1])]
    with client._tracking_client.store.ManagedSessionMaker() as session:
        for kind, lines in tables.items():
            session.execute(insert(kind), lines)
