"""Judges each claim of the paper from the tracked runs: holds, does not hold, or not tested at this scale."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, View, load_experiment
from reports import wording
from reports.claims import Claim, Claims, Comparison, Side
from reports.plan import load_plan
from reports.selection import Selection, diverged, end_of, select
from reports.sources import Results

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested at this scale"
PROFILES = ("paper", "short")
"""from the one that proves most; what a smoke run gives proves nothing"""
SETTLING_PROFILE = "paper"
MOST_NAMED = 2


@dataclass(frozen=True)
class Value:
    """What one run says on a claim."""

    experiment: str
    row: str
    point: str
    seed: int
    run_key: str
    value: float
    """NaN where the run diverged"""


@dataclass(frozen=True)
class Interval:
    """A measured number with its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the runs of one profile and protocol say on one claim."""

    claim: Claim
    protocol: str
    profile: str
    outcome: str
    finding: str
    """the numbers in a sentence, or what is missing"""
    threshold: str
    n_seeds: int
    standing: str
    """settled or not; empty where nothing was decided"""
    interval: Interval | None
    values: tuple[Value, ...]
    commits: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """The outcome of a test and the numbers behind it."""

    outcome: str
    finding: str
    interval: Interval | None = None


Cells = dict[tuple[Side, str], list[Value]]
"""the values of each row at each point, by seed"""


def judge(project: Project, results: Results, claims: Claims) -> list[Verdict]:
    """Judges every claim in every protocol of its experiments."""
    runs_at = functools.cache(functools.partial(_selection, project, results))
    return [
        _in_best_profile(project, claims, claim, protocol, runs_at)
        for claim in claims.claims
        for protocol in _protocols(project, claim)
    ]


Select = Callable[[str, str, str], Selection]


def _selection(project: Project, results: Results, name: str, profile: str, protocol: str) -> Selection:
    return select(load_plan(project, name, profile, protocol), results)


def _protocols(project: Project, claim: Claim) -> list[str]:
    experiments = [load_experiment(name, project) for name in claim.experiments]
    found = [one for one in experiments if not isinstance(one, View)]
    return [name for name in found[0].protocols if all(name in other.protocols for other in found)]


def _in_best_profile(project: Project, claims: Claims, claim: Claim, protocol: str, runs_at: Select) -> Verdict:
    """The first profile that decides; else the first that has runs; else the first."""
    verdicts = []
    for profile in PROFILES:
        experiments = [load_experiment(name, project) for name in claim.experiments]
        if all(not isinstance(one, View) and profile in one.profiles for one in experiments):
            verdicts.append(_verdict(claims, claim, profile, protocol, runs_at))
    if not verdicts:
        raise UserError(f"{claim.name}: {claim.experiment} has none of the profiles {', '.join(PROFILES)}; add one.")
    decided = [verdict for verdict in verdicts if verdict.outcome != UNTESTED]
    begun = [verdict for verdict in verdicts if verdict.values]
    return (decided or begun or verdicts)[0]


def _verdict(claims: Claims, claim: Claim, profile: str, protocol: str, runs_at: Select) -> Verdict:
    cells: Cells = {}
    missing: list[str] = []
    commits: set[str] = set()
    for side in claim.sides:
        selection = runs_at(side.experiment, profile, protocol)
        known = [point for row, point in selection.plan.seeds if row == side.row]
        wanted = [point for point in side.points if point in known] or known
        for point in wanted:
            cells[side, point] = _values(selection, side, point, claim)
        lost = [" at ".join(filter(None, (side.row, point))) for point in wanted if not cells[side, point]]
        missing += lost or ([] if wanted else [side.row])
        commits |= {run.commit[:10] for run in selection.runs if run.row == side.row and run.point in wanted}
    values = tuple(value for found in cells.values() for value in found)
    n_seeds = min((len(found) for found in cells.values() if found), default=0)
    decision = _missing(missing, cells) if missing else TESTS[claim.test](claims, claim, cells)
    return Verdict(
        claim=claim,
        protocol=protocol,
        profile=profile,
        outcome=decision.outcome,
        finding=decision.finding,
        threshold=_threshold(claim, claims),
        n_seeds=n_seeds,
        standing=_standing(decision.outcome, profile, n_seeds, claims.least_seeds),
        interval=decision.interval,
        values=values,
        commits=tuple(sorted(commits - {""})),
    )


def _values(selection: Selection, side: Side, point: str, claim: Claim) -> list[Value]:
    found = []
    statistic = selection.plan.statistic
    for run in selection.runs_of(side.row, point):
        end = end_of(run, claim.metric, statistic)
        lost = diverged(run, claim.metric) and (statistic == "last" or end is None)
        if end is not None or lost:
            value = math.nan if lost or end is None else end.value
            found.append(Value(side.experiment, side.row, point, run.seed, run.key, value))
    return found


def _missing(missing: Sequence[str], cells: Cells) -> Decision:
    n_there = sum(bool(found) for found in cells.values())
    names = "; ".join(missing[:MOST_NAMED])
    more = len(missing) - MOST_NAMED
    text = f"{n_there} of {n_there + len(missing)} are there; missing: {names}{f' and {more} more' if more > 0 else ''}"
    return Decision(UNTESTED, text)


def _standing(outcome: str, profile: str, n_seeds: int, least: int) -> str:
    if outcome == UNTESTED:
        return ""
    return "settled" if profile == SETTLING_PROFILE and n_seeds >= least else "not settled"


def seeds(count: int) -> str:
    """How many seeds, in words."""
    return "one seed" if count == 1 else f"{count} seeds"


def _threshold(claim: Claim, claims: Claims) -> str:
    if claim.test == "capacity":
        low, high = claim.ratio
        return f"loss above {claim.solved:g} first at S between {low:g} and {high:g} d_dot, in rising order"
    pairs = "; ".join(f"{pair.better} against {pair.worse}" for pair in claim.pairs)
    if claim.scale == "ratio":
        beyond = f"by a factor above {claim.margin:g}"
    elif claim.margin < 0:
        beyond = f"worse by less than {-claim.margin:g}"
    else:
        beyond = f"better by more than {claim.margin:g}" if claim.margin else "better"
    level = f"{claims.confidence:.0%}"
    if claim.test == "over_points":
        return f"{pairs}: {beyond} at more than half of the points ({level} interval of the share)"
    return f"{pairs}: {beyond} ({level} interval over seeds)"


# --- tests -----------------------------------------------------------------------------------------------------------


def _advantage(claim: Claim, better: float, worse: float) -> float:
    """By how much `better` is better; infinite where one side diverged, NaN where both did."""
    if math.isnan(better) or math.isnan(worse):
        return math.nan if math.isnan(better) and math.isnan(worse) else math.inf if math.isnan(worse) else -math.inf
    lower = claim.metric.better == "lower"
    if claim.scale == "ratio":
        return math.log(worse / better if lower else better / worse)
    return worse - better if lower else better - worse


def _limit(claim: Claim) -> float:
    return math.log(claim.margin) if claim.scale == "ratio" else claim.margin


def _over_points(claims: Claims, claim: Claim, cells: Cells) -> Decision:
    """The share of points at which `better` wins by more than the margin, all pairs together."""
    from scipy.stats import binomtest

    gains = [gain for pair in claim.pairs for gain in _gains_at_points(claim, pair, cells)]
    won = sum(gain > _limit(claim) for gain in gains)
    exact = binomtest(won, len(gains)).proportion_ci(claims.confidence, "exact")
    interval = Interval(won / len(gains), float(exact.low), float(exact.high))
    finite = [gain for gain in gains if math.isfinite(gain)]
    median = f", median difference {wording.number(statistics.median(finite))}" if finite else ""
    text = f"at {won} of {len(gains)} points (share {_range(interval)}){median}"
    return Decision(*_decide(interval, 0.5, text), interval)


def _gains_at_points(claim: Claim, pair: Comparison, cells: Cells) -> list[float]:
    points = _points_of(pair, cells)
    return [
        _advantage(claim, _mean_at(pair.better, index, points, cells), _mean_at(pair.worse, index, points, cells))
        for index in range(max(len(found) for found in points.values()))
    ]


def _points_of(pair: Comparison, cells: Cells) -> dict[Side, list[str]]:
    return {
        side: [point for row, point in cells if row == side] for side in (pair.better, pair.worse) if side.level is None
    }


def _mean_at(side: Side, index: int, points: dict[Side, list[str]], cells: Cells) -> float:
    if side.level is not None:
        return side.level
    return statistics.fmean(value.value for value in cells[side, points[side][index]])


def _over_seeds(claims: Claims, claim: Claim, cells: Cells) -> Decision:
    """The mean difference of each pair over the seeds that both rows have; every pair must hold."""
    decisions = [_of_pair(claims, claim, pair, cells) for pair in claim.pairs]
    outcomes = {decision.outcome for decision in decisions}
    outcome = FAILS if FAILS in outcomes else UNTESTED if UNTESTED in outcomes else HOLDS
    text = "; ".join(dict.fromkeys(decision.finding for decision in decisions))
    return Decision(outcome, text, decisions[0].interval if len(decisions) == 1 else None)


def _of_pair(claims: Claims, claim: Claim, pair: Comparison, cells: Cells) -> Decision:
    better, worse = (_by_seed(side, cells) for side in (pair.better, pair.worse))
    common = sorted(set(better or worse) & set(worse or better))
    if len(common) < claims.least_seeds:
        return Decision(UNTESTED, f"{seeds(len(common))} where the test needs {claims.least_seeds}")
    level = {pair.better: pair.better.level, pair.worse: pair.worse.level}
    gains = [
        _advantage(claim, better.get(seed, level[pair.better]), worse.get(seed, level[pair.worse]))  # type: ignore[arg-type]
        for seed in common
    ]
    name = f"{pair.better} against {pair.worse}"
    if not all(map(math.isfinite, gains)):
        return _of_diverged(name, gains)
    interval = _student(gains, claims.confidence)
    shown = _as_ratios(interval) if claim.scale == "ratio" else interval
    threshold = f", where more than {wording.number(claim.margin)} is asked for" if claim.margin else ""
    text = f"{name}: {wording.number(shown.estimate)} ({_range(shown)}){threshold}"
    return Decision(*_decide(interval, _limit(claim), text), shown)


def _by_seed(side: Side, cells: Cells) -> dict[int, float]:
    """The mean over points of each seed that has them all."""
    found = defaultdict(list)
    points = [values for (row, _), values in cells.items() if row == side]
    for values in points:
        for value in values:
            found[value.seed].append(value.value)
    return {seed: statistics.fmean(several) for seed, several in found.items() if len(several) == len(points)}


def _of_diverged(name: str, gains: Sequence[float]) -> Decision:
    n_worse, n_better = gains.count(math.inf), gains.count(-math.inf)
    text = f"{name}: the second diverged in {n_worse} of {len(gains)} seeds, the first in {n_better}"
    outcome = HOLDS if n_worse == len(gains) else FAILS if n_better == len(gains) else UNTESTED
    return Decision(outcome, text)


def _student(values: Sequence[float], confidence: float) -> Interval:
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _as_ratios(interval: Interval) -> Interval:
    return Interval(*(math.exp(end) for end in (interval.estimate, interval.low, interval.high)))


def _decide(interval: Interval, limit: float, text: str) -> tuple[str, str]:
    if interval.low > limit:
        return HOLDS, text
    if interval.high < limit:
        return FAILS, text
    return UNTESTED, f"undecided, the interval holds the threshold: {text}"


def _capacity(claims: Claims, claim: Claim, cells: Cells) -> Decision:
    """Between which sizes each row breaks; outside of the band, or not in the order of d_dot, it does not hold."""
    brackets = [(side, size, _bracket(claim, side, cells)) for side, size in claim.d_dot]
    text = "; ".join(
        f"{side} breaks {_between(low, high)}, {wording.number(low / size)} to {wording.number(high / size)} d_dot"
        for side, size, (low, high) in brackets
    )
    least, most = claim.ratio
    outside = any(high < least * size or low > most * size for _, size, (low, high) in brackets)
    # the first size that is not solved counts where the grid is fine enough to tell
    inside = all(
        least * size <= high <= most * size and high - low <= (most - least) * size for _, size, (low, high) in brackets
    )
    ends = [bracket for _, _, bracket in brackets]
    rising = all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    falling = any(before[0] >= after[1] for before, after in itertools.pairwise(ends))
    if outside or falling:
        return Decision(FAILS, text)
    return (
        Decision(HOLDS, text) if inside and rising else Decision(UNTESTED, f"undecided, the grid is too coarse: {text}")
    )


def _bracket(claim: Claim, side: Side, cells: Cells) -> tuple[float, float]:
    """The largest S up to which all are solved, and the smallest that is not; a run that diverged has not solved it."""
    means = {
        float(wording.point_value(point)[1]): statistics.fmean(value.value for value in values)
        for (row, point), values in cells.items()
        if row == side
    }
    broken = min((size for size, value in means.items() if not value <= claim.solved), default=math.inf)
    return max((size for size in means if size < broken), default=0.0), broken


def _between(low: float, high: float) -> str:
    return f"between S = {low:g} and {high:g}" if math.isfinite(high) else f"above S = {low:g}"


def _range(interval: Interval) -> str:
    return f"{wording.number(interval.low)} to {wording.number(interval.high)}"


TESTS: dict[str, Callable[[Claims, Claim, Cells], Decision]] = {
    "over_points": _over_points,
    "over_seeds": _over_seeds,
    "capacity": _capacity,
}
