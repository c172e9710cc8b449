"""`fwp report --compare OLD`: what changed between two results, with a test of significance over seeds."""

from __future__ import annotations

import csv
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Project, View, experiment_names, load_experiment, natural_key
from fwp_lightning.registry import did_you_mean
from fwp_lightning.yaml_files import read_yaml
from reports import wording
from reports.plan import Metric, ReportSpec, read_spec
from reports.selection import Summary, diverged, end_of
from reports.sources import Run, read_curves, read_runs
from reports.tables import Table, markdown_lines, markdown_text

LEVEL = 0.05
ADVICE = "name results that `fwp export` wrote"
ONE_SEED, NO_SPREAD = "one seed: not testable", "no spread: not testable"
SAME, SHARED = "the same runs", "some runs on both sides: not testable"
OTHER_VERSION = "other version of the protocol: not comparable"
GONE, NEW = "only old", "only new"
CSV_COLUMNS = (
    "experiment", "profile", "protocol", "row", "point", "split", "metric", "statistic", "old_mean", "old_std", "old_n",
    "old_diverged", "old_seeds", "new_mean", "new_std", "new_n", "new_diverged", "new_seeds", "difference", "p",
    "p_holm", "verdict",
)  # fmt: skip

Place = tuple[str, str, str]
"""experiment, profile, protocol"""


@dataclass(frozen=True)
class Side:
    """One cell's number in one of the two results."""

    runs: tuple[Run, ...]
    summary: Summary

    @property
    def seeds(self) -> str:
        """The seeds, as in `1 2 3`."""
        return " ".join(str(run.seed) for run in self.runs)


@dataclass(frozen=True)
class Change:
    """One metric of one row and point, then and now."""

    place: Place
    row: str
    point: str
    metric: Metric
    statistic: str
    old: Side
    new: Side
    p: float = math.nan
    p_holm: float = math.nan

    @property
    def difference(self) -> float:
        """Now minus then; NaN where either is missing."""
        return self.new.summary.mean - self.old.summary.mean

    @property
    def is_changed(self) -> bool:
        """Whether anything but the same numbers stands on both sides."""
        return self.old.summary != self.new.summary or self.obstacle == OTHER_VERSION

    @property
    def obstacle(self) -> str:
        """Why nothing can be said about significance; empty where it can."""
        if not self.old.runs or not self.new.runs:
            return NEW if self.new.runs else GONE
        if {run.version for run in self.old.runs} != {run.version for run in self.new.runs}:
            return OTHER_VERSION
        then, now = self.old.summary.values, self.new.summary.values
        shared = {run.key for run in self.old.runs} & {run.key for run in self.new.runs}
        if shared and self.old.summary == self.new.summary:
            return SAME
        if min(len(then), len(now)) < 2:
            return ONE_SEED
        if shared:
            return SHARED
        return NO_SPREAD if len(set(then)) == len(set(now)) == 1 else ""

    @property
    def verdict(self) -> str:
        """The obstacle, or whether the number is better, worse or not shown to differ."""
        if self.obstacle:
            return self.obstacle
        if self.p_holm >= LEVEL:
            return "no difference shown"
        return "better" if (self.difference < 0) == (self.metric.better == "lower") else "worse"


def compare(project: Project, old: Path, names: Sequence[str], csv_file: Path | None) -> str:
    """Return in Markdown what changed from `old` to the project's results; `names` chooses experiments."""
    then, now = read_side(old), read_side(project.results)
    known = sorted({run.experiment for run in (*then, *now)}, key=natural_key)
    for name in names:
        if name not in known:
            raise UserError(f"neither result has runs of {name!r}. {did_you_mean(name, known)}")
    changes = with_holm(list(find_changes(project, then, now, names or known)))
    if csv_file is not None:
        write_csv(csv_file, changes)
    return to_markdown(changes, old)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_side(path: Path) -> tuple[Run, ...]:
    """Read the runs of a results folder, or of one of its two files beside the other."""
    runs_file, metrics_file = _files_of(path)
    for file in (runs_file, metrics_file):
        if not file.is_file():
            raise UserError(f"{file}: there is no such file; {ADVICE}.")
    curves = read_curves(metrics_file, ADVICE)
    runs = read_runs(runs_file, curves, {}, ADVICE)
    if strangers := curves.keys() - {run.key for run in runs}:
        raise UserError(
            f"{metrics_file} has values of the run {min(strangers)}, which {runs_file} does not have; they are of "
            "different exports."
        )
    ended = [run for run in runs if run.status != "failed"]
    twice = Counter((run.name, run.profile, run.protocol) for run in ended)
    for (name, profile, protocol), number in twice.items():
        if number > 1:
            raise UserError(f"{runs_file} mixes {number} runs of {name} ({profile}, {protocol}); keep one of them.")
    return tuple(ended)


def _files_of(path: Path) -> tuple[Path, Path]:
    """Return runs and metrics: of a folder, of runs.csv or metrics.csv, or of old-runs.csv beside old-metrics.csv."""
    if path.is_dir():
        return path / "runs.csv", path / "metrics.csv"
    if not path.is_file():
        raise UserError(f"--compare {path}: there is no such file or folder; {ADVICE}.")
    for this, other in (("runs", "metrics"), ("metrics", "runs")):
        if this in path.name:
            pair = {this: path, other: path.with_name(path.name.replace(this, other))}
            return pair["runs"], pair["metrics"]
    raise UserError(
        f"--compare {path}: its name has neither 'runs' nor 'metrics'; name a results folder or its runs.csv."
    )


# --- what changed ----------------------------------------------------------------------------------------------------


def find_changes(project: Project, then: Iterable[Run], now: Iterable[Run], names: Sequence[str]) -> Iterator[Change]:
    """Yield every cell that either result has, in the order of experiment, profile, protocol, row and point."""
    sides: list[dict[tuple[Place, str, str], list[Run]]] = [defaultdict(list), defaultdict(list)]
    for side, runs in zip(sides, (then, now), strict=True):
        for run in sorted(runs, key=lambda run: run.seed):
            side[(run.experiment, run.profile, run.protocol), run.row, run.point].append(run)
    wanted = [cell for cell in sides[0].keys() | sides[1].keys() if cell[0][0] in names]
    for place, row, point in sorted(wanted, key=lambda cell: [natural_key(x) for x in (*cell[0], *cell[1:])]):
        old, new = (tuple(side.get((place, row, point), ())) for side in sides)
        for metric, statistic in _metrics_of(project, place, row, (*old, *new)):
            yield Change(
                place, row, point, metric, statistic, _side(old, metric, statistic), _side(new, metric, statistic)
            )


def _metrics_of(project: Project, place: Place, row: str, runs: Sequence[Run]) -> list[tuple[Metric, str]]:
    """Return what is compared: the metrics of the experiment's report, else the last evaluations that were logged."""
    name, _, protocol = place
    logged = {curve for run in runs for curve in run.curves}
    reported = _report_of(project, name)
    if reported is None or protocol not in reported[1]:
        return [(Metric(curve, curve), "last") for curve in sorted(logged) if curve.split("/")[0] in ("valid", "test")]
    spec, statistics = reported
    named = [replace(m, name=m.name + suffix) for m in spec.metrics for suffix in spec.lines_of(row).values()]
    # of a row that is scored in several ways a metric that was logged once stands alone
    found = [metric for metric in [*named, *spec.metrics] if metric.name in logged]
    return [(metric, statistics[protocol]) for metric in dict.fromkeys(found)]


@functools.cache
def _report_of(project: Project, name: str) -> tuple[ReportSpec, dict[str, str]] | None:
    """Return an experiment's report and the statistic of each of its protocols; None where there is no such report."""
    if name not in experiment_names(project):
        return None
    experiment = load_experiment(name, project)
    section = read_yaml(project.experiments / f"{name}.yaml").get("report")
    if section is None or isinstance(experiment, View):
        return None
    return read_spec(name, section), {key: protocol.statistic for key, protocol in experiment.protocols.items()}


def _side(runs: tuple[Run, ...], metric: Metric, statistic: str) -> Side:
    lost = [run for run in runs if diverged(run, metric)]
    kept = [run for run in runs if run not in lost] if statistic == "last" else runs
    ends = [end.value for run in kept if (end := end_of(run, metric, statistic))]
    n_lost = len(lost) if statistic == "last" else sum(not end_of(run, metric, statistic) for run in lost)
    return Side(runs, Summary(tuple(ends), len(runs), n_lost))


def with_holm(changes: list[Change]) -> list[Change]:
    """Return the changes with p values: Welch's t-test of each that can be tested, and Holm's correction over all."""
    tested = [
        (number, _welch(change.old.summary.values, change.new.summary.values))
        for number, change in enumerate(changes)
        if not change.obstacle
    ]
    found, reached = list(changes), 0.0
    for rank, (number, p) in enumerate(sorted(tested, key=lambda pair: pair[1])):
        reached = max(reached, min(1.0, p * (len(tested) - rank)))
        found[number] = replace(changes[number], p=p, p_holm=reached)
    return found


def _welch(then: Sequence[float], now: Sequence[float]) -> float:
    from scipy import stats

    return float(stats.ttest_ind(then, now, equal_var=False).pvalue)


# --- writing ---------------------------------------------------------------------------------------------------------


def to_markdown(changes: Sequence[Change], old: Path) -> str:
    """Return a table of what changed for each experiment, profile and protocol, and a summary."""
    by_place: dict[Place, list[Change]] = defaultdict(list)
    for change in changes:
        if change.is_changed:
            by_place[change.place].append(change)
    parts = [f"# Changes from {markdown_text(str(old))}"]
    for (experiment, profile, protocol), members in by_place.items():
        parts.append(f"## {markdown_text(f'{experiment}, {profile} profile, {protocol} protocol')}")
        parts.append("\n".join(markdown_lines(_table(members))))
    return "\n\n".join([*parts, summary(changes)])


def _table(members: Iterable[Change]) -> Table:
    header = ("row", "point", "metric", "old", "new", "difference", "p (Holm)", "verdict")
    lines = []
    for change in members:
        digits = change.metric.digits
        shown = [wording.summary(s.summary, digits) if s.runs else "--" for s in (change.old, change.new)]
        delta = change.difference
        signed = "--" if math.isnan(delta) else ("+" if delta > 0 else "") + wording.number(delta, digits)
        p = "--" if math.isnan(change.p_holm) else wording.number(change.p_holm)
        name = f"{change.statistic} {change.metric.name}"
        lines.append((change.row, change.point, name, *shown, signed, p, change.verdict))
    return Table(header, tuple(lines), 3, ())


def summary(changes: Sequence[Change]) -> str:
    """Return in a few sentences what was compared, how it was tested and what came out."""
    same = sum(not change.is_changed for change in changes)
    tested = [change for change in changes if not math.isnan(change.p)]
    said = [f"{len(changes)} numbers compared, {same} of them the same."]
    if tested:
        counts = Counter(change.verdict for change in tested)
        found = ", ".join(f"{counts[word]} {word}" for word in ("better", "worse", "no difference shown"))
        said.append(
            f"{len(tested)} tested with Welch's t-test over seeds, two-sided, Holm's correction over all of them, "
            f"level {LEVEL}: {found}."
        )
    others = Counter(change.obstacle for change in changes if change.obstacle and change.is_changed)
    said += [f"{number} {obstacle}." for obstacle, number in sorted(others.items())]
    return " ".join(said)


def write_csv(path: Path, changes: Iterable[Change]) -> None:
    """Write every comparison, unchanged ones too, with all digits."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            writer.writerows(_csv_line(change) for change in changes)
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written: {sentence_of(error)}.") from error


def _csv_line(change: Change) -> list[object]:
    split, _, metric = change.metric.name.partition("/")
    line: list[object] = [*change.place, change.row, change.point, split, metric, change.statistic]
    for side in (change.old, change.new):
        found = side.summary
        line += [_exact(found.mean), _exact(found.std), len(found.values), found.n_diverged, side.seeds]
    return [*line, _exact(change.difference), _exact(change.p), _exact(change.p_holm), change.verdict]


def _exact(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"
