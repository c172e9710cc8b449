"""No normalisation of features."""

from __future__ import annotations

from torch import Tensor

from fwp_lightning.attention.phi_norms.phi_norm import PHI_NORMS, PhiNorm


@PHI_NORMS.register("none")
class NoNorm(PhiNorm):
    """phi'(x) = phi(x)."""

    cancels_scale = False

    def divide(self, phi: Tensor, eps: float) -> Tensor:
        return phi
