"""Keeps README's blocks, results and benchmarks, equal to results/*.csv."""

from __future__ import annotations

from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Experiment, Project, View, load_experiment
from reports import benchmarks, wording
from reports.plan import Plan, load_plan, report_names
from reports.selection import Cell, Selection, collect, select
from reports.sources import Results
from reports.tables import Table, markdown_lines, markdown_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BEST_FIRST = ("paper", "short", "smoke")
"""the block shows the profile nearest to the paper that has runs"""


def rewrite(project: Project, results: Results, *, check: bool) -> str:
    """Brings README's block up to date, or with `check` refuses a stale one; returns what was done."""
    path = project.root / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else sentence_of(error)
        raise UserError(f"{path} cannot be read: {reason}; the block needs a README with {BEGIN} and {END}.") from error
    fresh = _replaced(path, text, (BEGIN, END), block(project, results))
    # a README need not have it
    if benchmarks.BEGIN in text:
        fresh = _replaced(path, fresh, (benchmarks.BEGIN, benchmarks.END), benchmarks.block(project.root))
    if fresh == text:
        return "README.md: the results block is up to date"
    if check:
        raise UserError("README.md: the results block is stale; run `python -m reports readme`.")
    try:
        path.write_text(fresh, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {sentence_of(error)}.") from error
    return "README.md: results block rewritten"


def _replaced(path: Path, text: str, marks: tuple[str, str], content: str) -> str:
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{path} needs one line {begin} and below it one line {end}.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def block(project: Project, results: Results) -> str:
    """For each protocol a compact table of every experiment whose `report:` section names points for README."""
    plans: dict[str, list[Plan]] = {}
    for name in report_names(project):
        experiment = load_experiment(name, project)
        if isinstance(experiment, View):
            continue
        profile = _profile(experiment, results)
        # the experiment's own protocol comes first
        for protocol in dict.fromkeys([experiment.protocol, *experiment.protocols]):
            plan = load_plan(project, name, profile, protocol)
            if plan.spec.readme:
                plans.setdefault(protocol, []).append(plan)
    parts = [_protocol(protocol, members, results) for protocol, members in plans.items()]
    return "\n\n".join(parts) or "No experiment names points for this block."


def _profile(experiment: Experiment, results: Results) -> str:
    there = {run.profile for run in results.runs if run.experiment == experiment.name and run.status != "failed"}
    known = [profile for profile in BEST_FIRST if profile in experiment.profiles]
    return next((profile for profile in known if profile in there), known[-1])


def _protocol(protocol: str, plans: list[Plan], results: Results) -> str:
    labels = " or ".join(dict.fromkeys(wording.value_label(plan) for plan in plans))
    note = "" if protocol == "released" else " The authors' runs follow the released protocol."
    if any((row, point) not in plan.seeds for plan in plans for row in plan.rows for point in plan.spec.readme):
        note += " Where a cell is empty, the profile has no such run."
    head = f"### Protocol `{protocol}`\n\nOurs / the authors' released run, {labels}.{note}"
    return "\n\n".join([head, *(_section(select(plan, results), results) for plan in plans)])


def _section(selection: Selection, results: Results) -> str:
    plan = selection.plan
    origin = ", ".join(part for part in (markdown_text(plan.source.split(",")[0]), f"profile `{plan.profile}`") if part)
    head = f"**{markdown_text(plan.title)}**: {origin}, {wording.completeness(selection)}."
    return "\n".join([head, "", *markdown_lines(_table(selection, results))])


def _table(selection: Selection, results: Results) -> Table:
    """One line per method, one column per point, in each cell ours and the authors'."""
    plan = selection.plan
    cells = {(cell.row, cell.point): cell for cell in collect(selection, results)}
    header = ("method", *(" = ".join(wording.point_value(point)) for point in plan.spec.readme))
    lines = [(row, *(_pair(cells.get((row, point)), plan) for point in plan.spec.readme)) for row in plan.rows]
    return Table(header, tuple(lines), 1, ())


def _pair(cell: Cell | None, plan: Plan) -> str:
    # a point that the profile does not have stays empty
    if cell is None:
        return ""
    return f"{wording.brief(cell.ours[plan.statistic], cell.metric.digits)} / {wording.released(cell, plan.statistic)}"
