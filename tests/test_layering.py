"""Imports point one way, libraries stay behind their own module, and every module says what it is for."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fwp_lightning"

# what a part may import of the package; None means everything
MAY_IMPORT: dict[str, set[str] | None] = {
    "errors": set(),
    "registry": {"errors"},
    "seeding": {"errors"},
    "processor": {"errors"},
    "peak_memory": set(),
    "checkpoint_files": {"errors"},
    "compiled": {"errors", "processor"},
    "ops": {"errors", "registry", "compiled"},
    "attention": {"errors", "registry", "seeding", "compiled", "ops"},
    "models": {"errors", "registry", "seeding", "ops", "attention"},
    # data stands beside the stack: tasks and the command line meet it, models never do
    "data": {"errors", "registry", "seeding", "compiled", "experiment", "translation"},
    # fairseq's modules, beside models: they know the attention alone
    "translation": {"errors", "registry", "checkpoint_files", "ops", "attention"},
    "tasks": {"errors", "registry", "seeding", "ops", "attention", "models", "data", "translation"},
    # a Lightning callback beside the tasks: it looks into models
    "probe": {"errors", "registry", "ops", "attention", "models"},
    "generation": {"errors", "checkpoint_files", "registry", "ops", "attention", "models", "data"},
    "results_csv": {"errors"},
    "yaml_files": {"errors"},
    "redaction": set(),
    "experiment": {"errors", "registry", "yaml_files"},
    "slurm": {"errors", "experiment"},
    "system_metrics": set(),
    "tracking": {"errors", "registry", "experiment", "redaction", "slurm"},
    "results": {"errors", "registry", "experiment", "slurm", "tracking", "results_csv"},
    "bench": {
        *("errors", "registry", "seeding", "processor", "compiled", "ops", "attention", "models", "data", "tasks"),
        *("generation", "experiment", "peak_memory", "tracking", "results_csv"),
    },
    "sweep": {
        *("errors", "registry", "seeding", "experiment", "slurm", "peak_memory", "tracking", "results", "results_csv"),
        *("checkpoint_files", "system_metrics", "tasks"),
    },
    "cli": None,
    "__main__": None,
    "__init__": {"attention", "ops"},
}
ONLY_IN = {
    "mlflow": {"tracking", "results", "system_metrics"},
    "fairseq": {"translation", "data", "tasks"},
    "matplotlib": set[str](),
}
# of attention the catalog, which reads the classes without importing torch
REPORTS_MAY_IMPORT = {"errors", "registry", "yaml_files", "experiment", "results_csv", "attention"}
REPORTS_NEVER_IMPORT = {"torch", "mlflow", "lightning", "torchmetrics"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_FUNCTION_LINES = 40


def modules(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).rglob("*.py") if "output" not in p.parts)


def part_of(path: Path) -> str:
    """Top-level part that a file of the package belongs to: `ops` for fwp_lightning/ops/reference.py."""
    inside = path.relative_to(ROOT / PACKAGE) if path.is_relative_to(ROOT / PACKAGE) else path.relative_to(ROOT)
    return inside.with_suffix("").parts[0]


class WithoutTyping(ast.NodeTransformer):
    """Drops `if TYPE_CHECKING:` blocks, which no run executes."""

    def visit_If(self, node: ast.If) -> ast.AST:
        return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imported_names(path: Path, *, typing: bool) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, relative ones resolved, wherever in the file they stand."""
    parents = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree if typing else WithoutTyping().visit(tree)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            # `from fwp_lightning import ops` imports a part, `from fwp_lightning.ops import x` a name of one
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def every_import(package: str, *, typing: bool = False) -> list[tuple[Path, str, int]]:
    """File, dotted name and line of each import; those for type checkers only where `typing` asks for them."""
    return [(path, name, line) for path in modules(package) for name, line in imported_names(path, typing=typing)]


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_part_has_its_place_in_the_order() -> None:
    unknown = {part_of(path) for path in modules(PACKAGE)} - MAY_IMPORT.keys()
    assert not unknown, f"say in MAY_IMPORT what {sorted(unknown)} may import"


def test_imports_point_downward() -> None:
    upward = []
    for path, name, line in every_import(PACKAGE, typing=True):
        head, *rest = name.split(".")
        part, allowed = part_of(path), MAY_IMPORT.get(part_of(path), set())
        if head != PACKAGE or not rest or allowed is None:
            continue
        # a name of the package itself (fwp_lightning.__version__) is no part
        if rest[0] in MAY_IMPORT and rest[0] != part and rest[0] not in allowed:
            upward.append(f"{at(path, line)}: {part} imports {rest[0]}")
    assert not upward, "\n".join(upward)


def test_the_order_has_no_cycle() -> None:
    reachable = {part: set(allowed or ()) for part, allowed in MAY_IMPORT.items()}
    for _ in reachable:
        for allowed in reachable.values():
            allowed |= {deeper for part in tuple(allowed) for deeper in reachable[part]}
    assert not [part for part, allowed in reachable.items() if part in allowed]


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_behind_its_module(library: str) -> None:
    strays = [
        at(path, line)
        for path, name, line in every_import(PACKAGE)
        if name.split(".")[0].removesuffix("_cli") == library and part_of(path) not in ONLY_IN[library]
    ]
    assert not strays, f"{library} is imported outside {sorted(ONLY_IN[library])}: {strays}"


def test_reports_know_the_plan_of_an_experiment_and_nothing_of_its_training() -> None:
    strays = [
        f"{at(path, line)}: {name}"
        for path, name, line in every_import("reports", typing=True)
        if name.split(".")[0] in REPORTS_NEVER_IMPORT
        or (name.startswith(f"{PACKAGE}.") and name.split(".")[1] not in REPORTS_MAY_IMPORT)
    ]
    assert modules("reports")
    assert not strays, strays


def test_reports_load_no_training_library() -> None:
    script = f"import sys, reports.__main__; print(*sys.modules.keys() & {REPORTS_NEVER_IMPORT!r})"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not loaded.split()


def test_package_does_not_import_reports() -> None:
    strays = [at(path, line) for path, name, line in every_import(PACKAGE) if name.split(".")[0] == "reports"]
    allowed = [place for place in strays if place.startswith(f"{PACKAGE}/cli.py")]
    assert strays == allowed


@pytest.mark.parametrize("package", [PACKAGE, "reports"])
def test_third_party_imports_are_declared(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    extra = {re.split(r"[<>=]", text)[0].replace("-", "_") for text in project["optional-dependencies"]["mt"]}
    missing = {
        f"{at(path, line)}: {head}"
        for path, name, line in every_import(package)
        if (head := name.split(".")[0]) not in sys.stdlib_module_names | {PACKAGE, "reports", "__future__"}
        and not declared & {distribution.lower() for distribution in distributions.get(head, [head])}
        and head not in {"fairseq", "fairseq_cli", "triton", "submitit"}
        # what the extra `mt` declares may be imported where fairseq may
        and not (part_of(path) in ONLY_IN["fairseq"] and head in extra)
    }
    assert not missing, f"not in pyproject's dependencies: {sorted(missing)}"


@pytest.mark.parametrize("package", [PACKAGE, "reports"])
def test_public_modules_say_what_they_are_for_in_one_line(package: str) -> None:
    wordless = []
    for path in modules(package):
        if path.stem.startswith("_") and path.stem != "__init__":
            continue
        first, *rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines() or [""]
        if not first.strip() or (rest and rest[0].strip()):
            wordless.append(str(path.relative_to(ROOT)))
    assert not wordless, f"needs a docstring whose first line stands alone: {wordless}"


@pytest.mark.parametrize("package", [PACKAGE, "reports"])
def test_functions_fit_on_a_screen(package: str) -> None:
    tall = [
        f"{at(path, node.lineno)}: {node.name}, {height} lines"
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (height := code_lines(node)) > MAX_FUNCTION_LINES
    ]
    assert not tall, "\n".join(tall)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    hidden = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - hidden


def test_no_file_is_named_after_nothing() -> None:
    vague = [p for package in (PACKAGE, "reports", "tests") for p in modules(package) if p.stem in VAGUE_NAMES]
    assert not vague, vague


def test_types_are_shipped() -> None:
    assert (ROOT / PACKAGE / "py.typed").is_file()
