"""phi(x) = relu(x): sparse features, and vectors that have none."""

from __future__ import annotations

import torch

from fwp_lightning.attention import AttentionConfig, FastWeightMemory


def test_a_key_without_features_writes_nothing_if_its_norm_has_an_eps() -> None:
    config = AttentionConfig("delta", "relu", phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6)
    memory = FastWeightMemory(config, 3)
    k = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, -3.0]]).view(1, 2, 1, 3)
    torch.testing.assert_close(memory.key_features(k)[0, 0, 0], torch.tensor([0.25, 0.0, 0.75]), atol=1e-6, rtol=0)
    v, beta = torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1)
    both, first = memory.write(k, v, beta), memory.write(k[:, :1], v[:, :1], beta[:, :1])
    torch.testing.assert_close(both.memory[0], first.memory[0], rtol=0, atol=0)
