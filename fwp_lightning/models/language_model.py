"""Language models by their sizes and their attention: which class serves, and which choices do not go together."""

from __future__ import annotations

from typing import TypeAlias

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.models.transformer import Architecture, Transformer
from fwp_lightning.models.transformer_xl import TransformerXL

LanguageModel: TypeAlias = Transformer | TransformerXL


def build_language_model(architecture: Architecture, attention: AttentionConfig, n_words: int) -> LanguageModel:
    """Return a fresh model over ``n_words`` words; ``ValueError`` for an attention that relative positions lack."""
    if architecture.positions != "relative":
        return Transformer(architecture, attention, n_words)
    if attention.rule != "softmax":
        raise ValueError(
            f"architecture.positions=relative is Transformer-XL, which has softmax attention, not rule "
            f"{attention.rule}; set attention.rule: softmax and attention.feature_map: identity"
        )
    return TransformerXL(architecture, n_words)
