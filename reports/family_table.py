"""Who stores how much, who overwrites, at what cost: one line per memory of the family, over four experiments.

A memory is what a row sets of its attention: rule, feature map, normalisations. Rows of different experiments that set
the same stand in one line, whatever they are called there.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fwp_lightning.experiment import Project, load_experiment, resolve_runs
from reports import wording
from reports.plan import load_plan, report_names
from reports.selection import Cell, Selection, Summary, collect, select
from reports.sources import Results, Run
from reports.tables import Table, latex_table, markdown_lines, markdown_text

NAME = "family"
BEGIN, END = "<!-- family:begin -->", "<!-- family:end -->"
TITLE = "Who stores how much, who overwrites, at what cost"
ORIGIN = f"python -m reports {NAME}"
STORING, OVERWRITING, RECALL, FACTS = "family_figure2", "family_figure5", "recall", "changing_facts"
SOLVED = 0.01
"""the loss under which a size counts as stored, as in experiments/claims.yaml; storing nothing is a loss near 0.5"""
PROFILES = ("paper", "short", "smoke")
EXPERIMENTS = {STORING: "valid/loss", OVERWRITING: "valid/loss", RECALL: "test/accuracy", FACTS: "test/accuracy"}
NONE = "--"

Measured = Sequence[tuple[Cell, tuple[Run, ...]]]
"""the cells of one memory in one experiment, by size, each with its runs"""


@dataclass(frozen=True)
class Memory:
    """What tells a line from the others."""

    rule: str
    feature_map: str
    phi_norm: str
    attention_norm: str
    options: str
    """the rule's own numbers, where a row sets them"""

    def __str__(self) -> str:
        """In the words of the configuration: `delta, dpfp nu 1, phi_norm sum`."""
        norms = {"phi_norm": self.phi_norm, "attention_norm": self.attention_norm}
        named = [f"{name} {value}" for name, value in norms.items() if value != "none"]
        return ", ".join([self.rule, self.feature_map, *named, *([self.options] if self.options else [])])


@dataclass(frozen=True)
class Part:
    """One of the experiments, with its runs of one profile under its own protocol."""

    selection: Selection
    cells: Mapping[tuple[str, str], Cell]
    """by row and point, of the metric that counts"""
    rows: Mapping[Memory, str]

    def cells_of(self, memory: Memory) -> list[Cell]:
        """Those of a memory, by size."""
        plan = self.selection.plan
        places = [(self.rows[memory], point) for point in plan.points] if memory in self.rows else []
        return [self.cells[place] for place in places if place in self.cells]

    def runs_of(self, memory: Memory, point: str) -> list[Run]:
        """The runs of a memory at a point."""
        return self.selection.runs_of(self.rows[memory], point) if memory in self.rows else []


@dataclass(frozen=True)
class Text:
    """One finished text, and the first of the runs behind it."""

    text: str
    runs: tuple[Run, ...] = ()

    @property
    def link(self) -> str:
        """The id on the page of the runs behind it, empty where there are none."""
        return f"runs-{self.runs[0].key}" if self.runs else ""


@dataclass(frozen=True)
class Family:
    """The table of one profile."""

    profile: str
    parts: Mapping[str, Part]

    @cached_property
    def names(self) -> dict[Memory, str]:
        """The lines in the order of the experiment files; of a memory's names the one that says most."""
        found: dict[Memory, list[str]] = {}
        for part in self.parts.values():
            for memory, row in part.rows.items():
                found.setdefault(memory, []).append(row)
        return {memory: max(rows, key=len) for memory, rows in found.items()}

    @property
    def n_found(self) -> int:
        """Runs that ended."""
        return sum(part.selection.n_found for part in self.parts.values())

    @property
    def completeness(self) -> str:
        """How many of the planned runs are there, by experiment."""
        return "; ".join(f"{name}: {wording.completeness(part.selection)}" for name, part in self.parts.items())

    @cached_property
    def columns(self) -> dict[str, dict[Memory, Text]]:
        """All columns behind the names, by heading."""
        found: dict[str, dict[Memory, Text]] = {}
        if storing := self.parts.get(STORING):
            found["stores: breaks at S"] = self._each(storing, _breaks)
        if overwriting := self.parts.get(OVERWRITING):
            found["overwrites: breaks at S"] = self._each(overwriting, _breaks)
            first = overwriting.selection.plan.points[0]
            heading = f"loss with overwriting, {_equation(first)}"
            found[heading] = self._each(overwriting, functools.partial(_value, point=first))
        if recall := self.parts.get(RECALL):
            for point in _shared_points(recall):
                heading = f"recall of {wording.point_value(point)[1]} pairs"
                found[heading] = self._each(recall, functools.partial(_value, point=point))
        if facts := self.parts.get(FACTS):
            found["changing facts"] = self._each(facts, functools.partial(_value, point=""))
        for name, point, where in self._measured:
            runs = {memory: tuple(self.parts[name].runs_of(memory, point)) for memory in self.names}
            if name == FACTS:
                found[f"parameters, {where}"] = {memory: _count(runs[memory], "n_params") for memory in runs}
            found[f"state, {where}"] = {memory: _count(runs[memory], "state") for memory in runs}
            found[f"steps/s, {where}"] = {memory: _speed(runs[memory]) for memory in runs}
        return found

    @property
    def _measured(self) -> list[tuple[str, str, str]]:
        """Where costs are read: experiment, point and what the heading calls it."""
        found = []
        if STORING in self.parts:
            point = self.parts[STORING].selection.plan.points[0]
            found.append((STORING, point, _equation(point)))
        return [*found, (FACTS, "", "facts")] if FACTS in self.parts else found

    def _each(self, part: Part, say: Callable[[Measured], Text]) -> dict[Memory, Text]:
        return {
            memory: say([(cell, tuple(part.runs_of(memory, cell.point))) for cell in part.cells_of(memory)])
            for memory in self.names
        }

    @cached_property
    def table(self) -> Table:
        """The table as every format shows it."""
        return Table(("row", "memory", *self.columns), tuple(map(self.line, self.names)), 2)

    def line(self, memory: Memory) -> tuple[str, ...]:
        """One line of the table."""
        return (self.names[memory], str(memory), *(column[memory].text for column in self.columns.values()))

    @property
    def links(self) -> list[list[str]]:
        """For each text of each line the id on the page of the runs behind it."""
        return [["", "", *(column[memory].link for column in self.columns.values())] for memory in self.names]

    @property
    def commits(self) -> list[str]:
        """The code versions behind the runs."""
        return sorted({commit for part in self.parts.values() for commit in part.selection.commits})

    @property
    def notes(self) -> list[str]:
        """How to read the table."""
        protocols = ", ".join(f"{name} {part.selection.plan.protocol}" for name, part in self.parts.items())
        devices = sorted({run.device for name, *_ in self._measured for run in self.parts[name].selection.runs})
        return [
            f"Each experiment stands under its own protocol ({protocols}), and all under the profile {self.profile}; a "
            f"memory breaks at the smallest S whose best validation loss, a mean over seeds, is not under {SOLVED:g}: "
            "between the two sizes that are named. Accuracies are of the last weights on the test questions. "
            f"{NONE} is no row of that experiment, or not run yet; counts in brackets are runs found of runs planned.",
            "State is what the memories keep of one sequence, in numbers. Steps/s are a run's optimiser steps over its "
            f"time on the clock, evaluations included, on {' and '.join(devices) or 'no machine yet'}; what else ran "
            "there is not recorded, so that they rank costs, no more. In Setting 1 the paper's rules have a compiled "
            "training step, the others PyTorch's; in the model of changing facts each has its fastest backend.",
        ]


def families(project: Project, results: Results) -> list[Family]:
    """The table of every profile that has a run of one of the experiments; none where the project has no such."""
    known = [name for name in EXPERIMENTS if name in report_names(project)]
    there = {run.profile for run in results.runs if run.experiment in known}
    found = [Family(profile, _parts(project, results, known, profile)) for profile in PROFILES if profile in there]
    return [family for family in found if any(part.selection.runs for part in family.parts.values())]


def _parts(project: Project, results: Results, names: Sequence[str], profile: str) -> dict[str, Part]:
    found = {}
    for name in names:
        experiment = load_experiment(name, project)
        if profile in experiment.profiles:
            selection = select(load_plan(project, name, profile), results)
            cells = [cell for cell in collect(selection, results) if cell.metric.name == EXPERIMENTS[name]]
            # a row's memory is the same at all points and seeds
            rows = {_memory(run.config): run.row for run in resolve_runs(experiment, profile=profile, seeds=[1])}
            found[name] = Part(selection, {(cell.row, cell.point): cell for cell in cells}, rows)
    return found


def _memory(config: Mapping[str, Any]) -> Memory:
    attention = config["model"]["init_args"]["attention"]
    size = {"dpfp": f" nu {attention.get('nu')}", "favor": f" {attention.get('n_features')}"}
    feature_map = attention["feature_map"] + size.get(attention["feature_map"], "")
    options = (attention.get("rule_options") or {}).get("init_args") or {}
    own = ", ".join(f"{name} {value}" for name, value in options.items())
    return Memory(attention["rule"], feature_map, attention["phi_norm"], attention["attention_norm"], own)


def _breaks(measured: Measured) -> Text:
    """Between which sizes the loss leaves what counts as stored, of the sizes that were run."""
    sizes = {float(wording.point_value(cell.point)[1]): cell.ours["best"] for cell, _ in measured}
    runs = tuple(run for _, of_point in measured for run in of_point)
    there = {size: found for size, found in sizes.items() if found.n_found}
    if not there:
        return Text(NONE)
    # NaN where all diverged: not under it
    broken = min((size for size, found in there.items() if not found.mean < SOLVED), default=math.inf)
    kept = max((size for size in there if size < broken), default=0.0)
    between = f"{kept:g} to {broken:g}" if kept else f"below {broken:g}"
    text = between if math.isfinite(broken) else f"above {kept:g}"
    n_found, n_planned = (sum(getattr(found, name) for found in sizes.values()) for name in ("n_found", "n_planned"))
    return Text(text if n_found == n_planned else f"{text} ({n_found}/{n_planned})", runs)


def _equation(point: str) -> str:
    """`S = 20`."""
    return " = ".join(wording.point_value(point))


def _value(measured: Measured, point: str) -> Text:
    for cell, runs in measured:
        if cell.point == point:
            return Text(wording.brief(cell.ours[_statistic(cell)], cell.metric.digits), runs)
    return Text(NONE)


def _statistic(cell: Cell) -> str:
    # a test is evaluated once, with the last weights
    return "last" if cell.metric.name.startswith("test/") else "best"


def _shared_points(part: Part) -> list[str]:
    """The points that more than half of the rows have."""
    plan = part.selection.plan
    return [point for point in plan.points if 2 * sum((row, point) in plan.seeds for row in plan.rows) > len(plan.rows)]


def _count(runs: tuple[Run, ...], column: str) -> Text:
    values = _counts(runs, column)
    return Text(" or ".join(f"{value:,}" for value in values), runs) if values else Text(NONE)


def _counts(runs: Sequence[Run], column: str) -> list[int]:
    # softmax keeps all that it has read, which is no number
    return sorted({int(value) for run in runs if (value := getattr(run, column)).isdigit()})


def _speed(runs: tuple[Run, ...]) -> Text:
    found = _speeds(runs)
    return Text(wording.number(statistics.fmean(found)), runs) if found else Text(NONE)


def _speeds(runs: Sequence[Run]) -> list[float]:
    return [int(run.steps) / run.wall_seconds for run in runs if run.steps and run.wall_seconds]


# --- files ------------------------------------------------------------------------------------------------------------


def save(families: Sequence[Family], output: Path) -> list[Path]:
    """Writes family.md, family.tex and family.csv into the folder of each profile."""
    paths = []
    for family in families:
        folder = output / family.profile
        folder.mkdir(parents=True, exist_ok=True)
        texts = {".md": to_markdown(family), ".tex": to_latex(family), ".csv": to_csv(family)}
        for suffix, text in texts.items():
            path = folder / f"{NAME}{suffix}"
            path.write_text(text, encoding="utf-8", newline="\n")
            paths.append(path)
    return paths


def to_text(families: Sequence[Family]) -> str:
    """What the command prints."""
    return "\n\n".join("\n".join([caption(family), *markdown_lines(family.table)]) for family in families)


def caption(family: Family) -> str:
    """Title and profile."""
    return f"{TITLE} · {family.profile} profile"


def provenance(family: Family) -> str:
    """One line with the command, the commits and the number of runs."""
    return f"{ORIGIN} · commit {', '.join(family.commits) or 'unknown'} · {family.completeness}"


def to_markdown(family: Family) -> str:
    """The table as a Markdown document."""
    parts = [f"# {caption(family)}", "\n".join(markdown_lines(family.table)), *map(markdown_text, family.notes)]
    return "\n\n".join([*parts, f"Numbers: [{NAME}.csv]({NAME}.csv).", markdown_text(provenance(family))]) + "\n"


def to_latex(family: Family) -> str:
    """The table for a paper that loads booktabs."""
    columns = "ll" + "r" * len(family.columns)
    return latex_table(family.table, [provenance(family), caption(family), *family.notes], columns)


def to_csv(family: Family) -> str:
    """One line per memory, experiment and point, with full precision and what it cost."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["row", "rule", "feature_map", "phi_norm", "attention_norm", "rule_options", "experiment", "experiment_row",
         "point", "metric", "statistic", "mean", "std", "n", "n_planned", "n_diverged", "n_params", "state",
         "steps_per_second", "device", "profile", "protocol", "commits"]
    )  # fmt: skip
    for memory, name in family.names.items():
        start = [name, memory.rule, memory.feature_map, memory.phi_norm, memory.attention_norm, memory.options]
        for experiment, part in family.parts.items():
            plan = part.selection.plan
            end = [plan.profile, plan.protocol, " ".join(part.selection.commits)]
            for cell in part.cells_of(memory):
                runs = part.runs_of(memory, cell.point)
                place = [experiment, cell.row, cell.point, cell.metric.name, _statistic(cell)]
                writer.writerow([*start, *place, *_numbers(cell.ours[_statistic(cell)]), *_costs(runs), *end])
    return buffer.getvalue()


def _numbers(found: Summary) -> list[object]:
    exact = ["" if math.isnan(value) else f"{value:.9g}" for value in (found.mean, found.std)]
    return [*exact, found.n_found, found.n_planned, found.n_diverged]


def _costs(runs: Sequence[Run]) -> list[object]:
    speeds = _speeds(runs)
    sizes = [" ".join(map(str, _counts(runs, column))) for column in ("n_params", "state")]
    return [*sizes, f"{statistics.fmean(speeds):.4g}" if speeds else "", " ".join(sorted({run.device for run in runs}))]


def block(families: Sequence[Family]) -> str:
    """README's block: the profile nearest to the paper, smoke runs apart, and of its lines those with a run."""
    shown = next((family for family in families if family.profile != PROFILES[-1]), None)
    if shown is None:
        return f"Of the profiles `{'` and `'.join(PROFILES[:-1])}` no run is there yet."
    begun = [memory for memory in shown.names if any(column[memory].text != NONE for column in shown.columns.values())]
    table = dataclasses.replace(shown.table, lines=tuple(shown.line(memory) for memory in begun))
    notes = "\n\n".join(map(markdown_text, shown.notes))
    numbers = f"Numbers: `reports/output/{shown.profile}/{NAME}.csv`."
    where = f"Profile `{shown.profile}`; {markdown_text(shown.completeness)}. {numbers}"
    return "\n".join([where, "", *markdown_lines(table), "", notes])
