"""The sum and delta rules compiled for the CPU (``csrc/recurrence.cpp``), with phi and normalisers if asked to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import compiled
from fwp_lightning.ops import chunked, reference
from fwp_lightning.ops.first_order import first_order

KERNEL = "recurrence"
_DTYPES = (torch.float32, torch.float64)
# the enum of feature_rows.h
_MAPS = {"identity": 0, "elu": 1, "dpfp": 2}


@dataclass(frozen=True)
class FusedMemory:
    """What one kernel computes around the recurrence: axes of an attention, as far as it has them."""

    feature_map: str = "identity"
    nu: int = 1
    phi_norm: str = "none"
    key_norm_eps: float = 0.0
    query_norm_eps: float = 0.0
    attention_norm: str = "none"
    attention_norm_eps: float = 0.0

    def why_not(self, k: Tensor) -> str | None:
        """Return the sentence why the kernel cannot compute this for keys ``[B, T, H, D]``, or None if it can."""
        choices = {"feature_map": _MAPS, "phi_norm": ("none", "sum"), "attention_norm": ("none", "readout")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                return f"the compiled recurrence has no {name}={getattr(self, name)}; it has {', '.join(known)}"
        if not k.shape[-1]:
            return f"k has shape {tuple(k.shape)}; the compiled recurrence needs keys of at least one number"
        return why_not(k)

    def n_features(self, size: int) -> int:
        """Return K for keys of a size."""
        return 2 * size * self.nu if self.feature_map == "dpfp" else size

    def flags(self) -> list[int]:
        """Return map, nu, and whether features and read-out are normalised, as the kernel takes them."""
        return [_MAPS[self.feature_map], self.nu, self.phi_norm == "sum", self.attention_norm == "readout"]

    def eps(self) -> list[float]:
        """Return what is added to the sums that keys, queries and read-outs are divided by."""
        return [self.key_norm_eps, self.query_norm_eps, self.attention_norm_eps]


_PLAIN = FusedMemory()


def why_not(k: Tensor) -> str | None:
    """Return the sentence why the kernel cannot take tensors like ``k``, or None; it is built if need be."""
    if k.device.type != "cpu":
        return f"backend 'cpu' cannot compute on {k.device}; choose chunked or auto"
    if reference.state_dtype(k.dtype) not in _DTYPES:
        return f"backend 'cpu' has no {k.dtype}; give it float32 or float64, or choose chunked"
    return _why_unavailable()


@torch.compiler.assume_constant_result
def _why_unavailable() -> str | None:
    return compiled.why_unavailable(KERNEL)


def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.sum_rule``."""
    if not causal:
        # two matrix products: there is no recurrence to compile
        return chunked.sum_rule(q, k, v, state, causal=False)
    if not k.shape[-1]:
        return reference.sum_rule(q, k, v, state)
    return fused(_PLAIN, q, k, v, None, state, None)[:2]


def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.delta_rule``."""
    if not k.shape[-1]:
        return reference.delta_rule(q, k, v, beta, state)
    return fused(_PLAIN, q, k, v, beta, state, None)[:2]


def fused(
    memory: FusedMemory,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return outputs ``[B, T, H, V]``, the last state and, if the read-out is normalised, the last ``z`` ``[B, H, K]``.

    Without ``beta`` it is the sum rule. Tensors must fit together; ``ops.fused_rule`` checks them.
    """
    inputs = (q, k, v, beta, state, z)
    if torch.compiler.is_compiling() or type(k) not in (Tensor, torch.nn.Parameter):
        # a tracer sees one operator; otherwise the shorter way: the dispatcher costs as much again as autograd
        o, last, last_z, *_ = torch.ops.fwp_lightning.recurrence(*inputs, memory.flags(), memory.eps())
    else:
        o, last, last_z = _Recurrence.apply(memory.flags(), memory.eps(), *inputs)
    return (None if q is None else o), last, (last_z if memory.attention_norm == "readout" else None)


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "delta", "threads")),
        *((name, ctypes.c_int64) for name in ("map", "nu", "size", "normalise_features", "normalise_readout")),
        *((name, ctypes.c_double) for name in ("key_eps", "query_eps", "readout_eps")),
    ]


def _problem(k: Tensor, v: Tensor, beta: Tensor | None, flags: list[int], eps: list[float]) -> _Problem:
    b, t, h, size = k.shape
    feature_map, nu, normalise_features, normalise_readout = flags
    n_features = 2 * size * nu if feature_map == _MAPS["dpfp"] else size
    threads = max(1, min(torch.get_num_threads(), b * h))
    sizes = (b, t, h, n_features, v.shape[-1], beta is not None, threads)
    return _Problem(*sizes, feature_map, nu, size, normalise_features, normalise_readout, *eps)


def _forward(inputs: list[Tensor | None], flags: list[int], eps: list[float], *, keep: bool) -> tuple[Tensor, ...]:
    """Return outputs, last state, last z, and for the backward pass errors and scales; what does not exist is empty."""
    q, k, v, beta, *_ = inputs = [compiled.dense(x) for x in inputs]
    assert k is not None
    assert v is not None
    problem = _problem(k, v, beta, flags, eps)
    b, t, h, _ = k.shape
    none = v.new_empty(0)
    o = none if q is None else torch.empty_like(v)
    errors = torch.empty_like(v) if keep and beta is not None else none
    last, last_z, scale = v.new_empty(b, h, problem.keys, problem.values), none, none
    if problem.normalise_readout:
        last_z = v.new_empty(b, h, problem.keys)
        scale = none if q is None else v.new_empty(b, t, h)
    compiled.call(KERNEL, "forward", k.dtype, problem, *inputs, o, errors, scale, last, last_z)
    return o, last, last_z, errors, scale


def _backward(
    inputs: list[Tensor | None], saved: list[Tensor], incoming: list[Tensor | None], flags: list[int], eps: list[float]
) -> list[Tensor | None]:
    """Return gradients of q, k, v, beta, state and z; ``saved`` are outputs, errors and scales."""
    q, k, v, beta, *_ = inputs = [compiled.dense(x) for x in inputs]
    assert k is not None
    assert v is not None
    grad_o, *grad_states = (compiled.dense(x) for x in incoming)
    if grad_o is None and q is not None:
        grad_o = torch.zeros_like(v)
    gradients = [None if x is None else torch.empty_like(x) for x in inputs]
    problem = _problem(k, v, beta, flags, eps)
    compiled.call(KERNEL, "backward", k.dtype, problem, *inputs, *saved, grad_o, *grad_states, *gradients)
    return gradients


class _Recurrence(Function):
    @staticmethod
    def forward(ctx: Any, flags: list[int], eps: list[float], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        o, last, last_z, errors, scale = _forward(list(inputs), flags, eps, keep=any(ctx.needs_input_grad))
        ctx.options = flags, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, o, errors, scale)
        return o, last, last_z

    @staticmethod
    @first_order
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        return (None, None, *_backward(list(tensors[:6]), list(tensors[6:]), list(incoming), *ctx.options))


# --- as an operator that tracers know -------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("fwp_lightning", "DEF")
_INPUTS = "Tensor? q, Tensor k, Tensor v, Tensor? beta, Tensor? state, Tensor? z"
_OPTIONS = "int[] flags, float[] eps"
_LIBRARY.define(
    f"recurrence({_INPUTS}, {_OPTIONS}) -> (Tensor o, Tensor last, Tensor last_z, Tensor errors, Tensor scale)"
)
_LIBRARY.define(
    f"recurrence_backward({_INPUTS}, Tensor o, Tensor errors, Tensor scale, Tensor? grad_o, Tensor? grad_last, "
    f"Tensor? grad_last_z, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _operator(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, flags, eps = arguments
    # what does not exist is one empty tensor, but results of an operator must not be the same tensor
    return tuple(x if x.numel() else x.new_empty(x.shape) for x in _forward(inputs, flags, eps, keep=True))


def _operator_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, flags, eps = arguments
    gradients = _backward(tensors[:6], tensors[6:9], tensors[9:], flags, eps)
    return tuple(tensors[1].new_empty(0) if x is None else x for x in gradients)


def _operator_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, v, beta, _, _, (feature_map, nu, _, normalise_readout), _ = arguments
    b, t, h, size = k.shape
    n_features = 2 * size * nu if feature_map == _MAPS["dpfp"] else size
    shapes = [
        v.shape if q is not None else (0,),
        (b, h, n_features, v.shape[-1]),
        (b, h, n_features) if normalise_readout else (0,),
        v.shape if beta is not None else (0,),
        (b, t, h) if normalise_readout and q is not None else (0,),
    ]
    return tuple(v.new_empty(shape) for shape in shapes)


def _operator_backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(arguments[1].new_empty(0 if x is None else x.shape) for x in arguments[:6])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, flags, eps = inputs
    o, _, _, errors, scale = output
    ctx.options = flags, eps
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, o, errors, scale)


def _gradients(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.fwp_lightning.recurrence_backward(*tensors, *incoming[:3], *ctx.options)
    return (*(None if x is None else g for x, g in zip(tensors[:6], found, strict=True)), None, None)


_LIBRARY.impl("recurrence", _operator, "CPU")
_LIBRARY.impl("recurrence_backward", _operator_backward, "CPU")
torch.library.register_fake("fwp_lightning::recurrence", _operator_shapes, lib=_LIBRARY)
torch.library.register_fake("fwp_lightning::recurrence_backward", _operator_backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("fwp_lightning::recurrence", _gradients, setup_context=_keep, lib=_LIBRARY)
