"""What can be chosen, for `fwp list`: read from the decorators in the source, so that listing imports no torch."""

from __future__ import annotations

import ast
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fwp_lightning import compiled

_PACKAGE = Path(__file__).parent.parent
REGISTRIES = ("rules", "feature_maps", "phi_norms")
"""Folders beside this file, and the names of the registries in them but for the capitals."""


@dataclass(frozen=True)
class Part:
    """A rule, feature map or normalisation: the name written in YAML and the first line of its docstring."""

    name: str
    summary: str
    source: str = ""
    """Who wrote it where."""


@dataclass(frozen=True)
class BackendEntry:
    """A backend: what it computes and whether it can run here."""

    name: str
    rules: tuple[str, ...]
    available: bool
    reason: str


@dataclass(frozen=True)
class PaperName:
    """One model: its name in the paper, its axes, and the number the released language-model code gives it."""

    name: str
    axes: str
    attn_type: str


def parts(registry: str) -> list[Part]:
    """Return what is registered in one of ``REGISTRIES``, built in and by the user's files."""
    found = _built_in(registry)
    return found + _imported_parts(registry, {part.name for part in found})


def _built_in(registry: str) -> list[Part]:
    return [
        Part(name, _first_line(ast.get_docstring(node)), _source(node))
        for tree in _trees("attention", registry)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if (name := _registered_name(decorator, registry.upper()))
    ]


def backends() -> list[BackendEntry]:
    """Return the backends, fastest first, with the reason why each can or cannot run here."""
    entries = []
    for call in (node for tree in _trees("ops") for node in ast.walk(tree)):
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Call)):
            continue
        name, backend = _registered_name(call.func, "BACKENDS"), call.args[0]
        if name and isinstance(backend.args[0], ast.Dict):
            computed = tuple(str(key.value) for key in backend.args[0].keys if isinstance(key, ast.Constant))
            kernels = next((ast.literal_eval(k.value) for k in backend.keywords if k.arg == "kernels"), ())
            entries.append(BackendEntry(name, computed + _implemented(name), *_outlook(kernels)))
    return entries


@functools.cache
def _implemented(backend: str) -> tuple[str, ...]:
    """The rules whose own files say ``@ops.implements(rule, backend)``."""
    calls = (
        decorator
        for tree in _trees("attention", "rules")
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "ops.implements"
    )
    named = (tuple(ast.literal_eval(argument) for argument in call.args) for call in calls)
    return tuple(rule for rule, computing in named if computing == backend)


def family_table() -> str:
    """Return who wrote what when, as a table in Markdown: the suite's own rules, maps and normalisations by year."""
    kinds = {"rules": "rule", "feature_maps": "map", "phi_norms": "normalisation"}
    rows = [
        (_first_year(part.source), kind, part)
        for registry, kind in kinds.items()
        for part in _built_in(registry)
        if part.source
    ]
    # a sort keeps the order of what came in one year
    lines = [
        "| " + " | ".join([str(year), kind, f"`{part.name}`", *(_cell(x) for x in (part.summary, part.source))]) + " |"
        for year, kind, part in sorted(rows, key=lambda row: row[0])
    ]
    return "\n".join(["| year | what | name | equation | source |", "|---|---|---|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _first_year(source: str) -> int:
    return min(int(year) for year in re.findall(r"\b(?:19|20)\d\d\b", source))


def _outlook(kernels: tuple[str, ...]) -> tuple[bool, str]:
    """Return whether all kernels can be expected to work here, and the first reason why not, or why."""
    outlooks = [compiled.outlook(kernel) for kernel in kernels] or [(True, "in PyTorch on any device")]
    return next((outlook for outlook in outlooks if not outlook[0]), outlooks[0])


def kernels() -> list[BackendEntry]:
    """Return the C++ kernels of the retrieval task; `auto` takes them where they are available."""
    rules_ = ("softmax", "sum", "delta", "fwm")
    return [BackendEntry(name, rules_, *compiled.outlook(name)) for name in ("pair_draws", "pair_training")]


def paper_names() -> list[PaperName]:
    """Return the paper's models as axes; the numbers are those of the released language-model code."""
    sum_axes, delta_axes = "sum, {}, attention_norm readout", "delta, {}, phi_norm sum"
    return [
        PaperName("Transformer / Softmax", "softmax, identity", "2"),
        PaperName("Linear Transformer / Linear", sum_axes.format("elu"), "34 (4)"),
        PaperName("Performer / FAVOR+ (m)", sum_axes.format("favor, n_features m"), "35 (5)"),
        PaperName("DPFP-nu (sum)", sum_axes.format("dpfp, nu"), "6 (36 is documented, not implemented)"),
        PaperName("Delta Network / Linear delta", delta_axes.format("elu"), "24 or 44, with skip"),
        PaperName("Performer delta", delta_axes.format("favor, n_features m"), "25 or 45, with skip"),
        PaperName("DPFP-nu delta", delta_axes.format("dpfp, nu"), "26 or 46, with skip"),
        PaperName("Delta Network, attention norm. yes", delta_axes.format("elu") + ", attention_norm both", "44"),
        PaperName("(released delta scripts as they are)", delta_axes.format("elu") + ", attention_norm readout", "24"),
        PaperName("Schlag (2021)", "fwm, tanh", "-"),
        PaperName("Schlag (2021) with DPFP-1", "fwm, dpfp, nu 1", "-"),
    ]


@functools.cache
def _trees(*folder: str) -> tuple[ast.Module, ...]:
    """The source of all files in a folder of the package."""
    files = sorted(_PACKAGE.joinpath(*folder).glob("*.py"))
    return tuple(ast.parse(path.read_text(encoding="utf-8")) for path in files)


def _imported_parts(registry: str, known: set[str]) -> list[Part]:
    """Parts that a user's own file registered; there are none unless something imported the registry."""
    loaded = sys.modules.get(f"fwp_lightning.attention.{registry}")
    live = getattr(loaded, registry.upper(), {})
    return [Part(name, _first_line(live[name].__doc__), live[name].source) for name in live if name not in known]


def _source(node: ast.ClassDef) -> str:
    """Return the text that the class assigns to ``source``."""
    values = (
        statement.value
        for statement in node.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "source"
    )
    return str(next((ast.literal_eval(value) for value in values), ""))


def _registered_name(node: ast.expr, registry: str) -> str | None:
    """Return "x" if the expression is ``REGISTRY.register("x")``."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "register"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == registry
        and isinstance(node.args[0], ast.Constant)
    ):
        return str(node.args[0].value)
    return None


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0] if docstring else ""
