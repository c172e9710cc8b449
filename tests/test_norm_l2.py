"""phi_norm: l2: unit length, and a delta write that removes all its key retrieves."""

from __future__ import annotations

import torch
from rule_cases import EXACT

from fwp_lightning.attention import AttentionConfig, FastWeightMemory


def test_features_have_length_one() -> None:
    memory = FastWeightMemory(AttentionConfig("delta", "silu", phi_norm="l2"), 6)
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(memory.key_features(x).norm(dim=-1), torch.ones(2, 5, 3).double(), **EXACT)
    torch.testing.assert_close(memory.query_features(x).norm(dim=-1), torch.ones(2, 5, 3).double(), **EXACT)


def test_a_whole_delta_write_is_read_back_exactly_where_the_sum_leaves_a_rest() -> None:
    """beta = 1: with |k| = 1 the new value replaces what was retrieved; with sum_j k_j = 1 the length is under one."""
    k = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]], dtype=torch.float64).view(1, 2, 1, 3)
    v = torch.tensor([3.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.ones(1, 2, 1, dtype=torch.float64)
    errors = []
    for norm in ("l2", "sum"):
        memory = FastWeightMemory(AttentionConfig("delta", "relu", phi_norm=norm), 3).double()
        o = memory.read(k[:, -1:], memory.write(k, v, beta))
        errors.append(float((o[0, 0, 0, 0] - v[0, -1, 0, 0]).abs()))
    assert errors[0] < 1e-12
    assert errors[1] > 0.1
