"""Peak memory: of a process as Linux counts it, or of a GPU as PyTorch does."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Start the peak memory anew: a process trains many runs, and its peak only ever grows."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory since ``reset_peak_memory``: of the GPU if it is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        return _kibibytes("VmHWM") / 2**10
    except (OSError, LookupError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def needed_memory_mb(function: Callable[[], object], device: str) -> float | None:
    """Return the MiB that a call needs at its peak beyond what was there; None where the system does not say.

    On a CPU that is resident memory as Linux counts it, the kernels' own buffers included.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # what was freed goes back to the system, or it would be used again unseen
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        resident = _kibibytes("VmRSS")
        function()
        return (_kibibytes("VmHWM") - resident) / 2**10
    except (OSError, AttributeError, LookupError):
        return None


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])
