"""Translation data: a parallel corpus in fairseq's own form, its dictionary and its batches by numbers of tokens.

The corpus is cut into subwords and made a data-bin folder once, which ``fwp fairseq-train`` reads as well. Which
batches belong to an optimiser step follows from its number alone, and they are those that fairseq's trainer takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
from filelock import FileLock
from torch.utils.data import DataLoader

from fwp_lightning.data.grammar import sentence_pairs
from fwp_lightning.data.parallel_text import CORPORA, SPLITS, Pairs, Selection, read_corpus, sha256_of_pairs
from fwp_lightning.data.wikitext import Batches
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import find_project
from fwp_lightning.registry import did_you_mean
from fwp_lightning.translation import compatibility

log = logging.getLogger(__name__)

Corpus = Literal["grammar", "multi30k", "wmt14_mini", "wmt14", "folder"]
Split = Literal["train", "valid", "test"]
Validation = Literal["given", "every_100th"]
Sample = dict[str, Any]
FORM = 1
"""Raised when what a prepared folder holds changes."""


class Sentences(NamedTuple):
    """A batch of a split that is translated."""

    split: str
    sample: Sample


class TranslationData(L.LightningDataModule):
    """A parallel corpus. One Lightning batch is one optimiser step, one Lightning epoch a block of them."""

    def __init__(
        self,
        corpus: Corpus = "grammar",
        directory: str | None = None,
        source: str = "en",
        target: str = "de",
        subwords: int = 0,
        validation: Validation = "given",
        max_words: int = 0,
        max_ratio: float = 0.0,
        max_length: int = 1024,
        max_tokens: int = 3584,
        accumulation: int = 1,
        steps_per_block: int = 100,
        evaluation_tokens: int = 4000,
        n_pairs: int = 4000,
    ) -> None:
        """Check the numbers.

        Args:
            corpus: grammar: generated; multi30k, wmt14_mini, wmt14: checked for their numbers of pairs; folder: any.
            directory: folder with train, valid and test in both languages (train.en, train.de, ...); null: downloads.
            source: language that is translated from, as in the files' names.
            target: language that is translated into.
            subwords: size of the joint byte-pair vocabulary; 0: words as they stand.
            validation: given: the corpus's own split; every_100th: every 100th training pair, as in fairseq's script.
            max_words: training pairs with longer sentences are left out (and counted); 0: none.
            max_ratio: training pairs of more unequal lengths are left out (and counted); 0: none.
            max_length: longest sentence in tokens; longer training pairs are left out (and counted).
            max_tokens: tokens of a micro-batch, padding included.
            accumulation: micro-batches of an optimiser step.
            steps_per_block: optimiser steps of a Lightning epoch, after which a run can be resumed.
            evaluation_tokens: tokens of a batch that is translated.
            n_pairs: pairs that are generated (grammar) for training; valid and test have a twentieth each.
        """
        super().__init__()
        self.corpus, self.directory, self.source, self.target = corpus, directory, source, target
        self.subwords, self.validation = subwords, validation
        self.max_words, self.max_ratio, self.max_length = max_words, max_ratio, max_length
        self.max_tokens, self.accumulation, self.steps_per_block = max_tokens, accumulation, steps_per_block
        self.evaluation_tokens, self.n_pairs = evaluation_tokens, n_pairs
        self.seed = 1
        self.test_splits: tuple[Split, ...] = ("valid", "test")
        self._check()

    def _check(self) -> None:
        """Refuse what no corpus can have, in the words of the configuration."""
        choices: list[tuple[str, tuple[str, ...]]] = [
            ("corpus", get_args(Corpus)),
            ("validation", get_args(Validation)),
        ]
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"data.{name}={value!r} is unknown. {did_you_mean(str(value), list(known))}")
        for name in ("max_length", "max_tokens", "accumulation", "steps_per_block", "evaluation_tokens", "n_pairs"):
            least = 20 if name == "n_pairs" else 1
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)} must be a whole number >= {least}")
        for name in ("subwords", "max_words", "max_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be >= 0")
        if self.corpus == "grammar" and self.directory is not None:
            raise ValueError(
                f"data.directory={self.directory} is given, but data.corpus=grammar is generated and reads no folder; "
                "choose another profile or corpus, or no folder"
            )
        if self.corpus == "folder" and self.directory is None:
            raise ValueError("data.corpus=folder needs data.directory, a folder with train.en, train.de and so on")

    # --- the corpus

    @cached_property
    def folder(self) -> Path:
        """The data-bin folder, made if it is not there; refuses a corpus that is not what it is called."""
        compatibility.install()
        splits = self._splits()
        kept = [self.subwords, self.validation, self.max_words, self.max_ratio, self.source, self.target, FORM]
        name = hashlib.sha256(json.dumps([sha256_of_pairs(splits), *kept]).encode()).hexdigest()[:16]
        folder = find_project(required=False).data / "translation" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                self._prepare(folder, splits)
        return folder

    def _splits(self) -> dict[str, Pairs]:
        if self.corpus == "grammar":
            sizes = {"train": self.n_pairs, "valid": self.n_pairs // 20, "test": self.n_pairs // 20 + 1}
            return {split: Pairs(*sentence_pairs(split, size)) for split, size in sizes.items()}
        known = CORPORA.get(self.corpus)
        if self.directory is not None:
            folder = Path(self.directory).expanduser()
            if not folder.is_dir():
                raise UserError(f"data.directory={self.directory} is no folder; name one that has the corpus.")
            return read_corpus(folder, self.source, self.target, known)
        assert known is not None
        folder = find_project(required=False).data / known.name
        if not folder.is_dir():
            how = "fetch it with: make data-wmt14, or name" if known.files else "name"
            raise UserError(
                f"{known.title} is not in {folder}; {how} a folder that has it: DATA=folder for make, --data folder "
                "for fwp sweep."
            )
        return read_corpus(folder, self.source, self.target, known)

    def _prepare(self, folder: Path, splits: dict[str, Pairs]) -> None:
        """Cut into subwords, and let fairseq make its data-bin folder; the folder is complete or absent."""
        partial = folder.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "text").mkdir(parents=True)
        splits = dict(splits)
        if self.validation == "every_100th":
            train = splits["train"]
            splits["valid"] = Pairs(*(sentences[::100] for sentences in train))
            rest = [i for i in range(len(train.source)) if i % 100]
            splits["train"] = Pairs(*([sentences[i] for i in rest] for sentences in train))
        selection = Selection(self.max_words, self.max_ratio)
        splits["train"] = selection.keep(splits["train"])
        cut = self._subword_cutter(splits["train"], partial)
        for split, pairs in splits.items():
            for language, sentences in zip((self.source, self.target), pairs, strict=True):
                text = "\n".join(map(cut, sentences)) + "\n"
                (partial / "text" / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
        (partial / "left_out.txt").write_text(selection.sentence(), encoding="utf-8")
        make_data_bin(partial / "text", partial, self.source, self.target)
        partial.rename(folder)

    def _subword_cutter(self, train: Pairs, folder: Path) -> Callable[[str], str]:
        if not self.subwords:
            return lambda sentence: sentence
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([*train.source, *train.target]),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.subwords,
                character_coverage=1.0,
                input_sentence_size=0,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"data.subwords={self.subwords} does not fit the corpus: {error}") from error
        (folder / "subwords.model").write_bytes(model.getvalue())
        cutter = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        return lambda sentence: " ".join(cutter.encode(sentence, out_type=str))

    def data_sha256(self) -> str:
        """Return the name of the prepared corpus: a hash of its sentences and of how they were cut."""
        return self.folder.name

    def join(self, tokens: str) -> str:
        """Return the sentence that tokens with spaces between them make."""
        return "".join(tokens.split()).replace("\u2581", " ").strip() if self.subwords else tokens

    # --- fairseq's task

    @cached_property
    def task(self) -> Any:
        """The translation task of fairseq over the folder: dictionaries and data sets."""
        folder = self.folder
        # it tells the sizes of its dictionaries every time
        logging.getLogger("fairseq.tasks.translation").setLevel(logging.WARNING)
        logging.getLogger("fairseq.data.data_utils").setLevel(logging.WARNING)
        from fairseq.tasks.translation import TranslationConfig, TranslationTask

        options = TranslationConfig(
            data=str(folder),
            source_lang=self.source,
            target_lang=self.target,
            max_source_positions=self.max_length,
            max_target_positions=self.max_length,
            train_subset="train",
            dataset_impl=None,
            required_seq_len_multiple=1,
        )
        return TranslationTask.setup_task(options)

    @property
    def may_be_quoted(self) -> bool:
        """Whether results may repeat its sentences: those that are generated; a corpus has its own licence."""
        return self.corpus == "grammar"

    def references(self, split: str) -> list[str]:
        """Return the translations of a split, as they stand in the corpus."""
        return self._sentences(split, self.target)

    def sources(self, split: str) -> list[str]:
        """Return the sentences of a split that are translated."""
        return self._sentences(split, self.source)

    def _sentences(self, split: str, language: str) -> list[str]:
        text = (self.folder / "text" / f"{split}.{language}").read_text(encoding="utf-8")
        return [self.join(line) for line in text.split("\n")[:-1]]

    def setup(self, stage: str) -> None:
        """Open the data sets; say what is left out of training, refuse what is too long to be translated."""
        for split in SPLITS:
            if split not in self.task.datasets:
                self.task.load_dataset(split)
        self._check_scored_splits()
        self._tell_what_is_left_out()

    def _check_scored_splits(self) -> None:
        """Refuse a scored split with a sentence over the limit: it would have no translation."""
        for split in ("valid", "test"):
            sizes = np.maximum(self.task.dataset(split).src_sizes, self.task.dataset(split).tgt_sizes)
            if (sizes > self.max_length).any():
                long = int((sizes > self.max_length).sum())
                raise UserError(
                    f"{long} sentences of {split} have over data.max_length={self.max_length} tokens (that in line "
                    f"{int(sizes.argmax()) + 1} has {int(sizes.max())}) and could not be translated; raise the limit."
                )

    def _tell_what_is_left_out(self) -> None:
        said = (self.folder / "left_out.txt").read_text(encoding="utf-8")
        sizes = np.maximum(self.task.dataset("train").src_sizes, self.task.dataset("train").tgt_sizes)
        limit = min(self.max_length, self.max_tokens)
        if long := int((sizes > limit).sum()):
            said = ", ".join(filter(None, [said, f"{long:,} over {limit} tokens"]))
        if said:
            log.warning("of %s training pairs %s are left out", f"{len(sizes):,}", said)

    # --- batches

    @cached_property
    def _frozen_batches(self) -> list[list[int]]:
        """The batches of an epoch before they are shuffled, as fairseq's trainer makes them."""
        limits = (self.max_length, self.max_length, self.max_tokens)
        return self._batches_by_size("train", self.max_tokens, min(limits), ignore_long=True)

    def _batches_by_size(self, split: str, max_tokens: int, longest: int, *, ignore_long: bool) -> list[list[int]]:
        from fairseq.data import data_utils

        dataset = self.task.dataset(split)
        with data_utils.numpy_seed(self.seed):
            indices = dataset.ordered_indices()
        indices = self.task.filter_indices_by_size(indices, dataset, (longest, longest), ignore_long)
        batches = dataset.batch_by_size(indices, max_tokens=max_tokens, required_batch_size_multiple=8)
        return [list(map(int, batch)) for batch in batches]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass through the training pairs; the last one may have fewer micro-batches."""
        per_process = -(-len(self._frozen_batches) // self._world_size)
        return -(-per_process // self.accumulation)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """This process's batches of pass ``epoch``, counted from 1 as fairseq does; empty ones fill up."""
        from fairseq.data import data_utils

        batches = list(self._frozen_batches)
        with data_utils.numpy_seed(self.seed + epoch):
            # fairseq's own shuffle, drawn from NumPy's global generator
            np.random.shuffle(batches)  # noqa: NPY002
        mine = batches[self._rank :: self._world_size]
        return mine + [[]] * (-(-len(batches) // self._world_size) - len(mine))

    def training_batches(self, step: int) -> list[Sample]:
        """Return the micro-batches of optimiser step ``step``, counted from 0, on this process."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._epoch(epoch + 1))
        chosen = self._shuffled[1][index * self.accumulation : (index + 1) * self.accumulation]
        return [self._collate("train", batch) for batch in chosen]

    _shuffled: tuple[int, list[list[int]]] | None = None

    def _collate(self, split: str, indices: list[int]) -> Sample:
        dataset = self.task.dataset(split)
        # a process without a batch of its own computes another's, which counts nothing
        sample: Sample = dataset.collater([dataset[i] for i in indices or self._frozen_batches[0]])
        return {**sample, "counts": bool(indices)}

    def train_dataloader(self) -> DataLoader[list[Sample]]:
        """Return the optimiser steps of one block: those of the trainer's current epoch."""

        def first() -> int:
            return (self.trainer.current_epoch if self.trainer else 0) * self.steps_per_block

        return DataLoader(Batches(self.steps_per_block, self.training_batches, first), batch_size=None)

    def val_dataloader(self) -> DataLoader[Sentences]:
        """Return the validation split."""
        return self._evaluation("valid")

    def test_dataloader(self) -> list[DataLoader[Sentences]]:
        """Return the splits that the final evaluation translates."""
        return [self._evaluation(split) for split in self.test_splits]

    def _evaluation(self, split: Split) -> DataLoader[Sentences]:
        batches = self._batches_by_size(split, self.evaluation_tokens, self.max_length, ignore_long=False)
        mine = batches[self._rank :: self._world_size]
        return DataLoader(
            Batches(len(mine), lambda i: Sentences(split, self._collate(split, mine[i]))), batch_size=None
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def make_data_bin(text: Path, folder: Path, source: str, target: str) -> None:
    """Let fairseq make a data-bin folder, with a joint dictionary, of train, valid and test in ``text``."""
    compatibility.install()
    from fairseq import options
    from fairseq_cli import preprocess

    prefixes = [f"--{split}pref={text / split}" for split in SPLITS]
    languages = ["--source-lang", source, "--target-lang", target]
    arguments = [*languages, *prefixes, f"--destdir={folder}", "--joined-dictionary", "--workers=1"]
    quiet = logging.getLogger("fairseq_cli.preprocess")
    level = quiet.level
    quiet.setLevel(logging.WARNING)
    try:
        preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    finally:
        quiet.setLevel(level)
