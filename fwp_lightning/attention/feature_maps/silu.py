"""SiLU, the map of today's delta networks."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("silu")
class Silu(FeatureMap):
    """phi(x) = x / (1 + exp(-x)): down to -0.28, so that only phi_norm: l2 fits it."""

    source = "Elfwing et al. 2018; Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule)"
    signed = True

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)
