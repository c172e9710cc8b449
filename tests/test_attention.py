"""The attention layer: its equations, its state from segment to segment, its refusals, and parts of a user's own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fwp_lightning import ops
from fwp_lightning.attention import (
    FEATURE_MAPS,
    PHI_NORMS,
    RULES,
    AttentionConfig,
    FastWeightMemory,
    FavorConfig,
    MemoryState,
    RuleOptions,
    build_attention,
)
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.sweep.workers import import_file

EXACT = {"rtol": 1e-9, "atol": 1e-10}
PLAIN_FAVOR = FavorConfig(stabilizer="none", redraw="never")
MAPS: dict[str, dict[str, Any]] = {
    "elu": {"feature_map": "elu"},
    "dpfp-2": {"feature_map": "dpfp", "nu": 2},
    "favor": {"feature_map": "favor", "n_features": 5, "favor": PLAIN_FAVOR},
}
SIGNED: dict[str, dict[str, Any]] = {"identity": {"feature_map": "identity"}, "tanh": {"feature_map": "tanh"}}
CONFIGS = {
    "softmax": AttentionConfig("softmax", "identity"),
    **{f"sum {m}": AttentionConfig("sum", **o) for m, o in (MAPS | SIGNED).items()},
    **{f"sum {m} readout": AttentionConfig("sum", attention_norm="readout", **o) for m, o in MAPS.items()},
    **{f"sum {m} phi_norm": AttentionConfig("sum", phi_norm="sum", **o) for m, o in MAPS.items()},
    **{
        f"delta {m} {norm}": AttentionConfig("delta", phi_norm="sum", attention_norm=norm, **o)
        for m, o in MAPS.items()
        for norm in ("none", "readout", "both")
    },
    "delta tanh": AttentionConfig("delta", "tanh"),
    "delta elu both scaled": AttentionConfig(
        "delta", "elu", phi_norm="sum", attention_norm="both", output_scale="rsqrt_d", key_norm_eps=1e-3
    ),
    **{f"fwm {m}": AttentionConfig("fwm", **o) for m, o in (MAPS | SIGNED).items()},
    "fwm dpfp-2 phi_norm scaled": AttentionConfig("fwm", "dpfp", nu=2, phi_norm="sum", output_scale="rsqrt_d"),
}


def tensors(b: int, t: int, h: int, d: int, d_value: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, t, h, size, generator=g, dtype=torch.float64) for size in (d, d, d_value))
    return q, k, v, torch.rand(b, t, h, generator=g, dtype=torch.float64)


def build_memory(config: AttentionConfig, d_key: int = 6) -> FastWeightMemory:
    torch.manual_seed(5)
    return FastWeightMemory(config, d_key).double().eval()


def layer(config: AttentionConfig, d_model: int = 12, n_heads: int = 3) -> Any:
    torch.manual_seed(5)
    return build_attention(config, d_model, n_heads)


# --- against the equations --------------------------------------------------------------------------------------------


def written_out(memory: FastWeightMemory, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """One head, one step at a time; W is value x key as in the paper (eqs. 17-29; SPEC A.12, A.13)."""
    c, eps = memory.config, memory.config.attention_norm_eps
    b, t, h, d = k.shape
    o = torch.zeros(b, t, h, v.shape[-1], dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            if c.rule == "softmax":
                for s in range(t):
                    a = torch.softmax(k[i, : s + 1, j] @ q[i, s, j] / math.sqrt(d), 0)
                    o[i, s, j] = a @ v[i, : s + 1, j]
                continue
            phi_k, phi_q = memory.feature_map(k[i, :, j][None, :, None]), memory.feature_map(q[i, :, j][None, :, None])
            phi_k, phi_q = phi_k[0, :, 0], phi_q[0, :, 0]
            if c.phi_norm == "sum":
                phi_k = phi_k / (phi_k.sum(-1, keepdim=True) + c.key_norm_eps)
                phi_q = phi_q / (phi_q.sum(-1, keepdim=True) + c.query_norm_eps)
            W = torch.zeros(v.shape[-1], phi_k.shape[-1], dtype=torch.float64)
            z = torch.zeros(phi_k.shape[-1], dtype=torch.float64)
            for s in range(t):
                key, value, strength = phi_k[s], v[i, s, j], beta[i, s, j]
                if c.rule == "sum":
                    W = W + torch.outer(value, key)
                elif c.attention_norm == "both":
                    d_s = z @ key if s > 0 else torch.ones((), dtype=torch.float64)
                    old = W @ key / (d_s + eps)
                    W = W + d_s / (d_s + eps) * strength * torch.outer(value - old, key)
                else:
                    W = W + strength * torch.outer(value - W @ key, key)
                if c.rule == "fwm" and s > 0:
                    W = W / torch.clamp(W.norm(), min=1)
                z = z + key
                o[i, s, j] = W @ phi_q[s]
                if c.attention_norm != "none":
                    o[i, s, j] /= z @ phi_q[s] + eps
    return o / math.sqrt(d) if c.output_scale == "rsqrt_d" else o


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_equals_the_equations_written_out(name: str) -> None:
    memory = build_memory(CONFIGS[name])
    q, k, v, beta = tensors(2, 7, 2, 6, 4)
    o, _ = memory(q, k, v, beta)
    torch.testing.assert_close(o, written_out(memory, q, k, v, beta), **EXACT)


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_after_writing_equals_the_last_output(name: str) -> None:
    memory = build_memory(CONFIGS[name])
    q, k, v, beta = tensors(2, 7, 2, 6, 4)
    o, state = memory(q, k, v, beta)
    written = memory.write(k, v, beta)
    for ours, theirs in zip(written.memory, state.memory, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(memory.read(q[:, -1:], written), o[:, -1:], **EXACT)


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_weights_equal_writing_and_reading(name: str, n_queries: int) -> None:
    memory = build_memory(CONFIGS[name])
    assert memory.has_attention_weights is not (CONFIGS[name].rule == "fwm" or CONFIGS[name].attention_norm == "both")
    if not memory.has_attention_weights:
        return
    q, k, v, beta = tensors(2, 7, 2, 6, 4)
    q = q[:, :n_queries]
    o = memory.read(q, memory.write(k, v, beta))
    torch.testing.assert_close(torch.einsum("bhnt,bthv->bnhv", memory.attention_weights(q, k, beta), v), o, **EXACT)


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if c.rule in ("sum", "softmax")])
def test_non_causal_reads_every_query_from_the_whole_sequence(name: str) -> None:
    memory = build_memory(CONFIGS[name])
    q, k, v, _ = tensors(2, 7, 2, 6, 4)
    o, _ = memory(q, k, v, causal=False)
    torch.testing.assert_close(o, memory.read(q, memory.write(k, v)), **EXACT)


@pytest.mark.parametrize("rule", ["delta", "fwm"])
def test_rules_that_write_in_an_order_have_no_non_causal_form(rule: str) -> None:
    q, k, v, beta = tensors(1, 3, 1, 6, 4)
    with pytest.raises(ValueError, match=f"rule {rule} writes in an order"):
        build_memory(AttentionConfig(rule, "elu"))(q, k, v, beta, causal=False)


@pytest.mark.parametrize("rule", ["delta", "fwm"])
def test_rules_with_a_write_strength_ask_for_it(rule: str) -> None:
    q, k, v, _ = tensors(1, 3, 1, 6, 4)
    with pytest.raises(ValueError, match=f"rule {rule} needs beta"):
        build_memory(AttentionConfig(rule, "elu"))(q, k, v)


@pytest.mark.parametrize("name", CONFIGS)
def test_future_does_not_leak(name: str) -> None:
    memory = build_memory(CONFIGS[name])
    q, k, v, beta = tensors(2, 7, 2, 6, 4)
    changed = [
        torch.cat([x[:, :4], y[:, 4:]], 1) for x, y in zip((q, k, v, beta), tensors(2, 7, 2, 6, 4, 9), strict=True)
    ]
    o, other = memory(q, k, v, beta)[0], memory(*changed)[0]
    torch.testing.assert_close(o[:, :4], other[:, :4], **EXACT)
    assert not torch.allclose(o[:, 4:], other[:, 4:])


def test_future_does_not_leak_through_a_stabilizer() -> None:
    # later keys with much larger exponents must not push earlier outputs to 0 through the eps of the read-out
    memory = build_memory(AttentionConfig("sum", "favor", attention_norm="readout", favor=FavorConfig(redraw="never")))
    q, k, v, _ = tensors(1, 7, 1, 6, 4)
    k = k * 12
    later = k.clone()
    later[:, 4:] = 0.0
    o, other = memory(q, k, v)[0], memory(q, later, v)[0]
    torch.testing.assert_close(o[:, :4], other[:, :4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["none", "sum"])
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_a_sequence_stabilizer_that_nothing_cancels_is_refused(rule: str, norm: str) -> None:
    """Its factor depends on the whole sequence: without a normaliser it changes outputs and shows them the future."""
    q, k, v, beta = tensors(1, 7, 1, 6, 4)
    plain = AttentionConfig(rule, "favor", phi_norm=norm, n_features=6, favor=PLAIN_FAVOR)
    try:
        memory = build_memory(replace(plain, favor=FavorConfig(stabilizer="sequence", redraw="never")))
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        expected = build_memory(plain)
        o = memory.read(q, memory.write(k, v, beta))
        torch.testing.assert_close(o, expected.read(q, expected.write(k, v, beta)), **EXACT)
    assert not refusal or "stabilizer" in refusal


# --- softmax ----------------------------------------------------------------------------------------------------------


def test_softmax_equals_torch_and_its_state_is_all_keys_and_values() -> None:
    memory = build_memory(CONFIGS["softmax"])
    q, k, v, _ = tensors(2, 7, 3, 6, 6)
    o, state = memory(q, k, v)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(o, expected, **EXACT)
    _, first = memory(q[:, :4], k[:, :4], v[:, :4])
    later, last = memory(q[:, 4:], k[:, 4:], v[:, 4:], state=first)
    torch.testing.assert_close(later, expected[:, 4:], **EXACT)
    for ours, theirs, name in zip(last.memory, state.memory, "kv", strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT, msg=name)
    assert state.z is None
    assert memory.state_size(6) is None


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_splitting_with_the_state_equals_the_whole(name: str) -> None:
    attention = layer(CONFIGS[name]).double().eval()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, state = attention(x)
    assert y.shape == x.shape
    for split in (1, 2, 5, 8):
        first, middle = attention(x[:, :split])
        second, last = attention(x[:, split:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), y, **EXACT)
        for ours, theirs in zip((*last.memory, last.z), (*state.memory, state.z), strict=True):
            assert (ours is None) is (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("norm", ["none", "readout"])
@pytest.mark.parametrize("feature_map", ["elu", "dpfp"])
def test_queries_of_the_released_sum_rule_have_no_gradient_from_the_carried_memory(norm: str, feature_map: str) -> None:
    exact = build_memory(AttentionConfig("sum", feature_map, attention_norm=norm))
    released = build_memory(AttentionConfig("sum", feature_map, attention_norm=norm, carried_query_gradient="none"))
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 5, 2, 6, 4))
    k_0, v_0 = tensors(2, 7, 2, 6, 4, seed=9)[1:3]
    state = exact.write(k_0, v_0)
    W_0, z_0 = state.memory[0], state.z
    weights = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (o, last), (o_exact, last_exact) = released(q, k, v, None, state), exact(q, k, v, None, state)
    torch.testing.assert_close(o, o_exact, **EXACT)
    torch.testing.assert_close(last.memory[0], last_exact.memory[0], **EXACT)

    # what the released kernel's backward pass computes: memories rebuilt from zero, the normaliser's gradient whole
    q_phi, k_phi = exact.query_features(q), exact.key_features(k)
    W = torch.einsum("bthk,bthv->bthkv", k_phi, v).cumsum(1)
    read = torch.einsum("bthk,bthkv->bthv", q_phi, W)
    read = read + torch.einsum("bthk,bhkv->bthv", q_phi.detach(), W_0)
    if norm == "readout":
        assert z_0 is not None
        z = k_phi.cumsum(1) + z_0.unsqueeze(1)
        read = read / ((z * q_phi).sum(-1, keepdim=True) + released.config.attention_norm_eps)
    ours = torch.autograd.grad((o * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((read * weights).sum(), (q, k, v))
    for found, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, right, **EXACT)
    whole = torch.autograd.grad((o_exact * weights).sum(), (q, k, v))
    assert not torch.allclose(ours[0], whole[0])
    torch.testing.assert_close(ours[1:], whole[1:], **EXACT)


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decoding_equals_the_whole_in_float32(name: str) -> None:
    attention = layer(CONFIGS[name]).eval()
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    y, _ = attention(x)
    state, steps = None, []
    for t in range(6):
        step, state = attention(x[:, t : t + 1], state)
        steps.append(step)
    # outputs of order 1, a few hundred roundings each
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_segment_changes_nothing(name: str) -> None:
    attention = layer(CONFIGS[name]).double().eval()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, state = attention(x)
    y, after = attention(x[:, :0], state)
    assert y.shape == (2, 0, 12)
    for ours, theirs in zip((*after.memory, after.z), (*state.memory, state.z), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("sum", "favor", attention_norm="readout", n_features=6, favor=FavorConfig(redraw="never")),
        AttentionConfig("delta", "favor", phi_norm="sum", n_features=6, favor=FavorConfig(redraw="never")),
        AttentionConfig(
            "delta", "favor", phi_norm="sum", n_features=6, favor=FavorConfig(redraw="never", stabilizer="vector")
        ),
    ],
    ids=["sum sequence", "delta sequence", "delta vector"],
)
def test_stabilised_favor_carries_its_state_exactly_or_refuses_to(config: AttentionConfig) -> None:
    attention = layer(config).double().eval()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # the two halves have different largest exponents
    x[:, 5:] *= 3
    y, _ = attention(x)
    first, middle = attention(x[:, :5])
    try:
        second, _ = attention(x[:, 5:], middle)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        # attention_norm_eps, added to a rescaled denominator, is all that may differ
        torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-4, atol=1e-5)
    assert not refusal or "stabilizer" in refusal


def test_a_carried_state_keeps_the_random_matrix_it_was_written_with_or_is_refused() -> None:
    """SPEC G18: a state written with one random matrix means nothing to another."""
    favor = FavorConfig(redraw="training", stabilizer="none")
    attention = layer(AttentionConfig("delta", "favor", phi_norm="sum", n_features=6, favor=favor)).double().train()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, middle = attention(x[:, :5])
    before = attention.memory.feature_map.directions.clone()
    refusal = ""
    try:
        attention(x[:, 5:], middle)
    except ValueError as error:
        refusal = str(error)
    assert refusal or torch.equal(attention.memory.feature_map.directions, before)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter_and_the_first_segment(name: str) -> None:
    attention = layer(CONFIGS[name]).double().eval()
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    _, middle = attention(x[:, :3])
    y, _ = attention(x[:, 3:], middle)
    gradients = torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])
    assert bool(gradients[0][:, :3].any())
    assert all(bool(g.any()) and bool(g.isfinite().all()) for g in gradients)
    y, _ = attention(x[:, 3:], middle.detach())
    assert not torch.autograd.grad(y.square().sum(), x)[0][:, :3].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_batch_passes(name: str) -> None:
    y, state = layer(CONFIGS[name])(torch.zeros(0, 5, 12))
    assert y.shape == (0, 5, 12)
    assert isinstance(state, MemoryState)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_autocast_gives_finite_results_and_a_float32_state(name: str) -> None:
    attention = layer(CONFIGS[name])
    x = 3 * torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = attention(x)
        y, state = attention(x, state)
    assert bool(y.isfinite().all())
    assert all(s.dtype == torch.float32 for s in (*state.memory, *(() if state.z is None else (state.z,))))
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in attention.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_and_attention_weights_stay_float32_under_autocast(name: str) -> None:
    memory = build_memory(CONFIGS[name]).float()
    q, k, v, beta = (x.float() for x in tensors(2, 7, 2, 6, 4))
    state = memory.write(k, v, beta)
    expected = memory.read(q, state)
    weights = memory.attention_weights(q, k, beta) if memory.has_attention_weights else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = memory.read(q, state)
        found_weights = None if weights is None else memory.attention_weights(q, k, beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if weights is not None:
        assert found_weights.dtype == torch.float32
        torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_size_counts_the_numbers_of_the_state(name: str) -> None:
    if CONFIGS[name].rule == "softmax":
        return
    memory = build_memory(CONFIGS[name])
    q, k, v, beta = tensors(1, 3, 1, 6, 4)
    _, state = memory(q, k, v, beta)
    assert memory.state_size(4) == sum(x.numel() for x in (*state.memory, *(() if state.z is None else (state.z,))))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_backend_changes_the_result_by_rounding_only(backend: str) -> None:
    config = AttentionConfig("delta", "elu", phi_norm="sum", attention_norm="both")
    x = torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, other = (layer(replace(config, backend=name)).double()(x)[0] for name in ("auto", backend))
    torch.testing.assert_close(y, other, **EXACT)


@pytest.mark.parametrize(("d_model", "n_heads"), [(6, 4), (6, 0), (6, -1)])
def test_heads_that_do_not_divide_the_model_are_refused(d_model: int, n_heads: int) -> None:
    with pytest.raises(ValueError, match=f"d_model={d_model} does not divide by n_heads={n_heads}"):
        build_attention(AttentionConfig("delta", "elu"), d_model, n_heads)


# --- configuration ----------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "phi_norm": ({"phi_norm": "summ"}, r"unknown phi_norm 'summ'\. Did you mean 'sum'\? Known: .*none, sum"),
    "attention_norm": ({"attention_norm": "read"}, r"unknown attention_norm 'read'\. Did you mean 'readout'\?"),
    "output_scale": ({"output_scale": "rsqrt"}, r"unknown output_scale 'rsqrt'\. Did you mean 'rsqrt_d'\?"),
    "nu zero": ({"nu": 0}, r"nu=0"),
    "nu a fraction": ({"nu": 1.5}, r"nu=1\.5 must be a whole number"),
    "n_features": ({"n_features": 0}, r"n_features=0"),
    "n_features a fraction": ({"n_features": 2.5}, r"n_features=2\.5 must be a whole number"),
    "eps negative": ({"key_norm_eps": -1.0}, r"key_norm_eps=-1\.0"),
    "eps nan": ({"attention_norm_eps": math.nan}, r"attention_norm_eps=nan"),
    "eps infinite": ({"query_norm_eps": math.inf}, r"query_norm_eps=inf"),
    "softmax with a map": (
        {"rule": "softmax", "feature_map": "elu"},
        r"softmax .*feature_map=elu: it normalises by itself; set feature_map: identity",
    ),
    "softmax with phi_norm": ({"rule": "softmax", "feature_map": "identity", "phi_norm": "sum"}, r"softmax .*phi_norm"),
    "softmax with a normaliser": (
        {"rule": "softmax", "feature_map": "identity", "attention_norm": "readout"},
        r"softmax .*attention_norm",
    ),
    "sum retrieves nothing": (
        {"rule": "sum", "attention_norm": "both"},
        r"rule sum has no attention_norm=both: .*delta",
    ),
    "carried gradients": ({"carried_query_gradient": "no"}, r"unknown carried_query_gradient 'no'.*Known: exact, none"),
    "carried gradients of delta": ({"carried_query_gradient": "none"}, r"rule delta .*released sum rule"),
    "fwm retrieves otherwise": ({"rule": "fwm", "attention_norm": "both"}, r"fwm .*attention_norm"),
    "fwm rescales": ({"rule": "fwm", "attention_norm": "readout"}, r"fwm .*attention_norm"),
    "options of another rule": ({"rule_options": RuleOptions()}, r"rule delta has no rule_options .*its own: none"),
    "vector without phi_norm": (
        {"feature_map": "favor", "favor": FavorConfig(stabilizer="vector")},
        r"favor\.stabilizer=vector .*phi_norm",
    ),
    "fwm with a stabilizer": (
        {"rule": "fwm", "feature_map": "favor", "favor": FavorConfig(stabilizer="sequence")},
        r"favor\.stabilizer.* fwm",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_senseless_configuration_is_refused_with_one_sentence(what: str) -> None:
    options, message = MISTAKES[what]
    with pytest.raises(ValueError, match=message) as caught:
        AttentionConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
@pytest.mark.parametrize("norm", [{"phi_norm": "sum"}, {"attention_norm": "readout"}], ids=str)
def test_dividing_by_a_sum_of_signed_features_is_refused(feature_map: str, norm: dict[str, Any]) -> None:
    """A sum of positive and negative features can be 0: nothing normalises by it."""
    with pytest.raises(ValueError, match=feature_map):
        AttentionConfig("sum", feature_map, **norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "orthogonl"}, r"unknown favor\.features 'orthogonl'\. Did you mean 'orthogonal'\?"),
        ({"scaling": "sqrt"}, r"unknown favor\.scaling 'sqrt'"),
        ({"stabilizer": "vectors"}, r"unknown favor\.stabilizer 'vectors'\. Did you mean 'vector'\?"),
        ({"redraw": "allways"}, r"unknown favor\.redraw 'allways'\. Did you mean 'always'\?"),
        ({"kernel_eps": -1e-4}, r"favor\.kernel_eps=-0\.0001"),
        ({"kernel_eps": math.nan}, r"favor\.kernel_eps=nan"),
    ],
    ids=str,
)
def test_a_senseless_favor_choice_is_refused_with_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FavorConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "delte"}, r"unknown rule 'delte'\. Did you mean 'delta'\? Known: .*delta, .*fwm, .*softmax, .*sum"),
        ({"feature_map": "dpfpp"}, r"unknown feature map 'dpfpp'\. Did you mean 'dpfp'\? Known: dpfp, elu"),
        ({"backend": "chunkd"}, r"unknown backend 'chunkd'\. Did you mean 'chunked'\?"),
        ({"backend": "scan"}, r"backend 'scan' does not compute the rule 'delta'"),
        ({"feature_map": "dpfp", "nu": 12}, r"nu=12"),
    ],
    ids=str,
)
def test_what_only_the_registries_know_is_refused_when_the_layer_is_built(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention(AttentionConfig(**options), 12, 1)


@pytest.mark.parametrize("backend", ["chunked", "nonsense"])
def test_a_backend_that_is_named_for_softmax_is_refused_because_none_computes_it(backend: str) -> None:
    with pytest.raises(ValueError, match=backend):
        build_attention(AttentionConfig("softmax", "identity", backend=backend), 12, 3)


# --- parts of a user's own --------------------------------------------------------------------------------------------

USER_FILE = '''
"""A map, a normalisation and two rules of my own."""
from dataclasses import dataclass

import torch
from fwp_lightning import ops
from fwp_lightning.attention import FEATURE_MAPS, PHI_NORMS, RULES, FeatureMap, Gate, PhiNorm, Rule, RuleOptions


@FEATURE_MAPS.register("my_square")
class MySquare(FeatureMap):
    """phi(x) = [x^2, 1]."""

    def __init__(self, d_key, config):
        super().__init__(d_key, config)
        self.n_out = d_key + 1

    def forward(self, x):
        return torch.cat([x.square(), torch.ones_like(x[..., :1])], -1)


@RULES.register("my_decay")
class MyDecay(Rule):
    """Forget a little at every step."""

    def scan(self, q, k, v, *, gates, state, backend, causal):
        b, _, h, n = k.shape
        W = state[0] if state else v.new_zeros(b, h, n, v.shape[-1])
        outputs = []
        for t in range(k.shape[1]):
            W = 0.9 * W + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            if q is not None:
                outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], W))
        return (torch.stack(outputs, 1) if outputs else None), (W,)


@PHI_NORMS.register("my_max")
class MyMax(PhiNorm):
    """phi'(x) = phi(x) / max_j phi(x)_j."""

    takes_signs = False

    def divide(self, phi, eps):
        return phi / (phi.amax(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class MyOptions(RuleOptions):
    share: float = 0.5


@ops.implements("my_gate", "reference")
def my_gate(q, k, v, gamma, state, *, share):
    # the sum rule on values that gamma makes smaller
    return ops.sum_rule(q, k, v * (share * gamma).unsqueeze(-1), state)


@RULES.register("my_gate")
class MyGate(Rule):
    """Write a share of gamma."""

    gates = (Gate("gamma", meaning="how much is written"),)
    Options = MyOptions

    def scan(self, q, k, v, *, gates, state, backend, causal):
        compute = ops.implementation("my_gate", backend, k, v)
        o, W = compute(q, k, v, *gates, state[0] if state else None, share=self.options.share)
        return o, (W,)
'''


@pytest.fixture
def own_parts(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "parts_of_mine.py"
    path.write_text(USER_FILE, encoding="utf-8")
    import_file(str(path))
    yield path
    del sys.modules["parts_of_mine"]
    FEATURE_MAPS._parts.pop("my_square")
    PHI_NORMS._parts.pop("my_max")
    for rule in ("my_decay", "my_gate"):
        RULES._parts.pop(rule)
    del ops.BACKENDS["reference"].rules["my_gate"]


@pytest.mark.usefixtures("own_parts")
@pytest.mark.parametrize("rule", ["sum", "delta", "fwm", "my_decay", "my_gate"])
def test_a_map_and_a_rule_from_a_users_file_work_like_the_built_in_ones(rule: str) -> None:
    config = AttentionConfig(rule, "my_square", phi_norm="sum", output_scale="rsqrt_d")
    attention = layer(config).double()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, _ = attention(x)
    first, middle = attention(x[:, :5])
    second, last = attention(x[:, 5:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, **EXACT)
    # d_head = 4, and one feature more than that
    assert last.memory[0].shape == (2, 3, 5, 4)
    y.sum().backward()


@pytest.mark.usefixtures("own_parts")
@pytest.mark.parametrize("compute", ["auto", "plain", "factored"])
@pytest.mark.parametrize(
    ("rule", "feature_map"),
    [("sum", "my_square"), ("delta", "my_square"), ("my_decay", "elu"), ("my_gate", "elu")],
    ids=str,
)
def test_parts_from_a_users_file_train_in_the_retrieval_model(rule: str, feature_map: str, compute: Any) -> None:
    torch.manual_seed(0)
    model = RetrievalModel(AttentionConfig(rule, feature_map), n_keys=4, d_key=6, compute=compute)
    ids = torch.tensor([[0, 1, 2, 3]])
    y = model(ids, ids.flip(1), ids[:, :1])
    assert y.shape == (1, 1, 4)
    y.square().sum().backward()


@pytest.mark.usefixtures("own_parts")
def test_a_users_rule_has_gates_and_numbers_and_a_normalisation_of_the_users_own() -> None:
    options = RULES["my_gate"].Options(share=0.25)  # type: ignore[misc, call-arg]
    config = AttentionConfig("my_gate", "elu", phi_norm="my_max", rule_options=options, backend="reference")
    attention = layer(config).double()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = (W(x).unflatten(-1, (3, 4)) for W in (attention.W_q, attention.W_k, attention.W_v))
    k, q = (
        phi / phi.amax(-1, keepdim=True) for phi in (torch.nn.functional.elu(k) + 1, torch.nn.functional.elu(q) + 1)
    )
    o, _ = ops.sum_rule(q, k, 0.25 * torch.sigmoid(attention.W_gamma(x)).unsqueeze(-1) * v)
    assert o is not None
    torch.testing.assert_close(attention(x)[0], attention.W_o(o.flatten(-2)), **EXACT)
    with pytest.raises(ValueError, match="rule my_gate needs gamma, how much is written"):
        attention.memory(q, k, v)
    with pytest.raises(ValueError, match=r"unknown phi_norm 'my_mx'\. Did you mean 'my_max'"):
        AttentionConfig("my_gate", "elu", phi_norm="my_mx")
    with pytest.raises(ValueError, match="feature_map=tanh has features of both signs"):
        AttentionConfig("my_gate", "tanh", phi_norm="my_max")


@pytest.mark.usefixtures("own_parts")
def test_a_mistaken_name_suggests_the_users_own_part() -> None:
    with pytest.raises(ValueError, match="Did you mean 'my_square'"):
        build_attention(AttentionConfig("sum", "my_sqare"), 12, 3)
