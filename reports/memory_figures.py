"""Draws what runs recorded inside their memories: retrieved values, accumulators, spectra and attention maps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reports import wording
from reports.figures import (
    BELOW_AXES,
    FOOTER,
    LEFT,
    LEGEND_LINE,
    RIGHT,
    SUBTITLE,
    TITLE_LINE,
    WIDTH,
    balanced,
    legend_columns,
    style,
    write_texts,
)
from reports.palette import INK, MUTED, Look, looks_of
from reports.selection import Selection
from reports.sources import Run

# inches
PANEL_HEIGHT, ROW_GAP, COLUMN_GAP, MAP_HEIGHT = 1.9, 0.62, 0.62, 1.75
ABOVE_PANEL, COLOURBAR = 0.1, 0.55
NEWEST = "the newest value"
CONTRAST = (
    ("before_cosine", "cosine before the write"),
    ("after_cosine", "cosine after the write"),
    ("before_norm", "norm before / norm of the value"),
    ("after_norm", "norm after / norm of the value"),
)
ACCUMULATORS = (("carried_z_phi_q", "z · φ(q)"), ("carried_W_norm", "Frobenius norm of W"))
Curve = list[tuple[float, float]]


def draw(selection: Selection) -> Figure:
    """Draws a selection as its experiment file's `report: kind` says."""
    with style():
        return DRAWERS[selection.plan.spec.kind](selection)


# --- panels ----------------------------------------------------------------------------------------------------------


def _contrast(selection: Selection) -> Figure:
    figure, panels = _frame(selection, 2, 2)
    for axes, (statistic, label) in zip(panels, CONTRAST, strict=True):
        _curves(axes, selection, selection.plan.points, statistic)
        axes.set_title(label, loc="left", fontsize=8)
        axes.set_xscale(selection.plan.spec.x.scale)
        if statistic.endswith("cosine"):
            axes.set_ylim(-0.35, 1.05)
        else:
            axes.set_ylim(bottom=0)
    _label_below(panels[2:], selection)
    return figure


def _accumulators(selection: Selection) -> Figure:
    figure, panels = _frame(selection, 1, 2)
    for axes, (statistic, label) in zip(panels, ACCUMULATORS, strict=True):
        _curves(axes, selection, selection.plan.points, statistic)
        axes.set_title(label, loc="left", fontsize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
    _label_below(panels, selection)
    return figure


def _spectra(selection: Selection) -> Figure:
    points = selection.plan.points
    figure, panels = _frame(selection, 1, len(points))
    y = selection.plan.spec.y
    for axes, point in zip(panels, points, strict=True):
        for row, look in looks_of(selection.plan.rows).items():
            curve = _curve(selection.runs_of(row, point), "singular_value")
            largest = max((value for _, value in curve), default=1.0) or 1.0
            _line(axes, [(index + 1, value / largest) for index, value in curve], look, marker=False)
        axes.set_title(" = ".join(wording.point_value(point)), loc="left", fontsize=8)
        axes.set_yscale(y.scale)
        if y.limits:
            axes.set_ylim(*y.limits)
        _effective_ranks(axes, selection, point)
    panels[0].set_ylabel(y.label)
    _label_below(panels, selection)
    return figure


def _effective_ranks(axes: Axes, selection: Selection, point: str) -> None:
    lines = [("effective rank of d_dot", INK)]
    for row, look in looks_of(selection.plan.rows).items():
        runs = selection.runs_of(row, point)
        rank, size = (_mean(runs, statistic) for statistic in ("effective_rank", "d_dot"))
        if not math.isnan(rank):
            lines.append((f"{rank:.1f} of {size:.0f}", look.colour))
    for number, (text, colour) in enumerate(lines):
        place = (0.04, 0.04 + 0.085 * (len(lines) - 1 - number))
        axes.text(*place, text, transform=axes.transAxes, va="bottom", fontsize=7, color=colour)


def _attention_maps(selection: Selection) -> Figure:
    plan = selection.plan
    figure, panels = _frame(selection, 1, len(plan.rows), height=MAP_HEIGHT, right=RIGHT + COLOURBAR, legend=False)
    image = None
    for axes, row in zip(panels, plan.rows, strict=True):
        runs = [run for point in plan.points for run in selection.runs_of(row, point)][:1]
        weights = _matrix(runs, "map")
        if weights:
            image = axes.imshow(weights, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        newest = [(probe.y, probe.x) for run in runs for probe in run.probes if probe.statistic == "newest"]
        if newest:
            xs, ys = zip(*newest, strict=True)
            axes.plot(xs, ys, "o", markersize=4.6, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=0.6)
        axes.set_title(row, loc="left", fontsize=8)
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(plan.spec.y.label)
    _label_below(panels, selection)
    if image is not None:
        left, bottom, width, height = panels[-1].get_position().bounds
        bar = figure.add_axes((left + width + 0.1 / WIDTH, bottom, 0.1 / WIDTH, height))
        figure.colorbar(image, cax=bar)
        bar.tick_params(labelsize=7)
    handle = Line2D([], [], linestyle="none", marker="o", markerfacecolor="none", color=INK, label=NEWEST)
    _legend(figure, [handle])
    return figure


# --- parts -----------------------------------------------------------------------------------------------------------


def _frame(
    selection: Selection,
    n_lines: int,
    n_columns: int,
    *,
    height: float = PANEL_HEIGHT,
    right: float = RIGHT,
    legend: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure with title, origin and legend, and its panels line by line."""
    title = balanced(selection.plan.title)
    looks = looks_of(selection.plan.rows)
    labels = list(looks) if legend else [NEWEST]
    top = len(title) * TITLE_LINE + SUBTITLE + ABOVE_PANEL
    below = BELOW_AXES + -(-len(labels) // legend_columns(labels)) * LEGEND_LINE + FOOTER
    whole = top + n_lines * height + (n_lines - 1) * ROW_GAP + below
    width = (WIDTH - LEFT - right - (n_columns - 1) * COLUMN_GAP) / n_columns
    figure = Figure(figsize=(WIDTH, whole))
    panels = []
    for line in range(n_lines):
        for column in range(n_columns):
            left = LEFT + column * (width + COLUMN_GAP)
            bottom = whole - top - (line + 1) * height - line * ROW_GAP
            panels.append(figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole)))
    if legend:
        _legend(figure, [_handle(row, look) for row, look in looks.items()])
    write_texts(figure, selection, "\n".join(title), whole)
    if not any(run.probes for run in selection.runs):
        words = "nothing was recorded: results/probes.csv has none of these runs"
        panels[0].text(0.5, 0.5, words, transform=panels[0].transAxes, ha="center", fontsize=7, color=MUTED)
    return figure, panels


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    height, n_columns = figure.get_figheight(), legend_columns([str(handle.get_label()) for handle in handles])
    lines = -(-len(handles) // n_columns)
    corner = (LEFT / WIDTH, (FOOTER + lines * LEGEND_LINE) / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=n_columns, borderaxespad=0)


def _handle(row: str, look: Look) -> Line2D:
    return Line2D([], [], color=look.colour, marker=look.marker, markersize=4.2, label=row)


def _label_below(panels: Sequence[Axes], selection: Selection) -> None:
    for axes in panels:
        axes.set_xlabel(selection.plan.spec.x.label)


def _curves(axes: Axes, selection: Selection, points: Sequence[str], statistic: str) -> None:
    for row, look in looks_of(selection.plan.rows).items():
        _line(axes, _curve([run for point in points for run in selection.runs_of(row, point)], statistic), look)


def _line(axes: Axes, curve: Curve, look: Look, *, marker: bool = True) -> None:
    if curve:
        xs, ys = zip(*curve, strict=True)
        axes.plot(xs, ys, color=look.colour, marker=look.marker if marker else None, markersize=3, linewidth=1)


def _curve(runs: Sequence[Run], statistic: str) -> Curve:
    """The mean over layers, heads and seeds at each x."""
    found = defaultdict(list)
    for probe in (probe for run in runs for probe in run.probes):
        if probe.statistic == statistic:
            found[probe.x].append(probe.mean)
    return [(x, math.fsum(values) / len(values)) for x, values in sorted(found.items())]


def _mean(runs: Sequence[Run], statistic: str) -> float:
    curve = _curve(runs, statistic)
    return curve[0][1] if curve else math.nan


def _matrix(runs: Sequence[Run], statistic: str) -> list[list[float]]:
    """The first head's numbers as lines of x and columns of y."""
    lines: dict[float, dict[int, float]] = defaultdict(dict)
    for probe in (probe for run in runs for probe in run.probes):
        if (probe.statistic, probe.layer, probe.head) == (statistic, 0, 0):
            lines[probe.x][probe.y] = probe.mean
    return [[value for _, value in sorted(line.items())] for _, line in sorted(lines.items())]


DRAWERS = {
    "contrast": _contrast,
    "accumulators": _accumulators,
    "spectra": _spectra,
    "attention_maps": _attention_maps,
}
