"""`fwp report --compare`: what is called a change, what is tested, and what is refused."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import pytest
from hand_written import Bench, make_bench
from scipy import stats

from reports.__main__ import main
from reports.comparison import compare

BETTER, WORSE, UNCLEAR = "better", "worse", "no difference shown"


@pytest.fixture
def then(tmp_path: Path) -> Bench:
    return make_bench(tmp_path / "then")


@pytest.fixture
def now(tmp_path: Path) -> Bench:
    return make_bench(tmp_path / "now")


def compared(then: Bench, now: Bench, *names: str) -> dict[tuple[str, str], dict[str, str]]:
    """The lines of the CSV file by row and point."""
    then.write(), now.write()
    file = now.root / "changes.csv"
    compare(now.project, then.root / "results", names, file)
    with file.open(newline="") as lines:
        return {(line["row"], line["point"]): line for line in csv.DictReader(lines)}


def fill(bench: Bench, values: dict[str, list[float]], point: str = "n_keys=20", key: str = "") -> None:
    """One run a value, seeds from 1; keys differ from those of the other side where `key` says so."""
    for row, ends in values.items():
        for seed, value in enumerate(ends, start=1):
            bench.add(row, [0.9, value], point=point, seed=seed, key=key and f"{key}-{row}-{point}-{seed}")


def test_a_number_that_fell_beyond_chance_is_better_and_one_within_it_is_not_called_so(then: Bench, now: Bench) -> None:
    fill(then, {"DPFP-1": [0.50, 0.52, 0.51], "Linear": [0.5, 0.3, 0.4]}, key="old")
    fill(now, {"DPFP-1": [0.20, 0.21, 0.22], "Linear": [0.4, 0.3, 0.45]}, key="new")
    lines = compared(then, now)
    sure, unsure = lines["DPFP-1", "n_keys=20"], lines["Linear", "n_keys=20"]
    assert (sure["verdict"], unsure["verdict"]) == (BETTER, UNCLEAR)
    assert float(sure["difference"]) == pytest.approx(0.21 - 0.51)
    assert (sure["old_n"], sure["old_seeds"], sure["new_n"]) == ("3", "1 2 3", "3")


def test_the_test_is_welchs_and_the_correction_holms(then: Bench, now: Bench) -> None:
    old, new = [0.50, 0.52, 0.51], [0.20, 0.31, 0.45]
    fill(then, {"DPFP-1": old, "Linear": [0.5, 0.3, 0.4]}, key="old")
    fill(now, {"DPFP-1": new, "Linear": [0.9, 0.8, 0.95]}, key="new")
    lines = compared(then, now)
    # Welch's formula by hand: variances are not pooled
    mean = [sum(x) / 3 for x in (old, new)]
    share = [sum((v - m) ** 2 for v in x) / 2 / 3 for x, m in zip((old, new), mean, strict=True)]
    t = (mean[1] - mean[0]) / math.sqrt(sum(share))
    degrees = sum(share) ** 2 / sum(s**2 / 2 for s in share)
    p = 2 * stats.t.sf(abs(t), degrees)
    assert float(lines["DPFP-1", "n_keys=20"]["p"]) == pytest.approx(p, rel=1e-6)
    # of two tests the smaller p counts twice, the larger once but not below the smaller's
    smaller = float(lines["Linear", "n_keys=20"]["p"])
    assert smaller < p
    assert float(lines["Linear", "n_keys=20"]["p_holm"]) == pytest.approx(2 * smaller, rel=1e-6)
    assert float(lines["DPFP-1", "n_keys=20"]["p_holm"]) == pytest.approx(max(2 * smaller, p), rel=1e-6)
    assert lines["Linear", "n_keys=20"]["verdict"] == WORSE


def test_many_tests_do_not_make_a_discovery_of_chance(then: Bench, now: Bench) -> None:
    # p is 0.03 alone; beside it stand three that show nothing
    fill(then, {"DPFP-1": [0.50, 0.52, 0.54]}, key="old")
    fill(now, {"DPFP-1": [0.56, 0.58, 0.60]}, key="new")
    alone = compared(then, now)["DPFP-1", "n_keys=20"]
    assert (float(alone["p"]) < 0.05, alone["verdict"]) == (True, WORSE)
    for point, row in (("n_keys=20", "Linear"), ("n_keys=40", "Linear"), ("n_keys=40", "DPFP-1")):
        fill(then, {row: [0.1, 0.2, 0.3]}, point, key="old")
        fill(now, {row: [0.1, 0.2, 0.31]}, point, key="new")
    assert compared(then, now)["DPFP-1", "n_keys=20"]["verdict"] == UNCLEAR


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([0.5], [0.2, 0.3, 0.4], "one seed: not testable"),
        ([0.5, 0.6], [0.2], "one seed: not testable"),
        ([0.5, 0.5], [0.2, 0.2], "no spread: not testable"),
        ([], [0.2, 0.3], "only new"),
        ([0.2, 0.3], [], "only old"),
    ],
)  # fmt: skip
def test_what_cannot_be_tested_says_why(
    then: Bench, now: Bench, old: list[float], new: list[float], verdict: str
) -> None:
    fill(then, {"Linear": old, "DPFP-1": [0.1]}, key="old")
    fill(now, {"Linear": new, "DPFP-1": [0.2]}, key="new")
    line = compared(then, now)["Linear", "n_keys=20"]
    assert (line["verdict"], line["p"]) == (verdict, "")


def test_runs_that_both_results_have_are_no_second_sample(then: Bench, now: Bench) -> None:
    fill(then, {"Linear": [0.5, 0.6], "DPFP-1": [0.1, 0.2]})
    fill(now, {"Linear": [0.5, 0.6], "DPFP-1": [0.1, 0.2, 0.3]})
    lines = compared(then, now)
    assert lines["Linear", "n_keys=20"]["verdict"] == "the same runs"
    assert lines["DPFP-1", "n_keys=20"]["verdict"] == "some runs on both sides: not testable"
    said = compare(now.project, then.root / "results", [], None)
    assert "| Linear" not in said
    assert "| DPFP-1" in said
    assert "2 numbers compared, 1 of them the same." in said


def test_another_version_of_the_protocol_is_not_compared(then: Bench, now: Bench) -> None:
    for seed in (1, 2):
        then.add("Linear", [0.5 + seed / 10], seed=seed, version="1", key=f"old{seed}")
        now.add("Linear", [0.1 + seed / 10], seed=seed)
    line = compared(then, now)["Linear", "n_keys=20"]
    assert line["verdict"] == "other version of the protocol: not comparable"


def test_diverged_runs_are_counted_and_left_out_of_the_mean(then: Bench, now: Bench) -> None:
    fill(then, {"Linear": [0.5, 0.6, 0.7]}, key="old")
    fill(now, {"Linear": [0.5, math.nan, 0.7]}, key="new")
    line = compared(then, now)["Linear", "n_keys=20"]
    assert (line["new_n"], line["new_diverged"], line["new_mean"]) == ("2", "1", "0.6")


def test_profiles_and_protocols_stand_in_tables_of_their_own(then: Bench, now: Bench) -> None:
    for bench, value in ((then, 0.5), (now, 0.4)):
        for place in ({}, {"profile": "smoke"}, {"protocol": "corrected"}):
            bench.add("Linear", [value], **place)
        bench.write()
    said = compare(now.project, then.root / "results", [], None)
    heads = ["figure8, short profile, corrected protocol", "figure8, short profile, released protocol"]
    assert [line[3:] for line in said.splitlines() if line.startswith("## ")] == [
        *heads, "figure8, smoke profile, released protocol",
    ]  # fmt: skip
    # the protocol decides which evaluation counts
    assert "best valid/loss" in said.split("## ")[1]
    assert "last valid/loss" in said.split("## ")[2]


def test_an_experiment_that_the_project_no_longer_has_is_compared_by_its_last_values(then: Bench, now: Bench) -> None:
    for bench, value in ((then, 0.5), (now, 0.4)):
        bench.add("Linear", [0.1, value])
        bench.write()
    (now.root / "experiments" / "figure9.yaml").unlink()
    (now.root / "experiments" / "figure8.yaml").unlink()
    assert "| last valid/loss |" in compare(now.project, then.root / "results", [], None)


def test_higher_may_be_better(then: Bench, now: Bench) -> None:
    for bench, values, key in ((then, [20.0, 20.2, 20.1], "old"), (now, [25.0, 25.3, 25.1], "new")):
        for seed, value in enumerate(values, start=1):
            bench.add("Delta Network", [value], experiment="table9", point="", protocol="corrected", seed=seed,
                      metric="test/bleu", key=f"{key}{seed}")  # fmt: skip
    assert compared(then, now)["Delta Network", ""]["verdict"] == BETTER


def test_the_command_prints_markdown_and_takes_either_file(
    then: Bench, now: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(then, {"Linear": [0.5, 0.6]}, key="old")
    fill(now, {"Linear": [0.2, 0.3]}, key="new")
    then.write(), now.write()
    folder = then.root / "results"
    outputs = []
    for name in ("runs", "metrics"):
        shutil.copy(folder / f"{name}.csv", then.root / f"old-{name}.csv")
    for old in (folder, folder / "runs.csv", folder / "metrics.csv", then.root / "old-runs.csv"):
        assert main(["--root", str(now.root), "--compare", str(old)]) == 0
        outputs.append(re.sub("^# .*", "", capsys.readouterr().out))
    assert len(set(outputs)) == 1
    assert "Welch's t-test over seeds, two-sided, Holm's correction" in outputs[0]
    assert "| Linear" in outputs[0]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "metrics.csv").unlink(), "metrics.csv: there is no such file"),
        (lambda folder: shutil.rmtree(folder), "there is no such file or folder"),
        (lambda folder: (folder / "runs.csv").write_bytes(b"\xff\x00"), "runs.csv cannot be read"),
        (lambda folder: (folder / "runs.csv").write_text("a,b\n1,2\n"), "runs.csv lacks the column"),
        (lambda folder: (folder / "metrics.csv").write_text("run_key,split,metric,step,value\nx,a,b,1,2\n"),
         "has values of the run x, which"),
        (lambda folder: double(folder / "runs.csv"), "mixes 2 runs of figure8/Linear/n_keys=20/seed1 (short,"),
    ],
)  # fmt: skip
def test_mixed_and_malformed_results_are_refused_in_a_sentence(
    then: Bench, now: Bench, capsys: pytest.CaptureFixture[str], damage, sentence: str
) -> None:
    fill(then, {"Linear": [0.5]}, key="old")
    fill(now, {"Linear": [0.5]})
    then.write(), now.write()
    damage(then.root / "results")
    assert main(["--root", str(now.root), "--compare", str(then.root / "results")]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def double(path: Path) -> None:
    header, line = path.read_text().splitlines()
    path.write_text("\n".join([header, line, line.replace("old-", "other-"), ""]))


def test_wrong_options_are_refused(now: Bench, then: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    fill(now, {"Linear": [0.5]})
    fill(then, {"Linear": [0.4]})
    now.write(), then.write()
    old = str(then.root / "results")
    for arguments, sentence in (
        (["--csv", "x.csv"], "--csv belongs to --compare"),
        (["figure7", "--compare", old], "neither result has runs of 'figure7'. Did you mean 'figure8'"),
        (["--compare", str(now.root / "README.md")], "name a results folder or its runs.csv"),
        (["--compare", old, "--csv", str(now.root / "none" / "x.csv")], "cannot be written"),
    ):
        assert main(["--root", str(now.root), *arguments]) == 2
        assert sentence in capsys.readouterr().err
