"""What a newcomer touches first: make targets, README commands, metadata, and how fast `fwp` answers."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fwp_lightning.experiment import Project, experiment_names

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HELP_SECONDS = 1.0
# commands of other programs that README may show; anything else in a command block is a slip
FOREIGN_COMMANDS = {"cd", "conda", "git", "mlflow", "pip", "python", "source", "uv"}
# variables that would let the machine that runs the tests decide how `make` behaves
MAKE_VARIABLES = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "PROFILE",
    "PROTOCOL",
    "DATA",
    "JOBS",
    "PYTHON",
    "UV",
    "UV_FIND_LINKS",
}


def run_make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES} | variables
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def makefile_targets() -> set[str]:
    """Targets with a recipe of their own, pattern targets included; the stamp file is not one to type."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z0-9%-]*):(?!=)", text, flags=re.MULTILINE))


def experiments() -> set[str]:
    return set(experiment_names(Project(ROOT)))


def reports() -> set[str]:
    """What `python -m reports` takes: an experiment, one that README has its reader write, or README's own block."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return experiments() | set(re.findall(r"^# experiments/(\w+)\.yaml$", readme, flags=re.M)) | {"readme", "claims"}


def is_target(name: str) -> bool:
    """True where `make NAME` does something, the experiment behind a pattern target included."""
    head, _, rest = name.partition("-")
    known = reports() if head == "report" else experiments()
    return name in makefile_targets() or (f"{head}-%" in makefile_targets() and rest in known)


@dataclass
class Clone:
    """A fresh clone as far as make can see it, with a Python that installs nothing and writes down what it is asked."""

    folder: Path

    def python(self, name: str, version: str = "3.11.7", pip_exit: int = 0, fairseq_exit: int = 0) -> str:
        """Path of a stand-in interpreter: knows its version, makes a venv, answers `-m pip` with an exit code."""
        path = self.folder / name
        path.write_text(
            f"""#!/bin/sh
echo "$0 $*" >> "{self.folder}/calls"
case "$1" in
  --version) echo "Python {version}" ;;
  -c) exec "{sys.executable}" -c 'import sys; sys.version_info = {tuple(map(int, version.split(".")))}
exec(sys.argv[1])' "$2" ;;
  -m) case "$2" in
        venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
        pip) case "$*" in *fairseq.txt*) exit {fairseq_exit} ;; *) exit {pip_exit} ;; esac ;;
      esac ;;
esac
""",
            encoding="utf-8",
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def calls(self, word: str) -> list[str]:
        calls = self.folder / "calls"
        return [line for line in calls.read_text().splitlines() if word in line] if calls.exists() else []

    @property
    def stamp(self) -> Path:
        return self.folder / ".venv" / ".installed"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "fairseq.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return Clone(tmp_path)


# make


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = run_make(ROOT).stdout
    assert shown == run_make(ROOT, "help").stdout
    listed = set(re.findall(r"^  make ([a-z0-9%-]+)", shown, flags=re.MULTILINE))
    assert listed == makefile_targets()


def test_setup_installs_once(clone: Clone) -> None:
    python = clone.python("python-stand-in")
    first = run_make(clone.folder, "setup", f"PYTHON={python}", "UV=")
    assert first.returncode == 0, first.stderr
    assert clone.stamp.exists()
    package, fairseq = clone.calls("-m pip install")
    assert "-e .[dev,mt]" in package
    assert "--no-deps -r fairseq.txt" in fairseq
    second = run_make(clone.folder, "setup", f"PYTHON={python}", "UV=")
    assert second.returncode == 0
    assert len(clone.calls("-m pip install")) == 2


def test_without_a_compiler_everything_but_translation_is_set_up(clone: Clone) -> None:
    python = clone.python("no-compiler", fairseq_exit=1)
    for _ in range(2):
        done = run_make(clone.folder, "setup", f"PYTHON={python}", "UV=")
        assert done.returncode == 0
        assert clone.stamp.exists()
        assert "fairseq was not installed" in done.stderr
        assert "C++ compiler" in done.stderr
        assert "fairseq.log" in done.stderr
    assert len(clone.calls("-r fairseq.txt")) == 2, "it is tried again"
    assert len(clone.calls("-e .[dev,mt]")) == 1


def test_only_the_translation_experiment_waits_for_fairseq(clone: Clone) -> None:
    assert "fairseq.txt" in run_make(clone.folder, "-n", "reproduce-table1", "UV=").stdout
    assert "fairseq.txt" not in run_make(clone.folder, "-n", "reproduce-figure2", "UV=").stdout


@pytest.mark.parametrize("target", sorted(makefile_targets() - {"help"}))
def test_target_installs_on_a_fresh_clone_and_not_again(clone: Clone, target: str) -> None:
    target = target.replace("%", "figure2")
    assert "pip install" in run_make(clone.folder, "-n", target, "UV=").stdout
    run_make(clone.folder, "setup", f"PYTHON={clone.python('python-stand-in')}", "UV=")
    after = run_make(clone.folder, "-n", target, "UV=")
    assert after.returncode == 0, after.stderr
    assert "pip" not in after.stdout
    assert "venv .venv" not in after.stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(clone: Clone, changed: str) -> None:
    python = clone.python("python-stand-in")
    run_make(clone.folder, "setup", f"PYTHON={python}", "UV=")
    later = clone.stamp.stat().st_mtime + 10
    os.utime(clone.folder / changed, (later, later))
    assert "pip install" in run_make(clone.folder, "-n", "test", "UV=").stdout


def test_failed_install_is_taken_up_again(clone: Clone) -> None:
    broken, whole = clone.python("no-network", pip_exit=1), clone.python("network")
    failed = run_make(clone.folder, "setup", f"PYTHON={broken}", "UV=")
    assert failed.returncode != 0
    assert not clone.stamp.exists()
    assert run_make(clone.folder, "setup", f"PYTHON={whole}", "UV=").returncode == 0
    assert clone.stamp.exists()


def test_old_python_is_refused_with_a_sentence(clone: Clone) -> None:
    refused = run_make(clone.folder, "setup", f"PYTHON={clone.python('python-old', version='3.10.2')}", "UV=")
    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed" in refused.stderr
    assert "3.10.2" in refused.stderr
    assert not (clone.folder / ".venv").exists()


def test_missing_python_is_refused_with_a_sentence(clone: Clone) -> None:
    refused = run_make(clone.folder, "setup", "PYTHON=python-that-is-not-there", "UV=")
    assert refused.returncode != 0
    assert "PYTHON=python-that-is-not-there is not there" in refused.stderr


def test_uv_is_used_where_it_is_and_finds_the_same_wheels(clone: Clone) -> None:
    uv = clone.folder / "uv"
    uv.write_text(f'#!/bin/sh\necho "uv $* [$UV_FIND_LINKS] [$UV_COMPILE_BYTECODE]" >> "{clone.folder}/calls"\n')
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    python = clone.python("python-stand-in")
    done = run_make(clone.folder, "setup", f"PYTHON={python}", f"UV={uv}", PIP_FIND_LINKS="some/wheels")
    assert done.returncode == 0, done.stderr
    assert not clone.calls("-m pip")
    call, fairseq = clone.calls("uv pip install")
    assert "-c constraints.txt" in call
    assert "[some/wheels] [1]" in call
    assert "--no-deps --build-constraints constraints.txt -r fairseq.txt" in fairseq


def test_unknown_profile_is_refused_with_a_sentence() -> None:
    refused = run_make(ROOT, "-n", "reproduce", "PROFILE=tiny")
    assert refused.returncode != 0
    assert "PROFILE=tiny is not known; choose PROFILE=smoke" in refused.stderr


@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_two_experiments_in_one_call_are_swept_one_after_the_other(clone: Clone, jobs: str) -> None:
    python = clone.python("python-stand-in")
    run_make(clone.folder, "setup", f"PYTHON={python}", "UV=")
    fwp = clone.folder / ".venv" / "bin" / "fwp"
    log = clone.folder / "sweeps"
    fwp.write_text(f'#!/bin/sh\necho "start $2" >> "{log}"\nsleep 0.2\necho "end $2" >> "{log}"\n')
    fwp.chmod(fwp.stat().st_mode | stat.S_IXUSR)
    done = run_make(clone.folder, jobs, "reproduce-figure2", "reproduce-figure3", "UV=")
    assert done.returncode == 0, done.stderr
    assert log.read_text().split("\n")[:4] == ["start figure2", "end figure2", "start figure3", "end figure3"]
    assert len(clone.calls("-m reports")) == 2


def test_a_failed_sweep_still_draws_its_report_and_is_not_forgotten(clone: Clone) -> None:
    run_make(clone.folder, "setup", f"PYTHON={clone.python('python-stand-in')}", "UV=")
    fwp = clone.folder / ".venv" / "bin" / "fwp"
    fwp.write_text("#!/bin/sh\nexit 3\n")
    fwp.chmod(fwp.stat().st_mode | stat.S_IXUSR)
    assert run_make(clone.folder, "reproduce-figure2", "UV=").returncode != 0
    assert clone.calls("-m reports figure2")


def test_options_reach_the_sweep() -> None:
    shown = run_make(ROOT, "-n", "reproduce-figure2", "PROFILE=short", "PROTOCOL=corrected", "JOBS=7").stdout
    assert "fwp sweep figure2 --profile short --protocol corrected --jobs 7" in " ".join(shown.split())
    assert "--protocol" not in run_make(ROOT, "-n", "reproduce-figure2").stdout
    assert "--data 'my texts' --jobs" in run_make(ROOT, "-n", "reproduce-figure2", "DATA=my texts").stdout
    assert "--data" not in run_make(ROOT, "-n", "reproduce-figure2").stdout


def test_reproduce_names_every_experiment() -> None:
    assert experiments()
    sweep = next(line for line in run_make(ROOT, "-n", "reproduce").stdout.splitlines() if "fwp sweep" in line)
    names = sweep.split("fwp sweep")[1].split("--profile")[0].split()
    assert set(names) == experiments()


# the fwp command


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fwp_lightning", "--help"], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start

    # the best of three: another process on the machine is not this command's fault
    assert min(seconds() for _ in range(3)) < HELP_SECONDS


def fwp_commands() -> set[str]:
    """Subcommands that `fwp --help` names, from its `{fit,validate,...}` list or one to a line."""
    shown = subprocess.run(
        [sys.executable, "-m", "fwp_lightning", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    braced = re.search(r"\{([a-z,]+)\}", shown)
    listed = re.findall(r"^ {2,6}([a-z-]+)\s{2,}\S", shown, flags=re.MULTILINE)
    return set(braced.group(1).split(",") if braced else []) | set(listed)


# README


def readme_commands() -> list[list[str]]:
    """Commands of README's bash and console blocks: continued lines joined, comments, prompts and outputs dropped."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = []
    for language, block in re.findall(r"^```(bash|sh|shell|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    commands.append(words)
    return commands


def complaint(words: list[str], known_commands: set[str]) -> str | None:
    """What is wrong with a command of README, or None."""
    program, *rest = (words[0].removeprefix(".venv/bin/"), *words[1:])
    plain = [word for word in rest if not word.startswith("-") and "=" not in word]
    if program == "make":
        unknown = [word for word in plain if not is_target(word)]
        return f"no such make target: {unknown}" if unknown else None
    if program == "python" and rest[:2] == ["-m", "reports"]:
        unknown = [word for word in rest[2:] if not word.startswith("-") and word not in reports()]
        return f"no such report: {unknown}" if unknown else None
    if program == "python" and rest[:2] == ["-m", "fwp_lightning"]:
        program, rest = "fwp", rest[2:]
    if program == "fwp":
        return (
            None if rest and rest[0] in known_commands | {"--help", "--version"} else f"no such fwp command: {rest[:1]}"
        )
    return None if program in FOREIGN_COMMANDS else f"unknown program {program}"


def test_readme_commands_exist() -> None:
    commands, known = readme_commands(), fwp_commands()
    assert commands, "README.md shows no command in a ```bash block"
    wrong = {shlex.join(words): said for words in commands if (said := complaint(words, known))}
    assert not wrong, wrong


def test_readme_names_only_targets_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z][a-z0-9-]*)", text))
    assert not {name for name in named if not is_target(name)}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("make reproduce-figure2 PROFILE=short", None),
        ("make reproduce-figure99", "no such make target"),
        ("make data-wikitext99", "no such make target"),
        ("fwp sweep figure2", None),
        ("fwp swep figure2", "no such fwp command"),
        ("python -m reports figure99", "no such report"),
        (".venv/bin/fwp list", None),
        ("rm -rf runs", "unknown program"),
    ],
)
def test_a_wrong_command_in_readme_is_noticed(command: str, said: str | None) -> None:
    found = complaint(shlex.split(command), {"sweep", "list"})
    assert found is None if said is None else found is not None and said in found


# metadata


def test_citation_is_valid() -> None:
    checked = subprocess.run(
        [sys.executable, "-c", "from cffconvert.cli.cli import cli; cli()", "--validate", "--infile", "CITATION.cff"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_citation_names_the_paper_and_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert [author["family-names"] for author in paper["authors"]] == ["Schlag", "Irie", "Schmidhuber"]
    assert (paper["volume"], paper["start"], paper["end"], paper["year"]) == (139, 9355, 9366, 2021)


def test_changelog_has_a_place_for_the_next_change() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", heading) for heading in headings[1:])


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "constraints.txt holds name==version lines only"
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def test_constraints_can_be_had_from_a_package_index() -> None:
    assert [name for name, version in constraints().items() if "+" in version or "/" in version] == []


def test_constraints_pin_every_direct_requirement_inside_its_range() -> None:
    pins = constraints()
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    outside = {
        str(requirement): pins.get(requirement.name.lower())
        for requirement in requirements
        if not requirement.specifier.contains(pins.get(requirement.name.lower(), "0"), prereleases=True)
    }
    assert not outside


def test_conda_environment_installs_the_same_thing() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *plain, pip = environment["dependencies"]
    (python,) = [entry for entry in plain if entry.startswith("python=")]
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])
    assert "pip" in plain
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}


def test_pre_commit_hooks_name_tools_that_are_installed_here() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for repo in config["repos"] for hook in repo["hooks"]}
    names = {Requirement(text).name for text in PROJECT["optional-dependencies"]["dev"]}
    assert tools <= names


def test_ci_script_is_strict_and_runs_what_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert re.search(r"^make test\b", text, flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
