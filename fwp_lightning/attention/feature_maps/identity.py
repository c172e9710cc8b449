"""No feature map."""

from __future__ import annotations

from torch import Tensor

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("identity")
class Identity(FeatureMap):
    """phi(x) = x: the linear attention of 1991, without a kernel."""

    source = "Schmidhuber 1991"
    signed = True

    def forward(self, x: Tensor) -> Tensor:
        return x
