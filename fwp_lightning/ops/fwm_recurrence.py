"""The fwm rule compiled for the CPU: chunks of steps as small matrix products (``csrc/fwm_memory.h``)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fwp_lightning import compiled
from fwp_lightning.ops import reference
from fwp_lightning.ops.operators import CompiledRule, Tensors, why_unavailable

KERNEL = "fwm"
_DTYPES = (torch.float32, torch.float64)
# of a part of a sequence
_STEPS = 32


def why_not(k: Tensor) -> str | None:
    """Return the sentence why the kernel cannot take tensors like ``k``, or None; it is built if need be."""
    if k.device.type != "cpu":
        return f"backend 'cpu' cannot compute on {k.device}; choose scan or auto"
    if reference.state_dtype(k.dtype) not in _DTYPES:
        return f"backend 'cpu' has no fwm rule for {k.dtype}; give it float32 or float64, or choose scan"
    return why_unavailable(KERNEL)


def fwm_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.fwm_rule``."""
    # the kernel divides by the width of its rows
    if not (k.shape[-1] and v.shape[-1]):
        return reference.fwm_rule(q, k, v, beta, state)
    o, last = RULE((), q, k, v, beta, state)
    return (None if q is None else o), last


class _Problem(ctypes.Structure):
    """``Problem<Real>`` of the C++ source."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "threads")] + [
        (name, ctypes.c_void_p) for name in ("q", "k", "v", "beta", "state")
    ]


def _problem(inputs: Tensors) -> _Problem:
    _, k, v, *_ = inputs
    b, t, h, n_features = k.shape
    threads = max(1, min(torch.get_num_threads(), b * h))
    return _Problem(b, t, h, n_features, v.shape[-1], threads, *(None if x is None else x.data_ptr() for x in inputs))


def _scratch(problem: _Problem, like: Tensor) -> Tensor:
    return like.new_empty(compiled.count(KERNEL, "scratch", like.dtype, problem))


@functools.cache
def _kept_numbers(dtype: torch.dtype, n_features: int, d_value: int) -> int:
    """Return how many numbers are kept of one part of a sequence; those of all parts hold what the whole one keeps."""
    return compiled.count(KERNEL, "kept", dtype, _Problem(1, _STEPS, 1, n_features, d_value, 1))


def _allocate(inputs: Tensors, *, keep: bool) -> Tensors:
    """Return outputs, last memory, and for the backward pass errors and scales of all steps and memories of some."""
    q, k, v, *_ = inputs
    b, t, h, n_features = k.shape
    kept = None
    if keep:
        # whole parts of a sequence: for a tracer t is no number, but sizes of a memory are
        parts = b * h * max(1, -(-t // _STEPS))
        kept = v.new_empty(parts * _kept_numbers(k.dtype, int(n_features), int(v.shape[-1])))
    return [None if q is None else torch.empty_like(v), v.new_empty(b, h, n_features, v.shape[-1]), kept]


def _forward(inputs: Tensors, outputs: Tensors) -> None:
    problem, k = _problem(inputs), inputs[1]
    compiled.call(KERNEL, "forward", k.dtype, problem, *outputs, _scratch(problem, k))


def _backward(inputs: Tensors, saved: Tensors, incoming: Tensors) -> Tensors:
    problem, (q, k, v, *_), (grad_o, grad_last) = _problem(inputs), inputs, incoming
    if grad_o is None and q is not None:
        grad_o = torch.zeros_like(v)
    gradients = [None if x is None else torch.empty_like(x) for x in inputs]
    scratch = _scratch(problem, k)
    compiled.call(KERNEL, "backward", k.dtype, problem, *saved, grad_o, grad_last, *gradients, scratch)
    return gradients


RULE = CompiledRule(
    "fwm_recurrence",
    "CPU",
    inputs="Tensor? q, Tensor k, Tensor v, Tensor beta, Tensor? state",
    results=("o", "last"),
    saved=("kept",),
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
)
