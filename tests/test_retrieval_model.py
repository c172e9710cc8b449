"""The retrieval model against the released code's equations, written out again step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.data.retrieval import RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel

RELEASED_FAVOR = FavorConfig(scaling="none", stabilizer="none", redraw="never")
MODELS = {
    "softmax": AttentionConfig("softmax", "identity"),
    "elu sum": AttentionConfig("sum", "elu", attention_norm="readout"),
    "dpfp-1 sum": AttentionConfig("sum", "dpfp", attention_norm="readout", nu=1),
    "dpfp-3 sum": AttentionConfig("sum", "dpfp", attention_norm="readout", nu=3),
    "favor sum": AttentionConfig("sum", "favor", attention_norm="readout", n_features=24, favor=RELEASED_FAVOR),
    "elu delta": AttentionConfig("delta", "elu", phi_norm="sum", query_norm_eps=1e-6),
    "dpfp-2 delta": AttentionConfig("delta", "dpfp", phi_norm="sum", nu=2, query_norm_eps=1e-6),
    "favor delta": AttentionConfig(
        "delta", "favor", phi_norm="sum", n_features=24, favor=RELEASED_FAVOR, query_norm_eps=1e-6
    ),
    "tanh fwm": AttentionConfig("fwm", "tanh"),
    "dpfp-1 fwm": AttentionConfig("fwm", "dpfp", nu=1),
}


def build(config: AttentionConfig, n_keys: int, compute: str, d_key: int = 16) -> RetrievalModel:
    torch.manual_seed(3)
    readout_norm = "layer_norm" if config.rule == "fwm" else "none"
    return RetrievalModel(config, n_keys, d_key, readout_norm=readout_norm, compute=compute).double()


def features(x: Tensor, model: RetrievalModel) -> Tensor:
    """phi as the released code has it; x is one vector."""
    config = model.memory.config
    if config.feature_map == "elu":
        return F.elu(x) + 1
    if config.feature_map == "tanh":
        return torch.tanh(x)
    if config.feature_map == "dpfp":
        u = torch.cat([torch.relu(x), torch.relu(-x)])
        return torch.cat([u * u.roll(j) for j in range(1, config.nu + 1)])
    if config.feature_map == "favor":
        R = model.memory.feature_map.directions.double()
        offset = x @ x / 2 + 0.5 * math.log(config.n_features) + 0.5 * math.log(2)
        return torch.cat([torch.exp(R @ x - offset), torch.exp(-(R @ x) - offset)])
    return x


def released_output(model: RetrievalModel, keys: Tensor, values: Tensor, query: int) -> Tensor:
    """One sequence, one query, one step at a time: the released rules `sum`, `ours`, `fwm` and softmax."""
    config, n = model.memory.config, model.n_keys
    eye = torch.eye(n, dtype=torch.float64)
    pairs = [torch.cat([eye[v], model.key_embedding[k]]) for k, v in zip(keys, values, strict=True)]
    ks = [features(model.W_k @ x + model.b_k, model) for x in pairs]
    q = features(model.W_q @ model.key_embedding[query] + model.b_q, model)
    vs = [eye[v] for v in values]
    if config.rule == "softmax":
        a = torch.softmax(torch.stack([k @ q for k in ks]) / math.sqrt(model.d_key), 0)
        return sum(a_t * v for a_t, v in zip(a, vs, strict=True))
    if config.rule == "sum":
        W = sum(torch.outer(v, k) for k, v in zip(ks, vs, strict=True))
        return W @ q / (sum(ks) @ q + 1e-6)
    betas = [torch.sigmoid(model.W_beta @ x + model.b_beta) for x in pairs]
    W = torch.zeros(n, len(q), dtype=torch.float64)
    for t, (k, v, beta) in enumerate(zip(ks, vs, betas, strict=True)):
        k = k / k.sum() if config.rule == "delta" else k
        old = W @ k
        W = W - torch.outer(old, k) + torch.outer(beta * v + (1 - beta) * old, k)
        if config.rule == "fwm" and t > 0:
            W = W / (torch.relu(W.norm() - 1) + 1)
    if config.rule == "delta":
        return W @ (q / (q.sum() + 1e-6))
    return F.layer_norm(W @ q, [n])


@pytest.mark.parametrize("compute", ["plain", "factored", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_released_equations(name: str, compute: str) -> None:
    model = build(MODELS[name], n_keys=7, compute=compute)
    data = RetrievalData(n_keys=7, replacement="sum" not in name, batch_size=3, steps_per_block=1, seed=5)
    keys, values, query, target = (x[0] for x in data.block(0))

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [p for p in model.pair_parameters if p is not None]))

    expected = torch.stack(
        [released_output(model, k, v, int(q)) for k, v, q in zip(keys, values, query.squeeze(-1), strict=True)]
    )
    onehot = F.one_hot(target.squeeze(-1), 7).double()
    expected_loss = (0.5 * (onehot - expected).square()).sum(-1).mean()
    if compute == "compiled":
        if compiled.why_unavailable("pair_training"):
            pytest.skip("the kernel cannot be built here")
        found = ops.pair_gradients(
            model.pair_memory, model.pair_parameters, ops.PairBatches(*data.block(0)), model.training_directions(1)
        )
        loss, grads = found[0].squeeze(), [g for g in found[1] if g is not None]
    else:
        y = model(keys, values, query).squeeze(1)
        loss = (0.5 * (onehot - y).square()).sum(-1).mean()
        grads = gradients(loss)

    # both are float64 sums of at most a few thousand terms of order 1
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, gradients(expected_loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_factored_equals_plain_for_many_queries(name: str) -> None:
    data = RetrievalData(n_keys=9, replacement=True, evaluation_sequences=4, seed=2)
    batch = data.evaluation(0)
    plain, factored = (build(MODELS[name], 9, compute) for compute in ("plain", "factored"))
    factored.load_state_dict(plain.state_dict())
    outputs = [model(batch.keys, batch.values, batch.queries) for model in (plain, factored)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    weight = torch.sin(torch.arange(outputs[0].numel()).double()).view_as(outputs[0])
    grads = [
        torch.autograd.grad((y * weight).sum(), list(model.parameters()))
        for y, model in zip(outputs, (plain, factored), strict=True)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_released_embedding_loads_although_it_has_rows_for_values() -> None:
    model = build(MODELS["elu sum"], 5, "factored")
    state = model.state_dict()
    state["key_embedding"] = torch.cat([state["key_embedding"] + 1, torch.zeros_like(state["key_embedding"])])
    model.load_state_dict(state)
    torch.testing.assert_close(model.key_embedding, state["key_embedding"][:5])


def test_sizes_are_those_of_the_released_model() -> None:
    model = RetrievalModel(MODELS["elu delta"], n_keys=600)
    assert model.key_embedding.shape == (600, 1320)
    assert model.W_k.shape == (64, 1920)
    assert model.W_q.shape == (64, 1320)
    assert model.W_beta.shape == (1, 1920)
    assert float(model.W_k.detach().abs().max()) <= 1 / 8


@pytest.mark.parametrize(("n_keys", "n_features"), [(60, 64), (200, 64), (600, 512)])
def test_stabilised_favor_reads_few_keys_and_then_none_as_keys_grow(n_keys: int, n_features: int) -> None:
    """What README says of FAVOR+ at initialisation under the corrected protocol."""
    torch.manual_seed(1)
    favor = FavorConfig(stabilizer="sequence", redraw="training", scaling="rsqrt_sqrt_d")
    config = AttentionConfig("sum", "favor", n_features=n_features, attention_norm="readout", favor=favor)
    model = RetrievalModel(config, n_keys).eval()
    batch = RetrievalData(n_keys=n_keys, seed=0, evaluation_sequences=2, max_queries=0).evaluation(0)
    with torch.no_grad():
        k, _ = model._factored_keys(batch.keys, batch.values)
        q = F.linear(model.key_embedding[batch.queries], model.W_q, model.b_q)
        weights = model.memory.attention_weights(q.unsqueeze(2), k)[:, 0]
    largest, total = weights.amax(-1).median(), weights.sum(-1).median()
    size = k.square().sum(-1).mean() / 8
    if n_keys == 60:
        assert size < 7
        assert largest < 0.2
    elif n_keys == 200:
        assert 16 < size < 21
        assert 0.25 < largest < 0.5
    else:
        # the denominator is far below the 1e-6 beside it: next to nothing is read
        assert total < 0.1
