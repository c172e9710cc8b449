"""What was measured, as lines of results/benchmarks/<device>.csv: a group measured anew replaces the group before."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from fwp_lightning import processor
from fwp_lightning.bench.clocks import Spread
from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.results_csv import BENCHMARK_COLUMNS, BENCHMARK_GROUP, Row, read_benchmarks
from fwp_lightning.tracking import Origin, cpu_name


@dataclass(frozen=True)
class Group:
    """What all members of a comparison have in common: they were measured in turns."""

    part: str
    rule: str
    shape: str
    dtype: str
    threads: int
    clock: str
    passes: str


@dataclass(frozen=True)
class Measurement:
    """One member of a comparison; seconds of a call."""

    backend: str
    spread: Spread
    gigaflop: float | None = None
    memory: float | None = None
    """MiB"""


def cores_here() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_of(device: str) -> dict[str, str]:
    """Return the columns that say what was measured on."""
    packages = [("python", platform.python_version())]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine, cores, isa = (
            properties.name,
            properties.multi_processor_count,
            f"sm_{properties.major}{properties.minor}",
        )
        packages.append(("cuda", str(torch.version.cuda)))
        packages += [(name, found) for name in ("triton", "flash-linear-attention") if (found := _installed(name))]
    else:
        machine, cores, isa = cpu_name(), cores_here(), processor.level()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "machine": machine,
        "cores": str(cores),
        "isa": isa,
        "torch": torch.__version__,
        "versions": "; ".join(" ".join(package) for package in packages),
    }


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def rows_of(group: Group, measurements: Iterable[Measurement], machine: dict[str, str], origin: Origin) -> list[Row]:
    """Return the lines of a comparison."""
    shared = machine | {name: str(value) for name, value in asdict(group).items()}
    shared["pass"] = shared.pop("passes")
    shared |= {"git_commit": origin.git_commit, "git_dirty": origin.git_dirty, "command": origin.command}
    return [shared | _numbers_of(measurement) for measurement in measurements]


def _numbers_of(measurement: Measurement) -> Row:
    spread = measurement.spread
    return {
        "backend": measurement.backend,
        "milliseconds": _digits(1000 * spread.median),
        "low": _digits(1000 * spread.low),
        "high": _digits(1000 * spread.high),
        "rounds": str(spread.rounds),
        "gigaflop": _digits(measurement.gigaflop),
        "memory_mb": _digits(measurement.memory),
    }


def _digits(number: float | None) -> str:
    return "" if number is None else f"{number:.5g}"


def save(path: Path, fresh: list[Row]) -> None:
    """Write the lines into a file, in the place of those of the same groups; ``UserError`` if it cannot be."""
    known = read_benchmarks(path)
    replaced = {_group_of(row) for row in fresh}
    rows = [row for row in known if _group_of(row) not in replaced] + fresh
    rows.sort(key=_group_of)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".csv.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, BENCHMARK_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {sentence_of(error)}.") from error


def _group_of(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in BENCHMARK_GROUP)
