"""What the processes of a run that trains on several devices tell each other."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """Return what each process of a run has, the first process's first."""
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found
