"""The named axes of an attention, checked at construction against what its rule, map and normalisation allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fwp_lightning.registry import did_you_mean

if TYPE_CHECKING:
    from fwp_lightning.attention.rules import Rule


class RuleOptions:
    """Numbers of one rule alone: each rule that has some derives a frozen dataclass from this, beside itself."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                _check_choice(f"rule_options.{name}", getattr(self, name), get_args(hint))


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
ATTENTION_NORMS = ("none", "readout", "both")
OUTPUT_SCALES = ("none", "rsqrt_d")
CARRIED_QUERY_GRADIENTS = ("exact", "none")


@dataclass(frozen=True)
class AttentionConfig:
    """One attention as a point in a product of named axes; ``ValueError`` with one sentence for a senseless one."""

    rule: str = "delta"
    """How a key-value pair is written: softmax, sum, delta, fwm, or a registered one (see: fwp list)."""
    feature_map: str = "elu"
    """phi on keys and queries: identity, elu, favor, dpfp, tanh, or a registered one."""
    phi_norm: str = "none"
    """What phi(k) and phi(q) are divided by: sum, that of their features (eq. 29); l2, their length; none."""
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
    """Added to the size of a key's features before phi_norm divides by it."""
    query_norm_eps: float = 0.0
    """Added to the size of a query's features before phi_norm divides by it."""
    attention_norm_eps: float = 1e-6
    """Added to z . phi(q) before attention_norm divides by it."""
    carried_query_gradient: str = "exact"
    """none: what a query reads from the state carried in has no gradient to the query, as in the released sum rule."""
    rule_options: RuleOptions | None = None
    """Numbers of the rule's own, as ``{class_path: DecayOptions, init_args: {decay: [0.9]}}``; null: its defaults."""

    def __post_init__(self) -> None:
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
        """Check the axes against each other; a name that no registry has yet is refused where the layer is built."""
        # what is registered needs torch
        from fwp_lightning.attention.feature_maps import FEATURE_MAPS
        from fwp_lightning.attention.phi_norms import PHI_NORMS
        from fwp_lightning.attention.rules import RULES

        norm = PHI_NORMS[self.phi_norm]
        if self.rule in RULES:
            self._check_rule(RULES[self.rule])
        sums_features = self.attention_norm != "none" or not norm.takes_signs
        if self.feature_map in FEATURE_MAPS and FEATURE_MAPS[self.feature_map].signed and sums_features:
            takes_signs = ", ".join(name for name in PHI_NORMS if PHI_NORMS[name].takes_signs)
            raise ValueError(
                f"feature_map={self.feature_map} has features of both signs, whose sum can be 0 and divides nothing; "
                f"set phi_norm to one of {takes_signs} and attention_norm: none"
            )
        if self.feature_map == "favor" and self.rule in RULES:
            self._check_stabilizer(norm.cancels_scale, RULES[self.rule].is_linear_in_keys)

    def _check_rule(self, rule: type[Rule]) -> None:
        allowed = {
            "feature_map": rule.feature_maps,
            "phi_norm": rule.phi_norms,
            "attention_norm": rule.attention_norms,
            "carried_query_gradient": rule.carried_query_gradients,
        }
        for name, choices in allowed.items():
            chosen = getattr(self, name)
            if choices is None or chosen in choices:
                continue
            why = rule.why_not
            if name == "carried_query_gradient":
                why = "it is a property of the released sum rule"
            elif chosen == "both":
                why = "it divides what a delta write retrieves"
            raise ValueError(f"rule {self.rule} has no {name}={chosen}: {why}; set {name}: {' or '.join(choices)}")
        if self.rule_options is not None and type(self.rule_options) is not rule.Options:
            known = "none" if rule.Options is None else rule.Options.__name__
            raise ValueError(
                f"rule {self.rule} has no rule_options of the kind {type(self.rule_options).__name__}; its own: {known}"
            )

    def _check_stabilizer(self, cancels_scale: bool, is_linear_in_keys: bool) -> None:
        stabilizer = self.favor.stabilizer
        if stabilizer == "vector" and not cancels_scale:
            raise ValueError(
                "favor.stabilizer=vector scales each key by its own factor, which only a phi_norm cancels; "
                "set phi_norm: sum, or favor.stabilizer: none"
            )
        cancels = cancels_scale or (is_linear_in_keys and self.attention_norm == "readout")
        if stabilizer == "sequence" and not cancels:
            raise ValueError(
                "favor.stabilizer=sequence scales all keys by one factor, which phi_norm: sum or, for rules linear in "
                f"their keys as sum is and {self.rule} is not, attention_norm: readout cancels; set one of them, or "
                "favor.stabilizer: none"
            )


def attention_of(settings: Mapping[str, Any]) -> AttentionConfig:
    """Return the attention that a configuration in YAML holds: groups are mappings, a rule's numbers name a class."""
    from fwp_lightning.attention.rules import RULES

    options = settings.get("rule_options")
    kind = RULES[settings["rule"]].Options
    if options is not None and kind is not None:
        options = kind(**options.get("init_args", {}))
    return AttentionConfig(**{**settings, "favor": FavorConfig(**settings["favor"]), "rule_options": options})


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}. {did_you_mean(str(value), list(known))}")
