"""Updates of a task: how many there may be, and what one is made of, so that its cost can be measured without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch


def check_max_steps(max_steps: int, steps_per_block: int, trainer: L.Trainer) -> None:
    """Raise ``ValueError`` where the last steps would come after the last validation."""
    every = trainer.check_val_every_n_epoch or 1
    between = steps_per_block * every
    if max_steps % between:
        raise ValueError(
            f"model.max_steps={max_steps} must be a multiple of the {between} steps between validations "
            f"(data.steps_per_block={steps_per_block} x trainer.check_val_every_n_epoch={every})"
        )


@dataclass(frozen=True)
class Update:
    """An optimiser step of one device: its micro-batches, each of so many sequences, and the step itself."""

    micro_batch: Callable[[int], object]
    """Forward and backward of this many sequences of made-up words."""
    step: Callable[[], object]
    """The optimiser's own work; it leaves gradients where they are."""
    sequences: int
    """Of a micro-batch."""
    sequence_length: int
    micro_batches: int
    parameters: int
    unit: str = "words"
    """What sequences consist of."""

    @property
    def words(self) -> int:
        """Words of the update."""
        return self.micro_batches * self.sequences * self.sequence_length

    @property
    def fixed_mb(self) -> float:
        """MiB of weights, gradients and Adam's two moments, in float32."""
        return 4 * 4 * self.parameters / 2**20


def made_up_words(n_words: int, shape: tuple[int, int], exponent: float) -> torch.Tensor:
    """Return word numbers, the r-th most frequent one with a probability proportional to ``r^-exponent``."""
    totals = torch.arange(1, n_words + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
    return torch.searchsorted(totals, torch.rand(shape, dtype=torch.float64) * totals[-1]).clamp(max=n_words - 1)
