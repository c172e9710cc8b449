"""A sweep on a SLURM cluster: each run is a task of a job array, submitted through submitit and watched to its end.

A job trains as a worker process does. Before its time limit SLURM warns it (SIGUSR2): it saves, ends, queues itself
again and goes on in the same MLflow run. SIGTERM, by which SLURM preempts, requeues and cancels, makes it save and end;
whether it is queued again is then SLURM's own decision. The command that submitted the jobs may end at any time.

submitit hands a run to its job as a pickle in ``runs/slurm``, which that job alone reads; it is removed behind it.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fwp_lightning import slurm
from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Project, Run
from fwp_lightning.results import StoredRun, counted, read_store
from fwp_lightning.results_csv import DONE
from fwp_lightning.slurm import Job, Resources, job_of_this_process, jobs_in_queue, read_job, write_job
from fwp_lightning.sweep import Plan, Sweep, check_rows_here
from fwp_lightning.sweep.progress import Display
from fwp_lightning.sweep.workers import WORKER_ENVIRONMENT, Outcome, Settings, import_file, prepare_torch
from fwp_lightning.tracking import deliver_journals, experiment_id, is_of_store, open_store, store_sentence

if TYPE_CHECKING:
    from mlflow import MlflowClient

WATCH_SECONDS = 3.0
# SLURM's own default limit is 1001 tasks an array
LARGEST_ARRAY = 1000


# --- in the job ------------------------------------------------------------------------------------------------------


class Signals:
    """What SLURM has asked this job for."""

    def __init__(self, grace: float) -> None:
        """Listen; a warning comes ``grace`` seconds before the time limit."""
        self.warned = False
        self._until: float | None = None
        self._grace = grace
        signal.signal(signal.SIGUSR2, self._warn)
        signal.signal(signal.SIGTERM, self._end)

    def _warn(self, *_: Any) -> None:
        self.warned = True
        # half of the time is left for the end of an epoch, half for saving
        self._ask(self._grace / 2)

    def _end(self, *_: Any) -> None:
        # SLURM kills within 30 s, unless it is set up otherwise
        self._ask(0.0)

    def _ask(self, later: float) -> None:
        until = time.monotonic() + later
        self._until = until if self._until is None else min(self._until, until)

    def asked_to_stop(self) -> float | None:
        """Return for how many seconds the run should have ended, below 0 while there is time; None if it may go on."""
        return None if self._until is None else time.monotonic() - self._until


def train_in_job(run: Run, settings: Settings, grace: float) -> str:
    """Train a run in this job, from its last checkpoint if it has one; return how it ended."""
    asked = Signals(grace)
    try:
        return _train(run, settings, asked)
    except Exception as error:
        say(settings.project, run, sentence_of(error))
        raise


def _train(run: Run, settings: Settings, asked: Signals) -> str:
    from fwp_lightning.sweep.training import Circumstances, newest_checkpoint, train_run
    from fwp_lightning.tracking import run_folder

    started = time.time()
    prepare_torch()
    for name in settings.origin.imports:
        import_file(name)
    shared = Circumstances(settings.project, settings.origin, asked.asked_to_stop, settings.checkpoint_seconds)
    outcome = train_run(run, open_store(settings.project), shared)
    print(f"{outcome.status}: {run.name} {outcome.message}", flush=True)
    if outcome.status == "stopped" and asked.warned:
        saved = newest_checkpoint(run_folder(settings.project, run.run_key))
        if saved is None or saved.stat().st_mtime < started:
            raise UserError("no checkpoint was reached within the time limit of the job; raise --slurm-time")
        subprocess.run(["scontrol", "requeue", job_of_this_process()], check=True, timeout=60)
    return outcome.status


def say(project: Project, run: Run, text: str) -> None:
    """Note beside the run why its job ended without a result."""
    if job := read_job(project, run.run_key):
        write_job(project, run.run_key, Job(job.id, job.log, text))


# --- where jobs are submitted ----------------------------------------------------------------------------------------


def load_submitit() -> Any:
    """Return submitit; where it is not installed or there is no SLURM that is one sentence."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--executor slurm needs submitit, which is not installed; run: pip install submitit") from error
    if slurm.QUEUE.states() is None:
        raise UserError("--executor slurm: squeue does not answer; run this where jobs of your cluster are submitted.")
    return submitit


class SlurmSweep(Sweep):
    """Submits pending runs as job arrays and watches the queue until none of them is left in it."""

    def __init__(self, plan: Plan, settings: Settings, resources: Resources, at_once: int | None) -> None:
        """Have at most ``at_once`` tasks of an array run at the same time, all if None."""
        super().__init__(plan)
        self.settings, self.resources, self.at_once = settings, resources, at_once
        self.project = settings.project
        self._submitit = load_submitit()
        self._jobs: dict[str, Job] = {}
        self._store_is_away = False

    def stop(self, number: int, _: Any = None) -> None:
        """End the watch; the jobs stay."""
        self.signal = number

    def farewell(self) -> str:
        """Return what becomes of the jobs when the watch ends early."""
        ids = ",".join(sorted({job.id.partition("_")[0] for job in self._jobs.values()}))
        ending = f" or end with: scancel {ids}" if ids else ""
        return f"stopped watching; the jobs go on (fwp status; the same command watches again){ending}"

    def outcomes(self) -> dict[str, str]:
        """Return the outcome of every run of this sweep, those in the queue among them."""
        in_queue = {key: state for key, (_, state) in jobs_in_queue(self.project).items() if key in self._by_key}
        return {**in_queue, **super().outcomes()}

    def train(self, display: Display) -> None:
        """Check one run of every row, submit what is not in the queue yet, and wait."""
        from fwp_lightning.sweep.cost import on_this_machine

        self._display = display
        try:
            # what a run on a node will be can be checked where there is no GPU
            check_rows_here(map(on_this_machine, self.plan.pending), self.settings.origin.imports)
            client = open_store(self.project)
            for name in {run.experiment for run in self.plan.pending}:
                experiment_id(client, self.project, name)
            self._submit()
            while self.signal is None and self._jobs:
                self._look(client)
                self._rest()
        finally:
            display.close()

    def _submit(self) -> None:
        known = jobs_in_queue(self.project)
        self._jobs = {run.run_key: known[run.run_key][0] for run in self.plan.pending if run.run_key in known}
        to_submit = [run for run in self.plan.pending if run.run_key not in known]
        # what asks for the same is one array
        options = {run.run_key: self.resources.for_job(run.config["trainer"]) for run in to_submit}
        by_options = sorted(to_submit, key=lambda run: repr(options[run.run_key]))
        arrays = [list(runs) for _, runs in groupby(by_options, key=lambda run: repr(options[run.run_key]))]
        for runs in arrays:
            for start in range(0, len(runs), LARGEST_ARRAY):
                if self.signal is None:
                    self._submit_array(runs[start : start + LARGEST_ARRAY], options[runs[0].run_key])
        assert self._display is not None
        ids = ", ".join(sorted({job.id.partition("_")[0] for job in self._jobs.values()}))
        self._display.line(
            f"submitted {len(to_submit)}, in the queue already {len(self._jobs) - len(to_submit)}: {ids}"
        )

    def _submit_array(self, runs: Sequence[Run], options: dict[str, Any]) -> None:
        folder = self.project.runs / "slurm"
        try:
            executor = self._submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(
                job_name=f"fwp-{runs[0].experiment}",
                # submitit's own defaults (five minutes) are not wanted
                time=None,
                wckey=None,
                array_parallelism=self.at_once or len(runs),
                setup=[f"export {name}={value}" for name, value in WORKER_ENVIRONMENT.items()],
                additional_parameters=options,
            )
            constant = ([self.settings] * len(runs), [float(self.resources.grace)] * len(runs))
            submitted = executor.map_array(train_in_job, runs, *constant)
        except (RuntimeError, self._submitit.core.utils.FailedJobError) as error:
            raise UserError(f"SLURM took no job: {_last_line(error)}") from error
        slurm.QUEUE.forget()
        for run, job in zip(runs, submitted, strict=True):
            self._jobs[run.run_key] = Job(job.job_id, str(job.paths.stderr))
            write_job(self.project, run.run_key, self._jobs[run.run_key])

    def _rest(self) -> None:
        """Wait, but not longer than until a signal."""
        until = time.monotonic() + WATCH_SECONDS
        while self.signal is None and self._jobs and time.monotonic() < until:
            time.sleep(0.1)

    def _look(self, client: MlflowClient) -> None:
        """Take note of the runs whose job has left the queue, and show how far the sweep is."""
        states = slurm.QUEUE.states()
        # where squeue does not answer nothing has changed
        gone = [key for key, job in self._jobs.items() if states is not None and job.id not in states]
        if gone:
            self._take_in(gone, client)
        running = [key for key, job in self._jobs.items() if states and states.get(job.id) == "RUNNING"]
        left = [self._by_key[key] for key in self._jobs]
        self._show([self._by_key[key] for key in running], left, max(1, len(running)), 0.0)

    def _take_in(self, gone: Sequence[str], client: MlflowClient) -> None:
        try:
            # journals are not offered, run by run, to a store that is away
            client.search_experiments(max_results=1)
            deliver_journals(client, self.project)
            stored = {run.run_key: run for run in read_store(client)}
        except Exception as error:
            if not is_of_store(error):
                raise
            self._await_store(error, len(gone))
            return
        self._store_is_away = False
        for key in gone:
            job = self._jobs.pop(key)
            self._note(self._by_key[key], self._outcome(key, job, stored.get(key)))
            for pickle in (self.project.runs / "slurm").glob(f"{job.id}_*.pkl"):
                pickle.unlink(missing_ok=True)

    def _await_store(self, error: Exception, n_gone: int) -> None:
        """Say once that the store is away; it is asked again with every look, and training needs none."""
        if not self._store_is_away:
            self._store_is_away = True
            assert self._display is not None
            why = store_sentence(self.project, error).rstrip(".")
            self._display.line(f"{why}; it is asked again how {counted(n_gone, 'job')} ended")

    def _outcome(self, key: str, job: Job, found: StoredRun | None) -> Outcome:
        """Return how a run ended whose job is no longer in the queue."""
        seconds = found.metrics.get("wall_seconds", 0.0) if found else 0.0
        said = read_job(self.project, key)
        if found and found.outcome in DONE:
            return Outcome(key, "diverged" if found.outcome == "diverged" else "complete", seconds)
        if found and found.outcome == "failed":
            return Outcome(key, "failed", seconds, found.tags.get("failed", ""))
        if found and found.outcome == "running":
            return Outcome(key, "busy", seconds)
        if found and found.status == "KILLED" and not (said and said.said):
            return Outcome(key, "stopped", seconds, f"its job {job.id} was ended from outside")
        why = said.said if said and said.said else "it died"
        return Outcome(key, "failed", seconds, f"job {job.id}: {why}; its output is in {job.log}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # behind sbatch's own words there may be a traceback of submitit's
    return next((line for line in reversed(lines) if "error" in line.lower()), sentence_of(error))
