"""Counter-based seeds: what is drawn at a place of a run depends on the place alone, never on what was drawn before.

So a resumed run needs no generator state, and evaluation does not shift the training data.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator_for(seed: int, *place: str | int) -> torch.Generator:
    """Return a CPU generator for one place, e.g. ``generator_for(1, "train", 17)``."""
    return torch.Generator().manual_seed(_number_of(seed, place))


def numpy_generator_for(seed: int, *place: str | int) -> np.random.Generator:
    """Return NumPy's generator for one place: it shuffles and draws whole numbers several times faster than torch's."""
    return np.random.Generator(np.random.Philox(_number_of(seed, place)))


def _number_of(seed: int, place: tuple[str | int, ...]) -> int:
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
