"""A delta memory that is programmed by what it read last."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fwp_lightning import ops
from fwp_lightning.attention.rules.delta_rnn import as_it_is, through_softmax
from fwp_lightning.attention.rules.rule import RULES, Gate, Rule, Sizes
from fwp_lightning.ops import reference
from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.fwm import read
from fwp_lightning.ops.precision import without_autocast

State = tuple[Tensor, Tensor]


@ops.implements("recurrent_delta", "reference")
@without_autocast
def _steps(q: Tensor, k: Tensor, v: Tensor, b: Tensor, R: Tensor, state: State | None) -> tuple[Tensor, State]:
    W = reference.start(k, v, None if state is None else state[0])
    y = torch.zeros_like(W[..., 0, :]) if state is None else state[1]
    x, sizes = torch.cat([q, k, v, b.unsqueeze(-1)], dim=-1), [q.shape[-1], k.shape[-1], v.shape[-1], 1]
    outputs = []
    for t in range(k.shape[1]):
        q_t, k_t, v_t, b_t = (x[:, t] + torch.einsum("bhv,hvn->bhn", torch.tanh(y), R)).split(sizes, dim=-1)
        k_t = torch.softmax(k_t, dim=-1)
        W = reference.write(W, k_t, torch.sigmoid(b_t) * (v_t - reference.read(W, k_t)))
        y = reference.read(W, torch.softmax(q_t, dim=-1))
        outputs.append(y)
    return reference.stack(outputs, v), (W, y)


@ops.implements("recurrent_delta", "scan")
@without_autocast
def _scan(q: Tensor, k: Tensor, v: Tensor, b: Tensor, R: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Same function as ``_steps``, its backward pass by hand."""
    W_0 = reference.start(k, v, None if state is None else state[0])
    y_0 = torch.zeros_like(W_0[..., 0, :]) if state is None else state[1]
    x = torch.cat([q, k, v, b.unsqueeze(-1)], dim=-1).movedim(1, 0)
    y, W = _RecurrentScan.apply(x, R, W_0, y_0)
    o = y.movedim(0, 1)
    return o, (W, o[:, -1] if o.shape[1] else y_0)


class _RecurrentScan(Function):
    """Outputs y ``[T, B, H, V]`` and the last memory ``[B, H, K, V]``; keeps all memories for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, W_0: Tensor, y_0: Tensor) -> tuple[Tensor, Tensor]:
        n_features, d_value = W_0.shape[-2:]
        ctx.sizes = [n_features, n_features, d_value, 1]
        memories = W_0.new_empty(x.shape[0] + 1, *W_0.shape)
        memories[0] = W_0
        mapped, errors = torch.empty_like(x), x.new_empty(*x.shape[:3], d_value)
        y = x.new_empty(x.shape[0] + 1, *y_0.shape)
        y[0] = y_0
        for t in range(x.shape[0]):
            pre = x[t] + torch.einsum("bhv,hvn->bhn", torch.tanh(y[t]), R)
            q, k, v, b = _mapped(*pre.split(ctx.sizes, dim=-1))
            torch.cat([q, k, v, b], dim=-1, out=mapped[t])
            torch.sub(v, read(memories[t], k), out=errors[t])
            torch.addcmul(memories[t], k.unsqueeze(-1), (b * errors[t]).unsqueeze(-2), out=memories[t + 1])
            y[t + 1] = read(memories[t + 1], q)
        ctx.save_for_backward(mapped, R, memories, errors, y)
        return y[1:].clone(), memories[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_W: Tensor) -> tuple[Tensor, ...]:
        mapped, R, memories, errors, y = ctx.saved_tensors
        G, from_later = grad_W.clone(), torch.zeros_like(y[0])
        grad_x, a = torch.empty_like(mapped), torch.tanh(y[:-1])
        for t in reversed(range(mapped.shape[0])):
            q, k, _, beta = mapped[t].split(ctx.sizes, dim=-1)
            g = grad_y[t] + from_later
            G.addcmul_(q.unsqueeze(-1), g.unsqueeze(-2))
            grad_q = (memories[t + 1] @ g.unsqueeze(-1)).squeeze(-1)
            grad_u = read(G, k)
            grad_v = beta * grad_u
            both = torch.stack([beta * errors[t], grad_v], dim=-1)
            grad_k = (G @ both[..., :1] - memories[t] @ both[..., 1:]).squeeze(-1)
            G.addcmul_(k.unsqueeze(-1), grad_v.unsqueeze(-2), value=-1)
            grad_beta = (grad_u * errors[t]).sum(-1, keepdim=True)
            parts = [through_softmax(q, grad_q), through_softmax(k, grad_k), grad_v, grad_beta * beta * (1 - beta)]
            torch.cat(parts, dim=-1, out=grad_x[t])
            from_later = torch.einsum("bhn,hvn->bhv", grad_x[t], R) * (1 - a[t].square())
        return grad_x, torch.einsum("tbhv,tbhn->hvn", a, grad_x), G, from_later


def _mapped(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.softmax(q, dim=-1), torch.softmax(k, dim=-1), v, torch.sigmoid(b)


@RULES.register("recurrent_delta")
class RecurrentDeltaRule(Rule):
    """y_t = W_t^T softmax(q_t + R_q^T a), a = tanh(y_{t-1}), and a in key, value and beta of the delta write likewise.

    Recurrent Delta Net: ``k = softmax(k_t + R_k^T a)``, ``v = v_t + R_v^T a``, ``beta = sigmoid(b_t + r_b . a)``, with
    slow matrices for each head that start as N(0, 1 / V); y_0 = 0. Without the 1/sqrt(d) that ``output_scale`` adds.
    """

    source = "Irie et al. 2021 (Going Beyond Linear Transformers), Recurrent Delta Net"
    gates = (Gate("beta", activation=as_it_is, meaning="the write strength of each step, before its sigmoid"),)
    goes_with: ClassVar = {"feature_map": "identity"}
    reads_while_writing = True
    takes_padding = False
    feature_maps = ("identity",)
    phi_norms = ("none",)
    attention_norms = ("none",)
    why_not = "it maps keys and queries itself, by a softmax over features, once the output before has been added"

    def make_parameters(self, sizes: Sizes) -> None:
        """Draw R ``[H, V, 2 K + V + 1]``: R_q, R_k, R_v and r_b side by side."""
        width = 2 * sizes.d_key + sizes.d_value + 1
        self.R = nn.Parameter(torch.randn(sizes.n_heads, sizes.d_value, width) * sizes.d_value**-0.5)

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        return ops.implementation("recurrent_delta", backend, k, v)(q, k, v, gates[0], self.R, state)

    def state_size(self, n_features: int, d_value: int) -> int | None:
        return n_features * d_value + d_value
