"""A task that trains in milliseconds and obeys the suite's task contract: noisy linear regression.

Noise comes from torch's global generator, so that a run resumed without that generator's state ends elsewhere.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


@dataclass(frozen=True)
class ToyMap:
    kind: str = "identity"
    nu: int = 1


class ToyBatches(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, n_keys: int, n_batches: int) -> None:
        self.n_keys, self.n_batches = n_keys, n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.n_batches):
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(8, self.n_keys, generator=generator)
            yield x, x.sum(dim=1, keepdim=True)


class ToyData(LightningDataModule):
    def __init__(self, n_keys: int = 4, block: int = 5, data_dir: str = "data") -> None:
        super().__init__()
        self.n_keys, self.block = n_keys, block

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ToyBatches(self.n_keys, self.block), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ToyBatches(self.n_keys, 1), batch_size=None)


class ToyTask(LightningModule):
    monitor = "valid/loss"
    monitor_mode = "min"

    def __init__(
        self,
        attention: ToyMap = ToyMap(),
        learning_rate: float = 0.05,
        noise: float = 0.1,
        seconds_per_step: float = 0.0,
        nan_at: int = -1,
        fail_at: int = -1,
        stop_below: float = 0.0,
    ) -> None:
        super().__init__()
        if attention.kind not in ("identity", "tanh"):
            raise ValueError(f"unknown map {attention.kind!r}. Known: identity, tanh.")
        self.attention = attention
        self.learning_rate, self.noise, self.seconds_per_step = learning_rate, noise, seconds_per_step
        self.nan_at, self.fail_at, self.stop_below = nan_at, fail_at, stop_below
        self.diverged: str | None = None
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def build_model(self, datamodule: ToyData) -> nn.Module:
        if self.attention.nu > 9:
            raise ValueError(f"nu={self.attention.nu} is over 9; choose a smaller one")
        return nn.Linear(datamodule.n_keys, 1)

    def configure_model(self) -> None:
        self.model = self.build_model(self.trainer.datamodule)

    @property
    def steps(self) -> int:
        return int(self.done)

    @property
    def tokens(self) -> int:
        return 8 * self.steps

    def describe(self) -> dict[str, Any]:
        return {
            "n_params": sum(p.numel() for p in self.model.parameters()),
            "state": 0,
            "rule": "sum",
            "feature_map": self.attention.kind,
            "phi_norm": "none",
            "attention_norm": "none",
            "backend": "reference",
        }

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        if self.seconds_per_step:
            time.sleep(self.seconds_per_step)
        if self.steps == self.fail_at:
            raise RuntimeError("the toy was told to fail")
        self.done += 1
        loss = (self.model(x + self.noise * torch.randn_like(x)) - y).square().mean()
        # a mean over the epoch, which Lightning logs after the hooks of its end
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("step", float(self.steps), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if 0 <= self.nan_at <= self.steps:
            loss = loss * float("nan")
            self.diverged = f"the loss is NaN at step {self.steps}"
            self.trainer.should_stop = True
        if self.stop_below > loss:
            self.trainer.should_stop = True
        self.log("valid/loss", loss)
        self.log("step", float(self.steps))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)
