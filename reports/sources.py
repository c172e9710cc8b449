"""Reads results/runs.csv, metrics.csv and paper.csv, and refuses a file that does not hold what it should."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fwp_lightning.errors import UserError

# the columns that reports read; runs.csv has more
RUN_COLUMNS = (
    "run_key", "experiment", "row", "point", "seed", "profile", "protocol", "status", "version", "wall_seconds",
    "git_commit", "git_dirty", "deviations",
)  # fmt: skip
METRIC_COLUMNS = ("run_key", "split", "metric", "step", "value")
PAPER_COLUMNS = ("experiment", "row", "point", "split", "metric", "value", "source")


@dataclass(frozen=True)
class Curve:
    """One metric of one run: its values at the steps where it was evaluated, in order of step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One line of runs.csv, as far as reports need it, with its curves by name (`valid/loss`)."""

    key: str
    experiment: str
    row: str
    point: str
    seed: int
    profile: str
    protocol: str
    status: str
    version: int
    wall_seconds: float
    commit: str
    dirty: bool
    deviations: str
    finished: str
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name as MLflow shows it."""
        return "/".join(part for part in (self.experiment, self.row, self.point, f"seed{self.seed}") if part)


@dataclass(frozen=True)
class Reference:
    """A number of the paper or of the authors' released logs."""

    value: float
    printed: str
    source: str

    @property
    def is_bound(self) -> bool:
        """True where the paper prints only a bound, such as >260."""
        return self.printed.startswith(">")


ReferenceKey = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Results:
    """Everything that reports are drawn from."""

    runs: tuple[Run, ...]
    references: Mapping[ReferenceKey, Reference]

    @cached_property
    def experiments(self) -> frozenset[str]:
        """The experiments that have at least one finished run."""
        return frozenset(run.experiment for run in self.runs if run.status != "failed")


def read_results(root: Path) -> Results:
    """Reads the three CSV files below `root`/results; a file that is not there holds nothing."""
    folder = root / "results"
    curves = read_curves(folder / "metrics.csv")
    runs = read_runs(folder / "runs.csv", curves)
    return Results(runs, read_references(folder / "paper.csv"))


def read_runs(path: Path, curves: Mapping[str, Mapping[str, Curve]]) -> tuple[Run, ...]:
    """Reads runs.csv and gives each run its curves."""
    lines: dict[str, int] = {}
    runs = []
    for number, line in _lines(path, RUN_COLUMNS):
        key = line["run_key"]
        if key in lines:
            raise UserError(f"{path} holds run_key {key} twice (lines {lines[key]} and {number}); keep one of them.")
        lines[key] = number
        runs.append(
            Run(
                key=key,
                experiment=line["experiment"],
                row=line["row"],
                point=line["point"],
                seed=int(_number(path, number, line, "seed")),
                profile=line["profile"],
                protocol=line["protocol"],
                status=line["status"] or "complete",
                version=int(_number(path, number, line, "version", empty=1)),
                wall_seconds=_number(path, number, line, "wall_seconds", empty=0),
                commit=line["git_commit"],
                dirty=line["git_dirty"].lower() in ("true", "1"),
                deviations=line["deviations"],
                finished=line.get("finished") or "",
                curves=curves.get(key, {}),
            )
        )
    return tuple(sorted(runs, key=lambda run: run.key))


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """Reads metrics.csv into curves by run_key and `split/metric`."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for number, line in _lines(path, METRIC_COLUMNS):
        name = "/".join(part for part in (line["split"], line["metric"]) if part)
        step = int(_number(path, number, line, "step", empty=0))
        curve = points.setdefault(line["run_key"], {}).setdefault(name, {})
        if step in curve:
            key = line["run_key"]
            raise UserError(f"{path} line {number}: run {key} has {name} at step {step} twice; keep one of them.")
        curve[step] = _number(path, number, line, "value")
    return {
        key: {name: Curve(*zip(*sorted(curve.items()), strict=True)) for name, curve in named.items()}
        for key, named in points.items()
    }


def read_references(path: Path) -> dict[ReferenceKey, Reference]:
    """Reads paper.csv by (experiment, row, point, split, metric)."""
    references: dict[ReferenceKey, Reference] = {}
    for number, line in _lines(path, PAPER_COLUMNS):
        key = (line["experiment"], line["row"], line["point"], line["split"], line["metric"])
        if key in references:
            raise UserError(f"{path} line {number}: {' / '.join(filter(None, key))} is there twice; keep one of them.")
        bound = re.search(r">[\d.]+(?= printed)", line["source"])
        printed = bound.group() if bound else line["value"]
        references[key] = Reference(_number(path, number, line, "value"), printed, line["source"])
    return references


def _lines(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            command = "python -m reports.paper_numbers" if path.name == "paper.csv" else "fwp export"
            raise UserError(f"{path} has no column {missing[0]!r}; write the file anew with `{command}`.")
        for line in reader:
            if None in line or None in line.values():
                raise UserError(f"{path} line {reader.line_num} does not have as many fields as the header.")
            yield reader.line_num, line


def _number(path: Path, number: int, line: Mapping[str, str], column: str, empty: float | None = None) -> float:
    text = line[column]
    if not text and empty is not None:
        return empty
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path} line {number}: {column} is {text!r}, which is not a number.") from None
