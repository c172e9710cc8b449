"""The gated delta rule: its equation step by step, and the delta rule as its limit."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, assert_same, config_of, make_inputs, memory_of, results_and_gradients

from fwp_lightning.attention.rules.gated_delta import GatedDeltaOptions


@pytest.mark.parametrize("temperature", [1.0, 16.0])
def test_equals_the_equation_with_an_explicit_memory(temperature: float) -> None:
    """The source's own form: S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, S value x key."""
    rule = memory_of(config_of("gated_delta", GatedDeltaOptions(temperature)), 4, 3, 2).rule
    x = make_inputs(rule, 2, 7, 2, 4, 3)
    o, (W,) = rule.scan(
        x["q"], x["k"], x["v"], gates=(x["alpha"], x["beta"]), state=None, backend="reference", causal=True
    )
    for i in range(2):
        for j in range(2):
            S = torch.zeros(3, 4).double()
            for t in range(7):
                key, beta = x["k"][i, t, j], x["beta"][i, t, j]
                removed = torch.eye(4).double() - beta * torch.outer(key, key)
                S = S @ (x["alpha"][i, t, j] ** (1 / temperature) * removed) + beta * torch.outer(x["v"][i, t, j], key)
                torch.testing.assert_close(o[i, t, j], S @ x["q"][i, t, j], **EXACT)
            torch.testing.assert_close(W[i, j], S.T, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_gate_of_one_is_the_delta_rule(backend: str) -> None:
    gated, plain = (memory_of(config_of(rule), 5, 3, 2).rule for rule in ("gated_delta", "delta"))
    x = make_inputs(plain, 2, 40, 2, 5, 3)
    state = (torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)
    ours = results_and_gradients(gated, {**x, "alpha": torch.ones(2, 40, 2).double()}, state, backend=backend)
    assert ours.pop("grad alpha").any()
    assert_same(ours, results_and_gradients(plain, x, state, backend="reference"), **EXACT)


def test_a_gate_forgets_what_delta_leaves_alone() -> None:
    """App. B: a key that is orthogonal to the one written keeps its value under delta, and loses it under a gate."""
    rule = memory_of(config_of("gated_delta", GatedDeltaOptions(1.0)), 2, 1, 1).rule
    k = torch.eye(2).double().view(1, 2, 1, 2)
    v = torch.ones(1, 2, 1, 1).double()
    beta = torch.ones(1, 2, 1).double()
    for alpha, left in ((1.0, 1.0), (0.25, 0.25)):
        gates = (torch.full_like(beta, alpha), beta)
        o, _ = rule.scan(k.flip(1), k, v, gates=gates, state=None, backend="chunked", causal=True)
        assert float(o[0, 1, 0, 0]) == pytest.approx(left)
