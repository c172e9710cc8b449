"""Backward passes written by hand have no derivative of their own: asking for one is an error, never a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Mark the ``backward`` of an autograd Function that saves its inputs; differentiating its results is refused.

    torch's ``once_differentiable`` refuses only where the incoming gradient has a graph. A gradient penalty on
    ``o.sum()`` has none, and would lose its term without a word. Raises ``RuntimeError``.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _NoSecondDerivative.apply(x, *causes) for x in results)

    return wrapped


class _NoSecondDerivative(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *causes: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "a fast weight memory was differentiated twice (create_graph=True), which only backend 'reference' can"
        )
