"""Associative retrieval (Sec. 6.1): write key-value pairs, then ask for the value last stored under a key.

A sequence with S = 4 and its queries, Setting 2 (with replacement)::

    keys     2  0  2  3  0  1  1  2        query 2 -> 3  (the pair at the last position overwrites the earlier ones)
    values   1  2  2  0  1  1  3  3        query 0 -> 1

Setting 1 (without replacement): T = S, keys and values are permutations. Setting 2: T = 2 S, both drawn independently.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fwp_lightning import compiled
from fwp_lightning.seeding import numpy_generator_for

DRAWS = "pair_draws"


class RetrievalBlock(NamedTuple):
    """Training data of one block of optimiser steps: N steps, B sequences a step, T pairs, one query a sequence."""

    keys: Tensor
    """``[N, B, T]`` key ids."""
    values: Tensor
    """``[N, B, T]`` value ids."""
    query: Tensor
    """``[N, B, 1]`` the key asked for: the one at a uniformly drawn position."""
    target: Tensor
    """``[N, B, 1]`` the value last stored under it."""


class RetrievalEvaluation(NamedTuple):
    """Evaluation sequences, each with all its distinct keys as queries in increasing order, up to a limit."""

    keys: Tensor
    """``[B, T]``."""
    values: Tensor
    """``[B, T]``."""
    queries: Tensor
    """``[B, Q]``; where a sequence has fewer than Q distinct keys the rest is key 0 and masked."""
    targets: Tensor
    """``[B, Q]``."""
    mask: Tensor
    """``[B, Q]`` true for real queries."""


class RetrievalData(L.LightningDataModule):
    """Draws sequences; nothing is stored. One epoch is one block of training steps followed by one evaluation."""

    def __init__(
        self,
        n_keys: int = 20,
        replacement: bool = False,
        batch_size: int = 32,
        steps_per_block: int = 100,
        evaluation_sequences: int = 20,
        evaluation_length: Literal["n_keys", "train"] = "n_keys",
        max_queries: int = 200,
        seed: int | None = None,
    ) -> None:
        """Check the numbers.

        Args:
            n_keys: S, the number of unique keys, and of values.
            replacement: False: Setting 1, T = S; True: Setting 2, T = 2 S.
            batch_size: sequences per optimiser step.
            steps_per_block: optimiser steps between evaluations.
            evaluation_sequences: fresh sequences per evaluation.
            evaluation_length: pairs in an evaluation sequence: S (the released code, in both settings) or as in
                training.
            max_queries: at most this many queries per evaluation sequence, smallest key ids first; 0: all.
            seed: of the data; None: the run's own (seed_everything).
        """
        super().__init__()
        for name, value in [("n_keys", n_keys), ("batch_size", batch_size), ("steps_per_block", steps_per_block)]:
            if int(value) != value or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number >= 1")
        if evaluation_sequences < 1 or max_queries < 0:
            raise ValueError(
                f"data.evaluation_sequences={evaluation_sequences} must be >= 1 and data.max_queries={max_queries} >= 0"
            )
        if evaluation_length not in ("n_keys", "train"):
            raise ValueError(f"data.evaluation_length={evaluation_length!r} is unknown. Known: n_keys, train.")
        self.n_keys = n_keys
        self.replacement = replacement
        self.batch_size = batch_size
        self.steps_per_block = steps_per_block
        self.evaluation_sequences = evaluation_sequences
        self.evaluation_length = evaluation_length
        self.max_queries = max_queries
        self.seed = torch.initial_seed() % 2**63 if seed is None else seed

    @property
    def length(self) -> int:
        """T, the pairs of a training sequence."""
        return 2 * self.n_keys if self.replacement else self.n_keys

    def block(self, index: int) -> RetrievalBlock:
        """Return the training data of block ``index``, the same whenever it is asked for."""
        shape = (self.steps_per_block, self.batch_size)
        return draw_block(
            shape, self.n_keys, self.length, self.replacement, numpy_generator_for(self.seed, "train", index)
        )

    def evaluation(self, index: int) -> RetrievalEvaluation:
        """Return the evaluation data that follow block ``index``."""
        length = self.length if self.evaluation_length == "train" else self.n_keys
        keys, values = draw_pairs(
            (self.evaluation_sequences,),
            self.n_keys,
            length,
            self.replacement,
            numpy_generator_for(self.seed, "valid", index),
        )
        return all_queries(keys, values, self.n_keys, self.max_queries)

    def train_dataloader(self) -> DataLoader[RetrievalBlock]:
        """Return one block per epoch."""
        return DataLoader(_OnePerEpoch(self, "block"), batch_size=None)

    def val_dataloader(self) -> DataLoader[RetrievalEvaluation]:
        """Return one fresh evaluation per epoch."""
        return DataLoader(_OnePerEpoch(self, "evaluation"), batch_size=None)


class _OnePerEpoch(IterableDataset):  # type: ignore[type-arg]
    """The single item of the current epoch: which one follows from the epoch number, so resuming needs nothing else."""

    def __init__(self, data: RetrievalData, kind: Literal["block", "evaluation"]) -> None:
        self.data, self.kind = data, kind

    def __iter__(self) -> Iterator[RetrievalBlock | RetrievalEvaluation]:
        trainer = self.data.trainer
        assert trainer is not None
        yield getattr(self.data, self.kind)(trainer.current_epoch)

    def __len__(self) -> int:
        return 1


def draw_pairs(
    shape: tuple[int, ...], n_keys: int, length: int, replacement: bool, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return key ids and value ids, each ``[*shape, length]``."""
    keys, values = (torch.empty(*shape, length, dtype=torch.int64) for _ in range(2))
    if _draw_compiled((keys, values), n_keys, replacement, generator):
        return keys, values
    if replacement:
        drawn = [generator.integers(n_keys, size=(*shape, length)) for _ in range(2)]
    else:
        ids = np.broadcast_to(np.arange(n_keys), (*shape, n_keys))
        drawn = [generator.permuted(ids, axis=-1)[..., :length] for _ in range(2)]
    return torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])


def draw_block(
    shape: tuple[int, int], n_keys: int, length: int, replacement: bool, generator: np.random.Generator
) -> RetrievalBlock:
    """Return sequences ``[N, B, T]`` and for each the key at a uniformly drawn position with its last value."""
    block = RetrievalBlock(*(torch.empty(*shape, n, dtype=torch.int64) for n in (length, length, 1, 1)))
    if _draw_compiled(block, n_keys, replacement, generator):
        return block
    keys, values = draw_pairs(shape, n_keys, length, replacement, generator)
    last = torch.from_numpy(generator.integers(length, size=(*shape, 1)))
    query = keys.gather(-1, last)
    if replacement:
        last = torch.where(keys == query, torch.arange(length), -1).amax(-1, keepdim=True)
    return RetrievalBlock(keys, values, query, values.gather(-1, last))


class _Draws(ctypes.Structure):
    """``Problem`` of ``csrc/pair_draws.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "n_keys", "length", "replacement")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "query", "target")),
        ("key", ctypes.c_uint64 * 2),
        ("counter", ctypes.c_uint64),
        ("taken", ctypes.c_int64),
    )


def _draw_compiled(tensors: Sequence[Tensor], n_keys: int, replacement: bool, generator: np.random.Generator) -> bool:
    """Fill key ids and value ids ``[*shape, T]``, and queries and targets ``[*shape, 1]`` if given, in C++.

    The numbers are those that NumPy would have drawn, and the generator is left as NumPy would have left it. Returns
    whether it could be done; it cannot without a compiler, or with another generator or one with numbers at hand.
    """
    length = tensors[0].shape[-1]
    state = cast(dict[str, Any], generator.bit_generator.state)
    if state["bit_generator"] != "Philox" or state["buffer_pos"] != 4 or state["has_uint32"]:
        return False
    key, counter = (state["state"][name].tolist() for name in ("key", "counter"))
    # the kernel carries nothing into a second number of 64 bits
    if any(counter[1:]) or counter[0] >= 2**63 or not (replacement or length == n_keys):
        return False
    if compiled.why_unavailable(DRAWS) is not None:
        return False
    pointers = [x.data_ptr() for x in tensors] + [None] * (4 - len(tensors))
    problem = _Draws(tensors[0].numel() // length, n_keys, length, replacement, *pointers, tuple(key), counter[0])
    compiled.call(DRAWS, "draw", torch.int64, problem)
    # to the last count that was reached, and over what was drawn of it
    counts = max(problem.taken - 1, 0) // 8
    generator.bit_generator.advance(counts)  # type: ignore[attr-defined]
    generator.integers(2**32, size=problem.taken - 8 * counts, dtype=np.uint32)
    return True


def all_queries(keys: Tensor, values: Tensor, n_keys: int, max_queries: int) -> RetrievalEvaluation:
    """Return sequences with their distinct keys as queries, increasing, at most ``max_queries`` (0: all)."""
    positions = torch.arange(keys.shape[-1]).expand_as(keys)
    last = torch.full((keys.shape[0], n_keys), -1).scatter_reduce_(1, keys, positions, "amax")
    present = last >= 0
    limit = min(max_queries or n_keys, n_keys)
    queries = (~present).to(torch.int8).argsort(dim=1, stable=True)[:, :limit]
    mask = present.gather(1, queries)
    queries = queries.where(mask, 0)
    targets = values.gather(1, last.gather(1, queries).clamp(min=0))
    # columns that no sequence uses would only cost time
    used = int(mask.sum(1).max())
    return RetrievalEvaluation(
        keys, values, queries[:, :used], targets[:, :used].where(mask[:, :used], 0), mask[:, :used]
    )
