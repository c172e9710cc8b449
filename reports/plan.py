"""What a report shows: rows, points and seeds of an experiment file in one profile and protocol, and its `report:`.

report:
  kind: capacity_plot              # or learning_curves, table
  metrics: [valid/loss]            # a plot shows the first; each entry may also be {name, label, better, digits}
  x: {label: number of unique keys S, limits: [0, 600]}
  y: {label: loss, scale: log, limits: [1.0e-4, 1.0e+3]}
  readme: [n_keys=60, n_keys=100]  # the points that README's block shows; leave out for none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import (
    Project,
    View,
    experiment_names,
    load_experiment,
    natural_key,
    read_yaml,
    resolve_runs,
)
from fwp_lightning.registry import did_you_mean

KINDS = ("capacity_plot", "learning_curves", "table")


@dataclass(frozen=True)
class Metric:
    """A metric that a report shows."""

    name: str
    """`split/metric` as in metrics.csv"""
    label: str
    better: str = "lower"
    """lower or higher: which value of a curve is its best"""
    digits: int | None = None
    """digits after the point; three significant ones where not given"""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot; limits that are not given follow the data."""

    label: str = ""
    scale: str = "linear"
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class ReportSpec:
    """The `report:` section of an experiment file."""

    kind: str
    metrics: tuple[Metric, ...]
    x: Axis
    y: Axis
    readme: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """One report in one profile and one protocol."""

    name: str
    runs_of: str
    """the experiment whose runs are shown: the report's own, or the parent of a view"""
    title: str
    source: str
    profile: str
    protocol: str
    statistic: str
    """which evaluation a figure shows: last or best"""
    is_default_protocol: bool
    rows: tuple[str, ...]
    points: tuple[str, ...]
    version: int
    """the protocol's version in the experiment file"""
    seeds: Mapping[tuple[str, str], tuple[int, ...]]
    """the seeds planned for each (row, point)"""
    run_keys: frozenset[str]
    """the keys of the planned runs; a run of theirs was made with the settings that the experiment file has now"""
    deviations: tuple[str, ...]
    spec: ReportSpec

    @property
    def n_planned(self) -> int:
        """How many runs make this report complete."""
        return sum(len(seeds) for seeds in self.seeds.values())

    @property
    def reproduce(self) -> str:
        """The command that trains what is missing and draws the report."""
        protocol = "" if self.is_default_protocol else f" PROTOCOL={self.protocol}"
        return f"make reproduce-{self.name} PROFILE={self.profile}{protocol}"

    @property
    def redraw(self) -> str:
        """The command that draws the report from the CSV files."""
        return f"python -m reports {self.name}"


def report_names(project: Project) -> list[str]:
    """The experiments of the project that have a report, figures and tables in natural order."""
    return [name for name in experiment_names(project) if "report" in read_yaml(project.experiments / f"{name}.yaml")]


def runs_of(project: Project, name: str) -> str:
    """The experiment whose runs a report shows: its own, or the parent's of a view."""
    experiment = load_experiment(name, project)
    return experiment.parent.name if isinstance(experiment, View) else experiment.name


def load_plan(project: Project, name: str, profile: str, protocol: str | None = None) -> Plan:
    """The plan of one report in one profile and protocol (without one: the experiment's default)."""
    experiment = load_experiment(name, project)
    trained = experiment.parent if isinstance(experiment, View) else experiment
    protocol = protocol or trained.protocol
    runs = resolve_runs(experiment, profile=profile, protocol=protocol)
    seeds: dict[tuple[str, str], tuple[int, ...]] = {}
    for run in runs:
        seeds[run.row, run.point] = (*seeds.get((run.row, run.point), ()), run.seed)
    sentences = (trained.deviations.get(key, "") for key in (profile, protocol))
    return Plan(
        name=name,
        runs_of=trained.name,
        title=experiment.title or name,
        source=experiment.source,
        profile=profile,
        protocol=protocol,
        statistic=trained.protocols[protocol].statistic,
        is_default_protocol=protocol == trained.protocol,
        rows=tuple(dict.fromkeys(run.row for run in runs)),
        points=tuple(sorted({run.point for run in runs}, key=natural_key)),
        version=runs[0].version,
        seeds=seeds,
        run_keys=frozenset(run.run_key for run in runs),
        deviations=tuple(sentence for sentence in sentences if sentence),
        spec=read_spec(name, read_yaml(project.experiments / f"{name}.yaml").get("report")),
    )


def read_spec(name: str, section: Any) -> ReportSpec:
    """Checks the `report:` section of an experiment file."""
    where = f"experiments/{name}.yaml, report"
    if not isinstance(section, Mapping):
        raise UserError(f"experiments/{name}.yaml has no `report:` section; give it one with a kind and metrics.")
    _check_keys(where, section, ("kind", "metrics", "x", "y", "readme"))
    if section.get("kind") not in KINDS:
        raise UserError(
            f"{where}: kind is {section.get('kind')!r}; {did_you_mean(str(section.get('kind')), list(KINDS))}"
        )
    metrics = tuple(_metric(where, entry) for entry in section.get("metrics") or ())
    if not metrics:
        raise UserError(f"{where}: metrics is empty; name at least one, as in [valid/loss].")
    x, y = (_axis(f"{where}.{key}", section.get(key) or {}) for key in "xy")
    return ReportSpec(section["kind"], metrics, x, y, tuple(section.get("readme") or ()))


def _metric(where: str, entry: Any) -> Metric:
    if isinstance(entry, str):
        return Metric(entry, entry.replace("/", " "))
    _check_keys(f"{where}.metrics", entry, ("name", "label", "better", "digits"))
    better = entry.get("better", "lower")
    if better not in ("lower", "higher"):
        raise UserError(f"{where}.metrics: better is {better!r}; choose lower or higher.")
    return Metric(entry["name"], entry.get("label", entry["name"].replace("/", " ")), better, entry.get("digits"))


def _axis(where: str, section: Mapping[str, Any]) -> Axis:
    _check_keys(where, section, ("label", "scale", "limits"))
    scale = section.get("scale", "linear")
    if scale not in ("linear", "log"):
        raise UserError(f"{where}: scale is {scale!r}; choose linear or log.")
    limits = section.get("limits")
    if limits is None:
        return Axis(section.get("label", ""), scale)
    if not isinstance(limits, list) or len(limits) != 2 or not all(isinstance(limit, int | float) for limit in limits):
        raise UserError(f"{where}: limits are {limits!r}; give two numbers, as in [0, 0.5].")
    low, high = (float(limit) for limit in limits)
    if low >= high or (scale == "log" and low <= 0):
        raise UserError(
            f"{where}: limits are {limits}; the first must be below the second, and above 0 on a log scale."
        )
    return Axis(section.get("label", ""), scale, (low, high))


def _check_keys(where: str, section: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}. {did_you_mean(str(key), list(known))}")
