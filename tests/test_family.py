"""The family experiments: every rule and map is a row, all with one budget; and the table of who wrote what."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwp_lightning.attention import FEATURE_MAPS, PHI_NORMS, RULES, catalog
from fwp_lightning.experiment import Project, load_experiment, resolve_runs

ROOT = Path(__file__).resolve().parent.parent
PARENTS = ("family_figure2", "family_figure5")
TASKS = ("recall", "changing_facts")


def attentions(profile: str = "short") -> list[dict[str, str]]:
    runs = [run for name in PARENTS for run in resolve_runs(load_experiment(name, Project(ROOT)), profile=profile)]
    return [run.config["model"]["init_args"]["attention"] for run in runs]


def test_every_rule_that_writes_first_and_every_map_and_normalisation_is_a_row() -> None:
    rows = attentions()
    writing_first = {name for name in RULES if not RULES[name].reads_while_writing}
    assert {row["rule"] for row in rows} == writing_first
    # tanh is the other map of signs that fwm was published with; its rows are Figure 5's
    assert {row["feature_map"] for row in rows} == set(FEATURE_MAPS) - {"tanh"}
    assert {row["phi_norm"] for row in rows} == set(PHI_NORMS)


@pytest.mark.parametrize("name", TASKS)
def test_every_rule_and_map_is_a_row_of_the_tasks_that_read_at_every_step(name: str) -> None:
    runs = resolve_runs(load_experiment(name, Project(ROOT)), profile="short")
    rows = [run.config["model"]["init_args"]["attention"] for run in runs]
    assert {row["rule"] for row in rows} == set(RULES)
    assert {row["feature_map"] for row in rows} == set(FEATURE_MAPS) - {"tanh"}
    assert {row["phi_norm"] for row in rows} == set(PHI_NORMS)
    assert len({run.config["model"]["init_args"]["max_steps"] for run in runs}) == 1


def test_recall_tries_every_rule_in_its_smoke_profile() -> None:
    runs = resolve_runs(load_experiment("recall", Project(ROOT)), profile="smoke")
    assert {run.config["model"]["init_args"]["attention"]["rule"] for run in runs} == set(RULES)


@pytest.mark.parametrize("profile", ["smoke", "short", "paper"])
@pytest.mark.parametrize("name", PARENTS)
def test_all_rows_have_one_budget_and_the_same_seeds(name: str, profile: str) -> None:
    runs = resolve_runs(load_experiment(name, Project(ROOT)), profile=profile)
    for key in ("max_steps", "lr", "stop_loss", "patience", "d_key"):
        assert len({run.config["model"]["init_args"][key] for run in runs}) == 1, key
    assert len({run.config["data"]["init_args"]["batch_size"] for run in runs}) == 1
    assert {run.seed for run in runs} == ({1} if profile == "smoke" else {1, 2, 3})


def test_the_catalog_reads_from_the_sources_what_the_registries_hold() -> None:
    for name, registry in (("rules", RULES), ("feature_maps", FEATURE_MAPS), ("phi_norms", PHI_NORMS)):
        found = {part.name: part for part in catalog.parts(name)}
        assert set(found) == set(registry)
        for part in found.values():
            assert part.source == registry[part.name].source
            assert part.summary == (registry[part.name].__doc__ or "").splitlines()[0]


def test_the_catalog_says_who_computes_what() -> None:
    from fwp_lightning.ops import BACKENDS

    for backend in catalog.backends():
        assert set(backend.rules) == set(BACKENDS[backend.name].rules)


def test_the_table_of_who_wrote_what_is_that_of_the_classes() -> None:
    text = (ROOT / "fwp_lightning" / "attention" / "README.md").read_text(encoding="utf-8")
    assert catalog.family_table() in text
    years = [int(line.split("|")[1]) for line in catalog.family_table().splitlines()[2:]]
    assert years == sorted(years)
    assert all(f"`{name}`" in text for name in (*RULES, *FEATURE_MAPS))
