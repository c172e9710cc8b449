"""Who takes part: the backends and the peers as functions of the same tensors, each with its own definition of truth.

Tensors are ``[B, T, H, D]``; a candidate that wants ``[B, H, T, D]`` gets that before its time is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.bench.shapes import Shape

Compute = Callable[..., Tensor]
# float32: sums of up to 4096 terms in another order; bfloat16: 8 bits at every rounding. A wrong formula is off by 1
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Candidate:
    """A function of q, k, v (and beta) that returns outputs ``[B, T, H, V]``."""

    name: str
    compute: Compute
    truth: Compute
    """What it must equal, for float64 tensors ``[B, T, H, D]``."""
    heads_first: bool = False
    """It takes and returns ``[B, H, T, D]``."""
    counts: bool = True
    """Whether the arithmetic of the rule is what it does."""


def backends(rule: str, k: Tensor, v: Tensor) -> list[Candidate]:
    """Return the backends that take such tensors for a rule, the time-step loop, which defines the rule, first."""
    names = ops.backends_of(rule, k, v)
    names.sort(key=lambda name: name != "reference")
    return [Candidate(name, functools.partial(_outputs, rule, name), truth_of(rule)) for name in names]


def truth_of(rule: str) -> Compute:
    """Return the rule as its definition computes it."""
    return functools.partial(_outputs, rule, "reference")


def _outputs(rule: str, backend: str, q: Tensor, k: Tensor, v: Tensor, *beta: Tensor) -> Tensor:
    apply = ops.delta_rule if rule == "delta" else ops.sum_rule
    o, _ = apply(q, k, v, *beta, backend=backend)
    assert o is not None
    return o


def draw_inputs(rule: str, shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return q and k with positive features that add up to 1, v, and for the delta rule beta: leaves with gradients."""
    generator = torch.Generator().manual_seed(0)
    b, t, h = shape.batch, shape.steps, shape.heads

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    q, k = (x / x.sum(-1, keepdim=True) for x in (draw(b, t, h, shape.keys), draw(b, t, h, shape.keys)))
    inputs = [q, k, draw(b, t, h, shape.values) - 0.5] + ([draw(b, t, h)] if rule == "delta" else [])
    return [x.to(device, dtype).requires_grad_() for x in inputs]


@dataclass(frozen=True)
class Call:
    """A candidate on certain tensors."""

    candidate: Candidate
    inputs: list[Tensor]
    grad_o: Tensor

    def forward(self) -> Tensor:
        """Compute the outputs alone."""
        with torch.no_grad():
            return self.candidate.compute(*self.inputs)

    def both(self) -> tuple[Tensor | None, ...]:
        """Compute the outputs and the gradients of all inputs."""
        o = self.candidate.compute(*self.inputs)
        # softmax has no write strength, and reads none
        return (o, *torch.autograd.grad(o, self.inputs, self.grad_o, allow_unused=True))


def call_of(candidate: Candidate, inputs: list[Tensor]) -> Call:
    """Return the candidate's call, its inputs in its own layout."""
    v = inputs[2]
    grad_o = torch.linspace(-1, 1, v.numel(), device=v.device).reshape(v.shape).to(v.dtype)
    if not candidate.heads_first:
        return Call(candidate, inputs, grad_o)
    laid_out = [_heads_first(x).contiguous().requires_grad_() for x in inputs]
    return Call(candidate, laid_out, _heads_first(grad_o).contiguous())


def _heads_first(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2)


def disagreement(candidate: Candidate, inputs: list[Tensor]) -> str | None:
    """Return where outputs or gradients differ from the definition in float64, or None if they agree.

    The heads of a batch know nothing of each other, so the first and the last stand for all: the float64 loop keeps a
    memory a step for each. An error counts relative to the largest number of its tensor.
    """
    call = call_of(candidate, inputs)
    found = [x if x is None or not candidate.heads_first else x.transpose(1, 2) for x in call.both()]
    outer = [_outer_heads(x.detach()).double().requires_grad_() for x in inputs]
    grad_o = call.grad_o.transpose(1, 2) if candidate.heads_first else call.grad_o
    o = candidate.truth(*outer)
    gradients = torch.autograd.grad(o, outer, _outer_heads(grad_o).double(), allow_unused=True)
    names = ("o", "dL/dq", "dL/dk", "dL/dv", "dL/dbeta")
    for name, ours, theirs in zip(names, found, (o, *gradients), strict=False):
        if ours is None or theirs is None:
            continue
        error = (_outer_heads(ours.detach()).double() - theirs.detach()).abs().max() / theirs.detach().abs().max()
        # a NaN compares false
        if not error <= TOLERANCES[inputs[0].dtype]:
            return f"its {name} is off by {float(error):.1e} of the largest"
    return None


def _outer_heads(x: Tensor) -> Tensor:
    """The first head of the first sequence and the last of the last, as a batch of two with one head each."""
    return torch.stack([x[0, :, :1], x[-1, :, -1:]])
