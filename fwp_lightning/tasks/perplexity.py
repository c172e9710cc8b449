"""Word-level perplexity from the negative log-likelihoods of words, summed in float64 over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WordPerplexity(Metric):
    """``exp(sum of NLL / number of words)``: every word counts alike, whatever batch or segment it came in."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Add the negative log-likelihoods (natural logarithm) of some words."""
        self.total = self.total + nll.detach().double().sum()
        self.count = self.count + nll.numel()

    def compute(self) -> Tensor:
        """Return the perplexity; NaN where no word was scored."""
        return torch.exp(self.total / self.count)
