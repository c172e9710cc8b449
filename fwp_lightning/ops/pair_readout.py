"""One query read from a memory of key-value pairs: the retrieval task's training step, compiled.

``csrc/pair_readout.cpp`` computes phi, the rule, the read-out and all gradients without building keys, features or
memory for the whole batch (the fwm rule keeps its memories). ``models.retrieval`` has the same function in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fwp_lightning import compiled

KERNEL = "pair_readout"
# the most sequences that any instruction set computes side by side
LANES = 16
RULES = {"sum": 0, "delta": 1, "fwm": 2}
FEATURE_MAPS = {"elu": 0, "dpfp": 1, "tanh": 2}
_DTYPES = (torch.float32, torch.float64)


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

    @functools.cache  # noqa: B019 - asked at every step; there are as many entries as configurations
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
        return compiled.why_unavailable(KERNEL)


_NORMALISATIONS = {
    ("sum", "none", "none"),
    ("sum", "none", "readout"),
    # only these: the backward pass rewinds the adjoint recurrence, which is stable for sum-normalised keys alone
    ("delta", "sum", "none"),
    ("fwm", "none", "none"),
}


def pair_readout(
    memory: PairMemory,
    embedding: Tensor,
    W_k: Tensor,
    b_k: Tensor,
    W_q: Tensor,
    b_q: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    beta: Tensor | None = None,
) -> Tensor:
    """Return ``y`` ``[B, S]``, what a query reads after all pairs were written; values are one-hot in S dimensions.

    The key of the pair ``(i, j)`` is ``phi(W_k [onehot(j), embedding[i]] + b_k)``, the query of the key ``i`` is
    ``phi(W_q embedding[i] + b_q)``. Sizes: embedding ``[S, e]``, W_k ``[D, S + e]``, W_q ``[D, e]``, keys and values
    ``[B, T]`` ids, queries ``[B]`` ids, beta ``[B, T]`` write strengths. Differentiable in all but the ids. Raises
    ``ValueError`` with the reason if it cannot run.
    """
    reason = memory.why_not(embedding.dtype, embedding.device)
    if reason:
        raise ValueError(reason)
    for name, ids in (("keys", keys), ("values", values), ("queries", queries)):
        low, high = (0, 0) if ids.numel() == 0 else (int(x) for x in ids.aminmax())
        if not 0 <= low <= high < embedding.shape[0]:
            raise ValueError(f"{name} has an id outside 0 .. {embedding.shape[0] - 1}")
    if beta is None:
        beta = embedding.new_ones(keys.shape)
    y: Tensor = _PairReadout.apply(memory, embedding, W_k, b_k, W_q, b_q, beta, keys, values, queries)
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
    """One node for the whole read-out: at the paper's small sizes autograd's own work is most of a step."""

    @staticmethod
    def forward(
        ctx: Any,
        memory: PairMemory,
        embedding: Tensor,
        W_k: Tensor,
        b_k: Tensor,
        W_q: Tensor,
        b_q: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        beta, keys, values, queries = (x.contiguous() for x in rest)
        n_values = embedding.shape[0]
        # the key projection falls into one table for key ids and one for value ids
        key_table = torch.addmm(b_k, embedding, W_k[:, n_values:].T)
        value_table = W_k[:, :n_values].T.contiguous()
        queried = embedding[queries]
        tensors = (key_table, value_table, torch.addmm(b_q, queried, W_q.T), beta, keys, values)
        problem = _problem(memory, *tensors)
        b, t = keys.shape
        y = embedding.new_zeros(b, n_values)
        weights, totals = y.new_empty(b, t), y.new_empty(b)
        kept = y.new_empty(_kept_numbers(memory, b, t, *key_table.shape))
        _call("forward", problem, y, y, weights, totals, kept, _scratch(problem, y))
        ctx.memory = memory
        ctx.save_for_backward(embedding, W_k, W_q, queried, queries, *tensors, weights, totals, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        embedding, W_k, W_q, queried, queries, *tensors, weights, totals, kept = ctx.saved_tensors
        problem = _problem(ctx.memory, *tensors)
        grads = [torch.zeros_like(x) for x in tensors[:4]]
        _call(
            "backward", problem, grad_y, grad_y.contiguous(), weights, totals, kept, *grads, _scratch(problem, grad_y)
        )
        grad_key_table, grad_value_table, grad_query, grad_beta = grads
        n_values = embedding.shape[0]
        grad_W_k = torch.cat([grad_value_table.T, grad_key_table.T @ embedding], dim=1)
        grad_embedding = (grad_key_table @ W_k[:, n_values:]).index_add_(0, queries, grad_query @ W_q)
        grad_W_q = grad_query.T @ queried
        projections = (grad_W_k, grad_key_table.sum(0), grad_W_q, grad_query.sum(0))
        return None, grad_embedding, *projections, grad_beta, None, None, None


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
    return like.new_empty(compiled.count(KERNEL, "scratch", like.dtype, problem))


def _call(direction: str, problem: _Problem, like: Tensor, *buffers: Tensor) -> None:
    compiled.call(KERNEL, direction, like.dtype, problem, *buffers)
