"""Softmax attention: the Transformer's own memory."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fwp_lightning import ops
from fwp_lightning.attention.rules.rule import RULES, Rule, State


@RULES.register("softmax")
class SoftmaxRule(Rule):
    """o = sum_t softmax(q . k_t / sqrt(d)) v_t: keep all keys and values; the Transformer's own memory."""

    source = "Vaswani et al. 2017, eq. 1"
    goes_with: ClassVar = {"feature_map": "identity"}
    causal_only = False
    takes_padding = False
    feature_maps = ("identity",)
    phi_norms = ("none",)
    attention_norms = ("none",)
    why_not = "it normalises by itself"
    has_attention_weights = True

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
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

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return torch.softmax(ops.attention_weights(q, k) * q.shape[-1] ** -0.5, dim=-1)

    def state_size(self, n_features: int, d_value: int) -> int | None:
        return None
