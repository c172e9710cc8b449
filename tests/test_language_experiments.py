"""What experiments/table2..5.yaml ask for: the paper's models to the parameter, its numbers, and the protocols."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.cli import main
from fwp_lightning.experiment import Project, Run, load_experiment, resolve_runs
from fwp_lightning.models.language_model import build_language_model
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.sweep.cost import _memory_mb, measure
from fwp_lightning.sweep.training import check_run
from fwp_lightning.tasks.updates import Update, made_up_words

PROJECT = Project(Path(__file__).resolve().parent.parent)
TABLES = ("table2", "table3", "table4", "table5")
# WikiText-103
V = 267_735
SMALL, SMALL_DELTA = 44_018_394, 44_034_778
MEDIUM, MEDIUM_DELTA, MEDIUM_XL = 89_833_434, 89_866_202, 90_882_522


def runs_of(table: str, profile: str = "paper", protocol: str = "corrected") -> list[Run]:
    return resolve_runs(load_experiment(table, PROJECT), profile=profile, protocol=protocol)


def settings(run: Run) -> dict[str, Any]:
    return run.config["model"]["init_args"]


def attention_of(run: Run) -> AttentionConfig:
    given = settings(run)["attention"]
    return AttentionConfig(**{**given, "favor": FavorConfig(**given["favor"])})


def n_params(run: Run) -> int:
    with torch.device("meta"):
        model = build_language_model(Architecture(**settings(run)["architecture"]), attention_of(run), V)
    return sum(parameter.numel() for parameter in model.parameters())


def test_models_of_the_paper_profile_have_the_papers_parameters() -> None:
    found = {(t, run.row, run.point): n_params(run) for t in TABLES for run in runs_of(t)}
    expected = {
        ("table2", row, f"size={size}"): (delta if "elta" in row else other)
        for row in ("Transformer", "Linear Transformer", "Delta Network", "Performer sum", "Performer delta")
        for size, other, delta in (("small", SMALL, SMALL_DELTA), ("medium", MEDIUM, MEDIUM_DELTA))
    }
    for positions in ("yes", "no"):
        for norm in ("yes", "no"):
            expected["table3", f"position {positions}, attention norm {norm}", ""] = MEDIUM_DELTA
    expected["table4", "Linear Transformer", ""] = MEDIUM
    expected["table4", "Linear Transformer, attention norm no", ""] = MEDIUM
    expected["table4", "Delta Network", ""] = MEDIUM_DELTA
    expected["table4", "Transformer-XL", ""] = MEDIUM_XL
    for row in ("Transformer", "Performer sum", "DPFP sum"):
        expected["table5", row, ""] = SMALL
    for row in ("Performer delta", "DPFP delta"):
        expected["table5", row, ""] = SMALL_DELTA
    assert found == expected


def test_numbers_of_the_paper_profile_are_those_of_section_6_3() -> None:
    for table in TABLES:
        for run in runs_of(table):
            model, data, trainer = settings(run), run.config["data"]["init_args"], run.config["trainer"]
            medium = model["architecture"]["d_model"] == 256
            assert medium is (table in ("table3", "table4") or run.point == "size=medium")
            xl = run.row == "Transformer-XL"
            assert (data["corpus"], data["length"], data["batch_size"]) == (
                ("wikitext-103", 384, 56) if medium else ("wikitext-103", 256, 96)
            )
            steps, warmup = (200_000, 1000) if xl else (400_000 if medium else 500_000, 2000)
            assert (model["max_steps"], model["warmup_steps"], model["lr"]) == (steps, warmup, 2.5e-4)
            sizes = model["architecture"]
            assert (sizes["n_layers"], sizes["n_heads"], sizes["d_ff"], sizes["dropout"]) == (16, 8, 2048, 0.1)
            assert sizes["cutoffs"] == [20_000, 40_000, 200_000]
            assert trainer["gradient_clip_val"] == 0.25
            carried = table == "table4"
            assert model["evaluation"]["kind"] == ("segments" if carried else "windows")
            assert model["evaluation"]["stride"] == 1
            assert model["context"] == ("carried" if carried else "segment")
            if model["attention"]["feature_map"] == "favor":
                assert model["attention"]["n_features"] == (16 if medium or table == "table5" else 8)
            if xl:
                assert model["evaluation"]["contexts"] == [[15, 1], [64, 64], [128, 128], [384, 384]]


def test_sizes_of_the_short_profiles_are_apart() -> None:
    cpu, gpu = (runs_of("table2", profile) for profile in ("short", "short-gpu"))
    assert [(run.row, run.point) for run in cpu] == [(run.row, run.point) for run in gpu]
    assert {run.config["trainer"]["accelerator"] for run in cpu} == {"cpu"}
    assert {run.config["trainer"]["accelerator"] for run in gpu} == {"gpu"}
    # no run of one can stand in a table of the other
    assert len({run.run_key for run in [*cpu, *gpu]}) == len(cpu) + len(gpu)
    assert {run.profile for run in gpu} == {"short-gpu"}
    for run in gpu:
        between = run.config["trainer"]["check_val_every_n_epoch"] * run.config["data"]["init_args"]["steps_per_block"]
        assert settings(run)["max_steps"] % between == 0
        assert "6 layers" in run.deviations


# rule, feature_map, phi_norm, attention_norm of the paper's rows
AXES = {
    ("table2", "Transformer"): ("softmax", "identity", "none", "none"),
    ("table2", "Linear Transformer"): ("sum", "elu", "none", "readout"),
    ("table2", "Delta Network"): ("delta", "elu", "sum", "none"),
    ("table2", "Performer sum"): ("sum", "favor", "none", "readout"),
    ("table2", "Performer delta"): ("delta", "favor", "sum", "none"),
    ("table3", "position yes, attention norm yes"): ("delta", "elu", "sum", "both"),
    ("table3", "position no, attention norm yes"): ("delta", "elu", "sum", "both"),
    ("table3", "position yes, attention norm no"): ("delta", "elu", "sum", "none"),
    ("table3", "position no, attention norm no"): ("delta", "elu", "sum", "none"),
    ("table4", "Linear Transformer"): ("sum", "elu", "none", "readout"),
    ("table4", "Linear Transformer, attention norm no"): ("sum", "elu", "none", "none"),
    ("table4", "Delta Network"): ("delta", "elu", "sum", "none"),
    ("table4", "Transformer-XL"): ("softmax", "identity", "none", "none"),
    ("table5", "Transformer"): ("softmax", "identity", "none", "none"),
    ("table5", "Performer sum"): ("sum", "favor", "none", "readout"),
    ("table5", "Performer delta"): ("delta", "favor", "sum", "none"),
    ("table5", "DPFP sum"): ("sum", "dpfp", "none", "readout"),
    ("table5", "DPFP delta"): ("delta", "dpfp", "sum", "none"),
}


@pytest.mark.parametrize("profile", ["smoke", "short", "paper"])
def test_rows_are_the_papers_points_on_the_axes(profile: str) -> None:
    found = {}
    for table in TABLES:
        for run in runs_of(table, profile):
            a = attention_of(run)
            found[table, run.row] = (a.rule, a.feature_map, a.phi_norm, a.attention_norm)
            if table == "table3":
                assert settings(run)["architecture"]["positions"] == (
                    "sinusoidal" if "position yes" in run.row else "none"
                )
    assert found == AXES


def test_what_changes_results_is_an_option_of_the_protocol() -> None:
    by_row = {(t, run.row, run.point): run for t in TABLES for run in runs_of(t, protocol="released")}
    for (table, row, _), run in by_row.items():
        a = attention_of(run)
        assert settings(run)["first_step"] == "full"
        # softmax has its own 1/sqrt(d); DPFP with the sum rule exists in the form in which it cancels alone
        unscaled = a.rule == "softmax" or (table, row) == ("table5", "DPFP sum")
        assert a.output_scale == ("none" if unscaled else "rsqrt_d")
        assert (a.key_norm_eps, a.query_norm_eps, a.attention_norm_eps) == (0.0, 0.0, 1e-5)
        assert a.carried_query_gradient == ("none" if table == "table4" and a.rule == "sum" else "exact")
        if a.feature_map == "favor":
            assert (a.favor.features, a.favor.scaling, a.favor.stabilizer) == ("orthogonal_inputs", "none", "none")
            assert (a.favor.kernel_eps, a.favor.redraw) == (1e-4, "training")
    for table in ("table2", "table5"):
        for run in runs_of(table, protocol="first_release"):
            sums = attention_of(run).rule == "sum" and "DPFP" not in run.row
            assert attention_of(run).phi_norm == ("sum" if sums or attention_of(run).rule == "delta" else "none")
    for table in TABLES:
        for run in runs_of(table):
            a = attention_of(run)
            assert (settings(run)["first_step"], a.output_scale, a.carried_query_gradient) == ("warm", "none", "exact")


# --- what a run will cost ---------------------------------------------------------------------------------------------


def test_cost_of_the_paper_profile_is_measured_without_corpus_or_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FWP_ROOT", str(PROJECT.root))
    run = runs_of("table2", "smoke")[0]
    config = copy.deepcopy(run.config)
    # its vocabulary is known and nothing else of it is here
    config["data"]["init_args"] |= {"corpus": "wikitext-103", "batch_size": 48, "accumulation": 2}
    config["model"]["init_args"] |= {"max_steps": 3600}
    config["model"]["init_args"]["architecture"] |= {"d_model": 16}
    config["trainer"] |= {"accelerator": "gpu", "devices": 3, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    cost = measure(dataclasses.replace(run, config=config))
    assert cost is not None
    # three devices share 48 streams in two parts
    assert (cost.part, cost.words) == ("", 2 * 8 * 64)
    # 3600 updates: as many hours as an update has seconds, for each device
    assert cost.hours == pytest.approx(3 * cost.seconds)
    assert cost.memory_mb is not None
    assert cost.memory_mb > 4 * 4 * V * 16 / 2**20
    assert main(["sweep", "table2", "--dry-run", "--measure", "--rows", "Transformer"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Transformer, size=small: ")
    assert "words/s" in shown[0]
    assert "300 updates on 1: 0." in shown[0]
    assert shown[0].endswith("measured on 8 of 16 sequences, the others are taken to cost as much")
    assert shown[1].startswith("all runs: 0.")


def test_a_cost_is_that_of_all_sequences() -> None:
    def micro_batch(sequences: int) -> None:
        torch.ones(sequences * 2**22).sum()

    update = Update(micro_batch, lambda: None, sequences=20, sequence_length=5, micro_batches=3, parameters=2**18)
    assert update.words == 300
    memory = _memory_mb(update, 2)
    # 4 MiB of parameters, 16 MiB for each sequence; resident memory is counted in pages, and other things live in them
    assert memory == pytest.approx(4 + 20 * 16, rel=0.05)


def test_made_up_words_are_as_frequent_as_their_rank_says() -> None:
    torch.manual_seed(0)
    words = made_up_words(1000, (100, 1000), exponent=1.1)
    assert (int(words.min()), int(words.max())) == (0, 999)
    weights = torch.arange(1, 1001, dtype=torch.float64).pow(-1.1)
    expected = (weights / weights.sum())[:4]
    # five standard deviations of a share of 100,000 draws
    torch.testing.assert_close(
        (words.unsqueeze(-1) == torch.arange(4)).double().mean((0, 1)), expected, rtol=0, atol=8e-3
    )


@pytest.mark.parametrize("name", ["table1", "table2", "changing_facts"])
def test_steps_after_the_last_validation_are_refused_before_anything_trains(name: str) -> None:
    (run, *_) = resolve_runs(load_experiment(name, PROJECT), profile="smoke")
    assert check_run(run) is None
    config = copy.deepcopy(run.config)
    config["model"]["init_args"]["max_steps"] += 1
    refusal = check_run(dataclasses.replace(run, config=config))
    assert refusal is not None
    assert f"model.max_steps={config['model']['init_args']['max_steps']} must be a multiple of the" in refusal.reason
