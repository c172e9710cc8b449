"""A feature map as the layer sees it: ``[B, T, H, D] -> [B, T, H, K]``.

Maps compute in float32 (or float64) whatever autocast says: elu(x) + 1 in bfloat16 is exactly 0 for x <= -8, and
dividing by it ruins the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.ops.precision import outside_autocast
from fwp_lightning.registry import Registry

FEATURE_MAPS: Registry[type[FeatureMap]] = Registry("feature map")

Method = TypeVar("Method", bound=Callable[..., Any])


def in_full_precision(method: Method) -> Method:
    """Run a method outside autocast, tensors in half precision made float32: memories lose too much in 8 bits."""

    @functools.wraps(method)
    def wrapped(self: object, x: Tensor, *arguments: Any, **named: Any) -> Any:
        with outside_autocast(x.device):
            return method(self, *(_at_least_float32(a) for a in (x, *arguments)), **named)

    return cast(Method, wrapped)


def _at_least_float32(x: Any) -> Any:
    # gates come as a tuple; a state, which is a named one, has its own precision
    if type(x) is tuple:
        return tuple(_at_least_float32(item) for item in x)
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


class FeatureMap(nn.Module):
    """A feature map for keys of size ``d_key``; subclasses set ``n_out`` and write ``forward``.

    Keys and queries go through ``keys`` and ``queries``; only a map that treats them differently overrides those.
    """

    source: ClassVar[str] = ""
    """Who wrote it where, for the table in README.md beside this package: ``Katharopoulos et al. 2020, eq. 7``."""
    signed: ClassVar[bool] = False
    """Whether features can be negative: their sum can then be 0 and divides nothing."""
    n_out: int

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__()
        self.d_key = d_key
        self.n_out = d_key

    def make_parameters(self, n_heads: int) -> None:
        """Called once: a learned map makes what it has for each head."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``[B, T, H, n_out]`` of ``x`` ``[B, T, H, d_key]``."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """Return the features of keys."""
        return self(k)

    def queries(self, q: Tensor) -> Tensor:
        """Return the features of queries."""
        return self(q)

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """Return ``phi(k_t) . phi(q_n)`` as ``[B, H, N, T]`` for queries ``[B, N, H, D]`` and keys ``[B, T, H, D]``."""
        return ops.attention_weights(self.queries(q), self.keys(k))

    def start_sequence(self) -> None:
        """Called before the first keys of sequences that start from an empty memory: a random map may draw anew."""
