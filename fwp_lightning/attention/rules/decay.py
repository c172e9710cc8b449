"""Fast weights that decay at a fixed rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.config import RuleOptions
from fwp_lightning.attention.rules.gated import forget
from fwp_lightning.attention.rules.rule import RULES, Rule, Sizes


@dataclass(frozen=True)
class DecayOptions(RuleOptions):
    """The two numbers of Ba et al. 2016, with the values that they used."""

    decay: tuple[float, ...] = (0.95,)
    """lambda, what is kept at each step: one number for all heads, or one for each."""
    rate: float = 0.5
    """eta, how much of a pair is written; a normalised read-out takes it out again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, numbers in (("decay", self.decay), ("rate", (self.rate,))):
            if not (numbers and all(0 <= number <= 1 for number in numbers)):
                raise ValueError(f"rule_options.{name}={getattr(self, name)} must be from 0 to 1")


@RULES.register("decay")
class DecayRule(Rule):
    """W_t = lambda W_{t-1} + eta k_t (x) v_t, lambda and eta fixed, lambda for each head.

    The write of Ba et al. alone, without the inner loop that lets a hidden state settle. z, where the read-out is
    normalised, decays with the memory. With lambda = eta = 1 it is the sum rule.
    """

    source = "Ba et al. 2016, eq. 1"
    Options = DecayOptions
    goes_with: ClassVar = {"feature_map": "elu", "attention_norm": "readout"}
    is_linear_in_keys = True
    z_stores_ones = True
    has_attention_weights = True

    options: DecayOptions

    @property
    def op(self) -> str:
        return "gated"

    def make_parameters(self, sizes: Sizes) -> None:
        if len(self.options.decay) not in (1, sizes.n_heads):
            raise ValueError(
                f"rule_options.decay has {len(self.options.decay)} numbers for {sizes.n_heads} heads; give one for all "
                "or one for each"
            )

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        kept = {"alpha": self._kept(k, gates)}
        o, W = ops.written_by("gated", q, k, v * self.options.rate, kept, state[0] if state else None, backend=backend)
        return o, (W,)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return ops.attention_weights(q, k) * ops.decay_to_the_end(self._kept(k, gates)) * self.options.rate

    def leave_out(self, k: Tensor, gates: tuple[Tensor, ...], written: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # the gate that padding needs, which the rule has for no other reason
        return forget(k, (self._kept(k, ()),), written)

    def _kept(self, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        """Lambda of each step and head, ``[B, T, H]``."""
        if gates:
            return gates[0]
        decay = torch.tensor(self.options.decay, dtype=k.dtype, device=k.device)
        return decay.expand(k.shape[:3])
