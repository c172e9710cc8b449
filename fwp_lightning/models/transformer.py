"""The language model of Sec. 6.3: a post-LN Transformer over words with any attention of the registry.

Shapes: B sequences, T steps, D the model's size, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig, MemoryState, build_attention
from fwp_lightning.models.adaptive import TiedAdaptiveEmbedding, check_cutoffs
from fwp_lightning.models.positions import backward_positions, sinusoids

POSITIONS = ("sinusoidal", "none", "relative")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a language model; the defaults are the paper's small model (Sec. 6.3, App. F)."""

    n_layers: int = 16
    """Blocks of attention and feed-forward layer."""
    d_model: int = 128
    """D."""
    n_heads: int = 8
    """H; a head has D/H dimensions."""
    d_ff: int = 2048
    """Width of the feed-forward layer."""
    dropout: float = 0.1
    """Rate after the embedding, each attention, within and after each feed-forward layer, and after the last block."""
    positions: Literal["sinusoidal", "none", "relative"] = "sinusoidal"
    """sinusoidal: added to the embedding; none; relative: Transformer-XL, with memory."""
    memory: int = 0
    """Positions before the segment that Transformer-XL attends to in training."""
    cutoffs: list[int] = field(default_factory=lambda: [20000, 40000, 200000])
    """First words of the adaptive softmax's clusters; those not below V are left out."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_ff"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"architecture.{name}={value} must be a whole number >= 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"architecture.dropout={self.dropout} must be a number from 0 to below 1")
        if self.positions not in POSITIONS:
            raise ValueError(f"architecture.positions={self.positions!r} is unknown. Known: {', '.join(POSITIONS)}.")
        if self.positions != "none" and self.d_model % 2:
            raise ValueError(f"architecture.d_model={self.d_model} must be even: half of it are sines, half cosines")
        if type(self.memory) is not int or self.memory < 0:
            raise ValueError(f"architecture.memory={self.memory} must be a whole number >= 0")
        if self.memory and self.positions != "relative":
            raise ValueError(
                f"architecture.memory={self.memory} is Transformer-XL's, which has architecture.positions: relative"
            )
        check_cutoffs(self.cutoffs)


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear, dropout."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model), nn.Dropout(dropout)
        )


class Block(nn.Module):
    """``x = LN(x + attention(x)); x = LN(x + feed_forward(x))``."""

    def __init__(self, architecture: Architecture, attention: nn.Module) -> None:
        super().__init__()
        d_model, dropout = architecture.d_model, architecture.dropout
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, architecture.d_ff, dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, state: Any, *shared: Any) -> tuple[Tensor, Any]:
        """Return ``[B, T, D]`` and the attention's state after the last step; ``shared`` is what all blocks get."""
        attended, state = self.attention(x, state, *shared)
        x = self.attention_norm(x + self.dropout(attended))
        return self.feed_forward_norm(x + self.feed_forward(x)), state


class Transformer(nn.Module):
    """Words in, hidden vectors out; the loss is ``model.words.nll`` of them.

    A state from an earlier segment makes the fast weights go on from there: splitting a text anywhere gives the same
    outputs as the whole, provided that there are no positions, which count from the end of a segment.
    """

    def __init__(self, architecture: Architecture, attention: AttentionConfig, n_words: int) -> None:
        super().__init__()
        if architecture.positions == "relative":
            raise ValueError("architecture.positions=relative is Transformer-XL; build it with build_language_model")
        self.architecture = architecture
        self.words = TiedAdaptiveEmbedding(n_words, architecture.d_model, architecture.cutoffs)
        self.input_dropout = nn.Dropout(architecture.dropout)
        self.blocks = nn.ModuleList(
            Block(architecture, build_attention(attention, architecture.d_model, architecture.n_heads))
            for _ in range(architecture.n_layers)
        )
        self.output_dropout = nn.Dropout(architecture.dropout)
        initialise(self)

    def forward(self, words: Tensor, state: Sequence[MemoryState] | None = None) -> tuple[Tensor, list[MemoryState]]:
        """Return hidden vectors ``[B, T, D]`` of words ``[B, T]`` and the state of every block, not detached."""
        x = self.words.embed(words)
        if self.architecture.positions == "sinusoidal":
            positions = backward_positions(words.shape[1], words.device)
            x = x + sinusoids(positions, self.architecture.d_model).to(x.dtype)
        x = self.input_dropout(x)
        states = []
        for number, block in enumerate(self.blocks):
            x, last = block(x, state[number] if state is not None else None)
            states.append(last)
        return self.output_dropout(x), states

    def state_size(self, length: int) -> int:
        """Return the numbers kept between two words, all blocks and heads; softmax keeps ``length`` keys and values."""
        a = self.architecture
        memory = self.blocks[0].attention.memory  # type: ignore[union-attr]
        per_head = memory.state_size(a.d_model // a.n_heads)  # type: ignore[operator, union-attr]
        return a.n_layers * (2 * length * a.d_model if per_head is None else a.n_heads * int(per_head))


def initialise(model: nn.Module) -> None:
    """Draw the initial parameters as the released code does: N(0, 0.02^2), LayerNorm weights N(1, 0.02^2), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, TiedAdaptiveEmbedding):
            module.reset_parameters()
