"""A recurrent net whose recurrent weights are a delta memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import ops
from fwp_lightning.attention.rules.delta import BETA
from fwp_lightning.attention.rules.rule import RULES, Gate, Rule
from fwp_lightning.ops import reference
from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.fwm import read
from fwp_lightning.ops.precision import without_autocast

State = tuple[Tensor, Tensor]


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


def as_it_is(x: Tensor) -> Tensor:
    """Return x: no activation."""
    return x


# z, what the feed-forward memory reads, is given; k, v, beta write the recurrent one
@ops.implements("delta_rnn", "reference")
@without_autocast
def _steps(z: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: State | None) -> tuple[Tensor, State]:
    R = reference.start(k, v, None if state is None else state[0])
    h = torch.zeros_like(R[..., 0]) if state is None else state[1]
    outputs = []
    for t in range(k.shape[1]):
        R = reference.write(R, k[:, t], beta[:, t].unsqueeze(-1) * (v[:, t] - reference.read(R, k[:, t])))
        h = z[:, t] + reference.read(R, _softmax(h))
        outputs.append(h)
    return reference.stack(outputs, v), (R, h)


@ops.implements("delta_rnn", "scan")
@without_autocast
def _scan(z: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Same function as ``_steps``, its backward pass by hand."""
    R_0 = reference.start(k, v, None if state is None else state[0])
    h_0 = torch.zeros_like(R_0[..., 0]) if state is None else state[1]
    b, _, n_heads, _ = k.shape
    rows = [x.movedim(1, 0).flatten(1, 2) for x in (z, k, v, beta.unsqueeze(-1))]
    h, R = _RecurrentScan.apply(*rows, R_0.flatten(0, 1), h_0.flatten(0, 1))
    o = h.unflatten(1, (b, n_heads)).movedim(0, 1)
    return o, (R.unflatten(0, (b, n_heads)), o[:, -1] if o.shape[1] else h_0)


class _RecurrentScan(Function):
    """Outputs h ``[T, G, V]`` and the last memory ``[G, V, V]`` of G sequences; keeps all memories for backward."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, k: Tensor, v: Tensor, beta: Tensor, R_0: Tensor, h_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        memories = R_0.new_empty(k.shape[0] + 1, *R_0.shape)
        memories[0] = R_0
        errors, written, reads = (torch.empty_like(v) for _ in range(3))
        h, last = torch.empty_like(z), h_0
        for t in range(k.shape[0]):
            torch.sub(v[t], read(memories[t], k[t]), out=errors[t])
            torch.mul(beta[t], errors[t], out=written[t])
            torch.addcmul(memories[t], k[t].unsqueeze(-1), written[t].unsqueeze(-2), out=memories[t + 1])
            reads[t] = _softmax(last)
            last = torch.add(z[t], read(memories[t + 1], reads[t]), out=h[t])
        ctx.save_for_backward(k, beta, memories, errors, written, reads)
        return h, memories[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_h: Tensor, grad_R: Tensor) -> tuple[Tensor, ...]:
        k, beta, memories, errors, written, reads = ctx.saved_tensors
        grad_z, grad_k, grad_v, grad_beta = (torch.empty_like(x) for x in (errors, k, errors, beta))
        G, from_later = grad_R.clone(), torch.zeros_like(memories[0, ..., 0])
        for t in reversed(range(k.shape[0])):
            g = torch.add(grad_h[t], from_later, out=grad_z[t])
            G.addcmul_(reads[t].unsqueeze(-1), g.unsqueeze(-2))
            from_later = through_softmax(reads[t], (memories[t + 1] @ g.unsqueeze(-1)).squeeze(-1))
            grad_u = read(G, k[t])
            torch.sum(grad_u * errors[t], -1, keepdim=True, out=grad_beta[t])
            torch.mul(beta[t], grad_u, out=grad_v[t])
            both = torch.stack([written[t], grad_v[t]], dim=-1)
            grad_k[t] = (G @ both[..., :1] - memories[t] @ both[..., 1:]).squeeze(-1)
            G.addcmul_(k[t].unsqueeze(-1), grad_v[t].unsqueeze(-2), value=-1)
        return grad_z, grad_k, grad_v, grad_beta, G, from_later


def through_softmax(y: Tensor, grad: Tensor) -> Tensor:
    """Return dL/dx of ``y = softmax(x)`` for dL/dy."""
    return y * (grad - (grad * y).sum(-1, keepdim=True))


@RULES.register("delta_rnn")
class DeltaRnnRule(Rule):
    """h_t = z_t + R_t^T softmax(h_{t-1}): z_t is what a delta memory reads, R_t a second one, of pairs of its own.

    Keys of R are softmaxes, h_0 = 0. It is the second version of the released code, without the 1/sqrt(d) that
    ``output_scale`` adds.
    """

    source = "Irie et al. 2021 (Going Beyond Linear Transformers), Delta RNN"
    gates = (
        Gate("k_recurrent", "value", _softmax, "the key of the recurrent memory"),
        Gate("v_recurrent", "value", as_it_is, "the value of the recurrent memory"),
        BETA,
        Gate("beta_recurrent", meaning="the write strength of the recurrent memory"),
    )
    goes_with: ClassVar = {"feature_map": "elu", "phi_norm": "sum"}
    reads_while_writing = True
    takes_padding = False
    attention_norms = ("none",)
    why_not = "its output goes back in, whatever divides it"

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        k_recurrent, v_recurrent, beta, beta_recurrent = gates
        W_0, recurrent = (None, None) if state is None else (state[0], state[1:])
        # named backends are those of the recurrent memory
        z, W = ops.delta_rule(q, k, v, beta, W_0)
        compute = ops.implementation("delta_rnn", backend, k_recurrent, v_recurrent)
        o, (R, h) = compute(z, k_recurrent, v_recurrent, beta_recurrent, recurrent)
        return o, (W, R, h)

    def state_size(self, n_features: int, d_value: int) -> int | None:
        return n_features * d_value + d_value * d_value + d_value
