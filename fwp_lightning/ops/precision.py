"""Memories are computed in the dtype that they are given or wider, whatever autocast says."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# a state is a tensor, or a tuple of them
Rule = Callable[..., tuple[Tensor | None, Any]]


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, on devices that have it; meta tensors, for one, do not."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def without_autocast(rule: Rule) -> Rule:
    """Let a rule written with PyTorch's own products run outside autocast, which would narrow them."""

    @functools.wraps(rule)
    def wrapped(q: Tensor | None, k: Tensor, *rest: Any, **named: Any) -> tuple[Tensor | None, Any]:
        with outside_autocast(k.device):
            return rule(q, k, *rest, **named)

    return wrapped
