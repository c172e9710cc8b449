"""The rectified linear unit."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("relu")
class Relu(FeatureMap):
    """phi(x) = max(x, 0): all features of a vector can be 0, so that its normalisation needs an eps."""

    source = "Kasai et al. 2021, behind a learned projection; Qin et al. 2022 (cosFormer)"

    def forward(self, x: Tensor) -> Tensor:
        return relu(x)
