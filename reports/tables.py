"""Tables of a report: ours, the paper's number and the difference, as Markdown, LaTeX, CSV and for the page."""

from __future__ import annotations

import csv
import io
import math
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


def build(selection: Selection, cells: Sequence[Cell]) -> Table:
    """The table that belongs to a report's kind."""
    return _columns_table(selection, cells) if selection.plan.spec.kind == "table" else _points_table(selection, cells)


def _compared(cells: Sequence[Cell]) -> bool:
    """Whether the paper or its authors have any number of these rows; an experiment beyond the paper has ours alone."""
    return any(cell.released for cell in cells)


def _points_table(selection: Selection, cells: Sequence[Cell]) -> Table:
    """One line per row and point: last, best and steps."""
    keys = {wording.point_value(cell.point)[0] for cell in cells}
    shown = [cell for cell in cells if cell.metric == selection.plan.spec.metrics[0]]
    compared = _compared(cells)
    header = ["method", *keys] if len(keys) == 1 else ["method", "point"]
    for statistic in STATISTICS:
        header += [f"{statistic}: ours", *([f"{statistic}: released", "difference"] if compared else [])]
    lines = []
    for cell in shown:
        line = [cell.row, wording.point_value(cell.point)[1] if len(keys) == 1 else cell.point]
        for statistic in STATISTICS:
            line += _three(cell, statistic)[: 3 if compared else 1]
        steps = (wording.steps(cell.steps["last"]), wording.released_steps(cell, "last"))
        lines.append((*line, *steps[: 2 if compared else 1]))
    return Table((*header, *("steps: ours", "steps: released")[: 2 if compared else 1]), tuple(lines), 2)


def _three(cell: Cell, statistic: str) -> list[str]:
    """Ours, the reference, the difference."""
    ours = wording.summary(cell.ours[statistic], cell.metric.digits)
    return [ours, wording.released(cell, statistic), wording.difference(cell, statistic)]


def _columns_table(selection: Selection, cells: Sequence[Cell]) -> Table:
    """One line per row; for each point and metric: ours, paper, difference."""
    plan = selection.plan
    found = {(cell.row, cell.point, cell.metric.name): cell for cell in cells}
    columns = [(point, metric) for point in plan.points for metric in plan.spec.metrics]
    header, width = ["model"], 3 if _compared(cells) else 1
    for point, metric in columns:
        name = " ".join(part for part in (wording.point_value(point)[1], metric.label) if part)
        header += [f"{name}, {plan.statistic}: ours", "paper", "difference"][:width]
    lines = []
    for name in (name for row in plan.rows for name in plan.spec.lines_of(row)):
        line = [name]
        for point, metric in columns:
            cell = found.get((name, point, metric.name))
            line += ([""] * 3 if cell is None else _three(cell, plan.statistic))[:width]
        lines.append(tuple(line))
    return Table(tuple(header), tuple(lines), 1)


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
    sentences = ["Ours is the mean ± standard deviation over seeds, with the number of runs in brackets."]
    if selection.plan.has_released and selection.plan.protocol != "released":
        sentences.append("The paper's and the authors' numbers were measured under the released protocol.")
    return [*sentences, *selection.deviations]


def markdown_lines(table: Table) -> list[str]:
    """The table in Markdown, columns aligned in the source too."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (table.header, *table.lines)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    numbers = range(table.n_names, len(widths))
    rule = ["-" * (width - 1) + (":" if column in numbers else "-") for column, width in enumerate(widths)]
    aligned = [
        [text.rjust(width) if column in numbers else text.ljust(width)
         for column, (text, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]


def to_markdown(table: Table, selection: Selection) -> str:
    """The table as a Markdown document."""
    parts = [
        f"# {caption(selection)}",
        "\n".join(markdown_lines(table)),
        *notes(selection),
        wording.provenance(selection),
    ]
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table, selection: Selection) -> str:
    """The table for a paper that loads booktabs, and longtable where it does not fit on a page."""
    columns = "l" * table.n_names + "r" * (len(table.header) - table.n_names)
    head = " & ".join(map(_escape, table.header)) + r" \\"
    body = [" & ".join(map(_escape, line)) + r" \\" for line in table.lines]
    long = len(table.lines) > LONGEST_TABULAR
    environment = "longtable" if long else "tabular"
    top = [r"\toprule", head, r"\midrule", *([r"\endhead"] if long else [])]
    lines = [
        f"% {wording.provenance(selection)}",
        f"% {caption(selection)}",
        *(f"% {note}" for note in notes(selection)),
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
