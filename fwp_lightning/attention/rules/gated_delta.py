"""The delta rule in a memory that forgets as its input says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.config import RuleOptions
from fwp_lightning.attention.rules.delta import BETA
from fwp_lightning.attention.rules.gated import ALPHA, check_temperature, forget
from fwp_lightning.attention.rules.rule import RULES, Rule


@dataclass(frozen=True)
class GatedDeltaOptions(RuleOptions):
    """How far the gate is from forgetting at first."""

    temperature: float = 16.0
    """alpha_t to the power of 1 / temperature is kept: 0.96 where alpha is 0.5, in place of Mamba-2's parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)


@ops.implements("gated_delta", "reference")
def _steps(q, k, v, alpha, beta, state):  # type: ignore[no-untyped-def]
    return ops.decaying_steps(q, k, v, alpha, beta, state)


@ops.implements("gated_delta", "chunked")
def _chunks(q, k, v, alpha, beta, state):  # type: ignore[no-untyped-def]
    return ops.decaying_chunks(q, k, v, alpha, beta, state)


@RULES.register("gated_delta")
class GatedDeltaRule(Rule):
    """W_t = alpha_t W_{t-1} + k_t (x) beta_t (v_t - alpha_t W_{t-1}^T k_t): decay, then the delta write.

    The source makes alpha with Mamba-2's parameters, ``exp(-exp(a) softplus(w x + b))``; here it is a sigmoid to the
    power of 1 / temperature, so that the layer keeps projections without biases. With alpha = 1 it is the delta rule.
    """

    source = "Yang, Kautz, Hatamizadeh 2024 (Gated Delta Networks, arXiv 2412.06464)"
    gates = (ALPHA, BETA)
    Options = GatedDeltaOptions
    goes_with: ClassVar = {"feature_map": "silu", "phi_norm": "l2"}
    attention_norms = ("none",)
    why_not = "a memory that corrects and forgets has no accumulator z"
    has_attention_weights = True

    options: GatedDeltaOptions

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        named = {"alpha": self._kept(gates), "beta": gates[1]}
        o, W = ops.written_by("gated_delta", q, k, v, named, state[0] if state else None, backend=backend)
        return o, (W,)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return ops.attention_weights(q, k, gates[1]) * ops.decay_to_the_end(self._kept(gates))

    def _kept(self, gates: tuple[Tensor, ...]) -> Tensor:
        return gates[0] ** (1 / self.options.temperature)

    leave_out = staticmethod(forget)
