"""Update rules: how pairs are written into a memory and read from it; one file each."""

from fwp_lightning.attention.rules.rule import RULES, Gate, Rule, Sizes, State
from fwp_lightning.registry import import_members

__all__ = ["RULES", "Gate", "Rule", "Sizes", "State"]

import_members(__name__, __path__)
