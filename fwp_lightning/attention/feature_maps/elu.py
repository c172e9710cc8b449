"""elu(x) + 1, with its delicate end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap
from fwp_lightning.ops.first_order import first_order


@FEATURE_MAPS.register("elu")
class Elu(FeatureMap):
    """phi(x) = elu(x) + 1."""

    source = "Katharopoulos et al. 2020, eq. 7; Schlag, Irie, Schmidhuber 2021, eq. 30"

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = _EluFeatures.apply(x)
        return features


class _EluFeatures(Function):
    """elu(x) + 1 as exp(min(x, 0)) + max(x, 0): nothing is lost against the 1, and the derivative is the first term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = x.clamp(max=0).exp_()
        ctx.save_for_backward(slope)
        return x.clamp(min=0).add_(slope)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (slope,) = ctx.saved_tensors
        return (grad * slope,)
