"""Which attention a translation model has, and in which of its places; knows nothing of fairseq."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from fwp_lightning.attention import FEATURE_MAPS, RULES
from fwp_lightning.attention.config import AttentionConfig, FavorConfig, RuleOptions
from fwp_lightning.registry import did_you_mean

Place = Literal["encoder", "decoder", "cross"]
NonCausal = Literal["sum", "softmax", "refuse"]
PLACES: tuple[Place, ...] = get_args(Place)
# an accumulated sum of features can be 0
EPS = {"key_norm_eps": 1e-6, "query_norm_eps": 1e-6}
PREFIX = "fwp_"


@dataclass(frozen=True)
class TranslationAttention:
    """One attention for some places of a Transformer; the others keep softmax attention."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    replaced: str = "encoder,decoder"
    """Places that get it, separated by commas: encoder, decoder (self-attention), cross."""
    noncausal: NonCausal = "sum"
    """For a rule that writes in an order, what encoder and cross places get: the sum rule with the same feature map and
    a normalised read-out, softmax, or refuse."""

    def __post_init__(self) -> None:
        for place in self.places:
            if place not in PLACES:
                raise ValueError(f"replaced={self.replaced!r}: unknown place {place!r}. {_places(place)}")
        if not self.places or len(set(self.places)) < len(self.places):
            raise ValueError(f"replaced={self.replaced!r} must name places, each once. {_places('')}")
        if self.noncausal not in get_args(NonCausal):
            known = did_you_mean(str(self.noncausal), list(get_args(NonCausal)))
            raise ValueError(f"unknown noncausal {self.noncausal!r}. {known}")

    @property
    def places(self) -> list[str]:
        """The places that are replaced."""
        return [place.strip() for place in self.replaced.split(",") if place.strip()]

    def of_place(self, place: Place) -> AttentionConfig | None:
        """Return the attention of a place, None where it is fairseq's own softmax attention.

        Raises ``ValueError`` for a rule that the place cannot have.
        """
        if place not in self.places or self.attention.rule == "softmax":
            return None
        if place == "decoder" or not self._writes_in_an_order:
            return self.attention
        if self.noncausal == "refuse":
            raise ValueError(
                f"rule {self.attention.rule} writes in an order, so it has no non-causal form for the place {place!r}; "
                "take it out of replaced, or set noncausal to sum or softmax"
            )
        if self.noncausal == "softmax":
            return None
        return dataclasses.replace(
            self.attention, rule="sum", phi_norm="none", attention_norm="readout", rule_options=None
        )

    def check(self) -> None:
        """Raise ``ValueError`` for a place that cannot have the rule."""
        for place in PLACES:
            self.of_place(place)

    @property
    def _writes_in_an_order(self) -> bool:
        return RULES[self.attention.rule].causal_only


def _places(name: str) -> str:
    return did_you_mean(name, list(PLACES))


def default_choice(rule: str) -> TranslationAttention:
    """Return the attention that the architectures of a rule have."""
    attention = AttentionConfig(rule=rule, **RULES[rule].goes_with, **EPS)  # type: ignore[arg-type]
    # features of both signs have no normalised read-out, which the sum rule needs in a place that reads whole sentences
    signed = FEATURE_MAPS[attention.feature_map].signed
    return TranslationAttention(attention, noncausal="softmax" if signed else "sum")


def flatten(choice: TranslationAttention) -> dict[str, Any]:
    """Return the choice as fairseq's flat arguments: fwp_rule, fwp_nu, fwp_favor_scaling, fwp_replaced, ..."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(choice.attention).items():
        if name == "rule_options":
            # a rule's own numbers have no options of their own on fairseq's command lines
            flat[PREFIX + name] = "" if value is None else json.dumps(value)
        elif isinstance(value, dict):
            flat |= {f"{PREFIX}{name}_{inner}": item for inner, item in value.items()}
        else:
            flat[PREFIX + name] = value
    return {**flat, f"{PREFIX}replaced": choice.replaced, f"{PREFIX}noncausal": choice.noncausal}


def from_arguments(arguments: Namespace | Any) -> TranslationAttention:
    """Return the choice that fairseq's arguments hold; ``ValueError`` for a senseless one."""

    def values(kind: Any, prefix: str) -> dict[str, Any]:
        found = {f.name: getattr(arguments, prefix + f.name, None) for f in fields(kind)}
        return {name: value for name, value in found.items() if value is not None}

    favor = FavorConfig(**values(FavorConfig, f"{PREFIX}favor_"))
    axes = values(AttentionConfig, PREFIX)
    attention = AttentionConfig(**{**axes, "rule_options": _options(axes)}, favor=favor)
    return TranslationAttention(attention, **values(TranslationAttention, PREFIX))


def _options(axes: dict[str, Any]) -> RuleOptions | None:
    """Return a rule's own numbers from their JSON, None for its defaults."""
    text, rule = axes.get("rule_options"), axes.get("rule", AttentionConfig.rule)
    kind = RULES[rule].Options
    if not text:
        return None
    try:
        return kind(**json.loads(text)) if kind else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"--fwp-rule-options {text}: {error}; give JSON of the numbers of {kind}") from error
