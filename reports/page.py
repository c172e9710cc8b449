"""One self-contained HTML page with every report in every profile and protocol."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from reports import family_table, figures, memory_figures, tables, verdict_tables, wording
from reports.family_table import Family
from reports.palette import DARK, looks_of
from reports.plan import MEMORY_KINDS, Plan
from reports.selection import Cell, Selection
from reports.sources import Run, Translation
from reports.verdicts import Verdict

PROFILE_WORDS = {
    "paper": "the claim itself, as in the paper",
    "short-gpu": "a small real corpus at a size for one GPU",
    "short": "small real corpora, or the whole task at fewer sizes",
    "smoke": "a quick look that everything works; its numbers prove nothing",
}


@dataclass(frozen=True)
class Entry:
    """One report in one profile and protocol, ready for the page."""

    selection: Selection
    cells: Sequence[Cell]
    figure: Figure | None
    """None for a table"""

    @property
    def anchor(self) -> str:
        """The id of the entry on the page."""
        plan = self.selection.plan
        return f"{plan.name}-{plan.profile}-{plan.protocol}"


@dataclass(frozen=True)
class Sentence:
    """One sentence of a corpus as every model translated it."""

    place: str
    source: str
    reference: str
    translations: Sequence[tuple[str, str]]
    """by row"""


@dataclass(frozen=True)
class MatrixCell:
    """Ours over theirs, for the compact table of a figure."""

    ours: str
    released: str
    link: str


@dataclass(frozen=True)
class RunLine:
    """One run as the page lists it."""

    run: Run
    link: str
    commit: str
    time: str


@dataclass(frozen=True)
class RunList:
    """The runs of one experiment in one profile and protocol, those of a row and point together."""

    plan: Plan
    groups: Sequence[tuple[str, str, str, Sequence[RunLine]]]
    """link, row, point and runs"""


def write(
    path: Path, entries: Sequence[Entry], verdicts: Sequence[Verdict] = (), families: Sequence[Family] = ()
) -> None:
    """Writes the page: the verdicts on the paper's claims, the tables of the family, then `entries` in their order."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    path.parent.mkdir(parents=True, exist_ok=True)
    html = template.render(
        groups=_groups(entries),
        run_lists=_run_lists(entries),
        colours=DARK,
        profile_words=PROFILE_WORDS,
        claims=_claims(entries, verdicts),
        families=[_family(family) for family in families],
        family_title=family_table.TITLE,
    )
    path.write_text(html, encoding="utf-8", newline="\n")


def _claims(entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> dict[str, object] | None:
    if not verdicts:
        return None
    drawn = {entry.anchor for entry in entries}
    lines = [
        {
            "verdict": line.verdict,
            "protocols": ", ".join(line.protocols),
            "basis": verdict_tables.basis(line.verdict),
            "links": [(name, anchor) for name, anchor in line.anchors if anchor in drawn],
        }
        for line in verdict_tables.lines_of(verdicts)
    ]
    return {
        "title": verdict_tables.TITLE,
        "how_to_read": verdict_tables.HOW_TO_READ,
        "lines": lines,
        "notes": verdict_tables.notes(verdicts),
        "provenance": verdict_tables.provenance(verdicts),
        "csv": _data_uri(verdict_tables.to_csv(verdicts)),
        "runs_csv": _data_uri(verdict_tables.to_runs_csv(verdicts)),
    }


def _family(family: Family) -> dict[str, object]:
    return {
        "profile": family.profile,
        "table": family.table,
        "links": family.links,
        "notes": family.notes,
        "provenance": family_table.provenance(family),
        "csv": _data_uri(family_table.to_csv(family)),
    }


def _groups(entries: Sequence[Entry]) -> list[dict[str, object]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.selection.plan.profile, entry.selection.plan.protocol), []).append(entry)
    return [
        {"profile": profile, "protocol": protocol, "entries": [_context(entry) for entry in members]}
        for (profile, protocol), members in groups.items()
    ]


def _context(entry: Entry) -> dict[str, object]:
    selection, plan = entry.selection, entry.selection.plan
    files = f"{plan.profile}/{plan.protocol}/{plan.name}"
    table = tables.build(selection, entry.cells)
    return {
        "anchor": entry.anchor,
        "plan": plan,
        "svg": figures.to_svg(entry.figure, entry.anchor) if entry.figure else "",
        "is_table": plan.spec.kind == "table",
        "table": table,
        "links": [[_link(selection, place) for place in places] for places in table.places],
        "matrix": _matrix(selection, entry.cells),
        "compared": tables.is_compared(entry.cells),
        "looks": looks_of(plan.rows),
        "completeness": wording.completeness(selection),
        "share": selection.n_found / plan.n_planned,
        "hours": wording.hours(selection),
        "n_runs": f"{len(selection.runs)} run{'s' if len(selection.runs) > 1 else ''}",
        "commits": ", ".join(selection.commits) or "unknown",
        "newest": selection.newest,
        "place": wording.place(plan),
        "notes": tables.notes(selection),
        "sentences": _sentences(selection),
        "csv": _data_uri(tables.to_csv(selection, entry.cells)),
        "csv_name": files.replace("/", "-") + ".csv",
        "files": files,
    }


def _matrix(selection: Selection, cells: Sequence[Cell]) -> list[tuple[str, list[MatrixCell | None]]]:
    # points down, methods across: the same shape as the figure
    plan = selection.plan
    found = {(cell.row, cell.point): cell for cell in cells if cell.metric == plan.spec.metrics[0]}
    lines = []
    for point in plan.points:
        line = [_matrix_cell(selection, found.get((row, point))) for row in plan.rows]
        lines.append((wording.point_value(point)[1], line))
    return lines


def _sentences(selection: Selection) -> list[Sentence]:
    """What the first seed of each row translated, sentence by sentence."""
    first: dict[str, Run] = {}
    for run in sorted(selection.runs, key=lambda run: run.seed):
        if run.translations:
            first.setdefault(run.row, run)
    by_place: dict[tuple[str, int], list[tuple[str, Translation]]] = {}
    for row in (row for row in selection.plan.rows if row in first):
        for sentence in first[row].translations:
            by_place.setdefault((sentence.split, sentence.line), []).append((row, sentence))
    return [
        Sentence(
            place=f"{split}, line {line}",
            source=found[0][1].source,
            reference=found[0][1].reference,
            translations=[(row, sentence.translation) for row, sentence in found],
        )
        for (split, line), found in sorted(by_place.items())
    ]


def _matrix_cell(selection: Selection, cell: Cell | None) -> MatrixCell | None:
    plan = selection.plan
    if cell is None:
        return None
    ours = wording.summary(cell.ours[plan.statistic], cell.metric.digits)
    link = _link(selection, (plan.row_of[cell.row], cell.point))
    return MatrixCell(ours, wording.released(cell, plan.statistic), link)


def _link(selection: Selection, place: tuple[str, str] | None) -> str:
    """The id of the runs behind a number, empty where there are none."""
    runs = selection.runs_of(*place) if place else []
    return f"runs-{runs[0].key}" if runs else ""


def _run_lists(entries: Sequence[Entry]) -> list[RunList]:
    """Every run that the page sums up, once: figures that show parts of others share theirs."""
    by_place: dict[tuple[str, str, str], list[Selection]] = {}
    for entry in entries:
        plan = entry.selection.plan
        by_place.setdefault((plan.runs_of, plan.profile, plan.protocol), []).append(entry.selection)
    return [_run_list(members) for members in by_place.values()]


def _run_list(selections: Sequence[Selection]) -> RunList:
    # the experiment's own report, where it is drawn, shows all that its views show
    whole = max(selections, key=lambda selection: len(selection.runs))
    places: dict[tuple[str, str], Selection] = {}
    for selection in (whole, *selections):
        for run in selection.runs:
            places.setdefault((run.row, run.point), selection)
    groups = [
        (_link(selection, place), *place, [_run_line(run) for run in selection.runs_of(*place)])
        for place, selection in places.items()
    ]
    return RunList(whole.plan, groups)


def _run_line(run: Run) -> RunLine:
    commit = (run.commit[:10] + ("+" if run.dirty else "")) or "unknown"
    return RunLine(run, f"run-{run.key}", commit, wording.duration(run.wall_seconds))


def _data_uri(text: str) -> str:
    return "data:text/csv;base64," + base64.b64encode(text.encode()).decode()


def entry_of(selection: Selection, cells: Sequence[Cell]) -> Entry:
    """Draws what the page needs of one report."""
    kind = selection.plan.spec.kind
    if kind == "table":
        return Entry(selection, cells, None)
    figure = memory_figures.draw(selection) if kind in MEMORY_KINDS else figures.draw(selection, cells)
    return Entry(selection, cells, figure)
