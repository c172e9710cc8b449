"""Update rules as the layer sees them: how pairs are written into a state and read from it.

A rule is one class: its op, what it needs, and, where they exist, the effective attention weights of a query that is
read last. Feature maps and normalisers are applied before, by ``layer.FastWeightMemory``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fwp_lightning import ops
from fwp_lightning.registry import Registry

RULES: Registry[type[Rule]] = Registry("rule")

State = tuple[Tensor, ...]


class Rule:
    """A rule writes keys and values, already mapped and normalised, into a state: a tuple of tensors, batch first."""

    uses_beta: ClassVar[bool] = False
    causal_only: ClassVar[bool] = True
    has_attention_weights: ClassVar[bool] = False
    """Whether ``attention_weights`` is written."""
    kernel_is_enough: ClassVar[bool] = False
    """True if the attention weights are ``phi(k) . phi(q)`` themselves, so that the features need not be built."""

    def scan(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        *,
        beta: Tensor | None,
        state: State | None,
        backend: str,
        causal: bool,
    ) -> tuple[Tensor | None, State]:
        """Write ``k v`` step by step, read each ``q`` after its step; return outputs ``[B, T, H, V]`` and the state."""
        raise NotImplementedError

    def read(self, q: Tensor, state: State) -> Tensor:
        """Return what queries ``[B, N, H, K]`` retrieve from a state, ``[B, N, H, V]``."""
        return torch.einsum("bnhk,bhkv->bnhv", q, state[0])

    def attention_weights(self, q: Tensor, k: Tensor, beta: Tensor | None) -> Tensor:
        """Return ``a`` ``[B, H, N, T]`` with ``o_n = sum_t a_{n,t} v_t`` for queries read after the last write."""
        raise NotImplementedError

    def state_size(self, n_features: int, d_value: int) -> int | None:
        """Return the numbers kept per head, or None if they grow with the sequence."""
        return n_features * d_value


@RULES.register("sum")
class SumRule(Rule):
    """Add every outer product (eq. 17): linear attention."""

    causal_only = False
    has_attention_weights = True
    kernel_is_enough = True

    def scan(self, q, k, v, *, beta, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.sum_rule(q, k, v, state[0] if state else None, causal=causal, backend=backend)
        return o, (W,)

    def scan_apart(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: State, backend: str, causal: bool
    ) -> tuple[Tensor, State]:
        """Same numbers as ``scan``, but no gradient of what is read from the incoming state reaches the queries.

        The released kernel's backward pass rebuilds the memory from zero, so that it lacks that term of dL/dq.
        """
        o, (written,) = self.scan(q, k, v, beta=None, state=None, backend=backend, causal=causal)
        return o + self.read(q.detach(), state), (written + state[0],)

    def attention_weights(self, q: Tensor, k: Tensor, beta: Tensor | None) -> Tensor:
        return ops.attention_weights(q, k)


@RULES.register("delta")
class DeltaRule(Rule):
    """Replace what the key retrieves by a beta-weighted mix with the new value (eqs. 20-25)."""

    uses_beta = True
    has_attention_weights = True

    def scan(self, q, k, v, *, beta, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.delta_rule(q, k, v, beta, state[0] if state else None, backend=backend)
        return o, (W,)

    def attention_weights(self, q: Tensor, k: Tensor, beta: Tensor | None) -> Tensor:
        return ops.attention_weights(q, k, beta)


@RULES.register("fwm")
class FwmRule(Rule):
    """The delta write, the memory then rescaled to Frobenius norm <= 1 (Schlag et al. 2021, Fast Weight Memory)."""

    uses_beta = True

    def scan(self, q, k, v, *, beta, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.fwm_rule(q, k, v, beta, state[0] if state else None, backend=backend)
        return o, (W,)


@RULES.register("softmax")
class SoftmaxRule(Rule):
    """Keep all keys and values and attend with softmax(q . k / sqrt(d)): the Transformer's own memory."""

    causal_only = False
    has_attention_weights = True

    def scan(self, q, k, v, *, beta, state, backend, causal):  # type: ignore[no-untyped-def]
        if state:
            k, v = torch.cat([state[0], k], dim=1), torch.cat([state[1], v], dim=1)
        if q is None:
            return None, (k, v)
        past = k.shape[1] - q.shape[1]
        if causal and past == 0:
            return self._attend(q, k, v, is_causal=True), (k, v)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(past) if causal else None
        return self._attend(q, k, v, mask), (k, v)

    def read(self, q: Tensor, state: State) -> Tensor:
        return self._attend(q, *state)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).transpose(1, 2)

    def attention_weights(self, q: Tensor, k: Tensor, beta: Tensor | None) -> Tensor:
        return torch.softmax(ops.attention_weights(q, k) * q.shape[-1] ** -0.5, dim=-1)

    def state_size(self, n_features: int, d_value: int) -> int | None:
        return None
