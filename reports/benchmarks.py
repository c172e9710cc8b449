"""Draws what `fwp bench` measured: a figure for each device, and README's tables."""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fwp_lightning.errors import UserError
from fwp_lightning.results_csv import BENCHMARK_GROUP, Row, read_benchmarks
from reports import figures
from reports.palette import LOOKS, MUTED, SPARE, Look
from reports.tables import Table, markdown_lines
from reports.wording import number

NAME = "bench"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OURS = {"cpu": "cpu", "cuda": "cuda"}
CLOCKS = {"cpu": "cpu", "cuda": "cuda"}
"""one thread in time of the process; events with a cold cache"""
BOTH = "forward+backward"
GEMM = "gemm"
WORDS = {
    "reference": "loop over time steps",
    "sdpa": "causal SDPA",
    "features in the kernel, cpu": "in the kernel",
    "features in PyTorch, cpu": "in PyTorch, `cpu`",
    "features in PyTorch, chunked": "in PyTorch, `chunked`",
}
LOOK_OF = {
    "cpu": LOOKS["DPFP-1 delta"],
    "cuda": LOOKS["DPFP-1 delta"],
    "chunked": LOOKS["DPFP-2"],
    "reference": LOOKS["FAVOR+ (512)"],
    "sdpa": LOOKS["Softmax"],
}
WIDTH, HEIGHT = 10.0, 3.7

Group = tuple[str, ...]


@dataclass(frozen=True)
class Benchmarks:
    """The lines of one device, those of the machine that was measured last."""

    device: str
    groups: dict[Group, dict[str, Row]]
    """By what was measured in turns, and then by backend."""

    @property
    def rows(self) -> list[Row]:
        """All lines."""
        return [row for group in self.groups.values() for row in group.values()]

    def part(self, part: str, passes: str = BOTH) -> list[dict[str, Row]]:
        """Return a part's comparisons in time of one thread, or of a GPU, in the order of the file."""
        wanted = {"part": part, "pass": passes, "clock": CLOCKS[self.device]}
        return [
            group
            for key, group in self.groups.items()
            if all(dict(zip(BENCHMARK_GROUP, key, strict=True))[name] == value for name, value in wanted.items())
        ]


def read(root: Path) -> list[Benchmarks]:
    """Read results/benchmarks/*.csv; a device without a file, or with an empty one, is left out."""
    found = []
    for device in OURS:
        rows = read_benchmarks(root / "results" / "benchmarks" / f"{device}.csv")
        if not rows:
            continue
        last = max(rows, key=lambda row: row["date"])["machine"]
        groups: dict[Group, dict[str, Row]] = {}
        for row in rows:
            if row["machine"] == last:
                groups.setdefault(tuple(row[column] for column in BENCHMARK_GROUP), {})[row["backend"]] = row
        found.append(Benchmarks(device, dict(sorted(groups.items(), key=_order))))
    return found


def _order(item: tuple[Group, object]) -> tuple[object, ...]:
    # numbers within a name by their size
    return tuple((int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", " ".join(item[0])))


def draw(root: Path, output: Path) -> list[Path]:
    """Write the figures below ``output``/bench; ``UserError`` where nothing was measured."""
    benchmarks = read(root)
    if not benchmarks:
        raise UserError("nothing in results/benchmarks/ yet; run `make bench` first.")
    folder = output / NAME
    folder.mkdir(parents=True, exist_ok=True)
    return [
        path for found in benchmarks for path in figures.write(_figure(found), folder / found.device, *_origin(found))
    ]


def _origin(found: Benchmarks) -> tuple[str, str]:
    return f"Benchmarks on {_machine(found)}", provenance(found)


def _machine(found: Benchmarks) -> str:
    row = found.rows[0]
    return f"{row['machine']} ({row['cores']} core{'' if row['cores'] == '1' else 's'}, {row['isa']})"


def provenance(found: Benchmarks) -> str:
    """Return where and when it was measured, by which command and commit."""
    dates = sorted({row["date"] for row in found.rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = sorted({row["git_commit"][:9] for row in found.rows if row["git_commit"]})
    changed = " with changes" if any(row["git_dirty"] == "true" for row in found.rows) else ""
    versions = sorted({f"torch {row['torch']}" for row in found.rows})
    commands = sorted({row["command"] for row in found.rows})
    source = f"commit {', '.join(commits) or 'unknown'}{changed}"
    return f"{_machine(found)}, {when}, {', '.join(versions)}, {source}, `{'`, `'.join(commands)}`"


# --- README ----------------------------------------------------------------------------------------------------------


def block(root: Path) -> str:
    """Return README's tables."""
    parts = [_device(found) for found in read(root)]
    return "\n\n".join(parts) or "Nothing was measured yet; `make bench` measures."


def _device(found: Benchmarks) -> str:
    thread = "Processor time of one thread" if found.device == "cpu" else "Time between CUDA events, cold cache"
    parts = [f"{provenance(found)}. {thread}, medians; whatever stands in a line was measured in turns."]
    rules = found.part("rules")
    if any(OURS[found.device] in group for group in rules):
        parts.append(
            f"Forward and backward with all gradients: milliseconds of `{OURS[found.device]}` (least to most), its "
            "rate as a share of a matrix product's, and how many times as long the others take.\n\n"
            + _compared(rules, OURS[found.device], share=True)
        )
    fused = found.part("fused")
    if fused:
        parts.append(
            "The same with DPFP-3 and sum-normalised features computed in the kernel:\n\n"
            + _compared(fused, "features in the kernel, cpu", share=False)
        )
    for part, passes, words, table in (
        ("growth", BOTH, GROWTH, functools.partial(_matrix, cell=_cost)),
        ("retrieval", "step", RETRIEVAL, functools.partial(_rates, ours="compiled", baselines=RETRIEVAL_BASELINES)),
        ("training", "update", TRAINING, functools.partial(_rates, ours="auto", baselines=("reference",))),
        ("generation", "word", GENERATION, functools.partial(_matrix, cell=_cost)),
    ):
        groups = found.part(part, passes)
        if groups:
            parts.append(f"{words}\n\n{table(groups)}")
    return "\n\n".join(parts)


RETRIEVAL_BASELINES = ("released", "plain")
GROWTH = "The delta rule over one sequence of T steps, 4 heads of 32 x 32: milliseconds / MiB."
GENERATION = "Milliseconds a word / MiB kept, for the small language model:"
TRAINING = (
    "Words a second of a language model in training (forward, backward, clipping, Adam), at the sizes of the profiles "
    "`smoke` and `short` of Table 2, and the ratio to the same model with the loop over time steps (`backend: "
    "reference`):"
)
RETRIEVAL = (
    "Optimiser steps of the retrieval task per second, data and evaluation included, as it is trained (compiled), and "
    "two ratios: to the released code's formulation, written out in PyTorch with all the work that the code does "
    "(sequences drawn one by one, every pair projected, also for what is never used, the memory under automatic "
    "differentiation, written twice a pair by the delta and fwm rules, anew for each query of the evaluation, whose "
    "graphs are kept), and to the plain formulation, the same function with this package's modules, data drawn a block "
    "at a time and no graph in evaluation. A step takes 32 sequences, 128 for Schlag (2021), as in the released code. "
    "Subnormal numbers count as 0 in all of them, which spares the baselines of the fwm rule most:"
)


def _compared(groups: Sequence[dict[str, Row]], ours: str, *, share: bool) -> str:
    """One line per comparison that we are in: our time, and the others' as ratios."""
    shown = [group for group in groups if ours in group]
    # in the order in which they come
    others = list(dict.fromkeys(name for group in shown for name in group if name not in (ours, GEMM)))
    lines = []
    for group in shown:
        mine = group[ours]
        rate = [_percent(mine, group.get(GEMM))] if share else []
        ratios = [f"{_ratio(group[name], mine)}x" if name in group else "" for name in others]
        dtype = "" if mine["dtype"] == "float32" else f", {mine['dtype']}"
        lines.append((f"{mine['rule']}, {mine['shape']}{dtype}", _spread(mine), *rate, *ratios))
    header = ("", f"{_word(ours)}, ms", *(["of gemm"] if share else []), *(map(_word, others)))
    return "\n".join(markdown_lines(Table(header, tuple(lines), 1)))


def _word(backend: str) -> str:
    return WORDS.get(backend, f"`{backend}`" if backend in ("chunked", *OURS.values()) else backend)


def _spread(row: Row) -> str:
    return f"{_ms(row['milliseconds'])} ({_ms(row['low'])} to {_ms(row['high'])})"


def _ms(text: str) -> str:
    return number(float(text), None if float(text) < 100 else 0)


def _ratio(other: Row, mine: Row) -> str:
    ratio = float(other["milliseconds"]) / float(mine["milliseconds"])
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def _percent(mine: Row, gemm: Row | None) -> str:
    if gemm is None or not mine["gigaflop"]:
        return ""
    rates = [float(row["gigaflop"]) / float(row["milliseconds"]) for row in (mine, gemm)]
    return f"{100 * rates[0] / rates[1]:.0f} %"


def _matrix(groups: Sequence[dict[str, Row]], cell: Callable[[Row], str]) -> str:
    """One line per backend, one column per shape."""
    backends = list(dict.fromkeys(name for group in groups for name in group))
    columns = [next(iter(group.values()))["shape"] for group in groups]
    titles = [f"T = {_steps(column)}" if _steps(column) else column for column in columns]
    lines = [(_word(name), *(cell(group[name]) if name in group else "--" for group in groups)) for name in backends]
    return "\n".join(markdown_lines(Table(("", *titles), tuple(lines), 1)))


def _cost(row: Row) -> str:
    memory = f" / {number(float(row['memory_mb']))}" if row["memory_mb"] else ""
    return f"{_ms(row['milliseconds'])}{memory}"


def _rates(groups: Sequence[dict[str, Row]], ours: str, baselines: Sequence[str]) -> str:
    """One line per row, one column per size: what we do a second, and how many times as much as each baseline."""
    cells = {(row["rule"], row["shape"]): group for group in groups for row in list(group.values())[:1]}
    rows = sorted({row for row, _ in cells}, key=_place)
    sizes = list(dict.fromkeys(size for _, size in sorted(cells, key=lambda cell: _place(cell[1]))))
    lines = [(row, *(_rate(cells.get((row, size)), ours, baselines) for size in sizes)) for row in rows]
    return "\n".join(markdown_lines(Table(("", *(size.replace("=", " = ") for size in sizes)), tuple(lines), 1)))


def _place(name: str) -> tuple[int, int, str]:
    known = list(LOOKS)
    digits = re.search(r"=(\d+)$", name)
    return (known.index(name) if name in known else len(known), int(digits[1]) if digits else 0, name)


def _rate(group: dict[str, Row] | None, ours: str, baselines: Sequence[str]) -> str:
    if group is None or ours not in group:
        return "" if group is None else "--"
    mine = group[ours]
    rate = f"{1000 * _words_of(mine['shape']) / float(mine['milliseconds']):,.0f}"
    ratios = [f"{_ratio(group[name], mine)}x" if name in group else "--" for name in baselines]
    return f"{rate} ({', '.join(ratios)})"


def _words_of(shape: str) -> int:
    """Words of an update of B segments of T words; 1 where a step has none."""
    found = re.search(r"\bB(\d+) T(\d+)$", shape)
    return int(found[1]) * int(found[2]) if found else 1


# --- figure ----------------------------------------------------------------------------------------------------------


def _steps(shape: str) -> int:
    found = re.search(r"\bT(\d+)\b", shape)
    return int(found[1]) if found else 0


def _figure(found: Benchmarks) -> Figure:
    """Time of each shape, and how time and memory grow with the length."""
    with figures.style():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        shapes, time, memory = figure.subplots(1, 3)
        rules = [group for group in found.part("rules") if next(iter(group.values()))["rule"] == "delta"]
        growth = found.part("growth")
        backends = list(dict.fromkeys(name for group in [*growth, *rules] for name in group if name != GEMM))
        looks = dict(zip(backends, _looks(backends), strict=True))
        _dots(shapes, rules, looks)
        _curves(time, growth, looks, "milliseconds", "milliseconds, forward and backward")
        _curves(memory, growth, looks, "memory_mb", "peak memory, MiB")
        handles = [time.plot([], [], color=look.colour, marker=look.marker, label=WORDS.get(name, name))[0]
                   for name, look in looks.items()]  # fmt: skip
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.04, 0.055), ncols=6)
        figure.suptitle("Delta rule, all gradients", x=0.045, ha="left", fontsize=10.5, fontweight="bold")
        said = textwrap.fill(provenance(found).replace("`", ""), 230, break_on_hyphens=False)
        figure.text(0.045, 0.015, said, fontsize=5.5, color=MUTED)
        figure.subplots_adjust(left=0.15, right=0.985, top=0.88, bottom=0.27, wspace=0.3)
    return figure


def _looks(backends: Sequence[str]) -> list[Look]:
    spare = iter(SPARE * len(backends))
    return [LOOK_OF.get(name) or next(spare) for name in backends]


def _dots(axes: Axes, groups: Sequence[dict[str, Row]], looks: dict[str, Look]) -> None:
    names = [next(iter(group.values()))["shape"] for group in groups]
    for place, group in enumerate(groups):
        for backend, row in group.items():
            if backend == GEMM:
                continue
            look = looks[backend]
            axes.plot([float(row["low"]), float(row["high"])], [place, place], color=look.colour, linewidth=0.8)
            axes.plot([float(row["milliseconds"])], [place], color=look.colour, marker=look.marker, linestyle="none")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, forward and backward")


def _curves(axes: Axes, groups: Sequence[dict[str, Row]], looks: dict[str, Look], column: str, label: str) -> None:
    for backend, look in looks.items():
        rows = [group[backend] for group in groups if backend in group and group[backend][column]]
        points = [(_steps(row["shape"]), float(row[column])) for row in rows]
        points = [(x, y) for x, y in points if y > 0 and math.isfinite(y)]
        if points:
            axes.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("T, one sequence of 4 heads of 32 x 32")
    axes.set_ylabel(label)
