"""How numbers, cells and provenance read in tables, figures, the page and README."""

from __future__ import annotations

import math

from reports.plan import Metric, Plan
from reports.selection import Cell, Selection, Summary
from reports.sources import Reference

MINUS = "\u2212"
# the paper's letters for grid keys
SYMBOLS = {"n_keys": "S"}


def number(value: float, digits: int | None = None) -> str:
    """Writes a number with `digits` after the point, or with three significant ones; a NaN is a dash."""
    if not math.isfinite(value):
        return "--" if math.isnan(value) else str(value)
    if digits is not None:
        return f"{value:.{digits}f}".replace("-", MINUS)
    size = abs(value)
    if size == 0:
        return "0"
    if size < 9.995e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.{decimals(size)}f}".replace("-", MINUS)


def decimals(size: float) -> int:
    """Digits after the point that leave three significant ones, four at most."""
    return min(4, max(0, 2 - math.floor(math.log10(float(f"{size:.2e}")))))


def summary(found: Summary, digits: int | None = None) -> str:
    """Ours: `0.172 ± 0.004 (3)`; with runs missing `0.172 (1/3)`; none `-- (0/3)`; NaN in all `diverged (3)`."""
    count = str(found.n_found) if found.n_found == found.n_planned else f"{found.n_found}/{found.n_planned}"
    if not found.n_found:
        return f"-- (0/{found.n_planned})"
    if not found.values:
        return f"diverged ({count})"
    text = number(found.mean, digits)
    if len(found.values) > 1:
        text += f" ± {_spread(found, digits)}"
    return f"{text} ({count}, {found.n_diverged} diverged)" if found.n_diverged else f"{text} ({count})"


def brief(found: Summary, digits: int | None = None) -> str:
    """As `summary`, but the number of runs only where some are missing or diverged among others."""
    if found.n_found and not found.n_missing and not (found.values and found.n_diverged):
        return summary(found, digits).rpartition(" (")[0]
    return summary(found, digits) if found.n_found else "--"


def _spread(found: Summary, digits: int | None) -> str:
    # the spread is given to the mean's last digit; below that it is written out
    if digits is None and abs(found.mean) >= 9.995e-4:
        places = decimals(abs(found.mean))
        if found.std >= 0.5 * 10**-places or found.std == 0:
            digits = places
    return number(found.std, digits)


def steps(found: Summary) -> str:
    """Mean number of steps, as in `3,300`."""
    return f"{found.mean:,.0f}" if found.values else "--"


def reference(found: Reference | None, digits: int | None = None) -> str:
    """The paper's or a released run's number: a bound as printed, else as ours is written."""
    if found is None:
        return "--"
    if found.is_bound:
        return found.printed
    return "diverged" if math.isnan(found.value) else number(found.value, digits)


def released(cell: Cell, statistic: str) -> str:
    """The reference of one cell."""
    return reference(cell.released.get(statistic), cell.metric.digits)


def released_steps(cell: Cell, statistic: str) -> str:
    """The number of steps of the released run."""
    reference = cell.released_steps.get(statistic)
    return "--" if reference is None or math.isnan(reference.value) else f"{reference.value:,.0f}"


def difference(cell: Cell, statistic: str) -> str:
    """Ours minus theirs, with its sign."""
    value = cell.difference(statistic)
    if math.isnan(value):
        return "--"
    return ("+" if value > 0 else "") + number(value, cell.metric.digits)


def hours(selection: Selection) -> str:
    """Measured time of the runs together."""
    value = selection.hours
    return f"{value:.1f} h" if value >= 1 else f"{value:.2f} h ({value * 60:.1f} min)"


def duration(seconds: float) -> str:
    """The time of one run in hours, minutes or seconds, whichever is short."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def completeness(selection: Selection) -> str:
    """How many of the planned runs are there, and what is wrong with the others."""
    plan = selection.plan
    text = f"{selection.n_found} of {plan.n_planned} runs"
    extra = len(selection.runs) - selection.n_found
    if extra:
        text += f", {extra} with further seeds"
    if selection.n_failed:
        text += f", {selection.n_failed} failed"
    if selection.n_other_settings:
        text += f", {selection.n_other_settings} made with other settings than the experiment file has now"
    if selection.n_old_version:
        text += f"; {selection.n_old_version} of another version of the protocol left out"
    return text


def provenance(selection: Selection) -> str:
    """One line with the command, the commits, the number of runs and the newest of them."""
    parts = [selection.plan.redraw, f"commit {', '.join(selection.commits) or 'unknown'}", completeness(selection)]
    if selection.newest:
        parts.append(f"newest run {selection.newest}")
    return " · ".join(parts)


def setting(selection: Selection) -> str:
    """Profile and protocol in words."""
    return f"{selection.plan.profile} profile · {selection.plan.protocol} protocol"


def point_value(point: str) -> tuple[str, str]:
    """Splits `n_keys=100` into the paper's letter S and the value; a point of several keys is kept whole."""
    key, equals, value = point.partition("=")
    return (SYMBOLS.get(key, key), value) if equals and "=" not in value else ("point", point)


def column(plan: Plan, point: str, metric: Metric) -> str:
    """`small test`: what a table's column holds; the point is the title's where it is the only one."""
    return " ".join(part for part in ("" if only_point(plan) else point_value(point)[1], metric.label) if part)


def only_point(plan: Plan) -> str:
    """`S = 60` where a report shows one point alone; empty where it shows several, or an experiment without grid."""
    if len(plan.points) != 1 or not plan.points[0]:
        return ""
    parts = (point_value(part) for part in plan.points[0].split(", "))
    return ", ".join(f"{key} = {value}" for key, value in parts)


def place(plan: Plan) -> str:
    """The one point shown, if it is one, and where the paper has the original."""
    return " · ".join(part for part in (only_point(plan), plan.source) if part)


def value_label(plan: Plan) -> str:
    """The name of a plot's y axis, with the statistic: `best validation loss`; a curve shows every evaluation."""
    label = plan.spec.y.label or plan.spec.metrics[0].label
    return f"{plan.statistic} {label}" if plan.spec.kind == "capacity_plot" else label
