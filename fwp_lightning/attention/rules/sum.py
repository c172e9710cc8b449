"""The sum rule: linear attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention.rules.rule import RULES, Rule, State


@RULES.register("sum")
class SumRule(Rule):
    """W_t = W_{t-1} + k_t (x) v_t: add every outer product; linear attention."""

    source = "Katharopoulos et al. 2020; Schlag, Irie, Schmidhuber 2021, eqs. 17-19"
    goes_with: ClassVar = {"feature_map": "elu", "attention_norm": "readout"}
    causal_only = False
    is_linear_in_keys = True
    carried_query_gradients = ("exact", "none")
    has_attention_weights = True
    kernel_is_enough = True

    def scan(self, q, k, v, *, gates, state, backend, causal):  # type: ignore[no-untyped-def]
        o, W = ops.sum_rule(q, k, v, state[0] if state else None, causal=causal, backend=backend)
        return o, (W,)

    def scan_apart(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: State, backend: str, causal: bool
    ) -> tuple[Tensor, State]:
        """Same numbers as ``scan``, but no gradient of what is read from the incoming state reaches the queries.

        The released kernel's backward pass rebuilds the memory from zero, so that it lacks that term of dL/dq.
        """
        o, (written,) = self.scan(q, k, v, gates=(), state=None, backend=backend, causal=causal)
        return o + self.read(q.detach(), state), (written + state[0],)

    def attention_weights(self, q: Tensor, k: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        return ops.attention_weights(q, k)
