"""Language modelling (Sec. 6.3): Adam with warm-up and cosine, truncated or carried context, final evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig, MemoryState
from fwp_lightning.data.corpora import KNOWN_CORPORA
from fwp_lightning.data.wikitext import Batches, Segment, Split, WikiTextData, Windows
from fwp_lightning.models.language_model import LanguageModel, build_language_model
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.models.transformer_xl import TransformerXL
from fwp_lightning.tasks.description import describe_model
from fwp_lightning.tasks.perplexity import WordPerplexity
from fwp_lightning.tasks.processes import gather
from fwp_lightning.tasks.updates import Update, check_max_steps, made_up_words

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("valid", "test")
# of word frequencies by rank, as WikiText-2 has among its rarer words: it decides how costly the adaptive softmax is
WORD_EXPONENT = 1.1
# of a compiled model: with and without a state, whole and short segments, training and each evaluation
MOST_GRAPHS = 64


@dataclass(frozen=True)
class Evaluation:
    """How the best weights are scored at the end, on valid and test; each word but the first is scored once."""

    kind: Literal["windows", "segments"] = "windows"
    """windows: of T words, moved on by ``stride``; segments: T words after T words, the state carried if trained so."""
    stride: int = 1
    """Words that a window scores, its last ones; the first window scores all. 1 in the paper."""
    batch_size: int = 64
    """Windows at a time."""
    contexts: list[list[int]] = field(default_factory=list)
    """Transformer-XL: pairs of memory and target length, scored one after the other as perplexity_1, perplexity_2, ..;
    [] is that of the training."""
    largest_distance: int = 0
    """Transformer-XL: clamp distances to this, as the released evaluation does; 0: do not."""

    def __post_init__(self) -> None:
        if self.kind not in ("windows", "segments"):
            raise ValueError(f"evaluation.kind={self.kind!r} is unknown. Known: windows, segments.")
        for name in ("stride", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"evaluation.{name}={value} must be a whole number >= 1")
        for pair in self.contexts:
            if len(pair) != 2 or any(type(n) is not int for n in pair) or pair[0] < 0 or pair[1] < 1:
                raise ValueError(f"evaluation.contexts holds {pair}; give pairs of memory and target, as in [64, 64]")
        if type(self.largest_distance) is not int or self.largest_distance < 0:
            raise ValueError(f"evaluation.largest_distance={self.largest_distance} must be a whole number >= 0")


class FinalPass(NamedTuple):
    """One pass over a split with the best weights."""

    split: Split
    suffix: str
    """Of the metrics' names: _1, _2, .. for several contexts."""
    length: int
    memory: int | None = None
    span: int = 0


class LanguageModelingTask(L.LightningModule):
    """Train a language model for ``max_steps`` optimiser steps; score the weights of the best validation.

    One Lightning batch is one micro-batch, one Lightning epoch a block of optimiser steps, so that a run can be
    interrupted after any block, in the middle of the text.
    """

    monitor = "valid/loss"
    monitor_mode = "min"

    model: LanguageModel
    steps: int
    """Optimiser steps done."""
    tokens: int
    """Words predicted in training."""

    def __init__(
        self,
        attention: AttentionConfig,
        architecture: Architecture,
        evaluation: Evaluation,
        lr: float = 2.5e-4,
        warmup_steps: int = 2000,
        first_step: Literal["full", "warm"] = "warm",
        max_steps: int = 500_000,
        context: Literal["segment", "carried"] = "segment",
        compute: Literal["eager", "compiled"] = "eager",
    ) -> None:
        """Check the numbers and what does not go together.

        Args:
            attention: of every block.
            architecture: sizes and positions.
            evaluation: of the best weights, at the end.
            lr: Adam's learning rate after the warm-up.
            warmup_steps: optimiser steps of the linear warm-up.
            first_step: full: the first update uses the whole lr, as in the released code; warm: it is warmed up too.
            max_steps: optimiser steps of training; the cosine ends there at 0.
            context: segment: every segment starts from an empty state; carried: it goes on from the last one's.
            compute: eager or compiled (torch.compile): the same function.
        """
        super().__init__()
        for name, number in [("lr", lr), ("max_steps", max_steps)]:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"model.{name}={number} must be > 0")
        if not 0 <= warmup_steps <= max_steps:
            raise ValueError(f"model.warmup_steps={warmup_steps} must be from 0 to max_steps={max_steps}")
        for name, value, known in [
            ("first_step", first_step, ("full", "warm")),
            ("context", context, ("segment", "carried")),
            ("compute", compute, ("eager", "compiled")),
        ]:
            if value not in known:
                raise ValueError(f"model.{name}={value!r} is unknown. Known: {', '.join(known)}.")
        check_context(context, architecture, attention, evaluation)
        self.attention, self.architecture, self.evaluation = attention, architecture, evaluation
        self.lr, self.warmup_steps, self.first_step = lr, warmup_steps, first_step
        self.max_steps, self.context, self.compute = max_steps, context, compute
        self.diverged: str | None = None
        self.perplexity = WordPerplexity()
        self.steps = self.tokens = 0
        self._block_loss: Tensor | float = 0.0
        self._carried: dict[int, list[Any]] = {}
        self._evaluated: list[Any] | None = None
        self._best: dict[str, Any] | None = None
        self._best_loss = math.inf
        self._compiled: Callable[..., Any] | None = None

    @property
    def data(self) -> WikiTextData:
        """The datamodule."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, WikiTextData)
        return data

    def build_model(self, data: L.LightningDataModule) -> nn.Module:
        """Return a fresh model for ``data``."""
        assert isinstance(data, WikiTextData)
        return build_language_model(self.architecture, self.attention, data.vocabulary_size)

    def configure_model(self) -> None:
        """Build the model once the data are known."""
        if not hasattr(self, "model"):
            self.model = self.build_model(self.data)  # type: ignore[assignment]

    def describe(self) -> dict[str, Any]:
        """Return the facts of a run that its configuration does not spell out."""
        return describe_model(self.model, self.attention, self.model.state_size(self.data.length))

    # --- training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam with PyTorch's betas and eps, and its schedule by the step."""
        # a fused optimizer undoes a loss scale by itself, so that Lightning does not let gradients be clipped before it
        mixed = str(self.trainer.precision).endswith("-mixed")
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=not mixed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, done: int) -> float:
        """Return the factor on the learning rate of the update after ``done`` others (released code).

        Linear warm-up, then a cosine over the whole training, which the warm-up does not shift.
        """
        if done == 0 and self.warmup_steps:
            return 1.0 if self.first_step == "full" else 1 / self.warmup_steps
        if done < self.warmup_steps:
            return done / self.warmup_steps
        return (1 + math.cos(math.pi * min(done, self.max_steps) / self.max_steps)) / 2

    def check_numbers(self, trainer: L.Trainer, data: WikiTextData) -> None:
        """Raise ``ValueError`` where numbers of trainer, data and task do not fit together."""
        if trainer.accumulate_grad_batches != data.accumulation:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be "
                f"data.accumulation={data.accumulation}: each counts the micro-batches of an optimiser step"
            )
        check_max_steps(self.max_steps, data.steps_per_block, trainer)

    def on_fit_start(self) -> None:
        """Refuse numbers that do not fit together."""
        self.check_numbers(self.trainer, self.data)
        for final in self.final_passes():
            self.data.check_length(final.split, final.length)

    def on_train_start(self) -> None:
        """Bring a state that a checkpoint held to the device."""
        for state in self._carried.values():
            state[:] = [_to(layer, self.device) for layer in state]

    def on_train_epoch_start(self) -> None:
        """Start the sum of the block's losses anew."""
        self._block_loss = 0.0

    def training_step(self, segment: Segment, batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood of a micro-batch's words."""
        carried = self._carried.get(segment.part) if segment.continues and self.context == "carried" else None
        hidden, state = self._run(segment.inputs, carried)
        if self.context == "carried":
            # truncated backpropagation: no gradient reaches the segment before
            self._carried[segment.part] = [layer.detach() for layer in state]
        loss = self.model.words.nll(hidden.flatten(0, 1), segment.targets.flatten()).mean()
        self.tokens += segment.targets.numel() * self.trainer.world_size
        self._block_loss = self._block_loss + loss.detach()
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Segment, batch_idx: int) -> None:
        """End the training after ``max_steps``, or where the loss is no number any more."""
        self.steps = self.trainer.global_step
        if batch_idx + 1 < self.trainer.num_training_batches:
            return
        self._log_step()
        # looked at once a block: it makes a GPU wait
        loss = float(self._block_loss)
        if not math.isfinite(loss):
            self.diverged = f"the training loss is {loss} in the block before step {self.steps}"
        if self.diverged or self.steps >= self.max_steps:
            self.trainer.should_stop = True

    def _run(self, words: Tensor, state: Sequence[Any] | None) -> tuple[Tensor, list[Any]]:
        if self.compute == "eager":
            hidden, last = self.model(words, state)
        else:
            if self._compiled is None:
                self._compiled = _compile(self.model)
            hidden, last = self._compiled(words, state)
        return hidden, last

    def measurable_update(self, data: WikiTextData, device: torch.device, precision: str, devices: int) -> Update:
        """Return an update of made-up words, of one of ``devices`` that share its streams: no corpus is needed."""
        known = KNOWN_CORPORA.get(data.corpus)
        n_words = data.vocabulary_size if known is None else known.vocabulary_size
        model = build_language_model(self.architecture, self.attention, n_words).to(device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
        carried: dict[int, list[Any]] = {}

        def micro_batch(streams: int) -> None:
            words = made_up_words(n_words, (streams, data.length + 1), WORD_EXPONENT).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                hidden, state = model(words[:, :-1], carried.get(streams))
                loss = model.words.nll(hidden.flatten(0, 1), words[:, 1:].flatten()).mean()
            if self.context == "carried":
                carried[streams] = [layer.detach() for layer in state]
            loss.backward()

        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return Update(
            micro_batch=micro_batch,
            step=step,
            sequences=max(1, data.batch_size // (data.accumulation * devices)),
            sequence_length=data.length,
            micro_batches=data.accumulation,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    # --- evaluation

    def on_validation_epoch_start(self) -> None:
        """Start from an empty state."""
        self._evaluated = None
        self.perplexity.reset()

    def validation_step(self, segment: Segment, batch_idx: int) -> None:
        """Score a batch of segments."""
        self._score_segment(segment)

    def on_validation_epoch_end(self) -> None:
        """Log the segment evaluation; keep the weights if they are the best so far."""
        perplexity = float(self.perplexity.compute())
        loss = math.log(perplexity)
        self._log("valid/loss", loss)
        self._log("valid/segment_perplexity", perplexity)
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not math.isfinite(loss):
            self.diverged = self.diverged or f"the validation loss is {loss} at step {self.steps}"
            self.trainer.should_stop = True
        elif loss < self._best_loss:
            self._best_loss, self._best = loss, _copy(self.model.state_dict())

    def setup(self, stage: str) -> None:
        """Tell the data which passes the final evaluation makes."""
        if stage == "test":
            self.data.test_batches = [self._batches_of(final) for final in self.final_passes()]

    def final_passes(self) -> list[FinalPass]:
        """Return the passes of the final evaluation in order: all of a split, then all of the next."""
        length, contexts = self.data.length, self.evaluation.contexts
        if not contexts:
            return [FinalPass(split, "", length) for split in SPLITS]
        passes = []
        for split in SPLITS:
            for number, (memory, target) in enumerate(contexts, start=1):
                if target == 1 and memory:
                    # words one by one see the memory behind them and no more: long segments with a span do the same
                    passes.append(FinalPass(split, f"_{number}", max(length, memory), memory, span=memory))
                else:
                    passes.append(FinalPass(split, f"_{number}", target, memory))
        return passes

    def _batches_of(self, final: FinalPass) -> Batches[Any]:
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if self.evaluation.kind == "segments":
            return self.data.segments(final.split, batch_size=1, length=final.length)
        return self.data.windows(
            final.split,
            batch_size=self.evaluation.batch_size,
            length=final.length,
            stride=self.evaluation.stride,
            **ranks,
        )

    def on_test_start(self) -> None:
        """Take the best weights."""
        if self._best is not None:
            self.model.load_state_dict(self._best)
        self._passes = self.final_passes()
        self._scores = [WordPerplexity().to(self.device) for _ in self._passes]

    def test_step(self, batch: Segment | Windows, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of windows, or a segment."""
        if batch_idx == 0:
            self._evaluated = None
            self._prepare(self._passes[dataloader_idx])
        score = self._scores[dataloader_idx]
        if isinstance(batch, Segment):
            self._score_segment(batch, score)
            return
        hidden, _ = self._run(batch.inputs, None)
        # only the scored positions go through the softmax, the costly part
        score.update(self.model.words.nll(hidden[batch.scored], batch.targets[batch.scored]))

    def on_test_epoch_end(self) -> None:
        """Log each pass's perplexity, and the sizes that Table 4 shows."""
        for final, score in zip(self._passes, self._scores, strict=True):
            self._log(f"{final.split}/perplexity{final.suffix}", float(score.compute()))
        self._log("model/params_millions", sum(p.numel() for p in self.model.parameters()) / 1e6)
        for number, final in enumerate(self._passes[: len(self._passes) // len(SPLITS)]):
            self._prepare(final)
            _, target = self.evaluation.contexts[number] if self.evaluation.contexts else (0, final.length)
            self._log(f"model/state_millions{final.suffix}", self.model.state_size(target) / 1e6)
        self._prepare(None)

    def _prepare(self, final: FinalPass | None) -> None:
        """Set what a pass of Transformer-XL has for itself; None: what training has."""
        if not isinstance(self.model, TransformerXL):
            return
        memory = None if final is None else final.memory
        self.model.memory_length = self.architecture.memory if memory is None else memory
        self.model.span = 0 if final is None else final.span
        self.model.largest_distance = 0 if final is None else self.evaluation.largest_distance

    def _score_segment(self, segment: Segment, score: WordPerplexity | None = None) -> None:
        state = self._evaluated if segment.continues and self.context == "carried" else None
        hidden, self._evaluated = self._run(segment.inputs, state)
        nll = self.model.words.nll(hidden.flatten(0, 1), segment.targets.flatten())
        (self.perplexity if score is None else score).update(nll)

    def _log(self, name: str, value: float) -> None:
        self.log(name, value, on_step=False, on_epoch=True, batch_size=1)
        self._log_step()

    def _log_step(self) -> None:
        """Say at which step the metrics of an epoch stand."""
        self.log("step", float(self.steps), on_step=False, on_epoch=True, batch_size=1)

    # --- checkpoints

    def final(self) -> dict[str, Any]:
        """Return what stays of a complete run: the best weights, and the words that they are for."""
        weights = self._best if self._best is not None else _copy(self.model.state_dict())
        return {"weights": weights, "words": self.data.vocabulary.words}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts, the carried state and the best weights."""
        # each process reads streams of its own
        carried = {part: [_packed(layer) for layer in state] for part, state in self._carried.items()}
        checkpoint["language_modeling"] = {
            "carried": gather(self.trainer, carried),
            "best": self._best,
            "best_loss": self._best_loss,
            "steps": self.steps,
            "tokens": self.tokens,
            "data_sha256": self.data.data_sha256(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counts, the carried state and the best weights over; ``ValueError`` for those of another text."""
        kept = checkpoint["language_modeling"]
        theirs, ours = kept.get("data_sha256"), self.data.data_sha256()
        if theirs not in (None, ours):
            raise ValueError(
                f"the checkpoint is of a model of another text (SHA-256 {theirs[:12]}... instead of {ours[:12]}...), "
                "whose words have other numbers; give the text that it was trained on"
            )
        self._best, self._best_loss = kept["best"], kept["best_loss"]
        self.steps, self.tokens = kept["steps"], kept["tokens"]
        # older checkpoints, all of one process, have its state alone
        states = kept["carried"] if isinstance(kept["carried"], list) else [kept["carried"]]
        if len(states) != self.trainer.world_size:
            raise ValueError(
                f"the checkpoint is of {len(states)} processes and this run has {self.trainer.world_size}; each goes "
                f"on from a state of its own, so set trainer.devices={len(states)}"
            )
        carried = states[self.trainer.global_rank]
        self._carried = {part: [_unpacked(layer) for layer in state] for part, state in carried.items()}


def check_context(context: str, architecture: Architecture, attention: AttentionConfig, evaluation: Evaluation) -> None:
    """Raise ``ValueError`` for a context that positions, attention or evaluation do not allow; warn where it harms."""
    is_xl = architecture.positions == "relative"
    if context == "segment":
        if is_xl:
            raise ValueError("architecture.positions=relative carries a memory along; set model.context: carried")
        if evaluation.contexts:
            raise ValueError("evaluation.contexts are Transformer-XL's; set [], or architecture.positions: relative")
        return
    if evaluation.kind == "windows":
        raise ValueError(
            "evaluation.kind=windows starts every window from an empty state, so nothing would be carried; "
            "set evaluation.kind: segments"
        )
    if is_xl:
        return
    if attention.rule == "softmax":
        raise ValueError(
            "rule softmax keeps every key and value, so a carried state grows without bound; set model.context: "
            "segment, or architecture.positions: relative for Transformer-XL"
        )
    if architecture.positions != "none":
        raise ValueError(
            f"architecture.positions={architecture.positions} starts again in every segment, so that a carried state "
            "would mix them up; set architecture.positions: none"
        )
    if attention.feature_map == "favor" and attention.favor.redraw != "never":
        raise ValueError(
            f"favor.redraw={attention.favor.redraw} draws other features for each segment, in which a carried state "
            "means nothing; set favor.redraw: never"
        )
    if attention.attention_norm != "none":
        log.warning(
            "attention_norm=%s with a carried state: z grows over the whole text, so that outputs shrink like 1/t",
            attention.attention_norm,
        )


def _compile(model: nn.Module) -> Callable[..., Any]:
    """Return a model's forward pass through torch.compile."""
    import torch._dynamo

    # graphs count per function and not per model: those of the runs before in this process are forgotten, or from
    # the eighth on PyTorch would go on uncompiled
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    return torch.compile(model.forward)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _to(layer: MemoryState | Tensor, device: torch.device) -> MemoryState | Tensor:
    if isinstance(layer, Tensor):
        return layer.to(device)
    return MemoryState(tuple(x.to(device) for x in layer.memory), None if layer.z is None else layer.z.to(device))


def _packed(layer: MemoryState | Tensor) -> Any:
    """Return a state in types that load with weights_only."""
    return layer if isinstance(layer, Tensor) else {"memory": list(layer.memory), "z": layer.z}


def _unpacked(layer: Any) -> MemoryState | Tensor:
    return layer if isinstance(layer, Tensor) else MemoryState(tuple(layer["memory"]), layer["z"])
