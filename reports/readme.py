"""Keeps README's blocks equal to results/*.csv, and the table of the family to the registry's classes."""

from __future__ import annotations

from pathlib import Path

from fwp_lightning.attention import catalog
from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Experiment, Project, View, load_experiment
from reports import benchmarks, family_table, verdict_tables, wording
from reports.plan import Plan, load_plan, report_names
from reports.selection import Cell, Selection, collect, select
from reports.sources import Results
from reports.tables import Table, is_compared, markdown_lines, markdown_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README, FAMILY = Path("README.md"), Path("fwp_lightning") / "attention" / "README.md"
BLOCKS = {README: "results block", FAMILY: "table of the family"}
FAMILY_BEGIN, FAMILY_END = "<!-- family:begin -->", "<!-- family:end -->"
BEST_FIRST = ("paper", "short-gpu", "short", "smoke")
"""the block shows the profile nearest to the paper that has runs"""


def rewrite(project: Project, results: Results, *, check: bool) -> str:
    """Brings the blocks up to date, or with `check` refuses stale ones; returns what was done."""
    fresh = {README: _with_results(project, results)}
    # a project of the user's own has no registry
    if (project.root / FAMILY).is_file():
        text = _text(project.root / FAMILY)
        fresh[FAMILY] = _replaced(FAMILY, text, (FAMILY_BEGIN, FAMILY_END), catalog.family_table())
    stale = [path for path, content in fresh.items() if content != _text(project.root / path)]
    if not stale:
        return "README.md: the results block is up to date"
    if check:
        raise UserError(f"{stale[0]}: the {BLOCKS[stale[0]]} is stale; run `python -m reports readme`.")
    for path in stale:
        try:
            (project.root / path).write_text(fresh[path], encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{project.root / path} cannot be written: {sentence_of(error)}.") from error
    return "\n".join(f"{path}: {BLOCKS[path]} rewritten" for path in stale)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else sentence_of(error)
        raise UserError(f"{path} cannot be read: {reason}; the block needs a README with {BEGIN} and {END}.") from error


def _with_results(project: Project, results: Results) -> str:
    path = project.root / "README.md"
    text = _text(path)
    fresh = _replaced(path, text, (BEGIN, END), block(project, results))
    # a README need not have the others
    if verdict_tables.BEGIN in text:
        verdicts = verdict_tables.block(verdict_tables.verdicts_of(project, results))
        fresh = _replaced(path, fresh, (verdict_tables.BEGIN, verdict_tables.END), verdicts)
    if family_table.BEGIN in text:
        table = family_table.block(family_table.families(project, results))
        fresh = _replaced(path, fresh, (family_table.BEGIN, family_table.END), table)
    if benchmarks.BEGIN in text:
        fresh = _replaced(path, fresh, (benchmarks.BEGIN, benchmarks.END), benchmarks.block(project.root))
    return fresh


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
    parts += _tables(project, results)
    return "\n\n".join(parts) or "No experiment names points for this block."


def _tables(project: Project, results: Results) -> list[str]:
    """Ours beside the paper's numbers, where it has any, for every table with runs of more than the profile smoke."""
    sections = []
    for name in report_names(project):
        experiment = load_experiment(name, project)
        if isinstance(experiment, View) or (profile := _profile(experiment, results)) == BEST_FIRST[-1]:
            continue
        for protocol in dict.fromkeys([experiment.protocol, *experiment.protocols]):
            plan = load_plan(project, name, profile, protocol)
            selection = select(plan, results)
            if plan.spec.kind == "table" and selection.runs and is_compared(collect(selection, results)):
                sections.append(_table_section(selection, results))
    if not sections:
        return []
    note = "In profiles other than `paper` texts and models are smaller: compare rows, not numbers."
    return [f"### Tables\n\nOurs / the paper. {note}", *sections]


def _table_section(selection: Selection, results: Results) -> str:
    """One line per row, one column per point and metric that the paper has a number of."""
    plan = selection.plan
    cells = {(cell.row, cell.point, cell.metric.name): cell for cell in collect(selection, results)}
    known = {key[1:] for key, cell in cells.items() if cell.released}
    columns = [
        (point, metric) for point in plan.points for metric in plan.spec.metrics if (point, metric.name) in known
    ]
    header = ("model", *(wording.column(plan, point, metric) for point, metric in columns))
    rows = [name for row in plan.rows for name in plan.spec.lines_of(row)]
    lines = [(row, *(_pair(cells.get((row, point, metric.name)), plan) for point, metric in columns)) for row in rows]
    body = markdown_lines(Table(header, tuple(lines), 1))
    deviations = [f"* {markdown_text(what)}" for what in plan.deviations]
    return "\n".join([_headline(selection, f", protocol `{plan.protocol}`"), "", *body, "", *deviations])


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
    return "\n".join([_headline(selection), "", *markdown_lines(_table(selection, results))])


def _headline(selection: Selection, protocol: str = "") -> str:
    plan = selection.plan
    origin = ", ".join(part for part in (markdown_text(plan.source.split(",")[0]), f"profile `{plan.profile}`") if part)
    return f"**{markdown_text(plan.title)}**: {origin}{protocol}, {wording.completeness(selection)}."


def _table(selection: Selection, results: Results) -> Table:
    """One line per method, one column per point, in each cell ours and the authors'."""
    plan = selection.plan
    cells = {(cell.row, cell.point): cell for cell in collect(selection, results)}
    header = ("method", *(" = ".join(wording.point_value(point)) for point in plan.spec.readme))
    lines = [(row, *(_pair(cells.get((row, point)), plan) for point in plan.spec.readme)) for row in plan.rows]
    return Table(header, tuple(lines), 1)


def _pair(cell: Cell | None, plan: Plan) -> str:
    # a point that the profile does not have stays empty
    if cell is None:
        return ""
    return f"{wording.brief(cell.ours[plan.statistic], cell.metric.digits)} / {wording.released(cell, plan.statistic)}"
