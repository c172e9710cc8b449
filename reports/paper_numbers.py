"""Builds results/paper.csv: the numbers printed in the paper and the losses of the authors' 320 released runs.

    python -m reports.paper_numbers released_runs.csv

The argument is a CSV with the columns of `RELEASED_COLUMNS`, one line per released log file.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fwp_lightning.errors import UserError, sentence_of

COLUMNS = ("experiment", "row", "point", "split", "metric", "value", "source")
RELEASED_COLUMNS = ("setting", "phi", "rule", "S", "last_eval_loss", "last_step", "best_eval_loss", "best_step")
RELEASED_LOG = "log released by the authors (ischlag/fast-weight-transformers at ebe13ea)"

# (setting, phi, rule) of a released log -> our experiment and row
RELEASED_ROWS = {
    ("1", "softmax", "cat"): ("figure2", "Softmax"),
    ("1", "linear", "sum"): ("figure2", "Linear"),
    ("1", "favor64", "sum"): ("figure2", "FAVOR+ (64)"),
    ("1", "favor128", "sum"): ("figure2", "FAVOR+ (128)"),
    ("1", "favor512", "sum"): ("figure2", "FAVOR+ (512)"),
    ("1", "dpfp1", "sum"): ("figure2", "DPFP-1"),
    ("1", "dpfp2", "sum"): ("figure2", "DPFP-2"),
    ("1", "dpfp3", "sum"): ("figure2", "DPFP-3"),
    ("2", "dpfp1", "ours"): ("figure5", "DPFP-1 delta"),
    ("2", "dpfp1", "sum"): ("figure5", "DPFP-1 sum"),
    ("2", "tanh", "fwm"): ("figure5", "Schlag (2021)"),
    ("2", "dpfp1", "fwm"): ("figure5", "Schlag (2021) with DPFP-1"),
    ("2", "dpfp2", "ours"): ("figure5", "DPFP-2 delta"),
    ("2", "linear", "ours"): ("figure5", "Linear delta"),
    ("2", "favor64", "ours"): ("figure5", "FAVOR+ (64) delta"),
    ("2", "favor128", "ours"): ("figure5", "FAVOR+ (128) delta"),
}
RELEASED_METRICS = {
    "last_loss": "last_eval_loss",
    "best_loss": "best_eval_loss",
    "last_step": "last_step",
    "best_step": "best_step",
}
RELEASED_REMARKS = {
    ("figure5", "DPFP-2 delta", "n_keys=100"): "; it breaks off at step 300 with neither stopping rule met",
}

# one entry per table: where it stands, the columns as (point, split, metric), and the cells as printed ("" is a dash)
TABLES: dict[str, tuple[str, list[tuple[str, str, str]], dict[str, str]]] = {
    "table1": (
        "Table 1, Sec. 6.2",
        # printed in columns of d_dot, 64, 256 and 512, which Table 6 turns into m and nu
        [("", "valid", "bleu"), ("", "test", "bleu")],
        {
            "Standard": "26.6,27.7",
            "Linear": "25.5,26.8",
            "Performer (m = 32)": "24.2,24.4",
            "Performer (m = 128)": "24.9,25.3",
            "Performer (m = 256)": "26.7,27.7",
            "DPFP-2": "26.2,26.9",
            "DPFP-4": "26.2,27.1",
        },
    ),
    "table2": (
        "Table 2, Sec. 6.3",
        [(f"size={size}", split, "perplexity") for size in ("small", "medium") for split in ("valid", "test")],
        {
            "Transformer": "33.0,34.1,27.9,29.6",
            "Linear Transformer": "37.1,38.3,31.1,33.0",
            "Delta Network": "34.1,35.5,29.7,31.5",
            "Performer sum": "39.0,39.6,32.2,33.8",
            "Performer delta": "36.1,37.2,30.0,31.8",
        },
    ),
    "table3": (
        "Table 3, Sec. 6.3",
        [("", "valid", "perplexity"), ("", "test", "perplexity")],
        {
            "position yes, attention norm yes": "30.4,32.1",
            "position no, attention norm yes": "29.2,31.2",
            "position yes, attention norm no": "29.7,31.5",
            "position no, attention norm no": "28.1,31.1",
        },
    ),
    "table4": (
        "Table 4, Sec. 6.3",
        [
            ("", "model", "params_millions"),
            ("", "model", "state_millions"),
            ("", "valid", "perplexity"),
            ("", "test", "perplexity"),
        ],
        {
            "Linear Transformer": "89.8,0.13,>260,>260",
            # in the text, which does not say on which split
            "Linear Transformer, attention norm no": ",,>1600,>1600",
            "Delta Network": "89.9,0.13,27.8,29.4",
            "Transformer-XL (0.13 M)": "90.9,0.13,65.7,65.5",
            "Transformer-XL (1.05 M)": "90.9,1.05,29.3,30.1",
            "Transformer-XL (2.10 M)": "90.9,2.10,26.4,27.4",
            "Transformer-XL (6.29 M)": "90.9,6.29,24.6,25.5",
        },
    ),
    "table5": (
        "Table 5, App. D.3",
        [("", "valid", "perplexity"), ("", "test", "perplexity")],
        {
            "Transformer": "33.0,34.1",
            "Performer sum": "38.0,38.8",
            "Performer delta": "36.0,37.0",
            "DPFP sum": "37.7,38.8",
            "DPFP delta": "33.9,35.0",
        },
    ),
    "table6": (
        "Table 6, App. E",
        [(f"d_dot={d}", "", "m_or_nu") for d in (256, 384, 512)],
        {"Performer": "128,192,256", "DPFP": "2,3,4"},
    ),
}


def table_lines() -> Iterator[tuple[str, ...]]:
    """Yields one paper.csv line per printed table cell; `>260` becomes 260 with the bound kept in `source`."""
    for experiment, (place, columns, rows) in TABLES.items():
        for row, printed in rows.items():
            for (point, split, metric), value in zip(columns, printed.split(","), strict=True):
                if value:
                    source = f"{place}; {value} printed" if value.startswith(">") else place
                    yield experiment, row, point, split, metric, value.lstrip(">"), source


def released_lines(path: Path) -> Iterator[tuple[str, ...]]:
    """Yields four paper.csv lines (last and best loss, and their steps) per released run."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in RELEASED_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path} lacks the column {missing[0]!r}; expected: {', '.join(RELEASED_COLUMNS)}.")
        for log in reader:
            name = (log["setting"], log["phi"], log["rule"])
            if name not in RELEASED_ROWS:
                raise UserError(f"{path} line {reader.line_num}: no row of ours is called {'/'.join(name)}.")
            experiment, row = RELEASED_ROWS[name]
            point = f"n_keys={log['S']}"
            source = RELEASED_LOG + RELEASED_REMARKS.get((experiment, row, point), "")
            # a run whose every evaluation was NaN has no best one
            for metric, column in RELEASED_METRICS.items():
                if not log[column]:
                    continue
                yield experiment, row, point, "valid", metric, log[column], source


def write(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """Writes paper.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes results/paper.csv and says how many numbers it holds."""
    parser = argparse.ArgumentParser(prog="python -m reports.paper_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("released_runs", type=Path, help="CSV of the authors' released runs, one line per log")
    parser.add_argument("--out", type=Path, default=Path("results/paper.csv"))
    options = parser.parse_args(arguments)
    try:
        lines = list(table_lines()) + list(released_lines(options.released_runs))
        write(options.out, lines)
    except (UserError, OSError, UnicodeDecodeError, csv.Error) as error:
        print(f"paper_numbers: {sentence_of(error)}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(lines)} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
