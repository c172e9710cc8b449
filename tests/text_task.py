"""A task that trains on text in milliseconds: a table of word pairs, and a record of what it has read."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fwp_lightning.data.wikitext import Segment, WikiTextData


class PairsTask(LightningModule):
    """Predicts a word from the one before it; `read` depends on every token that was seen, and on the order."""

    monitor = "valid/loss"
    monitor_mode = "min"

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.register_buffer("read", torch.zeros((), dtype=torch.int64))

    def build_model(self, datamodule: WikiTextData) -> nn.Module:
        return nn.Embedding(datamodule.vocabulary_size, datamodule.vocabulary_size)

    def configure_model(self) -> None:
        self.model = self.build_model(self.trainer.datamodule)

    def describe(self) -> dict[str, Any]:
        return {"n_params": sum(p.numel() for p in self.model.parameters())}

    def loss(self, batch: Segment) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch.inputs).flatten(0, 1), batch.targets.flatten())

    def training_step(self, batch: Segment, index: int) -> Tensor:
        seen = torch.cat([batch.inputs.flatten(), torch.tensor([batch.part, batch.continues])])
        # a prime below 2**24: exact in the float32 that Lightning averages in
        for token in seen.tolist():
            self.read.mul_(31).add_(token + 1).remainder_(16_777_213)
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=1)
        self.log("train/read", self.read.double(), on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)
        return loss

    def validation_step(self, batch: Segment, index: int) -> None:
        self.log("valid/loss", self.loss(batch), batch_size=batch.targets.numel())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)
