"""The attention layer: projections around a fast weight memory that is any point of the registry's axes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.attention.feature_maps import FEATURE_MAPS, in_full_precision
from fwp_lightning.attention.phi_norms import PHI_NORMS
from fwp_lightning.attention.rules import RULES, Gate, Sizes
from fwp_lightning.attention.rules.sum import SumRule

Gates = Tensor | tuple[Tensor, ...] | None


class MemoryState(NamedTuple):
    """What passes from one segment to the next; all tensors are batch first, so that beams can be reordered."""

    memory: tuple[Tensor, ...]
    """The rule's own state: W ``[B, H, K, V]``, or softmax's keys and values."""
    z: Tensor | None
    """Sum of key features ``[B, H, K]``, where attention_norm keeps one."""

    def detach(self) -> MemoryState:
        """Return the same numbers, cut from the graph: truncated backpropagation at a segment's border."""
        return MemoryState(tuple(x.detach() for x in self.memory), None if self.z is None else self.z.detach())


class FastWeightMemory(nn.Module):
    """phi, its normalisation, the rule and the normalised read-out, without projections.

    Values are as wide as keys unless ``d_value`` says otherwise. ``gates`` of the methods is what the rule takes of
    each step beside: for delta beta ``[B, T, H]``, the write strength after its sigmoid; a tuple where there are
    several; a rule without gates ignores it. A rule that writes n pairs a step takes keys, values and gates of n T
    steps. Raises ``ValueError`` for an unknown rule, map or backend and for numbers that the chosen ones cannot use.
    """

    def __init__(self, config: AttentionConfig, d_key: int, *, n_heads: int = 1, d_value: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.d_key = d_key
        self.rule = RULES[config.rule](config)
        self.feature_map = FEATURE_MAPS[config.feature_map](d_key, config)
        self.feature_map.make_parameters(n_heads)
        self.rule.make_parameters(Sizes(n_heads, d_key, d_key if d_value is None else d_value))
        self.phi_norm = PHI_NORMS[config.phi_norm]()
        self.fused = _fused_memory(config)
        if config.backend != "auto":
            reason = ops.why_not(config.backend, self.rule.op)
            if reason:
                raise ValueError(reason)

    @in_full_precision
    def key_features(self, k: Tensor) -> Tensor:
        """Return phi(k), divided as phi_norm says (eq. 29), in at least float32."""
        return self.phi_norm.divide(self.feature_map.keys(k), self.config.key_norm_eps)

    @in_full_precision
    def query_features(self, q: Tensor) -> Tensor:
        """Return phi(q), divided as phi_norm says (eq. 29), in at least float32."""
        return self.phi_norm.divide(self.feature_map.queries(q), self.config.query_norm_eps)

    @in_full_precision
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates = None,
        state: MemoryState | None = None,
        *,
        causal: bool = True,
        written: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Return outputs ``[B, T, H, V]`` for queries ``[B, T, H, D]`` and the state after the last step.

        ``written`` ``[B, T]`` is false where a pair is padding, which must not be written.
        """
        if causal:
            self._check_no_stabilizer_over_time("a causal read-out")
        self._start(state)
        taken = self._taken(gates)
        if causal and written is None and self._fuses(k):
            o, new_state = self._fused_scan(q, k, v, taken, state)
        else:
            k_phi, taken = self._written(k, taken, written)
            o, new_state = self._scan(self.query_features(q), k_phi, v, taken, state, causal)
        assert o is not None
        return (o * self.d_key**-0.5 if self.config.output_scale == "rsqrt_d" else o), new_state

    @in_full_precision
    def write(
        self,
        k: Tensor,
        v: Tensor,
        gates: Gates = None,
        state: MemoryState | None = None,
        *,
        written: Tensor | None = None,
    ) -> MemoryState:
        """Return the state after writing all pairs, but for those that ``written`` says are padding; reads nothing."""
        self._start(state)
        self._check_writes_first()
        k_phi, taken = self._written(k, self._taken(gates), written)
        return self._scan(None, k_phi, v, taken, state, causal=True)[1]

    @in_full_precision
    def read(self, q: Tensor, state: MemoryState) -> Tensor:
        """Return what queries ``[B, N, H, D]`` retrieve from a written memory, ``[B, N, H, V]``."""
        self._check_writes_first()
        q_phi = self.query_features(q)
        o = self.rule.read(q_phi, state.memory)
        if state.z is not None:
            o = o / (torch.einsum("bnhk,bhk->bnh", q_phi, state.z) + self.config.attention_norm_eps).unsqueeze(-1)
        return o * self.d_key**-0.5 if self.config.output_scale == "rsqrt_d" else o

    @property
    def has_attention_weights(self) -> bool:
        """Whether ``attention_weights`` exists for these axes."""
        return self.rule.has_attention_weights and self.config.attention_norm != "both"

    @in_full_precision
    def attention_weights(self, q: Tensor, k: Tensor, gates: Gates = None) -> Tensor:
        """Return ``a`` ``[B, H, N, T]``: ``read`` after ``write`` gives ``sum_t a_{n,t} v_t``, whatever the values."""
        self._start(None)
        if self.rule.kernel_is_enough and self.config.phi_norm == "none":
            weights = kernel = self.feature_map.kernel(q, k)
        else:
            q_phi, k_phi = self.query_features(q), self.key_features(k)
            weights = kernel = self.rule.attention_weights(q_phi, k_phi, self._taken(gates))
            if self.config.attention_norm != "none" and not self.rule.z_stores_ones:
                kernel = ops.attention_weights(q_phi, k_phi)
        if self.config.attention_norm != "none":
            weights = weights / (kernel.sum(-1, keepdim=True) + self.config.attention_norm_eps)
        return weights * self.d_key**-0.5 if self.config.output_scale == "rsqrt_d" else weights

    def state_size(self, d_value: int) -> int | None:
        """Return the numbers kept per head between steps, or None if they grow with the sequence."""
        size = self.rule.state_size(self.feature_map.n_out, d_value)
        return size if size is None or self.config.attention_norm == "none" else size + self.feature_map.n_out

    def _check_writes_first(self) -> None:
        if self.rule.reads_while_writing:
            raise ValueError(f"rule {self.config.rule} reads while it writes, so it cannot write first and read later")

    def _taken(self, gates: Gates) -> tuple[Tensor, ...]:
        """Return the gates that the rule takes; ``ValueError`` where one is missing."""
        given = () if gates is None else (gates,) if isinstance(gates, Tensor) else gates
        wanted = self.rule.gates
        if len(given) < len(wanted):
            missing = wanted[len(given)]
            raise ValueError(
                f"rule {self.config.rule} needs {missing.name}{missing.meaning and ', '}{missing.meaning}; "
                f"it takes {', '.join(gate.name for gate in wanted)}"
            )
        return given[: len(wanted)]

    def _written(
        self, k: Tensor, gates: tuple[Tensor, ...], written: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The features of keys, and the gates, with which padding is not written."""
        features = self.key_features(k)
        if written is None:
            return features, gates
        if not self.rule.takes_padding:
            raise ValueError(
                f"rule {self.config.rule} has no step that leaves its memory as it is; leave padding out of its input"
            )
        return self.rule.leave_out(features, gates, written.repeat_interleave(self.rule.pairs, dim=1))

    def _start(self, state: MemoryState | None) -> None:
        """Let a random map draw anew for an empty memory only: a state was written with the matrix it has."""
        if state is None:
            self.feature_map.start_sequence()
        else:
            self._check_no_stabilizer_over_time("a state that is carried in")

    def _check_no_stabilizer_over_time(self, what: str) -> None:
        if self.config.feature_map == "favor" and self.config.favor.stabilizer == "sequence":
            raise ValueError(
                f"favor.stabilizer=sequence looks at all keys of a sequence, which {what} does not allow; "
                "set favor.stabilizer: none, or vector with phi_norm: sum"
            )

    def _fuses(self, k: Tensor) -> bool:
        """Whether one kernel computes all from keys to read-out; a single step is as quick without."""
        return self.fused is not None and k.shape[1] != 1 and self.fused.why_not(k) is None

    def _fused_scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: MemoryState | None
    ) -> tuple[Tensor | None, MemoryState]:
        assert self.fused is not None
        W, z = (None, None) if state is None else (state.memory[0], state.z)
        o, W, z = ops.fused_rule(self.fused, q, k, v, gates[0] if gates else None, W, z)
        return o, MemoryState((W,), z)

    def _scan(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        state: MemoryState | None,
        causal: bool,
    ) -> tuple[Tensor | None, MemoryState]:
        if not causal and self.rule.causal_only:
            raise ValueError(
                f"rule {self.config.rule} writes in an order, so it has no non-causal form; use sum or softmax"
            )
        norm = self.config.attention_norm
        if norm == "none":
            o, memory = self._apply_rule(q, k, v, gates, state.memory if state else None, causal)
            return o, MemoryState(memory, None)
        if self.rule.z_stores_ones:
            return self._scan_with_ones(q, k, v, gates, state, causal)
        z_0 = k.new_zeros(k.shape[0], *k.shape[2:]) if state is None or state.z is None else state.z
        # who reads after the last write needs the last sum alone
        z_BTHK = k.cumsum(1) + z_0.unsqueeze(1) if causal else (k.sum(1) + z_0).unsqueeze(1)
        z_last = z_BTHK[:, -1] if z_BTHK.shape[1] else z_0
        k_write = k
        if norm == "both":
            k_write, gates = self._normalised_retrieval(k, gates[0], z_BTHK - k, fresh=state is None)
        o, memory = self._apply_rule(q, k_write, v, gates, state.memory if state else None, causal)
        if o is not None and q is not None:
            read = (z_BTHK * q).sum(-1) if causal else torch.einsum("bthk,bhk->bth", q, z_BTHK[:, 0])
            o = o / (read + self.config.attention_norm_eps).unsqueeze(-1)
        return o, MemoryState(memory, z_last)

    def _scan_with_ones(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        state: MemoryState | None,
        causal: bool,
    ) -> tuple[Tensor | None, MemoryState]:
        """Divide what is read by what the same memory gives for the value 1: z is its column for that value."""
        memory = None
        if state is not None:
            assert state.z is not None
            memory = (torch.cat([state.memory[0], state.z.unsqueeze(-1)], dim=-1),)
        o, (W,) = self._apply_rule(q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), gates, memory, causal)
        if o is not None:
            o = o[..., :-1] / (o[..., -1:] + self.config.attention_norm_eps)
        return o, MemoryState((W[..., :-1],), W[..., -1])

    def _apply_rule(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        causal: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        backend = self.config.backend
        if self.config.carried_query_gradient == "none" and state is not None and q is not None:
            assert isinstance(self.rule, SumRule)
            return self.rule.scan_apart(q, k, v, state=state, backend=backend, causal=causal)
        return self.rule.scan(q, k, v, gates=gates, state=state, backend=backend, causal=causal)

    def _normalised_retrieval(
        self, k: Tensor, beta: Tensor, z_before: Tensor, *, fresh: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Divide what the write retrieves by d_t = z_{t-1} . k_t (eq. 27): the same rule with k / d and beta d.

        The first step of an empty memory has d_1 = 1: it retrieves nothing.
        """
        d = (z_before * k).sum(-1)
        if fresh:
            d = torch.cat([torch.ones_like(d[:, :1]), d[:, 1:]], dim=1)
        return k / (d.unsqueeze(-1) + self.config.attention_norm_eps), (beta * d,)

    def extra_repr(self) -> str:
        c = self.config
        return f"rule={c.rule}, phi_norm={c.phi_norm}, attention_norm={c.attention_norm}, backend={c.backend}"


# what a fused memory computes, what is done outside of it, and what its feature maps have no use for
_FUSED = {
    *(
        "rule",
        "feature_map",
        "nu",
        "phi_norm",
        "key_norm_eps",
        "query_norm_eps",
        "attention_norm",
        "attention_norm_eps",
    ),
    *("output_scale", "backend"),
    *("n_features", "favor"),
}


def _default(field: dataclasses.Field[object]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _fused_memory(config: AttentionConfig) -> ops.FusedMemory | None:
    """What the compiled recurrence computes of these axes, or None if it is not to be used or lacks one."""
    if config.rule not in ("sum", "delta") or config.backend not in ("auto", "cpu"):
        return None
    # without a map the rule alone does it
    if config.feature_map not in ("elu", "dpfp") or config.attention_norm == "both":
        return None
    # an axis that this function does not know keeps its meaning only if it is at its default
    if any(getattr(config, x.name) != _default(x) for x in dataclasses.fields(config) if x.name not in _FUSED):
        return None
    return ops.FusedMemory(
        feature_map=config.feature_map,
        nu=config.nu,
        phi_norm=config.phi_norm,
        key_norm_eps=config.key_norm_eps,
        query_norm_eps=config.query_norm_eps,
        attention_norm=config.attention_norm,
        attention_norm_eps=config.attention_norm_eps,
    )


class FastWeightAttention(nn.Module):
    """Multi-head attention over a fast weight memory: ``[B, T, d_model]`` to the same, no biases, no residual."""

    def __init__(self, config: AttentionConfig, d_model: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model={d_model} does not divide by n_heads={n_heads}; choose another number of heads")
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.memory = FastWeightMemory(config, self.d_head, n_heads=n_heads)
        pairs = self.memory.rule.pairs
        self.W_q = nn.Linear(d_model, d_model, bias=False)
        self.W_k = nn.Linear(d_model, pairs * d_model, bias=False)
        self.W_v = nn.Linear(d_model, pairs * d_model, bias=False)
        for gate in self.memory.rule.gates:
            width = n_heads * gate.width(self.d_head)
            setattr(self, f"W_{gate.name}", nn.Linear(d_model, pairs * width, bias=False))
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, *, causal: bool = True
    ) -> tuple[Tensor, MemoryState]:
        """Return the layer's output and the state to pass with the next segment."""
        q = self.W_q(x).unflatten(-1, (self.n_heads, self.d_head))
        k, v = (self._per_pair(W(x), self.d_head) for W in (self.W_k, self.W_v))
        gates = tuple(self._gate(gate, x) for gate in self.memory.rule.gates)
        o, state = self.memory(q, k, v, gates, state, causal=causal)
        return self.W_o(o.flatten(-2).to(x.dtype)), state

    def _per_pair(self, projected: Tensor, size: int) -> Tensor:
        """Return ``[B, T, n H size]`` as ``[B, n T, H, size]``: the pairs of a step one after the other."""
        return projected.unflatten(-1, (self.memory.rule.pairs, self.n_heads, size)).flatten(1, 2)

    def _gate(self, gate: Gate, x: Tensor) -> Tensor:
        return gate.of(self._per_pair(getattr(self, f"W_{gate.name}")(x), gate.width(self.d_head)))


def build_attention(config: AttentionConfig, d_model: int, n_heads: int) -> FastWeightAttention:
    """Return the attention that ``config`` names, ready to be trained."""
    return FastWeightAttention(config, d_model, n_heads)
