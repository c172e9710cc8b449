"""The retrieval task as the released code formulates it, written from the formulae: a baseline to measure.

Sequences are drawn one by one; each pair is embedded, all of it projected, and written into a memory ``[V, K]`` that
automatic differentiation follows; evaluation writes the memory anew for every query, and keeps graphs that nobody asks
for. Shapes: B sequences of T pairs, S keys and values, e components of an embedding, D of a key, K features.

What the released code computes in vain is computed here too: write strengths under the sum rule, a second map of all
pairs under every rule, two writes a step where one would do. Left out are its assertions of shapes, and value ids that
begin at S.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, layer_norm

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.bench.clocks import Clock
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.ops import PairParameters


class ReleasedModel(nn.Module):
    """The function of a ``RetrievalModel``, with its parameters."""

    def __init__(self, attention: AttentionConfig, model: RetrievalModel) -> None:
        """Copy the parameters.

        The released model has more: embeddings of values, which are never looked up, a map of pairs to values, which is
        never applied, and one whose result is never used.
        """
        super().__init__()
        n_keys, n_embedding = model.key_embedding.shape
        n_pair, like = n_keys + n_embedding, model.W_k
        self.attention, self.n_keys, self.n_normalised = attention, n_keys, model.readout_norm == "layer_norm"
        self.values = nn.Embedding.from_pretrained(torch.eye(n_keys, dtype=like.dtype), freeze=True)
        self.keys = nn.Embedding(2 * n_keys, n_embedding, dtype=like.dtype)
        self.to_key = nn.Linear(n_pair, model.d_key, dtype=like.dtype)
        self.to_value = nn.Linear(n_pair, model.d_key, dtype=like.dtype)
        self.to_query = nn.Linear(n_embedding, model.d_key, dtype=like.dtype)
        self.to_forget = nn.Linear(n_pair, model.d_key, dtype=like.dtype)
        self.to_beta = nn.Linear(n_pair, 1, dtype=like.dtype)
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

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        """Return predictions ``[B, S]`` for ids ``[B, T]`` and one queried key a sequence, ``[B, 1]``."""
        v = self.values(values)
        pairs = torch.cat([v, self.keys(keys)], dim=-1)
        asked = self.keys(query)
        k, beta, _forget = self.to_key(pairs), self.to_beta(pairs), self.to_forget(pairs)
        k, q = self.phi(k), self.phi(self.to_query(asked))
        if self.attention.rule == "sum":
            memory, z = torch.einsum("btv,btk->bvk", v, k), k.sum(dim=1)
            seen = torch.einsum("bk,bqk->bq", z, q).unsqueeze(-1) + self.attention.attention_norm_eps
            return (torch.einsum("bvk,bqk->bqv", memory, q) / seen).squeeze(1)
        beta = torch.sigmoid(beta)
        if self.attention.rule == "delta":
            memory = self._write_delta(k, v, beta)
            q = q / (q.sum(dim=-1, keepdim=True) + self.attention.query_norm_eps)
        else:
            memory = self._write_fwm(k, v, beta)
        y = torch.einsum("bvk,bqk->bqv", memory, q)
        return (layer_norm(y, (self.n_keys,)) if self.n_normalised else y).squeeze(1)

    def _write_delta(self, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """Return the memory ``[B, V, K]`` after all pairs; keys sum to 1, which is seen to at each use."""
        memory, eps = k.new_zeros(k.shape[0], v.shape[-1], k.shape[-1]), self.attention.key_norm_eps
        for k_t, v_t, beta_t in _steps(k, v, beta):
            total = k_t.sum(dim=-1, keepdim=True)
            total = total + eps if eps else total
            found = torch.einsum("bvk,bk->bv", memory, k_t / total)
            memory = memory - torch.einsum("bv,bk->bvk", found, k_t / total)
            memory = memory + torch.einsum("bv,bk->bvk", beta_t * v_t + (1 - beta_t) * found, k_t / total)
        return memory

    def _write_fwm(self, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """Return the memory ``[B, V, K]`` after all pairs; its norm is at most 1 from the second pair on."""
        steps = _steps(k, v, beta)
        k_t, v_t, beta_t = next(steps)
        memory = torch.einsum("bv,bk->bvk", v_t, k_t * beta_t)
        for k_t, v_t, beta_t in steps:
            found = torch.einsum("bvk,bk->bv", memory, k_t)
            memory = memory - torch.einsum("bv,bk->bvk", found, k_t)
            memory = memory + torch.einsum("bv,bk->bvk", beta_t * v_t + (1 - beta_t) * found, k_t)
            norm = memory.flatten(1).norm(dim=-1)
            memory = memory / ((norm - 1).relu() + 1)[:, None, None]
        return memory


def _steps(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the pairs of ``[B, T, .]``; the gradient of every index is a tensor of all T, as in the released code."""
    for t in range(tensors[0].shape[1]):
        yield tuple(x[:, t] for x in tensors)


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

    latest: Tensor
    """The last loss: its graph lives until the next is there, as in the released code, between what that allocates."""

    def __init__(self, attention: AttentionConfig, model: RetrievalModel, clock: Clock) -> None:
        self.model, self.clock = ReleasedModel(attention, model), clock
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def take(self, block: RetrievalBlock) -> Tensor:
        """Take the block's steps; return the loss before each."""
        losses = []
        for step in zip(*block, strict=True):
            self.model.train()
            loss = self.loss(*step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def loss(self, keys: Tensor, values: Tensor, query: Tensor, target: Tensor) -> Tensor:
        """Return the mean over sequences of half the squared distance to the one-hot target."""
        error = self.values_of(target) - self.model(keys, values, query)
        self.latest = (0.5 * error.pow(2)).sum(dim=-1).mean()
        return self.latest

    def values_of(self, ids: Tensor) -> Tensor:
        """Return the one-hot vectors ``[B, S]`` of ids ``[B, 1]``."""
        onehot: Tensor = self.model.values(ids).squeeze(1)
        return onehot

    def evaluate(self, sequence: RetrievalBlock, batch_size: int) -> Tensor:
        """Return the mean of the losses of one sequence's queries, ``batch_size`` at a time; graphs are kept."""
        losses = []
        self.model.eval()
        for batch in zip(*(x[0].split(batch_size) for x in sequence), strict=True):
            losses.append(self.loss(*batch).detach())
        return torch.stack(losses).mean()

    def seconds_a_step(self, data: RetrievalData, round_number: int) -> float:
        """Return the seconds of a step: its data, itself, and its share of the evaluation after every block.

        Steps and sequences of the evaluation are measured, each drawn within its time; there are
        ``evaluation_sequences`` every ``steps_per_block`` steps.
        """
        random = np.random.RandomState(round_number)
        trained = self.clock.seconds(lambda: self.take(draw_step(data, random)))
        evaluated = self.clock.seconds(lambda: self.evaluate(draw_evaluation(data, random), data.batch_size))
        return trained + evaluated * data.evaluation_sequences / data.steps_per_block


def draw_step(data: RetrievalData, random: np.random.RandomState) -> RetrievalBlock:
    """Return the data of one step, drawn sequence by sequence."""
    drawn, ids = [], _ids(data)
    for _ in range(data.batch_size):
        keys, values = (random.choice(ids, size=data.length, replace=data.replacement) for _ in range(2))
        drawn.append(_example(keys, values, random.choice(keys)))
    return _gathered(drawn)


def draw_evaluation(data: RetrievalData, random: np.random.RandomState) -> RetrievalBlock:
    """Return one sequence of S pairs, a copy for each query: its distinct keys, increasing, at most ``max_queries``."""
    ids = _ids(data)
    keys, values = (random.choice(ids, size=data.n_keys, replace=data.replacement) for _ in range(2))
    return _gathered([_example(keys, values, key) for key in np.unique(keys)][: data.max_queries or None])


def _ids(data: RetrievalData) -> list[int]:
    # no array: every draw makes one of the list, as in the released code
    return list(range(data.n_keys))


Example = tuple[np.ndarray, list[int], list[int]]
"""Keys and values ``[2, T]``, the queried key, and the value last stored under it."""


def _example(keys: np.ndarray, values: np.ndarray, query: int) -> Example:
    last = np.flatnonzero(keys == query)[-1]
    return np.stack([keys, values]), [keys[last]], [values[last]]


def _gathered(examples: list[Example]) -> RetrievalBlock:
    """Return the examples as one step."""
    pairs, queries, targets = map(list, zip(*examples, strict=True))
    with warnings.catch_warnings():
        # "Creating a tensor from a list of numpy.ndarrays is extremely slow", as in the released code
        warnings.simplefilter("ignore", UserWarning)
        both = torch.tensor(pairs)
    return RetrievalBlock(both[None, :, 0], both[None, :, 1], torch.tensor(queries)[None], torch.tensor(targets)[None])
