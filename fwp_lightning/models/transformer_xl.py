"""Transformer-XL (Dai et al. 2019), Table 4's baseline: relative positions and a memory of earlier hidden vectors.

For a query at step t and a key that lies p steps back, the score is ``(q_t + u) . k + (q_t + v) . W_r P(p)``, times
1/sqrt(d); P is the sinusoid of the distance. Shapes: M remembered positions, T steps, S = M + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from fwp_lightning.models.adaptive import TiedAdaptiveEmbedding
from fwp_lightning.models.positions import backward_positions, sinusoids
from fwp_lightning.models.transformer import Architecture, Block, initialise


class Relative(NamedTuple):
    """What all blocks share."""

    sinusoids: Tensor
    """``[S, D]`` of the distances S-1, .., 0."""
    u: Tensor
    """``[H, d]``, added to queries before they meet keys."""
    v: Tensor
    """``[H, d]``, added to queries before they meet distances."""
    memory_length: int
    span: int
    """Keys further back than this are not seen; 0: all of the memory and the segment are."""


class RelativeAttention(nn.Module):
    """Softmax attention over the memory and the segment, with scores that know distances; no biases on projections."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model={d_model} does not divide by n_heads={n_heads}; choose another number of heads")
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.W_q, self.W_k, self.W_v, self.W_r, self.W_o = (nn.Linear(d_model, d_model, bias=False) for _ in range(5))

    def forward(self, x: Tensor, memory: Tensor | None, relative: Relative) -> tuple[Tensor, Tensor]:
        """Return the layer's output ``[B, T, D]`` and its input as the next segment's memory, detached."""
        seen = x if memory is None else torch.cat([memory.to(x.dtype), x], dim=1)
        past = seen.shape[1] - x.shape[1]
        q, k, v = self._heads(self.W_q(x)), self._heads(self.W_k(seen)), self._heads(self.W_v(seen))
        r_HSd = self._heads(self.W_r(relative.sinusoids.to(x.dtype)))
        u, bias = relative.u.to(q.dtype).unsqueeze(1), relative.v.to(q.dtype).unsqueeze(1)
        distances = shift((q + bias) @ r_HSd.mT) * self.d_head**-0.5
        visible = torch.ones(x.shape[1], seen.shape[1], dtype=torch.bool, device=x.device).tril(past)
        if relative.span:
            visible = visible.triu(past - relative.span)
        mask = distances.masked_fill(~visible, -torch.inf)
        o = scaled_dot_product_attention(q + u, k, v, attn_mask=mask)
        kept = min(relative.memory_length, seen.shape[1])
        return self.W_o(o.transpose(-2, -3).flatten(-2)), seen[:, seen.shape[1] - kept :].detach()

    def _heads(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., H, T, d]."""
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(-2, -3)


def shift(scores: Tensor) -> Tensor:
    """Turn scores ``[.., T, S]`` by distance S-1, .., 0 into scores by key: row t moves T-1-t places to the left.

    Entries of keys after the query are left over and mean nothing.
    """
    *batch, steps, seen = scores.shape
    return pad(scores, (1, 0)).reshape(*batch, seen + 1, steps)[..., 1:, :].reshape(*batch, steps, seen)


class TransformerXL(nn.Module):
    """Words in, hidden vectors out, as ``Transformer``; the state is each block's input at the last M positions.

    These may be changed between calls: ``memory_length`` is M; ``largest_distance`` above 0 clamps distances, as the
    released evaluation does; with a ``span`` above 0 keys further back are not seen: segments of any length with
    ``memory_length = span = M`` are the same function as segments of one word with a memory of M.
    """

    def __init__(self, architecture: Architecture, n_words: int) -> None:
        super().__init__()
        d_model, n_heads = architecture.d_model, architecture.n_heads
        self.architecture = architecture
        self.memory_length = architecture.memory
        self.largest_distance = 0
        self.span = 0
        self.words = TiedAdaptiveEmbedding(n_words, d_model, architecture.cutoffs)
        self.input_dropout = nn.Dropout(architecture.dropout)
        self.position_dropout = nn.Dropout(architecture.dropout)
        self.blocks = nn.ModuleList(
            Block(architecture, RelativeAttention(d_model, n_heads)) for _ in range(architecture.n_layers)
        )
        self.u = nn.Parameter(torch.empty(n_heads, d_model // n_heads))
        self.v = nn.Parameter(torch.empty(n_heads, d_model // n_heads))
        self.output_dropout = nn.Dropout(architecture.dropout)
        initialise(self)
        for bias in (self.u, self.v):
            nn.init.normal_(bias, std=0.02)

    def forward(self, words: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return hidden vectors ``[B, T, D]`` of words ``[B, T]`` and the memory of every block."""
        x = self.input_dropout(self.words.embed(words))
        past = 0 if state is None else state[0].shape[1]
        distances = backward_positions(past + words.shape[1], words.device)
        if self.largest_distance:
            distances = distances.clamp(max=self.largest_distance)
        table = sinusoids(distances, self.architecture.d_model).to(x.dtype)
        relative = Relative(self.position_dropout(table), self.u, self.v, self.memory_length, self.span)
        memories = []
        for number, block in enumerate(self.blocks):
            x, memory = block(x, state[number] if state is not None else None, relative)
            memories.append(memory)
        return self.output_dropout(x), memories

    def state_size(self, length: int) -> int:
        """Return the keys and values that attention sees at a segment's end: memory and segment, all blocks."""
        return self.architecture.n_layers * (self.memory_length + length) * 2 * self.architecture.d_model
