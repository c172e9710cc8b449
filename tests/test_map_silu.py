"""phi(x) = x sigmoid(x): its values, and why no sum divides it."""

from __future__ import annotations

import pytest
import torch

from fwp_lightning.attention import FEATURE_MAPS, AttentionConfig


def test_values_and_the_minimum_below_zero() -> None:
    phi = FEATURE_MAPS["silu"](3, AttentionConfig("delta", "silu", phi_norm="l2"))
    x = torch.linspace(-6, 6, 600, dtype=torch.float64).view(1, -1, 1, 3)
    torch.testing.assert_close(phi(x), x / (1 + (-x).exp()))
    assert float(phi(x).min()) == pytest.approx(-0.2785, abs=1e-4)


@pytest.mark.parametrize("norm", [{"phi_norm": "sum"}, {"attention_norm": "readout"}], ids=str)
def test_a_normalisation_by_a_sum_is_refused(norm: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="feature_map=silu has features of both signs"):
        AttentionConfig("sum", "silu", **norm)  # type: ignore[arg-type]
