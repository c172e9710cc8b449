"""Builds the C++ kernels on first use, into a cache, and says in one sentence why where it cannot.

Nothing is compiled at installation. A built library is found again by its source, compiler, flags and processor; two
processes that build at once wait for each other. ``FWP_CACHE`` names another folder, ``CXX`` another compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

SOURCES = Path(__file__).parent / "ops" / "csrc"
FLAGS = (
    "-O3",
    "-march=native",
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


class KernelUnavailable(RuntimeError):
    """A kernel cannot be used here; the message is the reason."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Return the loaded library built from ``csrc/<name>.cpp``; raise ``KernelUnavailable`` with the reason."""
    try:
        return ctypes.CDLL(str(_built(name)))
    except OSError as error:
        raise KernelUnavailable(f"the kernel {name} cannot be loaded: {error}") from error


@functools.cache
def why_unavailable(name: str) -> str | None:
    """Return the reason why a kernel cannot be used here, or None; builds it if it is not there yet."""
    try:
        library(name)
    except KernelUnavailable as error:
        return str(error)
    return None


def outlook(name: str) -> tuple[bool, str]:
    """Return whether a kernel can be expected to work here and why, without building it."""
    cxx = compiler()
    if cxx is None:
        return False, NO_COMPILER
    try:
        built = _target(name, cxx).is_file()
    except OSError as error:
        return (
            False,
            f"the cache folder {cache_folder()} cannot be read ({error.strerror}); set FWP_CACHE to a folder of yours",
        )
    return True, "built" if built else f"{Path(cxx).name} builds it on first use, once"


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None."""
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Return the folder of built kernels."""
    base = os.environ.get("FWP_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp_lightning"


def _built(name: str) -> Path:
    cxx = compiler()
    if cxx is None:
        raise KernelUnavailable(NO_COMPILER)
    target = _target(name, cxx)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=BUILD_SECONDS):
            if not target.is_file():
                _compile(cxx, SOURCES / f"{name}.cpp", target)
    except Timeout as error:
        raise KernelUnavailable(f"another process has been building {name} for over {BUILD_SECONDS} s") from error
    except OSError as error:
        raise KernelUnavailable(
            f"kernels cannot be kept in {target.parent} ({error.strerror}); set FWP_CACHE to a folder of yours"
        ) from error
    return target


def _target(name: str, cxx: str) -> Path:
    return cache_folder() / f"{name}-{_fingerprint(SOURCES / f'{name}.cpp', cxx)}.so"


def _compile(cxx: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [cxx, *FLAGS, str(source), "-o", str(built)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"{cxx} took over {BUILD_SECONDS} s for {source.name}") from error
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise KernelUnavailable(f"{cxx} failed on {source.name}: {first}")
        os.replace(built, target)


def _fingerprint(source: Path, cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    headers = (path.read_text() for path in sorted(source.parent.glob("*.h")))
    for part in (source.read_text(), *headers, version, " ".join(FLAGS), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
