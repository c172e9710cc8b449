"""Deterministic parameter-free projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap
from fwp_lightning.ops.first_order import first_order


@FEATURE_MAPS.register("dpfp")
class Dpfp(FeatureMap):
    """DPFP-nu: products of u = [relu(x), relu(-x)] with its own cyclic shifts by 1 .. nu."""

    source = "Schlag, Irie, Schmidhuber 2021, eq. 37"

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__(d_key, config)
        if config.nu > d_key - 1:
            raise ValueError(
                f"nu={config.nu} is over d_key-1={d_key - 1}: the shift by d_key={d_key} pairs relu(x) with relu(-x), "
                "which is always 0, and further shifts only repeat earlier products; choose a smaller nu"
            )
        self.nu = config.nu
        self.n_out = 2 * d_key * config.nu

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = _DpfpFeatures.apply(x, self.nu)
        return features

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        if q.shape[1] != 1:
            return super().kernel(q, k)
        return ops.dpfp_kernel(q[:, 0], k, self.nu).unsqueeze(2)

    def extra_repr(self) -> str:
        return f"nu={self.nu}, n_out={self.n_out}"


class _DpfpFeatures(Function):
    """Blocks j = 1 .. nu of u_i u_{i+j}; saves only x, since autograd would keep every shifted copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nu: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.nu = nu
        u = torch.cat([x, -x], dim=-1).relu_()
        return torch.cat([u * u.roll(-j, -1) for j in range(1, nu + 1)], dim=-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        u = torch.cat([x, -x], dim=-1).relu_()
        grad_u = torch.zeros_like(u)
        for j, grad_j in enumerate(grad.chunk(ctx.nu, dim=-1), start=1):
            grad_u.addcmul_(grad_j, u.roll(-j, -1)).add_((grad_j * u).roll(j, -1))
        grad_u.mul_(u > 0)
        positive, negative = grad_u.chunk(2, dim=-1)
        return positive - negative, None
