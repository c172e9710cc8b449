"""The fast weight memory: a delta write into a memory of bounded norm."""

from __future__ import annotations

from typing import ClassVar

from fwp_lightning import ops
from fwp_lightning.attention.rules.delta import BETA
from fwp_lightning.attention.rules.rule import RULES, Rule


@RULES.register("fwm")
class FwmRule(Rule):
    """The delta write, the memory then rescaled to Frobenius norm <= 1: W <- W / max(1, |W|)."""

    source = "Schlag, Munkhdalai, Schmidhuber 2021 (Fast Weight Memory)"
    gates = (BETA,)
    goes_with: ClassVar = {"feature_map": "tanh"}
    attention_norms = ("none",)
    why_not = "it rescales its memory, so no accumulator z fits it"

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.fwm_rule(q, k, v, gates[0], state[0] if state else None, backend=backend)
        return o, (W,)
