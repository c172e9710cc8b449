"""Embedding and adaptive softmax over one tied matrix: frequent words in the head, the others in clusters behind it.

Words are numbered by decreasing frequency. With cut-offs ``c_1 < .. < c_n < V`` the head holds the words below ``c_1``
and one logit for each of the n clusters ``[c_i, c_{i+1})``::

    log p(w) = log p_head(w)                            w < c_1
    log p(w) = log p_head(cluster i) + log p_i(w)       c_i <= w < c_{i+1}

Without cut-offs it is a plain softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, log_softmax


class TiedAdaptiveEmbedding(nn.Module):
    """One matrix ``[V, D]`` that embeds words (times sqrt(D)) and scores them; no projections, biases on the output.

    ``ValueError`` for cut-offs that are not increasing whole numbers above 0; those not below V are left out, so that
    one list serves a smaller vocabulary too.
    """

    def __init__(self, n_words: int, d_model: int, cutoffs: Sequence[int] = ()) -> None:
        super().__init__()
        check_cutoffs(cutoffs)
        self.n_words, self.d_model = n_words, d_model
        self.edges = [*(c for c in cutoffs if c < n_words), n_words]
        n_clusters = len(self.edges) - 1
        self.weight = nn.Parameter(torch.empty(n_words, d_model))
        self.bias = nn.Parameter(torch.empty(n_words))
        self.cluster_weight = nn.Parameter(torch.empty(n_clusters, d_model))
        self.cluster_bias = nn.Parameter(torch.empty(n_clusters))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 0.02^2); biases are 0."""
        for weight in (self.weight, self.cluster_weight):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.bias, self.cluster_bias):
            nn.init.zeros_(bias)

    def embed(self, words: Tensor) -> Tensor:
        """Return ``sqrt(D) E[w]`` ``[..., D]``."""
        return embedding(words, self.weight) * math.sqrt(self.d_model)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return ``-log p(target)`` in nats, ``[N]``, of hidden vectors ``[N, D]``, in the order of the targets."""
        head_target = targets
        for cluster in range(1, len(self.edges)):
            # the released code numbers the clusters from the end of the head
            inside = (targets >= self.edges[cluster - 1]) & (targets < self.edges[cluster])
            head_target = head_target.masked_fill(inside, self._column(cluster))
        nll = cross_entropy(self._head(hidden), head_target, reduction="none")
        for cluster in range(1, len(self.edges)):
            start, end = self.edges[cluster - 1 : cluster + 1]
            where = ((targets >= start) & (targets < end)).nonzero().squeeze(-1)
            if where.numel():
                tail = cross_entropy(self._tail(hidden[where], cluster), targets[where] - start, reduction="none")
                nll = nll.index_add(0, where, tail.to(nll.dtype))
        return nll

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities of all words, ``[N, V]``."""
        head = log_softmax(self._head(hidden), dim=-1)
        parts = [head[:, : self.edges[0]]]
        for cluster in range(1, len(self.edges)):
            tail = log_softmax(self._tail(hidden, cluster), dim=-1)
            parts.append(head[:, self._column(cluster), None] + tail)
        return torch.cat(parts, dim=-1)

    def _column(self, cluster: int) -> int:
        return self.edges[0] + len(self.edges) - 1 - cluster

    def _head(self, hidden: Tensor) -> Tensor:
        first = self.edges[0]
        weight = torch.cat([self.weight[:first], self.cluster_weight])
        return linear(hidden, weight, torch.cat([self.bias[:first], self.cluster_bias]))

    def _tail(self, hidden: Tensor, cluster: int) -> Tensor:
        start, end = self.edges[cluster - 1 : cluster + 1]
        return linear(hidden, self.weight[start:end], self.bias[start:end])

    def extra_repr(self) -> str:
        return f"n_words={self.n_words}, d_model={self.d_model}, cutoffs={self.edges[:-1]}"


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Raise ``ValueError`` for cut-offs that are not increasing whole numbers above 0."""
    if any(type(c) is not int or c < 1 for c in cutoffs) or sorted(set(cutoffs)) != list(cutoffs):
        raise ValueError(f"cutoffs={list(cutoffs)} must be increasing whole numbers above 0, as in [20000, 40000]")
