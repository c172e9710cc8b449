"""The paper's delta rule."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.rules.rule import RULES, Gate, Rule

BETA = Gate("beta", meaning="the write strength of each step")


@RULES.register("delta")
class DeltaRule(Rule):
    """W_t = W_{t-1} + k_t (x) beta_t (v_t - W_{t-1}^T k_t): correct what the key retrieves."""

    source = "Schlag, Irie, Schmidhuber 2021, eqs. 20-25"
    gates = (BETA,)
    goes_with: ClassVar = {"feature_map": "elu", "phi_norm": "sum"}
    attention_norms = ("none", "readout", "both")
    has_attention_weights = True

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.delta_rule(q, k, v, gates[0], state[0] if state else None, backend=backend)
        return o, (W,)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return ops.attention_weights(q, k, *gates)
