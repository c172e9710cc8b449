"""Sweeps: the runs of experiments that are not complete yet, trained by worker processes, exported at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import CHECKPOINT_SECONDS, Project, Run, processes_of
from fwp_lightning.results import (
    Estimate,
    RowStatus,
    count_rows,
    counted,
    export,
    measured_seconds,
    note_on,
    outcomes,
    project_status,
    read_results,
)
from fwp_lightning.results_csv import DONE
from fwp_lightning.slurm import Resources
from fwp_lightning.sweep.progress import Display, console, display_for, duration, rows_table
from fwp_lightning.sweep.workers import Outcome, Pool, Refusal, Settings, Worker, import_file
from fwp_lightning.tracking import (
    Origin,
    close_dead_runs,
    deliver_journals,
    describe_experiment,
    is_locked,
    open_store,
    require_folder,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.console import Console

# a run may take this long to end its epoch and save when the sweep is stopped
PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.25
ELSEWHERE_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """What a sweep has before it: the runs asked for and those of them that are still to be trained."""

    runs: list[Run]
    pending: list[Run]
    known: dict[str, str]
    estimate: Estimate

    @property
    def done(self) -> int:
        """Number of runs that are complete already."""
        return len(self.runs) - len(self.pending)

    def sentence(self) -> str:
        """Return how many runs there are, and how many of them are done."""
        return f"{counted(len(self.runs), 'run')}, {self.done} complete, {len(self.pending)} to train"

    def seconds(self, jobs: int) -> float | None:
        """Return how long the pending runs will take, None if no run like them was ever measured."""
        return seconds_for(self.pending, self.estimate, jobs)


def plan_sweep(runs: Iterable[Run], client: MlflowClient | None, project: Project) -> Plan:
    """Return which of ``runs`` are pending, the longest first."""
    unique = list({run.run_key: run for run in runs}.values())
    known = outcomes(client) if client is not None else {}
    estimate = Estimate(measured_seconds(client, project))
    pending = [run for run in unique if known.get(run.run_key) not in DONE]
    pending.sort(key=lambda run: _expected_cost(run, estimate), reverse=True)
    return Plan(unique, pending, known, estimate)


def _expected_cost(run: Run, estimate: Estimate) -> tuple[float, float]:
    """Return measured seconds, and for runs nobody measured the size of their grid point."""
    size = 1.0
    for part in run.point.split(", "):
        with contextlib.suppress(ValueError):
            size *= float(part.rpartition("=")[2])
    return estimate.seconds(run) or 0.0, size


def seconds_for(runs: Sequence[Run], estimate: Estimate, jobs: int) -> float | None:
    """Return the time of ``runs`` on ``jobs`` workers; those nobody measured count as the mean of the others."""
    measured = [seconds for run in runs if (seconds := estimate.seconds(run)) is not None]
    if not measured:
        return None
    whole = sum(measured) * len(runs) / len(measured)
    return max(whole / max(1, min(jobs, len(runs))), max(measured))


def default_jobs(runs: Iterable[Run]) -> int:
    """Return as many workers as fill the cores with runs on the CPU, one as soon as a run may take an accelerator."""
    trainers = [run.config["trainer"] for run in runs]
    if any(trainer.get("accelerator") != "cpu" for trainer in trainers):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max([processes_of(trainer) for trainer in trainers], default=1))


def rows_to_check(pending: Iterable[Run]) -> list[Run]:
    """Return one run of every row: the last pending one, which is its smallest."""
    return list({(run.experiment, run.row): run for run in pending}.values())


def refuse_rows(refusals: Iterable[Refusal]) -> None:
    """Raise ``UserError`` if there are rows that cannot be built, one reason a line."""
    # a mistake in the base configuration is one, however many rows have it, and so is what a machine lacks
    places: dict[str, list[str]] = {}
    for refusal in sorted(set(refusals)):
        places.setdefault(refusal.reason, []).append(refusal.place)
    n_rows = sum(map(len, places.values()))
    told = [f"{first}{f' and {len(more)} more' if more else ''}: {reason}" for reason, (first, *more) in places.items()]
    if len(told) > 1:
        raise UserError("\n  ".join([f"{n_rows} rows cannot be built:", *told]))
    if told:
        raise UserError(told[0])


def check_rows_here(pending: Iterable[Run], imports: Iterable[str]) -> None:
    """Import the user's files and build every row in this process, as the workers of a sweep do."""
    from fwp_lightning.sweep.training import check_run

    for name in imports:
        import_file(name)
    refuse_rows([refusal for run in rows_to_check(pending) if (refusal := check_run(run))])


def show_plan(runs: Iterable[Run], project: Project, jobs: int | None, imports: Iterable[str] = ()) -> None:
    """Check the rows of a sweep; print its runs, how many are complete and how long the others will take."""
    from fwp_lightning.sweep.cost import on_this_machine

    read_results(project)
    # a dry run makes no store
    absent = project.store_file is not None and not project.store_file.exists()
    plan = plan_sweep(runs, None if absent else open_store(project), project)
    jobs = jobs or default_jobs(plan.runs)
    # what a run on another machine will be can be checked here
    check_rows_here(map(on_this_machine, plan.pending), imports)
    out = console()
    for run in plan.runs:
        seconds = plan.estimate.seconds(run)
        state = plan.known.get(run.run_key, "new")
        expected = f", about {duration(seconds)}" if seconds is not None and state not in DONE else ""
        out.print(f"{run.run_key}  {run.name}  [{state}{expected}]", markup=False, soft_wrap=True)
    left = plan.seconds(jobs)
    cost = f"about {duration(left)} with {counted(jobs, 'job')}" if left is not None else "no such run was measured yet"
    cost = cost if plan.pending else "nothing to train"
    out.print(f"{plan.sentence()}: {cost}", markup=False)


def show_costs(runs: Sequence[Run], imports: Iterable[str] = ()) -> None:
    """Time an update of every row on this machine and print what its runs will take; neither data nor GPU is needed."""
    from fwp_lightning.sweep.cost import measure, name_of, total_of

    for name in imports:
        import_file(name)
    out = console()
    costs = []
    for (experiment, _), run in {(run.experiment, name_of(run)): run for run in runs}.items():
        cost = measure(run)
        if cost is None:
            out.print(f"{experiment}: an update of this task is not measured without its data", markup=False)
            return
        costs.append(cost)
        out.print(cost.sentence(), markup=False, soft_wrap=True)
    out.print(total_of(costs, runs), markup=False, soft_wrap=True)


def run_sweep(
    runs: Iterable[Run],
    project: Project,
    origin: Origin,
    *,
    jobs: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    resources: Resources | None = None,
) -> int:
    """Train every run that is not complete, export the results and return the exit code.

    By worker processes, or by SLURM jobs where ``resources`` says what these ask for.

    0: all runs ended (diverged ones among them); 1: some failed or were stopped from outside; 130 or 143: the sweep
    was stopped by Ctrl-C or SIGTERM.
    """
    # better now than after hours
    for folder in (project.runs, project.results):
        require_folder(folder)
    read_results(project)
    client = open_store(project)
    out = console()
    if journals := deliver_journals(client, project):
        out.print(f"delivered the journals of {counted(journals, 'run')}")
    close_dead_runs(client, project)
    plan = plan_sweep(runs, client, project)
    sweep = _sweep_for(plan, Settings(project, origin, checkpoint_seconds), jobs, resources)
    if plan.pending:
        display = display_for(out)
        how = f" with {counted(sweep.jobs, 'job')}" if isinstance(sweep, LocalSweep) else " by SLURM"
        display.line(f"{plan.sentence()}{how}")
        with _signals_stop(sweep):
            sweep.train(display)
        deliver_journals(client, project)
        close_dead_runs(client, project)
    rows = count_rows(plan.runs, {**plan.known, **sweep.outcomes()})
    out.print(rows_table(rows))
    for name in dict.fromkeys(row.experiment for row in rows):
        describe_experiment(client, project, name, note_on(_all_rows(client, project, name, rows)))
    _show_unfinished(sweep, out)
    out.print(export(client, project).sentence())
    if sweep.signal is not None:
        out.print(sweep.farewell(), soft_wrap=True)
        return 128 + sweep.signal
    return 1 if sweep.ended_as("failed") or sweep.ended_as("stopped") else 0


def _show_unfinished(sweep: Sweep, out: Console) -> None:
    for run, outcome in sweep.ended_as("failed"):
        out.print(f"failed: {run.name}: {outcome.message}", markup=False, soft_wrap=True)
    if sweep.ended_as("failed"):
        out.print("tracebacks: artifact traceback.txt of each failed run")
    # where the sweep itself was stopped that is its farewell
    if sweep.signal is None and (stopped := sweep.ended_as("stopped")):
        was, it = ("was", "it") if len(stopped) == 1 else ("were", "them")
        out.print(f"{counted(len(stopped), 'run')} {was} stopped; the next sweep goes on with {it}", markup=False)


def _sweep_for(plan: Plan, settings: Settings, jobs: int | None, resources: Resources | None) -> Sweep:
    if resources is not None:
        from fwp_lightning.sweep.jobs import SlurmSweep

        return SlurmSweep(plan, settings, resources, jobs)
    jobs = max(1, min(jobs or default_jobs(plan.runs), len(plan.pending) or 1))
    return LocalSweep(plan, settings.project, Pool(settings), jobs)


def _all_rows(client: MlflowClient, project: Project, name: str, rows: Iterable[RowStatus]) -> list[RowStatus]:
    """Return how far an experiment is in every profile and protocol that was tracked, not in those of a sweep alone."""
    known = {(row.profile, row.protocol, row.row): row for row in project_status(client, project, [name])}
    for row in rows:
        place = (row.profile, row.protocol, row.row)
        # runs of the user's own parts or texts are known to the sweep alone
        if row.experiment == name and (place not in known or row.complete > known[place].complete):
            known[place] = row
    return list(known.values())


@contextlib.contextmanager
def _signals_stop(sweep: Sweep) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the sweep in order; the second one ends the workers at once."""
    names = (signal.SIGINT, signal.SIGTERM)
    former = {name: signal.signal(name, sweep.stop) for name in names}
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)


class Sweep:
    """Pending runs, how those ended that have, and what is shown of it; who trains them is a subclass's matter."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.signal: int | None = None
        self.ended: dict[str, Outcome] = {}
        self._by_key = {run.run_key: run for run in plan.pending}
        self._display: Display | None = None
        self._estimated_for: tuple[object, ...] = ()
        self._estimated: float | None = None

    def stop(self, number: int, _: Any = None) -> None:
        """Stop after a signal."""
        raise NotImplementedError

    def train(self, display: Display) -> None:
        """Train all runs that are pending."""
        raise NotImplementedError

    def farewell(self) -> str:
        """Return what becomes of the runs when a signal has stopped the sweep."""
        raise NotImplementedError

    def outcomes(self) -> dict[str, str]:
        """Return the outcome of every run of this sweep, in the words of the store."""
        words = {"stopped": "interrupted", "done before": "complete", "busy": "running"}
        return {key: words.get(outcome.status, outcome.status) for key, outcome in self.ended.items()}

    def ended_as(self, status: str) -> list[tuple[Run, Outcome]]:
        """Return the runs that ended in one way, such as failed."""
        return [(self._by_key[key], outcome) for key, outcome in self.ended.items() if outcome.status == status]

    def _note(self, run: Run, outcome: Outcome) -> None:
        self.ended[run.run_key] = outcome
        if outcome.status in DONE:
            self.plan.estimate.add(run, outcome.seconds)
        assert self._display is not None
        said = f": {outcome.message}" if outcome.message else ""
        text = f"{outcome.status}: {run.name}, {duration(outcome.seconds)}{said}"
        self._display.ended(run, text, notable=outcome.status in ("failed", "diverged", "stopped"))

    def _show(self, running: Sequence[Run], left: Sequence[Run], jobs: int, spent: float) -> None:
        """Show how far the sweep is, with ``left`` runs to end, ``jobs`` at once, which have trained for a while."""
        done = self.plan.done + sum(outcome.status in (*DONE, "done before") for outcome in self.ended.values())
        assert self._display is not None
        self._display.update(done, len(self.plan.runs), self._seconds_left(left, jobs, spent), list(running))

    def _seconds_left(self, left: Sequence[Run], jobs: int, spent: float) -> float | None:
        """How long it will take; None where nothing was measured, or where what trains takes longer than measured."""
        whole = self._expected(left, jobs)
        return None if whole is None or whole <= spent else whole - spent

    def _expected(self, left: Sequence[Run], jobs: int) -> float | None:
        """What these runs will take; computed anew when one of them starts or ends."""
        known = (len(self.ended), jobs, *(run.run_key for run in left))
        if self._estimated_for != known:
            self._estimated_for = known
            self._estimated = seconds_for(left, self.plan.estimate, jobs)
        return self._estimated


class LocalSweep(Sweep):
    """Hands pending runs to workers until none is left."""

    def __init__(self, plan: Plan, project: Project, pool: Pool, jobs: int) -> None:
        super().__init__(plan)
        self.project = project
        self.pool = pool
        self.jobs = jobs
        self.waiting = deque(plan.pending)
        self.elsewhere: dict[str, tuple[Run, float]] = {}
        self._stopped_at = 0.0

    def unfinished(self) -> list[Run]:
        """Return the runs that neither completed nor failed."""
        ended = {key for key, outcome in self.ended.items() if outcome.status != "stopped"}
        return [run for run in self.plan.pending if run.run_key not in ended]

    def farewell(self) -> str:
        """Return how many runs the next sweep goes on with."""
        left = len(self.unfinished())
        return f"stopped; {counted(left, 'run')} {'goes' if left == 1 else 'go'} on with the next sweep"

    def stop(self, number: int, _: Any = None) -> None:
        """Stop in order; called twice, at once."""
        if self.signal is not None:
            self._stopped_at = -PATIENCE_SECONDS
            return
        self.signal, self._stopped_at = number, time.monotonic()
        self.pool.stop()

    def train(self, display: Display) -> None:
        """Check one run of every row, then train all that are pending."""
        self._display = display
        try:
            self.pool.start(self.jobs)
            self._check_rows()
            while self.signal is None and (self.waiting or self.elsewhere or self.pool.busy()):
                self._hand_out()
                self._take_in(POLL_SECONDS)
                self._show_workers()
            self._await_stopped()
        finally:
            display.close()
            self.pool.close(0 if self._stopped_at < 0 else 5)

    def _check_rows(self) -> None:
        """Build every row on the meta device; rows that cannot be built end the sweep before anything trains."""
        to_check = rows_to_check(self.plan.pending)
        refusals: list[Refusal] = []
        while self.signal is None and (to_check or self.pool.busy()):
            for worker in self.pool.idle():
                if to_check:
                    self.pool.give(worker, "check", to_check.pop())
            for worker, kind, content in self.pool.messages(POLL_SECONDS):
                if kind in ("broken", "died"):
                    raise UserError(str(content) if kind == "broken" else f"a worker died at its start ({content})")
                if kind == "checked":
                    worker.run = None
                    refusals.extend([content] if content else [])
            if not self.pool.busy() and not self.pool.workers:
                raise UserError("no worker is left")
        refuse_rows(refusals)

    def _hand_out(self) -> None:
        """Give every idle worker the longest run that nobody else trains."""
        for worker in self.pool.idle():
            run = self._next()
            if run is None:
                return
            self.pool.give(worker, "train", run)

    def _next(self) -> Run | None:
        now = time.monotonic()
        while self.waiting:
            run = self.waiting.popleft()
            if not is_locked(self.project, run.run_key):
                return run
            self.elsewhere[run.run_key] = (run, now)
        for key, (run, asked) in self.elsewhere.items():
            if now - asked >= ELSEWHERE_SECONDS:
                if not is_locked(self.project, key):
                    del self.elsewhere[key]
                    return run
                self.elsewhere[key] = (run, now)
        return None

    def _take_in(self, seconds: float) -> None:
        for worker, kind, content in self.pool.messages(seconds):
            if kind == "ended" and worker.run is not None:
                run, worker.run = worker.run, None
                self._note(run, content)
            elif kind == "died":
                self._replace(worker, content)
            elif kind == "broken":
                raise UserError(content)

    def _note(self, run: Run, outcome: Outcome) -> None:
        if outcome.status == "busy":
            self.elsewhere[run.run_key] = (run, time.monotonic())
            return
        super()._note(run, outcome)
        self._show_workers()

    def _replace(self, worker: Worker, exit_code: int | None) -> None:
        """Take note of a worker that died, and start another one."""
        if worker.run is not None:
            reason = f"its process died (exit code {exit_code}; -9 often means that memory ran out)"
            self._note(worker.run, Outcome(worker.run.run_key, "failed", time.monotonic() - worker.since, reason))
        if self.signal is None and (self.waiting or self.elsewhere):
            self.pool.start(1)

    def _await_stopped(self) -> None:
        """After a signal, let the runs that train end their epoch and save."""
        while self.pool.busy() and time.monotonic() - self._stopped_at < PATIENCE_SECONDS and self._stopped_at >= 0:
            self._take_in(POLL_SECONDS)

    def _show_workers(self) -> None:
        running = [worker.run for worker in self.pool.busy() if worker.run is not None]
        self._show(running, *self._load())

    def _load(self) -> tuple[list[Run], int, float]:
        """Return the runs that train and wait, how many train at once, and the seconds already spent on them."""
        training = [(worker.run, worker.since) for worker in self.pool.busy() if worker.run is not None]
        now, estimate = time.monotonic(), self.plan.estimate
        # a run that is late takes nothing off those that wait
        spent = sum(min(now - since, estimate.seconds(run) or 0.0) for run, since in training) / self.jobs
        return [*(run for run, _ in training), *self.waiting], self.jobs, spent
