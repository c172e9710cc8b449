"""The fwm rule compiled for the CPU: chunks of steps as small matrix products (``csrc/fwm_memory.h``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import compiled
from fwp_lightning.ops import reference
from fwp_lightning.ops.first_order import first_order

KERNEL = "fwm"
_DTYPES = (torch.float32, torch.float64)


def why_not(k: Tensor) -> str | None:
    """Return the sentence why the kernel cannot take tensors like ``k``, or None; it is built if need be."""
    if k.device.type != "cpu":
        return f"backend 'cpu' cannot compute on {k.device}; choose scan or auto"
    if reference.state_dtype(k.dtype) not in _DTYPES:
        return f"backend 'cpu' has no fwm rule for {k.dtype}; give it float32 or float64, or choose scan"
    return compiled.why_unavailable(KERNEL)


def fwm_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.fwm_rule``."""
    # the kernel divides by the width of its rows
    if not (k.shape[-1] and v.shape[-1]):
        return reference.fwm_rule(q, k, v, beta, state)
    o, last = _FwmRecurrence.apply(q, k, v, beta, state)
    return (None if q is None else o), last


class _Problem(ctypes.Structure):
    """``Problem<Real>`` of the C++ source."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "threads")] + [
        (name, ctypes.c_void_p) for name in ("q", "k", "v", "beta", "state")
    ]


class _FwmRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inputs = [compiled.dense(x) for x in (q, k, v, beta, state)]
        problem = _problem(inputs)
        b, _, h, n_features = k.shape
        o = v.new_empty(0 if q is None else v.shape)
        last = v.new_empty(b, h, n_features, v.shape[-1])
        # what is kept for backward: errors and scales of all steps, memories of some
        kept = None
        if any(ctx.needs_input_grad):
            kept = v.new_empty(b * h * compiled.count(KERNEL, "kept", k.dtype, problem))
        compiled.call(KERNEL, "forward", k.dtype, problem, None if q is None else o, last, kept, _scratch(problem, k))
        ctx.save_for_backward(*inputs, kept)
        return o, last

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        problem, k = _problem(inputs), inputs[1]
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        incoming = (compiled.dense(grad_o), compiled.dense(grad_last))
        compiled.call(KERNEL, "backward", k.dtype, problem, kept, *incoming, *gradients, _scratch(problem, k))
        return tuple(gradients)


def _problem(inputs: list[Tensor | None]) -> _Problem:
    _, k, v, *_ = inputs
    assert k is not None
    assert v is not None
    b, t, h, n_features = k.shape
    threads = max(1, min(torch.get_num_threads(), b * h))
    return _Problem(b, t, h, n_features, v.shape[-1], threads, *(None if x is None else x.data_ptr() for x in inputs))


def _scratch(problem: _Problem, like: Tensor) -> Tensor:
    return like.new_empty(compiled.count(KERNEL, "scratch", like.dtype, problem))
