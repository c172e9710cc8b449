"""The sum and delta rules compiled for the CPU (``csrc/recurrence.cpp``), with phi and normalisers if asked to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fwp_lightning import compiled
from fwp_lightning.ops import chunked, reference
from fwp_lightning.ops.operators import CompiledRule, Tensors, why_unavailable

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
    return why_unavailable(KERNEL)


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
    o, last, last_z = RULE((memory.flags(), memory.eps()), q, k, v, beta, state, z)
    return (None if q is None else o), last, (last_z if memory.attention_norm == "readout" else None)


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "delta", "threads")),
        *((name, ctypes.c_int64) for name in ("map", "nu", "size", "normalise_features", "normalise_readout")),
        *((name, ctypes.c_double) for name in ("key_eps", "query_eps", "readout_eps")),
    ]


def _problem(inputs: Tensors, flags: list[int], eps: list[float]) -> _Problem:
    _, k, v, beta, *_ = inputs
    b, t, h, size = k.shape
    feature_map, nu, normalise_features, normalise_readout = flags
    threads = max(1, min(torch.get_num_threads(), b * h))
    sizes = (b, t, h, _n_features(size, flags), v.shape[-1], beta is not None, threads)
    return _Problem(*sizes, feature_map, nu, size, normalise_features, normalise_readout, *eps)


def _n_features(size: int, flags: list[int]) -> int:
    return 2 * size * flags[1] if flags[0] == _MAPS["dpfp"] else size


def _allocate(inputs: Tensors, flags: list[int], eps: list[float], *, keep: bool) -> Tensors:
    """Return outputs, last state, last z, and for the backward pass errors and scales."""
    q, k, v, beta, *_ = inputs
    b, t, h, size = k.shape
    n_features = _n_features(size, flags)
    o = None if q is None else torch.empty_like(v)
    errors = torch.empty_like(v) if keep and beta is not None else None
    last, last_z, scale = v.new_empty(b, h, n_features, v.shape[-1]), None, None
    if flags[3]:
        last_z = v.new_empty(b, h, n_features)
        scale = None if q is None else v.new_empty(b, t, h)
    return [o, last, last_z, errors, scale]


def _forward(inputs: Tensors, outputs: Tensors, flags: list[int], eps: list[float]) -> None:
    o, last, last_z, errors, scale = outputs
    compiled.call(KERNEL, "forward", last.dtype, _problem(inputs, flags, eps), *inputs, o, errors, scale, last, last_z)


def _backward(inputs: Tensors, saved: Tensors, incoming: Tensors, flags: list[int], eps: list[float]) -> Tensors:
    q, _, v, *_ = inputs
    grad_o, *grad_states = incoming
    if grad_o is None and q is not None:
        grad_o = torch.zeros_like(v)
    gradients = [None if x is None else torch.empty_like(x) for x in inputs]
    problem = _problem(inputs, flags, eps)
    compiled.call(KERNEL, "backward", v.dtype, problem, *inputs, *saved, grad_o, *grad_states, *gradients)
    return gradients


RULE = CompiledRule(
    "recurrence",
    "CPU",
    inputs="Tensor? q, Tensor k, Tensor v, Tensor? beta, Tensor? state, Tensor? z",
    options="int[] flags, float[] eps",
    results=("o", "last", "last_z"),
    saved=("o", "errors", "scale"),
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
)
