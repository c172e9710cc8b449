"""One query read from a memory that was written by pairs out of tables: the retrieval task's training step, compiled.

``csrc/pair_readout.cpp`` computes phi, the rule, the read-out and all gradients without building keys, features or
memory for the whole batch (the fwm rule keeps its memories). ``models.retrieval`` has the same function in PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fwp_lightning import compiled

LANES = 16
RULES = {"sum": 0, "delta": 1, "fwm": 2}
FEATURE_MAPS = {"elu": 0, "dpfp": 1, "tanh": 2}
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class PairMemory:
    """What is computed: the axes of an attention as far as this kernel has them."""

    rule: str
    feature_map: str
    nu: int
    phi_norm: str
    attention_norm: str
    key_norm_eps: float
    query_norm_eps: float
    attention_norm_eps: float
    output_scale: str = "none"

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the sentence why the kernel cannot compute this, or None if it can (it is built if need be)."""
        normalisation = (self.rule, self.phi_norm, self.attention_norm)
        checks: list[tuple[str, object, Collection[object]]] = [
            ("rule", self.rule, RULES),
            ("feature_map", self.feature_map, FEATURE_MAPS),
            ("dtype", dtype, _DTYPES),
            ("device", device.type, {"cpu"}),
            ("output_scale", self.output_scale, {"none"}),
            ("(rule, phi_norm, attention_norm)", normalisation, _NORMALISATIONS),
        ]
        for name, value, known in checks:
            if value not in known:
                return f"the compiled read-out has no {name} {value}; it has {', '.join(str(x) for x in known)}"
        return compiled.why_unavailable("pair_readout")


_NORMALISATIONS = {
    ("sum", "none", "none"),
    ("sum", "none", "readout"),
    # only these: the backward pass rewinds the adjoint recurrence, which is stable for sum-normalised keys alone
    ("delta", "sum", "none"),
    ("fwm", "none", "none"),
}


def pair_readout(
    memory: PairMemory,
    key_table: Tensor,
    value_table: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None = None,
) -> Tensor:
    """Return ``y`` ``[B, S]``, what a query reads after all pairs were written; values are one-hot in S dimensions.

    The key of the pair ``(i, j)`` is ``phi(key_table[i] + value_table[j])``. Tables are ``[S, D]``, a query ``[B, D]``,
    ids ``[B, T]``, write strengths ``[B, T]``; differentiable in tables, query and beta. Raises ``ValueError`` with the
    reason if it cannot run.
    """
    reason = memory.why_not(key_table.dtype, key_table.device)
    if reason:
        raise ValueError(reason)
    for name, ids in (("keys", keys), ("values", values)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < key_table.shape[0]:
            raise ValueError(f"{name} has an id outside 0 .. {key_table.shape[0] - 1}")
    if beta is None:
        beta = key_table.new_ones(keys.shape)
    y: Tensor = _PairReadout.apply(memory, key_table, value_table, query, beta, keys, values)
    return y


class _Problem(ctypes.Structure):
    """``Problem<Real>`` of the C++ source."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "steps", "size", "n_values", "rule", "map", "nu")]
        + [(name, ctypes.c_int64) for name in ("normalise_keys", "normalise_readout")]
        + [(name, ctypes.c_double) for name in ("key_eps", "query_eps", "readout_eps")]
        + [(name, ctypes.c_void_p) for name in ("key_table", "value_table", "query", "beta", "keys", "values")]
    )


class _PairReadout(Function):
    @staticmethod
    def forward(ctx: Any, memory: PairMemory, *tensors: Tensor) -> Tensor:
        tensors = tuple(x.contiguous() for x in tensors)
        problem = _problem(memory, *tensors)
        key_table, query = tensors[0], tensors[2]
        b, t = tensors[4].shape
        n_values = key_table.shape[0]
        y = query.new_zeros(b, n_values)
        weights, totals = query.new_empty(b, t), query.new_empty(b)
        kept = query.new_empty(_kept_numbers(memory, b, t, *key_table.shape))
        scratch = _scratch(problem, query)
        _call("forward", problem, query, y, weights, totals, kept, scratch)
        ctx.memory = memory
        ctx.save_for_backward(*tensors, weights, totals, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weights, totals, kept = ctx.saved_tensors
        key_table, value_table, query, beta = tensors[:4]
        problem = _problem(ctx.memory, *tensors)
        grads = [torch.zeros_like(x) for x in (key_table, value_table, query, beta)]
        scratch = _scratch(problem, query)
        _call("backward", problem, query, grad_y.contiguous(), weights, totals, kept, *grads, scratch)
        return None, *grads, None, None


def _problem(memory: PairMemory, *tensors: Tensor) -> _Problem:
    key_table, _, _, _, keys, _ = tensors
    return _Problem(
        *keys.shape,
        key_table.shape[1],
        key_table.shape[0],
        RULES[memory.rule],
        FEATURE_MAPS[memory.feature_map],
        memory.nu,
        memory.phi_norm == "sum",
        memory.attention_norm == "readout",
        memory.key_norm_eps,
        memory.query_norm_eps,
        memory.attention_norm_eps,
        *(x.data_ptr() for x in tensors),
    )


def _kept_numbers(memory: PairMemory, batch: int, steps: int, n_values: int, size: int) -> int:
    """What the forward pass leaves for the backward pass, beside the weights: residuals or all memories."""
    n_features = 2 * size * memory.nu if memory.feature_map == "dpfp" else size
    per_lane = {"sum": 0, "delta": n_features, "fwm": (steps + 1) * n_values * n_features + steps}[memory.rule]
    return -(-batch // LANES) * LANES * per_lane


def _scratch(problem: _Problem, like: Tensor) -> Tensor:
    function = getattr(compiled.library("pair_readout"), f"fwp_pair_readout_scratch_{_DTYPES[like.dtype]}")
    function.restype = ctypes.c_int64
    return like.new_empty(function(ctypes.byref(problem)))


def _call(direction: str, problem: _Problem, like: Tensor, *buffers: Tensor) -> None:
    function = getattr(compiled.library("pair_readout"), f"fwp_pair_readout_{direction}_{_DTYPES[like.dtype]}")
    function.restype = None
    function(ctypes.byref(problem), *(ctypes.c_void_p(x.data_ptr()) for x in buffers))
