"""Several delta writes a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig, RuleOptions
from fwp_lightning.attention.rules.delta import BETA
from fwp_lightning.attention.rules.rule import RULES, Rule


@dataclass(frozen=True)
class DeltaProductOptions(RuleOptions):
    """How many pairs a step writes."""

    n_steps: int = 2
    """Delta writes a step, each with a key, a value and a beta from projections of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or self.n_steps != int(self.n_steps):
            raise ValueError(f"rule_options.n_steps={self.n_steps} must be a whole number >= 1")


@RULES.register("delta_product")
class DeltaProductRule(Rule):
    """W_{t,i} = W_{t,i-1} + k_{t,i} (x) beta_{t,i} (v_{t,i} - W_{t,i-1}^T k_{t,i}), i = 1 .. n: n delta writes a step.

    The transition of a step is a product of n generalised Householder matrices, of rank n and not 1. It is the delta
    rule on n T pairs, of which every n-th is followed by a read-out.
    """

    source = "Siems et al. 2025 (DeltaProduct, arXiv 2502.10297)"
    gates = (BETA,)
    Options = DeltaProductOptions
    goes_with: ClassVar = {"feature_map": "silu", "phi_norm": "l2"}
    attention_norms = ("none",)
    why_not = "several corrections a step have no accumulator z"
    has_attention_weights = True

    options: DeltaProductOptions

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.pairs = self.options.n_steps

    @property
    def op(self) -> str:
        return "delta"

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        if q is not None:
            # nobody reads between the writes of a step
            between = q.new_zeros(*q.shape[:2], self.pairs - 1, *q.shape[2:])
            q = torch.cat([between, q.unsqueeze(2)], dim=2).flatten(1, 2)
        o, W = ops.delta_rule(q, k, v, gates[0], state[0] if state else None, backend=backend)
        return (None if o is None else o[:, self.pairs - 1 :: self.pairs]), (W,)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return ops.attention_weights(q, k, gates[0])
