"""What features of keys and queries are divided by; one file each."""

from fwp_lightning.attention.phi_norms.phi_norm import PHI_NORMS, PhiNorm
from fwp_lightning.registry import import_members

__all__ = ["PHI_NORMS", "PhiNorm"]

import_members(__name__, __path__)
