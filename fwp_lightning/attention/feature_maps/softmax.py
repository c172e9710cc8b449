"""Softmax over the features of each vector."""

from __future__ import annotations

import torch
from torch import Tensor

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("softmax")
class Softmax(FeatureMap):
    """phi(x)_i = exp(x_i) / sum_j exp(x_j): over the features of a vector, not over the steps.

    The features are positive and add up to 1, so that phi_norm: sum changes nothing.
    """

    source = "Shen et al. 2021 (Efficient Attention), for queries; Irie et al. 2021, for keys and queries"

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)
