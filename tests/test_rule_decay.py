"""The decay rule: Ba et al.'s equation step by step, and the sum rule as its limit."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, assert_same, config_of, make_inputs, memory_of, results_and_gradients

from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.attention.rules.decay import DecayOptions


@pytest.mark.parametrize("norm", ["none", "readout"])
def test_equals_the_equation_with_an_explicit_memory_and_a_decay_for_each_head(norm: str) -> None:
    options = DecayOptions(decay=(0.9, 0.5), rate=0.25)
    config = AttentionConfig("decay", "elu", attention_norm=norm, rule_options=options)
    memory = memory_of(config, 4, 3, 2)
    x = make_inputs(memory.rule, 2, 7, 2, 4, 3)
    o, _ = memory(x["q"], x["k"], x["v"])
    phi_q, phi_k = memory.feature_map(x["q"]), memory.feature_map(x["k"])
    for i in range(2):
        for j in range(2):
            W, z = torch.zeros(3, 4).double(), torch.zeros(4).double()
            for t in range(7):
                W = options.decay[j] * W + 0.25 * torch.outer(x["v"][i, t, j], phi_k[i, t, j])
                z = options.decay[j] * z + 0.25 * phi_k[i, t, j]
                size = z @ phi_q[i, t, j] + config.attention_norm_eps if norm == "readout" else 1.0
                torch.testing.assert_close(o[i, t, j], W @ phi_q[i, t, j] / size, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_without_decay_and_at_full_rate_it_is_the_sum_rule(backend: str) -> None:
    options = DecayOptions(decay=(1.0,), rate=1.0)
    decay, plain = (memory_of(config_of(rule, o), 5, 3, 2).rule for rule, o in (("decay", options), ("sum", None)))
    x = make_inputs(plain, 2, 40, 2, 5, 3)
    state = (torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)
    ours = results_and_gradients(decay, x, state, backend=backend)
    assert_same(ours, results_and_gradients(plain, x, state, backend="reference"), **EXACT)


def test_without_decay_the_normalised_layer_is_linear_attention() -> None:
    """A layer of its own, projections and z included."""
    options = DecayOptions(decay=(1.0,), rate=1.0)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for rule, o in (("decay", options), ("sum", None)):
        torch.manual_seed(5)
        layer = build_attention(AttentionConfig(rule, "elu", attention_norm="readout", rule_options=o), 12, 3).double()
        y, state = layer(x)
        outputs.append([y, state.memory[0], state.z, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("decay", [(), (0.9, 1.1), (-0.1,), (float("nan"),)], ids=str)
def test_a_decay_that_is_none_is_refused(decay: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"rule_options\.decay=.* must be from 0 to 1"):
        DecayOptions(decay=decay)


def test_decays_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 heads; give one for all or one for each"):
        build_attention(AttentionConfig("decay", "elu", rule_options=DecayOptions(decay=(0.9, 0.5))), 12, 3)
