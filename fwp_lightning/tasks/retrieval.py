"""The retrieval task: squared error, Adam, an evaluation every block of steps, and the paper's stop rule (Sec. 6.1)."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData, RetrievalEvaluation
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.ops import AdamState, PairBatches, PairParameters, train_pairs
from fwp_lightning.tasks.description import describe_model


class RetrievalTask(L.LightningModule):
    """Train a retrieval model until its evaluation loss is at most ``stop_loss`` or makes no progress.

    One Lightning batch is a block of optimiser steps, because a step takes less time than Lightning's loop around it.
    """

    monitor = "valid/loss"
    monitor_mode = "min"

    model: RetrievalModel
    _steps: Tensor
    _tokens: Tensor
    _best: Tensor
    _strikes: Tensor

    def __init__(
        self,
        attention: AttentionConfig,
        d_key: int = 64,
        lr: float = 1e-3,
        readout_norm: Literal["none", "layer_norm"] = "none",
        evaluation_mean: Literal["chunks", "queries"] = "queries",
        stop_loss: float = 1e-3,
        patience: int = 10,
        max_steps: int = 100_000,
        compute: Literal["auto", "plain", "factored", "compiled"] = "auto",
    ) -> None:
        """Check the numbers.

        Args:
            attention: the memory.
            d_key: size of a key before the feature map.
            lr: Adam's learning rate.
            readout_norm: layer_norm: a parameter-free LayerNorm on the output, as the released fwm rule has.
            evaluation_mean: queries: mean over all queries; chunks: the released code's unweighted mean over chunks
                of batch_size.
            stop_loss: stop when the evaluation loss is at most this.
            patience: stop after this many evaluations in a row without a new minimum.
            max_steps: stop after this many optimiser steps.
            compute: auto, plain, factored or compiled: the same function, at different speed.
        """
        super().__init__()
        for name, number in [("d_key", d_key), ("patience", patience), ("max_steps", max_steps), ("lr", lr)]:
            if not number > 0:
                raise ValueError(f"model.{name}={number} must be > 0")
        if not math.isfinite(stop_loss):
            raise ValueError(f"model.stop_loss={stop_loss} must be a number; 0 trains until there is no progress")
        for name, value, known in [
            ("readout_norm", readout_norm, ("none", "layer_norm")),
            ("evaluation_mean", evaluation_mean, ("chunks", "queries")),
            ("compute", compute, ("auto", "plain", "factored", "compiled")),
        ]:
            if value not in known:
                raise ValueError(f"model.{name}={value!r} is unknown. Known: {', '.join(known)}.")
        self.attention = attention
        self.d_key, self.lr, self.readout_norm, self.compute = d_key, lr, readout_norm, compute
        self.evaluation_mean = evaluation_mean
        self.stop_loss, self.patience, self.max_steps = stop_loss, patience, max_steps
        self.automatic_optimization = False
        self.diverged: str | None = None
        self.register_buffer("_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_best", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("_strikes", torch.zeros((), dtype=torch.int64))

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return int(self._steps)

    @property
    def tokens(self) -> int:
        """Key-value pairs written in training."""
        return int(self._tokens)

    def build_model(self, data: L.LightningDataModule) -> nn.Module:
        """Return a fresh model for ``data``."""
        assert isinstance(data, RetrievalData)
        return RetrievalModel(self.attention, data.n_keys, self.d_key, self.readout_norm, self.compute)

    def configure_model(self) -> None:
        """Build the model once the data are known."""
        if not hasattr(self, "model"):
            self.model = self.build_model(self.trainer.datamodule)  # type: ignore[attr-defined,assignment]

    def describe(self) -> dict[str, Any]:
        """Return the facts of a run that its configuration does not spell out."""
        return describe_model(self.model, self.attention, self.model.memory.state_size(self.model.n_keys))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with its default betas and eps (Sec. 6.1)."""
        return BlockAdam(self.model, self.lr)

    def on_fit_start(self) -> None:
        """Refuse several processes, each of which would train the same model on the same sequences."""
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices={self.trainer.world_size}: the retrieval task trains on one, where an update takes "
                "less time than a message between two; set 1, and train several runs at once with --jobs"
            )

    def training_step(self, block: RetrievalBlock, batch_idx: int) -> None:
        """Do one block of optimiser steps."""
        n_steps = min(block.keys.shape[0], self.max_steps - self.steps)
        block = RetrievalBlock(*(x[:n_steps] for x in block))
        mean = self._train(block).mean()
        self._steps += n_steps
        self._tokens += block.keys.numel()
        self._log("train/loss", mean)
        if not torch.isfinite(mean):
            self.diverged = f"training loss {float(mean)} within the {n_steps} steps before step {self.steps}"

    def _train(self, block: RetrievalBlock) -> Tensor:
        """Take the block's steps; return the loss before each."""
        # through Lightning once a block, so that its own step count, which checkpoints are named by, moves on
        wrapped = self.optimizers()
        optimizer: BlockAdam = wrapped.optimizer  # type: ignore[union-attr, assignment]
        if self.model.is_compiled():
            optimizer.block = block
            wrapped.step()  # type: ignore[union-attr]
            return optimizer.losses
        losses = []
        for step, (keys, values, query, target) in enumerate(zip(*block, strict=True), start=1):
            loss = retrieval_loss(self.model(keys, values, query), target).mean()
            optimizer.zero_grad()
            loss.backward()
            (wrapped if step == len(block.keys) else optimizer).step()  # type: ignore[union-attr]
            losses.append(loss.detach())
        return torch.stack(losses)

    def validation_step(self, batch: RetrievalEvaluation, batch_idx: int) -> None:
        """Evaluate, and stop if the paper's rule says so."""
        loss = self.evaluate(batch)
        self._log("valid/loss", loss)
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        if loss < self._best:
            self._best.fill_(loss)
            self._strikes.zero_()
        else:
            # NaN compares false: no progress
            self._strikes += 1
        reached = loss <= self.stop_loss
        stuck = self._strikes >= self.patience
        if reached or stuck or self.steps >= self.max_steps or self.diverged:
            self.trainer.should_stop = True

    def evaluate(self, batch: RetrievalEvaluation) -> Tensor:
        """Return the evaluation loss as the protocol defines it."""
        if getattr(self.model.memory.feature_map, "redraw", None) == "always":
            return self._evaluate_by_chunk(batch)
        losses = retrieval_loss(self.model(batch.keys, batch.values, batch.queries), batch.targets).double()
        if self.evaluation_mean == "queries":
            return losses[batch.mask].mean()
        means = [
            chunk.mean() for row, mask in zip(losses, batch.mask, strict=True) for chunk in row[mask].split(self._chunk)
        ]
        return torch.stack(means).mean()

    @property
    def _chunk(self) -> int:
        return int(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    def _evaluate_by_chunk(self, batch: RetrievalEvaluation) -> Tensor:
        """Evaluate with a random matrix per chunk of queries, which is what a redraw at every forward means."""
        losses = []
        for keys, values, queries, targets, mask in zip(*batch, strict=True):
            pairs = zip(queries[mask].split(self._chunk), targets[mask].split(self._chunk), strict=True)
            for query, target in pairs:
                losses.append(
                    retrieval_loss(self.model(keys[None], values[None], query[None]), target[None])[0].double()
                )
        if self.evaluation_mean == "queries":
            return torch.cat(losses).mean()
        return torch.stack([chunk.mean() for chunk in losses]).mean()

    def _log(self, name: str, value: Tensor) -> None:
        self.log(name, value, on_step=False, on_epoch=True, batch_size=1)
        self.log("step", float(self.steps), on_step=False, on_epoch=True, batch_size=1)


class BlockAdam(torch.optim.Adam):
    """Adam that takes all steps of a block in the compiled kernel where ``block`` is set; its state is torch's own."""

    losses: Tensor

    def __init__(self, model: RetrievalModel, lr: float) -> None:
        super().__init__(model.parameters(), lr=lr, fused=True)
        self.model = model
        self.block: RetrievalBlock | None = None

    def step(self, closure: Any = None) -> Any:
        """Take one step, or those of the block, whose losses are then in ``losses``."""
        if self.block is None:
            return super().step(closure)
        block, self.block = self.block, None
        self.losses = self._train(block)
        return None if closure is None else closure()

    @torch.no_grad()
    def _train(self, block: RetrievalBlock) -> Tensor:
        parameters = self.model.pair_parameters
        states = [self._state_of(p) for p in parameters if p is not None]
        group = self.param_groups[0]
        adam = AdamState(
            means=PairParameters(*(state["exp_avg"] for state in states)),
            squares=PairParameters(*(state["exp_avg_sq"] for state in states)),
            steps=int(states[0]["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
        )
        n_steps = len(block.keys)
        directions = self.model.training_directions(n_steps)
        losses = train_pairs(self.model.pair_memory, parameters, adam, PairBatches(*block), directions)
        for state in states:
            state["step"] += n_steps
        return losses

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state, made as torch makes it at the first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def retrieval_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return ``0.5 |y - onehot(target)|^2`` for each query, ``[B, Q]``, of predictions ``[B, Q, S]`` (Sec. 6.1)."""
    ones = predictions.new_ones(()).expand(*targets.shape, 1)
    error = predictions.scatter_add(-1, targets.unsqueeze(-1), -ones)
    return 0.5 * error.square().sum(-1)
