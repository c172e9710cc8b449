"""Answering questions in a sequence: cross entropy and accuracy where something is asked; AdamW, warm-up, cosine."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.data.scored_sequences import Scored, ScoredSequences
from fwp_lightning.models.sequence_model import SequenceArchitecture, SequenceModel
from fwp_lightning.tasks.description import describe_model
from fwp_lightning.tasks.updates import check_max_steps


class AnsweringTask(L.LightningModule):
    """Train a small sequence model on generated questions for ``max_steps`` optimiser steps, then test it."""

    monitor = "valid/loss"
    monitor_mode = "min"

    model: SequenceModel
    steps: int
    """Optimiser steps done."""
    tokens: int
    """Tokens read in training."""

    def __init__(
        self,
        attention: AttentionConfig,
        architecture: SequenceArchitecture,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        max_steps: int = 10_000,
    ) -> None:
        """Check the numbers.

        Args:
            attention: of every block.
            architecture: sizes, convolution and positions.
            lr: AdamW's learning rate after the warm-up.
            weight_decay: of matrices and filters; embedding, norms and biases have none.
            warmup_steps: optimiser steps of the linear warm-up.
            max_steps: optimiser steps; the cosine ends there at 0.
        """
        super().__init__()
        for name, number in [("lr", lr), ("max_steps", max_steps)]:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"model.{name}={number} must be > 0")
        if not weight_decay >= 0:
            raise ValueError(f"model.weight_decay={weight_decay} must be >= 0")
        if not 0 <= warmup_steps <= max_steps:
            raise ValueError(f"model.warmup_steps={warmup_steps} must be from 0 to max_steps={max_steps}")
        self.attention, self.architecture = attention, architecture
        self.lr, self.weight_decay, self.warmup_steps, self.max_steps = lr, weight_decay, warmup_steps, max_steps
        self.diverged: str | None = None
        self.steps = self.tokens = 0

    @property
    def data(self) -> ScoredSequences:
        """The datamodule."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ScoredSequences)
        return data

    def build_model(self, data: L.LightningDataModule) -> nn.Module:
        """Return a fresh model for ``data``."""
        assert isinstance(data, ScoredSequences)
        return SequenceModel(self.architecture, self.attention, data.vocabulary_size)

    def configure_model(self) -> None:
        """Build the model once the data are known."""
        if not hasattr(self, "model"):
            self.model = self.build_model(self.data)  # type: ignore[assignment]

    def describe(self) -> dict[str, Any]:
        """Return the facts of a run that its configuration does not spell out."""
        return describe_model(self.model, self.attention, self.model.state_size(self.data.length))

    def check_numbers(self, trainer: L.Trainer, data: ScoredSequences) -> None:
        """Raise ``ValueError`` where numbers of trainer, data and task do not fit together."""
        check_max_steps(self.max_steps, data.steps_per_block, trainer)

    def on_fit_start(self) -> None:
        """Refuse numbers that do not fit together."""
        self.check_numbers(self.trainer, self.data)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its schedule by the step."""
        decayed = [p for name, p in self.model.named_parameters() if p.dim() > 1 and not name.startswith("embedding")]
        others = [p for p in self.model.parameters() if all(p is not q for q in decayed)]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, done: int) -> float:
        """Return the factor on the learning rate of the update after ``done`` others."""
        if done < self.warmup_steps:
            return (done + 1) / self.warmup_steps
        return (1 + math.cos(math.pi * min(done, self.max_steps) / self.max_steps)) / 2

    def answers(self, batch: Scored) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``[N, V]``, right answers ``[N]`` and kinds ``[N]`` of the N questions of a batch."""
        asked = batch.kinds > 0
        # only where something is asked does the softmax have work
        return self.model.logits(self.model(batch.inputs)[asked]), batch.targets[asked], batch.kinds[asked]

    def training_step(self, batch: Scored, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch's questions."""
        logits, targets, _ = self.answers(batch)
        loss = cross_entropy(logits, targets)
        self.tokens += batch.inputs.numel()
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(targets))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Scored, batch_idx: int) -> None:
        """Count; end the training after ``max_steps``."""
        self.steps = self.trainer.global_step
        if batch_idx + 1 < self.trainer.num_training_batches:
            return
        self._log_step()
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            self.diverged = f"the training loss is {loss} at step {self.steps}"
        if self.diverged or self.steps >= self.max_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: Scored, batch_idx: int) -> None:
        """Score the validation questions."""
        self._score("valid", batch)

    def test_step(self, batch: Scored, batch_idx: int) -> None:
        """Score the test questions, with the last weights."""
        self._score("test", batch)

    def _score(self, split: str, batch: Scored) -> None:
        logits, targets, kinds = self.answers(batch)
        right = (logits.argmax(-1) == targets).double()
        self._log(f"{split}/loss", cross_entropy(logits, targets), len(targets))
        self._log(f"{split}/accuracy", right.mean(), len(targets))
        for number, name in enumerate(self.data.kinds, start=1):
            of_kind = right[kinds == number]
            if len(self.data.kinds) > 1 and len(of_kind):
                self._log(f"{split}/accuracy_{name}", of_kind.mean(), len(of_kind))
        self._log_step()

    def _log(self, name: str, value: Tensor, n: int) -> None:
        self.log(name, value, on_step=False, on_epoch=True, batch_size=n)

    def _log_step(self) -> None:
        """Say at which step the metrics of an epoch stand."""
        self.log("step", float(self.steps), on_step=False, on_epoch=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts."""
        checkpoint["answering"] = {"steps": self.steps, "tokens": self.tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counts over."""
        self.steps, self.tokens = checkpoint["answering"]["steps"], checkpoint["answering"]["tokens"]
