"""Sinusoidal positions as the released language model has them: counted backwards from the end of a segment."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """Return ``[sin(p f_0), .., cos(p f_0), ..]`` ``[T, D]`` for positions ``[T]``, ``f_j = 10000^(-2j/D)``.

    The halves are concatenated, not interleaved, as in the released code.
    """
    j = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float64)
    angles = positions.to(torch.float64).unsqueeze(-1) * torch.pow(10000.0, -j / d_model)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def backward_positions(length: int, device: torch.device | str | None = None) -> Tensor:
    """Return ``T-1, .., 0``: the last token of a segment stands at 0, whatever the segment's length.

    >>> backward_positions(3).tolist()
    [2, 1, 0]
    """
    return torch.arange(length - 1, -1, -1, device=device)
