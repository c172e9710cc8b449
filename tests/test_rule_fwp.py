"""The rule of 1991: its equation step by step, and the sum rule as its linear form."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, assert_same, config_of, make_inputs, memory_of, results_and_gradients, some_state

from fwp_lightning.attention.rules.fwp import FwpOptions


@pytest.mark.parametrize("backend", ["reference", "scan"])
def test_equals_the_equations_with_an_explicit_memory(backend: str) -> None:
    """Eqs. 1-3: a (x) b with a the value; y = W x with x the query."""
    rule = memory_of(config_of("fwp"), 4, 3, 2).rule
    x = make_inputs(rule, 2, 7, 2, 4, 3)
    o, (last,) = rule.scan(x["q"], x["k"], x["v"], gates=(), state=None, backend=backend, causal=True)
    for i in range(2):
        for j in range(2):
            W = torch.zeros(3, 4).double()
            for t in range(7):
                W = torch.tanh(W + torch.outer(x["v"][i, t, j], x["k"][i, t, j]))
                torch.testing.assert_close(o[i, t, j], W @ x["q"][i, t, j], **EXACT)
            torch.testing.assert_close(last[i, j], W.T, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_with_identity_it_is_the_sum_rule(backend: str) -> None:
    linear = memory_of(config_of("fwp", FwpOptions(activation="identity")), 5, 3, 2).rule
    plain = memory_of(config_of("sum"), 5, 3, 2).rule
    x, state = make_inputs(plain, 2, 40, 2, 5, 3), some_state(plain, 2, 2, 5, 3)
    ours = results_and_gradients(linear, x, state, backend=backend)
    assert_same(ours, results_and_gradients(plain, x, state, backend="reference"), **EXACT)


def test_tanh_keeps_every_weight_within_one() -> None:
    rule = memory_of(config_of("fwp"), 5, 3, 2).rule
    x = make_inputs(rule, 2, 60, 2, 5, 3)
    _, (W,) = rule.scan(None, x["k"], 100 * x["v"], gates=(), state=None, backend="scan", causal=True)
    assert float(W.abs().max()) <= 1


def test_only_writing_gives_the_same_memory_and_gradients() -> None:
    rule = memory_of(config_of("fwp"), 5, 3, 2).rule
    x = make_inputs(rule, 2, 9, 2, 5, 3)
    del x["q"]
    ours, theirs = (results_and_gradients(rule, x, backend=backend) for backend in ("scan", "reference"))
    assert_same(ours, theirs, **EXACT)


def test_a_second_derivative_is_refused_not_lost() -> None:
    rule = memory_of(config_of("fwp"), 5, 3, 2).rule
    x = {n: t.requires_grad_() for n, t in make_inputs(rule, 1, 4, 2, 5, 3).items()}
    o, _ = rule.scan(x["q"], x["k"], x["v"], gates=(), state=None, backend="scan", causal=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(o.sum(), x["k"], create_graph=True)
