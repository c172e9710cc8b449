"""Keeps README's results block equal to results/*.csv."""

from __future__ import annotations

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Experiment, Project, View, load_experiment
from reports import wording
from reports.plan import Plan, load_plan, report_names
from reports.selection import Cell, Selection, collect, select
from reports.sources import Results
from reports.tables import Table, markdown_lines

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BEST_FIRST = ("paper", "short", "smoke")
"""the block shows the profile nearest to the paper that has runs"""


def rewrite(project: Project, results: Results, *, check: bool) -> str:
    """Brings README's block up to date, or with `check` refuses a stale one; returns what was done."""
    path = project.root / "README.md"
    if not path.exists():
        raise UserError(f"{path} is not there; the results block needs a README with {BEGIN} and {END}.")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} needs one line {BEGIN} and below it one line {END}.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    fresh = f"{before}{BEGIN}\n{block(project, results)}\n{END}{after}"
    if fresh == text:
        return "README.md: the results block is up to date"
    if check:
        raise UserError("README.md: the results block is stale; run `python -m reports readme`.")
    path.write_text(fresh, encoding="utf-8", newline="\n")
    return "README.md: results block rewritten"


def block(project: Project, results: Results) -> str:
    """A compact table for each experiment whose `report:` section names points for README."""
    parts = []
    for name in report_names(project):
        experiment = load_experiment(name, project)
        if isinstance(experiment, View):
            continue
        profile = _profile(experiment, results)
        plan = load_plan(project, name, profile)
        if plan.spec.readme:
            others = [protocol for protocol in experiment.protocols if protocol != plan.protocol]
            plans = [plan, *(load_plan(project, name, profile, protocol) for protocol in others)]
            parts.append(_section([select(plan, results) for plan in plans], results))
    return "\n\n".join(parts) or "No experiment names points for this block."


def _profile(experiment: Experiment, results: Results) -> str:
    there = {run.profile for run in results.runs if run.experiment == experiment.name and run.status != "failed"}
    known = [profile for profile in BEST_FIRST if profile in experiment.profiles]
    return next((profile for profile in known if profile in there), known[-1])


def _section(selections: list[Selection], results: Results) -> str:
    plan = selections[0].plan
    profile = f"{plan.profile} profile"
    states = "; ".join(f"{selection.plan.protocol}: {wording.completeness(selection)}" for selection in selections)
    head = f"**{plan.title}** ({plan.source}), {profile}. Runs: {states}. Redraw: `python -m reports {plan.name}`."
    return "\n".join([head, "", *markdown_lines(_table(selections, results))])


def _table(selections: list[Selection], results: Results) -> Table:
    """Three lines per method: the authors' released run, and ours under each protocol."""
    first = selections[0].plan
    points = first.spec.readme
    header = ("method", "runs", *points)
    tables = [({(c.row, c.point): c for c in collect(s, results)}, s.plan) for s in selections]
    lines = []
    for row in first.rows:
        reference = [_theirs(results, first, row, point) for point in points]
        lines.append((row, f"authors' released, {first.statistic}", *reference))
        for cells, plan in tables:
            label = f"ours, {plan.protocol} protocol, {plan.statistic}"
            lines.append(("", label, *(_ours(cells.get((row, point)), plan) for point in points)))
    return Table(header, tuple(lines), 2)


def _ours(cell: Cell | None, plan: Plan) -> str:
    # a point that the profile does not have
    return wording.summary(cell.ours[plan.statistic], cell.metric.digits) if cell else ""


def _theirs(results: Results, plan: Plan, row: str, point: str) -> str:
    metric = plan.spec.metrics[0]
    split, _, name = metric.name.rpartition("/")
    reference = results.references.get((plan.runs_of, row, point, split, f"{plan.statistic}_{name}"))
    return wording.reference(reference, metric.digits)
