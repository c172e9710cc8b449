"""Draws reports into a folder: tables, figures, and one page with everything there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project
from fwp_lightning.registry import did_you_mean
from reports import family_table, figures, page, tables, verdict_tables
from reports.family_table import Family
from reports.plan import load_plan, report_names, runs_of
from reports.selection import Selection, collect, select
from reports.sources import Results
from reports.verdicts import Verdict

PROFILES = ("paper", "short-gpu", "short", "smoke")
"""the order of the page: what proves most comes first"""
OTHERS = (verdict_tables.NAME, family_table.NAME, "bench", "readme")
"""what can be asked for beside the experiments"""


def draw(
    project: Project, results: Results, names: Sequence[str], output: Path, say: Callable[[str], None] = print
) -> list[str]:
    """Writes the named reports (none: all) and the page with everything there is; returns those without runs."""
    known = report_names(project)
    for name in names:
        if name not in known:
            raise UserError(f"there is no report {name!r}. {did_you_mean(name, [*known, *OTHERS])}")
    empty = [name for name in known if runs_of(project, name) not in results.experiments]
    if not names and len(empty) == len(known):
        raise UserError("no runs for any report in results/runs.csv; run `make smoke` first.")
    entries = []
    for selection in selections(project, results, [name for name in known if name not in empty]):
        entry = page.entry_of(selection, collect(selection, results))
        entries.append(entry)
        if not names or selection.plan.name in names:
            say(_save(output, entry, project.root))
    verdicts = verdict_tables.verdicts_of(project, results)
    if verdicts and not names:
        say(_save_verdicts(verdicts, output, project.root))
    families = family_table.families(project, results)
    # the table of a profile belongs to each experiment that it sums up
    if families and (not names or family_table.EXPERIMENTS.keys() & set(names)):
        say(_save_families(families, output, project.root))
    if entries:
        page.write(output / "index.html", entries, verdicts, families)
        say(f"page: {shown(output / 'index.html', project.root)}")
    return [name for name in names or known if name in empty]


def draw_verdicts(project: Project, results: Results, output: Path, say: Callable[[str], None] = print) -> None:
    """Says and writes what holds of the paper's claims."""
    verdicts = verdict_tables.verdicts_of(project, results)
    if not verdicts:
        raise UserError("there are no claims: write them in experiments/claims.yaml.")
    say(verdict_tables.to_text(verdicts))
    say(_save_verdicts(verdicts, output, project.root))


def draw_families(project: Project, results: Results, output: Path, say: Callable[[str], None] = print) -> None:
    """Says and writes who of the family stores how much, who overwrites, at what cost."""
    families = family_table.families(project, results)
    if not families:
        named = ", ".join(family_table.EXPERIMENTS)
        raise UserError(f"no runs of {named} in results/runs.csv; run `make reproduce-{family_table.STORING}` first.")
    say(family_table.to_text(families))
    say(_save_families(families, output, project.root))


def _save_families(families: Sequence[Family], output: Path, root: Path) -> str:
    paths = family_table.save(families, output)
    return f"{family_table.NAME}: {', '.join(shown(path, root) for path in paths)}"


def _save_verdicts(verdicts: Sequence[Verdict], output: Path, root: Path) -> str:
    paths = verdict_tables.save(verdicts, output)
    return f"{verdict_tables.NAME}: {', '.join(shown(path, root) for path in paths)}"


def selections(project: Project, results: Results, names: Sequence[str]) -> list[Selection]:
    """The runs of the named reports for each profile and protocol that has some, in the order of the page."""
    found = []
    for name in names:
        parent = runs_of(project, name)
        places = {(run.profile, run.protocol) for run in results.runs if run.experiment == parent}
        try:
            plans = [load_plan(project, name, profile, protocol) for profile, protocol in sorted(places)]
        except UserError as error:
            raise UserError(f"{name} cannot be drawn from results/runs.csv: {error}") from error
        found += [selection for plan in plans if (selection := select(plan, results)).runs]
    order = {name: number for number, name in enumerate(names)}
    # a group of the page is a profile and a protocol; the protocol comes first that the first report has by default
    ranks: dict[tuple[str, str], tuple[bool, int]] = {}
    for plan in (selection.plan for selection in found):
        rank = (not plan.is_default_protocol, order[plan.name])
        ranks[plan.profile, plan.protocol] = min(rank, ranks.get((plan.profile, plan.protocol), rank))

    def place_of(selection: Selection) -> tuple[object, ...]:
        plan = selection.plan
        group = ranks[plan.profile, plan.protocol]
        return PROFILES.index(plan.profile), group, plan.protocol, order[plan.name]

    return sorted(found, key=place_of)


def _save(output: Path, entry: page.Entry, root: Path) -> str:
    selection, plan = entry.selection, entry.selection.plan
    stem = output / plan.profile / plan.protocol / plan.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = tables.save(tables.build(selection, entry.cells), stem, selection, entry.cells)
    if entry.figure is not None:
        paths = figures.save(entry.figure, stem, selection) + paths
    suffixes = ",".join(path.suffix[1:] for path in paths)
    state = f"{selection.n_found}/{plan.n_planned} runs"
    return f"{plan.name} ({plan.profile}, {plan.protocol}, {state}): {shown(stem, root)}.{{{suffixes}}}"


def shown(path: Path, root: Path) -> str:
    """A path as it is told: from the project's root where it lies there."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
