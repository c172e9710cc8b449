"""Words and their numbers: 0 ends a line, then the training text's words by falling count, ties by first appearance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fwp_lightning.errors import UserError

EOS = "<eos>"
# tokens that are held in memory at a time
CHUNK_TOKENS = 1 << 20

Ids = NDArray[Any]


class Vocabulary:
    """The words that a model knows, in the order of their numbers; there is no stand-in for unknown words."""

    eos = 0

    def __init__(self, words: Sequence[str]) -> None:
        """Take the words over; the first one is ``<eos>``."""
        if not words or words[0] != EOS:
            raise ValueError(f"a vocabulary begins with {EOS}, not with {list(words[:1])}")
        self.words = list(words)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each word."""
        return {word: number for number, word in enumerate(self.words)}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest integer type of token files that holds every number: two bytes for up to 65,536 words."""
        return np.dtype("<u2" if len(self.words) <= 2**16 else "<i4")

    def encode(self, words: Iterable[str]) -> Ids:
        """Return the numbers of words, ``[N]``; the first unknown one is an error."""
        words = list(words)
        try:
            return np.array([self.index[word] for word in words], dtype=np.int64)
        except KeyError as error:
            raise UserError(
                f"the vocabulary of {len(self):,} words has no {error.args[0]!r}; use a word of the training text."
            ) from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of numbers."""
        return [self.words[int(number)] for number in ids]

    def encode_lines(self, lines: Iterable[Sequence[str]], source: str) -> Iterator[Ids]:
        """Yield the numbers of a text in chunks, each line closed by ``<eos>``; the first unknown word is an error."""
        index, pending = self.index, list[int]()
        for number, words in enumerate(lines, start=1):
            try:
                pending.extend([index[word] for word in words])
            except KeyError as error:
                raise UserError(
                    f"{source}, line {number}: the word {error.args[0]!r} is not in the training text, whose "
                    f"{len(self):,} words are the vocabulary; replace it by <unk> if the training text has that."
                ) from None
            pending.append(self.eos)
            if len(pending) >= CHUNK_TOKENS:
                yield np.array(pending, dtype=self.dtype)
                pending.clear()
        yield np.array(pending, dtype=self.dtype)


class WordCount:
    """Numbers words by first appearance while they are read, and by count when all are."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {EOS: 0}
        self._counts = np.zeros(1, dtype=np.int64)

    def read_lines(self, lines: Iterable[Sequence[str]]) -> Iterator[Ids]:
        """Yield the numbers by first appearance in chunks, each line closed by ``<eos>``."""
        number_of, pending = self.index.setdefault, list[int]()
        for words in lines:
            # len() is evaluated for each word anew: a new word gets the next number
            pending.extend([number_of(word, len(self.index)) for word in words])
            pending.append(0)
            if len(pending) >= CHUNK_TOKENS:
                yield self._count(pending)
                pending.clear()
        yield self._count(pending)

    def _count(self, pending: list[int]) -> Ids:
        ids = np.array(pending, dtype=np.int32)
        counts = np.bincount(ids, minlength=len(self.index))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        return ids

    def by_count(self) -> tuple[Vocabulary, Ids]:
        """Return the vocabulary, and the final number of each number by first appearance, ``[V]``."""
        words = list(self.index)
        # a stable sort keeps the order of first appearance among equal counts
        order = np.concatenate([[0], 1 + np.argsort(-self._counts[1:], kind="stable")])
        final = np.empty(len(words), dtype=np.int64)
        final[order] = np.arange(len(words))
        return Vocabulary([words[number] for number in order]), final
