"""The facts of a run that its configuration does not spell out, as every task states them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fwp_lightning.attention import AttentionConfig


def describe_model(model: nn.Module, attention: AttentionConfig, state: int | None) -> dict[str, Any]:
    """Return the axes of an attention, the parameters of a model, and ``state``, the numbers its memories keep."""
    return {
        "rule": attention.rule,
        "feature_map": attention.feature_map,
        "phi_norm": attention.phi_norm,
        "attention_norm": attention.attention_norm,
        "backend": attention.backend,
        "n_params": sum(p.numel() for p in model.parameters()),
        "state": state,
    }
