"""The paper's sum normalisation."""

from __future__ import annotations

from torch import Tensor

from fwp_lightning.attention.phi_norms.phi_norm import PHI_NORMS, PhiNorm


@PHI_NORMS.register("sum")
class SumNorm(PhiNorm):
    """phi'(x) = phi(x) / (sum_j phi(x)_j + eps).

    It makes the write weight k_i equal to the total remove weight sum_j k_i k_j (App. A.2).
    """

    source = "Schlag, Irie, Schmidhuber 2021, eq. 29"
    takes_signs = False

    def divide(self, phi: Tensor, eps: float) -> Tensor:
        return phi / (phi.sum(-1, keepdim=True) + eps)
