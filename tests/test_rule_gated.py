"""The gated rule: its equation step by step, the sum rule as its limit, and its normaliser."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, assert_same, config_of, make_inputs, memory_of, results_and_gradients

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.attention.rules.gated import GatedOptions

WHOLE = GatedOptions(write="whole")


@pytest.mark.parametrize("options", [GatedOptions(), WHOLE, GatedOptions(temperature=16.0)], ids=str)
def test_equals_the_equation_with_an_explicit_memory(options: GatedOptions) -> None:
    """One head and one step at a time; W is value x key as in the paper's eq. 52."""
    config = AttentionConfig("gated", "elu", attention_norm="readout", rule_options=options)
    memory = memory_of(config, 4, 3, 2)
    x = make_inputs(memory.rule, 2, 7, 2, 4, 3)
    o, _ = memory(x["q"], x["k"], x["v"], x["alpha"])
    phi_q, phi_k = memory.feature_map(x["q"]), memory.feature_map(x["k"])
    for i in range(2):
        for j in range(2):
            W, z = torch.zeros(3, 4).double(), torch.zeros(4).double()
            for t in range(7):
                alpha = x["alpha"][i, t, j] ** (1 / options.temperature)
                written = 1.0 if options.write == "whole" else 1 - alpha
                W = alpha * W + written * torch.outer(x["v"][i, t, j], phi_k[i, t, j])
                z = alpha * z + written * phi_k[i, t, j]
                expected = W @ phi_q[i, t, j] / (z @ phi_q[i, t, j] + config.attention_norm_eps)
                torch.testing.assert_close(o[i, t, j], expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_gate_of_one_is_the_sum_rule(backend: str) -> None:
    gated, plain = (memory_of(config_of(rule, o), 5, 3, 2).rule for rule, o in (("gated", WHOLE), ("sum", None)))
    x = make_inputs(plain, 2, 40, 2, 5, 3)
    ours = results_and_gradients(gated, {**x, "alpha": torch.ones(2, 40, 2).double()}, backend=backend)
    assert ours.pop("grad alpha").any()
    assert_same(ours, results_and_gradients(plain, x, backend="reference"), **EXACT)


def test_a_gate_of_zero_leaves_the_last_pair_alone() -> None:
    rule = memory_of(config_of("gated", WHOLE), 5, 3, 2).rule
    x = make_inputs(rule, 2, 40, 2, 5, 3)
    x["alpha"] = torch.zeros(2, 40, 2).double()
    o, (W,) = rule.scan(x["q"], x["k"], x["v"], gates=(x["alpha"],), state=None, backend="chunked", causal=True)
    expected = (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(W, x["k"][:, -1].unsqueeze(-1) * x["v"][:, -1].unsqueeze(-2), **EXACT)


def test_a_strong_decay_costs_no_digits_of_what_follows() -> None:
    """A factor of 1e-30 in the middle of a chunk; later pairs are kept whole."""
    rule = memory_of(config_of("gated", WHOLE), 5, 3, 2).rule
    x = make_inputs(rule, 1, 30, 2, 5, 3)
    x["alpha"] = torch.ones(1, 30, 2).double()
    x["alpha"][:, 10:14] = 1e-30
    truth = results_and_gradients(rule, x, backend="reference")["o"]
    narrow = {n: t.float() for n, t in x.items()}
    ours, loop = (results_and_gradients(rule, narrow, backend=way)["o"].double() for way in ("chunked", "reference"))
    assert (ours - truth).norm() <= 2 * (loop - truth).norm()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.* must be a number > 0"):
        GatedOptions(temperature=temperature)


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown rule_options\.write 'hole'\. Did you mean 'whole'\?"):
        GatedOptions(write="hole")  # type: ignore[arg-type]
