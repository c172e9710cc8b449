"""Names from files that others wrote, secrets of this process, checkpoints that want to run code: none gets its way."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sqlite3
import subprocess
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_TASK, ToyProject
from hand_written import CAPACITY, Bench, make_bench

from fwp_lightning.cli import main
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import load_experiment, resolve_runs
from fwp_lightning.redaction import redacted
from fwp_lightning.results import export
from fwp_lightning.sweep.training import newest_checkpoint
from fwp_lightning.tracking import RunRecorder, deliver_journals, describe_origin, run_folder
from reports import tables, verification

ROOT = Path(__file__).resolve().parent.parent

# --- names -----------------------------------------------------------------------------------------------------------

# what a table, a figure and the page must show as it stands
HOSTILE_ROWS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>",
    "</title></svg><script>alert(2)</script>",
    "a | b | c",
    "[click](javascript:alert(1))",
    "![x](http://elsewhere/x.png)",
    "`code`",
    r"\input{/etc/passwd} & \\ % $x^2$ #_~{}",
    r"$\frac{",
    "a --> <!-- ]]>",
    "../../x",
    "/etc/passwd",
    "ü" * 200,
    "\N{HEBREW LETTER ALEF}\N{ARABIC LETTER BEH} right to left",
    "{{ 7 * 7 }}{% raw %}",
]


@pytest.fixture
def hostile(tmp_path: Path) -> Bench:
    """A figure and a table whose rows, title and deviations are hostile, with a run of every row."""
    bench = make_bench(tmp_path / "project")
    said = {
        "title": "T <script>alert(3)</script> $\\frac{",
        "deviations": {"short": "D <script>alert(4)</script> [a](b)"},
    }
    rows = {row: {"model.rule": str(number)} for number, row in enumerate(HOSTILE_ROWS)}
    bench.edit("figure8", **said, rows=rows, source="S <b>", report=CAPACITY["report"] | {"readme": ["n_keys=20"]})
    bench.edit("table9", **said, rows=rows)
    for number, row in enumerate(HOSTILE_ROWS):
        bench.add(row, [0.5, 0.1 + number / 100])
        bench.add(row, [9.0], experiment="table9", point="", protocol="corrected", metric="valid/perplexity")
        bench.paper(row, "last_loss", "0.2")
    return bench


class Tags(HTMLParser):
    """Collects the tags of a page, its texts, and what runs or fetches something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            place = (value or "").strip()
            if name.startswith("on") or (
                name in ("href", "src", "xlink:href") and not place.startswith(("#", "data:text/csv"))
            ):
                self.active.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_hostile_names_are_shown_and_do_nothing(hostile: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile.draw() == 0
    page = (hostile.root / "reports/output/index.html").read_text(encoding="utf-8")
    found = Tags()
    found.feed(page)
    assert not found.active
    assert not {"script", "img", "b", "iframe", "object"} & found.tags
    for row in HOSTILE_ROWS:
        assert row in found.texts


def test_hostile_names_stay_in_their_cell_of_markdown_and_latex(hostile: Bench) -> None:
    assert hostile.draw("table9") == 0
    folder = hostile.root / "reports/output/short/corrected"
    lines = (folder / "table9.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    # cells end at a bar that no backslash stands before
    assert {len(re.split(r"(?<!\\)\|", line)) for line in rows} == {len(tables.build(*table_of(hostile)).header) + 2}
    text = "\n".join(lines)
    assert "<" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    latex = (folder / "table9.tex").read_text(encoding="utf-8")
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    known = {
        "begin",
        "end",
        "toprule",
        "midrule",
        "bottomrule",
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "pm",
    }
    assert set(re.findall(r"\\([a-zA-Z]+)", "\n".join(body))) <= known
    # of the signs that mean something to TeX only those are bare that the table itself is made of
    for line in (line for line in body if line.endswith(r"\\")):
        assert len(re.findall(r"(?<!\\)&", line)) == len(tables.build(*table_of(hostile)).header) - 1
        assert not re.search(r"(?<!\\)[%#_]", line)


def table_of(bench: Bench) -> Any:
    return bench.selection("table9"), bench.cells("table9")


def test_hostile_names_stay_in_readmes_block(hostile: Bench) -> None:
    assert hostile.draw("readme") == 0
    text = (hostile.root / "README.md").read_text(encoding="utf-8")
    assert text.count("<") == text.count("<!-- results:")


def test_reports_are_written_into_their_folder_alone(hostile: Bench) -> None:
    before = set(hostile.root.parent.rglob("*"))
    hostile.draw()
    new = set(hostile.root.parent.rglob("*")) - before
    assert all(path.is_relative_to(hostile.root / "reports") or path.parent == hostile.root / "results" for path in new)


def test_a_line_break_in_a_csv_file_does_not_end_a_comment_of_latex(hostile: Bench) -> None:
    for run in hostile.runs:
        run["deviations"] = "first\n\\input{/etc/passwd}\r\\input{x}\N{LINE SEPARATOR}\\input{y}"
        run["git_commit"] = "\n\\input{z}"
    hostile.draw("table9")
    latex = (hostile.root / "reports/output/short/corrected/table9.tex").read_text(encoding="utf-8")
    assert "\\input{/etc/passwd}" in latex
    assert all(line.startswith("%") for line in latex.splitlines() if "\\input" in line)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("toy", "plain: {}", '"a\\nb": {}', "has a character that cannot be printed"),
        ("toy", "plain: {}", '"a\\0b": {}', "has a character that cannot be printed"),
        ("toy", "plain: {}", '"a\\u202Eb": {}', "has a character that cannot be printed"),
        ("toy", "plain: {}", f"{'a' * 201}: {{}}", "is longer than 200 characters"),
        ("toy", "plain: {}", '"=cmd()": {}', "begins like a formula of a spreadsheet"),
        ("toy", "plain: {}", '"@SUM(1)": {}', "begins like a formula of a spreadsheet"),
        ("toy", "title: Toy", 'title: "a\\u202Eb"', "which cannot be printed"),
        ("toy", "released: {version", "../../x: {version", "is no name for folders of results"),
        ("toy", "released: {version", "/abs: {version", "is no name for folders of results"),
        ("toy", "released: {version", '"<b>": {version', "is no name for folders of results"),
        ("toy", "base: base/toy.yaml", "base: ../../../etc/passwd", "lies outside of experiments/"),
        ("toy", "base: base/toy.yaml", "base: /etc/passwd", "lies outside of experiments/"),
        ("toy", "[2, 10]", '[2, "a\\nb"]', "has a comma or a line break"),
    ],
)  # fmt: skip
def test_a_name_that_could_escape_or_deceive_is_refused(
    toy: ToyProject, name: str, old: str, new: str, sentence: str
) -> None:
    toy.edit(name, old, new)
    with pytest.raises(UserError) as caught:
        load_experiment(name, toy.project)
    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["..", "<script>", "a b", "=1", "-x", "a.b"])
def test_an_experiment_file_whose_name_is_no_folder_is_refused(toy: ToyProject, name: str) -> None:
    toy.write(name, "base: base/toy.yaml\nrows: {a: {}}\n")
    with pytest.raises(UserError, match="is no name for folders of results"):
        load_experiment(name, toy.project)


@pytest.mark.parametrize("name", ["../experiments/toy", "/etc/passwd", "toy\n", "toy\0", ""])
def test_an_experiment_is_asked_for_by_its_name_alone(toy: ToyProject, name: str) -> None:
    with pytest.raises(UserError, match="unknown experiment"):
        load_experiment(name, toy.project)


def test_runs_with_hostile_rows_and_data_paths_write_below_their_own_keys(
    tracked: ToyProject, train: Callable[..., Any], client: Any
) -> None:
    tracked.edit("toy", "plain: {}", '"../../x <b>": {data.data_dir: "../../../y\'\\"<b>"}')
    tracked.edit("toy", "rows: [plain], row_set: {plain: {model.noise: 0.5}}", "")
    before = set(tracked.root.parent.rglob("*"))
    run = resolve_runs(load_experiment("toy", tracked.project))[0]
    assert train(run).status == "complete"
    export(client, tracked.project)
    new = {path.relative_to(tracked.root).parts[0] for path in set(tracked.root.parent.rglob("*")) - before}
    assert new <= {"runs", "mlartifacts", "results", "mlflow.db.lock", "mlflow.db-journal"}
    assert {path.name for path in tracked.project.runs.iterdir()} == {run.run_key}


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
    "HF_TOKEN": "hf_0123456789abcdef",
    "MY_SERVICE_API_KEY": "key-0f0f0f0f0f",
    "database_passwd": "s3cr3t-passwd",
}
ADDRESS = "postgresql://somebody:pass-in-address@host:5432/mlflow?password=pass-in-query"


def test_secrets_reach_nothing_that_is_recorded(
    tracked: ToyProject, client: Any, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    everything = " ".join([*SECRETS.values(), ADDRESS])
    subprocess.run(["git", "init", "-q"], cwd=tracked.root, check=True)
    (tracked.root / "code.py").write_text("")
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["add", "code.py"], ["commit", "-qm", "x"]):
        subprocess.run(["git", *identity, *command], cwd=tracked.root, check=True)
    (tracked.root / "code.py").write_text(f"TOKENS = '{everything}'\n")
    mine = tracked.root / "mine.py"
    mine.write_text(f"# {everything}\n")
    origin = describe_origin(tracked.project, ["sweep", "toy", "--note", everything, f"--uri={ADDRESS}"], [str(mine)])
    tracked.edit("base/toy", "data_dir: data", f"data_dir: {json.dumps(everything)}")
    tracked.edit("toy", "title: Toy", f"title: {json.dumps(everything)}")
    runs = tracked.runs(rows=["plain"])
    from fwp_lightning.sweep.training import Circumstances, train_run

    assert train_run(runs[0], client, Circumstances(tracked.project, origin)).status == "complete"
    # and one that fails with a secret in its message, at a store that refuses: the journal
    with monkeypatch.context() as broken:
        broken.setattr("fwp_lightning.tracking.deliver", raiser(RuntimeError(f"refused {everything}")))
        broken.setattr("fwp_lightning.sweep.training.fit", raiser(ValueError(f"no login at {everything}")))
        assert train_run(runs[1], client, Circumstances(tracked.project, origin)).status == "failed"
    journals = list(tracked.project.runs.glob("*/journal.jsonl"))
    assert journals
    assert_without_secrets(tracked)
    assert deliver_journals(client, tracked.project) == 1
    export(client, tracked.project)
    assert_without_secrets(tracked)
    assert not list(tracked.project.runs.glob("*/journal.jsonl"))


def raiser(error: Exception) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


def assert_without_secrets(toy: ToyProject) -> None:
    """Look into every file that runs leave, and into every cell of the database."""
    with sqlite3.connect(toy.root / "mlflow.db") as database:
        stored = "\n".join(database.iterdump())
    files = [
        path for name in ("runs", "mlartifacts", "results") for path in (toy.root / name).rglob("*") if path.is_file()
    ]
    texts = {"mlflow.db": stored} | {str(path): path.read_bytes().decode("utf-8", "replace") for path in files}
    assert {"git.diff", "config.yaml", "mine.py"} <= {path.name for path in files}
    for name, text in texts.items():
        for secret in (*SECRETS.values(), "pass-in-address", "pass-in-query"):
            assert secret not in text, f"{secret} in {name}"


def test_the_address_of_a_store_is_told_without_its_password(
    toy: ToyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:pass-in-address@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("FWP_ROOT", str(toy.root))
    assert main(["status"]) == 2
    said = capsys.readouterr()
    assert "http://***@127.0.0.1:9 does not answer" in said.err
    assert "pass-in-address" not in said.out + said.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host/x", "http://***@host/x"),
        ("https://token@host", "https://***@host"),
        ("mysql+pymysql://u:p@w@h/db", "mysql+pymysql://***@h/db"),
        ("mail me@host and 1 @ 2, sqlite:///mlflow.db", "mail me@host and 1 @ 2, sqlite:///mlflow.db"),
        ("http://host/x?a=1&token=abc&b=2", "http://host/x?a=1&token=***&b=2"),
    ],
)
def test_addresses_lose_who_logs_in_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_only_secret_variables_are_hidden_and_none_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONKEY", "monkey-value")
    monkeypatch.setenv("DEPLOY_KEY", "12345")
    monkeypatch.setenv("SIGNING_KEY", "123456")
    assert redacted("monkey-value 12345 123456") == "monkey-value 12345 ***"


# --- code in files ---------------------------------------------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "pwned"


def write_evil(path: Path, mark: Path, how: str) -> Path:
    content = {"state_dict": {}, "config": {}, "words": [], "weights": Evil(mark), "model": Evil(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


@pytest.fixture(params=["zip", "legacy", "pickle"])
def evil(request: pytest.FixtureRequest, tmp_path: Path, mark: Path) -> Path:
    """A checkpoint that makes a file when it is unpickled; unpickled here it would."""
    return write_evil(tmp_path / "evil.ckpt", mark, request.param)


def test_the_evil_checkpoint_is_one(evil: Path, mark: Path) -> None:
    if evil.read_bytes()[:2] == b"PK":
        torch.load(evil, weights_only=False)
    else:
        with evil.open("rb") as file:
            while not mark.exists():
                pickle.load(file)
    assert mark.exists()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_checkpoint_that_runs_code_is_refused_with_a_sentence(
    tracked: ToyProject, evil: Path, mark: Path, command: str, forced: bool, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    if forced:
        # torch's own switch to the dangerous way
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = str(tracked.root / "experiments/base/toy.yaml")
    code = main(["--import", str(TOY_TASK), command, "--config", config, "--ckpt_path", str(evil)])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert "is not read" in said or "cannot be read" in said
    assert not mark.exists()


def test_nobody_can_ask_for_the_dangerous_way(tracked: ToyProject, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    config = str(tracked.root / "experiments/base/toy.yaml")
    assert main(["--import", str(TOY_TASK), "fit", "--config", config, "--weights_only", "false"]) == 2
    assert "weights_only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate --checkpoint", "fairseq-convert --output out.pt --input"])
def test_other_commands_refuse_it_too(evil: Path, mark: Path, command: str, capsys: Any) -> None:
    assert main([*command.split(), str(evil)]) == 2
    assert capsys.readouterr().err.startswith("fwp: error: ")
    assert not mark.exists()


def test_a_sweep_does_not_go_on_from_a_checkpoint_that_runs_code(
    tracked: ToyProject, train: Callable[..., Any], mark: Path, caplog: Any
) -> None:
    run = tracked.runs()[0]
    folder = run_folder(tracked.project, run.run_key)
    write_evil(folder / "last.ckpt", mark, "zip")
    assert newest_checkpoint(folder) is None
    assert "is not read" in caplog.text
    assert train(run).status == "complete"
    assert not mark.exists()


def test_results_of_another_are_text_and_nothing_else(bench_of_pickles: Bench, mark: Path, capsys: Any) -> None:
    assert bench_of_pickles.draw_unwritten() == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not mark.exists()


@pytest.fixture
def bench_of_pickles(tmp_path: Path, mark: Path) -> Any:
    from reports.__main__ import main as draw

    bench = make_bench(tmp_path / "project")
    bench.add("Linear", [0.3])
    bench.write()
    for name in ("runs", "metrics", "translations", "paper"):
        (bench.root / "results" / f"{name}.csv").write_bytes(pickle.dumps(Evil(mark)))
    bench.draw_unwritten = lambda: draw(["--root", str(bench.root)])  # type: ignore[attr-defined]
    return bench


def test_a_journal_of_another_writes_no_file_outside_of_its_run(
    tracked: ToyProject, client: Any, tmp_path: Path
) -> None:
    recorder = RunRecorder(
        client, tracked.project, run_key="a" * 16, experiment="toy", name="x", tags={"run_key": "a" * 16}
    )
    recorder.start()
    for name in ("../../../../evil.txt", str(tmp_path / "evil.txt")):
        recorder.journal.write_text(json.dumps({"op": "text", "name": name, "text": "x"}))
        deliver_journals(client, tracked.project)
    assert not list(tmp_path.rglob("evil.txt")) or all(
        path.is_relative_to(tracked.project.artifacts) for path in tmp_path.rglob("evil.txt")
    )


# --- archives, servers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_an_archive_cannot_write_outside_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    outside = tmp_path / "outside.yaml"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        names = {"parent": "../outside.yaml", "absolute": str(outside), "link": "link/outside.yaml"}
        if kind == "link":
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(link)
        member = tarfile.TarInfo(names[kind])
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    done = subprocess.CompletedProcess([], 0, buffer.getvalue())
    monkeypatch.setattr(verification.subprocess, "run", lambda *arguments, **options: done)
    project = ToyProject(tmp_path / "project").project
    verification._files_at(project, "0123456789abcdef", tmp_path / "inside")
    assert not outside.exists()


@pytest.mark.parametrize("commit", ["--output=pwned", "HEAD", "../../x", "0123;x", "-abcdef0"])
def test_a_commit_from_a_csv_file_is_a_hash_or_nothing(toy: ToyProject, commit: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(verification.subprocess, "run", raiser(AssertionError("git was called")))
    assert verification._files_at(toy.project, commit, toy.root / "inside") is None


def test_servers_are_started_on_this_machine_alone() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md")}
    lines = [line for text in texts.values() for line in text.replace("\\\n", " ").splitlines()]
    started = [line for line in lines if re.search(r"mlflow (ui|server)\b.*--", line)]
    assert started
    # without a host MLflow takes this one too
    assert all(re.findall(r"--host[ =](\S+)", line) in ([], ["127.0.0.1"]) for line in started)
    assert "--host 127.0.0.1" in texts["Makefile"]
    assert not [line for line in lines if "0.0.0.0" in line]
