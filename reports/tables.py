"""Tables of a report: ours, the paper's number and the difference, as Markdown, LaTeX, CSV and for the page."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import wording
from reports.selection import STATISTICS, Cell, Selection

LONGEST_TABULAR = 45
LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {">": "$>$", "<": "$<$", "±": r"$\pm$", wording.MINUS: "$-$"}
)


@dataclass(frozen=True)
class Table:
    """A table of finished texts."""

    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    n_names: int
    """how many leading columns name the line; the others hold numbers"""
    places: tuple[tuple[tuple[str, str] | None, ...], ...] = ()
    """for each text of each line the row and point whose runs it sums up, None where it sums up none"""
    links: tuple[str, ...] = ()
    """Markdown that follows each line's last text as it is"""


def build(selection: Selection, cells: Sequence[Cell]) -> Table:
    """The table that belongs to a report's kind."""
    return _columns_table(selection, cells) if selection.plan.spec.kind == "table" else _points_table(selection, cells)


def _points_table(selection: Selection, cells: Sequence[Cell]) -> Table:
    """One line per row and point: last, best and steps."""
    keys = {wording.point_value(cell.point)[0] for cell in cells}
    shown = [cell for cell in cells if cell.metric == selection.plan.spec.metrics[0]]
    header = ["method", *keys] if len(keys) == 1 else ["method", "point"]
    compared = is_compared(cells)
    for statistic in STATISTICS:
        header += [f"{statistic}: ours", f"{statistic}: released", "difference"][: 3 if compared else 1]
    lines = []
    row_of = selection.plan.row_of
    for cell in shown:
        line = [cell.row, wording.point_value(cell.point)[1] if len(keys) == 1 else cell.point]
        for statistic in STATISTICS:
            line += _ours_and_theirs(cell, statistic, compared)
        line += [wording.steps(cell.steps["last"]), wording.released_steps(cell, "last")][: 2 if compared else 1]
        lines.append(tuple(line))
    header += ["steps: ours", "steps: released"][: 2 if compared else 1]
    ours = [heading.endswith(": ours") for heading in header]
    places = [tuple((row_of[cell.row], cell.point) if mine else None for mine in ours) for cell in shown]
    return Table(tuple(header), tuple(lines), 2, tuple(places))


def is_compared(cells: Sequence[Cell]) -> bool:
    """Whether the paper or the authors' runs have any number to compare with."""
    return any(cell.released or cell.released_steps for cell in cells)


def _ours_and_theirs(cell: Cell, statistic: str, compared: bool) -> list[str]:
    """Ours, the paper's, and the difference; ours alone where nothing is compared."""
    ours = wording.summary(cell.ours[statistic], cell.metric.digits)
    return [ours, wording.released(cell, statistic), wording.difference(cell, statistic)] if compared else [ours]


def _columns_table(selection: Selection, cells: Sequence[Cell]) -> Table:
    """One line per row; for each point and metric: ours, paper, difference."""
    plan = selection.plan
    found = {(cell.row, cell.point, cell.metric.name): cell for cell in cells}
    columns = [(point, metric) for point in plan.points for metric in plan.spec.metrics]
    header, compared = ["model"], is_compared(cells)
    width = 3 if compared else 1
    for point, metric in columns:
        header += [f"{wording.column(plan, point, metric)}: ours", "paper", "difference"][:width]
    lines, places = [], []
    for name in (name for row in plan.rows for name in plan.spec.lines_of(row)):
        line = [name]
        place = [
            (plan.row_of[name], point) if (name, point, metric.name) in found else None for point, metric in columns
        ]
        places.append((None, *(p for ours in place for p in (ours, None, None)[:width])))
        for point, metric in columns:
            cell = found.get((name, point, metric.name))
            line += [""] * width if cell is None else _ours_and_theirs(cell, plan.statistic, compared)
        lines.append(tuple(line))
    return Table(tuple(header), tuple(lines), 1, tuple(places))


def save(table: Table, stem: Path, selection: Selection, cells: Sequence[Cell]) -> list[Path]:
    """Writes Markdown, LaTeX and CSV."""
    texts = {
        ".md": to_markdown(table, selection),
        ".tex": to_latex(table, selection),
        ".csv": to_csv(selection, cells),
    }
    for suffix, text in texts.items():
        stem.with_suffix(suffix).write_text(text, encoding="utf-8", newline="\n")
    return [stem.with_suffix(suffix) for suffix in texts]


def caption(selection: Selection) -> str:
    """Title, place in the paper, profile and protocol in one line."""
    plan = selection.plan
    return " · ".join(part for part in (plan.title, wording.place(plan), wording.setting(selection)) if part)


def notes(selection: Selection) -> list[str]:
    """How to read the table, where the numbers differ in kind, and the known deviations."""
    plan = selection.plan
    evaluation = f"that of the {plan.statistic} evaluation, " if plan.spec.kind == "table" else ""
    sentences = [f"Ours is {evaluation}the mean ± standard deviation over seeds, with the number of runs in brackets."]
    if plan.has_released and plan.protocol != "released":
        sentences.append("The paper's and the authors' numbers were measured under the released protocol.")
    return [*sentences, *selection.deviations]


def markdown_lines(table: Table) -> list[str]:
    """The table in Markdown, columns aligned in the source too."""
    lines = [[markdown_text(text).replace("|", "\\|") for text in line] for line in (table.header, *table.lines)]
    for line, links in zip(lines[1:], table.links, strict=False):
        line[-1] += links
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    numbers = range(table.n_names, len(widths))
    rule = ["-" * (width - 1) + (":" if column in numbers else "-") for column, width in enumerate(widths)]
    aligned = [
        [text.rjust(width) if column in numbers else text.ljust(width)
         for column, (text, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]


def markdown_text(text: str) -> str:
    """A text on one line of Markdown, in which nothing is a tag, a link or an image."""
    return re.sub(r"[\\\[\]]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def to_markdown(table: Table, selection: Selection) -> str:
    """The table as a Markdown document."""
    parts = [
        f"# {markdown_text(caption(selection))}",
        "\n".join(markdown_lines(table)),
        *map(markdown_text, notes(selection)),
        markdown_text(wording.provenance(selection)),
    ]
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table, selection: Selection) -> str:
    """The table for a paper that loads booktabs, and longtable where it does not fit on a page."""
    columns = "l" * table.n_names + "r" * (len(table.header) - table.n_names)
    return latex_table(table, [wording.provenance(selection), caption(selection), *notes(selection)], columns)


def latex_table(table: Table, comments: Sequence[str], columns: str) -> str:
    """A table in LaTeX below its comments; one that does not fit on a page is a longtable."""
    head = " & ".join(map(_escape, table.header)) + r" \\"
    body = [" & ".join(map(_escape, line)) + r" \\" for line in table.lines]
    long = len(table.lines) > LONGEST_TABULAR
    environment = "longtable" if long else "tabular"
    top = [r"\toprule", head, r"\midrule", *([r"\endhead"] if long else [])]
    lines = [
        # a line break would end the comment
        *(f"% {' '.join(text.split())}" for text in comments),
        rf"\begin{{{environment}}}{{{columns}}}",
        *top,
        *body,
        r"\bottomrule",
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.translate(LATEX)


def to_csv(selection: Selection, cells: Sequence[Cell]) -> str:
    """One line per row, point and metric with full precision, and where the numbers come from on each line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    measured = [f"{statistic}_{what}" for statistic in STATISTICS for what in ("mean", "std", "released", "difference")]
    names = ["row", "point", "split", "metric", "n", "n_planned", "n_diverged", *measured, "steps", "released_steps"]
    origin = ["profile", "protocol", "command", "commits", "n_runs", "newest_run"]
    writer.writerow([*names, *origin])
    plan = selection.plan
    tail = [
        plan.profile,
        plan.protocol,
        plan.redraw,
        " ".join(selection.commits),
        len(selection.runs),
        selection.newest,
    ]
    for cell in cells:
        last = cell.ours["last"]
        split, _, metric = cell.metric.name.rpartition("/")
        line = [cell.row, cell.point, split, metric, last.n_found, last.n_planned, last.n_diverged]
        for statistic in STATISTICS:
            summary, reference = cell.ours[statistic], cell.released.get(statistic)
            printed = _exact(reference.value, nan="nan") if reference and not reference.is_bound else ""
            printed = reference.printed if reference and reference.is_bound else printed
            line += [_exact(summary.mean), _exact(summary.std), printed, _exact(cell.difference(statistic))]
        steps = cell.released_steps.get("last")
        line += [_exact(cell.steps["last"].mean), _exact(steps.value) if steps else ""]
        writer.writerow([*line, *tail])
    return buffer.getvalue()


def _exact(value: float, nan: str = "") -> str:
    return nan if math.isnan(value) else f"{value:.9g}"
