"""Effective attention weights of queries that are read after the last write: the read-out without the memory.

For a memory written by T pairs and read by q, the output is ``o = sum_t a_t v_t``. The weights need no [K, V] state:

* sum:   ``a_t = k_t . q``
* delta: going backwards in time, ``a_t = beta_t k_t . r`` and ``r <- r - a_t k_t``, from ``r = q``: the adjoint of
  the delta recurrence, O(T K) per query whatever the value size.

``README.md`` beside this file derives the chunked form and its gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, relu, threshold

from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.precision import outside_autocast
from fwp_lightning.ops.reference import state_dtype

CHUNK = 32  # the measured optimum of 16, 32, 64 for K = 64 .. 256 on CPU


def sum_weights(q_BNHK: Tensor, k_BTHK: Tensor) -> Tensor:
    """Return ``a[b, h, n, t] = k_t . q_n``."""
    with outside_autocast(k_BTHK.device):
        return q_BNHK.transpose(1, 2) @ k_BTHK.permute(0, 2, 3, 1)


def delta_weights(q_BNHK: Tensor, k_BTHK: Tensor, beta_BTH: Tensor) -> Tensor:
    """Return the delta rule's effective attention weights ``a`` as ``[B, H, N, T]``."""
    b, n, h, n_features = q_BNHK.shape
    t = k_BTHK.shape[1]
    q = q_BNHK.transpose(1, 2).reshape(b * h, n, n_features)
    k = k_BTHK.transpose(1, 2).reshape(b * h, t, n_features)
    beta = beta_BTH.transpose(1, 2).reshape(b * h, t)
    if not t:
        return sum_weights(q_BNHK, k_BTHK)
    # half precision is too coarse to solve in
    wide = (x.to(state_dtype(x.dtype)) for x in (q, k, beta))
    with outside_autocast(k.device):
        weights: Tensor = _DeltaWeights.apply(*wide)
    return weights.to(q.dtype).view(b, h, n, t)


def _chunks(x_GTK: Tensor, size: int) -> Tensor:
    """[G, T, K] -> contiguous [M, G, C, K], zeros in front, so that the last write stays at the end of a chunk."""
    g, t, n_features = x_GTK.shape
    m = -(-t // size)
    chunks = x_GTK.new_zeros(m, g, size, n_features)
    missing = m * size - t
    chunks[0, :, missing:] = x_GTK[:, : size - missing]
    chunks[1:] = x_GTK[:, size - missing :].view(g, m - 1, size, n_features).transpose(0, 1)
    return chunks


def _unchunk(x_MGCK: Tensor, steps: int) -> Tensor:
    m, g, size, n_features = x_MGCK.shape
    return x_MGCK.transpose(0, 1).reshape(g, m * size, n_features)[:, m * size - steps :]


class _DeltaWeights(Function):
    """Solve (I + diag(beta) striu(K K^T)) a = diag(beta) K q chunk by chunk; the backward pass solves the transpose."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
        steps = k.shape[1]
        k_c, beta_c = _chunks(k, CHUNK), _chunks(beta.unsqueeze(-1), CHUNK).mT
        gram = (k_c @ k_c.mT).triu_(1)
        eye = torch.eye(CHUNK, dtype=k.dtype, device=k.device).expand_as(gram)
        inverse = torch.linalg.solve_triangular(beta_c.mT * gram, eye, upper=True, unitriangular=True)
        solve = (inverse * beta_c).mT.contiguous()

        # rows, not columns: [G, N, K] @ [G, K, C] is several times faster than its transpose for one query
        r = q
        weights = q.new_empty(*k_c.shape[:2], q.shape[1], CHUNK)
        residuals = q.new_empty(k_c.shape[0], *r.shape)
        for i in reversed(range(k_c.shape[0])):
            residuals[i] = r
            torch.bmm(r @ k_c[i].mT, solve[i], out=weights[i])
            r = r - weights[i] @ k_c[i]
        ctx.save_for_backward(k_c, beta_c, gram, inverse, weights, residuals)
        ctx.steps = steps
        return _unchunk(weights.mT, steps).mT

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_c, beta_c, gram, inverse, weights, r_end = ctx.saved_tensors
        grad_c = _chunks(grad.mT, CHUNK).mT.contiguous()
        p = torch.zeros_like(r_end[0])
        adjoint, p_start = torch.empty_like(weights), torch.empty_like(r_end)
        for i in range(k_c.shape[0]):
            p_start[i] = p
            torch.bmm(grad_c[i] - p @ k_c[i].mT, inverse[i], out=adjoint[i])
            p = p + (beta_c[i] * adjoint[i]) @ k_c[i]
        mu = beta_c * adjoint
        # what each key reads from the residual at its own step
        retrieved = r_end @ k_c.mT - weights @ gram.mT
        grad_beta = (adjoint * retrieved).sum(-2).unsqueeze(-1)
        cross = (mu.mT @ weights).triu_(1)
        # one product for the queries' part and one for the keys of the chunk
        outer = torch.cat([mu, -weights], dim=-2).mT @ torch.cat([r_end, p_start], dim=-2)
        grad_k = outer.sub_((cross + cross.mT) @ k_c)
        return p, _unchunk(grad_k, ctx.steps), _unchunk(grad_beta, ctx.steps).squeeze(-1)


def dpfp_kernel(q_BHD: Tensor, k_BTHD: Tensor, nu: int) -> Tensor:
    """Return ``phi(k_t) . phi(q)`` as ``[B, H, T]`` for DPFP-nu (eq. 37) without building the 2 D nu features.

    One query per sequence. With ``p = relu(k * q)`` (of each pair relu(x), relu(-x) only the half on the query's side
    of zero counts), the inner product is a quadratic form ``p^T C p``; C depends on the query's signs alone.
    """
    same, opposite = _ring_neighbours(q_BHD.shape[-1], nu, k_BTHD.dtype, k_BTHD.device)
    sign = torch.where(q_BHD < 0, -1, 1).to(k_BTHD.dtype)
    matrix = torch.addcmul(same + opposite, sign.unsqueeze(-1) * sign.unsqueeze(-2), same - opposite)
    kernel: Tensor = _QuadraticForm.apply(q_BHD, k_BTHD.transpose(1, 2), matrix)
    return kernel


@functools.lru_cache(maxsize=16)
def _ring_neighbours(size: int, nu: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quarter weights of coordinate pairs 1 .. nu apart on the ring of 2 D, on the same half and on opposite halves."""
    offset = torch.arange(size).unsqueeze(-1) - torch.arange(size)
    same, opposite = (
        ((d >= 1) & (d <= nu)).to(dtype) + (d >= 2 * size - nu).to(dtype)
        for d in (offset.remainder(2 * size), (offset + size).remainder(2 * size))
    )
    return (same / 4).to(device), (opposite / 4).to(device)


def flushing_exp(x: Tensor) -> Tensor:
    """Return exp(x) with results at the edge of underflow (float32: under e^-87) set to 0.

    The vector library behind torch.exp takes 20 times longer where a result underflows, and ignores the flush-to-zero
    mode that this package asks for; un-stabilised FAVOR+ features underflow by the million.
    """
    floor = _exponent_floor(x.dtype)
    # 1.01: what was clamped to the floor must fall under the threshold whatever exp rounds to
    return threshold(torch.exp(x.clamp(min=floor)), 1.01 * math.exp(floor), 0.0)


def _exponent_floor(dtype: torch.dtype) -> int:
    return math.ceil(math.log(torch.finfo(dtype).tiny))


def exponential_kernel(
    phi_q_BHE: Tensor, x_BHTD: Tensor, directions_ED: Tensor, offset: Tensor | float, eps: float
) -> Tensor:
    """Return ``phi(x_t) . phi_q``, ``[B, H, T]``, for ``phi(x) = exp(R x - |x|^2/2 - offset) + eps`` (eqs. 31-32).

    One query a sequence; ``offset`` is a constant. The features are held once: autograd would keep five such tensors.
    """
    kernel: Tensor = _ExponentialKernel.apply(phi_q_BHE, x_BHTD, directions_ED, offset, eps)
    return kernel


class _ExponentialKernel(Function):
    @staticmethod
    def forward(ctx: Any, phi_q: Tensor, x: Tensor, directions: Tensor, offset: Tensor | float, eps: float) -> Tensor:
        exponent = linear(x, directions)
        offset = x.square().sum(-1) / 2 + (offset.squeeze(-1) if isinstance(offset, Tensor) else offset)
        features, kernel = _exponential_rows(exponent, offset, phi_q)
        ctx.save_for_backward(phi_q, x, directions, features, kernel)
        ctx.eps = eps
        return kernel + eps * phi_q.sum(-1, keepdim=True)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        phi_q, x, directions, features, kernel = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        grad_phi_q = (grad.mT @ features).squeeze(-2) + ctx.eps * grad.sum(-2)
        pulled = features @ (phi_q.unsqueeze(-1) * directions)
        return grad_phi_q, grad * (pulled - kernel.unsqueeze(-1) * x), None, None, None


def _exponential_rows(exponent_BHTE: Tensor, offset_BHT: Tensor, phi_q_BHE: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(exponent - offset), computed in place, and its dot products with the query, ``[B, H, T]``."""
    exponent = exponent_BHTE.sub_(offset_BHT.unsqueeze(-1))
    floor = _exponent_floor(exponent.dtype)
    features = torch.threshold_(exponent.clamp_(min=floor).exp_(), 1.01 * math.exp(floor), 0.0)
    return features, (phi_q_BHE.unsqueeze(-2) @ features.mT).squeeze(-2)


class _QuadraticForm(Function):
    """f = p^T C p with p = relu(k * q) and a symmetric C [B, H, D, D] that does not depend on k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, matrix: Tensor) -> Tensor:
        p = relu(k * q.unsqueeze(-2))
        product = p @ matrix
        ctx.save_for_backward(q, k, p, product)
        return (p * product).sum(-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, p, product = ctx.saved_tensors
        grad_p = product * (2 * grad).unsqueeze(-1)
        grad_p.mul_(p > 0)
        return (grad_p * k).sum(-2), grad_p * q.unsqueeze(-2), None
