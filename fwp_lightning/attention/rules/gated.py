"""Linear attention that forgets as its input says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.config import RuleOptions
from fwp_lightning.attention.rules.rule import RULES, Gate, Rule

ALPHA = Gate("alpha", meaning="what is kept of the memory at each step")


@dataclass(frozen=True)
class GatedOptions(RuleOptions):
    """What the gated rule writes, and how far a gate is from forgetting at first."""

    write: Literal["complement", "whole"] = "complement"
    """complement: (1 - alpha_t) v_t, as Peng et al. 2021 and eq. 52; whole: v_t, as scalar-gated linear attention."""
    temperature: float = 1.0
    """alpha_t to the power of 1 / temperature is kept: 16 makes 0.96 of 0.5, as in Yang et al. 2023."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless a temperature is a number over 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"rule_options.temperature={temperature} must be a number > 0")


def forget(k: Tensor, gates: tuple[Tensor, ...], written: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return keys and gates, alpha first, that leave a decaying memory as it is at steps that are not ``written``."""
    alpha = torch.where(written.unsqueeze(-1), gates[0], 1.0)
    return k * written[:, :, None, None], (alpha, *gates[1:])


@ops.implements("gated", "reference")
def _steps(q, k, v, alpha, state):  # type: ignore[no-untyped-def]
    return ops.decaying_steps(q, k, v, alpha, None, state)


@ops.implements("gated", "chunked")
def _chunks(q, k, v, alpha, state):  # type: ignore[no-untyped-def]
    return ops.decaying_chunks(q, k, v, alpha, None, state)


@RULES.register("gated")
class GatedRule(Rule):
    """W_t = alpha_t W_{t-1} + (1 - alpha_t) k_t (x) v_t, one alpha a head and step; or v_t whole (options).

    z, where the read-out is normalised, forgets with the memory. The paper's App. B compares the rule with delta: it
    forgets what has nothing to do with the key that is written.
    """

    source = "Peng et al. 2021 (RFA-Gate); Schlag, Irie, Schmidhuber 2021, eq. 52; Yang et al. 2023, a vector gate"
    gates = (ALPHA,)
    Options = GatedOptions
    goes_with: ClassVar = {"feature_map": "elu", "attention_norm": "readout"}
    is_linear_in_keys = True
    z_stores_ones = True
    has_attention_weights = True

    options: GatedOptions

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        alpha, strength = self._kept_and_written(gates[0])
        v = v if strength is None else v * strength.unsqueeze(-1)
        o, W = ops.written_by("gated", q, k, v, {"alpha": alpha}, state[0] if state else None, backend=backend)
        return o, (W,)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        alpha, strength = self._kept_and_written(gates[0])
        weights = ops.attention_weights(q, k) * ops.decay_to_the_end(alpha)
        return weights if strength is None else weights * strength.transpose(1, 2).unsqueeze(2)

    def _kept_and_written(self, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = alpha ** (1 / self.options.temperature)
        return kept, None if self.options.write == "whole" else 1 - kept

    leave_out = staticmethod(forget)
