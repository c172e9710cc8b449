"""Reads the CSV files in results/, and refuses one that does not hold what it should."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.results_csv import ADVICE, read_metrics, read_probes, read_translations
from fwp_lightning.results_csv import read_runs as read_run_lines

PAPER_COLUMNS = ("experiment", "row", "point", "split", "metric", "value", "source")


@dataclass(frozen=True)
class Curve:
    """One metric of one run: its values at the steps where it was evaluated, in order of step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Translation:
    """A sentence that a run translated; source and reference are empty where a corpus may not be repeated."""

    split: str
    line: int
    source: str
    reference: str
    translation: str


@dataclass(frozen=True)
class Probe:
    """A number that was measured inside a memory: of a layer and head, a statistic at x (and y)."""

    layer: int
    head: int
    statistic: str
    x: float
    y: int
    mean: float
    n: int


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
    config_sha256: str
    steps: str
    deviations: str
    finished: str
    n_params: str
    state: str
    """numbers that the memories keep of one sequence"""
    device: str
    curves: Mapping[str, Curve] = field(default_factory=dict)
    translations: tuple[Translation, ...] = ()
    probes: tuple[Probe, ...] = ()

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
    """Reads the CSV files below `root`/results; a file that is not there holds nothing."""
    folder = root / "results"
    curves = read_curves(folder / "metrics.csv")
    runs = read_runs(folder / "runs.csv", curves, read_translated(folder / "translations.csv"))
    probes = read_probed(folder / "probes.csv")
    runs = tuple(replace(run, probes=probes[run.key]) if run.key in probes else run for run in runs)
    return Results(runs, read_references(folder / "paper.csv"))


def read_runs(
    path: Path,
    curves: Mapping[str, Mapping[str, Curve]],
    translations: Mapping[str, tuple[Translation, ...]],
    advice: str = ADVICE,
) -> tuple[Run, ...]:
    """Reads runs.csv and gives each run its curves and translations."""
    lines = read_run_lines(path, advice)
    runs = [_run(line, curves.get(line["run_key"], {}), translations.get(line["run_key"], ())) for line in lines]
    return tuple(sorted(runs, key=lambda run: run.key))


def _run(line: Mapping[str, str], curves: Mapping[str, Curve], translations: tuple[Translation, ...]) -> Run:
    return Run(
        key=line["run_key"],
        experiment=line["experiment"],
        row=line["row"],
        point=line["point"],
        seed=int(line["seed"]),
        profile=line["profile"],
        protocol=line["protocol"],
        status=line["status"],
        version=int(line["version"]),
        # a run that failed early has none
        wall_seconds=float(line["wall_seconds"] or 0),
        commit=line["git_commit"],
        dirty=line["git_dirty"].lower() == "true",
        config_sha256=line["config_sha256"],
        steps=line["steps"],
        deviations=line["deviations"],
        finished=line["finished"],
        n_params=line["n_params"],
        state=line["state"],
        device=line["device"],
        curves=curves,
        translations=translations,
    )


def read_curves(path: Path, advice: str = ADVICE) -> dict[str, dict[str, Curve]]:
    """Reads metrics.csv into curves by run_key and `split/metric`."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for line in read_metrics(path, advice):
        name = "/".join(part for part in (line["split"], line["metric"]) if part)
        points.setdefault(line["run_key"], {}).setdefault(name, {})[int(line["step"])] = float(line["value"])
    return {
        key: {name: Curve(*zip(*sorted(curve.items()), strict=True)) for name, curve in named.items()}
        for key, named in points.items()
    }


def read_translated(path: Path) -> dict[str, tuple[Translation, ...]]:
    """Reads translations.csv into the sentences of each run_key, in their order."""
    found: dict[str, list[Translation]] = {}
    for row in read_translations(path):
        sentence = Translation(row["split"], int(row["line"]), row["source"], row["reference"], row["translation"])
        found.setdefault(row["run_key"], []).append(sentence)
    return {key: tuple(sorted(sentences, key=lambda s: (s.split, s.line))) for key, sentences in found.items()}


def read_probed(path: Path) -> dict[str, tuple[Probe, ...]]:
    """Reads probes.csv into the numbers from inside the memories of each run_key."""
    found: dict[str, list[Probe]] = {}
    for row in read_probes(path):
        place = (int(row["layer"]), int(row["head"]), row["statistic"], float(row["x"]), int(row["y"]))
        found.setdefault(row["run_key"], []).append(Probe(*place, float(row["mean"]), int(row["n"])))
    return {key: tuple(numbers) for key, numbers in found.items()}


def read_references(path: Path) -> dict[ReferenceKey, Reference]:
    """Reads paper.csv by (experiment, row, point, split, metric)."""
    references: dict[ReferenceKey, Reference] = {}
    for number, line in _paper_lines(path):
        key = (line["experiment"], line["row"], line["point"], line["split"], line["metric"])
        if key in references:
            raise UserError(f"{path} line {number}: {' / '.join(filter(None, key))} is there twice; keep one of them.")
        try:
            value = float(line["value"])
        except ValueError:
            raise UserError(f"{path} line {number}: value is {line['value']!r}, which is not a number.") from None
        bound = re.search(r">[\d.]+(?= printed)", line["source"])
        references[key] = Reference(value, bound.group() if bound else line["value"], line["source"])
    return references


def _paper_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.exists():
        return
    repair = "restore it with `git checkout results/paper.csv`"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in PAPER_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}; {repair}.")
            for line in reader:
                if None in line or None in line.values():
                    raise UserError(
                        f"{path} line {reader.line_num} does not have as many fields as the header; {repair}."
                    )
                yield reader.line_num, line
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else sentence_of(error)
        raise UserError(f"{path} cannot be read: {reason}; {repair}.") from error
