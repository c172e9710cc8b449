"""What can be chosen, for `fwp list`: read from the decorators in the source, so that listing imports no torch."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

from fwp_lightning import compiled

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    """A rule or feature map: the name written in YAML and the first line of its docstring."""

    name: str
    summary: str


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


def rules() -> list[Part]:
    """Return the registered update rules."""
    return _parts("rules", "RULES")


def feature_maps() -> list[Part]:
    """Return the registered feature maps."""
    return _parts("feature_maps", "FEATURE_MAPS")


def backends() -> list[BackendEntry]:
    """Return the backends, fastest first, with the reason why each can or cannot run here."""
    entries = []
    for call in ast.walk(ast.parse((_PACKAGE / "ops" / "backends.py").read_text())):
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Call)):
            continue
        name, backend = _registered_name(call.func, "BACKENDS"), call.args[0]
        if name and isinstance(backend.args[0], ast.Dict):
            computed = tuple(str(key.value) for key in backend.args[0].keys if isinstance(key, ast.Constant))
            kernels = next((ast.literal_eval(k.value) for k in backend.keywords if k.arg == "kernels"), ())
            entries.append(BackendEntry(name, computed, *_outlook(kernels)))
    return entries


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


def _parts(module: str, registry: str) -> list[Part]:
    found = []
    for node in ast.parse((_PACKAGE / "attention" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                name = _registered_name(decorator, registry)
                if name:
                    found.append(Part(name, _first_line(ast.get_docstring(node))))
    return found + _imported_parts(module, registry, {part.name for part in found})


def _imported_parts(module: str, registry: str, known: set[str]) -> list[Part]:
    """Parts that a user's own file registered; there are none unless something imported the registry."""
    loaded = sys.modules.get(f"fwp_lightning.attention.{module}")
    live = getattr(loaded, registry, {})
    return [Part(name, _first_line(live[name].__doc__)) for name in live if name not in known]


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
