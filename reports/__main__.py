"""`python -m reports figure2 figure5`: draws the named reports, or all of them, from results/*.csv."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.experiment import Project, find_project
from reports import benchmarks, comparison, family_table, readme, verdict_tables
from reports.drawing import draw, draw_families, draw_verdicts, shown
from reports.sources import read_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws what is asked for; a mistake is one sentence and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        project = Project(options.root.resolve()) if options.root else find_project()
        if options.compare:
            print(comparison.compare(project, options.compare, options.names, options.csv))
            return 0
        if options.csv:
            raise UserError("--csv belongs to --compare.")
        results = read_results(project.root)
        if options.names == ["readme"]:
            print(readme.rewrite(project, results, check=options.check))
            return 0
        if options.check:
            raise UserError("--check belongs to `python -m reports readme`.")
        output = project.root / "reports" / "output"
        with _writing(output):
            if options.names == [benchmarks.NAME] or (not options.names and benchmarks.read(project.root)):
                for path in benchmarks.draw(project.root, output):
                    print(f"{benchmarks.NAME}: {shown(path, project.root)}")
            if options.names == [benchmarks.NAME]:
                return 0
            if options.names == [verdict_tables.NAME]:
                draw_verdicts(project, results, output)
                return 0
            if options.names == [family_table.NAME]:
                draw_families(project, results, output)
                return 0
            empty = draw(project, results, options.names, output)
        if empty:
            said = f"no runs for {', '.join(empty)} in results/runs.csv; run `make reproduce-{empty[0]}` first"
            print(f"reports: {said}{', and so on' if len(empty) > 1 else ''}.", file=sys.stderr)
        return 2 if options.names and empty else 0
    except UserError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"reports cannot be written below {output}: {sentence_of(error)}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports",
        description="Draws tables, figures and one HTML page from results/*.csv; trains nothing.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="figure2, ...; none for all; claims; family; bench; readme for README's blocks",
    )
    parser.add_argument("--check", action="store_true", help="with readme: fail when the block is stale, write nothing")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="results folder or runs.csv: what changed since, tested over seeds"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --compare: write every number to a file too")
    parser.add_argument("--root", type=Path, help="project root (default: found from the current folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
