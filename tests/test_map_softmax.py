"""phi(x) = softmax(x) over features: positive, of sum one, whatever the size of x."""

from __future__ import annotations

import torch

from fwp_lightning.attention import FEATURE_MAPS, AttentionConfig


def test_features_add_up_to_one_also_where_exponentials_overflow() -> None:
    phi = FEATURE_MAPS["softmax"](4, AttentionConfig("sum", "softmax"))
    x = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]], [[500.0, 400.0, 0.0, -500.0]]]])
    features = phi(x)
    torch.testing.assert_close(features.sum(-1), torch.ones(1, 2, 1))
    torch.testing.assert_close(features[0, 0, 0], x[0, 0, 0].exp() / x[0, 0, 0].exp().sum())
    torch.testing.assert_close(features[0, 1, 0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
