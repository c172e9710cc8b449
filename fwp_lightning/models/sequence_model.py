"""A small pre-LN Transformer over tokens with any attention of the registry, as synthetic recall is measured with.

Each block is ``x + attention(convolution(LN(x)))``, then, unless ``d_ff`` is 0, ``x + feed_forward(LN(x))``. The short
causal convolution per channel lets a token see the ones before it, which linear attention needs to bind a value to the
key in front of it (Arora et al. 2023; Yang et al. 2024). Shapes: B sequences, T steps, D the model's size, V tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.models.positions import sinusoids


@dataclass(frozen=True)
class SequenceArchitecture:
    """The sizes of a small sequence model."""

    n_layers: int = 2
    """Blocks."""
    d_model: int = 64
    """D."""
    n_heads: int = 1
    """H; a head has D/H dimensions."""
    d_ff: int = 0
    """Width of the feed-forward layer; 0: none."""
    convolution: int = 4
    """Tokens that the causal convolution before an attention sees; 0: none."""
    positions: Literal["none", "sinusoidal"] = "none"
    """sinusoidal: added to the embedding, counted from the start."""

    def __post_init__(self) -> None:
        for name, least in (("n_layers", 1), ("d_model", 1), ("n_heads", 1), ("d_ff", 0), ("convolution", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"architecture.{name}={value} must be a whole number >= {least}")
        if self.positions not in ("none", "sinusoidal"):
            raise ValueError(f"architecture.positions={self.positions!r} is unknown. Known: none, sinusoidal.")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"architecture.d_model={self.d_model} must be even: half of it are sines, half cosines")


class ShortConvolution(nn.Conv1d):
    """One causal filter per channel over the last ``n`` steps, ``[B, T, D]`` to the same."""

    def __init__(self, d_model: int, n: int) -> None:
        super().__init__(d_model, d_model, n, groups=d_model)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x.mT, (self.kernel_size[0] - 1, 0))).mT


class SequenceBlock(nn.Module):
    """Attention behind a short convolution, then a feed-forward layer, each normalised before and added."""

    def __init__(self, architecture: SequenceArchitecture, attention: AttentionConfig) -> None:
        super().__init__()
        d_model, d_ff = architecture.d_model, architecture.d_ff
        self.attention_norm = nn.LayerNorm(d_model)
        self.convolution = ShortConvolution(d_model, architecture.convolution) if architecture.convolution else None
        self.attention = build_attention(attention, d_model, architecture.n_heads)
        self.feed_forward_norm = nn.LayerNorm(d_model) if d_ff else None
        self.feed_forward = (
            nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model)) if d_ff else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, T, D]``."""
        seen = self.attention_norm(x)
        if self.convolution is not None:
            seen = self.convolution(seen)
        x = x + self.attention(seen)[0]
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        return x + self.feed_forward(self.feed_forward_norm(x))


class SequenceModel(nn.Module):
    """Tokens in, hidden vectors out; the tied embedding scores them."""

    def __init__(self, architecture: SequenceArchitecture, attention: AttentionConfig, n_tokens: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.embedding = nn.Embedding(n_tokens, architecture.d_model)
        self.blocks = nn.ModuleList(SequenceBlock(architecture, attention) for _ in range(architecture.n_layers))
        self.norm = nn.LayerNorm(architecture.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return hidden vectors ``[B, T, D]`` of tokens ``[B, T]``."""
        x = self.embedding(tokens)
        if self.architecture.positions == "sinusoidal":
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            # as large as the embedding, which starts small
            x = x + 0.02 * math.sqrt(2) * sinusoids(positions, self.architecture.d_model).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores ``[N, V]`` of all tokens for hidden vectors ``[N, D]``."""
        return linear(hidden, self.embedding.weight)

    def state_size(self, length: int) -> int:
        """Return the numbers that all memories keep after ``length`` steps; softmax keeps its keys and values."""
        a = self.architecture
        per_head = self.blocks[0].attention.memory.state_size(a.d_model // a.n_heads)  # type: ignore[operator, union-attr]
        return a.n_layers * (2 * length * a.d_model if per_head is None else a.n_heads * int(per_head))
