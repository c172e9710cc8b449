"""Draws capacity plots and learning curves as the paper does, with the authors' released runs as hollow markers."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogFormatter, LogLocator, MultipleLocator

from reports import wording
from reports.palette import DARK, INK, MUTED, PAPER, Look, looks_of
from reports.plan import Plan
from reports.selection import Cell, Selection, Summary, diverged, end_of

# inches
WIDTH, AXES_HEIGHT = 6.0, 3.5
LEFT, RIGHT = 0.68, 0.2
BELOW_AXES, LEGEND_LINE, FOOTER = 0.52, 0.185, 0.36
TITLE_LINE, SUBTITLE = 0.2, 0.42
# letters of the longest label with which so many columns of a legend fit side by side
LEGEND_COLUMNS = {3: 29, 2: 42}
TITLE_LENGTH = 64
DOTS = (0, (1.5, 2))
FOOTER_LENGTH = 120
MOST_TICKS = 12
# up to so many points, rows stand beside each other, over these shares of the way to the next point and of the whole
FEW_POINTS, BESIDE, MOST_BESIDE = 6, 0.2, 0.05
# filled for ours, hollow for the authors', as all markers
UP, DOWN, ONWARD = "$\u2191$", "$\u2193$", "$\u2192$"
HOLLOW_UP, HOLLOW_DOWN, HOLLOW_ONWARD = "$\u21e7$", "$\u21e9$", "$\u21e8$"
ARROWS = ((UP, DOWN, ONWARD), (HOLLOW_UP, HOLLOW_DOWN, HOLLOW_ONWARD))
BAR = "|"
CROSS, HOLLOW_CROSS = "x", "$\u2297$"
AUTHORS = "authors' released run"
Points = list[tuple[float, float]]


def draw(selection: Selection, cells: Sequence[Cell]) -> Figure:
    """Draws a selection as its experiment file's `report: kind` says."""
    plan = selection.plan
    shown = [cell for cell in cells if cell.metric == plan.spec.metrics[0]]
    with style():
        looks = looks_of(plan.rows)
        figure = Figure()
        axes = figure.add_subplot()
        content = _capacity_plot if plan.spec.kind == "capacity_plot" else _learning_curves
        marks = content(axes, selection, shown, looks)
        title = balanced(plan.title)
        handles = _handles(plan, looks, marks)
        top = len(title) * TITLE_LINE + SUBTITLE
        n_columns = legend_columns([str(handle.get_label()) for handle in handles])
        legend = -(-len(handles) // n_columns) * LEGEND_LINE
        bottom = BELOW_AXES + legend + FOOTER
        height = top + AXES_HEIGHT + bottom
        figure.set_size_inches(WIDTH, height)
        axes.set_position((LEFT / WIDTH, bottom / height, 1 - (LEFT + RIGHT) / WIDTH, AXES_HEIGHT / height))
        corner = (LEFT / WIDTH, (FOOTER + legend) / height)
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=n_columns, borderaxespad=0)
        write_texts(figure, selection, "\n".join(title), height)
    return figure


def legend_columns(labels: Sequence[str]) -> int:
    """Into how many columns a legend goes."""
    longest = max(map(len, labels), default=0)
    return next((n_columns for n_columns, letters in LEGEND_COLUMNS.items() if longest <= letters), 1)


def balanced(title: str) -> list[str]:
    """A title in lines of about one length."""
    n_lines = -(-len(title) // TITLE_LENGTH)
    return textwrap.wrap(title, len(title) // n_lines + 6, break_on_hyphens=False) if n_lines > 1 else [title]


def save(figure: Figure, stem: Path, selection: Selection) -> list[Path]:
    """Writes PNG and PDF of a report."""
    return write(figure, stem, f"{selection.plan.name}: {selection.plan.title}", wording.provenance(selection))


def write(figure: Figure, stem: Path, title: str, subject: str) -> list[Path]:
    """Writes PNG and PDF; the same figure gives the same bytes."""
    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    with style():
        figure.savefig(png, metadata={"Software": None, "Title": title, "Description": subject})
        figure.savefig(pdf, metadata={"CreationDate": None, "Creator": None, "Title": title, "Subject": subject})
    return [png, pdf]


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element for the page, which has title and origin as text: ids begin with `prefix`."""
    buffer = io.StringIO()
    _show(figure.texts, False)
    with style():
        metadata = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata=metadata)
    _show(figure.texts, True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # the page decides on light or dark
    for light in DARK:
        svg = re.sub(re.escape(light), f"var(--c{light[1:].lower()}, {light.lower()})", svg, flags=re.IGNORECASE)
    return svg


def _show(texts: Sequence[Text], visible: bool) -> None:
    for text in texts:
        text.set_visible(visible)


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, whatever the user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        matplotlib.style.use(Path(__file__).with_name("style.mplstyle"))
        yield


def _capacity_plot(axes: Axes, selection: Selection, cells: Sequence[Cell], looks: dict[str, Look]) -> dict[str, str]:
    plan = selection.plan
    numbers = sorted({_number_of(point) for point in plan.points})
    aside = _beside_each_other(plan, cells, numbers)
    margin = (0.03 * (numbers[-1] - numbers[0]) or 0.5) + max(aside.values())
    _prepare(axes, plan, (numbers[0] - margin, numbers[-1] + margin))
    if len(numbers) <= MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(numbers))
    brush = _Brush(axes, "beyond the axes")
    if any(_has_bar(cell, plan.statistic) for cell in cells):
        brush.marks["worst to best seed"] = BAR
    for layer, row in enumerate(reversed(plan.rows)):
        mine = sorted((cell for cell in cells if cell.row == row), key=lambda cell: _number_of(cell.point))
        found = [cell for cell in mine if plan.statistic in cell.released]
        theirs = [(_number_of(cell.point) + aside[row], cell.released[plan.statistic].value) for cell in found]
        if theirs:
            axes.plot(*_columns(theirs), color=looks[row].colour, linewidth=0.7, linestyle=DOTS, alpha=0.6, zorder=2)
            brush.markers(theirs, looks[row], hollow=True, zorder=3 + 0.01 * layer)
        ours = [(_number_of(cell.point) + aside[row], cell.ours[plan.statistic].mean) for cell in mine]
        axes.plot(*_columns(ours), color=looks[row].colour, linewidth=0.9, zorder=4 + 0.01 * layer)
        _seed_bars(axes, mine, aside[row], plan.statistic, looks[row].colour)
        ended = [pair for pair, cell in zip(ours, mine, strict=True) if cell.ours[plan.statistic].n_found]
        # a point where some seeds diverged has its mean and a cross
        split = [(_number_of(cell.point) + aside[row], math.nan) for cell in mine if _split(cell.ours[plan.statistic])]
        brush.markers([*ended, *split], looks[row], hollow=False, zorder=5 + 0.01 * layer)
    return brush.marks


def _split(found: Summary) -> bool:
    return bool(found.values) and found.n_diverged > 0


def _beside_each_other(plan: Plan, cells: Sequence[Cell], numbers: Sequence[float]) -> dict[str, float]:
    """How far to the side of its number a row is drawn: where bars of many rows would cover one another."""
    several = [row for row in plan.rows if any(_has_bar(cell, plan.statistic) for cell in cells if cell.row == row)]
    x = plan.spec.x
    if len(several) < 2 or not 1 < len(numbers) <= FEW_POINTS or x.limits or x.scale != "linear":
        return dict.fromkeys(plan.rows, 0.0)
    width = min(*(BESIDE * (b - a) for a, b in pairwise(numbers)), MOST_BESIDE * (numbers[-1] - numbers[0]))
    last = len(plan.rows) - 1
    return {row: (i / last - 0.5) * width for i, row in enumerate(plan.rows)}


def _has_bar(cell: Cell, statistic: str) -> bool:
    return len(cell.ours[statistic].values) > 1


def _seed_bars(axes: Axes, cells: Sequence[Cell], aside: float, statistic: str, colour: str) -> None:
    # from the worst to the best seed
    several = [cell for cell in cells if _has_bar(cell, statistic)]
    numbers = [_number_of(cell.point) + aside for cell in several]
    lows, highs = ([end(cell.ours[statistic].values) for cell in several] for end in (min, max))
    axes.vlines(numbers, lows, highs, color=colour, alpha=0.55, linewidth=1.4, zorder=2.5)


def _learning_curves(axes: Axes, selection: Selection, cells: Sequence[Cell], looks: dict[str, Look]) -> dict[str, str]:
    plan = selection.plan
    metric = plan.spec.metrics[0]
    last_steps = [run.curves[metric.name].steps[-1] for run in selection.runs if metric.name in run.curves]
    _prepare(axes, plan, (0, 1.03 * max(last_steps, default=1)))
    brush = _Brush(axes, "ends later")
    for layer, cell in enumerate(reversed(cells)):
        runs = [run for run in selection.runs_of(cell.row, cell.point) if metric.name in run.curves]
        look = looks[cell.row]
        for run in runs:
            curve = run.curves[metric.name]
            width = 1.1 if len(runs) == 1 else 0.8
            axes.plot(curve.steps, curve.values, color=look.colour, linewidth=width, zorder=4 + 0.01 * layer)
        ends = [(run, end) for run in runs if (end := end_of(run, metric, "last"))]
        places = [(float(end.step), math.nan if diverged(run, metric) else end.value) for run, end in ends]
        brush.markers(places, look, hollow=False, zorder=6)
        if "last" in cell.released and "last" in cell.released_steps:
            place = (cell.released_steps["last"].value, cell.released["last"].value)
            brush.markers([place], look, hollow=True, zorder=5)
    return brush.marks


class _Brush:
    """Draws markers: an arrow at the edge for what lies beyond it, a cross at the top for what diverged."""

    def __init__(self, axes: Axes, beyond_right: str) -> None:
        self.axes = axes
        self.beyond_right = beyond_right
        """what it means that a point lies beyond the right edge"""
        self.marks: dict[str, str] = {}
        """the marks that were drawn, by their words in the legend"""
        self.levels: dict[tuple[Look, bool], int] = {}

    def markers(self, points: Points, look: Look, *, hollow: bool, zorder: float) -> None:
        """Draws the points of one method; hollow ones are the authors'."""
        groups: dict[str, Points] = {}
        for x, y in points:
            marker, place = self._placed(x, y, look, hollow)
            groups.setdefault(marker, []).append(place)
        for marker, places in groups.items():
            self._draw(places, marker, look, hollow, zorder)

    def _placed(self, x: float, y: float, look: Look, hollow: bool) -> tuple[str, tuple[float, float]]:
        right, (low, high) = self.axes.get_xlim()[1], self.axes.get_ylim()
        up, down, onward = ARROWS[hollow]
        if math.isnan(y):
            # methods that diverge at the same place stand below one another
            level = self.levels.setdefault((look, hollow), len(self.levels))
            cross = HOLLOW_CROSS if hollow else CROSS
            return self._named(cross, "diverged (NaN)", hollow), (min(x, right), 1 - 0.026 * level)
        inside = min(max(y, low), high)
        if x > right:
            return self._named(onward, self.beyond_right, hollow), (right, inside)
        # a loss of 0.5003 is 0.5 to the reader's eye
        if abs(y - inside) > 0.01 * (high - low) or (y < low and self.axes.get_yscale() == "log"):
            return self._named(up if y > high else down, "beyond the axes", hollow), (x, inside)
        if hollow:
            self.marks.setdefault(AUTHORS, "o")
        return look.marker, (x, inside)

    def _named(self, marker: str, words: str, hollow: bool) -> str:
        self.marks.setdefault(f"authors' run {words}" if hollow else words, marker)
        return marker

    def _draw(self, places: Points, marker: str, look: Look, hollow: bool, zorder: float) -> None:
        crossed = marker in (CROSS, HOLLOW_CROSS)
        across = self.axes.get_xaxis_transform() if crossed else self.axes.transData
        line = Line2D(*_columns(places), linestyle="none", transform=across, clip_on=False, zorder=zorder)
        line.set_marker(marker)
        line.set_color(look.colour)
        if marker.startswith("$"):
            line.set(markersize=7, markeredgewidth=0.2)
        elif marker == CROSS:
            line.set(markersize=4, markeredgewidth=1.2)
        elif hollow:
            line.set(markersize=5, markeredgewidth=0.7, markerfacecolor=PAPER)
        else:
            line.set(markersize=3.6, markeredgewidth=0.4)
        self.axes.add_line(line)


def _prepare(axes: Axes, plan: Plan, x_limits: tuple[float, float]) -> None:
    x, y = plan.spec.x, plan.spec.y
    axes.set_xscale(x.scale)
    axes.set_yscale(y.scale)
    axes.set_xlim(*(x.limits or x_limits))
    if y.limits:
        axes.set_ylim(*y.limits)
    axes.set_xlabel(_literal(x.label))
    axes.set_ylabel(_literal(wording.value_label(plan)))
    if y.scale == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=12))
        # an axis of one decade or two needs more than their ends
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.7)))
    elif y.limits == (0.0, 0.5):
        axes.yaxis.set_major_locator(MultipleLocator(0.1))


def _handles(plan: Plan, looks: dict[str, Look], marks: dict[str, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=looks[row].colour, marker=looks[row].marker, markersize=4.2, label=_literal(row))
        for row in plan.rows
    ]
    # the methods, then the authors' run, then what could not be drawn in its place
    for words in sorted(marks, key=lambda words: (words != AUTHORS, words.startswith("authors'"), words)):
        line = Line2D([], [], color=INK, linestyle="none", marker=marks[words], label=words)
        if words == AUTHORS:
            line.set(markersize=5, markerfacecolor=PAPER, markeredgewidth=0.7)
            if plan.spec.kind == "capacity_plot":
                line.set(color=MUTED, linewidth=0.7, linestyle=DOTS, markeredgecolor=INK)
            else:
                line.set_label("authors' run, last evaluation")
        elif marks[words] == CROSS:
            line.set(markersize=4, markeredgewidth=1.2)
        elif marks[words] == BAR:
            line.set(markersize=8, markeredgewidth=1.4, alpha=0.55)
        else:
            line.set(markersize=7, markeredgewidth=0.2)
        handles.append(line)
    return handles


def write_texts(figure: Figure, selection: Selection, title: str, height: float) -> None:
    """Writes title, subtitle and origin of a figure that is `height` inches high."""
    left = LEFT / WIDTH
    n_lines = title.count("\n") + 1
    subtitle = " · ".join(part for part in (wording.place(selection.plan), wording.setting(selection)) if part)
    figure.text(left, 1 - 0.1 / height, _literal(title), va="top", fontsize=10.5, fontweight="bold", linespacing=1.25)
    figure.text(left, 1 - (0.1 + n_lines * TITLE_LINE) / height, _literal(subtitle), va="top", fontsize=8, color=MUTED)
    footer = "\n".join(textwrap.wrap(wording.provenance(selection), FOOTER_LENGTH))
    figure.text(left, 0.06 / height, _literal(footer), fontsize=5.5, color=MUTED, va="bottom")


def _literal(text: str) -> str:
    """A text that matplotlib draws as it stands, without formulas in it."""
    return text.replace("$", r"\$")


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _number_of(point: str) -> float:
    return float(wording.point_value(point)[1])
