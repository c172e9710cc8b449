"""The verdicts as tables: Markdown, LaTeX, CSV with every value behind them, README's block and the page."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fwp_lightning.experiment import Project
from reports.claims import read_claims
from reports.sources import Results
from reports.tables import Table, latex_table, markdown_lines
from reports.verdicts import Verdict, judge, seeds

NAME = "claims"
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
TITLE = "What holds of the paper's claims"
ORIGIN = "python -m reports claims"
HOW_TO_READ = (
    "Each verdict is that of a test in experiments/claims.yaml, on the runs of one profile and one protocol. "
    "Thresholds were set with the runs of Figures 2 and 5 in view, and before those of the tables were complete. "
    "Settled is only what the profile paper decides with the seeds that the file asks for; an interval that holds the "
    "threshold decides nothing."
)


@dataclass(frozen=True)
class Line:
    """Verdicts of one claim that read alike, over the protocols in which they do."""

    verdict: Verdict
    protocols: tuple[str, ...]

    @property
    def anchors(self) -> list[tuple[str, str]]:
        """Where the page has the runs behind a verdict: words and anchor."""
        one = self.verdict
        names = dict.fromkeys(value.experiment for value in one.values)
        return [(name, f"{name}-{one.profile}-{one.protocol}") for name in names]


def verdicts_of(project: Project, results: Results) -> list[Verdict]:
    """The verdicts on the project's claims; none where it names no claims."""
    claims = read_claims(project)
    return judge(project, results, claims) if claims else []


def lines_of(verdicts: Sequence[Verdict]) -> list[Line]:
    """One line per claim and verdict; protocols of which nothing differs share it."""
    found: dict[tuple[str, ...], list[Verdict]] = {}
    for one in verdicts:
        alike = one.protocol if one.values else ""
        found.setdefault((one.claim.name, one.outcome, one.finding, alike), []).append(one)
    return [Line(members[0], tuple(one.protocol for one in members)) for members in found.values()]


def basis(verdict: Verdict) -> str:
    """Profile, number of seeds and standing of a verdict."""
    there = seeds(verdict.n_seeds) if verdict.values else "no run"
    return f"{verdict.profile}, {there}{f'; {verdict.standing}' if verdict.standing else ''}"


def save(verdicts: Sequence[Verdict], output: Path) -> list[Path]:
    """Writes claims.md, claims.tex, claims.csv and claims_runs.csv."""
    output.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{NAME}.md": to_markdown(verdicts),
        f"{NAME}.tex": to_latex(verdicts),
        f"{NAME}.csv": to_csv(verdicts),
        f"{NAME}_runs.csv": to_runs_csv(verdicts),
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8", newline="\n")
    return [output / name for name in texts]


def to_text(verdicts: Sequence[Verdict]) -> str:
    """What the command prints: each claim, and below it a line per protocol."""
    parts = []
    for claim, members in itertools.groupby(lines_of(verdicts), key=lambda line: line.verdict.claim):
        lines = [f"{claim.claim} ({claim.source})"]
        lines += [
            f"  {', '.join(line.protocols)}: {line.verdict.outcome} [{basis(line.verdict)}]: {line.verdict.finding}"
            for line in members
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def table(verdicts: Sequence[Verdict], *, linked: str = "") -> Table:
    """The verdicts as a table; with `linked`, a path to reports/output, findings link to the reports behind them."""
    lines, links, last = [], [], ""
    for line in lines_of(verdicts):
        one = line.verdict
        named = f"{one.claim.claim} ({one.claim.source})"
        lines.append((named if named != last else "", ", ".join(line.protocols), one.outcome, basis(one), one.finding))
        links.append(f" ({_links(line, linked)})" if linked and line.anchors else "")
        last = named
    return Table(("claim", "protocol", "verdict", "profile and seeds", "finding"), tuple(lines), 5, links=tuple(links))


def _links(line: Line, root: str) -> str:
    one = line.verdict
    return ", ".join(f"[{name}]({root}{one.profile}/{one.protocol}/{name}.md)" for name, _ in line.anchors)


def notes(verdicts: Sequence[Verdict]) -> list[str]:
    """Of each claim its threshold, why it is that, and what may explain the result otherwise."""
    sentences = []
    for claim, members in itertools.groupby(verdicts, key=lambda one: one.claim):
        suspect = f" Suspect: {claim.suspect}." if claim.suspect else ""
        sentences.append(f"{claim.claim}. Test: {next(members).threshold}. Reason: {claim.reason}.{suspect}")
    return sentences


def provenance(verdicts: Sequence[Verdict]) -> str:
    """One line with the command, the commits and the number of runs."""
    keys = {value.run_key for one in verdicts for value in one.values}
    commits = sorted({commit for one in verdicts for commit in one.commits})
    return f"{ORIGIN} · {len(keys)} runs · commits {', '.join(commits) or 'none'}"


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown document beside the other reports."""
    files = f"Numbers: [{NAME}.csv]({NAME}.csv); every run with its key: [{NAME}_runs.csv]({NAME}_runs.csv)."
    listed = "\n".join(f"* {note}" for note in notes(verdicts))
    parts = [f"# {TITLE}", HOW_TO_READ, "\n".join(markdown_lines(table(verdicts, linked="./"))), files, listed]
    return "\n\n".join([*parts, provenance(verdicts)]) + "\n"


def block(verdicts: Sequence[Verdict]) -> str:
    """README's block."""
    if not verdicts:
        return "No claims are named."
    shown = markdown_lines(table(verdicts, linked="reports/output/"))
    where = (
        f"Thresholds and reasons: `reports/output/{NAME}.md`; every run with its key: `reports/output/{NAME}_runs.csv`."
    )
    return "\n".join([HOW_TO_READ, "", *shown, "", where])


def to_latex(verdicts: Sequence[Verdict]) -> str:
    """The verdicts for a paper that loads booktabs and array."""
    comments = [provenance(verdicts), TITLE, HOW_TO_READ, *notes(verdicts)]
    columns = "p{.24\\linewidth}p{.1\\linewidth}p{.12\\linewidth}p{.14\\linewidth}p{.3\\linewidth}"
    return latex_table(table(verdicts), comments, columns)


def to_csv(verdicts: Sequence[Verdict]) -> str:
    """One line per claim and protocol."""
    columns = (
        "name", "claim", "source", "suspect", "protocol", "profile", "verdict", "standing", "n_seeds", "n_runs",
        "test", "threshold", "reason", "finding", "estimate", "low", "high", "commits",
    )  # fmt: skip
    return _csv(columns, (_line(one) for one in verdicts))


def _line(one: Verdict) -> list[object]:
    claim, interval = one.claim, one.interval
    numbers = [f"{n:.6g}" for n in (interval.estimate, interval.low, interval.high)] if interval else ["", "", ""]
    start = [claim.name, claim.claim, claim.source, claim.suspect, one.protocol, one.profile, one.outcome, one.standing]
    middle = [one.n_seeds, len(one.values), claim.test, one.threshold, claim.reason, one.finding]
    return [*start, *middle, *numbers, " ".join(one.commits)]


def to_runs_csv(verdicts: Sequence[Verdict]) -> str:
    """One line per claim and run that bears on it."""
    columns = ("claim", "protocol", "profile", "experiment", "row", "point", "seed", "metric", "value", "run_key")
    lines = (
        [one.claim.name, one.protocol, one.profile, value.experiment, value.row, value.point, value.seed,
         one.claim.metric.name, f"{value.value:.9g}", value.run_key]
        for one in verdicts
        for value in one.values
    )  # fmt: skip
    return _csv(columns, lines)


def _csv(columns: Sequence[str], lines: object) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)  # type: ignore[arg-type]
    return buffer.getvalue()
