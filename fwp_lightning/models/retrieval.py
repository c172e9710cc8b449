"""The retrieval model (Sec. 6.1): one fast weight memory over key-value pairs, read once per query.

The value of a pair is a fixed one-hot vector; its key depends on both halves, ``k = W_k [onehot(value),
embedding(key)] + b_k``; a query is ``q = W_q embedding(key) + b_q``. The output is a vector over the values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, one_hot

from fwp_lightning.attention import AttentionConfig, FastWeightMemory
from fwp_lightning.ops import PairMemory, PairParameters

_PLAIN_BACKENDS = {"sum": "chunked", "delta": "reference", "fwm": "reference"}


class RetrievalModel(nn.Module):
    """Predict the value last stored under each queried key.

    ``compute="plain"`` is the definition: pairs are embedded one by one and written into the memory.
    ``compute="factored"`` is the same function of the same parameters, using three facts: ``W_k`` acts on one-hot
    values and on few embeddings, so projections are tables; values are one-hot, so the read-out is a scatter of
    attention weights; a query that is read last needs those weights only, not the memory. With ``compute="compiled"``
    the task trains in C++ (``pair_training``) and evaluates factored, and ``auto`` does so wherever it can.
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
        self.memory = FastWeightMemory(attention, d_key, d_value=n_keys)
        self._check_rule()
        pairs = self.memory.rule.pairs
        # the released code's size of an embedding: 1.1 times the whole vocabulary of keys and values
        d_embedding = int((n_keys + n_keys) * 1.1)
        d_pair = n_keys + d_embedding
        self.key_embedding = nn.Parameter(torch.empty(n_keys, d_embedding))
        self.W_k = nn.Parameter(torch.empty(pairs * d_key, d_pair))
        self.b_k = nn.Parameter(torch.empty(pairs * d_key))
        self.W_q = nn.Parameter(torch.empty(d_key, d_embedding))
        self.b_q = nn.Parameter(torch.empty(d_key))
        for gate in self.memory.rule.gates:
            setattr(self, f"W_{gate.name}", nn.Parameter(torch.empty(pairs, d_pair)))
            setattr(self, f"b_{gate.name}", nn.Parameter(torch.empty(pairs)))
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
        for W, b in self._gate_parameters():
            bound = W.shape[1] ** -0.5
            nn.init.uniform_(W, -bound, bound)
            nn.init.uniform_(b, -bound, bound)

    def _check_rule(self) -> None:
        rule = self.memory.rule
        if rule.reads_while_writing or any(gate.size != "number" for gate in rule.gates):
            raise ValueError(
                f"rule {self.memory.config.rule} reads at every step, but a retrieval sequence has one query, behind "
                "its pairs; take a rule that writes first"
            )

    def _gate_parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(getattr(self, f"W_{g.name}"), getattr(self, f"b_{g.name}")) for g in self.memory.rule.gates]

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return predictions ``[B, Q, S]`` for key ids and value ids ``[B, T]`` and queried key ids ``[B, Q]``."""
        q = self._queries(queries)
        k, gates = self._plain_keys(keys, values) if self.compute == "plain" else self._factored_keys(keys, values)
        # all pairs of a step store its value
        values = values.repeat_interleave(self.memory.rule.pairs, dim=1)
        if self.compute != "plain" and self.memory.has_attention_weights:
            y = self._scatter_weights(k, gates, values, q)
        else:
            y = self._write_and_read(k, gates, values, q)
        return layer_norm(y, (self.n_keys,)) if self.readout_norm == "layer_norm" else y

    def project(
        self, keys: Tensor, values: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return q ``[B, Q, 1, D]``, k ``[B, T, 1, D]``, one-hot values ``[B, T, 1, S]`` and gates, of the one head."""
        k, gates = self._plain_keys(keys, values)
        v = one_hot(values.repeat_interleave(self.memory.rule.pairs, dim=1), self.n_keys).to(k.dtype)
        return self._queries(queries).unsqueeze(2), k, v.unsqueeze(2), gates

    def is_compiled(self) -> bool:
        """Whether training runs in C++; ``ValueError`` with the reason where it was asked for by name and cannot."""
        if self.compute in ("plain", "factored") or (self.compute == "auto" and self.memory.config.backend != "auto"):
            return False
        reason = self.pair_memory.why_not(self.W_k.dtype, self.W_k.device)
        if reason and self.compute == "compiled":
            raise ValueError(f"model.compute=compiled cannot run: {reason}; set model.compute: auto")
        return reason is None

    @property
    def pair_memory(self) -> PairMemory:
        """The model as ``ops.train_pairs`` knows it."""
        c = self.memory.config
        favor = c.feature_map == "favor"
        return PairMemory(
            rule=c.rule,
            feature_map=c.feature_map,
            phi_norm=c.phi_norm,
            attention_norm=c.attention_norm,
            output_scale=c.output_scale,
            nu=c.nu if c.feature_map == "dpfp" else 1,
            key_norm_eps=c.key_norm_eps,
            query_norm_eps=c.query_norm_eps,
            attention_norm_eps=c.attention_norm_eps,
            stabilizer=c.favor.stabilizer if favor else "none",
            input_scale=self.d_key**-0.25 if favor and c.favor.scaling == "rsqrt_sqrt_d" else 1.0,
            kernel_eps=c.favor.kernel_eps if favor else 0.0,
            layer_norm=self.readout_norm == "layer_norm",
        )

    @property
    def pair_parameters(self) -> PairParameters:
        """The parameters as ``ops.train_pairs`` takes them."""
        beta = [parameter for pair in self._gate_parameters() for parameter in pair]
        return PairParameters(self.key_embedding, self.W_k, self.b_k, self.W_q, self.b_q, *beta)

    def training_directions(self, n_steps: int) -> Tensor | None:
        """Draw FAVOR+'s matrices of the next steps ``[n_steps or 1, m, D]``; None for other maps."""
        draw = getattr(self.memory.feature_map, "training_directions", None)
        return None if draw is None else draw(n_steps)

    def _queries(self, queries: Tensor) -> Tensor:
        if self.compute != "plain" and queries.numel() > self.n_keys:
            # in an evaluation each key is asked for many times
            return embedding(queries, linear(self.key_embedding, self.W_q, self.b_q))
        return linear(embedding(queries, self.key_embedding), self.W_q, self.b_q)

    def _write_and_read(self, k: Tensor, gates: tuple[Tensor, ...], values: Tensor, q: Tensor) -> Tensor:
        v = one_hot(values, self.n_keys).to(k.dtype).unsqueeze(2)
        return self.memory.read(q.unsqueeze(2), self.memory.write(k, v, gates)).squeeze(2)

    def _scatter_weights(self, k: Tensor, gates: tuple[Tensor, ...], values: Tensor, q: Tensor) -> Tensor:
        """Add each attention weight to the component of its one-hot value: ``sum_t a_t onehot(v_t)``."""
        weights = self.memory.attention_weights(q.unsqueeze(2), k, gates).squeeze(1)
        index = values.unsqueeze(1).expand_as(weights)
        return weights.new_zeros(*weights.shape[:2], self.n_keys).scatter_add_(2, index, weights)

    def _plain_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return keys ``[B, n T, 1, D]`` and gates ``[B, n T, 1]`` of n pairs a step, of one head."""
        onehot = one_hot(values, self.n_keys).to(self.W_k.dtype)
        pairs = torch.cat([onehot, embedding(keys, self.key_embedding)], dim=-1)
        k = linear(pairs, self.W_k, self.b_k)
        return self._one_head(k), tuple(
            gate.of(self._one_head(linear(pairs, W, b)))
            for gate, (W, b) in zip(self.memory.rule.gates, self._gate_parameters(), strict=True)
        )

    def _factored_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what ``_plain_keys`` does, added up from two tables ``[S, n D]``: of the key ids and the value ids."""
        W_value, W_embedding = self._halves(self.W_k)
        # rows one after another: looking up strided ones takes five times as long
        key_table, value_table = linear(self.key_embedding, W_embedding, self.b_k), W_value.T.contiguous()
        k = embedding(keys, key_table) + embedding(values, value_table)
        return self._one_head(k), tuple(
            gate.of(self._one_head(self._numbers(W, b, keys, values)))
            for gate, (W, b) in zip(self.memory.rule.gates, self._gate_parameters(), strict=True)
        )

    def _numbers(self, W: Tensor, b: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = zip(*self._halves(W), b, strict=True)
        numbers = [(self.key_embedding @ w_key + bias)[keys] + w_value[values] for w_value, w_key, bias in rows]
        return torch.stack(numbers, dim=-1)

    def _halves(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Split what acts on ``[onehot(value), embedding(key)]``."""
        W_value, W_embedding = W.split([self.n_keys, self.key_embedding.shape[1]], dim=-1)
        return W_value, W_embedding

    def _one_head(self, x: Tensor) -> Tensor:
        """Return ``[B, T, n D]`` as ``[B, n T, 1, D]``."""
        return x.unflatten(-1, (self.memory.rule.pairs, -1)).flatten(1, 2).unsqueeze(2)


def _drop_unused_embeddings(module: RetrievalModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept the released model's embedding, which has rows for the values too; they are never looked up."""
    table = state_dict.get(f"{prefix}key_embedding")
    if table is not None and table.shape[0] == 2 * module.n_keys:
        state_dict[f"{prefix}key_embedding"] = table[: module.n_keys]
