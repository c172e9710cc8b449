"""Generated sequences of which some positions are scored: what recall and stories share.

A batch of an optimiser step is drawn from the seed and the step's number alone, so that a resumed run needs nothing
else. Which split a sequence belongs to follows from its tokens alone: no sequence is in two splits, whatever the seeds.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fwp_lightning.data.wikitext import Batches
from fwp_lightning.seeding import numpy_generator_for

Split = Literal["train", "valid", "test"]
Ints = NDArray[np.int64]

# targets of positions that are not scored, as torch's cross entropy has it
IGNORED = -100
# of 16 residues of a sequence's hash, which are valid and which are test; the others are train
VALID_RESIDUE, TEST_RESIDUE, N_RESIDUES = 0, 1, 16


class Scored(NamedTuple):
    """B sequences of T tokens, and what is to be said at some of their positions."""

    inputs: Tensor
    """``[B, T]``."""
    targets: Tensor
    """``[B, T]``; ``IGNORED`` where nothing is asked."""
    kinds: Tensor
    """``[B, T]`` which of the data's ``kinds`` a question is, from 1; 0 where nothing is asked."""


class ScoredSequences(L.LightningDataModule):
    """Fresh sequences for every optimiser step, fixed ones for valid and test; an epoch is a block of steps."""

    kinds: ClassVar[tuple[str, ...]] = ()
    """Names of the kinds of questions, as metrics have them."""

    def __init__(
        self, batch_size: int, steps_per_block: int, evaluation_sequences: int, seed: int | None, **numbers: int
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "steps_per_block": steps_per_block}
        for name, value in {**sizes, "evaluation_sequences": evaluation_sequences, **numbers}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number >= 1")
        self.batch_size, self.steps_per_block = batch_size, steps_per_block
        self.evaluation_sequences = evaluation_sequences
        self._evaluated: dict[tuple[Split, int], Scored] = {}
        self.seed = torch.initial_seed() % 2**63 if seed is None else seed

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """T, the tokens of a sequence."""
        raise NotImplementedError

    def draw(self, n: int, generator: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """Return inputs, targets and kinds ``[n, T]`` of fresh sequences, of any split."""
        raise NotImplementedError

    def sequences(self, split: Split, n: int, *place: int) -> Scored:
        """Return ``n`` sequences of a split; those of valid and test do not depend on the run's seed."""
        generator = numpy_generator_for(self.seed if split == "train" else 0, type(self).__name__, split, *place)
        parts: list[tuple[Ints, ...]] = []
        missing = n
        while missing > 0:
            drawn = self.draw(16 + (5 * missing // 4 if split == "train" else N_RESIDUES * missing), generator)
            there = splits_of(drawn[0]) == split
            parts.append(tuple(x[there][:missing] for x in drawn))
            missing -= len(parts[-1][0])
        return Scored(*(torch.from_numpy(np.concatenate(found)) for found in zip(*parts, strict=True)))

    def train_dataloader(self) -> DataLoader[Scored]:
        """Return the batches of one block of optimiser steps: those of the trainer's current epoch."""

        def first() -> int:
            return self.steps_per_block * (self.trainer.current_epoch if self.trainer else 0)

        batches = Batches(self.steps_per_block, lambda step: self.sequences("train", self.batch_size, step), first)
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Scored]:
        """Return the validation sequences."""
        return DataLoader(self._evaluation("valid"), batch_size=None)

    def test_dataloader(self) -> DataLoader[Scored]:
        """Return the test sequences."""
        return DataLoader(self._evaluation("test"), batch_size=None)

    def _evaluation(self, split: Split) -> Batches[Scored]:
        whole, rest = divmod(self.evaluation_sequences, self.batch_size)
        sizes = [self.batch_size] * whole + [rest] * (rest > 0)

        def batch(index: int) -> Scored:
            # the same at every validation
            if (split, index) not in self._evaluated:
                self._evaluated[split, index] = self.sequences(split, sizes[index], index)
            return self._evaluated[split, index]

        return Batches(len(sizes), batch)


def splits_of(tokens: Ints) -> NDArray[np.str_]:
    """Return the split of each sequence ``[B, T]``: it follows from the tokens (FNV-1a, folded to 16 residues)."""
    value = np.full(len(tokens), 0xCBF29CE484222325, dtype=np.uint64)
    for column in tokens.T.astype(np.uint64):
        value = (value ^ column) * np.uint64(0x100000001B3)
    residue = (value ^ (value >> np.uint64(32))) % np.uint64(N_RESIDUES)
    return np.where(residue == VALID_RESIDUE, "valid", np.where(residue == TEST_RESIDUE, "test", "train"))
