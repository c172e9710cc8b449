"""`fwp verify` passes what belongs together and names whatever was changed, left behind or mixed up."""

import subprocess
from pathlib import Path

import pytest
from hand_written import Bench, make_bench

from fwp_lightning.results_csv import read_metrics, read_runs
from reports.verification import check_metrics, check_runs, verify

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs of two profiles and two protocols, with reports and README drawn."""
    bench = make_bench(tmp_path)
    for seed in (1, 2):
        bench.add("DPFP-1", [0.4, 0.1 * seed], seed=seed)
    bench.add("Linear", [0.5, 0.3], profile="smoke")
    bench.add("Linear", [0.5, 0.2], protocol="corrected")
    return bench


def drawn(bench: Bench) -> Bench:
    assert bench.draw() == 0
    assert bench.draw("readme") == 0
    return bench


def wrong(bench: Bench, capsys: Capture) -> list[str]:
    """What verification says is wrong; the exit code must agree."""
    capsys.readouterr()
    code = verify(bench.project)
    said = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("wrong: ") for line in said if line.startswith("wrong: ")]
    assert code == (1 if found else 0)
    assert said[-1].endswith(f"{len(found)} wrong" if found else "all right")
    return found


def wrong_runs(bench: Bench) -> list[str]:
    """What is wrong with runs.csv alone, which takes no drawing."""
    bench.write()
    return check_runs(bench.project, read_runs(bench.root / "results" / "runs.csv")).problems


def commit(bench: Bench) -> str:
    """Commit the project and return the commit's hash."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=bench.root, check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=bench.root, check=True, capture_output=True, text=True
    ).stdout.strip()


def change(bench: Bench, name: str, old: str, new: str) -> None:
    path = bench.root / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_what_belongs_together_passes(bench: Bench, capsys: Capture) -> None:
    assert wrong(drawn(bench), capsys) == []


def test_an_empty_project_passes(tmp_path: Path, capsys: Capture) -> None:
    assert wrong(make_bench(tmp_path).write(), capsys) == [
        "README.md: the results block is stale; run `python -m reports readme`."
    ]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("config_sha256", "f" * 64, "config_sha256 is ffffffffffffffff, but this run key has"),
        ("version", "1", "version is 1, but the run key is that of version 2"),
        ("seed", "2", "neither the experiment file of today nor of commit 0123456789 gives this run key"),
        ("row", "DPFP-1", "the run key is that of figure8/Linear/n_keys=20/seed1 of the profile smoke"),
        ("point", "n_keys=40", "the run key is that of figure8/Linear/n_keys=20/seed1"),
        ("profile", "short", "of the profile smoke and the protocol released"),
        ("protocol", "corrected", "of the profile smoke and the protocol released"),
        ("experiment", "figure7", "neither the experiment file of today"),
        ("run_key", "0" * 16, "neither the experiment file of today"),
    ],
)
def test_a_changed_row_is_named(bench: Bench, column: str, value: str, said: str) -> None:
    (row,) = [row for row in bench.runs if row["profile"] == "smoke"]
    key = row["run_key"]
    row[column] = value
    (found,) = wrong_runs(bench)
    assert said in found
    assert (value if column == "run_key" else key) in found


def test_a_run_with_settings_of_its_own_commit_is_a_note(bench: Bench) -> None:
    made_with = commit(bench.write())
    for row in bench.runs:
        row["git_commit"] = made_with
    change(bench, "experiments/figure8.yaml", "version: 2", "version: 3")
    found = check_runs(bench.project, read_runs(bench.write().root / "results" / "runs.csv"))
    assert found.problems == []
    commit_words = f"with the settings of commit {made_with[:10]}, not those of today"
    assert found.notes == [
        f"2 of figure8 (short, released): {commit_words}, version 2 of the protocol where the file has 3 now",
        f"1 of figure8 (smoke, released): {commit_words}, version 2 of the protocol where the file has 3 now",
    ]


def test_a_run_that_neither_today_nor_its_commit_describes_is_wrong(bench: Bench) -> None:
    bench.runs[0] |= {"git_commit": commit(bench.write()), "run_key": "e" * 16, "git_dirty": "true"}
    assert wrong_runs(bench) == [
        "runs.csv, eeeeeeeeeeeeeeee (figure8/DPFP-1/n_keys=20/seed1, short, released): neither the experiment file of "
        f"today nor of commit {bench.runs[0]['git_commit'][:10]} gives this run key, which had uncommitted changes"
    ]


@pytest.mark.parametrize("name", ["--output=/tmp/stolen", "HEAD; touch stolen", "../../etc", "main"])
def test_a_commit_that_is_no_hash_never_reaches_git(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bench.runs[0] |= {"git_commit": name, "run_key": "e" * 16}
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail(f"git was called: {arguments}"))
    assert "gives this run key" in wrong_runs(bench)[0]


def test_values_without_a_run_and_a_run_without_values(bench: Bench) -> None:
    key = bench.runs[0]["run_key"]
    bench.points = [("d" * 16, *point[1:]) if point[0] == key else point for point in bench.points]
    folder = bench.write().root / "results"
    assert list(check_metrics(read_runs(folder / "runs.csv"), read_metrics(folder / "metrics.csv"))) == [
        "metrics.csv: 2 values of the run dddddddddddddddd, which is not in runs.csv",
        f"runs.csv, {key} (figure8/DPFP-1/n_keys=20/seed1, short, released): it is complete and has no value in "
        "metrics.csv",
    ]


def one_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_report_that_is_not_what_the_csv_gives_is_named(bench: Bench, capsys: Capture) -> None:
    output = drawn(bench).root / "reports" / "output"
    for name in ("short/released/figure8.png", "short/released/figure8.csv", "index.html"):
        one_byte(output / name)
    (output / "smoke" / "released" / "figure8.tex").unlink()
    (output / "short" / "released" / "figure7.md").write_text("of a figure that is gone\n")
    assert wrong(bench, capsys) == [
        "reports/output/index.html is not what results/*.csv gives; run `python -m reports`",
        "reports/output/short/released/figure7.md belongs to no run in results/runs.csv; delete it",
        "reports/output/short/released/figure8.csv is not what results/*.csv gives; run `python -m reports`",
        "reports/output/short/released/figure8.png is not what results/*.csv gives; run `python -m reports`",
        "reports/output/smoke/released/figure8.tex is missing; run `python -m reports`",
    ]


def test_a_changed_value_makes_every_report_of_it_and_readme_stale(bench: Bench, capsys: Capture) -> None:
    drawn(bench)
    change(bench, "results/metrics.csv", ",200,0.1", ",200,0.125")
    before = {path: path.read_bytes() for path in bench.root.rglob("*") if path.is_file()}
    found = wrong(bench, capsys)
    assert {path: path.read_bytes() for path in bench.root.rglob("*") if path.is_file()} == before
    assert "README.md: the results block is stale; run `python -m reports readme`." in found
    stale = {line.split()[0].removeprefix("reports/output/") for line in found if "is not what" in line}
    assert {"index.html", *(f"short/released/figure8.{kind}" for kind in ("csv", "md", "pdf", "png", "tex"))} <= stale
