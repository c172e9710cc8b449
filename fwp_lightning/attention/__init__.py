"""The pluggable part: an attention is a point in a product of named axes (rule, map, normalisations, backend)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwp_lightning.attention.config import AttentionConfig, FavorConfig, RuleOptions, attention_of
    from fwp_lightning.attention.feature_maps import FEATURE_MAPS, FeatureMap
    from fwp_lightning.attention.layer import FastWeightAttention, FastWeightMemory, MemoryState, build_attention
    from fwp_lightning.attention.phi_norms import PHI_NORMS, PhiNorm
    from fwp_lightning.attention.rules import RULES, Gate, Rule

__all__ = [
    "FEATURE_MAPS",
    "PHI_NORMS",
    "RULES",
    "AttentionConfig",
    "FastWeightAttention",
    "FastWeightMemory",
    "FavorConfig",
    "FeatureMap",
    "Gate",
    "MemoryState",
    "PhiNorm",
    "Rule",
    "RuleOptions",
    "attention_of",
    "build_attention",
]

_MODULES = ("config", "feature_maps", "phi_norms", "rules", "layer")


def __getattr__(name: str) -> Any:
    # imported on first use: `fwp list` reads the catalog of this package without importing torch
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
