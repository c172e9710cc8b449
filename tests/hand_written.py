"""A project whose runs are written by hand, for tests of what is drawn from results/*.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fwp_lightning.experiment import Project, load_experiment, resolve_runs
from fwp_lightning.results_csv import METRIC_COLUMNS, RUN_COLUMNS, TRANSLATION_COLUMNS
from reports.__main__ import main
from reports.plan import load_plan
from reports.selection import Cell, Selection, collect, select
from reports.sources import PAPER_COLUMNS, read_results

BASE = {
    "seed_everything": 1,
    "trainer": {"max_epochs": 10},
    "model": {"class_path": "a.Model", "init_args": {"rule": "sum"}},
    "data": {"class_path": "a.Data", "init_args": {"n_keys": 20}},
}
CAPACITY = {
    "title": "Capacity",
    "source": "Figure 8, Sec. 6.1",
    "base": "base/retrieval.yaml",
    "protocol": "released",
    "seeds": [1, 2],
    "rows": {"DPFP-1": {"model.rule": "sum"}, "Linear": {"model.rule": "other"}},
    "grid": {"data.n_keys": [20, 40]},
    "protocols": {
        "released": {"version": 2, "statistic": "last"},
        "corrected": {"version": 1, "statistic": "best", "set": {"trainer.max_epochs": 11}},
    },
    "profiles": {"smoke": {"seeds": [1]}, "short": {}},
    "deviations": {"smoke": "Ten steps only."},
    "report": {
        "kind": "capacity_plot",
        "metrics": ["valid/loss"],
        "x": {"label": "number of unique keys S"},
        "y": {"label": "loss", "scale": "log", "limits": [0.001, 1]},
        "readme": ["n_keys=20", "n_keys=40"],
    },
}
CURVES = {
    "title": "Curves",
    "source": "Figure 9",
    "runs_of": "figure8",
    "grid": {"data.n_keys": [40]},
    "report": {"kind": "learning_curves", "metrics": ["valid/loss"], "x": {}, "y": {"limits": [0, 0.5]}},
}
TABLE = {
    "title": "Perplexity",
    "source": "Table 9",
    "base": "base/retrieval.yaml",
    "seeds": [1],
    "rows": {"Linear Transformer": {}, "Delta Network": {"model.rule": "delta"}},
    "protocols": {"corrected": {"statistic": "best"}},
    "profiles": {"short": {}},
    "protocol": "corrected",
    "report": {
        "kind": "table",
        "metrics": [
            {"name": "valid/perplexity", "label": "valid", "digits": 1},
            {"name": "test/bleu", "label": "BLEU", "better": "higher", "digits": 1},
        ],
    },
}


@dataclass
class Bench:
    """A project in a temporary folder, with runs written by hand."""

    root: Path
    runs: list[dict[str, str]] = field(default_factory=list)
    points: list[tuple[str, ...]] = field(default_factory=list)
    references: list[tuple[str, ...]] = field(default_factory=list)
    translations: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def project(self) -> Project:
        return Project(self.root)

    def add(
        self, row: str, values: Sequence[float], *, experiment: str = "figure8", point: str = "n_keys=20",
        seed: int = 1, profile: str = "short", protocol: str = "released", metric: str = "valid/loss",
        key: str | None = None, **changed: str,
    ) -> str:  # fmt: skip
        """Adds a run with the key that the experiment file gives it; its evaluations are at steps 100, 200, ..."""
        planned = resolve_runs(
            load_experiment(experiment, self.project), profile=profile, protocol=protocol, rows=[row], seeds=[seed]
        )
        run = next(run for run in planned if run.point == point)
        key = key or run.run_key
        line = dict.fromkeys(RUN_COLUMNS, "") | {
            "run_key": key, "experiment": experiment, "row": row, "point": point, "seed": str(seed),
            "profile": profile, "protocol": protocol, "status": "complete", "version": str(run.version),
            "wall_seconds": "1800", "finished": "2026-01-01T12:00:00Z", "git_commit": "0123456789abcdef",
            "git_dirty": "false", "config_sha256": run.config_sha256, "deviations": run.deviations,
        }  # fmt: skip
        if key not in {known["run_key"] for known in self.runs}:
            self.runs.append(line | changed)
        split, name = metric.split("/")
        self.points += [(key, split, name, str(100 * n), repr(value)) for n, value in enumerate(values, 1)]
        return key

    def paper(self, row: str, metric: str, value: str, source: str = "log", **place: str) -> None:
        place = {"experiment": "figure8", "point": "n_keys=20", "split": "valid"} | place
        self.references.append((place["experiment"], row, place["point"], place["split"], metric, value, source))

    def edit(self, name: str, **changed: object) -> None:
        """Changes top-level keys of an experiment file."""
        path = self.root / "experiments" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed, sort_keys=False))

    def write(self) -> Bench:
        folder = self.root / "results"
        columns = list(self.runs[0]) if self.runs else list(RUN_COLUMNS)
        write_csv(folder / "runs.csv", [columns, *(list(run.values()) for run in self.runs)])
        write_csv(folder / "metrics.csv", [METRIC_COLUMNS, *self.points])
        write_csv(folder / "paper.csv", [PAPER_COLUMNS, *self.references])
        write_csv(folder / "translations.csv", [TRANSLATION_COLUMNS, *self.translations])
        return self

    def selection(self, name: str = "figure8", profile: str = "short", protocol: str | None = None) -> Selection:
        self.write()
        return select(load_plan(self.project, name, profile, protocol), read_results(self.root))

    def cells(self, name: str = "figure8", profile: str = "short", protocol: str | None = None) -> list[Cell]:
        return collect(self.selection(name, profile, protocol), read_results(self.root))

    def cell(self, row: str, point: str = "n_keys=20", **where: str) -> Cell:
        return next(cell for cell in self.cells(**where) if (cell.row, cell.point) == (row, point))

    def draw(self, *arguments: str) -> int:
        self.write()
        return main([*arguments, "--root", str(self.root)])


def write_csv(path: Path, lines: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def make_bench(root: Path) -> Bench:
    """An empty project with a figure, a view of it and a table."""
    (root / "experiments" / "base").mkdir(parents=True)
    (root / "results").mkdir()
    (root / "experiments" / "base" / "retrieval.yaml").write_text(yaml.safe_dump(BASE))
    for name, content in {"figure8": CAPACITY, "figure9": CURVES, "table9": TABLE}.items():
        (root / "experiments" / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (root / "README.md").write_text("# Title\n\n<!-- results:begin -->\n<!-- results:end -->\n\nThe end.\n")
    return Bench(root)
