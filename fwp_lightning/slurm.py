"""SLURM as the suite sees it: what a job may ask for, which run a job trains, and which jobs are in the queue.

Nothing here needs a cluster: where there is no ``squeue``, nothing is known of the queue.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, processes_of

# states in which the processes of a job are there
RUNNING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")
QUEUE_SECONDS = 2.0
ASK_SECONDS = 20


def _option(sbatch: str, pattern: str, example: str, text: str) -> Any:
    return field(default="", metadata={"sbatch": sbatch, "pattern": pattern, "example": example, "help": text})


# no white space and no quotes: an option is one line of a job script
WORD = r"[^\s'\"`$\\#]+"


@dataclass(frozen=True)
class Resources:
    """What each job asks SLURM for; what is empty is left to the cluster's defaults."""

    partition: str = _option("partition", WORD, "gpu", "partition of the jobs")
    account: str = _option("account", WORD, "lab", "account that is charged")
    qos: str = _option("qos", WORD, "long", "quality of service")
    constraint: str = _option("constraint", WORD, "a100", "feature that a node must have")
    time: str = _option(
        "time", r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", "8:00:00", "limit of a job, in SLURM's forms"
    )
    mem: str = _option("mem", r"\d+[KMGT]?", "16G", "memory of a job")
    cpus: str = _option("cpus-per-task", r"[1-9]\d*", "4", "processor cores of a job (as many as it has devices)")
    gpus: str = _option(
        "gpus-per-node", r"(\w+:)?[1-9]\d*", "1", "GPUs of a job (trainer.devices where trainer.accelerator is gpu)"
    )
    grace: str = field(
        default="120",
        metadata={
            "pattern": r"[1-9]\d*",
            "example": "120",
            "help": "seconds before the time limit at which a run saves and queues again (default: 120)",
        },
    )
    others: tuple[tuple[str, str], ...] = ()
    """Further options of sbatch, by their own names"""

    def for_job(self, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of sbatch for a run with these settings of the trainer."""
        asked = {
            part.metadata["sbatch"]: getattr(self, part.name) for part in fields(self) if "sbatch" in part.metadata
        }
        n = processes_of(trainer)
        asked["cpus-per-task"] = asked["cpus-per-task"] or str(n)
        if trainer.get("accelerator") in ("gpu", "cuda"):
            asked["gpus-per-node"] = asked["gpus-per-node"] or str(n)
        # to the processes of the job, not to the script around them
        signal = {"signal": f"USR2@{self.grace}", "requeue": True}
        return {key: value for key, value in asked.items() if value} | signal | dict(self.others)


def resource_options() -> Iterable[tuple[str, str, str]]:
    """Return name, example and help of every option that is a text."""
    return [(part.name, part.metadata["example"], part.metadata["help"]) for part in fields(Resources) if part.metadata]


def read_resources(given: Mapping[str, str | None], others: Iterable[str] = ()) -> Resources:
    """Return checked resources; a value that SLURM would not read is one sentence."""
    for part in fields(Resources):
        value = given.get(part.name)
        if value is not None and not re.fullmatch(part.metadata["pattern"], value):
            raise UserError(f"--slurm-{part.name} {value!r} is not understood; as in {part.metadata['example']}.")
    pairs = []
    for text in others:
        name, equals, value = text.partition("=")
        if not (equals and re.fullmatch(r"[a-z][a-z-]*", name) and re.fullmatch(WORD, value)):
            raise UserError(f"--slurm-option {text!r} is not understood; as in exclude=node7.")
        pairs.append((name, value))
    return Resources(**{name: value for name, value in given.items() if value is not None}, others=tuple(pairs))


# --- the queue -------------------------------------------------------------------------------------------------------


class Queue:
    """The user's jobs that wait or run, asked for at most every two seconds."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._asked_at = -math.inf
        self._states: dict[str, str] | None = None

    def states(self) -> dict[str, str] | None:
        """Return the state of every job by its id, as in ``12_3``; None if SLURM does not answer."""
        if time.monotonic() - self._asked_at >= QUEUE_SECONDS:
            self._states = self._ask()
            self._asked_at = time.monotonic()
        return self._states

    def forget(self) -> None:
        """Ask again at once: a job was submitted that the last answer cannot name."""
        self._asked_at = -math.inf

    @staticmethod
    def _ask() -> dict[str, str] | None:
        command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = [line.split() for line in done.stdout.splitlines()]
        return {line[0]: line[1] for line in lines if len(line) == 2} if done.returncode == 0 else None


QUEUE = Queue()


def job_of_this_process() -> str:
    """Return the id of the SLURM job that this process belongs to, empty if to none."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def is_running(job: str) -> bool:
    """Return whether the processes of a job are there; also true where SLURM does not answer."""
    states = QUEUE.states()
    return states is None or states.get(job) in RUNNING_STATES


# --- which job trains which run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job as its run's folder names it."""

    id: str
    log: str
    said: str = ""
    """Why it ended without a result, if it knew"""


def job_file(project: Project, run_key: str) -> Path:
    """Return the file that names the job of a run."""
    return project.runs / run_key / "job.json"


def write_job(project: Project, run_key: str, job: Job) -> None:
    """Note which job trains a run; complete or absent."""
    path = job_file(project, run_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(vars(job)), encoding="utf-8")
    partial.replace(path)


def read_job(project: Project, run_key: str) -> Job | None:
    """Return the last job of a run, None if it never had one."""
    try:
        return Job(**json.loads(job_file(project, run_key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def jobs_in_queue(project: Project) -> dict[str, tuple[Job, str]]:
    """Return the jobs that wait or run by the keys of their runs, each with "queued" or "running"."""
    keys = [path.parent.name for path in project.runs.glob("*/job.json")]
    states = QUEUE.states() if keys else None
    found = {}
    for key in keys if states else ():
        job = read_job(project, key)
        if job is not None and states is not None and job.id in states:
            found[key] = (job, "running" if states[job.id] in RUNNING_STATES else "queued")
    return found
