"""Experiment files become exact runs; mistakes in them become one sentence."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fwp_lightning.errors import UserError
from fwp_lightning.experiment import (
    Project,
    at_points,
    experiment_names,
    find_project,
    load_experiment,
    natural_key,
    point_name,
    resolve_runs,
    sha256_of,
    with_imports,
)
from fwp_lightning.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parent.parent


def test_runs_are_the_product_of_rows_points_and_seeds_in_file_order(toy):
    names = [run.name for run in toy.runs(seeds=[1, 2], rows=["tanh", "plain"])]
    assert names == [
        f"toy/{row}/n_keys={n}/seed{seed}" for row in ("plain", "tanh") for n in (2, 10) for seed in (1, 2)
    ]


def test_row_overrides_reach_init_args_nested_or_dotted(toy):
    steep = toy.runs(rows=["steep"])[0].config["model"]["init_args"]
    assert steep["attention"] == {"kind": "identity", "nu": 2}
    assert steep["learning_rate"] == 0.1


def test_numbers_with_an_exponent_are_numbers(toy):
    assert toy.runs()[0].config["model"]["init_args"]["learning_rate"] == 0.05


@pytest.mark.parametrize(
    ("chosen", "noise"),
    [
        ({"profile": "smoke", "protocol": "released"}, [0.2, 0.2]),
        ({"profile": "smoke", "protocol": "corrected"}, [0.1, 0.3]),
        ({"profile": "short", "protocol": "released"}, [0.5]),
    ],
)
def test_later_layers_win(toy, chosen, noise):
    rows = {"plain": None, "tanh": None} if len(noise) > 1 else {"plain": None}
    runs = {run.row: run for run in toy.runs(rows=list(rows), **chosen)}
    assert [run.config["model"]["init_args"]["noise"] for run in runs.values()] == noise


def test_a_profile_replaces_grid_seeds_and_rows(toy):
    assert [run.name for run in toy.runs(profile="short")] == ["toy/plain/n_keys=3/seed1", "toy/plain/n_keys=3/seed2"]
    points = [(run.row, run.point) for run in toy.runs(profile="paper")]
    assert ("tanh", "n_keys=10") not in points
    assert ("plain", "n_keys=10") in points


def test_the_grid_point_beats_the_row_and_the_seed_goes_to_seed_everything(toy):
    toy.edit("toy", "plain: {}", "plain: {data.n_keys: 7}")
    run = toy.runs(rows=["plain"], seeds=[5])[1]
    assert run.config["data"]["init_args"]["n_keys"] == 10
    assert run.config["seed_everything"] == 5


def test_deviations_of_profile_and_protocol_are_stored_with_the_run(toy):
    assert toy.runs(protocol="corrected")[0].deviations == "six epochs noise differs"


def test_keys_are_stable_and_name_the_run(toy):
    keys = [run.run_key for run in toy.runs(seeds=[1, 2])]
    assert keys == [run.run_key for run in toy.runs(seeds=[1, 2])]
    assert len(set(keys)) == len(keys) == 12
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("noise: 0.1", "noise: 0.1  # a comment", False),
        ("data_dir: data", "data_dir: /elsewhere", False),
        ("log_every_n_steps: 5", "log_every_n_steps: 1", False),
        ("learning_rate: 5e-2", "learning_rate: 6e-2", True),
        ("max_epochs: 6", "max_epochs: 7", True),
    ],
)
def test_only_what_can_change_a_result_changes_the_key(toy, old, new, changes):
    before = toy.runs()[0].run_key
    toy.edit("base/toy", old, new)
    assert (toy.runs()[0].run_key != before) == changes


def test_a_raised_protocol_version_asks_for_new_runs(toy):
    before = toy.runs()[0].run_key
    toy.edit("toy", "released: {version: 1", "released: {version: 2")
    assert toy.runs()[0].run_key != before


def test_runs_do_not_share_their_configuration(toy):
    first, second = toy.runs()[:2]
    kept = copy.deepcopy(second.config)
    first.config["model"]["init_args"]["attention"]["nu"] = 99
    assert second.config == kept


def test_a_view_shows_runs_of_its_parent(toy):
    parent = {run.run_key for run in toy.runs()}
    shown = toy.runs("view")
    assert [run.name for run in shown] == ["toy/plain/n_keys=10/seed1", "toy/tanh/n_keys=10/seed1"]
    assert {run.run_key for run in shown} < parent
    assert [run.point for run in toy.runs("view", profile="short", rows=["plain"])] == ["n_keys=3", "n_keys=3"]


def test_a_view_of_points_that_nobody_trains_is_an_error(toy):
    toy.edit("view", "[10]", "[2000]")
    with pytest.raises(UserError, match="view shows n_keys=2000, but toy has no such point in the smoke profile"):
        toy.runs("view")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("title:", "titel:", "unknown key 'titel'. Did you mean 'title'?"),
        ("kind: tanh", "kid: tanh", "no key 'model.attention.kid'. Did you mean 'kind'? Known: kind, nu."),
        ("model.noise: 0.2", "model.nose: 0.2", "protocols.released.set: the base configuration has no key"),
        ("plain: {model.noise: 0.5}", "plan: {}", "row_set: unknown row 'plan'. Did you mean 'plain'?"),
        ("rows: [plain]", "rows: [plian]", "profiles.short.rows: unknown row 'plian'. Did you mean 'plain'?"),
        ("data.n_keys: [2, 10]", "data.n_key: [2]", "no key 'data.n_key'. Did you mean 'n_keys'?"),
        ("data.n_keys: [2, 10]", "data.n_keys: 2", "grid.data.n_keys: must be a list of values"),
        ("data.n_keys: [2, 10]", "data.n_keys: [2, 2]", "grid.data.n_keys: holds a value twice"),
        ("seeds: [1]", "seeds: [one]", "seeds: must be a list of different whole numbers"),
        ("seeds: [1]", "seeds: 3", "must be a list of different whole numbers, as in [1, 2, 3], not 3"),
        ("smoke: {}", "smok: {}", "unknown key 'smok'. Did you mean 'smoke'?"),
        ("protocol: released", "protocol: relesed", "unknown protocol 'relesed'. Did you mean 'released'?"),
        ("statistic: last", "statistic: mean", "must be last or best, not 'mean'"),
        ("version: 1, statistic: last", "version: one", "must be a whole number from 1, not 'one'"),
        ("plain: {}", "plain: {model.attention: tanh}", "is a group of settings (kind, nu)"),
        ("plain: {}", "plain: {seed_everything: 3}", "use seeds: [3]"),
        ("plain: {}", "tanh: {}", "the key 'tanh' stands twice"),
        ("plain: {}", "plain: {", "is not YAML"),
        ("base: base/toy.yaml", "base: base/nothing.yaml", "nothing.yaml cannot be read"),
        ("corrected: noise differs", "corected: x", "deviations: unknown key 'corected'. Did you mean 'corrected'?"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_sentence(toy, old, new, sentence):
    toy.edit("toy", old, new)
    with pytest.raises(UserError) as caught:
        load_experiment("toy", toy.project)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "toy" in str(caught.value) or "nothing" in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"profile": "smoek"}, "toy has no profile 'smoek'. Did you mean 'smoke'?"),
        ({"protocol": "corect"}, "toy has no protocol 'corect'. Did you mean 'corrected'?"),
        ({"rows": ["plane"]}, "toy has no row 'plane'. Did you mean 'plain'?"),
        ({"rows": ["tanh"], "profile": "short"}, "toy has none of the rows tanh in the profile short"),
    ],
)
def test_a_wrong_choice_is_one_sentence(toy, chosen, sentence):
    with pytest.raises(UserError) as caught:
        toy.runs(**chosen)
    assert sentence in str(caught.value)


def test_an_unknown_experiment_names_the_nearest(toy):
    with pytest.raises(UserError, match=r"unknown experiment 'tou'\. Did you mean 'toy'"):
        load_experiment("tou", toy.project)


def test_an_incomplete_base_is_an_error(toy):
    toy.edit("base/toy", "seed_everything: 1", "")
    with pytest.raises(UserError, match="'seed_everything' is missing; a base configuration is complete"):
        toy.runs()


def test_the_project_is_found_from_below_and_by_its_variable(toy, monkeypatch, tmp_path):
    below = toy.root / "experiments" / "base"
    assert find_project(below).root == toy.root.resolve()
    assert find_project(tmp_path, required=False).root == tmp_path.resolve()
    with pytest.raises(UserError, match=r"lies in no project, a folder with pyproject\.toml and experiments/"):
        find_project(tmp_path)
    monkeypatch.setenv("FWP_ROOT", str(toy.root))
    assert find_project(tmp_path).root == toy.root.resolve()
    monkeypatch.setenv("FWP_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is no folder"):
        find_project()
    monkeypatch.setenv("FWP_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="has no folder experiments"):
        find_project()


def test_points_and_names_sort_as_people_count():
    assert point_name({"data.n_keys": 100, "model.fast": True}) == "n_keys=100, fast=true"
    assert sorted(["n_keys=100", "n_keys=60", ""], key=natural_key) == ["", "n_keys=60", "n_keys=100"]


def test_hashes_do_not_depend_on_the_order_of_keys():
    assert sha256_of({"a": 1, "b": [1.5, "ü"]}) == sha256_of({"b": [1.5, "ü"], "a": 1})


def test_planning_imports_no_torch():
    code = "import fwp_lightning.sweep, sys; assert not {'torch', 'lightning', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", experiment_names(Project(ROOT)))
def test_every_experiment_of_the_project_resolves_under_every_profile_and_protocol(name):
    experiment = load_experiment(name, Project(ROOT))
    parent = getattr(experiment, "parent", experiment)
    for profile in parent.profiles:
        for protocol in parent.protocols:
            runs = resolve_runs(experiment, profile=profile, protocol=protocol)
            assert len({run.run_key for run in runs}) == len(runs) > 0


def test_yaml_that_holds_no_mapping_is_an_error(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="must hold a mapping"):
        read_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("parent", "sentence"),
    [
        ("view", "experiments/view.yaml: runs_of: view is this file itself; name an experiment that has rows"),
        ("other", "experiments/view.yaml: runs_of: other is a view itself; name an experiment that has rows"),
        ("tou", "experiments/view.yaml: runs_of: unknown experiment 'tou'. Did you mean 'toy'?"),
    ],
)
def test_a_view_of_no_experiment_is_one_sentence(toy, parent, sentence):
    toy.write("other", "runs_of: view")
    toy.edit("view", "runs_of: toy", f"runs_of: {parent}")
    with pytest.raises(UserError) as caught:
        toy.runs("view")
    assert sentence in str(caught.value)


def test_a_file_that_is_not_utf_8_is_one_sentence(toy):
    (toy.root / "experiments" / "toy.yaml").write_bytes("title: Längs\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"toy\.yaml is no text in UTF-8 \(byte 8\); save it as UTF-8\."):
        toy.runs()


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_seeds_have_bounds(toy, seed):
    toy.edit("toy", "seeds: [1]", f"seeds: [{seed}]")
    with pytest.raises(UserError, match=f"seeds: {seed} is no seed; seeds go from 0 to 4294967295"):
        toy.runs()


def test_a_protocol_that_is_not_declared_is_an_error(toy):
    toy.write("mine", "base: base/toy.yaml\nprotocol: corrected\nrows: {plain: {}}\n")
    with pytest.raises(UserError, match=r"protocol: unknown protocol 'corrected'\. Known: released\."):
        toy.runs("mine")


def test_only_runs_of_the_users_own_parts_depend_on_imported_files(toy):
    plain = toy.runs()
    assert [run.run_key for run in with_imports(plain, [], set())] == [run.run_key for run in plain]
    for run in plain:
        run.config["model"]["init_args"]["attention"]["feature_map"] = "mine" if run.row == "tanh" else "elu"
    plain = [dataclasses.replace(run) for run in plain]
    tied = {new for old, run in zip(plain, with_imports(plain, ["0" * 64], {"elu"}), strict=True)
            if (new := run.row) and old.run_key != run.run_key}  # fmt: skip
    assert tied == {"tanh"}


def test_an_added_option_keeps_old_keys_while_it_is_neutral_and_makes_new_ones_elsewhere(toy):
    def keys():
        return {run.name: (run.run_key, run.config_sha256) for run in toy.runs()}

    before = keys()
    toy.edit("base/toy", "nu: 1}", "nu: 1, depth: 0}")
    assert not set(keys().values()) & set(before.values())
    toy.edit("base/toy", "data_dir: data}}", "data_dir: data}}\nadded: {model.attention.depth: 0}")
    assert keys() == before
    assert toy.runs()[0].config["model"]["init_args"]["attention"]["depth"] == 0

    toy.edit("toy", "plain: {}", "plain: {model.attention.depth: 1}")
    assert {name for name, key in keys().items() if key != before[name]} == {
        name for name in before if "/plain/" in name
    }


def test_an_added_option_that_the_base_lacks_is_named(toy):
    toy.edit("base/toy", "data_dir: data}}", "data_dir: data}}\nadded: {model.attention.mu: 0}")
    with pytest.raises(UserError, match=r"added: the base configuration has no key 'model.attention.mu'"):
        toy.runs()


def test_points_choose_runs_and_an_unknown_one_is_named(toy):
    assert {run.point for run in at_points(toy.runs(), ["n_keys=10"])} == {"n_keys=10"}
    assert at_points(toy.runs(), ["n_keys=10", "n_keys=2"]) == toy.runs()
    with pytest.raises(UserError, match=r"none of these runs is at 'n_key=2'. Did you mean 'n_keys=2'\?"):
        at_points(toy.runs(), ["n_key=2"])


SIZES = """
variants:
  size:
    small: {data.n_keys: 2}
    large: {data.n_keys: 9, model.noise: 0.7}
grid: {size: [small, large]}
"""


def with_sizes(toy):
    toy.edit("toy", "grid: {data.n_keys: [2, 10]}", SIZES)
    toy.edit("toy", "row_grid: {tanh: {data.n_keys: [2]}}", "variants: {size: {large: {data.n_keys: 5}}}")
    toy.edit("toy", "{grid: {data.n_keys: [3]}, ", "{grid: {size: [small]}, ")


def test_a_variant_is_a_name_for_several_settings(toy):
    with_sizes(toy)
    runs = {run.name: run.config for run in toy.runs(rows=["plain"])}
    assert list(runs) == ["toy/plain/size=small/seed1", "toy/plain/size=large/seed1"]
    small, large = (config["data"]["init_args"]["n_keys"] for config in runs.values())
    assert (small, large) == (2, 9)
    assert [config["model"]["init_args"]["noise"] for config in runs.values()] == [0.2, 0.7]


def test_a_profile_replaces_variants_of_its_own(toy):
    with_sizes(toy)
    configs = [run.config for run in toy.runs(rows=["plain"], profile="paper")]
    assert [config["data"]["init_args"]["n_keys"] for config in configs] == [2, 5]
    # the whole variant is replaced, its other settings with it
    assert [config["model"]["init_args"]["noise"] for config in configs] == [0.2, 0.2]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "grid: {size: [small, large]}",
            "grid: {size: [small, big]}",
            "grid.size: variants has no 'big'. Known: small",
        ),
        ("small: {data.n_keys: 2}", "small: {data.n_key: 2}", "variants.size.small: the base configuration has no key"),
        ("variants: {size: {large:", "variants: {width: {large:", "unknown key 'width'. Known: size"),
    ],
)
def test_a_mistaken_variant_is_one_sentence(toy, old, new, sentence):
    with_sizes(toy)
    toy.edit("toy", old, new)
    with pytest.raises(UserError) as caught:
        load_experiment("toy", toy.project)
    assert sentence in str(caught.value)
