"""The table of the family: rows that set the same memory meet in one line, profiles stay apart, gaps are shown."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import pytest
from hand_written import Bench

from reports import family_table
from reports.family_table import EXPERIMENTS, FACTS, OVERWRITING, RECALL, STORING, Family, families
from reports.readme import rewrite
from reports.sources import read_results

ROOT = Path(__file__).resolve().parent.parent
PROTOCOLS = {STORING: "corrected", OVERWRITING: "corrected", RECALL: "mqar", FACTS: "stories"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The suite's own experiments of the family, without runs."""
    (tmp_path / "experiments" / "base").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    for name in (*EXPERIMENTS, "base/retrieval", "base/recall", "base/stories"):
        shutil.copy(ROOT / "experiments" / f"{name}.yaml", tmp_path / "experiments" / f"{name}.yaml")
    return Bench(tmp_path)


def add(bench: Bench, experiment: str, row: str, value: float, point: str, seed: int = 1, **changed: str) -> None:
    facts = {"n_params": "1000", "state": "64", "steps": "3000", "wall_seconds": "60", "device": "cpu (A)"}
    bench.add(
        row, [value], experiment=experiment, point=point, seed=seed, protocol=PROTOCOLS[experiment],
        metric=EXPERIMENTS[experiment], **{**facts, **changed},
    )  # fmt: skip


def fill(bench: Bench, row: str, losses: dict[int, float], experiment: str = STORING) -> None:
    for size, loss in losses.items():
        for seed in (1, 2, 3):
            add(bench, experiment, row, loss, f"n_keys={size}", seed)


def drawn(bench: Bench) -> list[Family]:
    bench.write()
    return families(bench.project, read_results(bench.root))


def line(family: Family, name: str) -> dict[str, str]:
    header, lines = family.table.header, family.table.lines
    (found,) = [dict(zip(header, texts, strict=True)) for texts in lines if texts[0] == name]
    return found


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({20: 0.001, 60: 0.0099, 100: 0.01, 200: 0.3}, "60 to 100"),
        ({20: 0.02, 60: 0.001, 100: 0.001, 200: 0.001}, "below 20"),
        ({20: 0.001, 60: 0.001, 100: 0.001, 200: 0.001}, "above 200"),
        ({20: 0.001, 100: 0.4}, "20 to 100 (6/12)"),
    ],
)
def test_a_memory_breaks_at_the_first_size_that_it_does_not_store(
    bench: Bench, losses: dict[int, float], said: str
) -> None:
    fill(bench, "Linear", losses)
    (family,) = drawn(bench)
    assert line(family, "Linear")["stores: breaks at S"] == said
    assert line(family, "Linear")["overwrites: breaks at S"] == "--"
    assert line(family, "Softmax")["stores: breaks at S"] == "--"


def test_seeds_count_by_their_mean_and_diverged_ones_have_stored_nothing(bench: Bench) -> None:
    for seed, loss in ((1, 0.001), (2, 0.001), (3, 0.04)):
        add(bench, STORING, "Linear", loss, "n_keys=20", seed)
        add(bench, STORING, "ReLU", float("nan"), "n_keys=20", seed, status="diverged")
    (family,) = drawn(bench)
    assert line(family, "Linear")["stores: breaks at S"] == "below 20 (3/12)"
    assert line(family, "ReLU sum")["stores: breaks at S"] == "below 20 (3/12)"


def test_rows_that_set_the_same_memory_are_one_line_whatever_they_are_called(bench: Bench) -> None:
    add(bench, STORING, "DPFP-1", 0.001, "n_keys=20")
    add(bench, OVERWRITING, "DPFP-1 sum", 0.25, "n_keys=20")
    add(bench, RECALL, "DPFP-1 sum", 0.5, "n_pairs=4")
    add(bench, FACTS, "DPFP-1 sum", 0.75, "")
    (family,) = drawn(bench)
    found = line(family, "DPFP-1 sum")
    assert found["memory"] == "sum, dpfp nu 1, attention_norm readout"
    assert found["stores: breaks at S"] == "above 20 (1/12)"
    assert found["loss with overwriting, S = 20"] == "0.250 (1/3)"
    assert (found["recall of 4 pairs"], found["changing facts"]) == ("0.500 (1/3)", "0.750 (1/3)")


def test_rows_of_one_name_that_set_different_memories_are_two_lines(bench: Bench) -> None:
    add(bench, RECALL, "Linear", 0.5, "n_pairs=4")
    (family,) = drawn(bench)
    memories = [texts[1] for texts in family.table.lines if texts[0] == "Schlag (2021) with DPFP-1"]
    assert memories == ["fwm, dpfp nu 1", "fwm, dpfp nu 1, phi_norm sum"]


def test_costs_are_those_of_runs_csv_and_say_where_they_were_measured(bench: Bench) -> None:
    add(bench, FACTS, "Delta RNN", 0.5, "", n_params="22016", state="2112", steps="5000", wall_seconds="1000")
    add(bench, STORING, "Linear", 0.5, "n_keys=20", steps="3000", wall_seconds="60")
    add(bench, STORING, "Linear", 0.5, "n_keys=20", 2, steps="1000", wall_seconds="10", device="gpu (B)")
    (family,) = drawn(bench)
    found = line(family, "Delta RNN")
    assert [found[f"{what}, facts"] for what in ("parameters", "state", "steps/s")] == ["22,016", "2,112", "5.00"]
    assert (found["stores: breaks at S"], found["steps/s, S = 20"]) == ("--", "--")
    # the mean of 50 and 100
    assert line(family, "Linear")["steps/s, S = 20"] == "75.0"
    assert "on cpu (A) and gpu (B)" in family.notes[1]


def test_profiles_are_never_mixed(bench: Bench) -> None:
    add(bench, STORING, "Linear", 0.001, "n_keys=20", profile="smoke")
    add(bench, FACTS, "Linear", 0.5, "")
    short, smoke = drawn(bench)
    assert (short.profile, smoke.profile) == ("short", "smoke")
    assert line(short, "Linear")["stores: breaks at S"] == line(smoke, "Linear")["changing facts"] == "--"
    assert (short.n_found, smoke.n_found) == (1, 1)


def test_without_runs_there_is_no_table_and_the_command_says_so(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drawn(bench) == []
    assert bench.draw("family") == 2
    assert "run `make reproduce-family_figure2` first" in capsys.readouterr().err


def test_the_files_the_page_and_readme_hold_the_same_table(bench: Bench) -> None:
    readme = bench.root / "README.md"
    marks = "<!-- results:begin -->\n<!-- results:end -->\n<!-- family:begin -->\n<!-- family:end -->\n"
    readme.write_text(marks)
    add(bench, STORING, "Linear", 0.001, "n_keys=20", profile="smoke")
    bench.write()
    rewrite(bench.project, read_results(bench.root), check=False)
    assert "Of the profiles `paper` and `short` no run is there yet." in readme.read_text()
    add(bench, FACTS, "Linear", 0.5, "")
    assert bench.draw() == 0
    assert bench.draw("family") == 0
    rewrite(bench.project, read_results(bench.root), check=False)
    short = bench.root / "reports" / "output" / "short"
    (shown,) = [text for text in (short / "family.md").read_text().splitlines() if text.startswith("| Linear  ")]
    words = [" ".join(line.split()) for line in readme.read_text().splitlines()]
    assert " ".join(shown.split()) in words
    # rows without a run take no line of README
    assert sum(line.startswith("|") for line in words) == 3
    assert r"Linear & sum, elu, attention\_norm readout & --" in (short / "family.tex").read_text()
    page = (bench.root / "reports" / "output" / "index.html").read_text()
    (run,) = [run["run_key"] for run in bench.runs if run["experiment"] == FACTS]
    # once as the target, in the list of runs
    assert page.count(f'href="#runs-{run}"') > 1
    assert family_table.TITLE in page


def test_the_table_is_drawn_with_each_experiment_that_it_sums_up(bench: Bench) -> None:
    add(bench, FACTS, "Linear", 0.5, "")
    assert bench.draw(FACTS) == 0
    assert (bench.root / "reports" / "output" / "short" / "family.csv").exists()


def test_a_state_without_a_size_is_no_number(bench: Bench) -> None:
    add(bench, FACTS, "Softmax", 0.5, "", state="None")
    add(bench, FACTS, "Linear", 0.5, "", state="")
    (family,) = drawn(bench)
    assert {text.text for text in family.columns["state, facts"].values()} == {"--"}
    assert {line["state"] for line in csv.DictReader(io.StringIO(family_table.to_csv(family)))} == {""}


def test_the_csv_file_has_every_number(bench: Bench) -> None:
    for seed, loss in ((1, 0.25), (2, 0.5)):
        add(bench, OVERWRITING, "FWP (1991) linear", loss, "n_keys=20", seed)
    (family,) = drawn(bench)
    lines = list(csv.DictReader(io.StringIO(family_table.to_csv(family))))
    (found,) = [one for one in lines if one["mean"]]
    assert (found["mean"], found["n"], found["n_planned"], found["protocol"]) == ("0.375", "2", "3", "corrected")
    assert (found["rule_options"], found["steps_per_second"], found["state"]) == ("activation identity", "50", "64")
    planned = sum(len(part.selection.plan.seeds) for part in family.parts.values())
    assert len(lines) == planned
