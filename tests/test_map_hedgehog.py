"""The learned map: its equation, its identity start, and parameters of each head for keys and queries."""

from __future__ import annotations

import torch
from rule_cases import EXACT

from fwp_lightning.attention import AttentionConfig, FastWeightMemory, build_attention

CONFIG = AttentionConfig("sum", "hedgehog", attention_norm="readout")


def test_features_are_softmaxes_of_a_projection_and_of_its_negative() -> None:
    memory = FastWeightMemory(CONFIG, 4, n_heads=2).double()
    M = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi = memory.feature_map
    x = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    positive, negative = torch.softmax(x, -1), torch.softmax(-x, -1)
    # it starts as the identity, for keys and queries
    for features in (memory.key_features(x), memory.query_features(x)):
        torch.testing.assert_close(features, torch.cat([positive, negative], -1), **EXACT)
    with torch.no_grad():
        phi.M_k.copy_(M)  # type: ignore[operator, union-attr]
    for h in range(2):
        for t in range(3):
            y = M[h] @ x[0, t, h]
            expected = torch.cat([torch.softmax(y, 0), torch.softmax(-y, 0)])
            torch.testing.assert_close(memory.key_features(x)[0, t, h], expected, **EXACT)
    torch.testing.assert_close(memory.query_features(x), torch.cat([positive, negative], -1), **EXACT)


def test_it_is_trained_with_the_layer_and_its_start_uses_no_random_numbers() -> None:
    torch.manual_seed(5)
    layer = build_attention(CONFIG, 12, 3)
    torch.manual_seed(5)
    other = build_attention(AttentionConfig("sum", "elu", attention_norm="readout"), 12, 3)
    torch.testing.assert_close(layer.W_q.weight, other.W_q.weight, rtol=0, atol=0)
    y, _ = layer(torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1)))
    y.square().sum().backward()
    learned = dict(layer.memory.feature_map.named_parameters())
    assert {name: p.shape for name, p in learned.items()} == {"M_k": (3, 4, 4), "M_q": (3, 4, 4)}
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned.values())
