"""`python -m reports figure2 figure5`: draws the named reports, or all of them, from results/*.csv."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Project, find_project
from fwp_lightning.registry import did_you_mean
from reports import benchmarks, figures, page, readme, tables
from reports.plan import load_plan, report_names, runs_of
from reports.selection import Selection, collect, select
from reports.sources import Results, read_results

PROFILES = ("paper", "short", "smoke")
"""the order of the page: what proves most comes first"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws what is asked for; a mistake is one sentence and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        project = Project(options.root.resolve()) if options.root else find_project()
        results = read_results(project.root)
        if options.names == ["readme"]:
            print(readme.rewrite(project, results, check=options.check))
            return 0
        if options.check:
            raise UserError("--check belongs to `python -m reports readme`.")
        with _writing(project.root / "reports" / "output"):
            if options.names == [benchmarks.NAME] or (not options.names and benchmarks.read(project.root)):
                for path in benchmarks.draw(project.root):
                    print(f"{benchmarks.NAME}: {_shown(path, project.root)}")
            return 0 if options.names == [benchmarks.NAME] else draw(project, results, options.names)
    except UserError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2


def draw(project: Project, results: Results, names: Sequence[str]) -> int:
    """Writes the named reports (none: all) and the page with everything there is; returns the exit code."""
    known = report_names(project)
    for name in names:
        if name not in known:
            raise UserError(f"there is no report {name!r}. {did_you_mean(name, [*known, 'bench', 'readme'])}")
    empty = [name for name in known if runs_of(project, name) not in results.experiments]
    if not names and len(empty) == len(known):
        raise UserError("no runs for any report in results/runs.csv; run `make smoke` first.")
    output = project.root / "reports" / "output"
    entries = []
    for selection in selections(project, results, [name for name in known if name not in empty]):
        cells = collect(selection, results)
        entry = page.entry_of(selection, cells)
        entries.append(entry)
        if not names or selection.plan.name in names:
            _save(output, entry, project.root)
    if entries:
        page.write(output / "index.html", entries)
        print(f"page: {_shown(output / 'index.html', project.root)}")
    for name in names or known:
        if name in empty:
            print(
                f"reports: no runs for {name} in results/runs.csv; run `make reproduce-{name}` first.", file=sys.stderr
            )
    return 2 if set(names) & set(empty) else 0


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
    return sorted(
        found,
        key=lambda selection: (
            PROFILES.index(selection.plan.profile),
            not selection.plan.is_default_protocol,
            selection.plan.protocol,
            order[selection.plan.name],
        ),
    )


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"reports cannot be written below {output}: {sentence_of(error)}.") from error


def _save(output: Path, entry: page.Entry, root: Path) -> None:
    selection, plan = entry.selection, entry.selection.plan
    stem = output / plan.profile / plan.protocol / plan.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = tables.save(tables.build(selection, entry.cells), stem, selection, entry.cells)
    if entry.figure is not None:
        paths = figures.save(entry.figure, stem, selection) + paths
    suffixes = ",".join(path.suffix[1:] for path in paths)
    state = f"{selection.n_found}/{plan.n_planned} runs"
    print(f"{plan.name} ({plan.profile}, {plan.protocol}, {state}): {_shown(stem, root)}.{{{suffixes}}}")


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports",
        description="Draws tables, figures and one HTML page from results/*.csv; trains nothing.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="figure2, ...; none for all; bench; readme for README's blocks"
    )
    parser.add_argument("--check", action="store_true", help="with readme: fail when the block is stale, write nothing")
    parser.add_argument("--root", type=Path, help="project root (default: found from the current folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
