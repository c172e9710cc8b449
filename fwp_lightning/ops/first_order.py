"""Backward passes written by hand have no derivative of their own: asking for one is an error, never a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fwp_lightning.ops.precision import outside_autocast

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Mark the ``backward`` of an autograd Function as one that ``create_graph=True`` cannot go through.

    torch's ``once_differentiable`` refuses only where the incoming gradient has a graph. A gradient penalty on
    ``o.sum()`` has none, and would lose its term without a word. Raises ``RuntimeError``.

    It runs outside autocast, as the forward pass does: ``backward()`` may be called within.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives of a memory, which only backend 'reference' has "
                "(with feature map identity, tanh or favor)"
            )
        known = next((x for x in gradients if x is not None), None)
        with outside_autocast(torch.device("cpu") if known is None else known.device):
            return backward(ctx, *gradients)

    return wrapped
