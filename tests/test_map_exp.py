"""phi(x) = exp(x): what the softmax map is before its division."""

from __future__ import annotations

import torch
from rule_cases import EXACT

from fwp_lightning.attention import AttentionConfig, FastWeightMemory


def test_divided_by_its_sum_it_is_the_softmax_map() -> None:
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exp, softmax = (
        FastWeightMemory(AttentionConfig("delta", name, phi_norm=norm), 6).key_features(x)
        for name, norm in (("exp", "sum"), ("softmax", "none"))
    )
    torch.testing.assert_close(exp, softmax, **EXACT)
