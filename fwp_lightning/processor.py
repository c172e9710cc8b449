"""The instruction sets that kernels are built for, and the one that this processor runs: ``FWP_ISA`` names another."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from fwp_lightning.errors import UserError

# the levels of the x86-64 psABI, as features in the names of /proc/cpuinfo; widest first
_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
LEVELS: dict[str, tuple[str, ...]] = {"v4": _V4, "v3": _V3, "baseline": ()}
# where the compiler calls a feature something else; features one by one, since -march=x86-64-v4 needs GCC 11
_FLAG_OF = {"bmi1": "bmi", "abm": "lzcnt"}
NATIVE = "native"
"""What kernels are built for where the levels do not apply: the very processor that builds them."""


def level() -> str:
    """Return the level that kernels are built for and loaded at here; raise ``UserError`` if ``FWP_ISA`` cannot be."""
    asked = os.environ.get("FWP_ISA")
    if asked:
        return _checked(asked)
    if not levels_apply():
        return NATIVE
    return next(name for name, needed in LEVELS.items() if features().issuperset(needed))


def levels_to_build(asked: str | None) -> list[str]:
    """Return the levels that ``all`` or the name of one means, or this processor's own; others may be built too."""
    if asked is None:
        return [level()]
    if not levels_apply():
        raise UserError(f"--isa {asked} names levels of x86-64, but this is {platform.machine()}; leave it out.")
    return list(LEVELS) if asked == "all" else [asked]


def levels_apply() -> bool:
    """Return whether this is an x86-64 processor whose features can be read."""
    return platform.machine().lower() in {"x86_64", "amd64"} and bool(features())


@functools.cache
def features() -> frozenset[str]:
    """Return the processor's features as the kernel of Linux names them; none elsewhere."""
    return frozenset(_feature_line().partition(":")[2].split())


def compiler_flags(name: str) -> tuple[str, ...]:
    """Return what makes a compiler build for a level."""
    if name == NATIVE:
        # on Arm -march=native leaves out what is tuned for the core
        return ("-mcpu=native",) if platform.machine().lower() in {"aarch64", "arm64"} else ("-march=native",)
    return tuple(f"-m{_FLAG_OF.get(feature, feature)}" for feature in LEVELS[name])


def description(name: str) -> str:
    """Return what a library built for a level depends on beside its flags: with ``native``, the processor."""
    return (_feature_line() or platform.processor() or platform.machine()) if name == NATIVE else ""


def _checked(asked: str) -> str:
    if asked not in LEVELS:
        raise UserError(f"FWP_ISA={asked} is not known; choose one of {', '.join(LEVELS)}, or unset it.")
    if not levels_apply():
        raise UserError(
            f"FWP_ISA={asked} chooses among the levels of x86-64, but this is {platform.machine()}; unset it."
        )
    missing = [feature for feature in LEVELS[asked] if feature not in features()]
    if missing:
        raise UserError(f"FWP_ISA={asked} needs {', '.join(missing)}, which this processor does not have; unset it.")
    return asked


def _feature_line() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
