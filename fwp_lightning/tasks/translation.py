"""The translation task: fairseq's model, criterion and optimiser in Lightning's loop, BLEU by sacreBLEU (Sec. 6.2)."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.data.translation import Sample, Sentences, TranslationData
from fwp_lightning.tasks.description import describe_model
from fwp_lightning.tasks.processes import gather
from fwp_lightning.tasks.updates import Update, check_max_steps
from fwp_lightning.translation import compatibility
from fwp_lightning.translation.checkpoints import fairseq_checkpoint
from fwp_lightning.translation.choice import TranslationAttention, flatten

HYPHEN = re.compile(r"(\S)-(\S)")
SENTENCE_TOKENS = 28
"""Length of the sentences that an update is timed with: the mean of WMT14's, in subwords."""
N_SHOWN = 10
"""Test sentences whose translations are written out."""


@dataclass(frozen=True)
class EncoderDecoder:
    """Sizes of fairseq's Transformer; encoder and decoder have the same."""

    n_layers: int = 6
    """Of the encoder, and of the decoder."""
    d_model: int = 1024
    """D."""
    n_heads: int = 16
    """H."""
    d_ff: int = 4096
    """Hidden units of the feed-forward layers."""
    dropout: float = 0.3
    """On embeddings and on what every layer adds."""
    attention_dropout: float = 0.0
    """On attention weights, where an attention has them."""
    embeddings: Literal["shared", "decoder", "separate"] = "shared"
    """shared: one matrix for source, target and output; decoder: target and output; separate: three."""


@dataclass(frozen=True)
class Search:
    """How sentences are translated."""

    beam: int = 4
    """Hypotheses kept, in the final evaluation."""
    beam_in_training: int = 1
    """The same in the validations during training, which choose the weights."""
    length_penalty: float = 0.6
    """Exponent of the length that a hypothesis's score is divided by."""
    max_length_a: float = 1.2
    """Longest translation: a times the source's length plus b."""
    max_length_b: int = 10
    """See max_length_a."""


class TranslationTask(L.LightningModule):
    """Train fairseq's Transformer for ``max_steps`` updates; translate with the weights of the best validation BLEU.

    The update is that of fairseq's trainer: summed losses of all micro-batches and processes over their tokens, its
    Adam, its schedule, and the random numbers of its seeds.
    """

    monitor = "valid/bleu_in_training"
    monitor_mode = "max"
    diverged: str | None

    model: nn.Module
    _steps: Tensor
    _tokens: Tensor

    def __init__(
        self,
        attention: AttentionConfig,
        architecture: EncoderDecoder,
        search: Search,
        replaced: str = "encoder,decoder",
        noncausal: Literal["sum", "softmax", "refuse"] = "sum",
        lr: float = 5e-4,
        warmup_steps: int = 4000,
        warmup_from: float = 1e-7,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 0.0,
        label_smoothing: float = 0.1,
        max_steps: int = 100_000,
        keep_checkpoint: bool = False,
    ) -> None:
        """Check the numbers.

        Args:
            attention: of the places in ``replaced``.
            architecture: sizes of the Transformer.
            search: how sentences are translated.
            replaced: places that get the attention, of encoder, decoder and cross; the others keep softmax.
            noncausal: sum, softmax or refuse: what encoder and cross get where the rule writes in an order.
            lr: learning rate after the warm-up; it then falls with the inverse square root of the update's number.
            warmup_steps: updates of the linear warm-up.
            warmup_from: learning rate of the first update.
            betas: of Adam.
            eps: of Adam.
            weight_decay: of Adam.
            clip_norm: largest norm of the gradient; 0: any.
            label_smoothing: probability that is spread over all words.
            max_steps: updates of training.
            keep_checkpoint: keep the best weights of a complete run, in final.ckpt, which fairseq's tools read.
        """
        super().__init__()
        for name, number in [("lr", lr), ("max_steps", max_steps), ("warmup_steps", warmup_steps), ("eps", eps)]:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"model.{name}={number} must be > 0")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing={label_smoothing} must be from 0 to below 1")
        self.choice = TranslationAttention(attention, replaced, noncausal)
        self.choice.check()
        self.attention, self.architecture, self.search = attention, architecture, search
        self.lr, self.warmup_steps, self.warmup_from = lr, warmup_steps, warmup_from
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.clip_norm, self.label_smoothing = clip_norm, label_smoothing
        self.max_steps, self.keep_checkpoint = max_steps, keep_checkpoint
        # Lightning has set it before it builds the task
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "1"))
        self.automatic_optimization = False
        self.diverged = None
        self.register_buffer("_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_tokens", torch.zeros((), dtype=torch.int64))
        self._best: dict[str, Tensor] | None = None
        self._best_bleu = -math.inf
        self._translations: dict[str, dict[int, str]] = {}

    @property
    def steps(self) -> int:
        """Updates done."""
        return int(self._steps)

    @property
    def tokens(self) -> int:
        """Target tokens trained on."""
        return int(self._tokens)

    @property
    def data(self) -> TranslationData:
        """The datamodule."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TranslationData)
        return data

    # --- the model

    def model_arguments(self) -> Namespace:
        """Return fairseq's arguments of the model."""
        a = self.architecture
        sizes = {"embed_dim": a.d_model, "ffn_embed_dim": a.d_ff, "layers": a.n_layers, "attention_heads": a.n_heads}
        return Namespace(
            arch=f"fwp_{self.attention.rule}",
            **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()},
            dropout=a.dropout,
            attention_dropout=a.attention_dropout,
            share_all_embeddings=a.embeddings == "shared",
            share_decoder_input_output_embed=a.embeddings != "separate",
            **flatten(self.choice),
        )

    def build_model(self, data: L.LightningDataModule) -> nn.Module:
        """Return a fresh model for ``data``, with the parameters that fairseq would draw from the seed."""
        assert isinstance(data, TranslationData)
        task = data.task
        from fairseq import utils

        from fwp_lightning.translation.architectures import FastWeightTransformer

        utils.set_torch_seed(self.seed)
        return FastWeightTransformer.build_model(self._built_arguments(data), task)

    def _built_arguments(self, data: TranslationData | None = None) -> Namespace:
        """The arguments of the model with what follows from the data."""
        length = (data or self.data).max_length
        return Namespace(**vars(self.model_arguments()), max_source_positions=length, max_target_positions=length)

    def configure_model(self) -> None:
        """Build the model once the data are known."""
        if not hasattr(self, "model"):
            self.data.seed = self.seed
            self.model = self.build_model(self.data)

    def describe(self) -> dict[str, Any]:
        """Return the facts of a run that its configuration does not spell out."""
        decoder = self.choice.of_place("decoder")
        state = None
        if decoder is not None:
            layer = self.model.decoder.layers[0].self_attn  # type: ignore[union-attr, index]
            size = layer.memory.state_size(layer.head_dim)
            state = None if size is None else size * layer.num_heads * self.architecture.n_layers
        return describe_model(self.model, self.attention, state)

    # --- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return fairseq's Adam."""
        compatibility.install()
        from fairseq.optim.adam import Adam

        optimizer: torch.optim.Optimizer = Adam(
            self.model.parameters(),
            lr=self.learning_rate(0),
            betas=tuple(self.betas),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return optimizer

    def learning_rate(self, done: int) -> float:
        """Return the learning rate of the update after ``done`` others: fairseq's inverse_sqrt schedule."""
        if done < self.warmup_steps:
            return self.warmup_from + done * (self.lr - self.warmup_from) / self.warmup_steps
        return self.lr * math.sqrt(self.warmup_steps / done)

    def check_numbers(self, trainer: L.Trainer, data: TranslationData) -> None:
        """Raise ``ValueError`` where numbers of trainer, data and task do not fit together."""
        check_max_steps(self.max_steps, data.steps_per_block, trainer)

    def on_fit_start(self) -> None:
        """Refuse numbers that do not fit together."""
        self.check_numbers(self.trainer, self.data)

    def _criterion(self) -> Any:
        compatibility.install()
        from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

        return LabelSmoothedCrossEntropyCriterion(self.data.task, False, self.label_smoothing)

    def training_step(self, samples: list[Sample], batch_idx: int) -> None:
        """Do one update: all micro-batches, then the step."""
        from fairseq import utils

        utils.set_torch_seed(self.seed + self.steps)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        criterion = self._criterion()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for sample in samples:
            loss, _, logged = criterion(self.model, sample)
            counts = float(sample["counts"])
            self.manual_backward(loss * counts)
            numbers = (logged["loss"], logged["nll_loss"], logged["ntokens"])
            sums += torch.stack([torch.as_tensor(x, device=self.device, dtype=torch.float64) for x in numbers]) * counts
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        loss_sum, nll_sum, n_tokens = (float(x) for x in sums)
        self._update(optimizer, n_tokens)
        self._tokens += int(n_tokens)
        # in bits, as fairseq logs it
        self._log("train/loss", loss_sum / n_tokens / math.log(2))
        self._log("train/nll_loss", nll_sum / n_tokens / math.log(2))
        if not math.isfinite(loss_sum):
            self.diverged = f"the training loss is {loss_sum} at update {self.steps}"
        if self.diverged or self.steps >= self.max_steps:
            self.trainer.should_stop = True

    def _update(self, optimizer: Any, n_tokens: float) -> None:
        """Divide the summed gradients by the tokens of the whole update, as fairseq does, and step."""
        # Lightning's DDP has taken the mean over processes of what is a sum
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.trainer.world_size / n_tokens)
        if self.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps)
        optimizer.step()
        self._steps += 1

    def measurable_update(self, data: TranslationData, device: torch.device, precision: str, devices: int) -> Update:
        """Return an update of sentences of random words: no corpus is needed; every device has its own tokens."""
        compatibility.install()
        from fairseq.data import Dictionary

        words = Dictionary()
        for i in range(max(data.subwords, 100) - len(words)):
            words.add_symbol(str(i))
        task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
        from fwp_lightning.translation.architectures import FastWeightTransformer

        model = FastWeightTransformer.build_model(self._built_arguments(data), task).to(device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

        def micro_batch(sentences: int) -> None:
            shape = (sentences, SENTENCE_TOKENS)
            source, target = (torch.randint(words.nspecial, len(words), shape, device=device) for _ in range(2))
            lengths = torch.full(shape[:1], SENTENCE_TOKENS, device=device)
            with torch.autocast(device.type, torch.float16, enabled=precision == "16-mixed"):
                log_probs = model.get_normalized_probs(model(source, lengths, target), log_probs=True)
            (-log_probs.gather(-1, target.unsqueeze(-1)).sum() - self.label_smoothing * log_probs.mean()).backward()

        return Update(
            micro_batch=micro_batch,
            step=optimizer.step,
            sequences=max(data.max_tokens // SENTENCE_TOKENS, 1),
            sequence_length=SENTENCE_TOKENS,
            micro_batches=data.accumulation,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            unit="subwords",
        )

    # --- evaluation

    def on_validation_epoch_start(self) -> None:
        """Start from no translation."""
        self._start_translating(self.search.beam_in_training)

    def validation_step(self, batch: Sentences, batch_idx: int) -> None:
        """Score a batch by its loss and translate it."""
        criterion = self._criterion()
        loss, n_tokens, logged = criterion(self.model, batch.sample)
        self._log("valid/loss", float(loss) / n_tokens / math.log(2), n=n_tokens)
        self._log("valid/nll_loss", float(logged["nll_loss"]) / n_tokens / math.log(2), n=n_tokens)
        self._translate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log BLEU; keep the weights if they are the best so far."""
        self._gather("valid")
        score = bleu(*self._scored("valid"))[0]
        self._log("valid/bleu_in_training", score)
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if score > self._best_bleu:
            self._best_bleu = score
            self._best = {name: x.detach().to("cpu", copy=True) for name, x in self.model.state_dict().items()}

    def on_test_start(self) -> None:
        """Take the best weights."""
        if self._best is not None:
            self.model.load_state_dict(self._best)

    def on_test_epoch_start(self) -> None:
        """Start from no translation."""
        self._start_translating(self.search.beam)

    def test_step(self, batch: Sentences, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Translate a batch."""
        self._translate(batch)

    def on_test_epoch_end(self) -> None:
        """Log BLEU of every split; write some translations out."""
        for split in self.data.test_splits:
            self._gather(split)
            self._log(f"{split}/bleu", bleu(*self._scored(split))[0])
            self._log(f"{split}/bleu_compound_split", compound_split_bleu(*self._scored(split)))
        if self.trainer.is_global_zero:
            self._write_translations("test")

    def _start_translating(self, beam: int) -> None:
        from fairseq.sequence_generator import SequenceGenerator

        self._translations = {}
        # kept out of the module tree: it holds the model
        self.__dict__["_generator"] = SequenceGenerator(
            [self.model],
            self.data.task.target_dictionary,
            beam_size=beam,
            max_len_a=self.search.max_length_a,
            max_len_b=self.search.max_length_b,
            len_penalty=self.search.length_penalty,
        )

    def _translate(self, batch: Sentences) -> None:
        dictionary = self.data.task.target_dictionary
        with torch.no_grad():
            found = self.__dict__["_generator"].generate([self.model], batch.sample)
        translations = self._translations.setdefault(batch.split, {})
        for index, hypotheses in zip(batch.sample["id"].tolist(), found, strict=True):
            # what the model does not know it may not say, so an unknown word is a wrong one
            tokens = dictionary.string(hypotheses[0]["tokens"].int().cpu(), unk_string="<<unk>>")
            translations[index] = self.data.join(tokens)

    def _gather(self, split: str) -> None:
        """Collect what other processes have translated of a split, and check that no sentence is missing."""
        parts = gather(self.trainer, self._translations[split])
        translations = {index: text for part in parts for index, text in part.items()}
        self._translations[split] = translations
        n = len(self.data.references(split))
        if sorted(translations) != list(range(n)):
            raise RuntimeError(f"{len(translations)} translations of the {n} sentences of {split}")

    def _scored(self, split: str) -> tuple[list[str], list[str]]:
        """Translations of a split in its order, and their references."""
        translations, references = self._translations[split], self.data.references(split)
        return [translations[index] for index in range(len(references))], references

    def _write_translations(self, split: str) -> None:
        lines = [f"source       {s}\nreference    {r}\ntranslation  {t}\n" for s, r, t in self._shown(split)]
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "translations.txt").write_text("\n".join(lines), encoding="utf-8")

    def texts(self) -> dict[str, str]:
        """Return some test sentences with their translations, as a CSV file; sentences of others are not repeated."""
        if not self._translations.get("test"):
            return {}
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(("split", "line", "source", "reference", "translation"))
        quotes = self.data.may_be_quoted
        for i, (source, reference, translation) in enumerate(self._shown("test"), start=1):
            writer.writerow(["test", i, *((source, reference) if quotes else ("", "")), translation])
        return {"translations.csv": buffer.getvalue()}

    def _shown(self, split: str) -> list[tuple[str, str, str]]:
        """The first sentences of a split, their translations in the corpus and by the model."""
        sources, references = self.data.sources(split), self.data.references(split)
        n = min(N_SHOWN, len(sources))
        return [(sources[i], references[i], self._translations[split][i]) for i in range(n)]

    def _log(self, name: str, value: float, n: int = 1) -> None:
        self.log(name, value, on_step=False, on_epoch=True, batch_size=n, sync_dist=self.trainer.world_size > 1)
        self.log("step", float(self.steps), on_step=False, on_epoch=True, batch_size=1, reduce_fx="max")

    # --- checkpoints

    def final(self) -> dict[str, Any]:
        """Return what is kept of a complete run, if anything: the best weights as a checkpoint of fairseq."""
        if not self.keep_checkpoint:
            return {}
        weights = self._best if self._best is not None else self.model.state_dict()
        return fairseq_checkpoint(weights, vars(self._built_arguments()), self.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best weights, and the arguments with which fairseq builds the model."""
        arguments = vars(self._built_arguments())
        checkpoint["translation"] = {"best": self._best, "best_bleu": self._best_bleu, "arguments": arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the best weights over."""
        self._best, self._best_bleu = checkpoint["translation"]["best"], checkpoint["translation"]["best_bleu"]


def bleu(translations: list[str], references: list[str]) -> tuple[float, str]:
    """Return sacreBLEU's corpus BLEU, in percent, and its signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    return float(metric.corpus_score(translations, [references]).score), str(metric.get_signature())


def compound_split_bleu(translations: list[str], references: list[str]) -> float:
    """Return BLEU of tokenised text whose hyphenated words are split, in percent: fairseq's compound_split_bleu.sh.

    It is higher than sacreBLEU's and not comparable with it. The tokens are those of mteval's v13a, where fairseq has
    those of Moses.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()

    def split(sentence: str) -> str:
        return HYPHEN.sub(r"\1 ##AT##-##AT## \2", tokenize(sentence))

    metric = BLEU(tokenize="none", force=True)
    return float(metric.corpus_score([*map(split, translations)], [[*map(split, references)]]).score)
