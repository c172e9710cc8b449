"""An update rule as the layer sees it: what it needs of each step, how it writes a state and reads from it.

A rule is one class in a file of its own: its gates, its numbers, what it allows, its op and, where they exist, the
effective attention weights of a query that is read last. Feature maps and normalisers are applied before, by
``layer.FastWeightMemory``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fwp_lightning.attention.config import AttentionConfig, RuleOptions
from fwp_lightning.registry import Registry

RULES: Registry[type[Rule]] = Registry("rule")

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gate:
    """What a rule takes of each step beside query, key and value: the layer makes a projection ``W_<name>`` for it."""

    name: str
    size: Literal["number", "value"] = "number"
    """Of each head: a number, or a vector as wide as a value."""
    activation: Callable[[Tensor], Tensor] = torch.sigmoid
    """From what is projected to what the rule gets."""
    meaning: str = ""
    """For whoever forgot it: *the write strength of each step*."""

    def width(self, d_head: int) -> int:
        """Return its numbers for each head whose keys and values are of one size."""
        return 1 if self.size == "number" else d_head

    def of(self, projected: Tensor) -> Tensor:
        """Return the gate ``[B, T, H]`` or ``[B, T, H, size]`` of what was projected, ``[B, T, H, size]``."""
        return self.activation(projected.squeeze(-1) if self.size == "number" else projected)


class Sizes(NamedTuple):
    """Sizes that parameters of a rule or map depend on."""

    n_heads: int
    d_key: int
    """Of a key before its map."""
    d_value: int


class Rule(nn.Module):
    """A rule writes keys and values, already mapped and normalised, into a state: a tuple of tensors, batch first."""

    source: ClassVar[str] = ""
    """Who wrote it where, for the table in README.md beside this package: ``Ba et al. 2016, eq. 2``."""
    gates: ClassVar[tuple[Gate, ...]] = ()
    Options: ClassVar[type[RuleOptions] | None] = None
    """The class of the rule's own numbers; ``self.options`` is one of these, None for a rule that has none."""
    goes_with: ClassVar[Mapping[str, str]] = {}
    """Axes that it is used with where nothing else is asked for."""

    # what it allows
    causal_only: ClassVar[bool] = True
    """Whether pairs are written in an order that matters: then there is no non-causal form."""
    reads_while_writing: ClassVar[bool] = False
    """Whether what is read changes what is written later: then it cannot write first and be read afterwards."""
    takes_padding: ClassVar[bool] = True
    """Whether ``leave_out`` works: a step can leave the memory as it is."""
    feature_maps: ClassVar[tuple[str, ...] | None] = None
    """The maps that make sense with it; None: all."""
    phi_norms: ClassVar[tuple[str, ...] | None] = None
    attention_norms: ClassVar[tuple[str, ...]] = ("none", "readout")
    why_not: ClassVar[str] = ""
    """Why it lacks the other maps and normalisations, as the rest of a sentence."""
    carried_query_gradients: ClassVar[tuple[str, ...]] = ("exact",)

    # how it stands to scale and to z
    is_linear_in_keys: ClassVar[bool] = False
    """Whether memory and z are: a factor of all keys cancels in the normalised read-out."""
    z_stores_ones: ClassVar[bool] = False
    """z is what the rule stores of the value 1, so that it decays as the memory does; else the plain sum of keys."""

    has_attention_weights: ClassVar[bool] = False
    """Whether ``attention_weights`` is written."""
    kernel_is_enough: ClassVar[bool] = False
    """True if the attention weights are ``phi(k) . phi(q)`` themselves, so that the features need not be built."""

    pairs: int = 1
    """Pairs written a step: keys, values and gates then have ``pairs`` T steps, those of a step one after the other."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.options: Any = config.rule_options
        if self.options is None and self.Options is not None:
            self.options = self.Options()

    @property
    def op(self) -> str:
        """The name under which ``ops.BACKENDS`` have it."""
        return self.config.rule

    def make_parameters(self, sizes: Sizes) -> None:
        """Called once, with the sizes of the layer; raises ``ValueError`` for sizes that the options do not fit."""

    def scan(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        *,
        gates: tuple[Tensor, ...],
        state: State | None,
        backend: str,
        causal: bool,
    ) -> tuple[Tensor | None, State]:
        """Write ``k v`` step by step, read each ``q`` after its step; return outputs ``[B, T, H, V]`` and the state.

        ``gates`` are those that the class declares, in order: ``[B, T, H]``, or ``[B, T, H, size]``.
        """
        raise NotImplementedError

    def read(self, q: Tensor, state: State) -> Tensor:
        """Return what queries ``[B, N, H, K]`` retrieve from a state, ``[B, N, H, V]``."""
        return torch.einsum("bnhk,bhkv->bnhv", q, state[0])

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        """Return ``a`` ``[B, H, N, T]`` with ``o_n = sum_t a_{n,t} v_t`` for queries read after the last write."""
        raise NotImplementedError

    def leave_out(self, k: Tensor, gates: tuple[Tensor, ...], written: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return keys and gates with which steps that are not ``written`` ``[B, T]`` leave the memory as it is.

        An outer product with a zero key writes nothing.
        """
        return k * written[:, :, None, None], gates

    def state_size(self, n_features: int, d_value: int) -> int | None:
        """Return the numbers kept per head, or None if they grow with the sequence."""
        return n_features * d_value
