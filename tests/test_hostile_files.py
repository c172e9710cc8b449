"""A thousand damaged and hostile experiment files: each plans its runs or is refused with one sentence."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TOY, TOY_BASE, TOY_TASK, TOY_VIEW, ToyProject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwp_lightning.cli import main
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import experiment_names, load_experiment, resolve_runs
from fwp_lightning.sweep.workers import import_file
from fwp_lightning.yaml_files import UNPRINTABLE
from reports.plan import check_report_section, load_plan

REPORT = "report: {kind: table, metrics: [valid/loss], x: {limits: [0, 9]}, readme: [n_keys=2], lines: {}}\n"
FILES = {"toy": TOY + REPORT, "view": TOY_VIEW, "base/toy": TOY_BASE}

# what has broken programs before
TEXTS = [
    *(
        "",
        " ",
        "null",
        "~",
        "yes",
        "1e3",
        "0x10",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "a\nb",
        "a\tb",
        "\N{NULL}",
        "\x1b[31m",
    ),
    *("\N{RIGHT-TO-LEFT OVERRIDE}txt", "ü" * 300, "x" * 5000, "<script>alert(1)</script>", "a|b", "\\input{x}", "%n$&"),
    *(
        "=1+1",
        "@SUM(A1)",
        "-",
        "a, b",
        "a=b",
        "{{ x }}",
        "os.system",
        "toy_task.ToyData",
        "builtins.eval",
        "a.b.c",
        "...",
    ),
]
NUMBERS = [
    0,
    -1,
    2**31,
    2**63,
    2**64,
    10**30,
    10**399,
    -(10**20),
    0.0,
    -0.0,
    1e308,
    1e-320,
    *map(float, ("nan", "inf", "-inf")),
]
# the others are among the texts above, and refused at once
LETTERS = st.characters(exclude_categories=["C", "Z"])
SCALARS = st.one_of(
    *(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.none(), st.booleans(), st.integers(), st.floats()),
    st.text(LETTERS, max_size=12),
)
KEYS = st.one_of(
    st.sampled_from(
        [*TEXTS, "class_path", "init_args", "model", "data.n_keys", "model.attention", "seed_everything", "set"]
    ),
    st.sampled_from([1, 2.5, True]),
    st.text(LETTERS, min_size=1, max_size=6),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
# YAML that no Python value gives: tags, anchors, merges, cycles, complex keys, doubled keys, dates, what is cut short
SNIPPETS = [
    "x: !!python/object/apply:os.system [touch pwned]",
    *("x: !!python/name:os.system", "x: !!binary aGk=", "x: !!set {a, b}", "x: !!timestamp no", "x: !!int no"),
    *("x: !mine 3", "x: &a [*a]", "x: &a {b: *a}", "x: *nowhere", "<<: *nowhere", "<<: 3", "<<: [1, 2]"),
    *("<<: {title: Again}", "? [a, b]\n: 1", "? {a: 1}\n: 1", "? !!null\n: 1", "title: Again", "seeds: [1, 01]"),
    *("x: 2020-02-30", "seeds: [2020-01-01]", "x: 1:30:61", "x: |\n  a\n b", ": :", "x: 'open", "x: [1", "x: {a"),
    *("---\nx: 1", "...", "\tx: 1", "- x", "x", "%YAML 9.9", "# only a comment"),
    "grid: {data.n_keys: [2020-01-01, 2020-01-01 10:00:00]}",
    # ten thousand values of five lines
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "\n".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in ("ab", "bc", "cd", "de", "ef")),
    *(f"x: {'[' * n}{']' * n}" for n in (60, 20_000)),
    *(f"x: {'{a: ' * n}1{'}' * n}" for n in (60, 5_000)),
    *("x: " + "9" * 5000, "x: 0x" + "f" * 5000, "x: 1." + "0" * 5000, f"seeds: [1{'0' * 350}]"),
    # more runs than fit into the memory
    f"grid: {{{', '.join(f'{key}: {list(range(400))}' for key in ('data.n_keys', 'model.noise', 'data.block'))}}}",
    "rows: {<<: &r {plain: {}}, other: *r}",
    "rows: {plain: {trainer: null}}",
    "rows: {plain: {trainer.devices: 1000000000}}",
    "rows: {plain: {model: {class_path: os.system, init_args: {command: touch pwned}}}}",
    "profiles: {smoke: [1], short: 3}",
    "protocols: {../../x: {}}",
    "base: ../../../etc/passwd",
    "variants: {size: {small: {}}}\ngrid: {size: [[small]]}",
]


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document below its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from paths_in(item, (*at, key))


def at(tree: Any, place: Iterable[Any]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


@st.composite
def trees(draw: st.DrawFn, text: str) -> str:
    """A document with one to three places replaced, removed, renamed, added to or wrapped."""
    tree = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        places = sorted(paths_in(tree), key=repr)
        if not places:
            break
        *parents, last = draw(st.sampled_from(places))
        node = at(tree, parents)
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add", "wrap", "copy"]))
        if kind == "remove":
            del node[last]
        elif kind == "wrap":
            node[last] = draw(st.sampled_from([[node[last]], {"x": node[last]}, {last: node[last]}, str(node[last])]))
        elif kind == "copy":
            node[last] = copy.deepcopy(at(tree, draw(st.sampled_from(places))))
        elif kind == "replace" or isinstance(node, list):
            node[last] = draw(VALUES)
        else:
            node[draw(KEYS)] = node.pop(last) if kind == "rename" else draw(VALUES)
    return yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans())
    )


@st.composite
def spliced(draw: st.DrawFn, text: str) -> str:
    """A document with a line of hostile YAML in it, or doubled, cut or written over."""
    lines = text.strip().splitlines()
    where = draw(st.integers(0, len(lines)))
    kind = draw(st.sampled_from(["snippet", "snippet", "snippet", "alone", "double", "cut", "overwrite"]))
    snippet = draw(st.sampled_from(SNIPPETS))
    if kind == "alone":
        return snippet
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "overwrite":
        where = draw(st.integers(0, len(text)))
        return text[:where] + draw(st.text(min_size=1, max_size=4)) + text[where + draw(st.integers(0, 4)) :]
    line = lines[min(where, len(lines) - 1)] if kind == "double" else snippet
    # whole sections are replaced rather than doubled, so that what the snippet says is looked at
    key = line.split(":")[0]
    kept = [other for other in lines if kind == "double" or not other.startswith(f"{key}:")]
    return "\n".join([*kept[:where], line, *kept[where:]])


def encoded(text: str, how: str) -> bytes:
    return text.encode(how, errors="surrogatepass" if how.startswith("utf") else "replace")


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """One of the project's files, damaged, with its name."""
    name = draw(st.sampled_from(["toy", "toy", "toy", "base/toy", "view"]))
    text = draw(st.one_of(trees(FILES[name]), trees(FILES[name]), spliced(FILES[name])))
    how = draw(st.sampled_from(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "latin-1"]))
    return name, encoded(text, how)


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def try_plan(toy: ToyProject, name: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["sweep", name, "--dry-run", "--jobs", "1"])
    return code, out.getvalue(), err.getvalue()


def is_one_sentence(said: str) -> bool:
    """Whether a complaint is one line, or one for each row that cannot be built."""
    head, *others = said.splitlines()
    whole = re.fullmatch(r"fwp: error: \d+ rows cannot be built:", head) if others else head.startswith("fwp: error: ")
    return bool(whole) and not UNPRINTABLE.search(said.replace("\n", "")) and max(map(len, (head, *others))) < 1500


def complaint(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


# 25 s of CPU time; on a crowded machine that is minutes
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_thousand_files_plan_their_runs_or_are_refused_with_a_sentence(
    toy: ToyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FWP_ROOT", str(toy.root))
    monkeypatch.chdir(toy.root)
    import_file(str(TOY_TASK))
    counts: Counter[int] = Counter()
    untouched = listing(toy.root)

    @settings(
        max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged_files())
    def each(file: tuple[str, bytes]) -> None:
        name, content = file
        toy.write("toy", FILES["toy"])
        toy.write("base/toy", FILES["base/toy"])
        (toy.root / "experiments" / f"{name}.yaml").write_bytes(content)
        code, out, err = try_plan(toy, "view" if name == "view" else "toy")
        counts[code] += 1
        if code == 0:
            assert re.search(r"\d+ runs?, 0 complete, \d+ to train", out)
            assert not err
        else:
            assert code == 2
            assert not out
            assert is_one_sentence(err), err
        assert listing(toy.root) == untouched

    each()
    assert counts.total() >= 1000
    # files that are always refused, or never, would try nothing
    assert min(counts[0], counts[2]) >= 100


@pytest.mark.slow
def test_damaged_reports_are_planned_or_refused_with_a_sentence(toy: ToyProject) -> None:
    counts: Counter[bool] = Counter()

    @settings(max_examples=600, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(trees(REPORT))
    def each(section: str) -> None:
        toy.write("toy", f"{TOY}\n{section}")
        said = complaint(lambda: (check_report_section("toy", toy.project), load_plan(toy.project, "toy", "smoke")))
        counts[not said] += 1
        assert "\n" not in said

    each()
    assert min(counts.values()) >= 20


@pytest.mark.slow
def test_the_projects_own_files_damaged_give_runs_or_a_sentence(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    project = ToyProject(tmp_path / "project").project
    for path in (root / "experiments").rglob("*.yaml"):
        copied = project.experiments / path.relative_to(root / "experiments")
        copied.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    texts = {name: (project.experiments / f"{name}.yaml").read_text(encoding="utf-8") for name in ("figure4", "table2")}
    assert set(texts) <= set(experiment_names(project))

    @settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(texts)).flatmap(lambda name: st.tuples(st.just(name), trees(texts[name]))))
    def each(file: tuple[str, str]) -> None:
        name, content = file
        (project.experiments / f"{name}.yaml").write_text(content, encoding="utf-8")
        assert "\n" not in complaint(lambda: resolve_runs(load_experiment(name, project)))

    each()
