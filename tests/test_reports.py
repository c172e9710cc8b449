"""Reports: what is counted, what is compared, what is refused, and that the same CSV gives the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hand_written import CAPACITY, TABLE, Bench, make_bench, write_csv
from matplotlib.axes import Axes

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, experiment_names
from reports import figures, paper_numbers, tables, wording
from reports.__main__ import main
from reports.drawing import selections
from reports.palette import DARK, LOOKS, looks_of
from reports.plan import check_report_section, load_plan, read_spec, report_names
from reports.selection import Summary
from reports.sources import read_references, read_results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


@pytest.fixture
def full(bench: Bench) -> Bench:
    """Runs in two profiles and both protocols; one seed missing, one diverged, references for some."""
    for seed, point in itertools.product((1, 2), ("n_keys=20", "n_keys=40")):
        bench.add("DPFP-1", [0.4, 0.1 * seed, 0.12 * seed], seed=seed, point=point)
    bench.add("Linear", [0.5, 0.3])
    bench.add("Linear", [0.5, math.nan], point="n_keys=40", status="diverged")
    bench.add("Linear", [0.5, 0.0001], protocol="corrected")
    bench.add("DPFP-1", [0.45], profile="smoke")
    bench.paper("DPFP-1", "last_loss", "0.15")
    bench.paper("DPFP-1", "best_loss", "0.11")
    bench.paper("DPFP-1", "last_step", "400")
    bench.paper("Linear", "last_loss", "nan", point="n_keys=40")
    bench.paper("Linear", "last_step", "200", point="n_keys=40")
    return bench


# --- what is counted -------------------------------------------------------------------------------------------------


def test_the_papers_own_figures_and_tables_come_first() -> None:
    names = report_names(Project(ROOT))
    own = [*(f"figure{n}" for n in range(2, 6)), *(f"table{n}" for n in range(1, 6))]
    assert names[: len(own)] == own
    assert {"equal_d_dot", "figureS1", "family_figure2"} < set(names[len(own) :])


def test_cell_sums_up_last_and_best_over_seeds(full: Bench) -> None:
    cell = full.cell("DPFP-1")
    assert cell.ours["last"].values == (0.12, 0.24)
    assert cell.ours["last"].std == pytest.approx(0.12 / math.sqrt(2))
    assert cell.ours["best"].values == (0.1, 0.2)
    assert cell.steps["best"].values == (200, 200)
    assert cell.steps["last"].mean == 300
    assert cell.difference("last") == pytest.approx(0.18 - 0.15)
    assert cell.difference("best") == pytest.approx(0.15 - 0.11)


def test_missing_runs_stay_visible(full: Bench) -> None:
    texts = {cell.row: wording.summary(cell.ours["best"]) for cell in full.cells(protocol="corrected")[::2]}
    assert texts == {"DPFP-1": "-- (0/2)", "Linear": "1.0e−4 (1/2)"}


def test_diverged_run_is_shown_as_such_and_not_averaged(bench: Bench) -> None:
    bench.add("Linear", [0.3, math.nan])
    assert wording.summary(bench.cell("Linear").ours["last"]) == "diverged (1/2)"
    bench.add("Linear", [0.3, 0.2], seed=2)
    cell = bench.cell("Linear")
    assert wording.summary(cell.ours["last"]) == "0.200 (2, 1 diverged)"
    # the best evaluation before a run diverged is one, as in the authors' logs
    assert cell.ours["best"].values == (0.3, 0.2)


def test_status_diverged_counts_where_the_loss_is_finite(bench: Bench) -> None:
    bench.add("Linear", [0.3, 1e9], status="diverged")
    assert wording.summary(bench.cell("Linear").ours["last"]) == "diverged (1/2)"


def test_failed_run_is_missing_and_named(bench: Bench) -> None:
    bench.add("Linear", [0.3], status="failed")
    bench.add("DPFP-1", [0.3])
    assert wording.summary(bench.cell("Linear").ours["last"]) == "-- (0/2)"
    assert wording.completeness(bench.selection()) == "1 of 8 runs, 1 failed"


def test_profiles_and_protocols_are_never_mixed(full: Bench) -> None:
    places = {
        (selection.plan.profile, selection.plan.protocol): {(run.profile, run.protocol) for run in selection.runs}
        for selection in selections(full.write().project, read_results(full.root), ["figure8"])
    }
    assert list(places) == [("short", "released"), ("short", "corrected"), ("smoke", "released")]
    assert all(runs == {place} for place, runs in places.items())


def test_a_profile_and_protocol_is_one_group_with_the_papers_own_first() -> None:
    names = report_names(Project(ROOT))
    plans = [selection.plan for selection in selections(Project(ROOT), read_results(ROOT), names)]
    groups = [place for place, _ in itertools.groupby((plan.profile, plan.protocol) for plan in plans)]
    assert len(groups) == len(set(groups))
    for place in groups:
        own = [names.index(plan.name) for plan in plans if (plan.profile, plan.protocol) == place]
        assert own == sorted(own)


def test_other_version_of_the_protocol_is_left_out(bench: Bench) -> None:
    bench.add("Linear", [0.3], version="1", key="old")
    bench.add("Linear", [0.2], seed=2)
    selection = bench.selection()
    assert [run.seed for run in selection.runs] == [2]
    assert "1 of another version of the protocol left out" in wording.completeness(selection)


def test_of_two_runs_the_one_with_the_settings_of_the_experiment_file_counts(bench: Bench) -> None:
    bench.add("Linear", [0.9], key="aaaa")
    bench.add("Linear", [0.2])
    assert bench.cell("Linear").ours["last"].values == (0.2,)


def test_run_with_other_settings_is_named(bench: Bench) -> None:
    bench.add("Linear", [0.9], key="aaaa")
    assert "1 made with other settings" in wording.completeness(bench.selection())


def test_two_runs_of_unknown_settings_are_refused(bench: Bench) -> None:
    bench.add("Linear", [0.9], key="aaaa")
    bench.add("Linear", [0.2], key="bbbb")
    with pytest.raises(UserError, match=r"2 runs of figure8/Linear/n_keys=20/seed1 .*aaaa, bbbb"):
        bench.selection()


def test_further_seeds_count_in_the_mean_but_not_as_planned(bench: Bench) -> None:
    for seed in (1, 2, 3):
        bench.add("Linear", [0.1 * seed], seed=seed)
    assert wording.summary(bench.cell("Linear").ours["last"]) == "0.200 ± 0.100 (3)"
    assert wording.completeness(bench.selection()) == "2 of 8 runs, 1 with further seeds"


def test_view_shows_its_points_of_the_parents_runs(full: Bench) -> None:
    selection = full.selection("figure9")
    assert {(run.experiment, run.point) for run in selection.runs} == {("figure8", "n_keys=40")}
    assert full.cell("Linear", "n_keys=40", name="figure9").released["last"].value is not None


def test_view_has_its_own_deviations_before_its_parents(full: Bench) -> None:
    full.add("Linear", [0.4], profile="smoke", point="n_keys=40")
    assert full.selection("figure9", "smoke").deviations == ("Ten steps only.",)
    full.edit("figure9", deviations={"smoke": "Ten steps of one curve."})
    assert full.selection("figure9", "smoke").deviations == ("Ten steps of one curve.",)
    full.edit("figure9", deviations={"smoke": ""})
    assert full.selection("figure9", "smoke").deviations == ()


def test_deviation_that_the_experiment_file_no_longer_names_is_still_shown(bench: Bench) -> None:
    bench.add("Linear", [0.4], deviations="On a coarser grid.")
    assert bench.selection().deviations == ("On a coarser grid.",)


def test_newest_run_is_the_one_that_finished_last(full: Bench) -> None:
    full.runs[2]["finished"] = "2026-01-02T00:00:00Z"
    assert full.selection().newest == "2026-01-02T00:00:00Z (figure8/DPFP-1/n_keys=20/seed2)"


def test_higher_is_better_turns_the_best_around(bench: Bench) -> None:
    key = bench.add("Delta Network", [20.0, 27.0, 25.0], experiment="table9", point="", protocol="corrected",
                    metric="test/bleu")  # fmt: skip
    bench.add("Delta Network", [40.0, 35.0], experiment="table9", point="", protocol="corrected", key=key,
              metric="valid/perplexity")  # fmt: skip
    bench.paper("Delta Network", "bleu", "27.7", experiment="table9", point="", split="test")
    cells = {cell.metric.name: cell for cell in bench.cells("table9") if cell.row == "Delta Network"}
    assert cells["test/bleu"].ours["best"].values == (27.0,)
    assert wording.difference(cells["test/bleu"], "best") == "−0.7"
    assert cells["valid/perplexity"].ours["best"].values == (35.0,)


# --- how numbers read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (4.3e-4, "4.3e−4"), (0.00999, "0.0100"), (0.1749, "0.175"), (0.99961, "1.00"), (1.69, "1.69")],
        *[(9.996, "10.0"), (96.9, "96.9"), (1234.4, "1234"), (-0.01, "−0.0100"), (math.nan, "--")],
    ],
)
def test_number_has_three_significant_digits(value: float, text: str) -> None:
    assert wording.number(value) == text


def test_spread_is_given_to_the_means_last_digit() -> None:
    assert wording.summary(Summary((0.170, 0.174), 2)) == "0.172 ± 0.003 (2)"
    assert wording.summary(Summary((34.06, 34.12), 2), 1) == "34.1 ± 0.0 (2)"


def test_bound_of_the_paper_is_printed_and_not_subtracted(bench: Bench) -> None:
    bench.add("Linear Transformer", [300.0], experiment="table9", point="", protocol="corrected",
              metric="valid/perplexity")  # fmt: skip
    bench.paper("Linear Transformer", "perplexity", "260", "Table 4; >260 printed", experiment="table9", point="")
    assert bench.draw("table9") == 0
    text = (bench.root / "reports/output/short/corrected/table9.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| Linear Transformer"))
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["300.0 (1)", ">260", "--"]


def test_a_run_scored_in_several_ways_has_a_line_for_each(bench: Bench) -> None:
    metrics = [{"name": f"{name}", "label": name} for name in ("model/size", "valid/perplexity")]
    lines = {"Linear Transformer": {"short memory": "_1", "long memory": "_2"}}
    bench.edit("table9", report={"kind": "table", "metrics": metrics, "lines": lines})
    added = {"experiment": "table9", "point": "", "protocol": "corrected"}
    key = bench.add("Linear Transformer", [90.0], metric="valid/perplexity_1", **added)
    bench.add("Linear Transformer", [20.0], metric="valid/perplexity_2", key=key, **added)
    bench.add("Linear Transformer", [7.0], metric="model/size", key=key, **added)
    bench.paper("long memory", "perplexity", "24.6", experiment="table9", point="")
    table = tables.build(bench.selection("table9"), bench.cells("table9"))
    assert table.lines == (
        ("short memory", "7.00 (1)", "--", "--", "90.0 (1)", "--", "--"),
        ("long memory", "7.00 (1)", "--", "--", "20.0 (1)", "24.6", "\N{MINUS SIGN}4.60"),
        ("Delta Network", "-- (0/1)", "--", "--", "-- (0/1)", "--", "--"),
    )


def test_lines_of_a_row_that_is_not_there_are_refused(bench: Bench) -> None:
    spec = {"kind": "table", "metrics": ["valid/perplexity"]}
    bench.edit("table9", report={**spec, "lines": {"Linear": {"short memory": "_1"}}})
    with pytest.raises(UserError, match=r"lines names the row 'Linear'\. Did you mean 'Linear Transformer'"):
        load_plan(bench.project, "table9", "short")
    bench.edit("table9", report={**spec, "kind": "learning_curves", "lines": {"Delta Network": {"short": "_1"}}})
    with pytest.raises(UserError, match="lines belong to a table"):
        check_report_section("table9", bench.project)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def axes_of(bench: Bench, name: str = "figure8", profile: str = "short", protocol: str | None = None) -> Axes:
    figure = figures.draw(bench.selection(name, profile, protocol), bench.cells(name, profile, protocol))
    return figure.axes[0]


def legend_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def markers_at(axes: Axes, x: float, y: float) -> set[tuple[object, str]]:
    return {
        (line.get_marker(), str(line.get_markerfacecolor()))
        for line in axes.lines
        if line.get_linestyle() == "None" and (x, y) in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def test_released_runs_are_hollow_in_the_methods_colour(full: Bench) -> None:
    axes = axes_of(full)
    assert markers_at(axes, 20, 0.15) == {(LOOKS["DPFP-1"].marker, "#FFFFFF")}
    assert markers_at(axes, 20, 0.18) == {(LOOKS["DPFP-1"].marker, LOOKS["DPFP-1"].colour)}


def test_diverged_points_are_crosses_at_the_top_edge_with_a_legend_entry(full: Bench) -> None:
    axes = axes_of(full)
    # ours, and below it the authors'
    assert {marker for marker, _ in markers_at(axes, 40, 1 - 0.026)} == {figures.CROSS}
    assert {marker for marker, _ in markers_at(axes, 40, 1.0)} == {figures.HOLLOW_CROSS}
    assert legend_of(axes) == [
        *("DPFP-1", "Linear", "authors' released run", "diverged (NaN)", "worst to best seed"),
        "authors' run diverged (NaN)",
    ]


@pytest.mark.parametrize("who", ["ours", "authors'"])
def test_legend_names_whose_run_diverged(bench: Bench, who: str) -> None:
    bench.add("Linear", [0.3, math.nan if who == "ours" else 0.2])
    bench.paper("Linear", "last_loss", "0.2" if who == "ours" else "nan")
    words = legend_of(axes_of(bench))[2:]
    assert words == (["authors' released run", "diverged (NaN)"] if who == "ours" else ["authors' run diverged (NaN)"])


def test_legend_names_no_mark_that_is_not_there(bench: Bench) -> None:
    bench.add("Linear", [0.3])
    assert legend_of(axes_of(bench)) == ["DPFP-1", "Linear"]


def test_authors_run_that_ends_later_is_an_arrow_with_its_own_words(bench: Bench) -> None:
    bench.add("Linear", [0.3, 0.2], point="n_keys=40")
    bench.paper("Linear", "last_loss", "0.1", point="n_keys=40")
    bench.paper("Linear", "last_step", "900", point="n_keys=40")
    axes = axes_of(bench, "figure9")
    assert {marker for marker, _ in markers_at(axes, axes.get_xlim()[1], 0.1)} == {figures.HOLLOW_ONWARD}
    assert legend_of(axes) == ["DPFP-1", "Linear", "authors' run ends later"]


def test_authors_point_below_the_axis_is_a_hollow_arrow(bench: Bench) -> None:
    bench.add("Linear", [0.3])
    bench.paper("Linear", "last_loss", "1e-5")
    axes = axes_of(bench)
    assert {marker for marker, _ in markers_at(axes, 20, 0.001)} == {figures.HOLLOW_DOWN}
    assert legend_of(axes)[2:] == ["authors' run beyond the axes"]


def test_every_figure_and_table_names_its_statistic(full: Bench) -> None:
    assert axes_of(full).get_ylabel() == "last loss"
    assert axes_of(full, protocol="corrected").get_ylabel() == "best loss"
    # a curve is every evaluation; what ends it is named in the legend
    full.paper("DPFP-1", "last_loss", "0.2", point="n_keys=40")
    full.paper("DPFP-1", "last_step", "200", point="n_keys=40")
    axes = axes_of(full, "figure9")
    assert axes.get_ylabel() == "valid loss"
    assert "authors' run, last evaluation" in legend_of(axes)
    points = tables.build(full.selection(), full.cells()).header
    assert {"last: ours", "best: ours", "last: released", "best: released"} <= set(points)
    full.add("Delta Network", [35.0], experiment="table9", point="", protocol="corrected", metric="valid/perplexity")
    assert "valid: ours" in tables.build(full.selection("table9"), full.cells("table9")).header
    assert tables.notes(full.selection("table9"))[0].startswith("Ours is that of the best evaluation")


def test_figure_and_table_of_one_point_name_it(full: Bench) -> None:
    figure = figures.draw(full.selection("figure9"), full.cells("figure9"))
    assert "S = 40 · Figure 9 · short profile · released protocol" in [text.get_text() for text in figure.texts]
    assert "Curves · S = 40 · Figure 9" in tables.caption(full.selection("figure9"))
    # several points are on the axis
    assert "S = " not in tables.caption(full.selection("figure8"))


def test_point_where_one_seed_diverged_has_its_mean_and_a_cross(bench: Bench) -> None:
    bench.add("Linear", [0.3, 0.2])
    bench.add("Linear", [0.3, math.nan], seed=2)
    axes = axes_of(bench)
    assert markers_at(axes, 20, 0.2) == {(LOOKS["Linear"].marker, LOOKS["Linear"].colour)}
    assert {marker for marker, _ in markers_at(axes, 20, 1.0)} == {figures.CROSS}


def test_point_below_the_axis_is_an_arrow_at_its_edge(full: Bench) -> None:
    axes = axes_of(full, protocol="corrected")
    assert {marker for marker, _ in markers_at(axes, 20, 0.001)} == {figures.DOWN}


def test_bars_reach_from_the_best_to_the_worst_seed_and_stand_beside_each_other(bench: Bench) -> None:
    for row, values in {"Linear": (0.5, 0.25, 0.375), "DPFP-1": (0.45, 0.2, 0.25)}.items():
        for seed, value in enumerate(values, 1):
            bench.add(row, [0.9, value], seed=seed)
    bench.add("Linear", [0.6], point="n_keys=40")
    axes = axes_of(bench)
    bars = [segment for drawn in axes.collections for segment in drawn.get_segments()]
    assert sorted((round(min(y), 9), round(max(y), 9)) for _, y in (bar.T for bar in bars)) == [
        (0.2, 0.45),
        (0.25, 0.5),
    ]
    places = sorted(x for bar in bars for x in bar[:1, 0])
    # apart, and nearer to their own number than to the next
    assert 0 < places[1] - places[0] < 0.2 * 20
    assert places[0] + places[1] == pytest.approx(40)
    assert places[0] > axes.get_xlim()[0]
    # the mean's marker is on its bar
    assert markers_at(axes, places[1], 0.375) == {(LOOKS["Linear"].marker, LOOKS["Linear"].colour)}
    assert legend_of(axes)[2:] == ["worst to best seed"]


def test_no_bar_and_no_step_aside_without_further_seeds(bench: Bench) -> None:
    for row in ("Linear", "DPFP-1"):
        bench.add(row, [0.4])
    axes = axes_of(bench)
    assert not [segment for drawn in axes.collections for segment in drawn.get_segments()]
    assert len(markers_at(axes, 20, 0.4)) == 2
    assert legend_of(axes) == ["DPFP-1", "Linear"]


def test_learning_curves_end_in_a_marker_and_show_the_released_end(full: Bench) -> None:
    full.paper("DPFP-1", "last_loss", "0.2", point="n_keys=40")
    full.paper("DPFP-1", "last_step", "200", point="n_keys=40")
    axes = axes_of(full, "figure9")
    assert markers_at(axes, 200, 0.2) == {(LOOKS["DPFP-1"].marker, "#FFFFFF")}
    assert markers_at(axes, 300, 0.24) == {(LOOKS["DPFP-1"].marker, LOOKS["DPFP-1"].colour)}
    assert {marker for marker, _ in markers_at(axes, 200, 1.0)} == {figures.CROSS}
    assert {marker for marker, _ in markers_at(axes, 200, 1 - 0.026)} == {figures.HOLLOW_CROSS}


def test_every_output_names_command_commit_runs_and_newest(full: Bench) -> None:
    for number, run in enumerate(full.runs):
        run["finished"] = f"2026-01-0{number + 1}T12:00:00Z"
    assert full.draw("figure8") == 0
    folder = full.root / "reports/output/short/released"
    for suffix in ("md", "tex", "csv"):
        text = (folder / f"figure8.{suffix}").read_text()
        for word in ("python -m reports figure8", "0123456789", "2026-01-06T12:00:00Z"):
            assert word in text, (suffix, word)
    assert b"6 of 8 runs" in (folder / "figure8.png").read_bytes()
    assert (folder / "figure8.pdf").read_bytes().startswith(b"%PDF")


def test_same_csv_gives_the_same_bytes_without_torch_or_mlflow(full: Bench) -> None:
    assert full.draw() == 0
    output = full.root / "reports/output"
    before = {path: path.read_bytes() for path in output.rglob("*.*")}
    assert {path.suffix for path in before} == {".png", ".pdf", ".md", ".tex", ".csv", ".html"}
    for path in before:
        path.unlink()
    # lines in another order are the same results
    for name in ("runs", "metrics", "paper"):
        path = full.root / f"results/{name}.csv"
        header, *lines = path.read_text().splitlines()
        path.write_text("\n".join([header, *reversed(lines)]) + "\n")
    code = (
        "import sys; from reports.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or [m for m in ('torch', 'mlflow', 'lightning') if m in sys.modules] or 0)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, "--root", str(full.root)]
    subprocess.run(command, check=True, env=environment, cwd=full.root, capture_output=True)
    after = {path: path.read_bytes() for path in output.rglob("*.*")}
    assert after.keys() == before.keys()
    assert [path.name for path in before if before[path] != after[path]] == []


def test_latex_escapes_what_latex_reads(full: Bench) -> None:
    selection, cells = full.selection(), full.cells()
    table = tables.build(selection, cells)
    named = ("DPFP_1 & co", *table.lines[0][1:])
    text = tables.to_latex(dataclasses.replace(table, lines=(named, *table.lines[1:])), selection)
    assert r"DPFP\_1 \& co" in text
    assert r"0.180 $\pm$ 0.085 (2)" in text
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not re.search(r"[±−]", "\n".join(body))


def test_page_is_self_contained_and_complete(full: Bench) -> None:
    assert full.draw() == 0
    html = (full.root / "reports/output/index.html").read_text()
    links = re.findall(r'(?:src|href|srcset)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert links
    assert [link for link in links if not link.startswith(("#", "data:text/csv;base64,"))] == []
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    for place in ("short-released", "short-corrected", "smoke-released"):
        assert f"figure8-{place}" in ids
    for text in ("make reproduce-figure8 PROFILE=short PROTOCOL=corrected", "Ten steps only.", "6 of 8 runs", "3.0 h",
                 "prefers-color-scheme: dark", "width=device-width", "0123456789"):  # fmt: skip
        assert text in html, text


def test_sentences_stand_on_the_page_by_row_with_their_source_where_it_may_be_told(bench: Bench) -> None:
    linear = bench.add(
        "Linear Transformer", [9.0], experiment="table9", point="", protocol="corrected", metric="test/bleu"
    )
    delta = bench.add("Delta Network", [9.0], experiment="table9", point="", protocol="corrected", metric="test/bleu")
    bench.translations = [
        (delta, "test", "10", "", "", "zehnte"),
        (delta, "test", "2", "two <b>", "zwei", "zweite delta"),
        (linear, "test", "2", "two <b>", "zwei", "zweite linear"),
    ]
    assert bench.draw("table9") == 0
    html = (bench.root / "reports/output/index.html").read_text()
    assert "2 test sentences" in html
    shown = ["test, line 2", "two &lt;b&gt;", "zwei", "zweite linear", "zweite delta", "test, line 10", "zehnte"]
    places = [html.index(text) for text in shown]
    assert places == sorted(places)
    assert html.count("whose licence") == 1


def test_figures_on_the_page_take_the_pages_colours(full: Bench) -> None:
    figure = figures.draw(full.selection(), full.cells())
    svg = figures.to_svg(figure, "here")
    assert not [colour for colour in DARK if re.search(rf"(?<!, ){colour}", svg, re.IGNORECASE)]
    assert "var(--c6cb8ea, #6cb8ea)" in svg


# --- colours ---------------------------------------------------------------------------------------------------------

FIGURE2 = ["Softmax", "Linear", "FAVOR+ (64)", "FAVOR+ (128)", "FAVOR+ (512)", "DPFP-1", "DPFP-2", "DPFP-3"]
FIGURE5 = ["DPFP-1 delta", "DPFP-1 sum", "Schlag (2021)", "Schlag (2021) with DPFP-1", "DPFP-2 delta", "Linear delta",
           "FAVOR+ (64) delta", "FAVOR+ (128) delta"]  # fmt: skip
FAMILY = [
    "family_figure2_maps",
    "family_figure2_rules",
    "family_figure3",
    "family_figure5_maps",
    "family_figure5_rules",
    "recall_maps",
    "recall_rules",
]
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SEEN_BY = {
    "most": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
# CIELAB distance; about 2 is just noticeable side by side, markers and lines of a plot need several times that
APART = 15.0


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = seen @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear.clip(0, 1) / np.array([0.95047, 1, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("who", SEEN_BY)
@pytest.mark.parametrize(
    "rows",
    [FIGURE2, FIGURE5, *(load_plan(Project(ROOT), name, "short").rows for name in FAMILY)],
    ids=["figure2", "figure5", *FAMILY],
)
def test_colours_of_one_figure_are_told_apart(rows: list[str], who: str) -> None:
    close = [
        (one, other, round(distance, 1))
        for one, other in itertools.combinations(rows, 2)
        if (
            distance := float(
                np.linalg.norm(lab(LOOKS[one].colour, SEEN_BY[who]) - lab(LOOKS[other].colour, SEEN_BY[who]))
            )
        )
        < APART
    ]
    assert close == []


def test_one_look_per_method_in_every_figure() -> None:
    assert looks_of(["Linear", "mine"])["Linear"] == looks_of(FIGURE2)["Linear"]
    mine = looks_of(["mine", "Linear", "yours"])
    assert len({mine["mine"], mine["yours"], mine["Linear"]}) == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(bench: Bench, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which a command ends."""
    assert main([*arguments, "--root", str(bench.root)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_report_before_any_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "no runs for figure8 in results/runs.csv; run `make reproduce-figure8` first"
    assert expected in refused(bench, capsys, "figure8")
    assert "run `make smoke` first" in refused(bench, capsys)
    assert not (bench.root / "reports").exists()


def test_all_reports_draw_what_there_is_and_name_the_rest(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.add("Linear", [0.3])
    assert bench.draw() == 0
    assert "no runs for table9" in capsys.readouterr().err
    assert bench.draw("figure8", "table9") == 2


def test_unknown_report(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(full.write(), capsys, "figur8")
    assert "Did you mean 'figure8'? Known: figure8, figure9, table9, claims, family, bench, readme." in sentence


@pytest.mark.parametrize("column", ["run_key", "status", "protocol", "finished"])
def test_missing_column(full: Bench, capsys: pytest.CaptureFixture[str], column: str) -> None:
    full.runs = [{name: value for name, value in run.items() if name != column} for run in full.runs]
    full.write()
    assert f"runs.csv lacks the column '{column}'" in refused(full, capsys, "figure8")


def test_key_that_stands_twice(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.runs.append(full.runs[0])
    full.write()
    assert f"line 10: run_key = {full.runs[0]['run_key']} stands twice" in refused(full, capsys, "figure8")


def test_metric_that_stands_twice(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.points.append((*full.points[0][:4], "0.7"))
    full.write()
    assert "valid, loss, 100 stands twice" in refused(full, capsys, "figure8")


def test_value_that_is_no_number(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.points.append(("abcd", "valid", "loss", "100", "high"))
    full.write()
    assert "value 'high' is no number" in refused(full, capsys, "figure8")


@pytest.mark.parametrize("damage", ["bytes", "nul", "folder"])
@pytest.mark.parametrize("name", ["runs.csv", "metrics.csv", "translations.csv", "paper.csv"])
def test_file_that_is_no_csv(full: Bench, capsys: pytest.CaptureFixture[str], name: str, damage: str) -> None:
    path = full.write().root / "results" / name
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x81\x00\n" if damage == "bytes" else b"run_key,\x00\n\x00\n")
    assert str(path) in refused(full, capsys, "figure8")


@pytest.mark.parametrize("line", ["figure8,Linear,n_keys=20,valid,last_loss,high,log", "figure8,Linear"])
def test_damaged_line_of_paper_csv(full: Bench, capsys: pytest.CaptureFixture[str], line: str) -> None:
    path = full.write().root / "results" / "paper.csv"
    path.write_text(path.read_text() + line + "\n")
    assert f"{path} line 7" in refused(full, capsys, "figure8")


@pytest.mark.parametrize("name", ["reports", "reports/output", "reports/output/short", "reports/output/index.html"])
def test_output_that_cannot_be_written(full: Bench, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = full.write().root / name
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    sentence = refused(full, capsys, "figure8")
    assert "cannot be written" in sentence
    assert str(path) in sentence


def test_run_of_an_unknown_profile(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.runs[0]["profile"] = "shrt"
    sentence = refused(full.write(), capsys, "figure8")
    assert "figure8 cannot be drawn from results/runs.csv: figure8 has no profile 'shrt'. Did you mean" in sentence


def test_fwp_report_hands_the_exit_code_on(bench: Bench) -> None:
    (bench.write().root / "pyproject.toml").touch()
    path = bench.root / "results" / "runs.csv"
    path.write_bytes(b"\xff\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FWP_ROOT": str(bench.root)}
    command = [sys.executable, "-m", "fwp_lightning", "report", "figure8"]
    done = subprocess.run(command, cwd=bench.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (None, "has no `report:` section"),
        ({"kind": "capacity_plt", "metrics": ["valid/loss"]}, "Did you mean 'capacity_plot'"),
        ({"kind": "table", "metrics": []}, "metrics is empty"),
        ({"kind": "table", "metrics": ["valid/loss"], "axis": {}}, "unknown key 'axis'"),
        ({"kind": "table", "metrics": [{"name": "a/b", "better": "up"}]}, "choose lower or higher"),
        ({"kind": "table", "metrics": ["a/b"], "y": {"scale": "log", "limits": [0, 1]}}, "above 0 on a log scale"),
        ({"kind": "table", "metrics": ["a/b"], "y": {"limits": [1, 0]}}, "first must be below the second"),
        ({"kind": "table", "metrics": ["a/b"], "y": {"limits": "wide"}}, "give two numbers"),
        ({"kind": "table", "metrics": ["a/b"], "y": {"limits": [False, 1]}}, "give two numbers"),
        ({"kind": "table", "metrics": "a/b"}, "give a list, as in [a/b]"),
        ({"kind": "table", "metrics": ["loss"]}, "write split and metric"),
        ({"kind": "table", "metrics": [{"label": "loss"}]}, "write split and metric"),
        ({"kind": "table", "metrics": [3]}, "metrics is 3; give it the keys name"),
        ({"kind": "table", "metrics": [{"name": "a/b", "digits": "two"}]}, "a whole number from 0 to 9"),
        ({"kind": "table", "metrics": ["a/b"], "x": "steps"}, "report.x is 'steps'; give it the keys label"),
        ({"kind": "table", "metrics": ["a/b"], "readme": [60]}, "write a point as in n_keys=60"),
        ({"kind": "table", "metrics": ["a/b"], "lines": ["a"]}, "give each row its lines"),
        ({"kind": "table", "metrics": ["a/b"], "lines": {"a": "_1"}}, "'a' has '_1'; give it lines"),
    ],
)
def test_wrong_report_section(section: object, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        read_spec("figure8", section)


@pytest.mark.parametrize("name", ["figure8", "figure9", "table9"])
def test_report_section_is_checked_without_any_result(bench: Bench, name: str) -> None:
    check_report_section(name, bench.project)
    bench.edit(name, report={"kind": "capacity_plt", "metrics": ["valid/loss"]})
    with pytest.raises(UserError, match=rf"{name}\.yaml, report: kind .*capacity_plot"):
        check_report_section(name, bench.project)


def test_experiment_without_report_section_passes_the_check(bench: Bench) -> None:
    path = bench.root / "experiments" / "table9.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in TABLE.items() if key != "report"}))
    check_report_section("table9", bench.project)


def test_capacity_plot_needs_numbers_to_plot_over(bench: Bench) -> None:
    bench.edit("table9", report={"kind": "capacity_plot", "metrics": ["valid/loss"]})
    with pytest.raises(UserError, match="a capacity_plot needs a grid of one key with numbers"):
        check_report_section("table9", bench.project)
    with pytest.raises(UserError, match="a capacity_plot needs a grid of one key with numbers"):
        load_plan(bench.project, "table9", "short")


def test_readme_point_that_no_profile_has(bench: Bench) -> None:
    bench.edit("figure8", report=CAPACITY["report"] | {"readme": ["n_keys=41"]})
    with pytest.raises(UserError, match=r"readme names the point 'n_keys=41'\. Did you mean 'n_keys=40'"):
        check_report_section("figure8", bench.project)


# --- from a number to its runs ----------------------------------------------------------------------------------------


def test_every_number_of_ours_leads_to_its_runs(full: Bench) -> None:
    full.add("Delta Network", [35.0], experiment="table9", point="", protocol="corrected", metric="valid/perplexity")
    assert full.draw() == 0
    page = (full.root / "reports/output/index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    for run in full.runs:
        assert ids.count(f"run-{run['run_key']}") == 1
    # two seeds make one number
    first, second = (run["run_key"] for run in full.runs if (run["row"], run["point"], run["profile"]) == FIRST)
    (group,) = re.findall(rf'<tbody id="runs-{first}">.*?</tbody>', page, re.DOTALL)
    assert second in group
    assert "0123456789" in group
    assert f'<a href="#runs-{first}">0.180 ± 0.085 (2)</a>' in page
    # a number without a run leads nowhere
    assert "-- (0/2)</a>" not in page


FIRST = ("DPFP-1", "n_keys=20", "short")


def test_a_line_of_a_run_scored_in_several_ways_leads_to_that_run(bench: Bench) -> None:
    lines = {"Linear Transformer": {"short memory": "_1", "long memory": "_2"}}
    bench.edit("table9", report=TABLE["report"] | {"lines": lines})
    key = bench.add("Linear Transformer", [90.0], experiment="table9", point="", protocol="corrected",
                    metric="valid/perplexity_1")  # fmt: skip
    bench.add("Linear Transformer", [20.0], experiment="table9", point="", protocol="corrected", key=key,
              metric="valid/perplexity_2")  # fmt: skip
    bench.draw()
    page = (bench.root / "reports/output/index.html").read_text()
    assert page.count(f'<a href="#runs-{key}">90.0 (1)</a>') == page.count(f'<a href="#runs-{key}">20.0 (1)</a>') == 1


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_the_time_of_a_run_is_short(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_block_has_ours_beside_the_authors(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.add("Linear", [0.7], seed=2)
    assert full.draw("readme") == 0
    text = (full.root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- results:begin -->\n")
    assert text.endswith("<!-- results:end -->\n\nThe end.\n")
    released, corrected = text.split("### ")[1:]
    assert released.startswith("Protocol `released`\n\nOurs / the authors' released run, last loss.")
    assert corrected.startswith("Protocol `corrected`\n\nOurs / the authors' released run, best loss.")
    assert "**Capacity**: Figure 8, profile `short`, 7 of 8 runs." in released
    assert cells_of(released) == [
        ["method", "S = 20", "S = 40"],
        ["DPFP-1", "0.180 ± 0.085 / 0.150", "0.180 ± 0.085 / --"],
        ["Linear", "0.500 ± 0.283 / --", "diverged (1/2) / diverged"],
    ]
    assert cells_of(corrected)[1:] == [["DPFP-1", "-- / 0.110", "-- / --"], ["Linear", "1.0e−4 (1/2) / --", "-- / --"]]
    capsys.readouterr()
    assert full.draw("readme", "--check") == 0
    assert "up to date" in capsys.readouterr().out


def cells_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_readme_leaves_a_point_empty_that_the_profile_does_not_have(bench: Bench) -> None:
    bench.edit("figure8", profiles={"smoke": {"grid": {"data.n_keys": [20]}}, "short": {}})
    bench.add("Linear", [0.3], profile="smoke")
    assert bench.draw("readme") == 0
    text = (bench.root / "README.md").read_text()
    assert "Where a cell is empty, the profile has no such run." in text
    lines = cells_of(text)
    assert lines[2] == ["Linear", "0.300 (1/2) / --", ""]


def test_readme_has_tables_of_all_profiles_but_smoke(bench: Bench) -> None:
    table = {"experiment": "table9", "point": "", "protocol": "corrected", "metric": "test/bleu"}
    bench.edit("table9", profiles={"smoke": {}, "short": {}})
    bench.add("Delta Network", [27.0], profile="smoke", **table)
    bench.paper("Delta Network", "bleu", "27.7", experiment="table9", point="", split="test")
    assert bench.draw("readme") == 0
    assert "### Tables" not in (bench.root / "README.md").read_text()
    bench.add("Delta Network", [25.0], **table)
    assert bench.draw("readme") == 0
    block = (bench.root / "README.md").read_text().split("### Tables")[1]
    assert "Table 9, profile `short`, protocol `corrected`, 1 of" in block
    # no column for what the paper has no number of
    assert cells_of(block)[0] == ["model", "BLEU"]
    assert ["Delta Network", "25.0 / 27.7"] in cells_of(block)


def test_readme_leaves_tables_that_the_paper_lacks_to_the_page(bench: Bench) -> None:
    bench.edit("table9", profiles={"smoke": {}, "short": {}})
    bench.add("Delta Network", [25.0], experiment="table9", point="", protocol="corrected", metric="test/bleu")
    assert bench.draw("readme") == 0
    assert "### Tables" not in (bench.root / "README.md").read_text()


def test_readme_that_is_no_text(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = full.write().root / "README.md"
    path.write_bytes(b"\xff")
    assert f"{path} cannot be read: it is not UTF-8 text" in refused(full, capsys, "readme")
    path.unlink()
    assert f"{path} cannot be read: No such file" in refused(full, capsys, "readme")


def test_stale_readme_block_is_found_and_left_alone(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    full.write()
    before = (full.root / "README.md").read_text()
    assert "stale; run `python -m reports readme`" in refused(full, capsys, "readme", "--check")
    assert (full.root / "README.md").read_text() == before


def test_readme_without_markers(full: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (full.write().root / "README.md").write_text("# Title\n")
    assert "needs one line <!-- results:begin -->" in refused(full, capsys, "readme")


# --- the paper's numbers ---------------------------------------------------------------------------------------------


def test_paper_csv_holds_every_released_run_and_table() -> None:
    references = read_references(ROOT / "results" / "paper.csv")
    last = {key[:3]: found.value for key, found in references.items() if key[4] == "last_loss"}
    assert len(last) == 320
    assert last["figure2", "DPFP-3", "n_keys=600"] == pytest.approx(0.201, abs=5e-4)
    assert math.isnan(last["figure5", "FAVOR+ (64) delta", "n_keys=40"])
    assert references["table2", "Delta Network", "size=small", "test", "perplexity"].value == 35.5
    assert references["table4", "Linear Transformer", "", "test", "perplexity"].printed == ">260"
    assert all(found.source for found in references.values())
    assert {key[0] for key in references} == {"figure2", "figure5", *(f"table{n}" for n in range(1, 7))}


def test_paper_numbers_map_released_names_to_rows(tmp_path: Path) -> None:
    log = ["2", "dpfp1", "ours", "20", "7.7e-4", "700", "7.7e-4", "700"]
    write_csv(tmp_path / "logs.csv", [paper_numbers.RELEASED_COLUMNS, log])
    out = tmp_path / "paper.csv"
    assert paper_numbers.main([str(tmp_path / "logs.csv"), "--out", str(out)]) == 0
    found = read_references(out)
    assert found["figure5", "DPFP-1 delta", "n_keys=20", "valid", "last_step"].value == 700


def test_paper_numbers_refuse_an_unknown_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = ["2", "dpfp9", "ours", "20", "1", "1", "1", "1"]
    write_csv(tmp_path / "logs.csv", [paper_numbers.RELEASED_COLUMNS, log])
    assert paper_numbers.main([str(tmp_path / "logs.csv"), "--out", str(tmp_path / "out.csv")]) == 2
    assert "2/dpfp9/ours" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_experiment_files_name_rows_and_points_as_paper_csv_does() -> None:
    project, references = Project(ROOT), read_references(ROOT / "results" / "paper.csv")
    known = {key[:3] for key in references}
    # the other experiments are of rows that the paper does not have
    for name in (name for name in report_names(project) if re.fullmatch(r"(figure|table)\d+", name)):
        for profile in ("smoke", "short", "paper"):
            plan = load_plan(project, name, profile)
            # a row that the paper has no number for says so
            strangers = [
                (line, point)
                for row, point in plan.seeds
                for line in plan.spec.lines_of(row)
                if (plan.runs_of, line, point) not in known and not re.search(r"\((ours|.*Table 6)\)$", line)
            ]
            assert strangers == [], f"{name}, {profile} profile"
            assert set(plan.spec.readme) <= set(load_plan(project, name, "paper").points)


def test_only_where_there_is_a_released_code_numbers_are_called_its() -> None:
    assert load_plan(Project(ROOT), "figure2", "smoke", "corrected").has_released
    assert not load_plan(Project(ROOT), "table1", "smoke").has_released


def test_every_experiment_has_a_report() -> None:
    project = Project(ROOT)
    assert sorted(report_names(project)) == sorted(experiment_names(project))
    for name in experiment_names(project):
        check_report_section(name, project)


def test_smoke_learning_curves_say_what_they_show() -> None:
    figure3, figure4 = (load_plan(Project(ROOT), name, "smoke") for name in ("figure3", "figure4"))
    assert wording.only_point(figure4) == "S = 60"
    assert "600" not in figure4.title
    assert figure4.deviations == ("at most 500 optimiser steps a run; S = 60 instead of 600",)
    assert wording.only_point(figure3) == "S = 20"
    assert figure3.deviations == ("at most 300 optimiser steps a run",)
    assert wording.only_point(load_plan(Project(ROOT), "figure4", "paper")) == "S = 600"
