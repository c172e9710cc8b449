"""The claims of the paper in experiments/claims.yaml: which rows and metrics bear on each, and by which test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import CLAIMS, Project, View, load_experiment, resolve_runs
from fwp_lightning.registry import did_you_mean
from fwp_lightning.yaml_files import read_yaml
from reports.plan import Metric, read_spec, report_names

TESTS = ("over_points", "over_seeds", "capacity")
SCALES = ("difference", "ratio")
FILE = f"experiments/{CLAIMS}.yaml"
FILE_KEYS = ("confidence", "least_seeds", "claims")
CLAIM_KEYS = ("claim", "source", "suspect", "experiment", "metric", "points", "test", "reason")
KEYS_OF_TEST = {
    "over_points": ("pairs", "margin"),
    "over_seeds": ("pairs", "margin", "as"),
    "capacity": ("d_dot", "solved", "ratio"),
}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a row of an experiment at some points, or a fixed level."""

    experiment: str
    row: str
    points: tuple[str, ...]
    """none: all that the profile has"""
    level: float | None = None

    def __str__(self) -> str:
        """The row, or the level, as a table shows it."""
        return self.row if self.level is None else f"{self.level:g}"


@dataclass(frozen=True)
class Comparison:
    """`better` is claimed to be better than `worse`, by more than the margin of its claim."""

    better: Side
    worse: Side


@dataclass(frozen=True)
class Claim:
    """One claim, and the test that decides it."""

    name: str
    claim: str
    source: str
    suspect: str
    """what may explain the result other than the claim"""
    experiment: str
    metric: Metric
    test: str
    reason: str
    """why the threshold is what it is"""
    pairs: tuple[Comparison, ...] = ()
    margin: float = 0.0
    scale: str = SCALES[0]
    d_dot: tuple[tuple[Side, int], ...] = ()
    solved: float = 0.0
    ratio: tuple[float, float] = (1.0, 1.0)

    @property
    def sides(self) -> tuple[Side, ...]:
        """All rows that bear on the claim, each once."""
        of_pairs = [side for pair in self.pairs for side in (pair.better, pair.worse)]
        rows = [side for side in [*of_pairs, *(side for side, _ in self.d_dot)] if side.level is None]
        return tuple(dict.fromkeys(rows))

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments whose runs are looked at, the claim's own first."""
        return tuple(dict.fromkeys([self.experiment, *(side.experiment for side in self.sides)]))


@dataclass(frozen=True)
class Claims:
    """The file: its claims, and what all of them share."""

    confidence: float
    least_seeds: int
    claims: tuple[Claim, ...]


def read_claims(project: Project) -> Claims | None:
    """Reads and checks the claims of a project; None where it has no such file."""
    path = project.experiments / f"{CLAIMS}.yaml"
    if not path.exists():
        return None
    content = read_yaml(path)
    _known_keys(FILE, content, FILE_KEYS)
    confidence, least = content.get("confidence", 0.95), content.get("least_seeds", 3)
    if not _is_number(confidence) or not 0.5 <= confidence < 1:
        raise UserError(f"{FILE}: confidence is {confidence!r}; give a number from 0.5 to below 1, as in 0.95.")
    if type(least) is not int or least < 2:
        raise UserError(f"{FILE}: least_seeds is {least!r}; an interval over seeds needs a whole number from 2.")
    claims = content.get("claims")
    if not isinstance(claims, Mapping) or not claims:
        raise UserError(f"{FILE}: claims is {claims!r}; name at least one claim.")
    reader = _Reader(project)
    return Claims(float(confidence), least, tuple(reader.claim(str(name), entry) for name, entry in claims.items()))


class _Reader:
    """Checks claims against the experiments they name; each complaint is one sentence."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.known = report_names(project)

    def claim(self, name: str, entry: Any) -> Claim:
        where = f"{FILE}, {name}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where} is {entry!r}; give it the keys {', '.join(CLAIM_KEYS)}.")
        test = entry.get("test")
        if test not in TESTS:
            raise UserError(f"{where}: test is {test!r}. {did_you_mean(test, list(TESTS))}")
        _known_keys(where, entry, (*CLAIM_KEYS, *KEYS_OF_TEST[test]))
        texts = {key: _text(where, entry, key) for key in ("claim", "source", "experiment", "metric", "reason")}
        self.experiment(where, texts["experiment"])
        points = _points(where, entry.get("points"))
        shared = Claim(
            name=name,
            claim=texts["claim"],
            source=texts["source"],
            suspect=str(entry.get("suspect", "")),
            experiment=texts["experiment"],
            metric=self.metric(where, texts["experiment"], texts["metric"]),
            test=test,
            reason=" ".join(texts["reason"].split()),
        )
        if test == "capacity":
            return self.capacity(where, entry, shared, points)
        return self.comparisons(where, entry, shared, points)

    def experiment(self, where: str, name: str) -> None:
        if name not in self.known:
            raise UserError(f"{where}: there is no experiment {name!r} with a report. {did_you_mean(name, self.known)}")
        if isinstance(load_experiment(name, self.project), View):
            raise UserError(f"{where}: {name} shows the runs of another experiment; name that one.")

    def metric(self, where: str, experiment: str, name: str) -> Metric:
        section = read_yaml(self.project.experiments / f"{experiment}.yaml").get("report")
        metrics = {metric.name: metric for metric in read_spec(experiment, section).metrics}
        if name not in metrics:
            raise UserError(f"{where}: the report of {experiment} has no metric {name!r}. {_did(name, metrics)}")
        return metrics[name]

    def side(self, where: str, value: Any, claim: Claim, points: tuple[str, ...]) -> Side:
        if _is_number(value):
            return Side("", "", (), float(value))
        if isinstance(value, str):
            value = {"row": value}
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}; name a row, or give a number as a fixed level.")
        _known_keys(where, value, ("experiment", "row", "points"))
        experiment = str(value.get("experiment", claim.experiment))
        self.experiment(where, experiment)
        self.metric(where, experiment, claim.metric.name)
        own = _points(where, value["points"]) if "points" in value else points if experiment == claim.experiment else ()
        side = Side(experiment, _text(where, value, "row"), own)
        self.check(where, side)
        return side

    def check(self, where: str, side: Side) -> None:
        experiment = load_experiment(side.experiment, self.project)
        assert not isinstance(experiment, View)
        if side.row not in experiment.rows:
            raise UserError(f"{where}: {side.experiment} has no row {side.row!r}. {_did(side.row, experiment.rows)}")
        runs = [run for profile in experiment.profiles for run in resolve_runs(experiment, profile=profile)]
        known = dict.fromkeys(run.point for run in runs if run.row == side.row)
        for point in side.points:
            if point not in known:
                raise UserError(f"{where}: {side.experiment} has no point {point!r}. {_did(point, known)}")

    def comparisons(self, where: str, entry: Mapping[str, Any], claim: Claim, points: tuple[str, ...]) -> Claim:
        found = []
        pairs = entry.get("pairs")
        if not isinstance(pairs, list) or not pairs:
            raise UserError(f"{where}: pairs is {pairs!r}; give a list, as in [{{better: A, worse: B}}].")
        for pair in pairs:
            if not isinstance(pair, Mapping) or set(pair) != {"better", "worse"}:
                raise UserError(f"{where}: a pair is {pair!r}; give it better and worse.")
            sides = [self.side(f"{where}, {key}", pair[key], claim, points) for key in ("better", "worse")]
            if all(side.level is not None for side in sides):
                raise UserError(f"{where}: a pair compares two fixed levels, {pair!r}; name a row on one side.")
            found.append(Comparison(*sides))
        scale = entry.get("as", SCALES[0])
        if scale not in SCALES:
            raise UserError(f"{where}: as is {scale!r}; {did_you_mean(scale, list(SCALES))}")
        margin = _number(where, entry, "margin")
        if scale == "ratio" and margin <= 0:
            raise UserError(f"{where}: margin is {margin:g}; a ratio is compared with a number above 0.")
        return replace(claim, pairs=tuple(found), margin=margin, scale=scale)

    def capacity(self, where: str, entry: Mapping[str, Any], claim: Claim, points: tuple[str, ...]) -> Claim:
        d_dot = entry.get("d_dot")
        if not isinstance(d_dot, Mapping) or len(d_dot) < 2:
            raise UserError(f"{where}: d_dot is {d_dot!r}; give at least two rows their number of features.")
        for row, size in d_dot.items():
            if type(size) is not int or size < 1:
                raise UserError(f"{where}: d_dot of {row!r} is {size!r}; give a whole number from 1.")
        ratio = entry.get("ratio")
        if not isinstance(ratio, list) or len(ratio) != 2 or not all(map(_is_number, ratio)) or ratio[0] >= ratio[1]:
            raise UserError(f"{where}: ratio is {ratio!r}; give two rising numbers, as in [0.75, 1.25].")
        sides = [(self.side(f"{where}, d_dot", row, claim, points), size) for row, size in d_dot.items()]
        return replace(
            claim,
            d_dot=tuple(sorted(sides, key=lambda pair: pair[1])),
            solved=_number(where, entry, "solved"),
            ratio=(float(ratio[0]), float(ratio[1])),
        )


def _did(name: str, known: Mapping[str, Any]) -> str:
    return did_you_mean(name, list(known))


def _known_keys(where: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}. {did_you_mean(str(key), list(known))}")


def _text(where: str, entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {value!r}; give it as text.")
    return value


def _points(where: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(point, str) for point in value):
        raise UserError(f"{where}: points is {value!r}; give a list, as in [n_keys=20].")
    return tuple(value)


def _number(where: str, entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    if not _is_number(value):
        raise UserError(f"{where}: {key} is {value!r}; give a number, stated before the runs.")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
