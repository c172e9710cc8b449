"""Memories that decay: the sum and delta rules with a factor alpha_t before each write, step by step and in chunks.

``W_t = alpha_t W_{t-1} + k_t (x) u_t`` with ``u_t = v_t``, or ``u_t = beta_t (v_t - alpha_t W_{t-1}^T k_t)`` where
there is a beta. ``README.md`` beside this file derives the chunked form; its gradient is autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwp_lightning.ops import chunked, reference
from fwp_lightning.ops.precision import without_autocast


@without_autocast
def decaying_steps(
    q: Tensor | None, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Return outputs ``[B, T, H, V]`` and the last state, one step at a time: the definition.

    ``alpha`` and ``beta`` are ``[B, T, H]``; the factor comes before the write, the read-out ``W_t^T q_t`` after it.
    """
    W = reference.start(k, v, state)
    outputs = []
    for t in range(k.shape[1]):
        W = alpha[:, t, :, None, None] * W
        u = v[:, t] if beta is None else beta[:, t].unsqueeze(-1) * (v[:, t] - reference.read(W, k[:, t]))
        W = reference.write(W, k[:, t], u)
        if q is not None:
            outputs.append(reference.read(W, q[:, t]))
    return (None if q is None else reference.stack(outputs, v)), W


@without_autocast
def decaying_chunks(
    q: Tensor | None, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``decaying_steps``, T / C steps in sequence instead of T."""
    if k.numel() == 0 or v.numel() == 0:
        return decaying_steps(q, k, v, alpha, beta, state)
    b, steps, h, _ = k.shape
    size = chunked.chunk_size(k.shape[-1], v.shape[-1])
    log_alpha = _logarithm(alpha).unsqueeze(-1)
    # zeros behind the end write nothing, and a logarithm of 0 keeps all
    blocks = [None if x is None else _blocks(x, size) for x in (q, k, v, None if beta is None else beta.unsqueeze(-1))]
    W = reference.start(k, v, state).flatten(0, 1)
    o, W = _through_chunks(blocks, _blocks(log_alpha, size), W)
    if o is not None:
        o = o.unflatten(1, (b, h)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :steps]
    return o, W.unflatten(0, (b, h))


def _blocks(x_BTHD: Tensor, size: int) -> Tensor:
    """Return ``[N, M, C, D]``: N chunks of C steps of M = B H memories, zeros behind the end."""
    missing = -x_BTHD.shape[1] % size
    x = pad(x_BTHD, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size))
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _through_chunks(blocks: list[Tensor | None], log_alpha: Tensor, W: Tensor) -> tuple[Tensor | None, Tensor]:
    q, k, v, beta = blocks
    assert k is not None
    assert v is not None
    within = _decay_within(log_alpha)
    since_start = log_alpha.cumsum(-2).exp()
    k_end = (within[..., -1:, :].mT * k).mT
    if beta is not None:
        inverse = chunked.unit_lower_inverse((k @ k.mT * within * beta.mT).flatten(0, 1)).view_as(within)
        v, k_start = inverse @ v, inverse @ (since_start * k)
    states, written = [], []
    for n in range(k.shape[0]):
        states.append(W)
        u = v[n] if beta is None else beta[n] * (v[n] - k_start[n] @ W)
        written.append(u)
        W = since_start[n, :, -1:] * W + k_end[n] @ u
    if q is None:
        return None, W
    return (since_start * q) @ torch.stack(states) + (q @ k.mT * within) @ torch.stack(written), W


def _decay_within(log_alpha: Tensor) -> Tensor:
    """Return ``D[t, s] = alpha_{s+1} ... alpha_t`` for s <= t, else 0, of logarithms ``[.., C, 1]``: ``[.., C, C]``.

    Each is summed up for itself: differences of two sums from the start would lose digits after a strong decay.
    """
    size = log_alpha.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=log_alpha.device).tril(-1)
    summed = log_alpha.expand(*log_alpha.shape[:-1], size).masked_fill(~later, 0.0).cumsum(-2)
    return summed.masked_fill(later.T, -torch.inf).exp()


def decay_to_the_end(alpha_BTH: Tensor) -> Tensor:
    """Return ``alpha_{t+1} ... alpha_T`` as ``[B, H, 1, T]``: what is left at the end of what step t wrote."""
    after = pad(_logarithm(alpha_BTH[:, 1:]), (0, 0, 0, 1)) if alpha_BTH.shape[1] else alpha_BTH
    return after.flip(1).cumsum(1).flip(1).exp().transpose(1, 2).unsqueeze(2)


def _logarithm(alpha: Tensor) -> Tensor:
    # a factor of exactly 0 becomes the smallest number, whose products vanish as well
    return alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()
