"""The retrieval model (Sec. 6.1): one fast weight memory over key-value pairs, read once per query.

The value of a pair is a fixed one-hot vector; its key depends on both halves, ``k = W_k [onehot(value),
embedding(key)] + b_k``; a query is ``q = W_q embedding(key) + b_q``. The output is a vector over the values.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, one_hot

from fwp_lightning.attention import AttentionConfig, FastWeightMemory
from fwp_lightning.ops import PairMemory, pair_readout

_PLAIN_BACKENDS = {"sum": "chunked", "delta": "reference", "fwm": "reference"}


class RetrievalModel(nn.Module):
    """Predict the value last stored under each queried key.

    ``compute="plain"`` is the definition: pairs are embedded one by one and written into the memory.
    ``compute="factored"`` is the same function of the same parameters, using three facts: ``W_k`` acts on one-hot
    values and on few embeddings, so projections are tables; values are one-hot, so the read-out is a scatter of
    attention weights; a query that is read last needs those weights only, not the memory. ``compute="compiled"`` has
    the training step of some rules and maps in C++, and ``auto`` takes it where it exists.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        n_keys: int,
        d_key: int = 64,
        readout_norm: Literal["none", "layer_norm"] = "none",
        compute: Literal["auto", "plain", "factored", "compiled"] = "auto",
    ) -> None:
        super().__init__()
        self.n_keys, self.d_key = n_keys, d_key
        self.readout_norm, self.compute = readout_norm, compute
        if compute == "plain" and attention.backend == "auto":
            # as the released code: one sum of outer products, and a loop where a write depends on the one before
            attention = replace(attention, backend=_PLAIN_BACKENDS.get(attention.rule, "auto"))
        self.memory = FastWeightMemory(attention, d_key)
        # the kernel knows the axes as this module's configuration has them
        self._pair_memory = PairMemory(**{f.name: getattr(attention, f.name) for f in fields(PairMemory)})
        # the released code's size of an embedding: 1.1 times the whole vocabulary of keys and values
        d_embedding = int((n_keys + n_keys) * 1.1)
        d_pair = n_keys + d_embedding
        self.key_embedding = nn.Parameter(torch.empty(n_keys, d_embedding))
        self.W_k = nn.Parameter(torch.empty(d_key, d_pair))
        self.b_k = nn.Parameter(torch.empty(d_key))
        self.W_q = nn.Parameter(torch.empty(d_key, d_embedding))
        self.b_q = nn.Parameter(torch.empty(d_key))
        if self.memory.rule.uses_beta:
            self.W_beta = nn.Parameter(torch.empty(1, d_pair))
            self.b_beta = nn.Parameter(torch.empty(1))
        self.register_load_state_dict_pre_hook(_drop_unused_embeddings)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters as the released code does."""
        softmax = self.memory.config.rule == "softmax"
        nn.init.normal_(self.key_embedding)
        for W, b in ((self.W_k, self.b_k), (self.W_q, self.b_q)):
            bound = math.sqrt(6 / sum(W.shape)) if softmax else self.d_key**-0.5
            nn.init.uniform_(W, -bound, bound)
            nn.init.uniform_(b, -(W.shape[1] ** -0.5), W.shape[1] ** -0.5)
        if self.memory.rule.uses_beta:
            bound = self.W_beta.shape[1] ** -0.5
            nn.init.uniform_(self.W_beta, -bound, bound)
            nn.init.uniform_(self.b_beta, -bound, bound)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return predictions ``[B, Q, S]`` for key ids and value ids ``[B, T]`` and queried key ids ``[B, Q]``."""
        if self.compute != "plain" and queries.shape[1] == 1 and self._is_compiled():
            projections = (self.key_embedding, self.W_k, self.b_k, self.W_q, self.b_q)
            beta = self._beta(keys, values)
            y = pair_readout(self._pair_memory, *projections, keys, values, queries[:, 0], beta).unsqueeze(1)
        else:
            q = linear(embedding(queries, self.key_embedding), self.W_q, self.b_q)
            if self.compute == "plain":
                y = self._write_and_read(*self._plain_keys(keys, values), values, q)
            elif self.memory.has_attention_weights:
                y = self._scatter_weights(*self._factored_keys(keys, values), values, q)
            else:
                y = self._write_and_read(*self._factored_keys(keys, values), values, q)
        return layer_norm(y, (self.n_keys,)) if self.readout_norm == "layer_norm" else y

    def _is_compiled(self) -> bool:
        """Whether the compiled read-out serves; asked for by name it must."""
        if self.compute == "factored" or (self.compute == "auto" and self.memory.config.backend != "auto"):
            return False
        reason = self._pair_memory.why_not(self.W_k.dtype, self.W_k.device)
        if reason and self.compute == "compiled":
            raise ValueError(f"model.compute=compiled cannot run: {reason}; set model.compute: auto")
        return reason is None

    def _write_and_read(self, k: Tensor, beta: Tensor | None, values: Tensor, q: Tensor) -> Tensor:
        # one head: [B, T, 1, D]
        v = one_hot(values, self.n_keys).to(k.dtype).unsqueeze(2)
        beta = None if beta is None else beta.unsqueeze(2)
        return self.memory.read(q.unsqueeze(2), self.memory.write(k.unsqueeze(2), v, beta)).squeeze(2)

    def _scatter_weights(self, k: Tensor, beta: Tensor | None, values: Tensor, q: Tensor) -> Tensor:
        """Add each attention weight to the component of its one-hot value: ``sum_t a_t onehot(v_t)``."""
        beta = None if beta is None else beta.unsqueeze(2)
        weights = self.memory.attention_weights(q.unsqueeze(2), k.unsqueeze(2), beta).squeeze(1)
        index = values.unsqueeze(1).expand_as(weights)
        return weights.new_zeros(*weights.shape[:2], self.n_keys).scatter_add(2, index, weights)

    def _plain_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        onehot = one_hot(values, self.n_keys).to(self.W_k.dtype)
        pairs = torch.cat([onehot, embedding(keys, self.key_embedding)], dim=-1)
        k = linear(pairs, self.W_k, self.b_k)
        if not self.memory.rule.uses_beta:
            return k, None
        return k, torch.sigmoid(linear(pairs, self.W_beta, self.b_beta)).squeeze(-1)

    def _factored_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add up keys from two tables ``[S, D]``: one for the key ids and one for the value ids."""
        W_value, W_embedding = self.W_k.split([self.n_keys, self.key_embedding.shape[1]], dim=1)
        key_table, value_table = linear(self.key_embedding, W_embedding, self.b_k), W_value.T
        return embedding(keys, key_table) + embedding(values, value_table), self._beta(keys, values)

    def _beta(self, keys: Tensor, values: Tensor) -> Tensor | None:
        if not self.memory.rule.uses_beta:
            return None
        w_value, w_embedding = self.W_beta[0].split([self.n_keys, self.key_embedding.shape[1]])
        return torch.sigmoid((self.key_embedding @ w_embedding + self.b_beta)[keys] + w_value[values])


def _drop_unused_embeddings(module: RetrievalModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept the released model's embedding, which has rows for the values too; they are never looked up."""
    table = state_dict.get(f"{prefix}key_embedding")
    if table is not None and table.shape[0] == 2 * module.n_keys:
        state_dict[f"{prefix}key_embedding"] = table[: module.n_keys]
