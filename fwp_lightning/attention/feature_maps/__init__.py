"""phi: the maps that turn keys and queries into features whose dot product replaces softmax's kernel; one file each."""

from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap, in_full_precision
from fwp_lightning.registry import import_members

__all__ = ["FEATURE_MAPS", "FeatureMap", "in_full_precision"]

import_members(__name__, __path__)
