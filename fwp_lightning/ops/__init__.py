"""Fast weight memories as pure functions on tensors: unscaled, nothing written in place, state in and state out.

Layout is ``[B, T, H, D]``; a state is ``[B, H, K, V]``, float32 for inputs in half precision. Splitting a sequence
anywhere and passing the state on equals the whole sequence, and gradients flow to every input and to the incoming
state. ``README.md`` derives the chunked forms.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fwp_lightning.ops.backends import BACKENDS, backends_of, check, implementation, implements, why_not
from fwp_lightning.ops.decays import decay_to_the_end, decaying_chunks, decaying_steps
from fwp_lightning.ops.pair_training import (
    AdamState,
    PairBatches,
    PairMemory,
    PairParameters,
    pair_gradients,
    train_pairs,
)
from fwp_lightning.ops.recurrence import FusedMemory, fused
from fwp_lightning.ops.reference import state_dtype
from fwp_lightning.ops.single_read import delta_weights, dpfp_kernel, exponential_kernel, flushing_exp, sum_weights

__all__ = [
    "BACKENDS",
    "AdamState",
    "FusedMemory",
    "PairBatches",
    "PairMemory",
    "PairParameters",
    "attention_weights",
    "backends_of",
    "decay_to_the_end",
    "decaying_chunks",
    "decaying_steps",
    "delta_rule",
    "dpfp_kernel",
    "exponential_kernel",
    "flushing_exp",
    "fused_rule",
    "fwm_rule",
    "implementation",
    "implements",
    "pair_gradients",
    "sum_rule",
    "train_pairs",
    "why_not",
    "written_by",
]


def sum_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Return outputs ``[B, T, H, V]`` and the last state of ``W_t = W_{t-1} + k_t (x) v_t`` (eqs. 17-19).

    ``q=None`` only writes. ``causal=False`` reads every query from the last state. No normaliser and no scale.
    Raises ``ValueError`` for tensors that do not fit together or a backend that cannot run.
    """
    check(q=q, k=k, v=v, state=state, causal=causal)
    return implementation("sum", backend, k, v)(q, k, v, state, causal=causal)


def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor | None, Tensor]:
    """Return outputs and the last state of ``W_t = W_{t-1} + k_t (x) beta_t (v_t - W_{t-1}^T k_t)`` (eqs. 20-25).

    ``beta`` is ``[B, T, H]``, the write strength after its sigmoid. ``q=None`` only writes.
    Raises ``ValueError`` for tensors that do not fit together or a backend that cannot run.
    """
    check(q=q, k=k, v=v, beta=beta, state=state, needs=("k", "v", "beta"))
    return implementation("delta", backend, k, v)(q, k, v, beta, state)


def fused_rule(
    memory: FusedMemory,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return what ``delta_rule`` (without ``beta``: ``sum_rule``) returns for the features of q and k, and the last z.

    phi, its sum-normalisation and the read-out's division by ``z . phi(q) + eps`` (eqs. 18-19, 29, 30, 37) happen in
    the compiled kernel, so that only ``[B, T, H, D]`` exists of keys, queries and their gradients. ``state`` is
    ``[B, H, K, V]`` and ``z`` ``[B, H, K]``, the sum of key features, with K features; z is None unless
    ``attention_norm`` is readout. Raises ``ValueError`` for tensors that do not fit together or what the kernel lacks.
    """
    check(q=q, k=k, v=v, beta=beta, state=state, z=z, n_features=memory.n_features(k.shape[-1]))
    reason = memory.why_not(k)
    if reason:
        raise ValueError(reason)
    wide = state_dtype(k.dtype)
    rest = (None if x is None else x.to(wide) for x in (beta, state, z))
    o, last, last_z = fused(memory, None if q is None else q.to(wide), k.to(wide), v.to(wide), *rest)
    return (None if o is None else o.to(k.dtype)), last, last_z


def fwm_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor | None, Tensor]:
    """Return outputs and the last state of the delta write followed by ``W <- W / max(1, |W|_F)`` (FWM, 2021).

    The first write into an empty memory (``state=None``) is not rescaled, as in the released code.
    Raises ``ValueError`` for tensors that do not fit together or a backend that cannot run.
    """
    check(q=q, k=k, v=v, beta=beta, state=state, needs=("k", "v", "beta"))
    return implementation("fwm", backend, k, v)(q, k, v, beta, state)


def written_by(
    rule: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Any],
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Return outputs and the last state of a rule that ``implements`` named; ``gates`` are ``[B, T, H]``.

    Raises ``ValueError`` for tensors that do not fit together or a backend that cannot run.
    """
    check(q=q, k=k, v=v, state=state, **gates)
    return implementation(rule, backend, k, v)(q, k, v, *gates.values(), state)


def attention_weights(q: Tensor, k: Tensor, beta: Tensor | None = None) -> Tensor:
    """Return ``a`` ``[B, H, N, T]`` with ``o_n = sum_t a_{n,t} v_t`` for queries ``[B, N, H, K]`` read last.

    Without ``beta`` the memory was written by the sum rule, with it by the delta rule (from an empty state).
    Raises ``ValueError`` for tensors that do not fit together.
    """
    check(q=q, k=k, beta=beta, causal=False, needs=("q", "k"))
    return sum_weights(q, k) if beta is None else delta_weights(q, k, beta)
