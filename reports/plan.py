"""What a report shows: rows, points and seeds of an experiment file in one profile and protocol, and its `report:`.

report:
  kind: capacity_plot              # or learning_curves, table; contrast, accumulators, spectra, attention_maps
  metrics: [valid/loss]            # a plot shows the first; each entry may also be {name, label, better, digits}
  x: {label: number of unique keys S, limits: [0, 600]}
  y: {label: loss, scale: log, limits: [1.0e-4, 1.0e+3]}
  readme: [n_keys=60, n_keys=100]  # the points that README's block shows; leave out for none
  lines:                           # of a table: a row whose run was scored in several ways, as the lines that show them
    Transformer-XL: {small memory: _1, large memory: _2}   # line -> what follows the metric's name
"""

from __future__ import annotations

import re
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
    resolve_runs,
)
from fwp_lightning.registry import did_you_mean
from fwp_lightning.yaml_files import read_yaml

MEMORY_KINDS = ("contrast", "accumulators", "spectra", "attention_maps")
"""figures of what runs recorded inside their memories"""
KINDS = ("capacity_plot", "learning_curves", "table", *MEMORY_KINDS)
ONE_NUMBER = re.compile(r"[^=,]+=[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""a point of one grid key that has a number"""


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
    lines: Mapping[str, Mapping[str, str]]

    def lines_of(self, row: str) -> Mapping[str, str]:
        """The lines that show a row, and what follows the metrics' names in each; mostly the row itself."""
        return self.lines.get(row, {row: ""})


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
    has_released: bool
    """whether there is a released code, whose protocol the paper's numbers were measured under"""
    rows: tuple[str, ...]
    points: tuple[str, ...]
    version: int
    """the protocol's version in the experiment file"""
    seeds: Mapping[tuple[str, str], tuple[int, ...]]
    """the seeds planned for each (row, point)"""
    run_keys: frozenset[str]
    """the keys of the planned runs; a run of theirs was made with the settings that the experiment file has now"""
    deviations: tuple[str, ...]
    """what departs from the paper; a view may have its own words"""
    stored_deviations: str
    """what the sweep stores with a run of this plan: the words of the experiment that trains it"""
    spec: ReportSpec

    @property
    def n_planned(self) -> int:
        """How many runs make this report complete."""
        return sum(len(seeds) for seeds in self.seeds.values())

    @property
    def row_of(self) -> dict[str, str]:
        """The row behind each line of a table."""
        return {line: row for row in self.rows for line in self.spec.lines_of(row)}

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
    """The experiments that have a report: the paper's own figures and tables, then what comes after them."""
    contents = {name: read_yaml(project.experiments / f"{name}.yaml") for name in experiment_names(project)}
    reported = [name for name, content in contents.items() if "report" in content]
    return sorted(reported, key=lambda name: not re.match(r"(Figure|Table) \d", str(contents[name].get("source", ""))))


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
    spec = read_spec(name, read_yaml(project.experiments / f"{name}.yaml").get("report"))
    check_points(f"experiments/{name}.yaml, report", spec, (run.point for run in runs))
    check_lines(f"experiments/{name}.yaml, report", spec, trained.rows)
    seeds: dict[tuple[str, str], tuple[int, ...]] = {}
    for run in runs:
        seeds[run.row, run.point] = (*seeds.get((run.row, run.point), ()), run.seed)
    words = trained.deviations | experiment.deviations
    return Plan(
        name=name,
        runs_of=trained.name,
        title=experiment.title or name,
        source=experiment.source,
        profile=profile,
        protocol=protocol,
        statistic=trained.protocols[protocol].statistic,
        is_default_protocol=protocol == trained.protocol,
        has_released="released" in trained.protocols,
        rows=tuple(dict.fromkeys(run.row for run in runs)),
        points=tuple(sorted({run.point for run in runs}, key=natural_key)),
        version=runs[0].version,
        seeds=seeds,
        run_keys=frozenset(run.run_key for run in runs),
        deviations=tuple(sentence for key in (profile, protocol) if (sentence := words.get(key))),
        stored_deviations=runs[0].deviations,
        spec=spec,
    )


def check_report_section(experiment_name: str, project: Project) -> None:
    """Refuses a `report:` section that could not be drawn; an experiment without one is fine. Draws nothing."""
    section = read_yaml(project.experiments / f"{experiment_name}.yaml")
    if "report" not in section:
        return
    spec = read_spec(experiment_name, section["report"])
    experiment = load_experiment(experiment_name, project)
    trained = experiment.parent if isinstance(experiment, View) else experiment
    where = f"experiments/{experiment_name}.yaml, report"
    points = dict.fromkeys(
        run.point for profile in trained.profiles for run in resolve_runs(experiment, profile=profile)
    )
    check_points(where, spec, tuple(points))
    check_lines(where, spec, trained.rows)
    for point in spec.readme:
        if point not in points:
            raise UserError(f"{where}: readme names the point {point!r}. {did_you_mean(point, list(points))}")


def check_points(where: str, spec: ReportSpec, points: Iterable[str]) -> None:
    """Refuses a capacity plot over anything but the numbers of one grid key."""
    if spec.kind != "capacity_plot":
        return
    for point in points:
        if not ONE_NUMBER.fullmatch(point):
            raise UserError(
                f"{where}: a capacity_plot needs a grid of one key with numbers, and there is the point {point!r}; "
                "choose the kind table or learning_curves."
            )


def check_lines(where: str, spec: ReportSpec, rows: Iterable[str]) -> None:
    """Refuses lines of a row that the experiment does not have, and lines of anything but a table."""
    for row in spec.lines:
        if row not in rows:
            raise UserError(f"{where}.lines names the row {row!r}. {did_you_mean(row, list(rows))}")
    if spec.lines and spec.kind != "table":
        raise UserError(f"{where}: lines belong to a table, and the kind is {spec.kind}; leave them out.")


def read_spec(name: str, section: Any) -> ReportSpec:
    """Checks the `report:` section of an experiment file."""
    where = f"experiments/{name}.yaml, report"
    if not isinstance(section, Mapping):
        raise UserError(f"experiments/{name}.yaml has no `report:` section; give it one with a kind and metrics.")
    _check_keys(where, section, ("kind", "metrics", "x", "y", "readme", "lines"))
    kind = section.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where}: kind is {kind!r}; {did_you_mean(str(kind), list(KINDS))}")
    metrics = tuple(_metric(f"{where}.metrics", entry) for entry in _list(where, section, "metrics"))
    if not metrics:
        raise UserError(f"{where}: metrics is empty; name at least one, as in [valid/loss].")
    x, y = (_axis(f"{where}.{key}", section.get(key) or {}) for key in "xy")
    readme = _list(where, section, "readme")
    if wrong := [point for point in readme if not isinstance(point, str)]:
        raise UserError(f"{where}: readme names {wrong[0]!r}; write a point as in n_keys=60.")
    return ReportSpec(kind, metrics, x, y, tuple(readme), _lines(f"{where}.lines", section.get("lines") or {}))


def _lines(where: str, section: Any) -> dict[str, dict[str, str]]:
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {section!r}; give each row its lines, as in {{row: {{line: _suffix}}}}.")
    for row, lines in section.items():
        if not isinstance(lines, Mapping) or not all(isinstance(suffix, str) for suffix in lines.values()):
            raise UserError(f"{where}: {row!r} has {lines!r}; give it lines, as in {{small memory: _1}}.")
    return {str(row): {str(line): suffix for line, suffix in lines.items()} for row, lines in section.items()}


def _list(where: str, section: Mapping[str, Any], key: str) -> list[Any]:
    found = section.get(key) or []
    if not isinstance(found, list):
        raise UserError(f"{where}: {key} is {found!r}; give a list, as in [{found}].")
    return found


def _metric(where: str, entry: Any) -> Metric:
    entry = {"name": entry} if isinstance(entry, str) else entry
    _check_keys(where, entry, ("name", "label", "better", "digits"))
    name, better, digits = entry.get("name"), entry.get("better", "lower"), entry.get("digits")
    if not isinstance(name, str) or not all(name.partition("/")):
        raise UserError(f"{where}: name is {name!r}; write split and metric, as in valid/loss.")
    if better not in ("lower", "higher"):
        raise UserError(f"{where}: better is {better!r}; choose lower or higher.")
    if digits is not None and (not isinstance(digits, int) or isinstance(digits, bool) or not 0 <= digits <= 9):
        raise UserError(f"{where}: digits is {digits!r}; give a whole number from 0 to 9.")
    return Metric(name, str(entry.get("label", name.replace("/", " "))), better, digits)


def _axis(where: str, section: Any) -> Axis:
    _check_keys(where, section, ("label", "scale", "limits"))
    label, scale, limits = str(section.get("label", "")), section.get("scale", "linear"), section.get("limits")
    if scale not in ("linear", "log"):
        raise UserError(f"{where}: scale is {scale!r}; choose linear or log.")
    if limits is None:
        return Axis(label, scale)
    if not isinstance(limits, list) or len(limits) != 2 or not all(_is_number(limit) for limit in limits):
        raise UserError(f"{where}: limits are {limits!r}; give two numbers, as in [0, 0.5].")
    low, high = (float(limit) for limit in limits)
    if low >= high or (scale == "log" and low <= 0):
        raise UserError(
            f"{where}: limits are {limits}; the first must be below the second, and above 0 on a log scale."
        )
    return Axis(label, scale, (low, high))


def _is_number(value: Any) -> bool:
    # an axis ends far below the largest double
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _check_keys(where: str, section: Any, known: Iterable[str]) -> None:
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {section!r}; give it the keys {', '.join(known)}.")
    for key in section:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}. {did_you_mean(str(key), list(known))}")
