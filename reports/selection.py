"""The runs that belong in a report, summed up per row and point, beside the numbers of the paper."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fwp_lightning.errors import UserError
from reports.plan import Metric, Plan
from reports.sources import Reference, Results, Run

STATISTICS = ("last", "best")


@dataclass(frozen=True)
class End:
    """Where one run's curve stood at its last or best evaluation."""

    value: float
    step: int


@dataclass(frozen=True)
class Summary:
    """A number over the seeds of one row and point."""

    values: tuple[float, ...]
    n_planned: int
    n_diverged: int = 0

    @property
    def mean(self) -> float:
        """Mean over the seeds that did not diverge; NaN where there are none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1 in the denominator); NaN below two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def n_found(self) -> int:
        """Runs that ended, diverged ones included."""
        return len(self.values) + self.n_diverged

    @property
    def n_missing(self) -> int:
        """Runs that have not ended."""
        return self.n_planned - self.n_found


@dataclass(frozen=True)
class Cell:
    """All that is known of one metric of one row at one point."""

    row: str
    point: str
    metric: Metric
    ours: dict[str, Summary]
    """by `last` and `best`"""
    steps: dict[str, Summary]
    released: dict[str, Reference]
    """by `last`, `best`; a number printed once in the paper stands for both"""
    released_steps: dict[str, Reference]

    def difference(self, statistic: str) -> float:
        """Ours minus the reference; NaN where either is missing, diverged or only a bound."""
        reference = self.released.get(statistic)
        if reference is None or reference.is_bound:
            return math.nan
        return self.ours[statistic].mean - reference.value


@dataclass(frozen=True)
class Selection:
    """A report's plan with the runs found for it."""

    plan: Plan
    runs: tuple[Run, ...]
    n_failed: int
    n_old_version: int
    """runs left out because the protocol has a newer version"""

    @property
    def n_found(self) -> int:
        """Runs that ended, without those beyond the planned seeds."""
        return sum(run.seed in self.plan.seeds[run.row, run.point] for run in self.runs)

    @property
    def n_other_settings(self) -> int:
        """Runs of planned seeds that were made with settings that the experiment file no longer has."""
        planned = [run for run in self.runs if run.seed in self.plan.seeds[run.row, run.point]]
        return sum(run.key not in self.plan.run_keys for run in planned)

    @property
    def commits(self) -> tuple[str, ...]:
        """The code versions behind the runs; `+` marks one with uncommitted changes."""
        return tuple(sorted({run.commit[:10] + ("+" if run.dirty else "") for run in self.runs if run.commit}))

    @property
    def newest(self) -> str:
        """When the newest run ended and which it is; empty where there is no run."""
        run = max(self.runs, key=lambda run: (run.finished, run.name), default=None)
        return f"{run.finished} ({run.name})" if run else ""

    @property
    def hours(self) -> float:
        """Measured time of all runs together."""
        return sum(run.wall_seconds for run in self.runs) / 3600

    @property
    def deviations(self) -> tuple[str, ...]:
        """Known deviations: the experiment file's, then those stored with runs that it no longer names."""
        known = list(self.plan.deviations)
        for run in self.runs:
            if run.deviations in ("", self.plan.stored_deviations):
                continue
            if not any(sentence in run.deviations for sentence in known):
                known.append(run.deviations)
        return tuple(known)

    def runs_of(self, row: str, point: str) -> list[Run]:
        """The runs of one row at one point, by seed."""
        return sorted((run for run in self.runs if (run.row, run.point) == (row, point)), key=lambda run: run.seed)


def select(plan: Plan, results: Results) -> Selection:
    """Finds a plan's runs: of its experiment, profile, protocol and version, one per row, point and seed."""
    candidates = [
        run
        for run in results.runs
        if (run.experiment, run.profile, run.protocol) == (plan.runs_of, plan.profile, plan.protocol)
        and (run.row, run.point) in plan.seeds
    ]
    current = [run for run in candidates if run.version == plan.version]
    grouped = defaultdict(list)
    for run in current:
        if run.status != "failed":
            grouped[run.name].append(run)
    chosen = [_only(runs, plan) for runs in grouped.values()]
    order = {place: number for number, place in enumerate(plan.seeds)}
    return Selection(
        plan=plan,
        runs=tuple(sorted(chosen, key=lambda run: (order[run.row, run.point], run.seed))),
        n_failed=len({run.name for run in current if run.name not in grouped}),
        n_old_version=len(candidates) - len(current),
    )


def _only(runs: list[Run], plan: Plan) -> Run:
    # where settings were changed between two runs, the one that the experiment file describes counts
    found = [run for run in runs if run.key in plan.run_keys] or runs
    if len(found) > 1:
        raise UserError(
            f"results/runs.csv holds {len(found)} runs of {found[0].name} ({plan.profile} profile, {plan.protocol} "
            f"protocol), none with the settings of the experiment file: {', '.join(run.key for run in found)}; "
            "delete all but one, or train it anew."
        )
    return found[0]


def collect(selection: Selection, results: Results) -> list[Cell]:
    """Sums up the runs of a selection: one cell per row, point and metric, in the experiment file's order."""
    grouped = defaultdict(list)
    for run in selection.runs:
        grouped[run.row, run.point].append(run)
    spec = selection.plan.spec
    return [
        _cell(selection.plan, row, line, point, metric, grouped[row, point], results)
        for row, point in selection.plan.seeds
        for line in spec.lines_of(row).items()
        for metric in spec.metrics
    ]


def _scored_as(metric: Metric, suffix: str, runs: Sequence[Run]) -> Metric:
    """The metric with a line's suffix; one that the runs logged just once stands in every line."""
    own = replace(metric, name=metric.name + suffix)
    return own if any(own.name in run.curves for run in runs) else metric


def end_of(run: Run, metric: Metric, statistic: str) -> End | None:
    """A run's last or best evaluation; None where the metric was never logged or no value is finite."""
    curve = run.curves.get(metric.name)
    if curve is None:
        return None
    if statistic == "last":
        return End(curve.values[-1], curve.steps[-1])
    finite = [(value, step) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
    if not finite:
        return None
    sign = 1 if metric.better == "lower" else -1
    return End(*min(finite, key=lambda pair: (sign * pair[0], pair[1])))


def diverged(run: Run, metric: Metric) -> bool:
    """True where a run was stopped as diverged, or its last evaluation is no number."""
    last = end_of(run, metric, "last")
    return run.status == "diverged" or (last is not None and not math.isfinite(last.value))


def _cell(
    plan: Plan, row: str, line: tuple[str, str], point: str, metric: Metric, runs: list[Run], results: Results
) -> Cell:
    shown, suffix = line
    scored = _scored_as(metric, suffix, runs)
    # a diverged run counts as diverged in its last evaluation and with its best finite one, as the released logs do
    n_planned = max(len(plan.seeds[row, point]), len(runs))
    n_diverged = sum(diverged(run, scored) for run in runs)
    kept = {"last": [run for run in runs if not diverged(run, scored)], "best": runs}
    ends = {name: [end for run in kept[name] if (end := end_of(run, scored, name))] for name in STATISTICS}
    lost = {"last": n_diverged, "best": sum(diverged(run, scored) and not end_of(run, scored, "best") for run in runs)}
    ours = {name: _summary((end.value for end in ends[name]), n_planned, lost[name]) for name in STATISTICS}
    steps = {name: _summary((end.step for end in ends[name]), n_planned, lost[name]) for name in STATISTICS}
    last_steps = [end.step for run in runs if (end := end_of(run, scored, "last"))]
    steps["last"] = _summary(last_steps, n_planned, 0)
    split, _, name = metric.name.rpartition("/")
    found = {key: results.references.get((plan.runs_of, shown, point, split, key)) for key in _reference_names(name)}
    released = {key: found[f"{key}_{name}"] or found[name] for key in STATISTICS}
    released_steps = {key: found[f"{key}_step"] for key in STATISTICS}
    return Cell(shown, point, metric, ours, steps, _present(released), _present(released_steps))


def _reference_names(name: str) -> list[str]:
    return [name, *(f"{key}_{what}" for key in STATISTICS for what in (name, "step"))]


def _present(found: dict[str, Reference | None]) -> dict[str, Reference]:
    return {key: reference for key, reference in found.items() if reference is not None}


def _summary(values: Iterable[float], n_planned: int, n_diverged: int) -> Summary:
    return Summary(tuple(float(value) for value in values), n_planned, n_diverged)
