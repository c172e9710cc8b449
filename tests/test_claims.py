"""Verdicts: each test decides as its arithmetic says, nothing is settled early, a wrong file is one sentence."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hand_written import Bench, make_bench

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, experiment_names
from reports.claims import read_claims
from reports.sources import read_results
from reports.verdict_tables import basis, verdicts_of
from reports.verdicts import FAILS, HOLDS, UNTESTED, Verdict
from reports.verification import verify

ROOT = Path(__file__).resolve().parent.parent
SEEDS = {
    "claim": "The delta rule is better",
    "source": "Table 9",
    "experiment": "table9",
    "metric": "valid/perplexity",
    "test": "over_seeds",
    "pairs": [{"better": "Delta Network", "worse": "Linear Transformer"}],
    "margin": 0,
    "reason": "any difference counts",
}
POINTS = {
    "claim": "DPFP stores more",
    "source": "Figure 8",
    "experiment": "figure8",
    "metric": "valid/loss",
    "test": "over_points",
    "pairs": [{"better": "DPFP-1", "worse": "Linear"}],
    "margin": 0.02,
    "reason": "four per cent",
}
CAPACITY = {
    "claim": "Capacity follows d_dot",
    "source": "Figure 8",
    "experiment": "figure8",
    "metric": "valid/loss",
    "test": "capacity",
    "d_dot": {"Linear": 64, "DPFP-1": 128},
    "solved": 0.01,
    "ratio": [0.75, 1.25],
    "reason": "near is a quarter",
}
SIZES = (20, 40, 60, 80, 100, 120, 140)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The hand-written project with a grid long enough for tests over points, and the profile paper."""
    bench = make_bench(tmp_path)
    bench.edit("figure8", grid={"data.n_keys": list(SIZES)}, profiles={"smoke": {}, "short": {}, "paper": {}})
    bench.edit("table9", profiles={"short": {}, "paper": {}})
    return bench


def claim(bench: Bench, entry: dict[str, Any], **changed: Any) -> None:
    content = {"claims": {"mine": {**entry, **changed}}}
    (bench.root / "experiments" / "claims.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def verdict(bench: Bench, protocol: str | None = None) -> Verdict:
    bench.write()
    found = verdicts_of(bench.project, read_results(bench.root))
    return next(one for one in found if protocol in (None, one.protocol))


def table_runs(bench: Bench, row: str, values: list[float], profile: str = "paper") -> None:
    for seed, value in enumerate(values, 1):
        status = "diverged" if math.isnan(value) else "complete"
        place = {"experiment": "table9", "point": "", "protocol": "corrected", "profile": profile}
        bench.add(row, [value], seed=seed, metric="valid/perplexity", status=status, **place)


def figure_runs(bench: Bench, row: str, values: list[float], profile: str = "paper") -> None:
    for size, value in zip(SIZES, values, strict=True):
        bench.add(row, [value], point=f"n_keys={size}", profile=profile)


# --- over seeds ------------------------------------------------------------------------------------------------------


def test_mean_difference_over_seeds_has_students_interval(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    table_runs(bench, "Linear Transformer", [12.0, 14.0, 16.0])
    found = verdict(bench)
    # differences 2, 3, 4: mean 3, standard error 1/sqrt(3), and 4.303 is the quantile of two degrees of freedom
    assert found.interval is not None
    assert found.interval.estimate == pytest.approx(3)
    assert found.interval.low == pytest.approx(3 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert (found.outcome, basis(found)) == (HOLDS, "paper, 3 seeds; settled")


def test_seeds_are_paired(bench: Bench) -> None:
    claim(bench, SEEDS)
    # the rows differ less than the seeds do
    table_runs(bench, "Delta Network", [10.0, 20.0, 30.0])
    table_runs(bench, "Linear Transformer", [10.5, 20.6, 30.4])
    assert verdict(bench).outcome == HOLDS


def test_interval_with_the_threshold_inside_decides_nothing(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0, 12.0, 11.0])
    table_runs(bench, "Linear Transformer", [11.0, 11.0, 11.5])
    found = verdict(bench)
    assert found.outcome == UNTESTED
    assert "undecided" in found.finding
    assert found.standing == ""


def test_the_opposite_does_not_hold(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [12.0, 13.0, 14.0])
    table_runs(bench, "Linear Transformer", [10.0, 11.1, 12.0])
    assert verdict(bench).outcome == FAILS


def test_negative_margin_asks_whether_a_row_is_hardly_worse(bench: Bench) -> None:
    table_runs(bench, "Delta Network", [10.1, 11.0, 12.2])
    table_runs(bench, "Linear Transformer", [10.0, 11.0, 12.0])
    claim(bench, SEEDS)
    assert verdict(bench).outcome == UNTESTED
    claim(bench, SEEDS, margin=-0.5)
    assert verdict(bench).outcome == HOLDS


def test_metric_of_which_more_is_better(bench: Bench) -> None:
    claim(bench, SEEDS, metric="test/bleu")
    for row, start in (("Delta Network", 20.0), ("Linear Transformer", 10.0)):
        for seed in (1, 2, 3):
            place = {"experiment": "table9", "point": "", "protocol": "corrected", "profile": "paper"}
            bench.add(row, [start + 0.1 * seed**2], seed=seed, metric="test/bleu", **place)
    assert verdict(bench).outcome == HOLDS


def test_ratio_compares_factors(bench: Bench) -> None:
    claim(bench, SEEDS, margin=2.0, **{"as": "ratio"})
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    table_runs(bench, "Linear Transformer", [30.0, 33.0, 36.6])
    found = verdict(bench)
    assert found.outcome == HOLDS
    assert found.interval is not None
    assert found.interval.estimate == pytest.approx(3.0, rel=0.01)


def test_row_that_diverged_in_every_seed_is_worse_by_any_margin(bench: Bench) -> None:
    # a diverged run of a protocol that reports the best evaluation has no finite one here
    claim(bench, SEEDS, margin=100)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    table_runs(bench, "Linear Transformer", [math.nan, math.nan, math.nan])
    assert verdict(bench).outcome == HOLDS
    assert "diverged in 3 of 3" in verdict(bench).finding


def test_row_that_diverged_in_some_seeds_decides_nothing(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    table_runs(bench, "Linear Transformer", [math.nan, 20.0, 20.0])
    assert verdict(bench).outcome == UNTESTED


def test_one_seed_is_not_a_test_over_seeds(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0])
    table_runs(bench, "Linear Transformer", [20.0])
    found = verdict(bench)
    assert (found.outcome, found.finding) == (UNTESTED, "one seed where the test needs 3")


def test_missing_row_is_named(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    found = verdict(bench)
    assert (found.outcome, found.finding) == (UNTESTED, "1 of 2 are there; missing: Linear Transformer")


def test_every_pair_must_hold(bench: Bench) -> None:
    pairs = [{"better": "Delta Network", "worse": "Linear Transformer"}, {"better": "Delta Network", "worse": 5.0}]
    claim(bench, SEEDS, pairs=pairs)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0])
    table_runs(bench, "Linear Transformer", [20.0, 22.0, 24.0])
    assert verdict(bench).outcome == FAILS


def test_what_only_short_decides_is_not_settled(bench: Bench) -> None:
    claim(bench, SEEDS)
    table_runs(bench, "Delta Network", [10.0, 11.0, 12.0], profile="short")
    table_runs(bench, "Linear Transformer", [12.0, 14.0, 16.0], profile="short")
    assert basis(verdict(bench)) == "short, 3 seeds; not settled"
    # the profile nearest to the paper that decides counts
    table_runs(bench, "Delta Network", [14.0, 15.0, 16.0])
    table_runs(bench, "Linear Transformer", [12.0, 13.1, 14.0])
    assert (verdict(bench).outcome, basis(verdict(bench))) == (FAILS, "paper, 3 seeds; settled")


# --- over points -----------------------------------------------------------------------------------------------------


def test_share_of_points_has_an_exact_interval(bench: Bench) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    figure_runs(bench, "Linear", [0.3] * 7)
    found = verdict(bench)
    assert found.interval is not None
    # Clopper and Pearson: with 7 of 7, the lower end p solves p^7 = 0.025
    assert found.interval.low == pytest.approx(0.025 ** (1 / 7))
    assert (found.outcome, basis(found)) == (HOLDS, "paper, one seed; not settled")
    assert len(found.values) == 14


def test_points_within_the_margin_do_not_count(bench: Bench) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    figure_runs(bench, "Linear", [0.3, 0.3, 0.3, 0.3, 0.11, 0.11, 0.11])
    assert verdict(bench).outcome == UNTESTED
    assert "4 of 7 points" in verdict(bench).finding


def test_run_that_diverged_loses_its_point(bench: Bench) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    for size in SIZES:
        bench.add("Linear", [math.nan], point=f"n_keys={size}", profile="paper", status="diverged")
    assert verdict(bench).outcome == HOLDS


def test_fixed_level_on_one_side_and_chosen_points(bench: Bench) -> None:
    claim(bench, POINTS, pairs=[{"better": 0.01, "worse": "Linear"}], margin=0, points=["n_keys=20"])
    figure_runs(bench, "Linear", [0.3] * 7)
    found = verdict(bench)
    # one point is no test
    assert "1 of 1 points" in found.finding
    assert found.outcome == UNTESTED


def test_smoke_runs_prove_nothing(bench: Bench) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7, profile="smoke")
    figure_runs(bench, "Linear", [0.3] * 7, profile="smoke")
    assert (verdict(bench).outcome, verdict(bench).values) == (UNTESTED, ())


def test_protocols_are_judged_apart(bench: Bench) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    figure_runs(bench, "Linear", [0.3] * 7)
    assert verdict(bench, "released").outcome == HOLDS
    assert verdict(bench, "corrected").outcome == UNTESTED


# --- capacity --------------------------------------------------------------------------------------------------------


def capacity_of(bench: Bench, linear: int, dpfp: int) -> str:
    """The outcome where Linear and DPFP-1 have solved that many sizes."""
    claim(bench, CAPACITY)
    figure_runs(bench, "Linear", [0.001] * linear + [0.2] * (7 - linear))
    figure_runs(bench, "DPFP-1", [0.001] * dpfp + [0.2] * (7 - dpfp))
    return verdict(bench).outcome


def test_breaking_near_d_dot_holds(bench: Bench) -> None:
    # first unsolved at 60 and 140: 0.94 and 1.09 d_dot
    assert capacity_of(bench, 2, 6) == HOLDS


def test_breaking_far_below_d_dot_does_not_hold(bench: Bench) -> None:
    # DPFP-1 breaks between 60 and 80, below 0.75 of 128
    assert capacity_of(bench, 2, 3) == FAILS


def test_breaking_that_the_grid_does_not_resolve_is_undecided(bench: Bench) -> None:
    # DPFP-1 has solved all there is, up to 140: 1.09 d_dot
    assert capacity_of(bench, 2, 7) == UNTESTED


def test_rows_that_break_alike_do_not_grow(bench: Bench) -> None:
    claim(bench, CAPACITY, d_dot={"Linear": 100, "DPFP-1": 110})
    figure_runs(bench, "Linear", [0.001] * 4 + [0.2] * 3)
    figure_runs(bench, "DPFP-1", [0.001] * 4 + [0.2] * 3)
    assert verdict(bench).outcome == UNTESTED


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "changed", "said"),
    [
        (SEEDS, {"pairs": [{"better": "Delta", "worse": "Linear Transformer"}]}, "table9 has no row 'Delta'"),
        (SEEDS, {"metric": "valid/perplexit"}, "no metric 'valid/perplexit'. Did you mean 'valid/perplexity'"),
        (SEEDS, {"experiment": "table8"}, "no experiment 'table8' with a report"),
        (POINTS, {"experiment": "figure9"}, "figure9 shows the runs of another experiment"),
        (POINTS, {"points": ["n_keys=21"]}, "no point 'n_keys=21'"),
        (SEEDS, {"test": "t_test"}, "test is 't_test'. Known: over_points"),
        (SEEDS, {"margin": None}, "margin is None; give a number, stated before the runs"),
        (SEEDS, {"margin": True}, "margin is True"),
        (SEEDS, {"as": "ratio"}, "a ratio is compared with a number above 0"),
        (SEEDS, {"reason": " "}, "reason is ' '; give it as text"),
        (SEEDS, {"thershold": 1}, "unknown key 'thershold'"),
        (SEEDS, {"pairs": [{"better": 1, "worse": 2}]}, "compares two fixed levels"),
        (SEEDS, {"pairs": []}, "pairs is []; give a list"),
        (CAPACITY, {"d_dot": {"Linear": 64}}, "give at least two rows"),
        (CAPACITY, {"d_dot": {"Linear": 64, "DPFP-1": 0.5}}, "d_dot of 'DPFP-1' is 0.5"),
        (CAPACITY, {"ratio": [1.25, 0.75]}, "give two rising numbers"),
    ],
)
def test_mistake_in_the_file_is_one_sentence(
    bench: Bench, entry: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    claim(bench, entry, **changed)
    with pytest.raises(UserError) as caught:
        read_claims(bench.project)
    assert said in str(caught.value)
    assert str(caught.value).startswith("experiments/claims.yaml, mine")


def test_the_projects_own_claims_are_in_order_and_no_experiment() -> None:
    project = Project(ROOT)
    claims = read_claims(project)
    assert claims is not None
    assert len(claims.claims) >= 12
    assert "claims" not in experiment_names(project)


# --- what is written -------------------------------------------------------------------------------------------------


def test_command_prints_and_writes_the_verdicts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    figure_runs(bench, "Linear", [0.3] * 7)
    assert bench.draw("claims") == 0
    said = capsys.readouterr().out
    assert "DPFP stores more (Figure 8)" in said
    assert "released: holds [paper, one seed; not settled]" in said
    output = bench.root / "reports" / "output"
    with (output / "claims_runs.csv").open() as file:
        keys = {line["run_key"] for line in csv.DictReader(file)}
    assert keys == {run["run_key"] for run in bench.runs}
    with (output / "claims.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["verdict"], first["profile"], first["n_seeds"], first["standing"]) == (
        "holds",
        "paper",
        "1",
        "not settled",
    )
    assert "[figure8](./paper/released/figure8.md)" in (output / "claims.md").read_text()


def test_verdicts_are_first_on_the_page_and_in_readme_and_verified(bench: Bench) -> None:
    readme = bench.root / "README.md"
    readme.write_text("<!-- claims:begin -->\n<!-- claims:end -->\n" + readme.read_text())
    claim(bench, POINTS)
    figure_runs(bench, "DPFP-1", [0.1] * 7)
    figure_runs(bench, "Linear", [0.3] * 7)
    assert bench.draw() == 0
    page = (bench.root / "reports" / "output" / "index.html").read_text()
    assert page.index('id="claims"') < page.index('id="figure8-paper-released"')
    assert '<a href="#figure8-paper-released">figure8</a>' in page
    assert bench.draw("readme") == 0
    assert "| DPFP stores more (Figure 8) | released" in readme.read_text()
    assert verify(bench.project) == 0
    written = bench.root / "reports" / "output" / "claims.csv"
    written.write_text(written.read_text().replace("holds", "does not hold"))
    assert verify(bench.project) == 1


def test_project_without_claims_is_told_so(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    figure_runs(bench, "Linear", [0.3] * 7)
    assert bench.draw("claims") == 2
    assert "write them in experiments/claims.yaml" in capsys.readouterr().err
