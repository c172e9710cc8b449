"""Experiment files: from rows, grids and seeds as the paper names them to runs with exact configurations.

Nothing here imports torch: listing, checking and planning experiments is fast.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fwp_lightning.errors import UserError
from fwp_lightning.registry import did_you_mean
from fwp_lightning.yaml_files import read_yaml

Config = dict[str, Any]

PROFILES = ("smoke", "short", "short-gpu", "paper")
# of an experiment that declares none
DEFAULT_PROTOCOL = "released"
STATISTICS = ("last", "best")
LARGEST_SEED = 2**32 - 1
MOST_RUNS = 100_000
MOST_DEVICES = 4096
# experiments and protocols name files and folders
FILE_NAME = re.compile(r"[^\W_][\w+-]{0,63}")
# a spreadsheet takes a cell that begins with one of these for a formula
FORMULA_STARTS = ("=", "+", "-", "@")
LONGEST_VALUE = 200
# seconds of training between two checkpoints of a run
CHECKPOINT_SECONDS = 30.0
BASE_KEYS = ("seed_everything", "trainer", "model", "data")
# options that came after runs had been made: dotted option -> the value at which it changes nothing
ADDED = "added"
# the file beside the experiments that is none: the paper's claims, read by the reports
CLAIMS = "claims"
EXPERIMENT_KEYS = (
    "title", "source", "base", "protocol", "seeds", "rows", "grid", "variants", "protocols", "profiles", "deviations",
    "report",
)  # fmt: skip
VIEW_KEYS = ("title", "source", "runs_of", "rows", "grid", "profiles", "deviations", "report")

# settings that decide where things are written, what is shown, how data are fetched or in which order the same numbers
# are added (backend, compute: they change rounding only), never what is computed
NOT_IN_KEY = {
    "backend", "barebones", "compute", "default_root_dir", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "logger", "log_every_n_steps", "num_workers", "persistent_workers", "pin_memory",
    "prefetch_factor", "profiler",
}  # fmt: skip
PATH_WORDS = {"cache", "dir", "directory", "file", "folder", "path", "root"}


@dataclass(frozen=True)
class Project:
    """The folders of a project: experiments, results, run folders and the MLflow store."""

    root: Path
    """Project root, absolute"""

    @property
    def experiments(self) -> Path:
        """Folder of the experiment files."""
        return self.root / "experiments"

    @property
    def results(self) -> Path:
        """Folder of the committed CSV files."""
        return self.root / "results"

    @property
    def data(self) -> Path:
        """Folder of downloaded corpora and of token files."""
        return self.root / "data"

    @property
    def artifacts(self) -> Path:
        """Folder under which MLflow keeps artifacts."""
        return self.root / "mlartifacts"

    @property
    def runs(self) -> Path:
        """Folder of checkpoints and journals, one folder per run key."""
        return self.root / "runs"

    @property
    def store_uri(self) -> str:
        """Address of the MLflow store: MLFLOW_TRACKING_URI, else mlflow.db in the project root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def store_file(self) -> Path | None:
        """The SQLite file behind the store, None where the store is a server."""
        uri = self.store_uri
        return Path(uri.removeprefix("sqlite:///").split("?")[0]) if uri.startswith("sqlite:///") else None


def find_project(start: Path | None = None, *, required: bool = True) -> Project:
    """Return the project around ``start``: FWP_ROOT, else the nearest parent with pyproject.toml and experiments/.

    Outside of a project that is an error, or ``start`` itself where none is required.
    """
    if named := os.environ.get("FWP_ROOT"):
        root = Path(named).expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"FWP_ROOT={named} is no folder; set it to a project root or unset it.")
        if required and not (root / "experiments").is_dir():
            raise UserError(f"FWP_ROOT={named} has no folder experiments; set it to a project root or unset it.")
        return Project(root)
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "experiments").is_dir():
            return Project(folder)
    if required:
        raise UserError(
            f"{here} lies in no project, a folder with pyproject.toml and experiments/; go to one or set FWP_ROOT."
        )
    return Project(here)


@dataclass(frozen=True)
class Protocol:
    """How an experiment is trained and evaluated, as the released code does it or as the text means it."""

    version: int = 1
    statistic: str = STATISTICS[0]
    set: Config = field(default_factory=dict)
    rows: dict[str, Config] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """How much of an experiment is run: settings, grid, seeds and rows that replace the experiment's own."""

    set: Config = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    seeds: list[int] | None = None
    rows: list[str] | None = None
    row_grid: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    row_set: dict[str, Config] = field(default_factory=dict)
    variants: dict[str, dict[str, Config]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper: named rows over a complete base configuration."""

    name: str
    base: Config
    rows: dict[str, Config]
    protocol: str
    protocols: dict[str, Protocol]
    profiles: dict[str, Profile]
    seeds: list[int]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Config]] = field(default_factory=dict)
    """Grid keys that are no option but a name for several: key -> value -> what it sets"""
    deviations: dict[str, str] = field(default_factory=dict)
    title: str = ""
    source: str = ""
    base_file: str = ""
    added: Config = field(default_factory=dict)
    """Options younger than the first runs: dotted option -> the value at which it changes nothing"""


@dataclass(frozen=True)
class ViewFilter:
    """Which runs of another experiment a view shows; None means all."""

    rows: list[str] | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A figure or table made of another experiment's runs."""

    name: str
    parent: Experiment
    chosen: ViewFilter
    profiles: dict[str, ViewFilter]
    deviations: dict[str, str] = field(default_factory=dict)
    title: str = ""
    source: str = ""


@dataclass(frozen=True)
class Run:
    """One training: its place in the experiment and the exact configuration that LightningCLI gets."""

    experiment: str
    row: str
    point: str
    seed: int
    profile: str
    protocol: str
    version: int
    config: Config
    deviations: str = ""
    base_file: str = ""
    """File of the base configuration, for complaints about it"""
    imported: tuple[str, ...] = ()
    """SHA-256 of the user's files that its rule, feature map or text comes from: ``with_imports``, ``with_texts``"""
    added: Config = field(default_factory=dict)
    """Options that leave the run what it is while they have this value, see ``Experiment.added``"""

    @property
    def name(self) -> str:
        """Return the run's name in MLflow, as in ``figure2/DPFP-1/n_keys=100/seed1``."""
        return "/".join(part for part in (self.experiment, self.row, self.point, f"seed{self.seed}") if part)

    @cached_property
    def run_key(self) -> str:
        """Sixteen hex digits that name the run: its place, its configuration and the user's files it depends on.

        Paths are left out, and so is what cannot change a result. ``backend`` and ``compute`` are left out too: they
        choose between formulations of the same function, which differ in rounding only.
        """
        place = [self.experiment, self.row, self.point, self.seed, self.profile, self.protocol, self.version]
        # runs of the suite's own parts share their keys, whatever else was imported beside them
        files = [list(self.imported)] if self.imported else []
        return sha256_of([*place, without_paths(self._config_as_first_made), *files])[:16]

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of the resolved configuration, but for paths: where things lie differs between machines."""
        return sha256_of(_without(self._config_as_first_made, _names_a_path))

    @property
    def _config_as_first_made(self) -> Config:
        """The configuration without added options that change nothing: a run made before them is still this run."""
        config = copy.deepcopy(self.config)
        for key, neutral in self.added.items():
            *parents, last = key.split(".")
            node: Any = config
            for part in parents:
                node = _inside(node, part)
                node = node.get(part) if isinstance(node, dict) else None
            node = _inside(node, last)
            # a run of another class has no such option
            if isinstance(node, dict) and last in node and _is_same(node[last], neutral):
                del node[last]
        return config


def _is_same(value: Any, other: Any) -> bool:
    return value == other and type(value) is type(other)


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_paths(value: Any) -> Any:
    """Return a configuration without paths and without settings that cannot change a result."""
    return _without(value, lambda key: key in NOT_IN_KEY or _names_a_path(key))


def _without(value: Any, is_left_out: Callable[[str], bool]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, is_left_out) for key, item in value.items() if not is_left_out(key)}
    if isinstance(value, list):
        return [_without(item, is_left_out) for item in value]
    return value


def _names_a_path(key: str) -> bool:
    return key != "class_path" and key.split("_")[-1] in PATH_WORDS


# --- reading ---------------------------------------------------------------------------------------------------------


def experiment_names(project: Project) -> list[str]:
    """Return the names of all experiments of a project, figures and tables in natural order."""
    names = [path.stem for path in project.experiments.glob("*.yaml") if path.stem != CLAIMS]
    return sorted(names, key=natural_key)


def natural_key(text: str) -> list[tuple[int, Any]]:
    """Return a sort key that puts n_keys=60 before n_keys=100.

    >>> sorted(["n=100", "n=60"], key=natural_key)
    ['n=60', 'n=100']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part)) if index % 2 else (1, part) for index, part in enumerate(parts)]


def load_experiment(name: str, project: Project) -> Experiment | View:
    """Return the checked experiment or view called ``name``."""
    known = experiment_names(project)
    if not known:
        raise UserError(f"no experiment files in {project.experiments}; run inside the project or set FWP_ROOT.")
    if name not in known:
        raise UserError(f"unknown experiment {name!r}. {did_you_mean(name, known)}")
    reader, content = _open(name, project)
    if "runs_of" not in content:
        return reader.experiment(name, content, project)
    reader.known_keys(content, VIEW_KEYS, "")
    parent = reader.text(content, "runs_of")
    if parent not in known:
        raise reader.fail("runs_of", f"unknown experiment {parent!r}. {did_you_mean(parent, known)}")
    of_parent, content_of_parent = _open(parent, project)
    if "runs_of" in content_of_parent:
        what = "is this file" if parent == name else "is a view"
        raise reader.fail("runs_of", f"{parent} {what} itself; name an experiment that has rows of its own.")
    return reader.view(name, content, of_parent.experiment(parent, content_of_parent, project))


def _open(name: str, project: Project) -> tuple[_Reader, Config]:
    if not FILE_NAME.fullmatch(name):
        raise UserError(
            f"experiments/{name}.yaml: {name!r} is no name for folders of results; rename the file to letters, digits, "
            "_, + and -."
        )
    path = project.experiments / f"{name}.yaml"
    return _Reader(f"experiments/{path.name}"), read_yaml(path)


class _Reader:
    """Checks one experiment file; each complaint names the file, the place and the value."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, place: str, problem: str) -> UserError:
        return UserError(f"{self.file}: {place + ': ' if place else ''}{problem}")

    def known_keys(self, content: Mapping[str, Any], known: Sequence[str], place: str) -> None:
        for key in content:
            if key not in known:
                raise self.fail(place, f"unknown key {key!r}. {did_you_mean(str(key), list(known))}")

    def text(self, content: Mapping[str, Any], key: str, default: str | None = None, place: str = "") -> str:
        value = content.get(key, default)
        if not isinstance(value, str):
            raise self.fail(
                f"{place}{key}", f"must be a text, not {_short(value)}." if key in content else "is missing."
            )
        return " ".join(value.split())

    def mapping(self, content: Mapping[str, Any], key: str, place: str = "") -> Config:
        value = content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(f"{place}{key}", f"must be a mapping, not {_short(value)}.")
        return {str(name): item for name, item in value.items()}

    def mappings(self, content: Mapping[str, Any], key: str, place: str = "") -> dict[str, Config]:
        """A mapping of names to mappings; the names stand in tables and CSV files."""
        named = self.mapping(content, key, place)
        for name in named:
            if name.startswith(FORMULA_STARTS):
                raise self.fail(
                    f"{place}{key}", f"{name!r} begins like a formula of a spreadsheet; choose another name."
                )
        return {name: self.mapping(named, name, f"{place}{key}.") for name in named}

    def seeds(self, content: Mapping[str, Any], place: str) -> list[int] | None:
        value = content.get("seeds")
        if value is None:
            return None
        numbers = isinstance(value, list) and all(type(seed) is int for seed in value)
        if not numbers or not value or len(set(value)) < len(value):
            raise self.fail(place, f"must be a list of different whole numbers, as in [1, 2, 3], not {_short(value)}.")
        for seed in value:
            if not 0 <= seed <= LARGEST_SEED:
                raise self.fail(place, f"{seed} is no seed; seeds go from 0 to {LARGEST_SEED}.")
        return list(value)

    def grid(self, content: Mapping[str, Any], key: str, place: str = "") -> dict[str, list[Any]]:
        grid = self.mapping(content, key, place)
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise self.fail(
                    f"{place}{key}.{name}", f"must be a list of values, as in [20, 40], not {_short(values)}."
                )
            if len({json.dumps(value) for value in values}) < len(values):
                raise self.fail(f"{place}{key}.{name}", f"holds a value twice: {_short(values)}.")
            for value in values:
                if isinstance(value, str) and re.search(r"[,\n\t]", value):
                    raise self.fail(
                        f"{place}{key}.{name}", f"{_short(value)} has a comma or a line break; leave it out."
                    )
        return grid

    def row_names(self, content: Mapping[str, Any], rows: Mapping[str, Any], place: str) -> list[str] | None:
        value = content.get("rows")
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.fail(f"{place}rows", f"must be a list of row names, not {_short(value)}.")
        for row in value:
            self.known_row(str(row), rows, f"{place}rows")
        return [str(row) for row in value]

    def known_row(self, row: str, rows: Mapping[str, Any], place: str) -> None:
        if row not in rows:
            raise self.fail(place, f"unknown row {row!r}. {did_you_mean(row, list(rows))}")

    def overrides(self, content: Mapping[str, Any], key: str, base: Config, place: str = "") -> Config:
        settings = self.mapping(content, key, place)
        merge(copy.deepcopy(base), settings, f"{self.file}: {place}{key}")
        return settings

    def row_overrides(self, content: Mapping[str, Any], key: str, base: Config, rows: Config, place: str) -> Config:
        by_row = self.mapping(content, key, place)
        for row in by_row:
            self.known_row(row, rows, f"{place}{key}")
            self.overrides(by_row, row, base, f"{place}{key}.")
        return by_row

    def experiment(self, name: str, content: Config, project: Project) -> Experiment:
        self.known_keys(content, EXPERIMENT_KEYS, "")
        base_file = self.text(content, "base")
        if not (project.experiments / base_file).resolve().is_relative_to(project.experiments.resolve()):
            raise self.fail("base", f"{base_file!r} lies outside of experiments/; name a file in it.")
        base, added = read_base(project.experiments / base_file)
        rows = self.mappings(content, "rows")
        if not rows:
            raise self.fail("rows", "is missing; name at least one row.")
        for row in rows:
            self.overrides(rows, row, base, "rows.")
        protocols = self.protocols(content, base, rows)
        variants = self.variants(content, base)
        profiles = self.profiles(content, base, rows, variants)
        protocols = protocols or {DEFAULT_PROTOCOL: Protocol()}
        default = self.text(content, "protocol", next(iter(protocols)))
        if default not in protocols:
            raise self.fail("protocol", f"unknown protocol {default!r}. {did_you_mean(default, list(protocols))}")
        grid = self.grid(content, "grid")
        self.grid_keys(grid, base, variants, "grid")
        return Experiment(
            name=name,
            base=base,
            rows=rows,
            protocol=default,
            protocols=protocols,
            profiles=profiles,
            seeds=self.seeds(content, "seeds") or [int(base["seed_everything"])],
            grid=grid,
            variants=variants,
            deviations=self.deviations(content, {*protocols, *profiles}),
            title=self.text(content, "title", ""),
            source=self.text(content, "source", ""),
            base_file=f"experiments/{base_file}",
            added=added,
        )

    def protocols(self, content: Config, base: Config, rows: Config) -> dict[str, Protocol]:
        found = {}
        for name, settings in self.mappings(content, "protocols").items():
            place = f"protocols.{name}."
            if not FILE_NAME.fullmatch(name):
                raise self.fail(
                    "protocols", f"{name!r} is no name for folders of results; use letters, digits, _, + and -."
                )
            self.known_keys(settings, ("version", "statistic", "set", "rows"), place[:-1])
            version, statistic = settings.get("version", 1), settings.get("statistic", STATISTICS[0])
            if type(version) is not int or version < 1:
                raise self.fail(f"{place}version", f"must be a whole number from 1, not {_short(version)}.")
            if statistic not in STATISTICS:
                raise self.fail(f"{place}statistic", f"must be {' or '.join(STATISTICS)}, not {_short(statistic)}.")
            shared = self.overrides(settings, "set", base, place)
            by_row = self.row_overrides(settings, "rows", base, rows, place)
            found[name] = Protocol(version=version, statistic=statistic, set=shared, rows=by_row)
        return found

    def variants(self, content: Config, base: Config, place: str = "") -> dict[str, dict[str, Config]]:
        found: dict[str, dict[str, Config]] = {}
        for key, named in self.mappings(content, "variants", place).items():
            here = f"{place}variants.{key}."
            found[key] = {value: self.overrides(named, value, base, here) for value in named}
        return found

    def profiles(
        self, content: Config, base: Config, rows: Config, variants: dict[str, dict[str, Config]]
    ) -> dict[str, Profile]:
        found = {}
        for name, settings in self.mappings(content, "profiles").items():
            place = f"profiles.{name}."
            self.known_keys({name: None}, PROFILES, "profiles")
            self.known_keys(settings, tuple(Profile.__dataclass_fields__), place[:-1])
            grid = self.grid(settings, "grid", place) if "grid" in settings else None
            own = self.variants(settings, base, place)
            self.known_keys(own, tuple(variants), f"{place}variants")
            known = {key: {**named, **own.get(key, {})} for key, named in variants.items()}
            self.grid_keys(grid or {}, base, known, f"{place}grid")
            row_grid = {}
            for row in self.mapping(settings, "row_grid", place):
                self.known_row(row, rows, f"{place}row_grid")
                row_grid[row] = self.grid(settings["row_grid"], row, f"{place}row_grid.")
                self.grid_keys(row_grid[row], base, known, f"{place}row_grid.{row}")
            found[name] = Profile(
                set=self.overrides(settings, "set", base, place),
                grid=grid,
                seeds=self.seeds(settings, f"{place}seeds"),
                rows=self.row_names(settings, rows, place),
                row_grid=row_grid,
                row_set=self.row_overrides(settings, "row_set", base, rows, place),
                variants=own,
            )
        return found or {name: Profile() for name in PROFILES}

    def grid_keys(
        self, grid: Mapping[str, list[Any]], base: Config, variants: Mapping[str, Config], place: str
    ) -> None:
        for key, values in grid.items():
            if key not in variants:
                merge(copy.deepcopy(base), {key: values[0]}, f"{self.file}: {place}")
                continue
            for value in values:
                if not isinstance(value, str) or value not in variants[key]:
                    known = did_you_mean(str(value), list(variants[key]))
                    raise self.fail(f"{place}.{key}", f"variants has no {_short(value)}. {known}")

    def deviations(self, content: Config, known: set[str]) -> dict[str, str]:
        sentences = self.mapping(content, "deviations")
        self.known_keys(sentences, sorted(known), "deviations")
        return {
            key: self.text(sentences, key, place="deviations.") for key, text in sentences.items() if text is not None
        }

    def view(self, name: str, content: Config, parent: Experiment) -> View:
        profiles = {}
        for profile, settings in self.mappings(content, "profiles").items():
            place = f"profiles.{profile}."
            self.known_keys({profile: None}, tuple(parent.profiles), "profiles")
            self.known_keys(settings, ("rows", "grid"), place[:-1])
            profiles[profile] = self.view_filter(settings, parent, place)
        return View(
            name=name,
            parent=parent,
            chosen=self.view_filter(content, parent, ""),
            profiles=profiles,
            deviations=self.deviations(content, {*parent.protocols, *parent.profiles}),
            title=self.text(content, "title", ""),
            source=self.text(content, "source", ""),
        )

    def view_filter(self, content: Config, parent: Experiment, place: str) -> ViewFilter:
        grid = self.grid(content, "grid", place)
        self.known_keys(grid, tuple(parent.grid), f"{place}grid")
        return ViewFilter(rows=self.row_names(content, parent.rows, place), grid=grid)


def read_base(path: Path) -> tuple[Config, Config]:
    """Return a complete LightningCLI configuration, and its options that came later with their neutral values."""
    base = read_yaml(path)
    added = base.pop(ADDED, None) or {}
    if not isinstance(added, dict):
        raise UserError(f"{path}: {ADDED} must be a mapping of options to neutral values, not {_short(added)}.")
    for key in BASE_KEYS:
        if key not in base:
            raise UserError(f"{path}: the key {key!r} is missing; a base configuration is complete.")
    for key in base:
        if key not in BASE_KEYS:
            raise UserError(f"{path}: unknown key {key!r}. {did_you_mean(str(key), [*BASE_KEYS, ADDED])}")
    seed = base["seed_everything"]
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{path}: seed_everything={_short(seed)} must be a whole number from 0 to {LARGEST_SEED}.")
    merge(copy.deepcopy(base), added, f"{path}: {ADDED}")
    _require_parts(base, str(path))
    return base, added


def _require_parts(config: Config, place: str) -> None:
    """Refuse a configuration without a trainer's settings, or whose model or data name no class."""
    trainer = config["trainer"]
    if not isinstance(trainer, dict):
        raise UserError(f"{place}: trainer must be a mapping of settings, not {_short(trainer)}.")
    devices = trainer.get("devices")
    # Lightning makes a list of them, however many they are
    if type(devices) is int and devices > MOST_DEVICES:
        raise UserError(f"{place}: trainer.devices={_short(devices)} are more than {MOST_DEVICES}.")
    for part in ("model", "data"):
        settings = config[part]
        if not isinstance(settings, dict) or not isinstance(settings.get("class_path"), str):
            raise UserError(f"{place}: {part} must name its class, as in {{class_path: ...}}, not {_short(settings)}.")
        if not isinstance(settings.get("init_args"), dict | None):
            raise UserError(f"{place}: {part} must be a mapping of settings, not {_short(settings['init_args'])}.")


def _short(value: Any) -> str:
    """Return a value as it stands in a complaint."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


# --- resolving -------------------------------------------------------------------------------------------------------


def merge(config: Config, overrides: Mapping[str, Any], place: str) -> None:
    """Put overrides with dotted keys into ``config``; a key that the base configuration does not have is an error."""
    for key, value in overrides.items():
        if key.split(".")[0] == "seed_everything":
            raise UserError(f"{place}: seed_everything is not set here; use seeds: [{value}].")
        _set(config, str(key), value, place)


def _set(config: Config, key: str, value: Any, place: str) -> None:
    node: Any = config
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        node = _inside(node, part)
        if not isinstance(node, dict) or part not in node:
            known = list(node) if isinstance(node, dict) else []
            missing = ".".join([*parents, last][: depth + 1])
            raise UserError(f"{place}: the base configuration has no key {missing!r}. {did_you_mean(part, known)}")
        if depth < len(parents):
            node = node[part]
    current = node[last]
    if isinstance(value, dict) and isinstance(current, dict) and "class_path" not in value:
        for name, item in value.items():
            _set(config, f"{key}.{name}", item, place)
    elif isinstance(current, dict) and value is not None and not isinstance(value, dict):
        names = ", ".join(_inside(current, ""))
        raise UserError(
            f"{place}: {key} is a group of settings ({names}) and cannot be {_short(value)}; set one of them."
        )
    else:
        node[last] = copy.deepcopy(value)


def _inside(node: Any, part: str) -> Any:
    """Return the settings of a class when ``node`` names one and ``part`` is not class_path or init_args itself."""
    names_class = isinstance(node, dict) and "class_path" in node and "init_args" in node
    return node["init_args"] if names_class and part not in ("class_path", "init_args") else node


def resolve_runs(
    experiment: Experiment | View,
    *,
    profile: str = "smoke",
    protocol: str | None = None,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """Return the runs of an experiment under a profile and a protocol, rows in file order, then points, then seeds.

    Later wins: base, the protocol's set, the profile's set, the row, the protocol's row, the profile's row, the grid
    point, the seed.
    """
    if isinstance(experiment, View):
        return _runs_of_view(experiment, profile, protocol, rows, seeds)
    chosen = _profile(experiment, profile)
    protocol = experiment.protocol if protocol is None else protocol
    if protocol not in experiment.protocols:
        known = did_you_mean(protocol, list(experiment.protocols))
        raise UserError(f"{experiment.name} has no protocol {protocol!r}. {known}")
    rows = _chosen_rows(experiment.name, rows, list(experiment.rows))
    offered = experiment.rows if chosen.rows is None else chosen.rows
    names = [row for row in experiment.rows if row in offered and (rows is None or row in rows)]
    if not names:
        raise UserError(f"{experiment.name} has none of the rows {', '.join(rows or ())} in the profile {profile}.")
    seeds = seeds or chosen.seeds or experiment.seeds
    number = sum(_count_points(experiment, chosen, row) for row in names) * len(seeds)
    if number > MOST_RUNS:
        raise UserError(f"{experiment.name} has {number:,} runs in the profile {profile}; {MOST_RUNS:,} is the most.")
    return [
        _resolve(experiment, row, point, seed, profile, protocol)
        for row in names
        for point in _points(experiment, chosen, row)
        for seed in seeds
    ]


def at_points(runs: Sequence[Run], points: Sequence[str]) -> list[Run]:
    """Return the runs at one of some grid values, each as in ``n_keys=100``."""
    known = sorted({value for run in runs for value in run.point.split(", ") if value}, key=natural_key)
    for point in points:
        if point not in known:
            said = did_you_mean(point, known) if known else "They have no grid."
            raise UserError(f"none of these runs is at {point!r}. {said}")
    return [run for run in runs if set(points) & set(run.point.split(", "))]


def _profile(experiment: Experiment, profile: str) -> Profile:
    if profile not in experiment.profiles:
        known = did_you_mean(profile, list(experiment.profiles))
        raise UserError(f"{experiment.name} has no profile {profile!r}. {known}")
    return experiment.profiles[profile]


def _grid(experiment: Experiment, profile: Profile, row: str) -> dict[str, list[Any]]:
    grid = experiment.grid if profile.grid is None else profile.grid
    return {**grid, **profile.row_grid.get(row, {})}


def _count_points(experiment: Experiment, profile: Profile, row: str) -> int:
    return math.prod(len(values) for values in _grid(experiment, profile, row).values())


def _points(experiment: Experiment, profile: Profile, row: str) -> Iterator[Config]:
    grid = _grid(experiment, profile, row)
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _resolve(experiment: Experiment, row: str, point: Config, seed: int, profile: str, protocol: str) -> Run:
    config = copy.deepcopy(experiment.base)
    how, scale = experiment.protocols[protocol], experiment.profiles[profile]
    settings: Config = {}
    for key, value in point.items():
        named = {**experiment.variants.get(key, {}), **scale.variants.get(key, {})}
        settings |= named[value] if key in experiment.variants else {key: value}
    layers = [how.set, scale.set, experiment.rows[row], how.rows.get(row), scale.row_set.get(row), settings]
    for layer in layers:
        merge(config, layer or {}, f"{experiment.name}, row {row!r}")
    _require_parts(config, f"{experiment.name}, row {row!r}")
    config["seed_everything"] = seed
    sentences = [experiment.deviations.get(key, "") for key in (profile, protocol)]
    return Run(
        experiment=experiment.name,
        row=row,
        point=point_name(point),
        seed=seed,
        profile=profile,
        protocol=protocol,
        version=how.version,
        config=config,
        deviations=" ".join(sentence for sentence in sentences if sentence),
        base_file=experiment.base_file,
        added=experiment.added,
    )


def with_imports(runs: Iterable[Run], hashes: Sequence[str], built_in: Collection[str]) -> list[Run]:
    """Return ``runs``, those whose rule or feature map is not ``built_in`` tied to the user's files of these hashes.

    A run of a user's part is another run once the file has changed; runs of the suite's own parts stay what they are.
    """
    own = tuple(sorted(hashes))
    return [replace(run, imported=own) if own and not parts_of(run.config) <= set(built_in) else run for run in runs]


def with_texts(runs: Iterable[Run], directory: str | None, hashes_of: Callable[[str], tuple[str, ...]]) -> list[Run]:
    """Return ``runs``, those whose data can read a folder reading ``directory``, if one is given.

    A run on a text of the user's own (``data.corpus: folder``) is tied to the hashes of its files, so that another text
    is another run; a known corpus is the same one wherever it lies.
    """
    found = []
    for run in runs:
        if directory is not None and reads_folder(run):
            config = copy.deepcopy(run.config)
            config["data"]["init_args"]["directory"] = directory
            run = replace(run, config=config)
        data = run.config["data"].get("init_args") or {}
        if data.get("corpus") == "folder" and data.get("directory"):
            run = replace(run, imported=(*run.imported, *hashes_of(data["directory"])))
        found.append(run)
    return found


def reads_folder(run: Run) -> bool:
    """Return whether the data of a run can be read from a folder."""
    return "directory" in (run.config["data"].get("init_args") or {})


def processes_of(trainer: Mapping[str, Any]) -> int:
    """Return with how many processes a run trains, from the settings of its trainer; 1 where these leave it open."""
    devices = trainer.get("devices", 1)
    return devices if isinstance(devices, int) and devices > 0 else 1


def parts_of(config: Any) -> set[str]:
    """Return the rules, feature maps and normalisations that a configuration names, wherever they stand in it."""
    if isinstance(config, list):
        return set().union(*map(parts_of, config))
    if not isinstance(config, dict):
        return set()
    named = {config[key] for key in ("rule", "feature_map", "phi_norm") if isinstance(config.get(key), str)}
    return named.union(*map(parts_of, config.values()))


def point_name(point: Mapping[str, Any]) -> str:
    """Return a grid point as it stands in tables.

    >>> point_name({"data.n_keys": 100})
    'n_keys=100'
    """
    return ", ".join(f"{key.split('.')[-1]}={_plain(value)}" for key, value in point.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _chosen_rows(experiment: str, asked: Sequence[str] | None, known: Sequence[str]) -> list[str] | None:
    """Return the rows that are asked for; a name with commas, as of a command line, may have come in pieces."""
    if asked is None:
        return None
    rows, pieces = [], list(asked)
    while pieces:
        beginnings = {", ".join(pieces[:n]): n for n in range(len(pieces), 0, -1)}
        row = next((name for name in beginnings if name in known), None)
        if row is None:
            raise UserError(f"{experiment} has no row {pieces[0]!r}. {did_you_mean(pieces[0], list(known))}")
        rows.append(row)
        pieces = pieces[beginnings[row] :]
    return rows


def _runs_of_view(
    view: View,
    profile: str,
    protocol: str | None,
    rows: Sequence[str] | None,
    seeds: Sequence[int] | None,
) -> list[Run]:
    own = view.profiles.get(profile, ViewFilter())
    shown = own.rows or view.chosen.rows or list(view.parent.rows)
    rows = _chosen_rows(view.name, rows, shown)
    grid = {**view.chosen.grid, **own.grid}
    runs = resolve_runs(view.parent, profile=profile, protocol=protocol, rows=rows or shown, seeds=seeds)
    wanted = [{point_name({key: value}) for value in values} for key, values in grid.items()]
    kept = [run for run in runs if all(names & set(run.point.split(", ")) for names in wanted)]
    if not kept:
        asked = " and ".join(" or ".join(sorted(names, key=natural_key)) for names in wanted)
        raise UserError(
            f"{view.name} shows {asked}, but {view.parent.name} has no such point in the {profile} profile."
        )
    return kept
