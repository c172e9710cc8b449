"""The sum and delta rules compiled for the CPU: the recurrence itself, in registers (``csrc/recurrence.cpp``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fwp_lightning import compiled
from fwp_lightning.ops import chunked

KERNEL = "recurrence"
# steps between kept states: K V / 32 numbers a step are kept, and 32 memories of one block are written again at a time
INTERVAL = 32
_DTYPES = (torch.float32, torch.float64)


def why_not(k: Tensor) -> str | None:
    """Return the sentence why the kernel cannot take tensors like ``k``, or None; it is built if need be."""
    if k.device.type != "cpu":
        return f"backend 'cpu' cannot compute on {k.device}; choose chunked or auto"
    if k.dtype not in _DTYPES:
        return f"backend 'cpu' has no {k.dtype}; give it float32 or float64, or choose chunked"
    return compiled.why_unavailable(KERNEL)


def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.sum_rule``."""
    if not causal:
        # two matrix products: there is no recurrence to compile
        return chunked.sum_rule(q, k, v, state, causal=False)
    return _apply(q, k, v, None, state)


def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.delta_rule``."""
    return _apply(q, k, v, beta, state)


def _apply(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    o, last = _Recurrence.apply(q, k, v, beta, state)
    return (None if q is None else o), last


class _Problem(ctypes.Structure):
    """``Problem<Real>`` of the C++ source."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "delta", "interval", "threads")
    ] + [(name, ctypes.c_void_p) for name in ("q", "k", "v", "beta", "state")]


class _Recurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inputs = [None if x is None else x.contiguous() for x in (q, k, v, beta, state)]
        problem = _problem(inputs)
        b, t, h, n_features = k.shape
        o = torch.empty_like(inputs[2]) if q is not None else v.new_empty(0)  # type: ignore[arg-type]
        errors = torch.empty_like(inputs[2]) if beta is not None else v.new_empty(0)  # type: ignore[arg-type]
        last = v.new_empty(b, h, n_features, v.shape[-1])
        checkpoints = v.new_empty(b, h, -(-t // INTERVAL), n_features, v.shape[-1])
        _call("forward", problem, k, o, errors, last, checkpoints)
        ctx.save_for_backward(*inputs, errors, checkpoints)
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, errors, checkpoints = ctx.saved_tensors
        q, k, v, beta, state = inputs
        problem = _problem(inputs)
        grad_q = torch.empty_like(k) if q is not None else k.new_empty(0)
        grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(grad_last)
        # one contribution per sixteen columns is added to each
        grad_beta = k.new_zeros(k.shape[:3])
        removed = torch.empty_like(errors)
        buffers = (removed, grad_q, grad_k, grad_v, grad_beta, grad_state.contiguous())
        _call("backward", problem, k, errors, checkpoints, grad_o.contiguous(), grad_last.contiguous(), *buffers)
        return (
            None if q is None else grad_q,
            grad_k,
            grad_v,
            None if beta is None else grad_beta,
            None if state is None else buffers[-1],
        )


def _problem(inputs: list[Tensor | None]) -> _Problem:
    _, k, v, beta, _ = inputs
    assert k is not None
    assert v is not None
    b, t, h, n_features = k.shape
    threads = max(1, min(torch.get_num_threads(), b * h))
    sizes = (b, t, h, n_features, v.shape[-1], beta is not None, INTERVAL, threads)
    return _Problem(*sizes, *(None if x is None else x.data_ptr() for x in inputs))


def _call(direction: str, problem: _Problem, like: Tensor, *buffers: Tensor) -> None:
    scratch = like.new_empty(compiled.count(KERNEL, "scratch", like.dtype, problem))
    compiled.call(KERNEL, direction, like.dtype, problem, *buffers, scratch)
