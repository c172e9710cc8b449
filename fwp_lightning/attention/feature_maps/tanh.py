"""The hyperbolic tangent of the fast weight memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("tanh")
class Tanh(FeatureMap):
    """phi(x) = tanh(x): the keys of the fast weight memory."""

    source = "Schlag, Munkhdalai, Schmidhuber 2021 (Fast Weight Memory)"
    signed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)
