"""The retrieval task as the released code formulates it, written from the formulae: a baseline to measure.

Sequences are drawn one by one; each pair is embedded, all of it projected, and written into a memory ``[V, K]`` that
automatic differentiation follows; evaluation writes the memory anew for every query. Shapes: B sequences of T pairs,
S keys and values, e components of an embedding, D of a key, K features.

What the released code computes and throws away is left out here: it is not slower than this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, layer_norm

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.bench.clocks import Clock
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.ops import PairParameters

Pairs = tuple[Tensor, Tensor]

SPLIT = 32
"""Queries that are evaluated at a time."""


class ReleasedModel(nn.Module):
    """The function of a ``RetrievalModel``, with its parameters."""

    def __init__(self, attention: AttentionConfig, model: RetrievalModel) -> None:
        """Copy the parameters; the released table of embeddings has rows for values too, which are never looked up."""
        super().__init__()
        n_keys, n_embedding = model.key_embedding.shape
        like = model.W_k
        self.attention, self.n_keys, self.n_normalised = attention, n_keys, model.readout_norm == "layer_norm"
        self.values = nn.Embedding.from_pretrained(torch.eye(n_keys, dtype=like.dtype), freeze=True)
        self.keys = nn.Embedding(2 * n_keys, n_embedding, dtype=like.dtype)
        self.to_key = nn.Linear(n_keys + n_embedding, model.d_key, dtype=like.dtype)
        self.to_query = nn.Linear(n_embedding, model.d_key, dtype=like.dtype)
        self.to_beta = nn.Linear(n_keys + n_embedding, 1, dtype=like.dtype)
        self.phi = feature_map_of(attention)
        with torch.no_grad():
            for mine, theirs in zip(self.pair_parameters, model.pair_parameters, strict=True):
                if mine is not None and theirs is not None:
                    mine[: len(theirs)] = theirs

    @property
    def pair_parameters(self) -> PairParameters:
        """What corresponds to the parameters of a ``RetrievalModel``; more rows of embeddings."""
        key, query, beta = self.to_key, self.to_query, self.to_beta
        return PairParameters(self.keys.weight, key.weight, key.bias, query.weight, query.bias, beta.weight, beta.bias)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return predictions ``[B, S]`` for ids ``[B, T]`` and one queried key a sequence, ``[B]``."""
        v = self.values(values)
        pairs = torch.cat([v, self.keys(keys)], dim=-1).flatten(0, 1)
        k = self.phi(self.to_key(pairs)).unflatten(0, keys.shape)
        q = self.phi(self.to_query(self.keys(queries)))
        if self.attention.rule == "sum":
            memory = torch.einsum("btv,btk->bvk", v, k)
            seen = (k.sum(dim=1) * q).sum(dim=-1, keepdim=True) + self.attention.attention_norm_eps
            return torch.einsum("bvk,bk->bv", memory, q) / seen
        beta = torch.sigmoid(self.to_beta(pairs)).unflatten(0, keys.shape)
        if self.attention.rule == "delta":
            k = k / (k.sum(dim=-1, keepdim=True) + self.attention.key_norm_eps)
            q = q / (q.sum(dim=-1, keepdim=True) + self.attention.query_norm_eps)
        y = torch.einsum("bvk,bk->bv", self._write(k, v, beta), q)
        return layer_norm(y, (self.n_keys,)) if self.n_normalised else y

    def _write(self, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """Return the memory ``[B, V, K]`` after all pairs: ``W + beta (v - W k) k^T`` a pair; fwm: norm at most 1."""
        memory = k.new_zeros(k.shape[0], v.shape[-1], k.shape[-1])
        for t, (k_t, v_t, beta_t) in enumerate(zip(*(x.unbind(1) for x in (k, v, beta)), strict=True)):
            found = torch.einsum("bvk,bk->bv", memory, k_t)
            memory = memory + torch.einsum("bv,bk->bvk", beta_t * (v_t - found), k_t)
            if self.attention.rule == "fwm" and t > 0:
                norm = memory.flatten(1).norm(dim=1)
                memory = memory / torch.clamp(norm, min=1)[:, None, None]
        return memory


def feature_map_of(attention: AttentionConfig) -> Callable[[Tensor], Tensor]:
    """Return phi on the last dimension."""
    if attention.feature_map == "dpfp":
        return functools.partial(_dpfp, nu=attention.nu)
    return {"elu": lambda x: elu(x) + 1, "tanh": torch.tanh}[attention.feature_map]


def _dpfp(x: Tensor, nu: int) -> Tensor:
    halves = torch.cat([x.relu(), (-x).relu()], dim=-1)
    turned = torch.cat([halves.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)
    return torch.cat([halves] * nu, dim=-1) * turned


class ReleasedTrainer:
    """That formulation in training, as ``Trainer`` is of ours."""

    def __init__(self, attention: AttentionConfig, model: RetrievalModel, clock: Clock) -> None:
        self.model, self.clock = ReleasedModel(attention, model), clock
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def take(self, block: RetrievalBlock) -> Tensor:
        """Take the block's steps; return the loss before each."""
        losses = []
        for keys, values, query, target in zip(*block, strict=True):
            self.optimizer.zero_grad()
            loss = self.loss(keys, values, query[:, 0], target[:, 0])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def loss(self, keys: Tensor, values: Tensor, query: Tensor, target: Tensor) -> Tensor:
        """Return the mean over sequences of half the squared distance to the one-hot target."""
        error = self.model(keys, values, query) - self.model.values(target)
        return 0.5 * error.square().sum(dim=-1).mean()

    def evaluate(self, keys: Tensor, values: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of the splits' losses for one sequence ``[T]`` and its queries ``[Q]``, its graphs kept."""
        losses = []
        for query, target in zip(queries.split(SPLIT), targets.split(SPLIT), strict=True):
            losses.append(self.loss(keys.repeat(len(query), 1), values.repeat(len(query), 1), query, target))
        return torch.stack(losses).mean()

    def seconds_a_step(self, data: RetrievalData, round_number: int) -> float:
        """Return the seconds of a step: its data, itself, and its share of the evaluation after every block.

        One step and one sequence of the evaluation are measured; there are ``evaluation_sequences`` every
        ``steps_per_block`` steps.
        """
        generator = np.random.default_rng(round_number)
        drawn = self.clock.seconds(lambda: draw_step(data, generator))
        one = RetrievalBlock(*(x[:1] for x in data.block(round_number)))
        trained = self.clock.seconds(lambda: self.take(one))
        keys, values, queries, targets, mask = (x[0] for x in data.evaluation(round_number))
        evaluated = self.clock.seconds(lambda: self.evaluate(keys, values, queries[mask], targets[mask]))
        return drawn + trained + evaluated * data.evaluation_sequences / data.steps_per_block


def draw_step(data: RetrievalData, generator: np.random.Generator) -> RetrievalBlock:
    """Return the data of one step, drawn sequence by sequence."""
    drawn: list[tuple[np.ndarray, ...]] = []
    for _ in range(data.batch_size):
        if data.replacement:
            keys, values = (generator.integers(data.n_keys, size=data.length) for _ in range(2))
        else:
            keys, values = (generator.permutation(data.n_keys) for _ in range(2))
        query = keys[generator.integers(data.length)]
        last = np.flatnonzero(keys == query)[-1]
        drawn.append((keys, values, query[None], values[last][None]))
    return RetrievalBlock(*(torch.from_numpy(np.stack(x)[None]) for x in zip(*drawn, strict=True)))
