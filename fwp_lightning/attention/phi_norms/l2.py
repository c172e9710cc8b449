"""Keys and queries of length one."""

from __future__ import annotations

import torch
from torch import Tensor

from fwp_lightning.attention.phi_norms.phi_norm import PHI_NORMS, PhiNorm


@PHI_NORMS.register("l2")
class L2Norm(PhiNorm):
    """phi'(x) = phi(x) / (|phi(x)| + eps).

    A delta write with beta = 1 then removes all that its key retrieves: I - k k^T is a projection. Follow-ups take it
    instead of the sum.
    """

    source = "Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule), keys and queries"

    def divide(self, phi: Tensor, eps: float) -> Tensor:
        return phi / (torch.linalg.vector_norm(phi, dim=-1, keepdim=True) + eps)
