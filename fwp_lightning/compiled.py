"""Builds the C++ kernels on first use, into a cache, and says in one sentence why where it cannot.

Nothing is compiled at installation. A library is found again by its kernel, the instruction set it is built for, its
source and flags, and the compiler; of PyTorch it takes raw pointers and links nothing, so another version of PyTorch
leaves it as it is. Two processes that build at once wait for each other. ``FWP_CACHE`` names another folder, ``CXX``
another compiler, ``FWP_ISA`` another instruction set; `fwp build-kernels` builds ahead.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fwp_lightning import processor
from fwp_lightning.errors import UserError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "ops" / "csrc"
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    # vectors are read through pointers to their elements
    "-fno-strict-aliasing",
    # errno and traps would stop the compiler from vectorising; NaN and infinity stay as they are
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    # heads are spread over torch's number of threads
    "-fopenmp",
)
BUILD_SECONDS = 300
NO_COMPILER = "no C++ compiler was found (g++, or the one that CXX names)"
_SEAL_BYTES = hashlib.sha256().digest_size


class KernelUnavailable(RuntimeError):
    """A kernel cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Recipe:
    """A library that can be built: the kernel ``csrc/<name>.cpp`` for one instruction set."""

    name: str
    level: str

    @property
    def source(self) -> Path:
        """The file that is compiled."""
        return SOURCES / f"{self.name}.cpp"

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told."""
        return (*FLAGS, *processor.compiler_flags(self.level))

    def fingerprint(self) -> str:
        """Return a hash of all that makes the library what it is, the compiler excepted."""
        headers = (path.read_text() for path in sorted(self.source.parent.glob("*.h")))
        parts = (self.source.read_text(), *headers, " ".join(self.flags), processor.description(self.level))
        return _digest(*parts)


# --- calling ---------------------------------------------------------------------------------------------------------


def call(kernel: str, function: str, dtype: Any, problem: ctypes.Structure, *tensors: Any) -> None:
    """Call ``fwp_<kernel>_<function>_<dtype>(problem, tensors...)`` of a kernel; an absent tensor is None.

    It gets raw pointers: the caller answers for dtype, device and contiguity, and holds the tensors meanwhile. Raises
    ``KernelUnavailable`` with the reason.
    """
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    _function(kernel, function, dtype, len(pointers))(ctypes.addressof(problem), *pointers)


def count(kernel: str, function: str, dtype: Any, problem: ctypes.Structure) -> int:
    """Return what ``fwp_<kernel>_<function>_<dtype>(problem)`` returns: how many numbers a buffer needs."""
    return int(_function(kernel, function, dtype, 0, ctypes.c_int64)(ctypes.addressof(problem)))


@functools.cache
def _function(kernel: str, function: str, dtype: Any, n_tensors: int, result: Any = None) -> Callable[..., Any]:
    found = getattr(library(kernel), f"fwp_{kernel}_{function}_{str(dtype).removeprefix('torch.')}")
    found.argtypes, found.restype = (ctypes.c_void_p,) * (1 + n_tensors), result
    return found


# --- finding ---------------------------------------------------------------------------------------------------------


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Return the loaded library built from ``csrc/<name>.cpp``; raise ``KernelUnavailable`` with the reason.

    Raises ``UserError`` where ``FWP_ISA`` asks for what this processor lacks.
    """
    recipe = Recipe(name, processor.level())
    path = _find(recipe) or build(recipe)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(
            f"the kernel {name} cannot be loaded ({error}); delete it, or set FWP_CACHE to another folder"
        ) from error


@functools.cache
def why_unavailable(name: str) -> str | None:
    """Return the reason why a kernel cannot be used here, or None; builds it if it is not there yet."""
    try:
        library(name)
    except KernelUnavailable as error:
        log.warning("without the compiled kernel %s: %s", name, error)
        return str(error)
    return None


def outlook(name: str) -> tuple[bool, str]:
    """Return whether a kernel can be expected to work here and why, without building it."""
    try:
        recipe = Recipe(name, processor.level())
        if _find(recipe):
            return True, f"built for {recipe.level}"
        command = compiler()
        target = _target(recipe, command)
        failure = _read(target.with_suffix(".failed")) or _why_not_writable(target.parent)
    except (KernelUnavailable, UserError) as error:
        return False, str(error)
    if failure:
        return False, failure
    return True, f"{shlex.join([Path(command[0]).name, *command[1:]])} builds it on first use, once"


def compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler; raise ``KernelUnavailable`` if there is none."""
    asked = os.environ.get("CXX", "").strip()
    try:
        words = shlex.split(asked)
    except ValueError:
        words = [asked]
    if words:
        program = shutil.which(words[0])
        if program is None:
            raise KernelUnavailable(f"CXX={asked} names no program; name a C++ compiler or unset it")
        return (program, *words[1:])
    program = shutil.which("g++") or shutil.which("c++")
    if program is None:
        raise KernelUnavailable(NO_COMPILER)
    return (program,)


def cache_folder() -> Path:
    """Return the folder of built kernels; raise ``KernelUnavailable`` if there is no place for it."""
    base, above = os.environ.get("FWP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if base:
            return Path(base).expanduser().absolute()
        return (Path(above) if above else Path.home() / ".cache").absolute() / "fwp_lightning"
    except RuntimeError as error:
        raise KernelUnavailable("there is no home folder to keep kernels in; set FWP_CACHE to a folder") from error


def _find(recipe: Recipe) -> Path | None:
    """Return the library in the cache, whole, or None; where there is no compiler, one that another compiler built."""
    try:
        candidates = [_target(recipe, compiler())]
    except KernelUnavailable:
        candidates = sorted(cache_folder().glob(f"{recipe.name}-{recipe.level}-{recipe.fingerprint()}-*.so"))
    return next((path for path in candidates if _is_whole(path)), None)


def _target(recipe: Recipe, command: tuple[str, ...]) -> Path:
    return cache_folder() / f"{recipe.name}-{recipe.level}-{recipe.fingerprint()}-{_compiler_digest(command)}.so"


@functools.cache
def _compiler_digest(command: tuple[str, ...]) -> str:
    """A hash of the compiler's version and of the C library, which a library needs at least as new to be loaded."""
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{shlex.join(command)} does not answer --version: {error}") from error
    names = os.confstr_names if hasattr(os, "confstr_names") else {}
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in names else ""
    return _digest(*command[1:], version.stdout, libc or "")[:8]


def _digest(*parts: str) -> str:
    return hashlib.sha256(b"\0".join(part.encode() for part in parts)).hexdigest()[:16]


# --- building --------------------------------------------------------------------------------------------------------


def kernels() -> list[str]:
    """Return the names of all kernels."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def build(recipe: Recipe) -> Path:
    """Return the library, built unless it is there; raise ``KernelUnavailable`` with the reason."""
    command = compiler()
    target = _target(recipe, command)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=BUILD_SECONDS):
            if not _is_whole(target):
                _compile([*command, *recipe.flags, str(recipe.source)], recipe.source.name, target)
    except Timeout as error:
        raise KernelUnavailable(
            f"another process has been building {recipe.name} for over {BUILD_SECONDS} s"
        ) from error
    # filelock says with NotImplementedError that a file system has no locks
    except (OSError, NotImplementedError) as error:
        raise KernelUnavailable(_not_kept(target.parent, error)) from error
    return target


def build_ahead(levels: list[str], tell: Callable[[str], None]) -> list[str]:
    """Build every kernel for these levels, telling one line each; return the reasons of those that could not be."""
    failures = []
    for recipe in (Recipe(name, level) for level in levels for name in kernels()):
        start = time.monotonic()
        try:
            found = _find(recipe)
            path = found or build(recipe)
        except KernelUnavailable as error:
            failures.append(f"{recipe.name} for {recipe.level}: {error}")
            continue
        how = "was built before" if found else f"built in {time.monotonic() - start:.1f} s"
        tell(f"{recipe.name:16} {recipe.level:8} {how}: {path}")
    return failures


def _compile(command: list[str], source: str, target: Path) -> None:
    failed = target.with_suffix(".failed")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        try:
            result = subprocess.run(
                [*command, "-o", str(built)], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"{command[0]} took over {BUILD_SECONDS} s for {source}") from error
        if result.returncode != 0 or not built.is_file():
            lines = result.stderr.strip().splitlines() or ["it wrote no library and gave no reason"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            reason = f"{command[0]} failed on {source}: {first.strip()}"
            # `fwp list` can say so without trying again
            failed.write_text(reason)
            raise KernelUnavailable(reason)
        _seal(built)
        os.replace(built, target)
    failed.unlink(missing_ok=True)


def _seal(path: Path) -> None:
    """Append the hash of a library to it, which loaders ignore: loading one that was cut short ends the process."""
    with path.open("r+b") as file:
        content = file.read()
        file.write(hashlib.sha256(content).digest())


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KernelUnavailable(_not_kept(path.parent, error)) from error
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]


def _why_not_writable(folder: Path) -> str | None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return _not_kept(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        return _not_kept(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return None


def _not_kept(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"kernels cannot be kept in {folder} ({reason}); set FWP_CACHE to a folder of yours"


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
