"""The exponential of each coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("exp")
class Exp(FeatureMap):
    """phi(x) = exp(x), coordinate by coordinate: before a normalisation by the sum it is the softmax map.

    Nothing holds it back: float32 overflows over x = 88.
    """

    source = "Zhang et al. 2024 (Hedgehog), among the maps that it compares"

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)
