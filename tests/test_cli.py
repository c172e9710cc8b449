"""The command `fwp`: quick where it can be, one sentence where a user is mistaken."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fwp_lightning.cli import main
from fwp_lightning.results import read_store
from fwp_lightning.sweep.cost import on_this_machine
from fwp_lightning.sweep.training import check_run
from fwp_lightning.tracking import open_store

ROOT = Path(__file__).resolve().parent.parent
TOY_TASK = str(Path(__file__).parent / "toy_task.py")


@pytest.fixture
def fwp(toy, monkeypatch, capsys):
    """Run the command in this process; return exit code, output and complaint."""
    monkeypatch.setenv("FWP_ROOT", str(toy.root))

    def call(*arguments):
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep", "tou"], "unknown experiment 'tou'. Did you mean 'toy'? Known: toy, view."),
        (["sweep", "toy", "--profile", "smok"], "toy has no profile 'smok'. Did you mean 'smoke'?"),
        (["sweep", "toy", "--protocol", "relesed"], "toy has no protocol 'relesed'. Did you mean 'released'?"),
        (["sweep", "toy", "--rows", "plian"], "toy has no row 'plian'. Did you mean 'plain'?"),
        (["sweep", "toy", "--seeds", "one"], "'one' is no list of whole numbers such as 1,2,3"),
        (["sweep", "toy", "--jobs", "0"], "'0' is no whole number from 1"),
        (["sweep"], "the following arguments are required: EXPERIMENT"),
        (["sweeep", "toy"], "invalid choice: 'sweeep'"),
        (["sweep", "toy", "--import"], "--import needs a file or a module."),
        (["list", "--import", "no_such_map.py"], "no_such_map.py: there is no such file."),
        (["list", "--import", "no.such.module"], "--import no.such.module: ModuleNotFoundError"),
        (["status", "figure99"], "unknown experiment 'figure99'."),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(fwp, arguments, sentence):
    code, out, err = fwp(*arguments)
    assert code == 2
    assert err.startswith("fwp: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert out == ""


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_help_and_list_are_quick(toy, arguments):
    best = min(cpu_seconds_of(toy, arguments) for _ in range(2))
    # 0.1 to 0.3 s; processor time, since others may be using the machine
    assert best < 1


def cpu_seconds_of(toy, arguments):
    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    command = [sys.executable, "-m", "fwp_lightning", *arguments]
    subprocess.run(command, env=toy.environment, check=True, capture_output=True)
    return used() - before


def test_help_and_list_import_nothing_heavy():
    code = """
import contextlib, io, sys
from fwp_lightning.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["list"])
    try:
        main(["--help"])
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "lightning", "mlflow", "pandas", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_list_names_what_can_be_chosen(fwp):
    code, out, _ = fwp("list")
    assert code == 0
    for text in ("experiments:", "Toy at 10", "rules:", "delta", "feature maps:", "dpfp", "available here: yes"):
        assert text in out
    listed = json.loads(fwp("list", "--json")[1])
    assert [experiment["name"] for experiment in listed["experiments"]] == ["toy", "view"]
    assert listed["experiments"][1]["runs_of"] == "toy"
    assert {"softmax", "sum", "delta", "fwm"} <= {rule["name"] for rule in listed["rules"]}
    assert {"name", "axes", "attn_type"} <= set(listed["paper_names"][0])


def test_a_dry_run_shows_the_runs_and_makes_no_store(fwp, toy):
    code, out, _ = fwp("sweep", "view", "toy", "--dry-run")
    assert code == 0
    assert out.count("[new]") == 6
    assert "6 runs, 0 complete, 6 to train: no such run was measured yet" in out
    assert not (toy.root / "mlflow.db").exists()


def test_a_dry_run_checks_runs_of_a_machine_that_this_is_not(toy):
    runs = toy.runs()
    away = dataclasses.replace(
        runs[0],
        config={**runs[0].config, "trainer": {**runs[0].config["trainer"], "accelerator": "gpu", "devices": 64}},
    )
    assert "trainer.devices=64 needs a machine with as many GPUs" in check_run(away).reason
    assert check_run(on_this_machine(away)) is None
    assert on_this_machine(runs[0]) is runs[0]


def test_a_dry_run_estimates_from_measured_runs(fwp, tracked, train, client):
    run = tracked.runs()[0]
    train(run)
    out = fwp("sweep", "toy", "--dry-run", "--jobs", "1")[1]
    assert f"{run.run_key}  toy/plain/n_keys=2/seed1  [complete]" in out
    assert "6 runs, 1 complete, 5 to train: about" in out
    assert "with 1 job" in out
    assert len(read_store(client)) == 1


def test_status_and_export_show_what_is_done(fwp, tracked, train):
    assert "no run of these experiments is tracked yet" in fwp("status")[1]
    train(tracked.runs()[0])
    lines = [line.split() for line in fwp("status")[1].splitlines()]
    assert ["toy", "smoke", "released", "plain", "1/2", "-", "-", "-", "-"] in lines
    code, out, _ = fwp("export")
    assert (code, out) == (0, "exported 1 run to results/ (1 in runs.csv)\n")


def test_status_without_a_store_says_so(fwp, toy):
    assert fwp("status")[1].startswith("no run is tracked yet")
    assert not (toy.root / "mlflow.db").exists()


def test_fit_tracks_its_run(fwp, tracked, monkeypatch):
    monkeypatch.chdir(tracked.root)
    arguments = ["fit", "--import", TOY_TASK, "--config", "experiments/base/toy.yaml"]
    code, out, err = fwp(*arguments, "--model.attention.kind", "tanh", "--trainer.max_epochs", "2")
    assert code == 0, err
    client = open_store(tracked.project)
    (run,) = read_store(client)
    assert run.outcome == "complete"
    assert (run.tags["experiment"], run.tags["row"], run.tags["feature_map"]) == ("fit", "ToyTask", "tanh")
    assert run.metrics["steps"] == 10
    folder = tracked.project.runs / run.run_key
    assert f"runs/{run.run_key}" in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["attention"]["kind"] == "tanh"
    # a run of one's own is no row of the paper's tables
    assert "exported 0 runs" in fwp("export")[1]


@pytest.mark.parametrize("base", sorted((ROOT / "experiments" / "base").glob("*.yaml")), ids=lambda path: path.stem)
def test_fit_reads_every_base_configuration_of_the_project(fwp, toy, base):
    # the options are read before the number is found to be wrong
    code, _, err = fwp("fit", "--config", str(base), "--model.max_steps", "0")
    assert code == 2
    assert "max_steps=0" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.noisy", "1"], "Option 'noisy' is not accepted"),
        (["--model.noise", "much"], "Expected a <class 'float'>. Got value: much"),
        (["--model.attention.kind", "foo"], "unknown map 'foo'. Known: identity, tanh."),
        (["--config", "absent.yaml"], "File does not exist"),
    ],
)
def test_a_mistake_in_fit_is_one_line(fwp, tracked, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tracked.root)
    code, _, err = fwp("fit", "--import", TOY_TASK, "--config", "experiments/base/toy.yaml", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("fwp: error: ")]
    assert sentence in line
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_gets_no_traceback(toy):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fwp_lightning", "list"]
    done = subprocess.run(command, env=toy.environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr


# --- arguments that are passed on


def test_report_has_a_parser_of_its_own_that_gets_everything_that_follows(fwp, monkeypatch):
    import reports.__main__

    got = []
    monkeypatch.setattr(reports.__main__, "main", lambda arguments: got.append(arguments) or 3)
    for arguments in (["--check"], ["--root", "X", "figure3"], ["--help"], []):
        assert fwp("report", *arguments)[0] == 3
        assert got.pop() == arguments


def test_help_of_report_is_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    assert not end.value.code
    assert "--check" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep", "toy", "--dry"], "unrecognized arguments: --dry"),
        (["sweep", "toy", "--checkpoint-seconds", "-5"], "'-5' is no number of seconds from 0"),
        (["sweep", "toy", "--checkpoint-seconds", "nan"], "'nan' is no number of seconds from 0"),
        (["sweep", "toy", "--protocol", ""], "toy has no protocol ''"),
        (["sweep", "toy", "--rows", ","], "',' names nothing"),
        (["sweep", "toy", "--seeds", "4294967296"], "4294967296 is no seed; seeds go from 0 to 4294967295"),
    ],
)
def test_options_are_written_out_and_have_bounds(fwp, arguments, sentence):
    code, out, err = fwp(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


# --- outside a project, and in a broken one


@pytest.mark.parametrize("command", [["export"], ["status"], ["sweep", "toy"], ["fit"]])
def test_outside_a_project_nothing_is_made(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "lies in no project" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_list_works_outside_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert "experiments: none" in capsys.readouterr().out


def test_export_without_a_store_writes_nothing(fwp, toy):
    code, out, _ = fwp("export")
    assert (code, out.split(":")[0]) == (0, "nothing to export")
    assert {path.name for path in toy.root.iterdir()} == {"experiments", "pyproject.toml"}


def test_list_and_status_go_on_past_a_broken_file(fwp, tracked):
    tracked.write("mine", "titel: Mine\n")
    code, out, err = fwp("list", "--json")
    assert code == 0
    assert [experiment["name"] for experiment in json.loads(out)["experiments"]] == ["toy", "view"]
    assert "fwp: warning: experiments/mine.yaml: unknown key 'titel'" in err
    code, _, err = fwp("status")
    assert code == 0
    assert "experiments/mine.yaml" in err
    assert fwp("status", "mine")[0] == 2


# --- a user's own parts


def own_map(toy, text="# first"):
    path = toy.root / "my_own_map.py"
    path.write_text(text + "\n")
    toy.edit("base/toy", "kind: identity, nu: 1", "kind: identity, nu: 1, feature_map: my_own_map")
    toy.edit("toy", "kind: tanh", "feature_map: dpfp")
    return path


def test_an_edited_file_makes_new_runs_of_its_own_parts_only(toy):
    from fwp_lightning.cli import _tie_to_files

    path = own_map(toy)
    runs = toy.runs()
    first = _tie_to_files([str(path)], None)(runs)
    again = _tie_to_files([str(path)], None)(runs)
    path.write_text("# second\n")
    second = _tie_to_files([str(path)], None)(runs)
    assert [run.run_key for run in first] == [run.run_key for run in again]
    changed = {one.row for one, other in zip(first, second, strict=True) if one.run_key != other.run_key}
    assert changed == {"plain", "steep"}
    shared = [run.run_key for run in runs if run.row == "tanh"]
    assert [run.run_key for run in second if run.row == "tanh"] == shared


def test_a_dry_run_imports_files_and_checks_rows(fwp, toy):
    (toy.root / "broken_import.py").write_text("import nothing_like_this\n")
    code, _, err = fwp("sweep", "toy", "--dry-run", "--import", str(toy.root / "broken_import.py"))
    assert code == 2
    assert err.count("ModuleNotFoundError") == 1
    toy.edit("toy", "kind: tanh", "kind: tahn")
    toy.edit("toy", "nu: 2", "nu: two")
    code, _, err = fwp("sweep", "toy", "--dry-run", "--import", TOY_TASK)
    assert code == 2
    first, steep, tanh = err.splitlines()
    assert first == "fwp: error: 2 rows cannot be built:"
    assert "row 'steep', n_keys=2" in steep
    assert "key \"attention.nu\": Expected a <class 'int'>. Got value: two" in steep
    assert tanh == "  toy, row 'tanh', n_keys=2: unknown map 'tahn'. Known: identity, tanh."


@pytest.mark.parametrize("more", ["", ",position no, attention norm yes"])
def test_rows_with_commas_in_their_names_can_be_chosen(more, monkeypatch, capsys):
    monkeypatch.setenv("FWP_ROOT", str(ROOT))
    assert main(["sweep", "table3", "--dry-run", "--rows", f"position yes, attention norm no{more}"]) == 0
    out = capsys.readouterr().out
    assert "table3/position yes, attention norm no/seed1" in out
    assert ("table3/position no, attention norm yes/seed1" in out) == bool(more)
    assert f"\n{2 if more else 1} run" in out


def test_what_several_rows_lack_is_told_once(fwp, toy):
    toy.edit("toy", "kind: tanh", "nu: two")
    toy.edit("toy", "nu: 2", "nu: two")
    code, _, err = fwp("sweep", "toy", "--dry-run", "--import", TOY_TASK)
    assert code == 2
    assert err.startswith("fwp: error: toy, row 'steep', n_keys=2 and 1 more: ")
    assert len(err.splitlines()) == 1


def test_a_misspelt_key_of_the_base_is_told_once_with_its_file(fwp, toy):
    toy.edit("base/toy", "nu: 1}", "nu: 1, knd: 3}")
    code, _, err = fwp("sweep", "toy", "--dry-run", "--import", TOY_TASK)
    assert code == 2
    assert err == (
        "fwp: error: experiments/base/toy.yaml: unknown key 'model.attention.knd'. Did you mean 'kind'? "
        "Known: kind, nu.\n"
    )


# --- fit, before a run is recorded


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.attention.kin", "tanh"], "kin"),
        (["--model.learning_rat", "1"], "Option 'learning_rat' is not accepted"),
        (["--trainer.accelerator", "nonsense"], "nonsense"),
        (["--ckpt_path", "nothere.ckpt"], "--ckpt_path nothere.ckpt: there is no such file."),
        (["--model.attention.nu", "10"], "nu=10 is over 9"),
    ],
)
def test_what_cannot_run_is_not_recorded(fwp, tracked, client, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tracked.root)
    code, _, err = fwp("fit", "--import", TOY_TASK, "--config", "experiments/base/toy.yaml", *arguments)
    assert code == 2
    assert err.startswith("fwp: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not read_store(client)
    assert not list(tracked.project.runs.iterdir())


def test_runs_being_a_file_is_one_sentence(fwp, toy):
    toy.project.runs.write_text("")
    code, _, err = fwp("fit", "--import", TOY_TASK, "--config", str(toy.root / "experiments/base/toy.yaml"))
    assert code == 2
    assert err.strip().endswith("runs is a file where a folder must be; move it away.")
