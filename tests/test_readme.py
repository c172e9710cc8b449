"""What README shows is run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy.engine import make_url

from fwp_lightning.cli import build_parser
from fwp_lightning.slurm import read_resources, resource_options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def named_block(language: str, first_line: str) -> str:
    return next(text for text in blocks(language) if text.startswith(first_line))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with README's two files in it."""
    shutil.copytree(ROOT / "experiments" / "base", tmp_path / "experiments" / "base")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "paper.csv", tmp_path / "results")
    (tmp_path / "my_map.py").write_text(named_block("python", "# my_map.py"), encoding="utf-8")
    (tmp_path / "experiments" / "mine.yaml").write_text(
        named_block("yaml", "# experiments/mine.yaml"), encoding="utf-8"
    )
    return tmp_path


def test_a_users_own_map_runs_beside_the_papers_rows(project: Path) -> None:
    commands = next(text for text in blocks("bash") if "fwp sweep mine" in text)
    environment = os.environ | {"FWP_ROOT": str(project), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    programs = {".venv/bin/fwp": [sys.executable, "-m", "fwp_lightning"], ".venv/bin/python": [sys.executable]}
    for command in commands.splitlines():
        program, *arguments = command.split()
        result = subprocess.run(
            [*programs[program], *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    table = (project / "reports" / "output" / "smoke" / "corrected" / "mine.md").read_text(encoding="utf-8")
    assert "Linear" in table
    assert "Mine" in table
    runs = (project / "results" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert sum(",shifted_relu," in line and ",complete," in line for line in runs) == 2


def test_the_layer_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(named_block("python", "import torch\n\nfrom fwp_lightning.attention import AttentionConfig"), scope)
    assert scope["y"].shape == (2, 256, 128)  # type: ignore[attr-defined]
    # DPFP-1 at d_head 16: 32 features for 16 values, per head
    assert scope["state"].memory[0].shape == (2, 8, 32, 16)  # type: ignore[attr-defined]


def test_the_sweep_on_a_cluster_is_understood() -> None:
    command = next(line for text in blocks("bash") for line in text.splitlines() if "--executor slurm" in line)
    options = build_parser().parse_args(command.split()[1:])
    given = {name: getattr(options, f"slurm_{name}") for name, *_ in resource_options()}
    assert read_resources(given).for_job({"accelerator": "auto"}) == {
        "partition": "gpu", "gpus-per-node": "1", "time": "8:00:00", "mem": "16G", "cpus-per-task": "1",
        "signal": "USR2@120", "requeue": True,
    }  # fmt: skip


def test_the_commands_at_the_start_are_targets_of_make_and_mlflow() -> None:
    start = blocks("bash")[0].splitlines()
    assert start == ["make reproduce", ".venv/bin/mlflow ui"]


def test_the_tracking_server_is_one_that_mlflow_would_start_for_this_machine_alone() -> None:
    from mlflow.cli import cli

    (block,) = (text for text in blocks("bash") if "mlflow server" in text)
    start, sweep = block.splitlines()
    program, name, *options = start.split()
    given = cli.commands[name].make_context(name, options).params
    assert (program, name) == (".venv/bin/mlflow", "server")
    assert (given["host"], given["artifacts_destination"]) == ("127.0.0.1", "mlartifacts")
    assert make_url(given["backend_store_uri"]).get_driver_name() == "psycopg2"
    # the sweep beside it speaks to that address
    address, _, *arguments = sweep.split()
    assert address == f"MLFLOW_TRACKING_URI=http://{given['host']}:{given['port']}"
    assert build_parser().parse_args(arguments).jobs == 8


def last_and_best(
    experiment: str, split: str, metric: str, seed: int = 1
) -> dict[tuple[str, str], tuple[float, float]]:
    """Last and smallest value of a metric by row and point, of one seed in the profile short."""
    runs = pd.read_csv(ROOT / "results" / "runs.csv", keep_default_na=False)
    runs = runs[(runs.experiment == experiment) & (runs.profile == "short") & (runs.seed == seed)]
    metrics = pd.read_csv(ROOT / "results" / "metrics.csv")
    metrics = metrics[(metrics.split == split) & (metrics.metric == metric)].merge(runs, on="run_key")
    curves = metrics.sort_values("step").groupby(["row", "point"]).value
    return {key: (curve.iloc[-1], curve.min()) for key, curve in curves}


def test_numbers_of_the_audits_are_those_of_the_results() -> None:
    text = " ".join(README.split())
    losses = last_and_best("audit_fwm", "valid", "loss")
    best = {(row, int(point.removeprefix("n_keys="))): loss for (row, point), (_, loss) in losses.items()}
    with_norm = [f"{best['Schlag (2021)', n]:.3g}" for n in (20, 40, 60)]
    assert "6.12, 20.1 and 29.9 (tanh)" in text
    assert with_norm == ["6.12", "20.1", "29.9"]
    assert [f"{best['Schlag (2021) with DPFP-1', n]:.3f}" for n in (20, 40, 60)] == ["0.025", "0.494", "0.498"]
    without = [row for row, n in best if "LayerNorm no" in row and n == 20]
    assert len(without) == 3
    assert max(best[row, n] for row in without for n in (20, 40, 60)) < 0.002
    assert f"{best['DPFP-1 delta', 100]:.4f}" == "0.0003"
    assert f"{best['Schlag (2021), LayerNorm no', 100]:.2f}" == "0.22"
    assert f"{best['Schlag (2021) with DPFP-1, LayerNorm no', 100]:.2f}" == "0.50"
    first, second, third = (last_and_best("audit_carried_gradient", "valid", "perplexity", seed) for seed in (1, 2, 3))
    whole, released, bare_whole, bare_released = CARRIED
    ends = [f"{first[row, ''][0]:.0f}" for row in (whole, released)]
    assert f"at validation perplexities of {' and '.join(ends)}." in text
    ends = [f"{seed[bare_released, ''][0]:.0f}" for seed in (first, second, third)]
    assert "at {}, {} and {} with seeds 1, 2 and 3".format(*ends) in text
    ends = [f"{seed[bare_whole, ''][0]:.0f}" for seed in (first, third)]
    assert f"with seeds 1 and 3 ({' and '.join(ends)}) and not with seed 2 ({second[bare_whole, ''][0]:.0f} at" in text
    (last, best) = last_and_best("audit_carried_gradient", "valid", "segment_perplexity", 2)[bare_whole, ""]
    assert last > 1.2 * best


def test_perplexities_with_and_without_sum_normalisation_are_those_of_the_results() -> None:
    runs = pd.read_csv(ROOT / "results" / "runs.csv", keep_default_na=False)
    runs = runs[(runs.experiment == "audit_lm") & (runs.profile == "short") & (runs.protocol == "corrected")]
    without = runs[runs.row == "Delta Network, sum norm no"]
    assert list(without.status) == ["diverged"] * 3
    metrics = pd.read_csv(ROOT / "results" / "metrics.csv")
    trained = metrics[metrics.run_key.isin(without.run_key) & (metrics.split == "train") & (metrics.metric == "loss")]
    # the first 100 steps are one line
    assert list(trained.step) == [100] * 3
    assert trained.value.isna().all()
    ends = [last_and_best("audit_lm", "valid", "perplexity", seed)["Delta Network", ""][0] for seed in (1, 2, 3)]
    text = " ".join(README.split())
    assert f"ends at {statistics.mean(ends):.1f} (standard deviation {statistics.stdev(ends):.1f})" in text


CARRIED = (
    "Linear, whole gradient",
    "Linear, released gradient",
    "Linear, attention norm no, whole gradient",
    "Linear, attention norm no, released gradient",
)


def test_losses_of_favor_are_those_of_the_results() -> None:
    runs = pd.read_csv(ROOT / "results" / "runs.csv", keep_default_na=False)
    runs = runs[(runs.experiment == "figure2") & (runs.profile == "paper") & (runs.protocol == "corrected")]
    metrics = pd.read_csv(ROOT / "results" / "metrics.csv")
    losses = metrics[(metrics.split == "valid") & (metrics.metric == "loss")].groupby("run_key").value.min()
    best = runs.assign(loss=runs.run_key.map(losses)).groupby(["row", "point"]).loss.mean()
    said = [
        " / ".join(f"{best[f'FAVOR+ ({m})', f'n_keys={n}']:.2f}" for m in (64, 128, 512)) + f" at S = {n}"
        for n in (20, 60, 100, 140)
    ]
    text = " ".join(README.split())
    assert f"the best loss, a mean over three seeds, is {', '.join(said[:3])} and {said[3]}." in text
    same_size = [f"{best['FAVOR+ (64)', 'n_keys=100']:.2f}", f"{best['DPFP-1', 'n_keys=100']:.1g}"]
    assert "FAVOR+ (64) is at {} for S = 100 where DPFP-1 is at {},".format(*same_size) in text
    against = " against ".join(f"{best[row, 'n_keys=60']:.2f}" for row in ("FAVOR+ (512)", "Linear"))
    assert f"stay behind the 64 of ELU+1 at S = 60 ({against})" in text
