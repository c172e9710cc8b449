"""Figures of what runs recorded inside their memories show the numbers of results/probes.csv, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hand_written import Bench, make_bench, write_csv
from matplotlib.figure import Figure

from fwp_lightning.results_csv import PROBE_COLUMNS
from reports import memory_figures
from reports.palette import looks_of
from reports.plan import load_plan
from reports.selection import select
from reports.sources import read_results

Line = tuple[str, float, int, float]
"""statistic, x, y, mean"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two runs, each with a head that recorded something."""
    bench = make_bench(tmp_path)
    keys = [bench.add(row, [0.3]) for row in ("DPFP-1", "Linear")]
    bench.write()
    shared = [("d_dot", 0.0, 0, 4.0), ("effective_rank", 0.0, 0, 2.5)]
    shared += [("singular_value", float(n), 0, 8.0 / 2**n) for n in range(3)]
    shared += [(name, x, 0, x / 10) for name in ("before_cosine", "after_cosine") for x in (1.0, 4.0)]
    shared += [(name, x, 0, x) for name in ("carried_z_phi_q", "carried_W_norm") for x in (8.0, 16.0)]
    shared += [("map", float(n), t, 1.0 - n - t) for n in range(2) for t in range(3)] + [("newest", 1.0, 2, 1.0)]
    record(bench, {keys[0]: [shared, [("before_cosine", 4.0, 0, 0.8)]], keys[1]: [shared]})
    return bench


def record(bench: Bench, numbers: dict[str, list[list[Line]]]) -> None:
    """Write probes.csv: for each run the numbers of its heads."""
    lines = [
        (key, 100, 0, head, statistic, f"{x:g}", y, mean, 0, 1)
        for key, heads in numbers.items()
        for head, found in enumerate(heads)
        for statistic, x, y, mean in found
    ]
    write_csv(bench.root / "results" / "probes.csv", [PROBE_COLUMNS, *lines])


def drawn(bench: Bench, kind: str) -> Figure:
    content = {
        "title": "Inside",
        "source": "Figure S9",
        "runs_of": "figure8",
        "grid": {"data.n_keys": [20]},
        "report": {"kind": kind, "metrics": ["valid/loss"], "x": {"label": "x"}, "y": {"label": "y"}},
    }
    (bench.root / "experiments" / "figureS9.yaml").write_text(yaml.safe_dump(content))
    plan = load_plan(bench.project, "figureS9", "short", "released")
    return memory_figures.draw(select(plan, read_results(bench.root)))


def curves(figure: Figure, panel: int, row: str) -> list[tuple[float, float]]:
    colour = looks_of(["DPFP-1", "Linear"])[row].colour
    (line,) = (line for line in figure.axes[panel].lines if line.get_color() == colour)
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_contrast_is_the_mean_over_heads(bench: Bench) -> None:
    figure = drawn(bench, "contrast")
    assert curves(figure, 0, "DPFP-1") == [(1, 0.1), (4, pytest.approx(0.6))]
    assert curves(figure, 0, "Linear") == [(1, 0.1), (4, 0.4)]
    assert curves(figure, 1, "DPFP-1") == [(1, 0.1), (4, 0.4)]


def test_accumulators_are_drawn_over_the_steps_carried(bench: Bench) -> None:
    figure = drawn(bench, "accumulators")
    assert [curves(figure, panel, "Linear") for panel in (0, 1)] == [[(8, 8), (16, 16)]] * 2


def test_spectrum_is_relative_to_the_largest_and_names_the_effective_rank(bench: Bench) -> None:
    figure = drawn(bench, "spectra")
    assert curves(figure, 0, "Linear") == [(1, 1), (2, 0.5), (3, 0.25)]
    assert [text.get_text() for text in figure.axes[0].texts].count("2.5 of 4") == 2


def test_map_has_a_panel_for_each_row_and_a_ring_at_the_newest_value(bench: Bench) -> None:
    figure = drawn(bench, "attention_maps")
    for axes in figure.axes[:2]:
        (image,) = axes.images
        assert image.get_array().tolist() == [[1, 0, -1], [0, -1, -2]]  # type: ignore[union-attr]
        assert [line.get_xydata().tolist() for line in axes.lines] == [[[2, 1]]]  # type: ignore[union-attr]


def test_runs_without_a_record_are_said_to_have_none(bench: Bench) -> None:
    record(bench, {})
    figure = drawn(bench, "contrast")
    assert "nothing was recorded" in figure.axes[0].texts[0].get_text()


def test_reports_are_the_same_bytes_and_stand_on_the_page(bench: Bench) -> None:
    drawn(bench, "contrast")
    output = bench.root / "reports" / "output"
    stem = output / "short" / "released" / "figureS9"
    written = []
    for _ in range(2):
        assert bench.draw("figureS9") == 0
        written.append([stem.with_suffix(suffix).read_bytes() for suffix in (".png", ".pdf", ".csv")])
    assert written[0] == written[1]
    page = (output / "index.html").read_text()
    assert 'id="figureS9-short-released"' in page
    # the paper has no such numbers: no column for them
    assert "difference" not in stem.with_suffix(".md").read_text()
