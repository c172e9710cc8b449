"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, Sec. 3 and App. on MQAR).

A sequence begins with N pairs of a key and a value, all keys different; later each key comes once more, and its value
is to be said there::

    tokens    4 17  2 21  9 13 |  0  9  0  4  0  0  2  0        keys 1 .. V/2 - 1, values V/2 .. V - 1
    targets   .  .  .  .  .  . |  . 13  . 17  .  . 21  .

The gaps to the queries follow a power law, as repetitions in text do: of the places behind the pairs, two tokens each,
the x-th is taken with probability proportional to ``a x^(a-1)``, a = 0.01. Other positions hold the token 0, or with
``noise`` random tokens, which the protocol has by default.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fwp_lightning.data.scored_sequences import IGNORED, Ints, ScoredSequences


class RecallData(ScoredSequences):
    """Multi-query associative recall: N pairs among T tokens, V of them in all."""

    kinds: ClassVar[tuple[str, ...]] = ("recall",)

    def __init__(
        self,
        n_pairs: int = 4,
        length: int = 64,
        vocabulary: int = 8192,
        power: float = 0.01,
        noise: bool = True,
        batch_size: int = 64,
        steps_per_block: int = 100,
        evaluation_sequences: int = 1000,
        seed: int | None = None,
    ) -> None:
        """Check the numbers.

        Args:
            n_pairs: N, the pairs of a sequence.
            length: T, its tokens; at least 4 N.
            vocabulary: V, half of it keys (token 0 is none) and half values.
            power: a of the power law of gaps; 1 is uniform.
            noise: whether positions behind the pairs that ask nothing hold random tokens.
            batch_size: sequences per optimiser step.
            steps_per_block: optimiser steps of a Lightning epoch.
            evaluation_sequences: of valid, and of test.
            seed: of the training data; None: the run's own (seed_everything).
        """
        super().__init__(
            batch_size,
            steps_per_block,
            evaluation_sequences,
            seed,
            n_pairs=n_pairs,
            length=length,
            vocabulary=vocabulary,
        )
        if length % 2 or length < 4 * n_pairs:
            raise ValueError(f"data.length={length} must be even and at least 4 x n_pairs = {4 * n_pairs}")
        if vocabulary % 2 or vocabulary // 2 - 1 < n_pairs:
            raise ValueError(f"data.vocabulary={vocabulary} must be even, half of it more than n_pairs={n_pairs}")
        if not power > 0:
            raise ValueError(f"data.power={power} must be > 0")
        self.n_pairs, self.n_tokens, self.vocabulary = n_pairs, length, vocabulary
        self.power, self.noise = power, noise

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.vocabulary

    @property
    def length(self) -> int:
        """T."""
        return self.n_tokens

    def draw(self, n: int, generator: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """Return inputs, targets and kinds ``[n, T]``."""
        half, pairs = self.vocabulary // 2, 2 * self.n_pairs
        keys = 1 + _distinct(n, half - 1, self.n_pairs, generator)
        values = half + _distinct(n, half, self.n_pairs, generator)
        inputs = np.zeros((n, self.length), dtype=np.int64)
        if self.noise:
            inputs = generator.integers(self.vocabulary, size=inputs.shape)
        inputs[:, 0:pairs:2], inputs[:, 1:pairs:2] = keys, values
        targets, kinds = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        places = pairs + 2 * self._gaps(n, (self.length - pairs) // 2, generator)
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        np.put_along_axis(kinds, places, np.ones_like(keys), axis=1)
        return inputs, targets, kinds

    def _gaps(self, n: int, n_places: int, generator: np.random.Generator) -> Ints:
        """Draw places ``[n, N]`` without replacement: the largest of log p + Gumbel noise."""
        logits = (self.power - 1) * np.log(np.arange(1, n_places + 1))
        return _smallest(-(logits + generator.gumbel(size=(n, n_places))), self.n_pairs)


def _distinct(n: int, limit: int, number: int, generator: np.random.Generator) -> Ints:
    """Draw ``n`` lines of ``number`` different whole numbers below ``limit``, all such lines alike likely."""
    # one number for each candidate is the short way only where most of them are taken
    if number**2 > limit:
        return _smallest(generator.random((n, limit)), number)
    drawn = generator.integers(limit, size=(n, number))
    while True:
        ordered = np.sort(drawn, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            return drawn
        drawn[again] = generator.integers(limit, size=(int(again.sum()), number))


def _smallest(scores: np.ndarray, n: int) -> Ints:
    """Return for each line the indices of its ``n`` smallest scores, in the order of the scores."""
    few = np.argpartition(scores, n - 1, axis=1)[:, :n]
    order = np.take_along_axis(scores, few, axis=1).argsort(axis=1)
    return np.take_along_axis(few, order, axis=1).astype(np.int64)
