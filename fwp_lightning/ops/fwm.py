"""The fwm rule as a loop with a hand-written backward pass: half the memory traffic of autograd's.

The Frobenius norm after a write follows from scalars,
``|W + k u^T|^2 = |W|^2 + 2 u . (W^T k) + |u|^2 |k|^2``, so that the memory is touched only to read and to write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.precision import without_autocast


@without_autocast
def fwm_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.fwm_rule``."""
    b, _, h, n_features = k.shape
    W_0 = v.new_zeros(b, h, n_features, v.shape[-1]) if state is None else state
    # time first, batch and heads as one: [T, G, D]
    rows = [None if x is None else x.movedim(1, 0).flatten(1, 2) for x in (q, k, v, beta.unsqueeze(-1))]
    o, W = _FwmScan.apply(*rows, W_0.flatten(0, 1), state is None)
    W = W.unflatten(0, (b, h))
    return (None if q is None else o.unflatten(1, (b, h)).movedim(0, 1)), W


class _FwmScan(Function):
    """Outputs ``[T, G, V]`` and the last memory ``[G, K, V]`` of G sequences; keeps all memories for backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, W_0: Tensor, fresh: bool
    ) -> tuple[Tensor | None, Tensor]:
        steps = k.shape[0]
        memories = W_0.new_empty(steps + 1, *W_0.shape)
        memories[0] = W_0
        errors, written = torch.empty_like(v), torch.empty_like(v)
        scales = v.new_ones(steps, v.shape[1], 1)
        squared_norm = W_0.square().sum((1, 2)).unsqueeze(-1)
        k_squared = k.square().sum(-1, keepdim=True)
        for t in range(steps):
            retrieved = read(memories[t], k[t])
            error = torch.sub(v[t], retrieved, out=errors[t])
            u = torch.mul(beta[t], error, out=written[t])
            W = torch.addcmul(memories[t], k[t].unsqueeze(-1), u.unsqueeze(-2), out=memories[t + 1])
            squared_norm = squared_norm + (u * (2 * retrieved + u * k_squared[t])).sum(-1, keepdim=True)
            if t > 0 or not fresh:
                scales[t] = squared_norm.clamp(min=1).rsqrt()
                W.mul_(scales[t].unsqueeze(-1))
                squared_norm = squared_norm * scales[t].square()
        ctx.save_for_backward(q, k, beta, memories, written, errors, scales)
        o = None if q is None else (q.unsqueeze(-2) @ memories[1:]).squeeze(-2)
        return o, memories[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor | None, grad_W: Tensor) -> tuple[Tensor | None, ...]:
        q, k, beta, memories, written, errors, scales = ctx.saved_tensors
        grad_q = None if q is None else (memories[1:] @ grad_o.unsqueeze(-1)).squeeze(-1)  # type: ignore[union-attr]
        grad_k, grad_v, grad_beta = torch.empty_like(k), torch.empty_like(errors), torch.empty_like(beta)
        G = grad_W.clone()
        for t in reversed(range(k.shape[0])):
            if q is not None:
                G.addcmul_(q[t].unsqueeze(-1), grad_o[t].unsqueeze(-2))  # type: ignore[index]
            # W_t = c W' with c = min(1, 1/|W'|): where c < 1 the part of the gradient along W' vanishes
            along = torch.linalg.vecdot(G.flatten(1), memories[t + 1].flatten(1)).unsqueeze(-1) * (scales[t] < 1)
            G.addcmul_(memories[t + 1], along.unsqueeze(-1), value=-1).mul_(scales[t].unsqueeze(-1))
            grad_u = read(G, k[t])
            grad_error = torch.mul(beta[t], grad_u, out=grad_v[t])
            torch.sum(grad_u * errors[t], -1, keepdim=True, out=grad_beta[t])
            both = torch.stack([written[t], grad_error], dim=-1)
            grad_k[t] = (G @ both[..., :1] - memories[t] @ both[..., 1:]).squeeze(-1)
            G.addcmul_(k[t].unsqueeze(-1), grad_error.unsqueeze(-2), value=-1)
        return grad_q, grad_k, grad_v, grad_beta, G, None


def read(W: Tensor, k: Tensor) -> Tensor:
    """Return ``W^T k``, ``[.., V]``, of memories ``[.., K, V]``."""
    return (k.unsqueeze(-2) @ W).squeeze(-2)
