"""The named axes of an attention, checked at construction. Imports no torch: listing and validating stay fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fwp_lightning.registry import did_you_mean


@dataclass(frozen=True)
class FavorConfig:
    """The five choices that the name FAVOR+ leaves open; the two parts of the released code differ in them."""

    features: Literal["orthogonal", "independent", "orthogonal_inputs"] = "orthogonal"
    """Random directions orthogonal in groups of the input size (FAVOR+); independent Gaussian (the text); or, as in the
    released language model, the input's coordinates orthogonal in groups of m instead: a biased kernel."""
    scaling: Literal["none", "rsqrt_sqrt_d"] = "rsqrt_sqrt_d"
    """Multiply inputs by d^(-1/4), so that the kernel is exp(q.k / sqrt(d)); the released code does not: exp(q.k)."""
    stabilizer: Literal["none", "sequence", "vector"] = "none"
    """Subtract the largest exponent: of a key sequence (cancels in attention_norm) or of each vector (in phi_norm)."""
    kernel_eps: float = 0.0
    """Added to every exponential before the 1/sqrt(2m); the released language model has 1e-4."""
    redraw: Literal["never", "training", "always"] = "training"
    """When the random matrix is drawn anew: never, at training forwards, or at every one, evaluation included."""

    def __post_init__(self) -> None:
        for name in ("features", "scaling", "stabilizer", "redraw"):
            _check_choice(f"favor.{name}", getattr(self, name), _FAVOR_CHOICES[name])
        if not (math.isfinite(self.kernel_eps) and self.kernel_eps >= 0):
            raise ValueError(f"favor.kernel_eps={self.kernel_eps} must be a number >= 0")
        if self.kernel_eps > 0 and self.stabilizer != "none":
            raise ValueError(
                f"favor.kernel_eps={self.kernel_eps} would count more the more favor.stabilizer={self.stabilizer} "
                "subtracts; set one of them to 0 or none"
            )


_FAVOR_CHOICES = {
    "features": ("orthogonal", "independent", "orthogonal_inputs"),
    "scaling": ("none", "rsqrt_sqrt_d"),
    "stabilizer": ("none", "sequence", "vector"),
    "redraw": ("never", "training", "always"),
}
PHI_NORMS = ("none", "sum")
ATTENTION_NORMS = ("none", "readout", "both")
OUTPUT_SCALES = ("none", "rsqrt_d")
CARRIED_QUERY_GRADIENTS = ("exact", "none")
SIGNED_MAPS = ("identity", "tanh")


@dataclass(frozen=True)
class AttentionConfig:
    """One attention as a point in a product of named axes; ``ValueError`` with one sentence for a senseless one."""

    rule: str = "delta"
    """How a key-value pair is written: softmax, sum, delta, fwm, or a registered one."""
    feature_map: str = "elu"
    """phi on keys and queries: identity, elu, favor, dpfp, tanh, or a registered one."""
    phi_norm: str = "none"
    """sum: divide phi(k) and phi(q) by the sum of their features (eq. 29)."""
    attention_norm: str = "none"
    """Divide the read-out (readout), and what a delta write retrieves (both), by z . phi(q) (eqs. 18-19, 26-28)."""
    output_scale: str = "none"
    """rsqrt_d: multiply the read-out by 1/sqrt(d_head): the released language model does, the equations do not."""
    backend: str = "auto"
    """Who computes the rule; changes speed, never the result beyond rounding."""
    nu: int = 1
    """DPFP's number of shifts; it has 2 d_key nu features."""
    n_features: int = 64
    """FAVOR+'s number m of random directions; it has 2 m features."""
    favor: FavorConfig = field(default_factory=FavorConfig)
    """The choices within FAVOR+."""
    key_norm_eps: float = 0.0
    """Added to the sum of a key's features before phi_norm divides by it."""
    query_norm_eps: float = 0.0
    """Added to the sum of a query's features before phi_norm divides by it."""
    attention_norm_eps: float = 1e-6
    """Added to z . phi(q) before attention_norm divides by it."""
    carried_query_gradient: str = "exact"
    """none: what a query reads from the state carried in has no gradient to the query, as in the released sum rule."""

    def __post_init__(self) -> None:
        _check_choice("phi_norm", self.phi_norm, PHI_NORMS)
        _check_choice("attention_norm", self.attention_norm, ATTENTION_NORMS)
        _check_choice("output_scale", self.output_scale, OUTPUT_SCALES)
        _check_choice("carried_query_gradient", self.carried_query_gradient, CARRIED_QUERY_GRADIENTS)
        for name in ("nu", "n_features"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name}={getattr(self, name)} must be a whole number >= 1")
        for name in ("key_norm_eps", "query_norm_eps", "attention_norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a number >= 0")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.rule == "softmax":
            for name, sensible in (("feature_map", "identity"), ("phi_norm", "none"), ("attention_norm", "none")):
                if getattr(self, name) != sensible:
                    raise ValueError(
                        f"rule softmax has no {name}={getattr(self, name)}: it normalises by itself; "
                        f"set {name}: {sensible}"
                    )
        if self.attention_norm == "both" and self.rule != "delta":
            raise ValueError(
                f"attention_norm=both divides what a delta write retrieves; rule {self.rule} retrieves nothing that "
                "way: set attention_norm: readout or none"
            )
        if self.carried_query_gradient == "none" and self.rule != "sum":
            raise ValueError(
                f"carried_query_gradient=none is a property of the released sum rule, not of rule {self.rule}; "
                "set carried_query_gradient: exact"
            )
        if self.rule == "fwm" and self.attention_norm != "none":
            raise ValueError("rule fwm rescales its memory, so no accumulator z fits it; set attention_norm: none")
        if self.feature_map in SIGNED_MAPS and (self.phi_norm != "none" or self.attention_norm != "none"):
            raise ValueError(
                f"feature_map={self.feature_map} has features of both signs, whose sum can be 0 and divides nothing; "
                "set phi_norm: none and attention_norm: none"
            )
        if self.feature_map == "favor":
            self._check_stabilizer()

    def _check_stabilizer(self) -> None:
        stabilizer = self.favor.stabilizer
        if stabilizer == "vector" and self.phi_norm != "sum":
            raise ValueError(
                "favor.stabilizer=vector scales each key by its own factor, which only phi_norm: sum cancels; "
                "set phi_norm: sum, or favor.stabilizer: none"
            )
        cancels = self.phi_norm == "sum" or (self.rule == "sum" and self.attention_norm == "readout")
        if stabilizer == "sequence" and self.rule != "fwm" and not cancels:
            raise ValueError(
                "favor.stabilizer=sequence scales all keys by one factor, which phi_norm: sum or, for rule sum, "
                "attention_norm: readout cancels; set one of them, or favor.stabilizer: none"
            )
        if stabilizer != "none" and self.rule == "fwm":
            raise ValueError(
                "favor.stabilizer changes the size of keys, which rule fwm keeps; set favor.stabilizer: none"
            )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}. {did_you_mean(str(value), list(known))}")
