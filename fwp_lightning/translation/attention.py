"""An attention of the registry with the interface of fairseq's multi-head attention.

fairseq's layout is ``[T, B, C]``; a padding mask ``[B, T]`` is true at padding. Import after ``compatibility.install``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from fairseq.incremental_decoding_utils import with_incremental_state
from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig, FastWeightMemory, MemoryState

Place = Literal["encoder", "decoder", "cross"]
Kept = dict[str, Tensor | None]
IncrementalState = dict[str, Kept]


@with_incremental_state
class RegistryAttention(nn.Module):
    """Multi-head attention over a fast weight memory, in one of a Transformer's three places.

    encoder: all source positions are written, then all are read. decoder: each step is written, then read; decoding
    step by step keeps the memory alone, whose size does not grow. cross: the source is written, the target reads.
    Projections have biases and the initialisation of fairseq's attention; there are no weights to drop out.
    """

    def __init__(
        self, config: AttentionConfig, place: Place, embed_dim: int, num_heads: int, source_dim: int | None = None
    ) -> None:
        """Raise ``ValueError`` for a rule that cannot stand in ``place``."""
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"{embed_dim} dimensions do not divide by {num_heads} attention heads")
        self.place = place
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.memory = FastWeightMemory(config, self.head_dim, n_heads=num_heads)
        pairs = self.memory.rule.pairs
        self._check_place()
        source_dim = source_dim or embed_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(source_dim, pairs * embed_dim)
        self.v_proj = nn.Linear(source_dim, pairs * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        for gate in self.memory.rule.gates:
            width = pairs * num_heads * gate.width(self.head_dim)
            setattr(self, f"{gate.name}_proj", nn.Linear(source_dim, width, bias=False))
        self._initialise(1 / math.sqrt(2) if source_dim == embed_dim else 1.0)

    def _check_place(self) -> None:
        config = self.memory.config
        if self.memory.state_size(self.head_dim) is None:
            raise ValueError(f"rule {config.rule} keeps all keys and values; fairseq's own attention computes it")
        if self.place != "decoder" and self.memory.rule.causal_only:
            raise ValueError(
                f"rule {config.rule} writes in an order, so it has no non-causal form for {self.place} attention; take "
                "it out of what is replaced, or choose sum for non-causal places"
            )
        if self.place == "decoder" and config.favor.stabilizer == "sequence" and config.feature_map == "favor":
            raise ValueError(
                "favor.stabilizer=sequence looks at all keys of a sequence, which causal attention does not allow; "
                "set favor.stabilizer: none, or vector with phi_norm: sum"
            )

    def _initialise(self, gain: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Return outputs ``[T, B, C]`` and None: these attentions have no weights to show.

        ``attn_mask`` is not read but for its presence: the decoder's places are causal by construction.
        """
        q = self._heads(self.q_proj(query))
        written = None if key_padding_mask is None else ~key_padding_mask.bool()
        if self.place == "cross":
            o = self.memory.read(q, self._source_memory(key, written, incremental_state))
        elif self.place == "encoder":
            if attn_mask is not None:
                raise ValueError("a memory that is written whole cannot hide single pairs: attn_mask must be None")
            o, _ = self.memory(q, *self._pairs(query), causal=False, written=written)
        else:
            if incremental_state is None and attn_mask is None and query.shape[0] > 1:
                raise ValueError("decoder attention is causal here: full_context_alignment cannot be had")
            if incremental_state is None and written is not None and bool(written[:, 0].all()):
                # padding behind a sentence cannot reach it, and without it the compiled recurrence does all
                written = None
            state = self._kept(incremental_state)
            o, state = self.memory(q, *self._pairs(query), state, causal=True, written=written)
            self._keep(incremental_state, state)
        return self.out_proj(o.flatten(-2).transpose(0, 1).to(query.dtype)), None

    def _heads(self, x_TBC: Tensor) -> Tensor:
        return x_TBC.transpose(0, 1).unflatten(-1, (self.num_heads, self.head_dim))

    def _pairs(self, source: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        gates = tuple(
            gate.of(self._per_pair(getattr(self, f"{gate.name}_proj")(source), gate.width(self.head_dim)))
            for gate in self.memory.rule.gates
        )
        k, v = (self._per_pair(projection(source), self.head_dim) for projection in (self.k_proj, self.v_proj))
        return k, v, gates

    def _per_pair(self, projected: Tensor, size: int) -> Tensor:
        """Return ``[T, B, n H size]`` as ``[B, n T, H, size]``: the pairs of a step one after the other."""
        pairs = self.memory.rule.pairs
        return projected.transpose(0, 1).unflatten(-1, (pairs, self.num_heads, size)).flatten(1, 2)

    def _source_memory(
        self, source: Tensor | None, written: Tensor | None, incremental_state: IncrementalState | None
    ) -> MemoryState:
        """The memory of the source, written once for all decoding steps."""
        state = self._kept(incremental_state)
        if state is None:
            assert source is not None
            state = self.memory.write(*self._pairs(source), written=written)
            self._keep(incremental_state, state)
        return state

    # --- decoding step by step

    def _kept(self, incremental_state: IncrementalState | None) -> MemoryState | None:
        kept = self._get_input_buffer(incremental_state)
        if not kept:
            return None
        memory = tuple(kept[f"memory{i}"] for i in range(len(kept) - 1))
        return MemoryState(memory, kept["z"])  # type: ignore[arg-type]

    def _keep(self, incremental_state: IncrementalState | None, state: MemoryState) -> None:
        if incremental_state is not None:
            kept: Kept = {f"memory{i}": x for i, x in enumerate(state.memory)}
            self._set_input_buffer(incremental_state, {**kept, "z": state.z})

    def _get_input_buffer(self, incremental_state: IncrementalState | None) -> Kept:
        """Return what is kept between decoding steps; fairseq's decoder layer asks for it by this name."""
        kept: Kept | None = self.get_incremental_state(incremental_state, "attn_state")  # type: ignore[operator]
        return kept or {}

    def _set_input_buffer(self, incremental_state: IncrementalState, kept: Kept) -> Any:
        return self.set_incremental_state(incremental_state, "attn_state", kept)  # type: ignore[operator]

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> Any:
        """Let each beam go on with the memory of the beam that it continues."""
        kept = self._get_input_buffer(incremental_state)
        if kept:
            chosen = {name: None if x is None else x.index_select(0, new_order) for name, x in kept.items()}
            self._set_input_buffer(incremental_state, chosen)
        return incremental_state
