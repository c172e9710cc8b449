"""Recurrent Delta Net: its equations step by step, and the delta rule with softmax keys without recurrence."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, config_of, make_inputs, memory_of, run

from fwp_lightning.attention import AttentionConfig, build_attention


@pytest.mark.parametrize("backend", ["reference", "scan"])
def test_equals_the_equations_with_an_explicit_memory(backend: str) -> None:
    rule = memory_of(config_of("recurrent_delta"), 4, 3, 2).rule
    x = make_inputs(rule, 2, 7, 2, 4, 3)
    o, (last_W, last_y) = run(rule, x, backend=backend)
    assert o is not None
    for j in range(2):
        R_q, R_k, R_v, r_b = rule.R[j].split([4, 4, 3, 1], dim=-1)  # type: ignore[operator, union-attr]
        for i in range(2):
            W, y = torch.zeros(4, 3).double(), torch.zeros(3).double()
            for t in range(7):
                a = torch.tanh(y)
                q = torch.softmax(x["q"][i, t, j] + R_q.T @ a, 0)
                k = torch.softmax(x["k"][i, t, j] + R_k.T @ a, 0)
                v = x["v"][i, t, j] + R_v.T @ a
                beta = torch.sigmoid(x["beta"][i, t, j] + r_b[:, 0] @ a)
                W = W + torch.outer(k, beta * (v - W.T @ k))
                y = W.T @ q
                torch.testing.assert_close(o[i, t, j], y, **EXACT)
            torch.testing.assert_close(last_W[i, j], W, **EXACT)
            torch.testing.assert_close(last_y[i, j], y, **EXACT)


def test_without_recurrent_weights_it_is_the_delta_rule_on_softmax_keys() -> None:
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(5)
    recurrent = build_attention(AttentionConfig("recurrent_delta", "identity"), 12, 3).double()
    delta = build_attention(AttentionConfig("delta", "softmax"), 12, 3).double()
    with torch.no_grad():
        recurrent.memory.rule.R.zero_()  # type: ignore[operator, union-attr]
    delta.load_state_dict({n: p for n, p in recurrent.state_dict().items() if not n.endswith("rule.R")})
    torch.testing.assert_close(recurrent(x)[0], delta(x)[0], **EXACT)


def test_its_weights_start_as_in_the_source_and_a_map_before_it_is_refused() -> None:
    rule = memory_of(config_of("recurrent_delta"), 16, 16, 8).rule
    assert float(rule.R.detach().std()) == pytest.approx(0.25, rel=0.02)  # type: ignore[operator, union-attr]
    with pytest.raises(
        ValueError, match="rule recurrent_delta has no feature_map=elu: it maps keys and queries itself"
    ):
        AttentionConfig("recurrent_delta", "elu")
