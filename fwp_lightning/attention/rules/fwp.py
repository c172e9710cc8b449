"""The fast weight programmers of 1991 to 1993."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import ops
from fwp_lightning.attention.config import RuleOptions
from fwp_lightning.attention.rules.rule import RULES, Rule
from fwp_lightning.ops import reference
from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.precision import without_autocast


@dataclass(frozen=True)
class FwpOptions(RuleOptions):
    """What the memory goes through after each write."""

    activation: Literal["tanh", "identity"] = "tanh"
    """sigma: tanh keeps every weight within -1 and 1; with identity the rule is the sum rule."""


@ops.implements("fwp", "reference")
@without_autocast
def _steps(q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    W = reference.start(k, v, state)
    outputs = []
    for t in range(k.shape[1]):
        W = torch.tanh(reference.write(W, k[:, t], v[:, t]))
        if q is not None:
            outputs.append(reference.read(W, q[:, t]))
    return (None if q is None else reference.stack(outputs, v)), W


@ops.implements("fwp", "scan")
@without_autocast
def _scan(q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Same function as ``_steps``; the backward pass by hand keeps one memory a step, autograd three."""
    W_0 = reference.start(k, v, state)
    rows = [None if x is None else x.movedim(1, 0).flatten(1, 2) for x in (q, k, v)]
    o, W = _TanhScan.apply(*rows, W_0.flatten(0, 1))
    b, h = k.shape[0], k.shape[2]
    return (None if q is None else o.unflatten(1, (b, h)).movedim(0, 1)), W.unflatten(0, (b, h))


class _TanhScan(Function):
    """Outputs ``[T, G, V]`` and the last memory ``[G, K, V]`` of G sequences."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, k: Tensor, v: Tensor, W_0: Tensor) -> tuple[Tensor | None, Tensor]:
        memories = W_0.new_empty(k.shape[0] + 1, *W_0.shape)
        memories[0] = W_0
        for t in range(k.shape[0]):
            torch.addcmul(memories[t], k[t].unsqueeze(-1), v[t].unsqueeze(-2), out=memories[t + 1]).tanh_()
        ctx.save_for_backward(q, k, v, memories)
        return (None if q is None else (q.unsqueeze(-2) @ memories[1:]).squeeze(-2)), memories[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor | None, grad_W: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, memories = ctx.saved_tensors
        grad_q = None if q is None else (memories[1:] @ grad_o.unsqueeze(-1)).squeeze(-1)  # type: ignore[union-attr]
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        G = grad_W.clone()
        for t in reversed(range(k.shape[0])):
            if q is not None:
                G.addcmul_(q[t].unsqueeze(-1), grad_o[t].unsqueeze(-2))  # type: ignore[index]
            # tanh' = 1 - W_t^2
            G.sub_(G * memories[t + 1].square())
            grad_k[t] = (G @ v[t].unsqueeze(-1)).squeeze(-1)
            grad_v[t] = (k[t].unsqueeze(-2) @ G).squeeze(-2)
        return grad_q, grad_k, grad_v, G


@RULES.register("fwp")
class FwpRule(Rule):
    """W_t = sigma(W_{t-1} + k_t (x) v_t), sigma tanh or identity: two slow nets' outputs make a change of fast weights.

    In the paper's words a and b for value and key; what is read is W applied to an input, here the query.
    """

    source = "Schmidhuber 1991, 1992, 1993; Schlag, Irie, Schmidhuber 2021, eqs. 1-3"
    Options = FwpOptions
    goes_with: ClassVar = {"feature_map": "identity"}
    takes_padding = False
    attention_norms = ("none",)
    why_not = "a memory that is squashed has no accumulator z"

    options: FwpOptions

    @property
    def op(self) -> str:
        return "fwp" if self.options.activation == "tanh" else "sum"

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        W_0 = state[0] if state else None
        if self.op == "sum":
            o, W = ops.sum_rule(q, k, v, W_0, backend=backend)
        else:
            o, W = ops.written_by("fwp", q, k, v, {}, W_0, backend=backend)
        return o, (W,)
