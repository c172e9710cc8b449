"""Language modelling data: a text as contiguous streams for training, as segments or windows for evaluation.

Streams (batch 2, T = 3) of the tokens 0 .. 10; the last one, 10, fills no stream::

    stream 0    0 1 2 | 3 4      the targets of a segment are its inputs shifted by one: 1 2 3 | 4
    stream 1    5 6 7 | 8 9                                                              6 7 8 | 9

Segments come in the order of the text, epoch after epoch, so that a state can be carried from one to the next. Which
ones belong to an optimiser step follows from its number alone; a resumed run needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fwp_lightning.data.corpora import KNOWN_CORPORA, SPLITS, files_of_corpus
from fwp_lightning.data.facts import tell
from fwp_lightning.data.token_files import TokenizedText, open_token_files, tokenize_in_memory
from fwp_lightning.data.vocabulary import Ids, Vocabulary
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import find_project
from fwp_lightning.registry import did_you_mean

Corpus = Literal["facts", "wikitext-2", "wikitext-103", "folder"]
Split = Literal["train", "valid", "test"]
Batch = TypeVar("Batch")


class Segment(NamedTuple):
    """T tokens of each of B streams, and what follows each of them."""

    inputs: Tensor
    """``[B, T]``; the last segment of a pass through the text is shorter."""
    targets: Tensor
    """``[B, T]``; all are scored."""
    continues: bool
    """False: the first segment of a pass through the text."""
    part: int
    """Which of the step's micro-batches this is, from 0: each has streams, and a state, of its own."""


class Windows(NamedTuple):
    """Overlapping stretches of one stream, W of them, T tokens each; every token is scored in just one."""

    inputs: Tensor
    """``[W, T]``."""
    targets: Tensor
    """``[W, T]``."""
    scored: Tensor
    """``[W, T]`` true for the targets that count: all in the first window of a text, the last ones in others."""


class Batches(IterableDataset, Generic[Batch]):  # type: ignore[type-arg]
    """A number of batches, each made when its turn comes."""

    def __init__(self, number: int, batch: Callable[[int], Batch], first: Callable[[], int] = lambda: 0) -> None:
        """Yield ``batch(index)`` for ``number`` indices from ``first()`` on."""
        self.number, self.batch, self.first = number, batch, first

    def __iter__(self) -> Iterator[Batch]:
        # Lightning makes the iterator of a resumed run before it knows the epoch: ask when the first batch is due
        first = self.first()
        for index in range(first, first + self.number):
            yield self.batch(index)

    def __len__(self) -> int:
        return self.number


class WikiTextData(L.LightningDataModule):
    """A word-level corpus in contiguous streams. One Lightning epoch is one block of optimiser steps."""

    def __init__(
        self,
        corpus: Corpus = "facts",
        directory: str | None = None,
        length: int = 256,
        batch_size: int = 96,
        accumulation: int = 1,
        steps_per_block: int = 100,
        evaluation_batch_size: int = 10,
        n_tokens: int = 200_000,
    ) -> None:
        """Check the numbers.

        Args:
            corpus: facts: made by a generator; wikitext-2, wikitext-103: checked for their exact counts; folder: any
                text.
            directory: folder with train.txt, valid.txt and test.txt, plain or gzipped; None: where downloads lie.
            length: T, tokens of a training segment.
            batch_size: B, streams, each of which gives one segment to an optimiser step.
            accumulation: micro-batches that an optimiser step is computed in.
            steps_per_block: optimiser steps of a Lightning epoch, after which a run can be resumed.
            evaluation_batch_size: streams of the validation text during training.
            n_tokens: of the training text that is generated (facts); valid and test have a tenth each.
        """
        super().__init__()
        if corpus not in get_args(Corpus):
            raise ValueError(f"data.corpus={corpus!r} is unknown. {did_you_mean(str(corpus), list(get_args(Corpus)))}")
        numbers = {"length": length, "batch_size": batch_size, "accumulation": accumulation}
        numbers |= {"steps_per_block": steps_per_block, "evaluation_batch_size": evaluation_batch_size}
        for name, value in {**numbers, "n_tokens": n_tokens}.items():
            if int(value) != value or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number >= 1")
        if corpus == "facts" and directory is not None:
            raise ValueError(
                f"data.directory={directory} is given, but data.corpus=facts is generated and reads no folder; choose "
                "another profile or corpus, or no folder"
            )
        if corpus == "folder" and directory is None:
            raise ValueError("data.corpus=folder needs data.directory, a folder with train.txt, valid.txt and test.txt")
        self.corpus, self.directory = corpus, directory
        self.length, self.batch_size, self.accumulation = length, batch_size, accumulation
        self.steps_per_block, self.evaluation_batch_size = steps_per_block, evaluation_batch_size
        self.n_tokens = n_tokens
        self.test_batches: list[Batches[Any]] = []
        self._check_parts(1)

    # --- the text

    @property
    def vocabulary_size(self) -> int:
        """Number of words, ``<eos>`` among them."""
        return len(self.vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the training text."""
        return self._text.vocabulary

    def tokens(self, split: Split) -> Ids:
        """Return the numbers of a split's words, ``[N]``, each line closed by that of ``<eos>``."""
        return self._text.tokens[split]

    def data_sha256(self) -> str:
        """Return the SHA-256 of the text as numbers, see ``sha256_of_text``."""
        return self._text.sha256

    @cached_property
    def _text(self) -> TokenizedText:
        if self.corpus == "facts":
            wanted = {split: max(1, self.n_tokens // (1 if split == "train" else 10)) for split in SPLITS}
            return tokenize_in_memory({split: tell(split, number) for split, number in wanted.items()})
        cache = find_project(required=False).data / "tokens"
        return open_token_files(self._files(), cache, KNOWN_CORPORA.get(self.corpus))

    def _files(self) -> dict[str, list[Path]]:
        if self.directory is not None:
            return files_of_corpus(Path(self.directory).expanduser())
        folder = find_project(required=False).data / self.corpus
        known = KNOWN_CORPORA[self.corpus]
        if not folder.is_dir():
            raise UserError(
                f"{known.title} is not in {folder}; fetch it with: make {known.make_target}, or name a folder that "
                "has it: DATA=folder for make, --data folder for fwp sweep."
            )
        return files_of_corpus(folder)

    def prepare_data(self) -> None:
        """Make the token files, in one process of a machine."""
        _ = self._text

    def setup(self, stage: str) -> None:
        """Open the text and check that it can be shared as asked for."""
        self.check()

    def check(self) -> None:
        """Raise if the text is missing, damaged or not the one it is called, or cannot be cut as asked for."""
        self._check_parts(self._world_size)
        self._stream_length("train", self.batch_size, self.length)
        self._stream_length("valid", self.evaluation_batch_size, self.length)
        # found now, not after the training
        self.check_length("test", self.length)

    def check_length(self, split: Split, length: int) -> None:
        """Raise ``UserError`` where a split is too short to be scored in segments or windows of ``length``."""
        self._stream_length(split, 1, length)

    # --- training

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass through the training text; the last one has a shorter segment."""
        return _n_segments(self._stream_length("train", self.batch_size, self.length), self.length)

    def training_segments(self, step: int) -> list[Segment]:
        """Return the micro-batches of optimiser step ``step``, counted from 0, on this process."""
        return [self._training_segment(step, part) for part in range(self.accumulation)]

    def _training_segment(self, step: int, part: int) -> Segment:
        index = step % self.steps_per_epoch
        n_streams = self.batch_size // (self.accumulation * self._world_size)
        first = (self._rank * self.accumulation + part) * n_streams
        streams = _streams(self.tokens("train"), self.batch_size)[first : first + n_streams]
        return _segment(streams, index, self.length, part)

    def train_dataloader(self) -> DataLoader[Segment]:
        """Return the micro-batches of one block of optimiser steps: those of the trainer's current epoch."""

        number = self.steps_per_block * self.accumulation

        def batch(index: int) -> Segment:
            return self._training_segment(*divmod(index, self.accumulation))

        def first() -> int:
            return number * (self.trainer.current_epoch if self.trainer else 0)

        return DataLoader(Batches(number, batch, first), batch_size=None)

    # --- evaluation

    def segments(
        self, split: Split, *, batch_size: int = 1, length: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Batches[Segment]:
        """Return one pass through a split in segments of ``length``, each continuing the one before.

        A batch of 1 scores every token but the first one; more streams lose the first token of each and what fills no
        stream. Of several processes each gets its share of the streams; where they do not divide, all get all.
        """
        length = length or self.length
        n_segments = _n_segments(self._stream_length(split, batch_size, length), length)
        streams = _streams(self.tokens(split), batch_size)
        if batch_size % world_size == 0:
            share = batch_size // world_size
            streams = streams[rank * share : (rank + 1) * share]
        return Batches(n_segments, lambda index: _segment(streams, index, length, 0))

    def windows(
        self,
        split: Split,
        *,
        batch_size: int,
        length: int | None = None,
        stride: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batches[Windows]:
        """Return a split in windows of ``length`` tokens that are ``stride`` apart, ``batch_size`` at a time.

        All targets of the first window are scored, of every other one the last ``stride``, each with at least
        ``length - stride + 1`` tokens of context: together every token but the first one. The last window ends with
        the text and scores what is left. Stride 1 is the paper's evaluation (App. F). Processes share the windows.
        """
        length = length or self.length
        if not 1 <= stride <= length:
            raise ValueError(f"stride={stride} must be from 1 to the window's length, {length}")
        tokens = self.tokens(split)
        self._stream_length(split, 1, length)
        starts = np.minimum(np.arange(0, len(tokens) - 1 - length + stride, stride), len(tokens) - 1 - length)
        scored = np.diff(starts + length, prepend=0)
        mine = slice(rank * len(starts) // world_size, (rank + 1) * len(starts) // world_size)
        starts, scored = starts[mine], scored[mine]

        def batch(index: int) -> Windows:
            some = slice(index * batch_size, (index + 1) * batch_size)
            return _windows(tokens, starts[some], scored[some], length)

        return Batches(-(-len(starts) // batch_size), batch)

    def val_dataloader(self) -> DataLoader[Segment]:
        """Return one pass through the validation text in segments of T."""
        shared = {"rank": self._rank, "world_size": self._world_size}
        batches = self.segments("valid", batch_size=self.evaluation_batch_size, **shared)
        return DataLoader(batches, batch_size=None)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the passes of the final evaluation, which the task chooses by setting ``test_batches``."""
        return [DataLoader(batches, batch_size=None) for batches in self.test_batches]

    # --- sizes

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _check_parts(self, world_size: int) -> None:
        if self.batch_size % (self.accumulation * world_size):
            divided = f"accumulation={self.accumulation}" + (f" on {world_size} devices" if world_size > 1 else "")
            raise ValueError(f"data.batch_size={self.batch_size} does not divide by data.{divided}; change one of them")

    def _stream_length(self, split: Split, batch_size: int, length: int) -> int:
        """Return the tokens of each of ``batch_size`` streams; streams shorter than a segment are an error."""
        n_tokens = len(self.tokens(split))
        n = n_tokens // batch_size
        if n <= length:
            streams = f"{batch_size} streams of {n:,}" if batch_size > 1 else "one stream"
            raise UserError(
                f"the {split} text is too short: its {n_tokens:,} tokens make {streams}, and a segment with its "
                f"targets takes length + 1 = {length + 1:,}; lower data.length or the number of streams, or take a "
                f"longer text."
            )
        return n


def _streams(tokens: Ids, batch_size: int) -> Ids:
    """Return ``tokens`` as contiguous streams ``[B, N // B]``, a view; the remainder is left out."""
    n = len(tokens) // batch_size
    return tokens[: batch_size * n].reshape(batch_size, n)


def _n_segments(n: int, length: int) -> int:
    """Return the segments of a stream of ``n`` tokens, which has n - 1 targets."""
    return -(-(n - 1) // length)


def _segment(streams: Ids, index: int, length: int, part: int) -> Segment:
    tokens = torch.from_numpy(streams[:, index * length : (index + 1) * length + 1].astype(np.int64))
    return Segment(tokens[:, :-1], tokens[:, 1:], continues=index > 0, part=part)


def _windows(tokens: Ids, starts: Ids, scored: Ids, length: int) -> Windows:
    found = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    is_scored = torch.arange(length) >= torch.from_numpy(length - scored)[:, None]
    return Windows(found[:, :-1], found[:, 1:], is_scored)
