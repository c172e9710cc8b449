"""The delta-product rule: several delta writes a step, and the delta rule as one of them."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, assert_same, config_of, make_inputs, memory_of, results_and_gradients

from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.attention.rules.delta_product import DeltaProductOptions
from fwp_lightning.models.retrieval import RetrievalModel


def test_a_step_is_a_product_of_householder_matrices() -> None:
    """The source's own form: S_t = S_{t-1} A_1 .. A_n + ..., A_i = I - beta_i k_i k_i^T, S value x key."""
    rule = memory_of(config_of("delta_product", DeltaProductOptions(3)), 4, 3, 2).rule
    x = make_inputs(rule, 2, 5, 2, 4, 3)
    o, (W,) = rule.scan(x["q"], x["k"], x["v"], gates=(x["beta"],), state=None, backend="reference", causal=True)
    assert o is not None
    assert o.shape == (2, 5, 2, 3)
    for i in range(2):
        for j in range(2):
            S = torch.zeros(3, 4).double()
            for t in range(5):
                for key, value, beta in zip(*(x[n][i, 3 * t : 3 * t + 3, j] for n in ("k", "v", "beta")), strict=True):
                    S = S @ (torch.eye(4).double() - beta * torch.outer(key, key)) + beta * torch.outer(value, key)
                torch.testing.assert_close(o[i, t, j], S @ x["q"][i, t, j], **EXACT)
            torch.testing.assert_close(W[i, j], S.T, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_one_write_a_step_is_the_delta_rule(backend: str) -> None:
    one = memory_of(config_of("delta_product", DeltaProductOptions(1)), 5, 3, 2).rule
    delta = memory_of(config_of("delta"), 5, 3, 2).rule
    x = make_inputs(delta, 2, 40, 2, 5, 3)
    state = (torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)
    ours = results_and_gradients(one, x, state, backend=backend)
    assert_same(ours, results_and_gradients(delta, x, state, backend="reference"), **EXACT)


def test_a_layer_with_one_write_a_step_is_the_delta_layer() -> None:
    """Projections and their initial values included."""
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for rule, options in (("delta_product", DeltaProductOptions(1)), ("delta", None)):
        torch.manual_seed(5)
        layer = build_attention(AttentionConfig(rule, "elu", phi_norm="sum", rule_options=options), 12, 3).double()
        outputs.append(layer(x)[0])
    torch.testing.assert_close(*outputs, **EXACT)


def test_the_pairs_of_a_step_lie_together_and_the_heads_apart() -> None:
    """Of two layers that differ in what the second pair of head 1 writes, only head 1 reads another value."""
    torch.manual_seed(5)
    layer = build_attention(AttentionConfig("delta_product", "elu", phi_norm="sum"), 12, 3)
    x = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.W_o.weight.copy_(torch.eye(12))
        before, _ = layer(x)
        # of two pairs and three heads of four numbers each
        layer.W_v.weight[12 + 4 : 12 + 8] = 0.0
        after, _ = layer(x)
    changed = (before != after).any(1).squeeze(0)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("compute", ["plain", "factored"])
def test_retrieval_writes_all_keys_of_a_pair(compute: str) -> None:
    torch.manual_seed(0)
    config = AttentionConfig("delta_product", "elu", phi_norm="sum", rule_options=DeltaProductOptions(2))
    model = RetrievalModel(config, n_keys=4, d_key=6, compute=compute).double()  # type: ignore[arg-type]
    keys, values = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[2, 0, 3, 1]])
    y = model(keys, values, keys[:, :2])
    # one pair after the other, by the definition
    W = torch.zeros(6, 4).double()
    pairs = torch.cat([torch.eye(4).double()[values[0]], model.key_embedding[keys[0]]], -1)
    for pair, value in zip(pairs, values[0], strict=True):
        for n in range(2):
            rows = slice(6 * n, 6 * n + 6)
            key = model.memory.key_features((model.W_k[rows] @ pair + model.b_k[rows])[None, None, None])[0, 0, 0]
            beta = torch.sigmoid(model.W_beta[n] @ pair + model.b_beta[n])
            W = W + torch.outer(key, beta * (torch.eye(4).double()[value] - W.T @ key))
    q = model.memory.query_features((model.key_embedding[:2] @ model.W_q.T + model.b_q)[None, :, None])[0, :, 0]
    torch.testing.assert_close(y[0], q @ W, **EXACT)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("n_steps", [0, -1, 1.5])
def test_a_number_of_writes_that_is_none_is_refused(n_steps: int) -> None:
    with pytest.raises(ValueError, match=r"rule_options\.n_steps=.* must be a whole number >= 1"):
        DeltaProductOptions(n_steps)
