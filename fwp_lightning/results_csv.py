"""The strict reader of the tracked CSV files in results/: columns, types and keys are checked, line by line.

It needs the standard library alone, so that reports read the same files by the same rules as the export that writes
them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of

Row = dict[str, str]
# returns what is wrong with a value, None if nothing
Check = Callable[[str], str | None]

RUN_COLUMNS = (
    "run_key", "experiment", "row", "point", "seed", "profile", "protocol", "status", "version", "rule", "feature_map",
    "phi_norm", "attention_norm", "backend", "n_params", "state", "wall_seconds", "finished", "steps", "tokens",
    "peak_memory_mb", "device", "precision", "git_commit", "git_dirty", "config_sha256", "data_sha256", "python",
    "torch", "lightning", "command", "deviations",
)  # fmt: skip
METRIC_COLUMNS = ("run_key", "split", "metric", "step", "value")
TRANSLATION_COLUMNS = ("run_key", "split", "line", "source", "reference", "translation")
PROBE_COLUMNS = ("run_key", "step", "layer", "head", "statistic", "x", "y", "mean", "std", "n")
BENCHMARK_GROUP = ("device", "machine", "part", "rule", "shape", "dtype", "threads", "clock", "pass")
"""Lines alike in these were measured in turns: ratios are taken between them only."""
BENCHMARK_COLUMNS = (
    *BENCHMARK_GROUP, "backend", "milliseconds", "low", "high", "rounds", "gigaflop", "memory_mb", "date", "cores",
    "isa", "torch", "versions", "git_commit", "git_dirty", "command",
)  # fmt: skip
STATUSES = ("complete", "diverged", "failed")
# statuses of a run that ended with a result and is not trained again
DONE = ("complete", "diverged")
ADVICE = "move it away, then run `fwp export`"
BENCHMARK_ADVICE = "move it away, then run `fwp bench`"
# csv fields longer than this are a sign of a broken file
csv.field_size_limit(1_000_000)

_WHOLE = re.compile(r"[0-9]+")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def read_runs(path: Path, advice: str = ADVICE) -> list[Row]:
    """Return the checked rows of a runs.csv, none where there is no file; raise ``UserError`` if it is damaged."""
    checks: dict[str, Check] = {
        "run_key": _filled,
        "experiment": _filled,
        "seed": _whole,
        "version": _whole,
        "status": _known_status,
        "wall_seconds": _duration,
        "finished": _time,
    }
    return _read(path, RUN_COLUMNS, ("run_key",), checks, advice)


def read_metrics(path: Path, advice: str = ADVICE) -> list[Row]:
    """Return the checked rows of a metrics.csv, none where there is no file; raise ``UserError`` if it is damaged."""
    checks: dict[str, Check] = {"run_key": _filled, "step": _whole, "value": _number}
    return _read(path, METRIC_COLUMNS, ("run_key", "split", "metric", "step"), checks, advice)


def read_translations(path: Path) -> list[Row]:
    """Return the checked rows of a translations.csv, none where there is no file; ``UserError`` if it is damaged."""
    checks: dict[str, Check] = {"run_key": _filled, "split": _filled, "line": _whole}
    return _read(path, TRANSLATION_COLUMNS, ("run_key", "split", "line"), checks)


def read_probes(path: Path) -> list[Row]:
    """Return the checked rows of a probes.csv, none where there is no file; raise ``UserError`` if it is damaged."""
    checks: dict[str, Check] = {"run_key": _filled, "step": _whole, "layer": _whole, "head": _whole, "x": _number}
    checks |= {"statistic": _filled, "y": _whole, "mean": _number, "std": _number, "n": _whole}
    return _read(path, PROBE_COLUMNS, ("run_key", "layer", "head", "statistic", "x", "y"), checks)


def read_benchmarks(path: Path) -> list[Row]:
    """Return the checked rows of a file of benchmarks, none where there is no file; raise ``UserError`` if damaged."""
    checks: dict[str, Check] = {
        "backend": _filled,
        "threads": _whole,
        "milliseconds": _positive,
        "low": _positive,
        "high": _positive,
        "rounds": _whole,
        "gigaflop": _amount,
        "memory_mb": _amount,
        "date": _date,
    }
    return _read(path, BENCHMARK_COLUMNS, (*BENCHMARK_GROUP, "backend"), checks, BENCHMARK_ADVICE)


# --- what a value must be --------------------------------------------------------------------------------------------


def _filled(text: str) -> str | None:
    return None if text else "is empty"


def _whole(text: str) -> str | None:
    return None if _WHOLE.fullmatch(text) else "is no whole number"


def _number(text: str) -> str | None:
    try:
        float(text)
    except ValueError:
        return "is no number"
    return None


def _duration(text: str) -> str | None:
    # a run that failed early took no time that was measured
    if not text:
        return None
    return _number(text) or (None if 0 <= float(text) < float("inf") else "is no number of seconds")


def _amount(text: str) -> str | None:
    # what was not counted or cannot be measured is left empty
    return None if not text else _number(text)


def _positive(text: str) -> str | None:
    return _number(text) or (None if 0 < float(text) < float("inf") else "is no number above 0")


def _date(text: str) -> str | None:
    return None if _DATE.fullmatch(text) else "is no date such as 2026-01-31"


def _time(text: str) -> str | None:
    return None if not text or _TIME.fullmatch(text) else "is no time such as 2026-01-31T12:00:00Z"


def _known_status(text: str) -> str | None:
    return None if text in STATUSES else f"is none of {', '.join(STATUSES)}"


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(
    path: Path, columns: Sequence[str], key: Sequence[str], checks: Mapping[str, Check], advice: str = ADVICE
) -> list[Row]:
    if not path.exists():
        return []
    try:
        return _checked(path, columns, key, checks, advice)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else sentence_of(error)
        raise UserError(f"{path} cannot be read: {reason}; {advice}.") from error


def _checked(
    path: Path, columns: Sequence[str], key: Sequence[str], checks: Mapping[str, Check], advice: str
) -> list[Row]:
    found: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        _check_header(path, header, columns, advice)
        for fields in lines:
            if not fields:
                continue
            place = f"{path}, line {lines.line_num}"
            if len(fields) != len(header):
                raise UserError(f"{place}: {len(header)} fields are expected, not {len(fields)}; {advice}.")
            row = dict(zip(header, fields, strict=True))
            for column, check in checks.items():
                if problem := check(row[column]):
                    raise UserError(f"{place}: {column} {row[column]!r} {problem}; {advice}.")
            name = tuple(row[column] for column in key)
            if name in seen:
                raise UserError(f"{place}: {', '.join(key)} = {', '.join(name)} stands twice; {advice}.")
            seen.add(name)
            found.append(row)
    return found


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str], advice: str) -> None:
    wrong = [f"lacks the column {column!r}" for column in columns if column not in header]
    wrong += [f"has an unknown column {column!r}" for column in header if column not in columns]
    wrong += ["names a column twice"] if len(set(header)) < len(header) else []
    if wrong:
        raise UserError(f"{path} {wrong[0]}; results/README.md names the columns; {advice}.")
