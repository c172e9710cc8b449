"""Builds the C++ and CUDA kernels on first use, into a cache, and says in one sentence why where it cannot.

Nothing is compiled at installation. A library is found again by its kernel, the instruction set it is built for, its
source and flags, and the compiler; of PyTorch it takes raw pointers and links nothing, so another version of PyTorch
leaves it as it is. Two processes that build at once wait for each other. ``FWP_CACHE`` names another folder, ``CXX``
another compiler, ``FWP_ISA`` another instruction set, ``CUDA_HOME`` another CUDA toolkit; `fwp build-kernels` builds
ahead. A kernel is called by the stem of its C++ file (``recurrence``) or the name of its CUDA file (``recurrence.cu``).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
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
CUDA = "cuda"
CUDA_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler=-fPIC,-fno-strict-aliasing",
    # the driver is all that a machine needs
    "-cudart=static",
    # A100, H100 and H200; others from 8.0 on compile the last one when they load it
    "-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]",
    # registers and spills, kept beside the library
    "-Xptxas=-v",
    "--threads=2",
)
BUILD_SECONDS = 900
NO_COMPILER = "no C++ compiler was found (g++, or the one that CXX names)"
NO_CUDA_COMPILER = "no CUDA compiler was found (nvcc, on PATH or in the toolkit that CUDA_HOME names)"
_SEAL_BYTES = hashlib.sha256().digest_size


class KernelUnavailable(RuntimeError):
    """A kernel cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Recipe:
    """A library that can be built: a kernel in ``csrc`` for one instruction set, or for CUDA."""

    name: str
    level: str

    @property
    def source(self) -> Path:
        """The file that is compiled."""
        return SOURCES / (self.name if self.level == CUDA else f"{self.name}.cpp")

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told."""
        return CUDA_FLAGS if self.level == CUDA else (*FLAGS, *processor.compiler_flags(self.level))

    def compiler(self) -> tuple[str, ...]:
        """Return the compiler's command; raise ``KernelUnavailable`` if there is none."""
        return cuda_compiler() if self.level == CUDA else compiler()

    def fingerprint(self) -> str:
        """Return a hash of all that makes the library what it is, the compiler excepted."""
        headers = (path.read_text() for path in sorted(self.source.parent.glob("*.h")))
        described = "" if self.level == CUDA else processor.description(self.level)
        return _digest(self.source.read_text(), *headers, " ".join(self.flags), described)


def recipe_here(name: str) -> Recipe:
    """Return what a kernel is built as here; raise ``UserError`` where ``FWP_ISA`` asks for what cannot be."""
    return Recipe(name, CUDA if name.endswith(".cu") else processor.level())


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


def dense(x: Any) -> Any:
    """Return a tensor as a kernel can read it through a pointer: row after row, and no view that is negated lazily."""
    # most are: asking is cheaper than being given the same tensor again
    if x is None or (x.is_contiguous() and not x.is_neg()):
        return x
    return x.contiguous().resolve_neg()


def launch(kernel: str, function: str, dtype: Any, problem: ctypes.Structure, *tensors: Any, stream: int) -> None:
    """Queue ``function`` of a CUDA kernel on a stream, otherwise as ``call``; raise ``RuntimeError`` if refused."""
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    queue = _function(kernel, function, dtype, len(pointers) + 1, ctypes.c_int)
    raise_refused(kernel, queue(ctypes.addressof(problem), *pointers, stream))


def raise_refused(kernel: str, code: int) -> None:
    """Raise ``RuntimeError`` with CUDA's own words for an error code other than 0."""
    if code:
        words = getattr(library(kernel), f"fwp_{Path(kernel).stem}_words")
        words.restype = ctypes.c_char_p
        raise RuntimeError(f"CUDA refused {kernel}: {words(code).decode()} (error {code})")


@functools.cache
def _function(kernel: str, function: str, dtype: Any, n_pointers: int, result: Any = None) -> Callable[..., Any]:
    found = getattr(library(kernel), f"fwp_{Path(kernel).stem}_{function}_{str(dtype).removeprefix('torch.')}")
    found.argtypes, found.restype = (ctypes.c_void_p,) * (1 + n_pointers), result
    return found


# --- finding ---------------------------------------------------------------------------------------------------------


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Return the loaded library of a kernel, built if need be; raise ``KernelUnavailable`` with the reason.

    Raises ``UserError`` where ``FWP_ISA`` asks for what this processor lacks.
    """
    recipe = recipe_here(name)
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
        recipe = recipe_here(name)
        if recipe.level == CUDA and (lacking := why_no_device()):
            return False, lacking
        if _find(recipe):
            return True, f"built for {recipe.level}"
        command = recipe.compiler()
        target = _target(recipe, command)
        failure = _read(target.with_suffix(".failed")) or _why_not_writable(target.parent)
        if not failure and recipe.level != CUDA:
            failure = _why_not_compiling(command)
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


def cuda_compiler() -> tuple[str, ...]:
    """Return the command of nvcc; raise ``KernelUnavailable`` if there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            program = shutil.which(str(Path(home) / "bin" / "nvcc"))
            if program is None:
                raise KernelUnavailable(f"{variable}={home} has no bin/nvcc; name a CUDA toolkit's folder or unset it")
            return (program,)
    program = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if program is None:
        raise KernelUnavailable(NO_CUDA_COMPILER)
    return (program,)


@functools.cache
def why_no_device() -> str | None:
    """Return the reason why no CUDA device can be used here, or None; asks the driver, not PyTorch."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return "this PyTorch is built without CUDA"
    except metadata.PackageNotFoundError:
        # installed without its metadata: the driver decides
        pass
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1)"
    number = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    return "no CUDA device was found" if failed or number.value == 0 else None


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
        candidates = [_target(recipe, recipe.compiler())]
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


@functools.cache
def _why_not_compiling(command: tuple[str, ...]) -> str | None:
    """Return what a C++ compiler says where it cannot even preprocess an empty file: a matter of milliseconds."""
    try:
        result = subprocess.run(
            [*command, "-x", "c++", "-std=c++17", "-E", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shlex.join(command)} cannot be run: {error}"
    if result.returncode == 0 and result.stdout:
        return None
    return f"{command[0]} failed on an empty file: {_first_error(result.stderr, 'it wrote nothing and gave no reason')}"


def _digest(*parts: str) -> str:
    return hashlib.sha256(b"\0".join(part.encode() for part in parts)).hexdigest()[:16]


# --- building --------------------------------------------------------------------------------------------------------


def all_recipes(levels: list[str], *, cuda: bool) -> list[Recipe]:
    """Return what there is to build: the C++ kernels for these levels, and those of CUDA."""
    recipes = [Recipe(path.stem, level) for level in levels for path in sorted(SOURCES.glob("*.cpp"))]
    return recipes + [Recipe(path.name, CUDA) for path in sorted(SOURCES.glob("*.cu")) if cuda]


def build(recipe: Recipe) -> Path:
    """Return the library, built unless it is there; raise ``KernelUnavailable`` with the reason."""
    command = recipe.compiler()
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


def build_ahead(recipes: list[Recipe], tell: Callable[[str], None]) -> list[str]:
    """Build them all, telling one line each; return the reasons of those that could not be."""
    failures = []
    for recipe in recipes:
        start = time.monotonic()
        try:
            found = _find(recipe)
            path = found or build(recipe)
        except KernelUnavailable as error:
            failures.append(f"{recipe.name} for {recipe.level}: {error}")
            continue
        how = "was built before" if found else f"built in {time.monotonic() - start:.1f} s"
        tell(f"{recipe.name:16} {recipe.level:8} {how}: {path}")
        for target, line in device_code(_read(path.with_suffix(".log")) or "").items():
            tell(f"{recipe.name:16} {target:8} {line}")
    return failures


def device_code(log: str) -> dict[str, str]:
    """Return for each GPU that ``nvcc -Xptxas=-v`` compiled for the registers a thread takes and what did not fit."""
    found: dict[str, list[tuple[int, int]]] = {}
    for entry in log.split("Compiling entry function")[1:]:
        target = re.search(r"for '(sm_\w+)'", entry)
        registers, spilled = re.search(r"Used (\d+) registers", entry), re.findall(r"(\d+) bytes spill", entry)
        if target and registers:
            found.setdefault(target[1], []).append((int(registers[1]), sum(map(int, spilled))))
    lines = {}
    for target_, kernels in found.items():
        least, most = min(n for n, _ in kernels), max(n for n, _ in kernels)
        spilling = [n for _, n in kernels if n]
        spills = f"{len(spilling)} spill, up to {max(spilling)} bytes a thread" if spilling else "no spills"
        lines[target_] = f"{len(kernels)} kernels, {least} to {most} registers a thread, {spills}"
    return lines


def _compile(command: list[str], source: str, target: Path) -> None:
    log.info("building %s, once", target)
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
            reason = _first_error(result.stderr, "it wrote no library and gave no reason")
            reason = f"{command[0]} failed on {source}: {reason}"
            # `fwp list` can say so without trying again
            failed.write_text(reason)
            raise KernelUnavailable(reason)
        # what the compiler said; of CUDA kernels also their registers
        target.with_suffix(".log").write_text(result.stdout + result.stderr)
        _seal(built)
        os.replace(built, target)
    failed.unlink(missing_ok=True)


def _first_error(said: str, otherwise: str) -> str:
    """Return the line that matters of what a compiler wrote to stderr."""
    lines = said.strip().splitlines() or [otherwise]
    return next((line for line in lines if re.search("error|fatal", line, re.IGNORECASE)), lines[0]).strip()


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
    try:
        # some file systems refuse what rights allow
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        return _not_kept(folder, error)
    return None


def _not_kept(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"kernels cannot be kept in {folder} ({reason}); set FWP_CACHE to a folder of yours"


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
