"""The definition of each update rule: one loop over time steps, any dtype, differentiable by autograd.

Legend: B batch, T steps, H heads, K features of a key, V value size. The state ``W`` is ``[B, H, K, V]``; writing
adds an outer product ``k (x) u`` to it and reading gives ``o = W^T q``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fwp_lightning.ops.precision import without_autocast


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and of all arithmetic: float32 for half precision, too coarse for long sums."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def start(k_BTHK: Tensor, v_BTHV: Tensor, state: Tensor | None) -> Tensor:
    """Return the state, or an empty one."""
    if state is not None:
        return state
    b, _, h, n_features = k_BTHK.shape
    return v_BTHV.new_zeros(b, h, n_features, v_BTHV.shape[-1])


def write(W: Tensor, k: Tensor, u: Tensor) -> Tensor:
    """Return ``W + k (x) u``."""
    return W + k.unsqueeze(-1) * u.unsqueeze(-2)


def read(W: Tensor, q: Tensor) -> Tensor:
    """Return ``W^T q``, ``[B, H, V]``."""
    return torch.einsum("bhk,bhkv->bhv", q, W)


def stack(outputs: list[Tensor], like: Tensor) -> Tensor:
    """Return outputs of the steps as one tensor; of no steps, one as empty as ``like``."""
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(like)


@without_autocast
def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """W_t = W_{t-1} + k_t (x) v_t; o_t = W_t^T q_t (eqs. 17-19 without the normaliser).

    ``causal=False`` reads every query from the last state, as an encoder does.
    """
    W = start(k, v, state)
    outputs = []
    queries = q.unbind(1) if q is not None and causal else [None] * k.shape[1]
    for q_t, k_t, v_t in zip(queries, k.unbind(1), v.unbind(1), strict=True):
        W = write(W, k_t, v_t)
        if q_t is not None:
            outputs.append(read(W, q_t))
    if q is None:
        return None, W
    if not causal:
        return torch.einsum("bthk,bhkv->bthv", q, W), W
    return stack(outputs, v), W


@without_autocast
def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """W_t = W_{t-1} + k_t (x) beta_t (v_t - W_{t-1}^T k_t); o_t = W_t^T q_t (eqs. 20-25)."""
    W = start(k, v, state)
    outputs = []
    queries = q.unbind(1) if q is not None else [None] * k.shape[1]
    for q_t, k_t, v_t, beta_t in zip(queries, k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        W = write(W, k_t, beta_t.unsqueeze(-1) * (v_t - read(W, k_t)))
        if q_t is not None:
            outputs.append(read(W, q_t))
    return (None if q is None else stack(outputs, v)), W


@without_autocast
def fwm_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The delta write followed by W <- W / max(1, |W|_F): the fast weight memory of Schlag et al. (2021).

    The first write into an empty memory (``state=None``) is not rescaled, as in the released code; a memory that is
    carried in is no longer empty, so that splitting a sequence changes nothing.
    """
    W = start(k, v, state)
    outputs = []
    queries = q.unbind(1) if q is not None else [None] * k.shape[1]
    for t, (q_t, k_t, v_t, beta_t) in enumerate(zip(queries, k.unbind(1), v.unbind(1), beta.unbind(1), strict=True)):
        W = write(W, k_t, beta_t.unsqueeze(-1) * (v_t - read(W, k_t)))
        if t > 0 or state is not None:
            norm = W.flatten(2).norm(dim=-1)
            W = W / norm.clamp(min=1)[..., None, None]
        if q_t is not None:
            outputs.append(read(W, q_t))
    return (None if q is None else stack(outputs, v)), W
