"""A normalisation of features as the layer sees it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fwp_lightning.registry import Registry

PHI_NORMS: Registry[type[PhiNorm]] = Registry("phi_norm")


class PhiNorm:
    """Divides the features of each key and query by a size of theirs."""

    source: ClassVar[str] = ""
    """Who wrote it where, for the table in README.md beside this package: ``Ba et al. 2016, eq. 2``."""
    takes_signs: ClassVar[bool] = True
    """Whether features of both signs have such a size; their sum, for one, can be 0."""
    cancels_scale: ClassVar[bool] = True
    """Whether a factor of a whole vector leaves no trace."""

    def divide(self, phi: Tensor, eps: float) -> Tensor:
        """Return features ``[..., K]`` divided by their size plus ``eps``."""
        raise NotImplementedError
