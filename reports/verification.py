"""Checks that results/*.csv and the reports on disk belong to the experiment files and to each other."""

from __future__ import annotations

import functools
import io
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, Run, View, load_experiment, resolve_runs
from fwp_lightning.results_csv import Row, read_metrics, read_runs
from reports import benchmarks, readme
from reports.drawing import draw
from reports.plan import report_names, runs_of
from reports.sources import read_results

# ties runs to the user's own files, as a sweep does
Prepare = Callable[[list[Run]], list[Run]]


@dataclass
class Findings:
    """What a verification found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(project: Project, prepare: Prepare = list) -> int:
    """Print what is wrong with results and reports, a line each; return 1 if anything is, else 0."""
    runs_file, metrics_file = project.results / "runs.csv", project.results / "metrics.csv"
    runs, metrics = read_runs(runs_file), read_metrics(metrics_file)
    found = check_runs(project, runs, prepare)
    found.problems += check_metrics(runs, metrics)
    found.problems += check_reports(project)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"wrong: {problem}")
    counts = f"{len(runs)} runs, {len(metrics)} values"
    print(f"{counts}: {f'{len(found.problems)} wrong' if found.problems else 'all right'}")
    return 1 if found.problems else 0


# --- runs.csv --------------------------------------------------------------------------------------------------------


class Resolution:
    """The runs that the experiment files of a project give, by their place."""

    def __init__(self, project: Project, prepare: Prepare) -> None:
        """Resolve nothing yet."""
        self.project, self.prepare = project, prepare
        self.runs_at = functools.cache(self._runs_at)

    def run_of(self, row: Row) -> Run | None:
        """The run at the place that a row states; None where the experiment files have no such place."""
        try:
            found = self.runs_at(row["experiment"], row["profile"], row["protocol"], int(row["seed"]))
        except UserError:
            return None
        return found.get((row["row"], row["point"]))

    def _runs_at(self, name: str, profile: str, protocol: str, seed: int) -> dict[tuple[str, str], Run]:
        runs = resolve_runs(load_experiment(name, self.project), profile=profile, protocol=protocol, seeds=[seed])
        return {(run.row, run.point): run for run in self.prepare(runs) if run.experiment == name}

    def owner_of(self, row: Row) -> str | None:
        """The place whose run key a row bears, of all profiles and protocols of its experiment with its seed."""
        try:
            experiment = load_experiment(row["experiment"], self.project)
        except UserError:
            return None
        if isinstance(experiment, View):
            return None
        for profile in experiment.profiles:
            for protocol in experiment.protocols:
                for run in self.runs_at(experiment.name, profile, protocol, int(row["seed"])).values():
                    if run.run_key == row["run_key"]:
                        return f"{run.name} of the profile {profile} and the protocol {protocol}"
        return None


def check_runs(project: Project, rows: Sequence[Row], prepare: Prepare = list) -> Findings:
    """Compare key, configuration hash and version of every row with what its experiment file gives.

    A row with other settings is compared with the experiment files of the commit that it was made with.
    """
    found, today = Findings(), Resolution(project, prepare)
    earlier: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        at_commit = functools.cache(lambda commit: _files_at(project, commit, Path(folder) / commit))
        for row in rows:
            expected = today.run_of(row)
            if _agrees(row, expected):
                continue
            former = at_commit(row["git_commit"]) if row["git_commit"] else None
            if former is not None and _agrees(row, Resolution(former, prepare).run_of(row)):
                earlier[_settings_of(row, expected)] += 1
            else:
                found.problems.append(f"{_name(row)}: {_complaint(row, expected, today)}")
    found.notes = [f"{count} of {text}" for text, count in sorted(earlier.items())]
    return found


def _agrees(row: Row, run: Run | None) -> bool:
    stated = (row["run_key"], row["config_sha256"], row["version"])
    return run is not None and stated == (run.run_key, run.config_sha256, str(run.version))


def _files_at(project: Project, commit: str, folder: Path) -> Project | None:
    """The experiment files of a commit, unpacked into a folder; None where git does not have them."""
    # a commit is named by its hash alone: nothing else from a CSV file gets to git's command line
    if not set(commit) <= set("0123456789abcdef") or len(commit) < 7:
        return None
    command = ["git", "archive", "--format=tar", commit, "experiments"]
    try:
        done = subprocess.run(command, cwd=project.root, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            # nothing outside of the folder, no links out of it, no devices
            archive.extractall(folder, filter="data")
    except tarfile.TarError:
        return None
    return Project(folder)


def _settings_of(row: Row, expected: Run | None) -> str:
    place = f"{row['experiment']} ({row['profile']}, {row['protocol']})"
    now = ""
    if expected is not None and str(expected.version) != row["version"]:
        now = f", version {row['version']} of the protocol where the file has {expected.version} now"
    return f"{place}: with the settings of commit {row['git_commit'][:10]}, not those of today{now}"


def _complaint(row: Row, expected: Run | None, today: Resolution) -> str:
    if expected is not None and row["run_key"] == expected.run_key:
        if row["version"] != str(expected.version):
            return f"version is {row['version']}, but the run key is that of version {expected.version}"
        return f"config_sha256 is {row['config_sha256'][:16]}, but this run key has {expected.config_sha256[:16]}"
    if owner := today.owner_of(row):
        return f"the run key is that of {owner}"
    source = f"nor of commit {row['git_commit'][:10]} gives" if row["git_commit"] else "gives, and no commit is named:"
    dirty = ", which had uncommitted changes" if row["git_dirty"] == "true" else ""
    return f"neither the experiment file of today {source} this run key{dirty}"


def _name(row: Row) -> str:
    parts = (row["experiment"], row["row"], row["point"], f"seed{row['seed']}")
    where = "/".join(part for part in parts if part)
    return f"runs.csv, {row['run_key']} ({where}, {row['profile']}, {row['protocol']})"


# --- metrics.csv -----------------------------------------------------------------------------------------------------


def check_metrics(runs: Iterable[Row], metrics: Iterable[Row]) -> Iterator[str]:
    """Yield the run keys that have values but no run, and the runs that ended well without any value."""
    counts = Counter(row["run_key"] for row in metrics)
    known = {row["run_key"]: row for row in runs}
    for key in sorted(counts.keys() - known.keys()):
        yield f"metrics.csv: {counts[key]} values of the run {key}, which is not in runs.csv"
    for key, row in known.items():
        if row["status"] == "complete" and not counts[key]:
            yield f"{_name(row)}: it is complete and has no value in metrics.csv"


# --- reports ---------------------------------------------------------------------------------------------------------


def check_reports(project: Project) -> Iterator[str]:
    """Yield the files of reports/output, and README's block, that are not what the CSV files give, byte for byte."""
    results, output = read_results(project.root), project.root / "reports" / "output"
    drawn: dict[str, bytes] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if any(runs_of(project, name) in results.experiments for name in report_names(project)):
                draw(project, results, [], Path(folder), say=lambda line: None)
            if benchmarks.read(project.root):
                benchmarks.draw(project.root, Path(folder))
            drawn = _contents(Path(folder))
    except UserError as error:
        yield f"reports: {error}"
        return
    there = _contents(output)
    for name in sorted(drawn.keys() | there.keys()):
        if name not in there:
            yield f"reports/output/{name} is missing; run `python -m reports`"
        elif name not in drawn:
            yield f"reports/output/{name} belongs to no run in results/runs.csv; delete it"
        elif drawn[name] != there[name]:
            yield f"reports/output/{name} is not what results/*.csv gives; run `python -m reports`"
    yield from _check_readme(project)


def _contents(folder: Path) -> dict[str, bytes]:
    # hidden files are what systems leave in folders that are looked at
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _check_readme(project: Project) -> Iterator[str]:
    path = project.root / "README.md"
    if not path.is_file() or readme.BEGIN not in path.read_text(encoding="utf-8", errors="replace"):
        return
    try:
        readme.rewrite(project, read_results(project.root), check=True)
    except UserError as error:
        yield str(error)
